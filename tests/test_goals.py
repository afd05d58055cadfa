"""Preference to target maps: RiC's golden values, the optimisation behind them, and what can be reached."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from equipoise.goals import Targets, best_share, between, goal, levels, released_extremes, released_goal, target, within_reach
from equipoise.types import UserError

BOX = np.array([-4.0, -4.0]), np.array([4.0, 4.0])


@pytest.mark.parametrize(
    ("rule", "weights", "level", "asked"),
    [  # appendix C, both rewards between -4 and 4
        ("lp:2", (0.6, 0.4), (0.832, 0.555), (2.7, 0.4)),
        ("linf", (0.3, 0.7), (0.6, 1.0), (0.8, 4.0)),
        ("linear", (0.3, 0.7), (0.3, 0.7), (-1.6, 1.6)),
        # limits: P = 1 puts all on the largest weight, P = infinity all that weigh at their best; P = 3/2 has l = w^2 / (sum w^3)^(2/3)
        ("lp:1", (0.3, 0.7), (0.0, 1.0), (-4.0, 4.0)),
        ("lp:1", (0.5, 0.5), (0.5, 0.5), (0.0, 0.0)),
        ("lp:inf", (0.3, 0.7), (1.0, 1.0), (4.0, 4.0)),
        ("lp:inf", (0.0, 1.0), (0.0, 1.0), (-4.0, 4.0)),
        ("lp:1.5", (0.2, 0.8), (0.04 / 0.52 ** (2 / 3), 0.64 / 0.52 ** (2 / 3)), (-3.5, 3.9)),
        ("linf", (1.0, 0.0), (1.0, 0.0), (4.0, -4.0)),
    ],
)
def test_golden_values(rule, weights, level, asked):
    found = levels(np.array(weights), rule)
    np.testing.assert_allclose(found, level, atol=5e-4)
    np.testing.assert_allclose(between(found, *BOX).round(1), asked, atol=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_uniform_weights(count):
    even = np.full(count, 1 / count)
    np.testing.assert_allclose(levels(even, "lp:2"), count**-0.5)
    np.testing.assert_allclose(levels(even, "lp:4"), count**-0.25)
    np.testing.assert_allclose(levels(even, "linf"), 1)
    np.testing.assert_allclose(levels(even, "linear"), 1 / count)


@pytest.mark.parametrize("power", [1.3, 2.0, 7.0])
def test_lp_solves_its_problem(power):
    """A general solver finds no better point of the ball."""
    weights = np.array([0.1, 0.25, 0.65])
    ball = {"type": "ineq", "fun": lambda level: 1 - (np.abs(level) ** power).sum()}
    best = minimize(lambda level: -weights @ level, np.full(3, 0.3), bounds=[(0, 1)] * 3, constraints=[ball], tol=1e-12)
    np.testing.assert_allclose(levels(weights, f"lp:{power}"), best.x, atol=2e-4)


def test_the_released_table():
    """Targets of the released evaluation for two rewards, as its code printed them."""
    low_K, high_K = released_extremes(2)
    np.testing.assert_allclose(low_K, [-3.866, -4.038], atol=5e-4)
    np.testing.assert_allclose(high_K, [4.057, 4.166], atol=5e-4)
    table = {
        0.0: [(-3.9, 4.2), (-3.9, 4.2), (-3.9, 4.2)],
        0.1: [(-3.1, 3.3), (-3.0, 4.1), (-2.3, 4.2)],
        0.3: [(-1.5, 1.7), (-0.7, 3.5), (0.9, 4.2)],
        0.5: [(0.1, 0.1), (1.7, 1.8), (4.1, 4.2)],
        0.7: [(1.7, -1.6), (3.4, -0.8), (4.1, 0.9)],
        1.0: [(4.1, -4.0), (4.1, -4.0), (4.1, -4.0)],
    }
    for first, rows in table.items():
        for rule, row in zip(("linear", "lp:2", "linf"), rows, strict=True):
            asked = target(np.array([first, 1 - first]), np.zeros((1, 2)), Targets(rule=rule, span="released", share=0.0))
            np.testing.assert_allclose(asked.round(1), row, atol=1e-9)


def test_spans_and_quantiles_by_hand():
    rows = np.array([[0.0, 10.0], [1.0, 0.0], [2.0, 20.0], [10.0, 40.0], [3.0, 30.0]])
    weights = np.array([0.25, 0.75])
    assert target(weights, rows, Targets(rule="linear", span="extremes", share=0.0)).tolist() == [2.5, 30.0]
    assert target(weights, rows, Targets(rule="linear", share=0.0)).tolist() == [1.0, 30.0]  # second and fourth of five in order


def test_the_best_share_by_hand():
    rows = np.array([[4.0, 0.0], [0.0, 4.0], [2.0, 2.0], [4.0, 1.0], [-9.0, -9.0]])
    assert best_share(rows, np.array([1.0, 0.0]), 0.2).tolist() == [4.0, 1.0]  # of equal ones that with the larger sum
    assert best_share(rows, np.array([1.0, 0.0]), 0.4).tolist() == [4.0, 0.5]
    assert best_share(rows, np.array([0.0, 1.0]), 0.3).tolist() == pytest.approx([(0.0 + 0.5 * 2.0) / 1.5, (4.0 + 0.5 * 2.0) / 1.5])
    assert best_share(rows, np.array([0.5, 0.5]), 1.0).tolist() == pytest.approx([0.2, -0.4])  # all of them: the mean


def test_what_can_be_reached_by_hand():
    """Four corners: half of them reach an edge's middle, one of four a corner; from the mean (0, 0) towards (3, 3)."""
    rows = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    far = np.array([3.0, 3.0])
    np.testing.assert_allclose(within_reach(rows, far, 0.25), [1, 1], atol=1e-9)
    np.testing.assert_allclose(within_reach(rows, far, 0.5), [0.5, 0.5], atol=1e-9)  # half of (1, 1), a quarter of two others
    np.testing.assert_allclose(within_reach(rows, np.array([3.0, 0.0]), 0.5), [1, 0], atol=1e-9)
    np.testing.assert_allclose(within_reach(rows, far, 1.0), [0, 0], atol=1e-9)
    np.testing.assert_allclose(within_reach(rows, np.array([0.1, -0.2]), 0.5), [0.1, -0.2], atol=1e-9)  # is there already


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(0.02, 1.0))
def test_no_target_is_out_of_reach(seed, objectives, share):
    """R_share by its support function: u.t is at most the mean of the best share for u, in every direction u."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(57, objectives)) @ generator.normal(size=(objectives, objectives))
    weights = generator.dirichlet(np.ones(objectives))
    best = target(weights, rows, Targets(share=share))
    assert weights @ best == pytest.approx(best_share(rows, weights, share) @ weights)
    for asked in (best, *(target(weights, rows, Targets(rule=rule, share=share)) for rule in ("linear", "lp:2", "linf"))):
        assert weights @ asked <= weights @ best + 1e-9  # no reachable point is better for the weights
        for u in generator.normal(size=(30, objectives)):
            value = np.sort(rows @ u)[::-1]
            mass = np.clip(share * 57 - np.arange(57), 0, 1)
            assert u @ asked <= mass @ value / mass.sum() + 1e-7


def test_the_released_goals():
    """All but one coordinate are high; the other, the smallest of uniform numbers, is (high - low)/3 above low for two objectives."""
    generator = np.random.default_rng(0)
    drawn = np.array([released_goal(generator.random((2,)), -4.8, 4.2) for _ in range(20_000)])
    assert ((drawn == 4.2).sum(axis=1) == 1).all()
    assert drawn.min(axis=1).mean() == pytest.approx(-1.8, abs=0.03)
    three = np.array([released_goal(generator.random((3,)), -4.8, 4.2) for _ in range(4000)])
    assert ((three == 4.2).sum(axis=1) == 2).all()
    assert three.min(axis=1).mean() == pytest.approx(-4.8 + 9 / 4, abs=0.1)  # the smallest of three is at 1/4
    assert set((three < 4.2).argmax(axis=1)) == {0, 1, 2}
    asked = goal("released", np.random.default_rng(3), np.zeros((1, 2)), Targets())
    assert sorted(asked)[1] == 4.2  # the largest of 100,000 numbers, rounded


def test_goals_along_the_simplex_are_targets():
    rows = np.random.default_rng(1).normal(size=(200, 3))
    generator, again = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(5):
        np.testing.assert_allclose(goal("simplex", generator, rows, Targets()), best_share(rows, again.dirichlet(np.ones(3)), 0.1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "lp:0.5"}, "no rule 'lp:0.5'"),
        ({"rule": "lp:x"}, "no rule 'lp:x'"),
        ({"rule": "cubic"}, "no rule 'cubic'"),
        ({"span": "wide"}, "no span 'wide'"),
        ({"share": 1.5}, "got 1.5"),
        ({"share": 0.0}, "with the rule joint above 0"),
    ],
)
def test_bad_settings(settings, said, unchecked):
    with pytest.raises(UserError, match=said):
        Targets(**settings)


def test_nothing_seen():
    for rule, span in itertools.product(("joint", "linear"), ("quantiles", "extremes")):
        with pytest.raises(UserError, match="no scores were seen"):
            target(np.array([0.5, 0.5]), np.zeros((0, 2)), Targets(rule=rule, span=span))
