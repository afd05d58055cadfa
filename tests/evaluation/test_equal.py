"""Methods beside best-of-n at one price, by hand: between two n, beyond the largest, and where nothing can be said."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.evaluation.equal import at_price, equal_rows
from equipoise.evaluation.summary import Point, Summary
from evaluation.small_comparison import placed, scored, summary_of

NAN = float("nan")
ENDS = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


def front(summary: Summary, name: str, gain: float, kl: float, cost: int) -> list[Point]:
    """All ends of a method: `gain` on their own objective."""
    return placed(summary, name, [(w, tuple(gain * x for x in w), kl) for w in ENDS], cost=cost)


@pytest.fixture
def summary() -> Summary:
    return summary_of(scored("reference", None, [(0, 0, 0)]))


@pytest.fixture
def ladder(summary: Summary) -> dict[int, list[Point]]:
    return {2: front(summary, "best-of-n", 0.5, 0.2, 2), 4: front(summary, "best-of-n", 1.0, 0.6, 4)}


def test_best_of_n_has_the_methods_price(summary, ladder) -> None:
    methods = {"near": front(summary, "near", 0.9, 0.3, 3), "far": front(summary, "far", 3.0, 2.4, 10)}
    near, far = (next(r for r in equal_rows(summary, methods, ladder, "kl") if r["ours"] == name) for name in methods)
    # a quarter of the way from 0.2 to 0.6 nats: 0.75 of 0.5 and 0.25 of 1.0
    assert (near["kl"], near["spent"], near["share"]) == pytest.approx((0.3, 0.3, 1.0))
    assert near["difference"]["mean"] == pytest.approx(0.9 - 0.625)
    # 2.4 nats come down to 0.6 where a quarter of the answers are the method's
    assert (far["kl"], far["spent"], far["share"]) == pytest.approx((0.6, 2.4, 0.25))
    assert far["difference"]["mean"] == pytest.approx(3.0 / 4 - 1.0)
    near, far = (next(r for r in equal_rows(summary, methods, ladder, "cost") if r["ours"] == name) for name in methods)
    assert (near["cost"], near["difference"]["mean"]) == pytest.approx((3.0, 0.9 - 0.75))
    assert (far["cost"], far["share"]) == pytest.approx((4.0, 3 / 9))  # of the 9 responses more than a plain one, 3
    assert far["difference"]["mean"] == pytest.approx(0.0, abs=1e-12)


def test_what_costs_no_more_than_the_reference_meets_the_reference(summary, ladder) -> None:
    [row, *_] = equal_rows(summary, {"free": front(summary, "free", 0.4, 0.0, 1)}, ladder, "cost")
    assert (row["cost"], row["share"], row["difference"]["mean"]) == pytest.approx((1.0, 1.0, 0.4))


def test_no_ladder_and_no_known_price_make_no_row(summary, ladder) -> None:
    methods = {"asked of a server": front(summary, "asked of a server", 0.4, NAN, 1)}
    assert equal_rows(summary, methods, ladder, "kl") == []
    assert len(equal_rows(summary, methods, ladder, "cost")) == 3
    assert equal_rows(summary, methods, {}, "cost") == []


def test_the_nearest_point_stands_for_prices_outside(summary, ladder) -> None:
    points = [ladder[4][0], ladder[2][0]]
    assert [float(np.mean(at_price(points, "kl", kl, 0))) for kl in (0.0, 0.2, 0.4, 9.0)] == pytest.approx([0.5, 0.5, 0.75, 1.0])
