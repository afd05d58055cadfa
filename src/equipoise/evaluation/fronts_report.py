"""The report's fronts: an overview, panels of methods that cost about the same, all brought to one KL, and two objectives at a time.

Where there are more than `MOST` methods beside the reference and its best-of-n, an overview shows those that no other dominates, and
the panels by cost show all of them, `MOST` at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from equipoise.evaluation.drawing import Evaluation, Point, entry, number
from equipoise.evaluation.figures import drawn_on, front_figure
from equipoise.evaluation.front import non_dominated
from equipoise.evaluation.headline import at_cost
from equipoise.evaluation.markup import Html, decimal, element, figures, interval, join, multiple, note, percent, table

MOST = 7
"""Methods in one figure, beside the reference and its best-of-n."""
_PAIRS = 6
_LADDER = ("reference", "best-of-n")
_REWARDS = "Rewards that were optimised. Up and right is better; bars are 95 % intervals over prompts, a line runs along the weights."
_JUDGES = "Judges that no method saw. Gains on the rewards that don't show here suggest that the rewards were gamed."
_ENDS = " Only points with all weight on one objective are shown."
_CLASSES = (
    "Methods beside what the same cost buys without them: each is shown with the best-of-n that is nearest to it in cost, as a ratio, "
    "those of more than 1.5 times the largest's cost beside that one. best-of-n reads its prompt once."
)
_AT_KL = (
    "A mixture that gives the method's answer with probability a and the reference's otherwise has a times the gain, and at most a "
    "times the KL. So every point can be brought to the same budget, and this is what it then gains: at least, since a method made for "
    "that budget may do better. A method that spends less is unchanged. The share a is fixed by the mean KL over prompts, without the "
    "floor, and isn't resampled."
)
_FACES = (
    "The points with no weight on the other objectives, as a comparison of two: the same reference point and resampled prompts; "
    "compare methods with the same number of points. The reference is one point."
)


def front_section(evaluation: Evaluation) -> Html:
    """The overview on every two objectives, then on every two judges."""
    drawn: list[tuple[str, object]] = []
    points = evaluation.get("points") or []
    for key, names, caption in (("reward", evaluation["objectives"], _REWARDS), ("judge", evaluation.get("judges") or [], _JUDGES)):
        for i, j in itertools.islice(itertools.combinations(range(len(names)), 2), _PAIRS):
            shown, left_out = _overview(points, key, (i, j))
            ends = _ENDS if key == "judge" and len(evaluation["objectives"]) > 2 else ""
            drawn.append((front_figure(evaluation, names[i], names[j], shown), f"{caption}{ends}{left_out}"))
    return figures(*drawn)


def _overview(points: Sequence[Point], key: str, pair: tuple[int, int]) -> tuple[list[Point], str]:
    """The points of an overview, and what its caption says of the methods that it leaves out."""
    methods = dict.fromkeys(p["method"] for p in points if p["method"] not in _LADDER)
    if len(methods) <= MOST:
        return list(points), ""
    found = [p for p in points if p["method"] in methods and drawn_on(p, key, pair)]
    places = [[number(entry(p.get(key), k).get("mean")) for k in pair] for p in found]
    best = non_dominated(np.array(places, dtype=np.float64).reshape(-1, 2))
    kept = {p["method"] for p, stays in zip(found, best, strict=True) if stays}
    shown = [p for p in points if p["method"] in kept or p["method"] in _LADDER]
    left_out = len(methods) - len(kept)
    return shown, f" Left out: {left_out} methods, each of whose points another method matches or beats on both axes." if left_out else ""


def classes_section(evaluation: Evaluation) -> Html:
    """A panel per class of cost and two objectives: its methods, best-of-n of that n and the reference."""
    points, names = evaluation.get("points") or [], evaluation["objectives"]
    parts: list[Html] = []
    classes = {p["cost_class"] for p in points if p.get("cost_class") is not None and p["method"] not in _LADDER}
    most = max((p.get("n_candidates") or 1 for p in points if p["method"] == "best-of-n"), default=1)
    for n in sorted(classes, key=lambda n: n or np.inf):
        beside = [p for p in points if p["method"] == "reference" or (p["method"] == "best-of-n" and p.get("n_candidates") == (n or most))]
        methods = _by_hypervolume(evaluation, {p["method"] for p in points if p.get("cost_class") == n} - set(_LADDER))
        drawn: list[tuple[str, object]] = []
        size = -(-len(methods) // -(-len(methods) // MOST)) if methods else 1  # panels as full as each other
        for start in range(0, len(methods), size):
            few = methods[start : start + size]
            shown = beside + [p for p in points if p["method"] in few and p.get("cost_class") == n]
            for i, j in itertools.islice(itertools.combinations(range(len(names)), 2), _PAIRS):
                caption = f"{', '.join(few)}; {at_cost(n)}."
                drawn.append((front_figure(evaluation, names[i], names[j], shown, f"-cost{n}-{start}"), caption))
        found = figures(*drawn)
        if found:
            parts += [element("h3", at_cost(n).capitalize()), found]
    return join(note(_CLASSES), *parts) if parts else Html("")


def _by_hypervolume(evaluation: Evaluation, methods: set[str]) -> list[str]:
    """Best first, so that the first panel holds the best."""
    value: dict[str, float] = {}
    for row in evaluation.get("hypervolume") or []:
        name = re.sub(r", best-of-\d+$", ", best-of-n", row["method"])
        value[name] = max(value.get(name, 0.0), number(row.get("value")) or 0.0)
    return sorted(methods, key=lambda name: (-value.get(name, 0.0), name))


def at_kl_section(evaluation: Evaluation) -> Html:
    """What every method gains within one budget of KL: fronts and a table."""
    found: Mapping[str, Any] = evaluation.get("at_kl") or {}
    rows, names, drawn = found.get("methods") or [], evaluation["objectives"], []
    if not rows:
        return Html("")
    pairs = list(itertools.combinations(range(len(names)), 2))
    faces = pairs if len(names) > 2 else []
    for i, j in pairs[:_PAIRS]:
        shown, left_out = _overview(found.get("points") or [], "reward", (i, j))
        caption = f"Every point within {decimal(found['budget'], 1)} nats per response. Bars are 95 % intervals over prompts.{left_out}"
        drawn.append((front_figure(evaluation, names[i], names[j], shown, "-kl"), caption))
    cells = [
        [r["method"], multiple(r.get("cost")), decimal(r.get("points"), 0), decimal(r.get("spent")), _share(r.get("share")),
         interval(r.get("hypervolume")),
         *(interval(entry(r.get("faces"), f)) for f in range(len(faces))),
         *(interval(entry(r.get("gains"), k), sign=True) for k in range(len(names)))]
        for r in rows
    ]  # fmt: skip
    head = ["method", "cost", "points", "KL before", "share answered", "all", *(f"{names[i]}, {names[j]}" for i, j in faces), *names]
    groups = [("", 1), ("", 1), ("", 1), ("", 1), ("", 1), ("hypervolume", 1 + len(faces)), ("gain, all weight on it", len(names))]
    return join(note(_AT_KL), figures(*drawn), table(head, cells, groups, "At the same KL"))


def _share(share: Sequence[float] | None) -> str:
    if not share:
        return percent(None)
    low, high = share
    if low == 1:
        return "unchanged"
    return percent(low) if percent(low) == percent(high) else f"{percent(low)} to {percent(high)}"


def faces_section(evaluation: Evaluation) -> Html:
    """A table for every two of three objectives or more."""
    parts = []
    for face in evaluation.get("faces") or []:
        title = " and ".join(face["objectives"])
        rows = [
            [r["method"], multiple(r.get("cost")), decimal(r.get("points"), 0),
             *(interval(r.get(key)) for key in ("hypervolume", "mean_inner_product", "kl"))]
            for r in face["methods"]
        ]  # fmt: skip
        parts += [element("h3", title), table(["method", "cost", "points", "hypervolume", "mean inner product", "KL"], rows, name=title)]
    return join(note(_FACES), *parts) if parts else Html("")
