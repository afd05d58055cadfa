"""Dominance, hypervolume and intervals: hand-worked numbers, independent computations, and properties."""

from __future__ import annotations

import itertools

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.evaluation.front import (
    bootstrap_indices,
    dominates,
    hypervolume,
    hypervolumes,
    interval_of,
    mean_interval,
    non_dominated,
    paired_interval,
    permutation_pvalue,
    prompt_means,
    resampled_front,
)
from equipoise.types import UserError

NAN = float("nan")
STAIRS = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])


def coordinates(columns: int, most: int = 8) -> st.SearchStrategy[np.ndarray]:
    """Tables of few distinct values, so that ties and duplicates happen."""
    grid = st.integers(-8, 8).map(lambda i: i / 4)
    return st.integers(1, most).flatmap(lambda n: hnp.arrays(np.float64, (n, columns), elements=grid))


def sweep(points: np.ndarray, ref: np.ndarray) -> float:
    """2-D hypervolume: from the largest x leftwards, each point adds the strip between its y and the best y so far."""
    area, floor = 0.0, ref[1]
    for x, y in sorted(points.tolist(), reverse=True):
        if x > ref[0] and y > floor:
            area += (x - ref[0]) * (y - floor)
            floor = y
    return area


def test_dominates_needs_one_strict_objective() -> None:
    assert dominates(np.array([1, 2]), np.array([1, 1]))
    assert not dominates(np.array([1, 1]), np.array([1, 1]))
    assert not dominates(np.array([2, 0]), np.array([1, 1]))
    assert not dominates(np.array([2, NAN]), np.array([1, 1]))
    assert not dominates(np.array([2, 2]), np.array([NAN, 1]))


def test_non_dominated_by_hand() -> None:
    points = np.array([[1, 3], [2, 2], [2, 2], [1, 2], [NAN, 9], [3, 1]])
    assert non_dominated(points).tolist() == [True, True, True, False, False, True]
    assert non_dominated(np.full((2, 2), NAN)).tolist() == [False, False]
    assert non_dominated(np.empty((0, 2))).shape == (0,)


@given(st.sampled_from([1, 2, 3, 4]).flatmap(coordinates))
@settings(max_examples=60, deadline=None)
def test_non_dominated_is_what_nothing_dominates(points: np.ndarray) -> None:
    expected = [not any(dominates(b, a) for b in points) for a in points]
    assert non_dominated(points).tolist() == expected


def test_hypervolume_by_hand() -> None:
    # Columns of width 1 under the stairs: 3 + 2 + 1; then the corner (0, 0) moved to (1, 1) leaves the one square at (2, 2).
    assert hypervolume(STAIRS, [0, 0]) == pytest.approx(6)
    assert hypervolume(STAIRS, [1, 1]) == pytest.approx(1)
    assert hypervolume(np.array([[2.0, 3.0, 4.0]]), [0, 1, 2]) == pytest.approx(2 * 2 * 2)
    assert hypervolume(np.array([[0.5], [2.5]]), [-1]) == pytest.approx(3.5)


def test_hypervolume_leaves_out_nan_and_what_is_not_above_the_reference_point() -> None:
    extra = np.array([[NAN, 100.0], [-1.0, 50.0], [0.0, 50.0], [50.0, 0.0]])
    assert hypervolume(np.vstack([STAIRS, extra]), [0, 0]) == pytest.approx(6)
    assert hypervolume(extra, [0, 0]) == 0
    assert hypervolume(np.empty((0, 2)), [0, 0]) == 0


def test_hypervolume_refuses_what_has_no_answer() -> None:
    with pytest.raises(UserError, match="one finite number"):
        hypervolume(STAIRS, [0, 0, 0])
    with pytest.raises(UserError, match="one finite number"):
        hypervolume(STAIRS, [0, NAN])
    with pytest.raises(UserError, match="infinite"):
        hypervolume(np.array([[np.inf, 1.0]]), [0, 0])


@given(coordinates(2, most=12))
@settings(max_examples=60, deadline=None)
def test_hypervolume_equals_a_sweep(points: np.ndarray) -> None:
    ref = np.array([-1.0, -0.5])
    assert hypervolume(points, ref) == pytest.approx(sweep(points, ref), abs=1e-12)


@given(st.sampled_from([2, 3]).flatmap(lambda k: coordinates(k, most=20)))
@settings(max_examples=60, deadline=None)
def test_hypervolume_equals_moocore(points: np.ndarray) -> None:
    """Up to 16 points in three objectives are swept here, more of them go to moocore."""
    ref = np.array([-1.0, -0.5, -0.25])[: points.shape[1]]
    assert hypervolume(points, ref) == pytest.approx(moocore.hypervolume(points, ref=ref, maximise=True), abs=1e-12)


def test_hypervolume_of_three_objectives_by_hand() -> None:
    # the block 3 x 1 x 1, on it the part of 1 x 2 x 2 that stands out: 1 x 2 x 2 less the shared 1 x 1 x 1
    points = np.array([[3.0, 1.0, 1.0], [1.0, 2.0, 2.0], [NAN, 9.0, 9.0], [9.0, 0.0, 9.0]])
    assert hypervolume(points, [0, 0, 0]) == pytest.approx(3 + 4 - 1)
    many = np.stack([points, points[[1, 1, 2, 2]], points[[2, 3, 2, 3]]])
    assert hypervolumes(many, [0, 0, 0]) == pytest.approx([6, 4, 0])


@given(st.sampled_from([2, 3]).flatmap(coordinates), st.randoms(use_true_random=False), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_hypervolume_properties(points: np.ndarray, random, drop: float) -> None:
    ref = np.full(points.shape[1], -1.5)
    value = hypervolume(points, ref)
    order = list(range(len(points)))
    random.shuffle(order)
    assert hypervolume(points[order], ref) == pytest.approx(value, abs=1e-12)
    below = points[random.randrange(len(points))] - drop
    assert hypervolume(np.vstack([points, below]), ref) == pytest.approx(value, abs=1e-12)
    assert hypervolume(points[:-1], ref) <= value + 1e-12
    assert hypervolume(points + drop, ref) >= value - 1e-12
    above = points.max(axis=0) + 0.25
    assert hypervolume(np.vstack([points, above]), ref) >= value - 1e-12


def test_prompt_means_by_hand() -> None:
    reward = np.array([[1, 10], [5, NAN], [3, 30], [NAN, NAN], [7, NAN]])
    ids, mean = prompt_means(reward, ["b", "a", "b", "c", "a"])
    assert ids == ("b", "a", "c")
    np.testing.assert_array_equal(mean, [[2, 20], [6, NAN], [NAN, NAN]])
    with pytest.raises(UserError, match="5 rows of rewards for 1"):
        prompt_means(reward, ["a"])


def test_bootstrap_is_fixed_by_its_seed() -> None:
    table = bootstrap_indices(7, 50, seed=3)
    assert table.shape == (50, 7)
    assert table.min() >= 0
    assert table.max() <= 6
    np.testing.assert_array_equal(table, bootstrap_indices(7, 50, seed=3))
    assert not np.array_equal(table, bootstrap_indices(7, 50, seed=4))
    values = np.random.default_rng(0).normal(size=7)
    assert mean_interval(values, table) == mean_interval(values, bootstrap_indices(7, 50, seed=3))


def test_mean_interval_by_hand() -> None:
    # Two prompts, every resample once: the means are 0, 1, 1, 2, whose quartile ends by linear interpolation are 0.75 and 1.25.
    table = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert mean_interval(np.array([0.0, 2.0]), table, level=0.5) == pytest.approx((1, 0.75, 1.25))


def test_mean_interval_leaves_unscored_prompts_out() -> None:
    table = np.array([[0, 1, 2], [2, 2, 2], [0, 0, 2], [1, 1, 2]])
    mean, lo, hi = mean_interval(np.array([0.0, 2.0, NAN]), table, level=0.999999)
    assert mean == 1
    assert (lo, hi) == pytest.approx((0, 2), abs=1e-5)


def test_mean_interval_agrees_with_the_normal_theory() -> None:
    values = np.random.default_rng(1).normal(size=400)
    mean, lo, hi = mean_interval(values, bootstrap_indices(400, 4000, seed=0))
    half = 1.96 * values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean())
    assert (hi - lo) / 2 == pytest.approx(half, rel=0.05)


def test_paired_interval_of_equal_arrays_is_exactly_zero() -> None:
    values = np.random.default_rng(2).normal(size=30)
    table = bootstrap_indices(30, 100, seed=0)
    assert paired_interval(values, values, table) == (0.0, 0.0, 0.0)


def test_paired_interval_forgets_what_prompts_share() -> None:
    rng = np.random.default_rng(3)
    base, table = 100 * rng.normal(size=40), bootstrap_indices(40, 500, seed=0)
    assert paired_interval(base + 0.5, base, table) == pytest.approx((0.5, 0.5, 0.5))


def test_too_few_scored_prompts_are_refused() -> None:
    table = bootstrap_indices(3, 10, seed=0)
    with pytest.raises(UserError, match="at least 2 prompts, got 1"):
        bootstrap_indices(1, 10, seed=0)
    with pytest.raises(UserError, match="at least 1 resample"):
        bootstrap_indices(3, 0, seed=0)
    with pytest.raises(UserError, match="0 of 3 prompts are scored"):
        mean_interval(np.full(3, NAN), table)
    with pytest.raises(UserError, match="1 of 3 prompts are scored"):
        paired_interval(np.array([1, 2, NAN]), np.array([1, NAN, 3]), table)
    with pytest.raises(UserError, match="at least 2 prompts, got 1"):
        mean_interval(np.array([1.0]), np.zeros((5, 1), dtype=int))
    with pytest.raises(UserError, match="between 0 and 1"):
        mean_interval(np.ones(3), table, level=95)


def hypervolume_interval(reward_WPK: np.ndarray, ref: list[float], table: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    return interval_of(hypervolumes(resampled_front(reward_WPK, table), ref), level)


def test_hypervolume_interval_by_hand() -> None:
    # One point over two prompts at (0, 2) and (2, 2): the mean's first objective is 0, 1, 1, 2 over all resamples.
    reward, table = np.array([[[0.0, 2.0], [2.0, 2.0]]]), np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert hypervolume_interval(reward, [0, 0], table, level=0.5) == pytest.approx((2, 1.5, 2.5))


def test_hypervolume_interval_shares_prompts_between_points() -> None:
    # The two points move together, so every replicate is the stairs' square shifted: independent resampling would not be.
    shift = np.array([0.0, 1.0, 2.0, 3.0])
    reward = np.stack([np.stack([shift + a, shift + b], axis=1) for a, b in [(1, 2), (2, 1)]])
    table = bootstrap_indices(4, 200, seed=0)
    value, lo, hi = hypervolume_interval(reward, [0, 0], table)
    means = shift[table].mean(axis=1)
    expected = np.array([sweep(np.array([[m + 1, m + 2], [m + 2, m + 1]]), np.zeros(2)) for m in means])
    assert value == pytest.approx(sweep(np.array([[2.5, 3.5], [3.5, 2.5]]), np.zeros(2)))
    assert (lo, hi) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


def test_hypervolume_interval_refuses_what_it_cannot_resample() -> None:
    with pytest.raises(UserError, match="at least 2 prompts, got 1"):
        hypervolume_interval(np.ones((3, 1, 2)), [0, 0], np.zeros((5, 1), dtype=int))
    reward = np.ones((3, 4, 2))
    reward[:, :, 1] = NAN
    with pytest.raises(UserError, match="objective 1: 0 of 4 prompts"):
        hypervolume_interval(reward, [0, 0], bootstrap_indices(4, 5, seed=0))


@pytest.mark.usefixtures("unchecked")
def test_arrays_of_the_wrong_shape_are_refused() -> None:
    table = bootstrap_indices(3, 10, seed=0)
    with pytest.raises(UserError, match="same objectives"):
        dominates(np.array([1, 2]), np.array([1, 2, 3]))
    with pytest.raises(UserError, match="one column per objective"):
        hypervolume(np.array([1.0, 2.0]), [0, 0])
    with pytest.raises(UserError, match="isn't for 4 prompts"):
        mean_interval(np.ones(4), table)
    with pytest.raises(UserError, match="one number per prompt"):
        mean_interval(np.ones((3, 2)), table)
    with pytest.raises(UserError, match="same prompts"):
        paired_interval(np.ones(3), np.ones(2), table)
    with pytest.raises(UserError, match="weights, prompts, objectives"):
        hypervolume_interval(np.ones((3, 3)), [0, 0], table)


def test_hypervolume_interval_leaves_an_unscored_point_out() -> None:
    reward = np.stack([np.ones((4, 2)), np.full((4, 2), NAN)])
    assert hypervolume_interval(reward, [0, 0], bootstrap_indices(4, 20, seed=0)) == pytest.approx((1, 1, 1))


def test_an_interval_of_replicates() -> None:
    assert interval_of(np.array([2.0, 0.0, 1.0, 1.0, 2.0]), level=0.5) == pytest.approx((2, 0.75, 1.25))
    assert np.isnan(interval_of(np.array([NAN, 1.0, 2.0]))).all()
    assert interval_of(np.array([1.5, NAN, NAN])) == pytest.approx((1.5, NAN, NAN), nan_ok=True)


def test_resampled_fronts_are_the_means_of_the_drawn_prompts() -> None:
    rng = np.random.default_rng(8)
    reward, table = rng.normal(size=(2, 5, 3)), bootstrap_indices(5, 7, seed=0)
    reward[1, 3, 2] = NAN
    found = resampled_front(reward, table)
    assert found.shape == (8, 2, 3)
    np.testing.assert_allclose(found[0], np.nanmean(reward, axis=1))
    for row, prompts in zip(found[1:], table, strict=True):
        np.testing.assert_allclose(row, np.nanmean(reward[:, prompts], axis=1))


def test_permutation_pvalue_by_hand() -> None:
    # All of 3 differences agree in sign: only +++ and --- of the 8 patterns reach the observed sum.
    assert permutation_pvalue(np.array([1.0, 2.0, 3.0]), np.zeros(3), n=1000, seed=0) == 2 / 8
    assert permutation_pvalue(np.array([1.0, 2.0, 3.0, NAN]), np.zeros(4), n=1000, seed=0) == 2 / 8
    assert permutation_pvalue(np.ones(5), np.ones(5), n=1000, seed=0) == 1


def test_permutation_pvalue_sampled_agrees_with_the_enumeration() -> None:
    difference = np.random.default_rng(5).normal(0.4, 1, size=12)
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product([1, -1], repeat=12)]
    exact = np.mean(np.array(sums) >= abs(difference.sum()) - 1e-12)
    assert permutation_pvalue(difference, np.zeros(12), n=4096, seed=0) == pytest.approx(exact, abs=1e-12)
    sampled = permutation_pvalue(difference, np.zeros(12), n=4000, seed=0)
    assert sampled == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 4000))
    assert sampled == permutation_pvalue(difference, np.zeros(12), n=4000, seed=0)
    assert sampled == permutation_pvalue(np.zeros(12), difference, n=4000, seed=0)


def test_permutation_pvalue_is_never_zero_and_refuses_too_little() -> None:
    assert permutation_pvalue(np.ones(60), np.zeros(60), n=99, seed=0) == 1 / 100
    with pytest.raises(UserError, match="1 of 2 prompts"):
        permutation_pvalue(np.array([1, NAN]), np.zeros(2), n=10, seed=0)
    with pytest.raises(UserError, match="at least 1 permutation"):
        permutation_pvalue(np.ones(3), np.zeros(3), n=0, seed=0)
