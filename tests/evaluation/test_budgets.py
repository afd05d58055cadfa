"""Methods at one KL: the bound on tiny distributions that are enumerated, hypervolumes by hand, and classes of cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.evaluation.budgets import at_budget, cost_class, mixed_means, share_within
from evaluation.small_comparison import placed, scored, summary_of

NAN = float("nan")
law = st.lists(st.integers(1, 20), min_size=4, max_size=4).map(lambda parts: np.array(parts) / sum(parts))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


@given(law, law, st.floats(0.01, 2), st.lists(st.integers(-5, 5), min_size=4, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_mixture_keeps_the_budget_and_its_share_of_the_reward(policy, reference, budget, reward) -> None:
    share = share_within(kl(policy, reference), budget)
    assert 0 < share <= 1
    mixture = share * policy + (1 - share) * reference
    assert kl(mixture, reference) <= share * kl(policy, reference) + 1e-12
    assert kl(mixture, reference) <= budget + 1e-12
    means = [np.array([[p @ np.array(reward)]]) for p in (policy, reference, mixture)]
    assert mixed_means(means[0], means[1], share) == pytest.approx(means[2], abs=1e-12)


def test_shares_by_hand() -> None:
    assert [share_within(k, 1.0) for k in (0.0, 0.5, 1.0, 4.0)] == [1, 1, 1, 0.25]
    assert share_within(4.0, 2.0) == 0.5
    assert np.isnan(share_within(NAN, 1.0))
    mixed = mixed_means(np.array([[4.0, NAN], [2.0, 0.0]]), np.array([[0.0, 1.0], [NAN, 8.0]]), 0.25)
    assert mixed == pytest.approx(np.array([[1.0, NAN], [NAN, 6.0]]), nan_ok=True)
    # all of the method: what the reference left unscored takes no part
    assert mixed_means(np.array([[4.0]]), np.array([[NAN]]), 1.0) == pytest.approx(np.array([[4.0]]))


def test_rows_by_hand() -> None:
    summary = summary_of(scored("reference", None, [(0, 0, 0)]))
    strong = placed(summary, "strong", [((1, 0, 0), (2, 0, -4), 4.0), ((0, 1, 0), (0, 1, 0), 0.5), ((0, 0, 1), (0, 0, 0), 2.0)], cost=2)
    weak = placed(summary, "weak", [((1, 0, 0), (0.5, 0, 0), 0.2), ((0, 1, 0), (0, 0.25, 0), 0.1)])
    unknown = placed(summary, "unknown", [((1, 0, 0), (5, 5, 5), NAN)])
    named = {"strong": strong, "weak": weak, "unknown": unknown, "reference": [summary.reference]}
    found = at_budget(summary, named, [-1, -1, -2], budget=1.0)
    assert found["budget"] == 1.0
    rows = {row["method"]: row for row in found["methods"]}
    assert set(rows) == {"strong", "weak", "reference"}
    row = rows["strong"]
    # a quarter of (2, 0, -4), all of (0, 1, 0), half of nothing
    assert row["share"] == [0.25, 1]
    assert row["spent"] == pytest.approx((4 + 0.5 + 2) / 3)
    assert row["kl"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert [g["mean"] for g in row["gains"]] == pytest.approx([0.5, 1, 0])
    # above the corner: boxes (1.5, 1, 1), (1, 2, 2), (1, 1, 2)
    assert row["hypervolume"]["mean"] == pytest.approx(1.5 * 1 * 1 + 1 * 2 * 2 - 1 * 1 * 1)
    # (1.5, 1) and (1, 2); (1.5, 1) and (1, 2) again, of the third end; (2, 2) holds (1, 2)
    assert [f["mean"] for f in row["faces"]] == pytest.approx([1.5 + 1, 1.5 + 1, 4])
    assert [p["reward"][0]["mean"] for p in found["points"] if p["method"] == "strong"] == pytest.approx([0.5, 0, 0])
    assert [p["kl"] for p in found["points"] if p["method"] == "strong"] == pytest.approx([1, 0.5, 1])
    # who spends less is unchanged, and has no end on the third objective, nor two points on the other faces
    assert rows["weak"]["share"] == [1, 1]
    assert [g and g["mean"] for g in rows["weak"]["gains"]] == [0.5, 0.25, None]
    assert [f and f["mean"] for f in rows["weak"]["faces"]] == [pytest.approx(1.5 + 0.25), None, None]
    assert rows["reference"]["hypervolume"]["mean"] == pytest.approx(2)


def test_a_mixture_is_worth_what_prompts_were_answered() -> None:
    """With rewards that differ by prompt the reference's own mean moves a mixture: 1/4 of (4, 0) and 3/4 of (2, -2)."""
    reference = scored("reference", None, [(2, 0, 0), (-2, 0, 0)])
    summary = summary_of(reference)
    point = summary.point(scored("m", (1, 0, 0), [(4, 0, 0), (0, 0, 0)], kl=4.0))
    found = at_budget(summary, {"m": [point]}, [-1, -1, -1], budget=1.0)
    assert found["points"][0]["reward"][0] == pytest.approx({"mean": 0.5, "lo": -1.5, "hi": 2.5})
    # a quarter of the gain of 2, on every prompt
    assert found["methods"][0]["gains"][0] == pytest.approx({"mean": 0.5, "lo": 0.5, "hi": 0.5})


def test_classes_of_cost() -> None:
    summary = summary_of(scored("reference", None, [(0, 0, 0)]))
    ladder = {n: placed(summary, "best-of-n", [((1, 0, 0), (0, 0, 0), 0.0)], cost=n) for n in (2, 4, 8)}
    # the nearest as a ratio: between 2 and 4 the line is at the root of 8
    costs = [0.9, 1.0, 1.41, 1.42, 2.82, 2.84, 5.6, 5.7, 12.0, 12.1, 40.0]
    assert [cost_class(ladder, c) for c in costs] == [1, 1, 1, 2, 2, 4, 4, 8, 8, 0, 0]
    assert [cost_class({}, c) for c in (1.4, 5.0)] == [1, 0]
