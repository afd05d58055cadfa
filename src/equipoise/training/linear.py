"""Ridge regression from sums: one pass over the rows, any number of targets, penalties and folds.

    B = (sum_i c_i x_i x_i' + n diag(l2))^-1 sum_i c_i x_i y_i',  n = sum_i c_i

Rows arrive in blocks and only their sums are kept (float64), so memory is bounded by the number of features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

Block = tuple[Float[np.ndarray, "_ D"], Float[np.ndarray, "_ K"], Float[np.ndarray, " _"], Int[np.ndarray, " _"]]
"""x_ND, y_NK, weight_N and fold_N of some rows; blocks differ in N."""


class Moments:
    """Weighted sums of x x', x y' and y y' over the rows of one fold."""

    def __init__(self, features: int, targets: int) -> None:
        self.xx = np.zeros((features, features))
        self.xy = np.zeros((features, targets))
        self.yy = np.zeros(targets)
        self.count = 0.0

    def add(self, x_ND: Float[np.ndarray, "N D"], y_NK: Float[np.ndarray, "N K"], weight_N: Float[np.ndarray, " N"]) -> None:
        """Add a block of rows."""
        scaled = x_ND * weight_N[:, None]
        self.xx += scaled.T @ x_ND
        self.xy += scaled.T @ y_NK
        self.yy += (weight_N[:, None] * y_NK**2).sum(axis=0)
        self.count += float(weight_N.sum())

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.xx), len(self.yy))
        total.xx, total.xy = self.xx + other.xx, self.xy + other.xy
        total.yy, total.count = self.yy + other.yy, self.count + other.count
        return total

    def targets(self, picked: slice) -> Moments:
        """The same rows, with these of the targets."""
        some = Moments(0, 0)
        some.xx, some.count = self.xx, self.count
        some.xy, some.yy = self.xy[:, picked], self.yy[picked]
        return some

    def solve(self, l2_D: Float[np.ndarray, " D"]) -> Float[np.ndarray, "D K"]:
        """B [D, K] of the equation above."""
        from scipy.linalg import cho_factor, cho_solve

        system = self.xx.copy()
        system[np.diag_indices_from(system)] += self.count * l2_D
        return np.asarray(cho_solve(cho_factor(system, overwrite_a=True, check_finite=False), self.xy, check_finite=False))

    def squared_error(self, B_DK: Float[np.ndarray, "D K"]) -> Float[np.ndarray, " K"]:
        """sum_i c_i (y_i - x_i B)^2 per target."""
        return self.yy - 2 * (self.xy * B_DK).sum(axis=0) + (B_DK * (self.xx @ B_DK)).sum(axis=0)


def fold_moments(blocks: Iterable[Block], folds: int) -> list[Moments]:
    """Moments per fold from blocks of rows."""
    out: list[Moments] = []
    for x_ND, y_NK, weight_N, fold_N in blocks:
        if not out:
            out = [Moments(x_ND.shape[1], y_NK.shape[1]) for _ in range(folds)]
        for fold in range(folds):
            rows = (fold_N == fold) & (weight_N > 0)
            if rows.any():
                out[fold].add(x_ND[rows], y_NK[rows], weight_N[rows])
    return out


def cross_validate(
    moments: Sequence[Moments],
    grid: Sequence[float],
    penalty: Callable[[float], Float[np.ndarray, " D"]],
    per_fold: bool = False,
) -> tuple[list[float], list[Float[np.ndarray, "D K"]], Float[np.ndarray, " K"]]:
    """Choose one penalty per target by held-out squared error over the folds.

    Returns the chosen values per target, the held-out fits (B [D, K] per fold, each target at its chosen value) and the
    held-out R2 per target (against predicting 0). With `per_fold` there is a copy of the K targets for each fold, in the
    order of the folds, and what is held out is fitted to and judged by its own: for targets that come from a fit
    themselves, which must not have seen the fold either.
    """
    total = sum(moments[1:], moments[0])
    count = len(total.yy) // (len(moments) if per_fold else 1)
    own = [slice(f * count, (f + 1) * count) if per_fold else slice(count) for f in range(len(moments))]
    judges = [fold.targets(mine) for fold, mine in zip(moments, own, strict=True)]
    errors, fits = [], []
    for l2 in grid:
        held = [_without(total, fold).targets(mine).solve(penalty(l2)) for fold, mine in zip(moments, own, strict=True)]
        errors.append(sum(judge.squared_error(B) for judge, B in zip(judges, held, strict=True)))
        fits.append(held)
    error_LK = np.array(errors)
    best_K = error_LK.argmin(axis=0)
    chosen = [np.stack([fits[best_K[k]][f][:, k] for k in range(len(best_K))], axis=1) for f in range(len(moments))]
    r2_K = 1 - error_LK[best_K, range(len(best_K))] / np.maximum(sum(judge.yy for judge in judges), 1e-30)
    return [grid[b] for b in best_K], chosen, r2_K


def refit(
    moments: Sequence[Moments],
    l2_K: Sequence[float],
    penalty: Callable[[float], Float[np.ndarray, " D"]],
    without: Sequence[int] = (),
) -> Float[np.ndarray, "D K"]:
    """B [D, K] on all folds but those `without`, each target at its own penalty."""
    kept = [fold for index, fold in enumerate(moments) if index not in without]
    total = sum(kept[1:], kept[0])
    by_value = {l2: total.solve(penalty(l2)) for l2 in set(l2_K)}
    return np.stack([by_value[l2][:, k] for k, l2 in enumerate(l2_K)], axis=1)


def _without(total: Moments, fold: Moments) -> Moments:
    rest = Moments(len(total.xx), len(total.yy))
    rest.xx, rest.xy = total.xx - fold.xx, total.xy - fold.xy
    rest.yy, rest.count = total.yy - fold.yy, total.count - fold.count
    return rest
