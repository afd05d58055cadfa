"""The one table of a comparison as Markdown, for a README or a paper: a row per method, cheapest first.

Gains are those of the points with all weight on an objective, over the reference on the same prompts, in standard deviations of the
reference's rewards; KL is the mean over a method's points, in nats per response; cost is in plain responses; hypervolumes are above
the reference point, of the points as they are and of their mixtures with the reference within one budget of KL. – is unscored or
not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipoise.evaluation.markup import decimal

Evaluation = Mapping[str, Any]


def markdown_table(evaluation: Evaluation) -> str:
    """The table as text. A name's vertical bars are escaped. Raises `KeyError` for an evaluation without `methods`."""
    objectives = evaluation["objectives"]
    gained = {(row["method"], row["objective"]): row["gains"][0]["gain"] for row in evaluation["equal_length"] if row["gains"]}
    volume = {row["method"]: row for row in evaluation["hypervolume"]}
    within = {row["method"]: row["hypervolume"] for row in evaluation["at_kl"]["methods"]}
    head = ["method", "points", "training, min", "cost", "KL, nats", *objectives, "hypervolume"]
    head.append(f"hypervolume within {decimal(evaluation['at_kl']['budget'], 1)} nats")
    lines = [head, ["---"] * len(head)]
    for row in evaluation["methods"]:
        name, seconds = row["method"], row.get("training_seconds")
        lines.append(
            [
                name.replace("|", "\\|"),
                decimal(row["points"], 0),
                decimal(None if seconds is None else seconds / 60, 0),
                decimal(row["cost"], 1),
                decimal(row["kl"]["mean"]),
                *(_bounded(gained.get((name, k)), sign=True) for k in objectives),
                _bounded(volume.get(name), key="value"),
                _bounded(within.get(name)),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _bounded(estimate: Mapping[str, Any] | None, sign: bool = False, key: str = "mean") -> str:
    """A value with its interval."""
    value, lo, hi = (decimal((estimate or {}).get(part), sign=sign) for part in (key, "lo", "hi"))
    return value if "–" in (value, lo, hi) else f"{value} [{lo}, {hi}]"
