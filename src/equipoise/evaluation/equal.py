"""A method beside best-of-n at one price, in KL or in compute.

Prices and rewards are means over responses, so answering by a coin has them in between: best-of-n at any price is the mixture of
the two n around it, and a method dearer than the largest n is brought to that one's price by answering with the reference instead,

    a = min(1, (price of the largest n - price of the reference) / (price of the method - price of the reference))

Rewards and compute of such mixtures are exact, their KL is at most what is said (`budgets.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from equipoise.evaluation.budgets import mixed_means
from equipoise.evaluation.methods import ends
from equipoise.evaluation.summary import Point, Summary

Price = Literal["kl", "cost"]


def equal_rows(
    summary: Summary, methods: Mapping[str, Sequence[Point]], ladder: Mapping[int, Sequence[Point]], price: Price
) -> list[dict[str, Any]]:
    """Each end of each method against best-of-n at the method's own price, or the largest n's where that is less.

    `share` is a, `spent` what the method spends when it always answers. Without a ladder, and where a price isn't known, no row.
    """
    rows: list[dict[str, Any]] = []
    for name, points in methods.items() if ladder else ():
        for k, point in ends(points):
            rungs = [summary.reference, *(dict(ends(found))[k] for found in ladder.values())]
            spent, start = getattr(point, price), getattr(summary.reference, price)
            if np.isnan([spent, start]).any():
                continue
            met = min(spent, max(getattr(rung, price) for rung in rungs))
            share = (met - start) / (spent - start) if met < spent else 1.0
            ours_P = mixed_means(point.z_PK, summary.reference.z_PK, share)[:, k]
            labels = {"ours": name, "other": "best-of-n", price: met, "spent": spent, "share": share}
            rows.append(summary.compare(ours_P, at_price(rungs, price, met, k), k, **labels))
    return rows


def at_price(points: Sequence[Point], price: Price, value: float, k: int) -> np.ndarray:
    """Per-prompt means of objective k of the mixture of two points that has this price; of the nearest point beyond them."""
    ordered = sorted(points, key=lambda p: getattr(p, price))
    for low, high in itertools.pairwise(ordered):
        below, above = getattr(low, price), getattr(high, price)
        if below <= value <= above:
            share = (value - below) / max(above - below, 1e-12)
            return mixed_means(high.z_PK, low.z_PK, share)[:, k]
    return ordered[0 if value < getattr(ordered[0], price) else -1].z_PK[:, k]
