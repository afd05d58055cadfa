"""Ridge from sums against numpy's least squares on the rows themselves, and cross-validation done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.training.linear import Moments, cross_validate, fold_moments, refit

RNG = np.random.default_rng(0)
ROWS, FEATURES, TARGETS, FOLDS = 60, 4, 2, 3
X = RNG.normal(size=(ROWS, FEATURES))
Y = X @ RNG.normal(size=(FEATURES, TARGETS)) + RNG.normal(size=(ROWS, TARGETS))
WEIGHT = RNG.uniform(0.1, 2.0, size=ROWS)
FOLD = np.arange(ROWS) % FOLDS


def by_rows(x: np.ndarray, y: np.ndarray, weight: np.ndarray, l2_D: np.ndarray) -> np.ndarray:
    """The same minimiser by least squares on rows stacked with one row per penalised coefficient."""
    root = np.sqrt(weight)[:, None]
    stacked = np.concatenate([x * root, np.diag(np.sqrt(weight.sum() * l2_D))])
    return np.linalg.lstsq(stacked, np.concatenate([y * root, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]


def in_blocks(size: int, weight: np.ndarray = WEIGHT):
    for start in range(0, ROWS, size):
        rows = slice(start, start + size)
        yield X[rows], Y[rows], weight[rows], FOLD[rows]


def same(l2: float) -> np.ndarray:
    return np.full(FEATURES, l2)


@pytest.mark.parametrize("l2_D", [np.zeros(FEATURES), np.full(FEATURES, 0.3), np.array([0.0, 0.1, 1.0, 10.0])])
def test_solution_is_that_of_least_squares_on_the_rows(l2_D):
    sums = Moments(FEATURES, TARGETS)
    sums.add(X, Y, WEIGHT)
    assert sums.count == pytest.approx(WEIGHT.sum())
    np.testing.assert_allclose(sums.solve(l2_D), by_rows(X, Y, WEIGHT, l2_D), atol=1e-10)


def test_squared_error_is_that_of_the_rows():
    sums = Moments(FEATURES, TARGETS)
    sums.add(X, Y, WEIGHT)
    for B in (sums.solve(same(0.5)), RNG.normal(size=(FEATURES, TARGETS)), np.zeros((FEATURES, TARGETS))):
        np.testing.assert_allclose(sums.squared_error(B), (WEIGHT[:, None] * (Y - X @ B) ** 2).sum(axis=0))


def test_solving_leaves_the_sums_as_they_were():
    sums = Moments(FEATURES, TARGETS)
    sums.add(X, Y, WEIGHT)
    xx, xy = sums.xx.copy(), sums.xy.copy()
    sums.solve(same(1.0))
    np.testing.assert_array_equal(sums.xx, xx)
    np.testing.assert_array_equal(sums.xy, xy)


@pytest.mark.parametrize("size", [1, 7, ROWS])
def test_blocks_do_not_matter(size):
    whole = fold_moments(in_blocks(ROWS), FOLDS)
    parts = fold_moments(in_blocks(size), FOLDS)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.xx, other.xx)
        np.testing.assert_allclose(one.xy, other.xy)
        np.testing.assert_allclose(one.yy, other.yy)
        assert one.count == pytest.approx(other.count)
    total = whole[0] + whole[1] + whole[2]
    np.testing.assert_allclose(total.xx, (X * WEIGHT[:, None]).T @ X)


def test_rows_without_weight_do_not_count():
    weight = np.where(np.arange(ROWS) < 10, 0.0, WEIGHT)
    found = fold_moments(in_blocks(16, weight), FOLDS)
    total = found[0] + found[1] + found[2]
    np.testing.assert_allclose(total.solve(same(0.1)), by_rows(X[10:], Y[10:], WEIGHT[10:], same(0.1)), atol=1e-10)


def test_cross_validation_by_hand():
    grid = (0.001, 0.1, 10.0)
    moments = fold_moments(in_blocks(16), FOLDS)
    errors = np.zeros((len(grid), TARGETS))
    fits = {}
    for i, l2 in enumerate(grid):
        for fold in range(FOLDS):
            rest, held = fold != FOLD, fold == FOLD
            fits[l2, fold] = by_rows(X[rest], Y[rest], WEIGHT[rest], same(l2))
            errors[i] += (WEIGHT[held, None] * (Y[held] - X[held] @ fits[l2, fold]) ** 2).sum(axis=0)
    chosen, held_B, r2_K = cross_validate(moments, grid, same)
    assert chosen == [grid[i] for i in errors.argmin(axis=0)]
    for fold in range(FOLDS):
        for k in range(TARGETS):
            np.testing.assert_allclose(held_B[fold][:, k], fits[chosen[k], fold][:, k], atol=1e-10)
    np.testing.assert_allclose(r2_K, 1 - errors.min(axis=0) / (WEIGHT[:, None] * Y**2).sum(axis=0))
    expected = np.stack([by_rows(X, Y, WEIGHT, same(chosen[k]))[:, k] for k in range(TARGETS)], axis=1)
    np.testing.assert_allclose(refit(moments, chosen, same), expected, atol=1e-10)


def test_targets_of_their_own_for_each_fold():
    """Fold f is fitted to and judged by copy f of the targets, and by nothing of the others."""
    copies = [Y, RNG.normal(size=Y.shape), RNG.normal(size=Y.shape)]
    grid = (0.001, 0.1, 10.0)
    moments = fold_moments([(X, np.concatenate(copies, axis=1), WEIGHT, FOLD)], FOLDS)
    chosen, held_B, r2_K = cross_validate(moments, grid, same, per_fold=True)
    errors, total = np.zeros((len(grid), TARGETS)), np.zeros(TARGETS)
    fits = {}
    for fold, y in enumerate(copies):
        rest, held = fold != FOLD, fold == FOLD
        total += (WEIGHT[held, None] * y[held] ** 2).sum(axis=0)
        for i, l2 in enumerate(grid):
            fits[l2, fold] = by_rows(X[rest], y[rest], WEIGHT[rest], same(l2))
            errors[i] += (WEIGHT[held, None] * (y[held] - X[held] @ fits[l2, fold]) ** 2).sum(axis=0)
    assert chosen == [grid[i] for i in errors.argmin(axis=0)]
    for fold in range(FOLDS):
        for k in range(TARGETS):
            np.testing.assert_allclose(held_B[fold][:, k], fits[chosen[k], fold][:, k], atol=1e-10)
    np.testing.assert_allclose(r2_K, 1 - errors.min(axis=0) / total)


def test_a_fit_without_some_folds():
    moments = fold_moments(in_blocks(16), FOLDS)
    kept = FOLD == 1
    found = refit(moments, [0.1, 10.0], same, without=(0, 2))
    for k, l2 in enumerate((0.1, 10.0)):
        np.testing.assert_allclose(found[:, k], by_rows(X[kept], Y[kept], WEIGHT[kept], same(l2))[:, k], atol=1e-10)


def test_each_target_gets_its_own_penalty():
    """One target is noise, so that the heaviest penalty wins; the other is exact, so that the lightest does."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 30))
    y = np.stack([x[:, :3] @ [1.0, -2.0, 0.5], rng.normal(size=90)], axis=1)
    moments = fold_moments([(x, y, np.ones(90), np.arange(90) % 3)], 3)
    chosen, _, r2_K = cross_validate(moments, (1e-6, 1e3), lambda l2: np.full(30, l2))
    assert chosen == [1e-6, 1e3]
    assert r2_K[0] > 0.999
    assert abs(r2_K[1]) < 0.05


def test_held_out_r2_of_noise_is_not_flattering():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(100, 40)), rng.normal(size=(100, 1))
    moments = fold_moments([(x, y, np.ones(100), np.arange(100) % 5)], 5)
    _, _, r2_K = cross_validate(moments, (1e-3,), lambda l2: np.full(40, l2))
    assert r2_K[0] < 0
