"""Choosing among samples: numbers by hand, laws by enumeration, and draws that only their seeds decide."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from equipoise.decoding.resampling import best_of_n, best_of_n_kl, resample, resampling_kl, resampling_probabilities
from equipoise.types import UserError

NAN = float("nan")
LAW = np.array([0.1, 0.4, 0.3, 0.2])
SCORES = np.array([1.5, -0.5, 0.25, 1.0])
"""Four outcomes of a sampler and their scores."""


def all_draws(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(outcomes_PN, probability_P): every sequence of n independent draws."""
    outcomes = np.array(list(itertools.product(range(len(LAW)), repeat=n)))
    return outcomes, LAW[outcomes].prod(axis=1)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0).sum())


def best_of_n_law(n: int) -> np.ndarray:
    outcomes, probability = all_draws(n)
    best = best_of_n(SCORES[outcomes])
    return np.bincount(outcomes[np.arange(len(outcomes)), best], weights=probability, minlength=len(LAW))


def test_best_by_hand():
    assert best_of_n(np.array([[0.1, 3.0, 2.0], [5.0, -1.0, 5.0], [-2.0, -1.0, -3.0]])).tolist() == [1, 0, 1]


def test_the_unscored_are_never_the_best_unless_nothing_is_scored():
    assert best_of_n(np.array([[NAN, -7.0, NAN], [NAN, NAN, NAN]])).tolist() == [1, 0]


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (2, np.log(2) - 1 / 2), (4, np.log(4) - 3 / 4)])
def test_best_of_n_kl_by_hand(n, kl):
    assert best_of_n_kl(n) == pytest.approx(kl)


@pytest.mark.parametrize("n", [2, 3])
def test_best_of_n_kl_bounds_the_enumerated_one(n):
    """Of few outcomes, several of the n are often the same one, so the bound is not reached."""
    law = best_of_n_law(n)
    order = np.argsort(SCORES)
    cdf = np.cumsum(LAW[order])
    np.testing.assert_allclose(law[order], np.diff(cdf**n, prepend=0))
    assert 0.3 * best_of_n_kl(n) < kl(law, LAW) < best_of_n_kl(n)


@pytest.mark.parametrize("n", [2, 3])
def test_best_of_n_kl_is_exact_without_ties(n):
    """With m equally likely outcomes the chance of a tie falls as 1/m, and the gap with it."""
    gaps = []
    for m in (10, 100, 10_000):
        law = np.diff((np.arange(m + 1) / m) ** n)
        gaps.append(best_of_n_kl(n) - kl(law, np.full(m, 1 / m)))
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 1e-3


def test_resampling_probabilities_by_hand():
    got = resampling_probabilities(np.array([[0.0, np.log(3)], [np.log(4), np.log(4)]]), beta=1.0)
    np.testing.assert_allclose(got, [[0.25, 0.75], [0.5, 0.5]])
    np.testing.assert_allclose(resampling_probabilities(np.array([[0.0, np.log(3)]]), beta=0.5), [[0.1, 0.9]])
    np.testing.assert_allclose(resampling_probabilities(np.array([[0.0, NAN, np.log(3)], [NAN] * 3]), 1.0), [[0.25, 0, 0.75], [1 / 3] * 3])
    np.testing.assert_allclose(resampling_probabilities(np.array([[-1e5, 1e5]]), 1e-3), [[0, 1]])


def test_resampling_kl_by_hand():
    score = np.array([[0.0, np.log(3)], [2.0, 2.0]])
    of_first = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert resampling_kl(score, 1.0) == pytest.approx(of_first / 2)
    assert resampling_kl(score[:1], 1e-4) == pytest.approx(np.log(2))  # all on one of two
    assert resampling_kl(score[:1], 1e9) == pytest.approx(0, abs=1e-9)


def test_frequencies_match_the_softmax():
    scores, beta, draws = np.array([0.3, -1.0, NAN, 2.0, 1.5]), 0.7, 20_000
    picked = resample(np.tile(scores, (draws, 1)), beta, range(draws))
    counts = np.bincount(picked, minlength=5)
    assert counts[2] == 0
    scored = [0, 1, 3, 4]
    assert chisquare(counts[scored], draws * softmax(scores[scored] / beta)).pvalue > 0.01


def test_the_unscored_are_never_drawn_unless_nothing_is_scored():
    draws = 500
    for beta in (0.01, 1.0, 1e6):
        assert set(resample(np.tile([NAN, -50.0, NAN], (draws, 1)), beta, range(draws))) == {1}
        assert set(resample(np.full((draws, 3), NAN), beta, range(draws))) <= {0, 1, 2}


def test_a_draw_depends_on_its_seed_alone():
    scores = np.random.default_rng(0).normal(size=(40, 6))
    seeds = list(range(700, 740))
    together = resample(scores, 0.8, seeds)
    assert len(set(together)) > 3
    assert [int(resample(scores[i : i + 1], 0.8, [seed])[0]) for i, seed in enumerate(seeds)] == together.tolist()
    assert resample(scores[::-1], 0.8, seeds[::-1]).tolist() == together[::-1].tolist()
    assert resample(scores, 0.8, [s + 1 for s in seeds]).tolist() != together.tolist()


def test_a_small_beta_takes_the_best_and_a_large_one_any():
    scores = np.random.default_rng(1).normal(size=(30, 5))
    assert resample(scores, 1e-6, range(30)).tolist() == best_of_n(scores).tolist()
    picked = resample(np.tile([0.0, 9.0, -9.0], (6000, 1)), 1e6, range(6000))
    assert chisquare(np.bincount(picked, minlength=3)).pvalue > 0.01


def test_the_law_of_the_draw_tends_to_the_closed_form():
    """Law of what is drawn among n, by enumeration, against pi_ref exp(s / beta) / Z."""
    beta = 0.8
    target = LAW * np.exp(SCORES / beta) / (LAW @ np.exp(SCORES / beta))
    distances = []
    for n in (1, 2, 4, 6):
        outcomes, probability = all_draws(n)
        weight_PN = probability[:, None] * resampling_probabilities(SCORES[outcomes], beta)
        law = np.bincount(outcomes.ravel(), weights=weight_PN.ravel(), minlength=len(LAW))
        assert law.sum() == pytest.approx(1)
        assert kl(law, LAW) <= np.log(n) + 1e-12
        distances.append(np.abs(law - target).sum())
    assert distances == sorted(distances, reverse=True)
    assert distances[0] == pytest.approx(np.abs(LAW - target).sum())
    assert distances[-1] < 0.25 * distances[0]


@pytest.mark.parametrize("beta", [0.0, -1.0, NAN])
def test_an_impossible_beta_is_named(beta):
    with pytest.raises(UserError, match=f"beta must be positive, got {beta:g}"):
        resample(np.zeros((1, 2)), beta, [0])


@pytest.mark.parametrize("n", [0, -3])
def test_an_impossible_n_is_named(n):
    with pytest.raises(UserError, match=f"n must be at least 1, got {n}"):
        best_of_n_kl(n)
