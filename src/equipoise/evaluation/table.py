"""A comparison's tables as Markdown, for a README or a paper: a row per method, cheapest first.

Gains are those of the points with all weight on an objective, over the reference on the same prompts, in standard deviations of the
reference's rewards; KL is the mean over a method's points, in nats per response; cost is in plain responses; hypervolumes are above
the reference point, of the points as they are, of their mixtures with the reference within one budget of KL, and of the points that
weigh two objectives alone. – is unscored or not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.evaluation.markup import decimal

Evaluation = Mapping[str, Any]


def markdown_tables(evaluation: Evaluation) -> str:
    """The methods' table, that of every two objectives, and that beside best-of-n at one price; the last two where there are rows."""
    parts = [methods_table(evaluation)]
    if evaluation["faces"]:
        parts.append(f"Hypervolume in two objectives, the points that give the others no weight:\n\n{faces_table(evaluation)}")
    if evaluation["equal_kl"] or evaluation["equal_compute"]:
        parts.append(
            "Ahead of best-of-n at the same price, with all weight on the objective; * where the method spends more than the largest n and "
            f"answers in turns with the reference:\n\n{prices_table(evaluation)}"
        )
    return "\n".join(parts)


def methods_table(evaluation: Evaluation) -> str:
    """Every method's price, gains and hypervolumes. Raises `KeyError` for an evaluation without `methods`."""
    objectives = evaluation["objectives"]
    gained = {(row["method"], row["objective"]): row["gains"][0]["gain"] for row in evaluation["equal_length"] if row["gains"]}
    volume = {row["method"]: row for row in evaluation["hypervolume"]}
    within = {row["method"]: row["hypervolume"] for row in evaluation["at_kl"]["methods"]}
    head = ["method", "points", "training, min", "cost", "KL, nats", *objectives, "hypervolume"]
    head.append(f"hypervolume within {decimal(evaluation['at_kl']['budget'], 1)} nats")
    rows = []
    for row in evaluation["methods"]:
        name, seconds = row["method"], row.get("training_seconds")
        rows.append(
            [
                name,
                decimal(row["points"], 0),
                decimal(None if seconds is None else seconds / 60, 0),
                decimal(row["cost"], 1),
                decimal(row["kl"]["mean"]),
                *(_bounded(gained.get((name, k)), sign=True) for k in objectives),
                _bounded(volume.get(name), key="value"),
                _bounded(within.get(name)),
            ]
        )
    return _table(head, rows)


def faces_table(evaluation: Evaluation) -> str:
    """A column for every two objectives; where a method has fewer points there than others, their number stands behind."""
    faces = [{row["method"]: row for row in face["methods"]} for face in evaluation["faces"]]
    most = max(row["points"] for face in faces for row in face.values())
    rows = []
    for name in (row["method"] for row in evaluation["methods"]):
        cells = []
        for face in faces:
            row = face.get(name)
            fewer = f" of {row['points']}" if row and row["points"] < most else ""
            cells.append(_bounded(row and row["hypervolume"]) + fewer)
        rows.append([name, *cells])
    return _table(["method", *(", ".join(face["objectives"]) for face in evaluation["faces"])], rows)


def prices_table(evaluation: Evaluation) -> str:
    """The differences at equal KL and at equal compute, a column each for every objective."""
    objectives, keys = evaluation["objectives"], ("equal_kl", "equal_compute")
    found = {(key, row["ours"], row["objective"]): row for key in keys for row in evaluation[key]}
    names = [row["method"] for row in evaluation["methods"] if any(ours == row["method"] for _, ours, _ in found)]
    rows = []
    for name in names:
        cells = [found.get((key, name, k)) for key in keys for k in objectives]
        rows.append([name, *(_bounded(c and c["difference"], sign=True) + ("*" if c and c["share"] < 1 else "") for c in cells)])
    said = {"equal_kl": "equal KL", "equal_compute": "equal compute"}
    return _table(["method", *(f"{k}, {said[key]}" for key in keys for k in objectives)], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([row[0].replace("|", "\\|"), *row[1:]] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _bounded(estimate: Mapping[str, Any] | None, sign: bool = False, key: str = "mean") -> str:
    """A value with its interval."""
    value, lo, hi = (decimal((estimate or {}).get(part), sign=sign) for part in (key, "lo", "hi"))
    return value if "–" in (value, lo, hi) else f"{value} [{lo}, {hi}]"
