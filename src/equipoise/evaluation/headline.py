"""The report's first sentences, made from the numbers: what each end of the front gains, and who wins a fair comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.evaluation.drawing import Evaluation, entry, number
from equipoise.evaluation.figures import own_objective
from equipoise.evaluation.markup import decimal

_LISTED = 4
_LADDER = re.compile(r"reference|best-of-\d+")


def headline(evaluation: Evaluation) -> list[str]:
    """Up to three sentences; none where nothing was scored. Of many methods the best are named, of few every gain."""
    found = [
        _best(evaluation) or _ends(evaluation),
        _comparison("At equal compute", evaluation.get("equal_compute") or [], "cost", "× a plain response"),
        _comparison("At equal KL", evaluation.get("equal_kl") or [], "kl", " nats"),
    ]
    return [sentence for sentence in found if sentence]


def verdict(row: Mapping[str, Any]) -> str:
    """Who is ahead in a comparison: the name, "undecided" where the interval of ours - other holds 0, "unscored"."""
    difference = row.get("difference") or {}
    mean, lo, hi = (number(difference.get(key)) for key in ("mean", "lo", "hi"))
    if mean is None or lo is None or hi is None:
        return "unscored"
    if lo > 0:
        return str(row["ours"])
    return str(row["other"]) if hi < 0 else "undecided"


def our_method(evaluation: Evaluation) -> str | None:
    """The method the page is about: the one the comparisons call ours, else single-pass, else the first that isn't the reference."""
    points = evaluation.get("points") or []
    ours = {row["ours"] for key in ("equal_compute", "equal_kl") for row in evaluation.get(key) or []}
    named = [p["method"] for p in points if p["method"] in ours or p["label"] in ours]
    methods = [p["method"] for p in points if p["method"] != "reference"]
    return next(iter(named + ["single-pass"] * ("single-pass" in methods) + methods), None)


def _best(evaluation: Evaluation) -> str:
    """The largest hypervolume in each class of cost, beside best-of-n's; "" of few methods and where there are no classes."""
    value = {r["method"]: r for r in evaluation.get("hypervolume") or [] if number(r.get("value")) is not None}
    steered = [r for r in value.values() if r.get("cost_class") is not None and not _LADDER.fullmatch(r["method"])]
    points = max((r["points"] for r in steered), default=0)
    rows = sorted((r for r in steered if r["points"] == points), key=lambda r: -r["value"])  # of fewer points a front is smaller
    if len(steered) <= _LISTED:
        return ""
    clauses = []
    for n in sorted({row["cost_class"] for row in rows}, key=lambda n: n or float("inf")):
        best = next(row for row in rows if row["cost_class"] == n)
        plain = "reference" if n == 1 else f"best-of-{n}"
        beside = f"; {plain} {decimal(value[plain]['value'])}" if plain in value else ""
        clauses.append(f"{best['method']}, {at_cost(n)} ({decimal(best['value'])}, {_range(best, sign=False)}{beside})")
    counted = "" if len(rows) == len(steered) else f" with all {points} points"
    return f"Largest hypervolume of {len(rows)} methods{counted}: {_listing(clauses, '; ')}."


def at_cost(n: int) -> str:
    """A class of cost in words: that of one plain response, of best-of-n, or (0) of more than any best-of-n there."""
    if not n:
        return "dearer than the largest best-of-n"
    return "at about the cost of one plain response" if n == 1 else f"at about the cost of best-of-{n}"


def _ends(evaluation: Evaluation) -> str:
    """The gain of the first point that has all weight on an objective, for each objective."""
    method = our_method(evaluation)
    clauses = []
    for k, name in enumerate(evaluation["objectives"]):
        end = next((p for p in evaluation.get("points") or [] if p["method"] == method and own_objective(p) == k), None)
        gain = entry(end.get("gain"), k) if end else {}
        if number(gain.get("mean")) is None:
            continue
        lo, hi = number(gain.get("lo")), number(gain.get("hi"))
        unclear = ", so no clear change" if lo is not None and hi is not None and lo <= 0 <= hi else ""
        clauses.append(f"{decimal(gain['mean'], sign=True)} sd in {name} ({_range(gain)}{unclear})")
    if not clauses:
        return ""
    return f"With all weight on one objective, {method} gains over the reference {_listing(clauses, ', ')}."


def _comparison(opening: str, rows: Sequence[Mapping[str, Any]], key: str, unit: str) -> str:
    scored = [row for row in rows if verdict(row) != "unscored"]
    if not scored:
        return ""
    if len(scored) <= _LISTED:
        return f"{opening}, {_listing([_clause(row, price_of(row, key, unit)) for row in scored], '; ')}."
    names = list(dict.fromkeys(row["ours"] for row in scored))
    if len(names) > _LISTED:
        return _tally(opening, names, scored)
    ours = sum(verdict(row) == row["ours"] for row in scored)
    lost = [row for row in scored if verdict(row) == row["other"]]
    whose = (lambda row: f"{row['ours']} to ") if len(names) > 1 else (lambda row: "")
    behind = ", ".join(f"{whose(row)}{row['other']} on {row['objective']} at {price_of(row, key, unit)}" for row in lost[:_LISTED])
    more = f" and {len(lost) - _LISTED} more" if len(lost) > _LISTED else ""
    return (
        f"{opening}, {_listing(names, ', ')} {'is' if len(names) == 1 else 'are'} "
        f"ahead in {ours} of {len(scored)} comparisons, behind in {len(lost)}"
        f"{f' ({behind}{more})' if lost else ''} and undecided in {len(scored) - ours - len(lost)}."
    )


def _tally(opening: str, names: Sequence[str], scored: Sequence[Mapping[str, Any]]) -> str:
    """What many methods won and lost, and which of them won everywhere."""
    said = [(row["ours"], verdict(row) == row["ours"], verdict(row) == row["other"]) for row in scored]
    won, lost = (sum(side) for side in list(zip(*said, strict=True))[1:])
    everywhere = [name for name in names if all(ahead for ours, ahead, _ in said if ours == name)]
    shown = [*everywhere[:_LISTED], *([f"{len(everywhere) - _LISTED} more"] if len(everywhere) > _LISTED else [])]
    return (
        f"{opening} with best-of-n, {len(names)} methods are ahead in {won} of {len(scored)} comparisons, behind in {lost} and "
        f"undecided in {len(scored) - won - lost}." + (f" Ahead wherever compared: {_listing(shown, ', ')}." if shown else "")
    )


def price_of(row: Mapping[str, Any], key: str, unit: str = "") -> str:
    """What both sides spent; a method that spends more by itself was brought there by answering with the reference now and then."""
    met = decimal(row.get(key))
    spent = met if number(row.get(key)) is None else f"{met}{unit}"
    return f"{spent}, mixed from {decimal(row['spent'])}" if row.get("share", 1) < 1 else spent


def _clause(row: Mapping[str, Any], place: str) -> str:
    difference, winner, place = row["difference"], verdict(row), f"({place})"
    if winner == "undecided":
        return (
            f"{row['ours']} and {row['other']} can't be told apart on {row['objective']} {place}: "
            f"{decimal(difference.get('mean'), sign=True)} sd, {_range(difference)}"
        )
    loser, sign = (row["other"], 1) if winner == row["ours"] else (row["ours"], -1)
    won = {end: sign * difference[end] for end in ("mean", "lo", "hi")}
    won["lo"], won["hi"] = sorted((won["lo"], won["hi"]))
    return f"{winner} is ahead of {loser} on {row['objective']} {place} by {decimal(won['mean'])} sd, {_range(won)}"


def _range(estimate: Mapping[str, Any], sign: bool = True) -> str:
    return f"95\u00a0% interval {decimal(estimate.get('lo'), sign=sign)} to {decimal(estimate.get('hi'), sign=sign)}"


def _listing(parts: Sequence[str], separator: str) -> str:
    """ "a", "a and b", "a, b, and c"; clauses with commas of their own are given a semicolon, also where there are two."""
    if len(parts) == 1:
        return parts[0]
    pause = "" if len(parts) == 2 and separator == ", " else separator.strip()
    return f"{separator.join(parts[:-1])}{pause} and {parts[-1]}"
