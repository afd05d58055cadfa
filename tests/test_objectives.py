"""Weights, grids, standardisation and scalarisations against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.objectives import Normaliser, chebyshev, linear, parse_weights, simplex_grid, weight_label
from equipoise.types import UserError

NAMES = ("helpful", "harmless")


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("helpful=0.7,harmless=0.3", (0.7, 0.3)),
        ("harmless=0.3, helpful=0.7", (0.7, 0.3)),
        ("0.7,0.3", (0.7, 0.3)),
        (" 1 , 0 ", (1.0, 0.0)),
        ("1,", (1.0, 0.0)),
        (",1", (0.0, 1.0)),
        ("helpful=1", (1.0, 0.0)),
        ("helpful=1,", (1.0, 0.0)),
        ({"harmless": 1.0}, (0.0, 1.0)),
        ({"harmless": 0.25, "helpful": 0.75}, (0.75, 0.25)),
        ([0.5, 0.5], (0.5, 0.5)),
        (np.array([0.5, 0.5]), (0.5, 0.5)),
        ("0.3333333,0.6666667", (0.3333333, 0.6666667)),
    ],
)
def test_every_form_of_weights(given_, expected):
    assert parse_weights(given_, NAMES) == expected


def test_an_empty_slot_weighs_nothing():
    assert parse_weights("0.2,,0.8", ("a", "b", "c")) == (0.2, 0.0, 0.8)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ("helpful=-0.5,harmless=1.5", "weight of 'helpful' is -0.5"),
        ((-0.1, 1.1), "weight of 'helpful' is -0.1"),
        ("0.7,0.4", "sum to 1.1, not 1"),
        ("0,0", "sum to 0, not 1"),
        ({}, "sum to 0, not 1"),
        ("0.50001,0.5", "not 1"),
        ("honest=1", "unknown objective 'honest' in the weights; known: helpful, harmless"),
        ({"honest": 1.0}, "unknown objective 'honest'"),
        ("1", "1 weights (1.0,) for 2 objectives"),
        ("0.2,0.3,0.5", "3 weights"),
        ("0.2,,0.8", "3 weights"),
        ("mostly helpful", "can't read the weights 'mostly helpful'"),
        ("helpful=much", "can't read the weights"),
        ("helpful=0.7,0.3", "can't read the weights"),
        ("helpful=0.3,helpful=0.5,harmless=0.5", "named twice"),
        ("", "1 weights"),
        ("nan,1", "weight of 'helpful' is nan"),
        ("inf,0", "weight of 'helpful' is inf"),
    ],
)
def test_bad_weights_are_named(given_, says):
    with pytest.raises(UserError) as caught:
        parse_weights(given_, NAMES)
    assert says in str(caught.value)


@given(st.integers(1, 4), st.integers(1, 6))
def test_the_grid_has_every_point_once(objectives, steps):
    points = simplex_grid(objectives, steps)
    assert len(points) == len(set(points)) == math.comb(steps + objectives - 1, objectives - 1)
    for point in points:
        assert len(point) == objectives
        assert sum(point) == pytest.approx(1.0, abs=1e-12)
        assert all(0 <= w <= 1 and abs(w * steps - round(w * steps)) < 1e-9 for w in point)
        assert parse_weights(point, [f"o{k}" for k in range(objectives)]) == point
    assert points == sorted(points, reverse=True)
    assert points[0][0] == 1.0


@pytest.mark.parametrize(("objectives", "steps"), [(0, 3), (2, 0), (-1, 2)])
def test_a_grid_needs_objectives_and_steps(objectives, steps):
    with pytest.raises(UserError, match="at least 1"):
        simplex_grid(objectives, steps)


def test_normaliser_leaves_unscored_out():
    reward_NK = np.array([[1.0, 10.0], [3.0, np.nan], [5.0, 30.0]])
    normaliser = Normaliser.fit(NAMES, reward_NK)
    assert normaliser.mean_K == (3.0, 20.0)
    assert normaliser.sd_K == pytest.approx((2.0, math.sqrt(200)))
    z_NK = normaliser(reward_NK)
    np.testing.assert_allclose(z_NK[:, 0], [-1, 0, 1])
    assert np.isnan(z_NK[1, 1])
    np.testing.assert_allclose(z_NK[[0, 2], 1], [-math.sqrt(0.5), math.sqrt(0.5)])


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e9])
def test_a_constant_objective_is_refused(value):
    reward_NK = np.stack([np.arange(5.0), np.full(5, value)], axis=1)
    with pytest.raises(UserError, match="'harmless' is constant"):
        Normaliser.fit(NAMES, reward_NK)


def test_an_unscored_objective_is_refused():
    reward_NK = np.array([[1.0, np.nan], [2.0, np.nan], [3.0, 4.0]])
    with pytest.raises(UserError, match="'harmless' has 1 scored responses of 3"):
        Normaliser.fit(NAMES, reward_NK)


def test_infinite_scores_count_as_unscored():
    normaliser = Normaliser.fit(("a",), np.array([[1.0], [3.0], [np.inf], [-np.inf]]))
    assert normaliser.mean_K == (2.0,)


def test_linear_ignores_what_weighs_nothing():
    reward_NK = np.array([[1.0, np.nan, 4.0], [2.0, 1.0, 0.0], [np.nan, 1.0, 1.0]])
    np.testing.assert_allclose(linear(reward_NK, (0.25, 0.0, 0.75)), [3.25, 0.5, np.nan])


def test_chebyshev_by_hand():
    # ideal (1, 2): shortfalls of (0, 1) are (1, 1), weighted (0.25, 0.75); of (-2, 2) are (3, 0), weighted (0.75, 0).
    reward_NK = np.array([[0.0, 1.0], [-2.0, 2.0], [1.0, 2.0]])
    np.testing.assert_allclose(chebyshev(reward_NK, (0.25, 0.75), (1.0, 2.0)), [-0.75, -0.75, 0.0])
    np.testing.assert_allclose(chebyshev(np.array([[0.5, np.nan]]), (1.0, 0.0), (1.0, 2.0)), [-0.5])


def test_chebyshev_reaches_a_concave_front_where_linear_does_not():
    reward_NK = np.array([[1.0, 0.0], [0.4, 0.4], [0.0, 1.0]])  # the middle lies under the line between the ends
    assert linear(reward_NK, (0.5, 0.5)).argmax() != 1
    assert chebyshev(reward_NK, (0.5, 0.5), (1.0, 1.0)).argmax() == 1


def test_labels():
    assert weight_label(NAMES, (0.75, 0.25)) == "helpful=0.75 harmless=0.25"
    assert weight_label(NAMES, None) == "reference"
