"""Ridge with missing labels against a dense solve and scikit-learn's formula, row pattern by row pattern; and what may go wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.training import normal_equations
from equipoise.training.normal_equations import Blocks, Primal, Sums
from equipoise.training.ridge import ALPHAS, PatternSums, ridge
from equipoise.types import UserError


def dense(x, y, alpha, intercept):
    """(w, b) by numpy's general solver, no Cholesky: an independent solution."""
    x = np.asarray(x, dtype=np.float64)
    x_mean, y_mean = (x.mean(axis=0), y.mean()) if intercept else (np.zeros(x.shape[1]), 0.0)
    centred = x - x_mean
    w = np.linalg.solve(centred.T @ centred + alpha * np.eye(x.shape[1]), centred.T @ (y - y_mean))
    return w, y_mean - w @ x_mean


def problem(kind: str, seed: int = 0):
    """(x, y with NaN, validation mask) for a kind of missingness; asymmetrical sizes."""
    rng = np.random.default_rng(seed)
    n, d, k = {"few": (60, 80, 3), "random": (400, 12, 5)}.get(kind, (500, 17, 4))
    x = rng.standard_normal((n, d)).astype(np.float32)
    y = 0.3 * x @ rng.standard_normal((d, k)) + rng.standard_normal((n, k)) + 0.5
    if kind == "blocks":  # two sources of their own, and a third that shares attribute 0 with the first
        y[:150, 2:] = np.nan
        y[150:400, :2] = np.nan
        y[400:, 1:] = np.nan
    if kind == "random":
        y[rng.random((n, k)) < 0.3] = np.nan
    return x, y, rng.random(n) < 0.25


@pytest.mark.parametrize("kind", ["full", "blocks", "random", "few"])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_coefficients_are_those_of_a_dense_solve_on_the_attributes_own_rows(kind, intercept, refit):
    x, y, validation = problem(kind)
    fit = ridge(x, y, validation, intercept=intercept, refit=refit)
    for k in range(y.shape[1]):
        rows = ~np.isnan(y[:, k]) & (~validation | refit)
        assert fit.rows_K[k] == rows.sum()
        w, b = dense(x[rows], y[rows, k], fit.alpha_K[k], intercept)
        np.testing.assert_allclose(fit.weight_KD[k], w, rtol=1e-6, atol=1e-9)
        assert fit.bias_K[k] == pytest.approx(b, abs=1e-9)


@pytest.mark.parametrize("kind", ["full", "blocks", "random", "few"])
def test_the_penalty_is_the_one_with_the_least_error_on_the_validation_rows(kind):
    x, y, validation = problem(kind)
    fit = ridge(x, y, validation)
    for k in range(y.shape[1]):
        given = ~np.isnan(y[:, k])
        errors = []
        for alpha in ALPHAS:
            w, _ = dense(x[given & ~validation], y[given & ~validation, k], alpha, False)
            errors.append(((x[given & validation] @ w - y[given & validation, k]) ** 2).mean())
        np.testing.assert_allclose(fit.mse_KA[k], errors, rtol=1e-6)
        assert fit.alpha_K[k] == ALPHAS[int(np.argmin(errors))]


def test_by_hand():
    """One feature, rows x = 1, 2 with y = 2, 3: w = (2 + 6) / (1 + 4 + alpha) = 8 / (5 + alpha)."""
    x, y = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [3.0], [2.0]])
    fit = ridge(x, y, np.array([False, False, True]), alphas=(3.0, 7.0))
    np.testing.assert_allclose(fit.mse_KA, [[(3 - 2) ** 2, (2 - 2) ** 2]])
    assert fit.alpha_K[0] == 7
    assert fit.weight_KD[0, 0] == pytest.approx(8 / 12)


def test_each_row_pattern_is_summed_once_for_all_attributes_and_penalties(monkeypatch):
    x, y, validation = problem("blocks")
    summed = []
    add = Sums.add
    monkeypatch.setattr(Sums, "add", lambda self, block, labels: (summed.append(len(block)), add(self, block, labels)))
    ridge(x, y, validation)
    assert sum(summed) == (~validation).sum()


def test_sums_are_dropped_after_their_last_use():
    x, y, validation = problem("blocks")
    sums = PatternSums(Blocks(x), y, ~validation, None)
    assert sorted(sums.label_sets) == [(0,), (1,), (2, 3)]
    for columns in sums.label_sets:
        sums.system(columns, False)
    assert sums.sums == {}


def test_no_factor_where_a_neighbours_will_do(monkeypatch):
    """Penalties far below the eigenvalues share one factorisation, and the result is the direct solve's."""
    import scipy.linalg.lapack as lapack

    factorise, calls = lapack.dpotrf, []
    monkeypatch.setattr(lapack, "dpotrf", lambda *a, **k: (calls.append(1), factorise(*a, **k))[1])
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4000, 10)), rng.standard_normal((4000, 2))
    sums = Sums(10, 2)
    sums.add(x, y)
    weight, _ = Primal(Blocks(x), sums, (0, 1), False).solve(np.array([1e-4, 1.0, 100.0, 1e5]))
    assert 1 <= len(calls) < 4
    for a, alpha in enumerate((1e-4, 1.0, 100.0, 1e5)):
        np.testing.assert_allclose(weight[a], np.linalg.solve(x.T @ x + alpha * np.eye(10), x.T @ y), rtol=1e-9)


def ill_conditioned(rows: int, size: int, seed: int = 0) -> np.ndarray:
    """Like a language model's states: one huge direction, a 1/i spectrum, rotated."""
    rng = np.random.default_rng(seed)
    spectrum = 1.0 / np.arange(1, size + 1)
    spectrum[0] = 1e3
    turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return ((rng.standard_normal((rows, size)) * spectrum) @ turn).astype(np.float32)


@pytest.mark.parametrize("intercept", [False, True])
def test_ill_conditioned_features_keep_six_digits(intercept):
    x = ill_conditioned(600, 60)
    rng = np.random.default_rng(1)
    y = (x / x.std(axis=0)) @ rng.standard_normal((60, 3)) + rng.standard_normal((600, 3))
    validation = rng.random(600) < 0.2
    fit = ridge(x, y, validation, intercept=intercept)
    for k in range(3):
        w, _ = dense(x[~validation], y[~validation, k], fit.alpha_K[k], intercept)
        assert np.linalg.norm(fit.weight_KD[k] - w) <= 1e-6 * np.linalg.norm(w)


def test_a_penalty_without_a_factor_is_nan_and_another_is_chosen():
    """Two equal columns: singular but for the penalty, and 1e-25 is lost beside entries near 1."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((50, 1)), 3, axis=1)
    y, validation = x[:, :1] + rng.standard_normal((50, 1)), np.arange(50) < 10
    fit = ridge(x, y, validation, alphas=(1e-25, 1.0))
    assert np.isnan(fit.mse_KA[0, 0])
    assert fit.alpha_K[0] == 1.0
    with pytest.raises(UserError, match=r"attribute 0 are collinear at every penalty up to 1e-25"):
        ridge(x, y, validation, alphas=(1e-25,))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.7), st.booleans())
def test_an_attribute_doesnt_depend_on_the_others(seed, share, intercept):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((70, 6)), rng.standard_normal((70, 3))
    y[rng.random(y.shape) < share] = np.nan
    y[:4] = rng.standard_normal((4, 3))
    validation = np.arange(70) % 4 == 0
    both = ridge(x, y, validation, intercept=intercept)
    alone = ridge(x, y[:, 1:2], validation, intercept=intercept)
    np.testing.assert_allclose(both.weight_KD[1], alone.weight_KD[0], rtol=1e-8, atol=1e-10)
    assert both.alpha_K[1] == alone.alpha_K[0]


def test_labels_that_lack_in_validation_rows_alone():
    """Two attributes with the same training rows and other validation rows: each is held out on its own."""
    rng = np.random.default_rng(3)
    x, y, validation = rng.standard_normal((40, 4)), rng.standard_normal((40, 2)), np.arange(40) % 4 == 0
    y[[4, 8], 1] = np.nan
    both = ridge(x, y, validation)
    for k in range(2):
        alone = ridge(x, y[:, k : k + 1], validation)
        np.testing.assert_allclose(both.weight_KD[k], alone.weight_KD[0], rtol=1e-8)
        np.testing.assert_allclose(both.mse_KA[k], alone.mse_KA[0], rtol=1e-8)
        assert both.rows_K[k] == alone.rows_K[0]


def test_rows_come_in_blocks(monkeypatch):
    x, y, validation = problem("blocks")
    whole = ridge(x, y, validation, intercept=True)
    sizes = []

    class Watched:
        shape = x.shape

        def __getitem__(self, index):
            sizes.append(len(index))
            return x[index]

    monkeypatch.setattr(normal_equations, "_BLOCK", 32)
    again = ridge(Watched(), y, validation, intercept=True)
    assert max(sizes) == 32
    np.testing.assert_allclose(again.weight_KD, whole.weight_KD, rtol=1e-9)


def test_predictions_are_linear():
    x, y, validation = problem("full")
    fit = ridge(x, y, validation, intercept=True)
    np.testing.assert_allclose(fit.predict(x[:2])[:, 1], x[:2] @ fit.weight_KD[1] + fit.bias_K[1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y, v: y.__setitem__((v, 1), np.nan), "attribute 1 has no label among the validation rows"),
        (lambda x, y, v: y.__setitem__((~v, 2), np.nan), "attribute 2 has no label among the training rows"),
        (lambda x, y, v: y.__setitem__((slice(None), 0), 0.25), "attribute 0 is 0.25 in all"),
        (lambda x, y, v: x.__setitem__((7, 3), np.inf), "features of row 7 are not finite"),
    ],
)
def test_bad_input_is_named(spoil, message):
    x, y, validation = problem("full")
    spoil(x, y, validation)
    with pytest.raises(UserError, match=message):
        ridge(x, y, validation)


def test_penalties_must_be_positive():
    x, y, validation = problem("full")
    with pytest.raises(UserError, match="penalties must be positive"):
        ridge(x, y, validation, alphas=(0.0, 1.0))
