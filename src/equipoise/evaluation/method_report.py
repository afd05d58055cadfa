"""The report's sections about whole methods: hypervolume, the metrics of their fronts, two of them side by side, slips, length."""

from __future__ import annotations

import re
from typing import Any

from equipoise.evaluation.drawing import Evaluation, entry, number
from equipoise.evaluation.markup import Html, decimal, element, folded, interval, join, multiple, note, percent, pvalue, table
from equipoise.rewards.text import REPETITIVE

_PAIRS = 15
"""Most pairs of methods that stand open; of more, each method beside best-of-n does and the rest are folded."""
_RUNG = re.compile(r"best-of-\d+")
_FRONT = (
    "Means over a method's weights, in standard deviations of the reference's rewards, with 95\u00a0% intervals over prompts. The "
    "mean inner product is the reward as the weights weigh it (larger is better); epsilon is what must be added to every reward for "
    "the method to match the best of all methods here, whatever they cost (smaller); spread is how far its points reach (larger); "
    "sparsity is the mean squared gap between neighbours and spacing the unevenness of their distances (smaller). Noise spreads "
    "points apart, so regret, sparsity, spacing and spread come out too large where few prompts were asked; compare methods with "
    "the same number of points."
)
_CONTROL = (
    "Regret is what another of the method's own points would have been better by, for the weights that were asked for: 0 where the "
    "knob is right. An objective follows its weight by Spearman's correlation; a violation is a pair of points of which the one "
    "with more weight on an objective has less of it."
)
_PRICE = (
    "KL and floor in nats; tokens read by the policy and by what guides it, prompt included (a tuned policy counts as a guide, and "
    "a reference that only measures it not at all), the policy's prompt once for all candidates; texts that rewards scored to choose "
    "it; seconds of sampling, in batches, with the scoring of methods that choose while they sample; the most memory that the process "
    "held meanwhile, with all that it had loaded (on a GPU, there). Processes at once slow each other. Training: processor minutes of "
    "every run that the method's artefacts rest on, those that several methods share counted for each; of a run that was killed and "
    "continued, the last process's."
)
_BETWEEN = (
    "Differences at the weights that both have, each method as one front, with 95\u00a0% intervals over prompts; p from a two-sided "
    "paired permutation test that swaps the methods on random prompts, by Holm's method for the metrics of the row (not for the "
    "rows). best-of-n is the largest that costs no more; best-of-1 is the reference. Larger is better for hypervolume and inner "
    "product, smaller for the others; a higher KL is a price."
)
_SLIPS = (
    f"Counts of responses: repetitive ones have more than {percent(REPETITIVE)} of their word 4-grams twice; cut off at the length cap; "
    "format leaks hold a special token or a role name of a chat template. Of best-of-n, the chosen ones."
)
_EQUAL_LENGTH = (
    "Gains over the reference, in standard deviations, and what is left of them where both answers are as long as each other: least "
    "squares on the logarithm of the words, one slope for the method and the reference. Judges saw no training. A gain that goes at "
    "equal length was bought with length."
)


def hypervolume_section(evaluation: Evaluation) -> Html:
    """Each method's hypervolume, and what it would be above other reference points."""
    measured = evaluation.get("hypervolume") or []
    corner = _corner(evaluation.get("ref_point_K"))
    moved = [_corner(at["ref_point_K"]) for at in (measured[0].get("at") or [])] if measured else []
    rows = [
        [
            r["method"],
            multiple(r.get("cost")),
            decimal(r.get("points"), 0),
            interval(r, 3, key="value"),
            *(decimal(entry(r.get("at"), i).get("mean"), 3) for i in range(len(moved))),
        ]
        for r in measured
    ]
    found = table(
        ["method", "cost", "points", f"above {corner} [95 %]", *(f"above {ref}" for ref in moved)], rows, name="Hypervolume of each method"
    )
    if not found:
        return found
    return join(
        note(
            f"The volume that a method's points dominate above the reference point {corner} of ({', '.join(evaluation['objectives'])}), "
            "in standard deviations of the reference's rewards, all maximised; the exact volume of the mean rewards, with intervals that "
            "resample prompts. Larger is better; compare methods with the same number of points."
            + (" An order that changes with the reference point says nothing." if moved else "")
        ),
        found,
    )


def _corner(ref_point: Any) -> str:
    return f"({', '.join(decimal(r, 1) for r in ref_point or [])})"


def methods_section(evaluation: Evaluation) -> Html:
    """Three tables, a row per method: how good its front is, how well its weights control it, and what a response costs."""
    methods, names = evaluation.get("methods") or [], evaluation["objectives"]
    front = [
        [r["method"], *(interval(r.get(key)) for key in ("mean_inner_product", "epsilon")), *_each(r, "spread", names),
         *(interval(r.get(key)) for key in ("sparsity", "spacing")), decimal(r.get("points"), 0)]
        for r in methods
    ]  # fmt: skip
    control = [
        [r["method"], interval(r.get("regret")), *_each(r, "follows", names), *_each(r, "violations", names)]
        for r in methods
        if number((r.get("regret") or {}).get("mean")) is not None
    ]
    price = [
        [r["method"], interval(r.get("kl")), decimal(r.get("kl_floor")), decimal(r.get("base_forwards"), 0),
         decimal(r.get("guide_forwards"), 0), decimal(r.get("reward_calls"), 1), multiple(r.get("cost")),
         decimal(r.get("seconds"), 3), decimal(r.get("peak_memory")), decimal(_minutes(r.get("training_seconds")), 0)]
        for r in methods
    ]  # fmt: skip
    if not methods:
        return Html("")
    reach = [f"spread of {name}" for name in names]
    followed, broken = [f"{name} follows its weight" for name in names], [f"{name}, violations" for name in names]
    return join(
        note(_FRONT),
        table(["method", "mean inner product", "epsilon", *reach, "sparsity", "spacing", "points"], front, name="Metrics of the fronts"),
        element("h3", "Control"),
        note(_CONTROL),
        table(["method", "regret", *followed, *broken], control, name="How well the weights control each method"),
        element("h3", "Price of a response"),
        note(_PRICE),
        table(
            [
                "method",
                "KL [95 %]",
                "floor",
                "base forwards",
                "guide forwards",
                "reward calls",
                "cost",
                "seconds",
                "peak memory, GiB",
                "training, min",
            ],
            price,
            name="Price of a response",
        ),
    )


def _minutes(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 60


def _each(row: Any, key: str, names: list[str]) -> list[Html]:
    return [interval(entry(row.get(key), k)) for k in range(len(names))]


def between_section(evaluation: Evaluation) -> Html:
    """Two methods on each row, a column per metric: the difference, its interval and Holm's p."""
    between = evaluation.get("between") or []
    if not between:
        return Html("")
    names = [m["name"] for m in between[0]["metrics"]]
    rows = [
        [f"{r['ours']} − {r['other']}", f"{multiple(r.get('cost'))} / {multiple(r.get('other_cost'))}", decimal(r.get("points"), 0),
         *(_tested(entry(r.get("metrics"), m)) for m in range(len(names)))]
        for r in between
    ]  # fmt: skip
    head = ["difference between", "cost", "points", *names]
    if len(rows) <= _PAIRS:
        return join(note(_BETWEEN), table(head, rows, name="Methods side by side"))
    plain = [bool(_RUNG.fullmatch(r["other"])) for r in between]
    beside, others = ([row for row, is_rung in zip(rows, plain, strict=True) if is_rung == side] for side in (True, False))
    return join(
        note(_BETWEEN),
        table(head, beside, name="Methods beside best-of-n"),
        folded(f"{len(others)} pairs of methods", table(head, others, name="Methods side by side")) if others else "",
    )


def _tested(metric: Any) -> Html:
    return join(interval(metric.get("difference"), sign=True), element("small", f"p {pvalue(metric.get('p_holm'))}"))


def slips_table(evaluation: Evaluation) -> Html:
    """How many responses of each method went wrong in ways that a mean reward hides."""
    rows = [
        [r["method"], *(decimal(r.get(key), 0) for key in ("repetitive", "truncated", "leaks", "unscored", "responses"))]
        for r in evaluation.get("methods") or []
    ]
    found = table(["method", "repetitive", "cut off", "format leaks", "unscored", "responses"], rows, name="Responses that went wrong")
    if not found:
        return found
    return join(element("h3", "Responses that went wrong"), note(_SLIPS), found)


def equal_length_table(evaluation: Evaluation) -> Html:
    """The ends' gains in their own objective and of every judge, plain and at equal length."""
    measured, judges = evaluation.get("equal_length") or [], evaluation.get("judges") or []
    rows = [
        [r["method"], r["objective"], decimal(r.get("words"), 0),
         *(interval(entry(r.get("gains"), i).get(key), sign=True) for i in range(1 + len(judges)) for key in ("gain", "equal_length"))]
        for r in measured
    ]  # fmt: skip
    groups = [("", 1), ("", 1), ("", 1), ("its objective", 2), *((judge, 2) for judge in judges)]
    found = table(
        ["method", "all weight on", "words", *["gain", "at equal length"] * (1 + len(judges))], rows, groups, "Gains at equal length"
    )
    if not found:
        return found
    return join(element("h3", "Gains at equal length"), note(_EQUAL_LENGTH), found)
