"""Tests between methods and differences at equal length: by hand, against enumeration and least squares, and under a known truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.evaluation.between import equal_length_difference, holm, swap_pvalues
from equipoise.evaluation.front import (
    bootstrap_indices,
    drawn_times,
    hypervolumes,
    interval_of,
    mean_interval,
    permutation_pvalue,
    resampled_front,
)
from equipoise.evaluation.front_metrics import mean_inner_product
from equipoise.types import UserError

NAN = float("nan")
WEIGHTS = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])


def means(mean_NS: np.ndarray) -> np.ndarray:
    return mean_NS


# --- Holm -----------------------------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    # sorted .01 .03 .04: 3 x .01, 2 x .03, then 1 x .04, which may not fall below the one before
    assert holm(np.array([0.04, 0.01, NAN, 0.03])) == pytest.approx([0.06, 0.03, NAN, 0.06], nan_ok=True)
    assert holm(np.array([0.6, 0.7])) == pytest.approx([1, 1])
    assert holm(np.array([0.2])) == pytest.approx([0.2])
    assert np.isnan(holm(np.array([NAN, NAN]))).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.01, 0.3))
@settings(max_examples=60, deadline=None)
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float], alpha: float) -> None:
    rejected = set()
    for step, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[index] * (len(p) - step) > alpha:
            break
        rejected.add(index)
    adjusted = holm(np.array(p))
    assert {i for i in range(len(p)) if adjusted[i] <= alpha} == rejected
    assert (adjusted >= np.array(p)).all()


# --- swapped prompts ------------------------------------------------------------------------------------------------------------


def test_swapping_a_mean_is_the_sign_flip_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 2)), rng.normal(size=(9, 2))
    found = swap_pvalues(a, b, means, n=1000, seed=0)
    assert found == pytest.approx([permutation_pvalue(a[:, s], b[:, s], n=1000, seed=0) for s in range(2)])


def test_swapping_a_front_by_enumeration() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.4, 1, size=(6, 3, 2)), rng.normal(size=(6, 3, 2))

    def volume(mean_NS: np.ndarray) -> np.ndarray:
        return hypervolumes(mean_NS.reshape(-1, 3, 2), [-1, -1])[:, None]

    found = []
    for swapped in itertools.product([False, True], repeat=6):
        s = np.array(swapped)[:, None, None]
        one, two = (np.where(s, x, y).mean(axis=0) for x, y in ((b, a), (a, b)))
        found.append(float(hypervolumes(one, [-1, -1]) - hypervolumes(two, [-1, -1])))
    expected = np.mean(np.abs(found) >= abs(found[0]) - 1e-12)
    assert swap_pvalues(a.reshape(6, 6), b.reshape(6, 6), volume, n=64, seed=0) == pytest.approx([expected])
    sampled = swap_pvalues(a.reshape(6, 6), b.reshape(6, 6), volume, n=63, seed=0)[0]
    assert sampled == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 63) + 1 / 64)


def test_a_method_does_not_differ_from_itself_and_is_found_where_it_does() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(40, 3))
    assert swap_pvalues(a, a, means, n=200, seed=0) == pytest.approx([1, 1, 1])
    assert swap_pvalues(a + 5, a, means, n=199, seed=0) == pytest.approx([1 / 200] * 3)
    # the two sides may change places
    b = rng.normal(size=(40, 3))
    assert swap_pvalues(a, b, means, n=200, seed=0) == pytest.approx(swap_pvalues(b, a, means, n=200, seed=0))


def test_unscored_cells_are_left_out_of_both() -> None:
    a, b = np.array([[1.0, 1.0], [2.0, NAN], [3.0, 1.0], [9.0, NAN]]), np.array([[0.0, NAN], [0.0, 1.0], [0.0, 2.0], [NAN, 1.0]])
    # first column: 3 prompts in common that agree in sign, 2 of 8 patterns twice over; second: one prompt, p = 1
    assert swap_pvalues(a, b, means, n=16, seed=0) == pytest.approx([2 / 8, 1.0])
    nothing = swap_pvalues(a, np.full((4, 2), NAN), means, n=16, seed=0)
    assert np.isnan(nothing).all()
    with pytest.raises(UserError, match="at least 1 permutation"):
        swap_pvalues(a, b, means, n=0, seed=0)
    with pytest.raises(UserError, match="2 or more"):
        swap_pvalues(a[:1], b[:1], means, n=10, seed=0)


def test_under_the_hypothesis_small_p_values_are_rare() -> None:
    rng, small = np.random.default_rng(3), np.zeros(2)
    for run in range(300):
        shared, a, b = rng.normal(size=(12, 6)), rng.normal(size=(12, 6)), rng.normal(size=(12, 6))

        def metrics(mean_NS: np.ndarray) -> np.ndarray:
            front = mean_NS.reshape(-1, 3, 2)
            return np.stack([hypervolumes(front, [-1.5, -1.5]), mean_inner_product(front, WEIGHTS)], axis=1)

        small += swap_pvalues(shared + a, shared + b, metrics, n=39, seed=run) <= 0.1
    # an exact test has 30 of 300 on average, with a standard deviation of 5.2
    assert (np.abs(small - 30) < 3 * 5.2).all()


# --- equal length ---------------------------------------------------------------------------------------------------------------


def least_squares(y_a, x_a, y_b, x_b) -> tuple[float, float]:
    """(coefficient of "is a", of x) in y ~ 1 + x + is_a, by numpy's solver."""
    y, x = np.concatenate([y_a.ravel(), y_b.ravel()]), np.concatenate([x_a.ravel(), x_b.ravel()])
    is_a = np.concatenate([np.ones(y_a.size), np.zeros(y_b.size)])
    keep = ~np.isnan(y)
    table = np.stack([np.ones(len(y)), x, is_a], axis=1)[keep]
    _, slope, difference = np.linalg.lstsq(table, y[keep], rcond=None)[0]
    return difference, slope


def test_equal_length_by_hand() -> None:
    # y = x + 2 [is a], a one unit longer: the plain difference of 3 is 2 at equal length
    x_a, x_b = np.array([[1.0], [2.0], [3.0]]), np.array([[0.0], [1.0], [2.0]])
    found = equal_length_difference(x_a + 2, x_a, x_b, x_b, bootstrap_indices(3, 50, 0))
    assert found[0] == pytest.approx([2, 1])
    # a reward that is length and nothing else has nothing left
    assert equal_length_difference(x_a, x_a, x_b, x_b, bootstrap_indices(3, 50, 0))[0] == pytest.approx([0, 1])


def test_equal_length_is_least_squares_on_every_resample() -> None:
    rng = np.random.default_rng(4)
    x_a, x_b = rng.normal(3.5, 0.4, size=(7, 3)), rng.normal(3, 0.6, size=(7, 2))
    y_a, y_b = 0.4 * x_a + rng.normal(0.5, 1, size=x_a.shape), 0.4 * x_b + rng.normal(size=x_b.shape)
    y_a[2, 1] = y_b[6, 0] = NAN
    table = bootstrap_indices(7, 20, 0)
    found = equal_length_difference(y_a, x_a, y_b, x_b, table)
    for row, prompts in zip(found, [np.arange(7), *table], strict=True):
        assert row == pytest.approx(least_squares(y_a[prompts], x_a[prompts], y_b[prompts], x_b[prompts]))


def test_equal_length_where_lengths_say_nothing() -> None:
    y_a, y_b, x = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]]), np.full((2, 1), np.log(40))
    assert equal_length_difference(y_a, x, y_b, x, bootstrap_indices(2, 5, 0))[0] == pytest.approx([1, 0])
    nothing = equal_length_difference(np.full((2, 1), NAN), x, y_b, x, bootstrap_indices(2, 5, 0))
    assert np.isnan(nothing[:, 0]).all()
    assert np.isnan(interval_of(nothing[:, 0])).all()


# --- what the bootstrap covers --------------------------------------------------------------------------------------------------


def clustered(rng: np.random.Generator, prompts: int, samples: int, mean_WK: np.ndarray) -> np.ndarray:
    """Rewards [W, P, S, K] around known means: prompts differ, methods of one prompt go together, responses add noise."""
    prompt, own = rng.gumbel(size=(prompts, 1, 2)) - np.euler_gamma, rng.normal(size=(len(mean_WK), prompts, samples, 2))
    return mean_WK[:, None, None, :] + 0.6 * prompt + own


def test_drawn_times_count_the_resamples() -> None:
    table = np.array([[0, 0, 2], [1, 2, 1]])
    assert drawn_times(table).tolist() == [[1, 1, 1], [2, 0, 1], [0, 2, 1]]


def test_intervals_hold_the_truth_95_times_of_100() -> None:
    rng, prompts, batch = np.random.default_rng(5), 200, 50
    truth_WK = np.array([[1.0, 0.0], [0.7, 0.6], [0.0, 0.9]])
    inner, volume = float(mean_inner_product(truth_WK, WEIGHTS)), float(hypervolumes(truth_WK, [-1, -1]))
    hits: dict[str, list[bool]] = {"mean": [], "inner product": [], "hypervolume": [], "equal length": []}

    def note(name: str, truth: float, found: tuple[float, float, float]) -> None:
        hits[name].append(found[1] <= truth <= found[2])

    for repeat in range(40):
        table = bootstrap_indices(prompts, 600, repeat)
        reward_RWPSK = np.stack([clustered(rng, prompts, 2, truth_WK) for _ in range(batch)])
        front_BRWK = resampled_front(reward_RWPSK.mean(axis=3).reshape(-1, prompts, 2), table).reshape(-1, batch, 3, 2)
        product_BR = mean_inner_product(front_BRWK, WEIGHTS)
        for run, reward_WPSK in enumerate(reward_RWPSK):
            note("mean", 1.0, interval_of(front_BRWK[:, run, 0, 0]))
            note("inner product", inner, interval_of(product_BR[:, run]))
            if repeat < 14:
                note("hypervolume", volume, interval_of(hypervolumes(front_BRWK[:401, run], [-1, -1])))
            # a's answers are longer by 0.2 and better by 0.3 than that makes them
            x_a, x_b = rng.normal(3.2, 0.5, size=(2, prompts, 2)) + np.array([0.2, 0])[:, None, None]
            noise = reward_WPSK[:2, :, :, 0] - truth_WK[:2, None, None, 0]
            found = equal_length_difference(0.3 + 0.8 * x_a + noise[0], x_a, 0.8 * x_b + noise[1], x_b, table)
            note("equal length", 0.3, interval_of(found[:, 0]))
    assert {name: np.mean(hit) for name, hit in hits.items()} == {name: pytest.approx(0.95, abs=0.02) for name in hits}


def test_an_interval_over_responses_would_hold_it_less_often() -> None:
    # the point of drawing whole prompts: 8 samples of a prompt are not 8 prompts
    rng, hit = np.random.default_rng(6), 0
    for _ in range(200):
        reward_PS = clustered(rng, 40, 8, np.zeros((1, 2)))[0, :, :, 0]
        _, lo, hi = mean_interval(reward_PS.ravel(), bootstrap_indices(320, 200, 0))
        hit += lo <= 0 <= hi
    assert hit / 200 < 0.85
