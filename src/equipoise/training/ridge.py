"""Ridge regression of many attributes with missing labels and many penalties, from one float64 Gram matrix per set of rows.

    w_ka = (X_k' X_k + alpha_a I)^-1 X_k' y_k        b_ka = 0, or with an intercept both are centred and b_ka = ybar - w . xbar

X_k [n_k, D] are the rows that attribute k has labels for. Attributes with the same rows share their matrix and its
factorisations; rows that several attributes share with different neighbours (a row pattern) are summed once. Where an
attribute has fewer rows than features, the n_k x n_k dual system is solved instead: w = X' (X X' + alpha I)^-1 y.
Penalties so close, against the matrix's eigenvalues, that one factor preconditions the other's system to convergence in a few
steps of conjugate gradients don't get factors of their own; the rest do. Memory is a block of rows and at most six D x D
matrices, whatever N is: the sums, a factor, and up to four patterns that later attributes share. The penalty is chosen per
attribute by squared error on validation rows.

Paper: ArmoRM, 2406.12845, section 3.1 (linear probe; the L2 grid is in its code only). Departures: float64 throughout (float32
normal equations lose up to 5 % of the coefficients on hidden states); rows are split by the caller, by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from equipoise.training.normal_equations import Blocks, Dual, Primal, Rows, Sums, System, parts
from equipoise.types import UserError

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""ArmoRM's penalties: absolute, on sums over rows."""
_HELD = 4
"""Row patterns whose sums are kept for later attributes."""


@dataclass(frozen=True, kw_only=True)
class RidgeFit:
    """Coefficients of every attribute at its best penalty, and how it was chosen."""

    weight_KD: Float[np.ndarray, "K D"]
    bias_K: Float[np.ndarray, " K"]
    alpha_K: Float[np.ndarray, " K"]
    mse_KA: Float[np.ndarray, "K A"]
    """Validation squared error at each penalty; NaN where the system had no Cholesky factor in float64."""
    rows_K: Int[np.ndarray, " K"]
    """Labelled rows that each attribute was fitted to."""

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        """Predictions [N, K]."""
        return np.asarray(np.asarray(x_ND, dtype=np.float64) @ self.weight_KD.T + self.bias_K)


def ridge(
    x: Rows,
    y_NK: Float[np.ndarray, "N K"],
    validation_N: Bool[np.ndarray, " N"],
    alphas: Sequence[float] = ALPHAS,
    *,
    intercept: bool = False,
    refit: bool = False,
    names: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> RidgeFit:
    """Fit all attributes at all penalties and keep each attribute's best; NaN labels are missing.

    `refit` fits once more at the chosen penalty with the validation rows; `names` are the attributes', for messages;
    `progress` is told of rows summed. Raises `UserError` for an attribute without labels on either side, a constant one,
    features that aren't finite, and a system that is singular at every penalty.
    """
    labels = np.asarray(y_NK, dtype=np.float64)
    called = [f"attribute {name!r}" for name in names] or [f"attribute {k}" for k in range(labels.shape[1])]
    _check(x, labels, validation_N, alphas, called)
    count, size = labels.shape[1], x.shape[1]
    weight_KD, bias_K, alpha_K = np.zeros((count, size)), np.zeros(count), np.zeros(count)
    mse_KA, rows_K = np.full((count, len(alphas)), np.nan), np.zeros(count, dtype=np.int64)
    blocks = Blocks(x)
    sums = PatternSums(blocks, labels, ~validation_N, progress)
    for columns in sums.label_sets:
        k = list(columns)
        rows, held = sums.rows(columns), np.flatnonzero(validation_N & ~np.isnan(labels[:, k[0]]))
        system = sums.system(columns, intercept)
        weight_ADk, bias_Ak = system.solve(np.asarray(alphas))
        mse_kA = _squared_errors(blocks, labels[:, k], held, weight_ADk, bias_Ak)
        best = _best(mse_kA, alphas, called[k[0]])
        mse_KA[k], alpha_K[k], rows_K[k] = mse_kA, np.asarray(alphas)[best], len(rows) + refit * len(held)
        picked = [(weight_ADk[a][:, j], bias_Ak[a, j]) for j, a in enumerate(best)]
        if refit:
            system.add(held, labels)
            again, shift = system.solve(np.unique(alpha_K[k]))
            at = np.searchsorted(np.unique(alpha_K[k]), alpha_K[k])
            picked = [(again[a][:, j], shift[a, j]) for j, a in enumerate(at)]
            if np.isnan(again).any():
                raise UserError(f"with its validation rows, {called[k[0]]} has collinear features at its penalty: leave small ones out")
        for j, (weight, bias) in zip(k, picked, strict=True):
            weight_KD[j], bias_K[j] = weight, bias
    return RidgeFit(weight_KD=weight_KD, bias_K=bias_K, alpha_K=alpha_K, mse_KA=mse_KA, rows_K=rows_K)


def _check(x: Rows, labels: np.ndarray, validation_N: np.ndarray, alphas: Sequence[float], called: Sequence[str]) -> None:
    if len(x.shape) != 2 or x.shape[0] != len(labels) or len(validation_N) != len(labels):
        raise UserError(f"features {x.shape}, labels {labels.shape} and split {validation_N.shape} don't have the same rows")
    if not alphas or not min(alphas) > 0:
        raise UserError(f"penalties must be positive, got {tuple(alphas)}")
    for k in range(labels.shape[1]):
        given = ~np.isnan(labels[:, k])
        for side, name in ((~validation_N, "training"), (validation_N, "validation")):
            if not (given & side).any():
                raise UserError(f"{called[k]} has no label among the {name} rows: leave it out or give rows that have it")
        fitted = labels[given & ~validation_N, k]
        if np.ptp(fitted) == 0:
            raise UserError(f"{called[k]} is {fitted[0]:g} in all {len(fitted)} training rows that have it: a constant has no direction")


def _best(mse_kA: np.ndarray, alphas: Sequence[float], called: str) -> np.ndarray:
    if np.isnan(mse_kA).all(axis=1).any():
        raise UserError(f"the features of {called} are collinear at every penalty up to {max(alphas):g}: add a larger one")
    return np.nanargmin(mse_kA, axis=1)


def _squared_errors(blocks: Blocks, labels_Nk: np.ndarray, held: np.ndarray, weight_ADk: np.ndarray, bias_Ak: np.ndarray) -> np.ndarray:
    """Mean squared error [k, A] of all models on the rows `held`, in one product per block."""
    penalties, size, k = weight_ADk.shape
    flat = np.ascontiguousarray(weight_ADk.transpose(1, 2, 0).reshape(size, k * penalties))
    total = np.zeros((k, penalties))
    for part in parts(held):
        guess = (blocks(part) @ flat).reshape(len(part), k, penalties) + bias_Ak.T
        total += ((guess - labels_Nk[part][:, :, None]) ** 2).sum(axis=0)
    return total / len(held)


class PatternSums:
    """Row patterns of the labels, and the sums X'X of each, made when they are needed and dropped after their last use."""

    def __init__(self, blocks: Blocks, labels: np.ndarray, fitted_N: np.ndarray, progress: Callable[[int], None] | None) -> None:
        self.blocks, self.labels, self.progress = blocks, labels, progress
        known = ~np.isnan(labels)
        patterns, inverse = np.unique(known & fitted_N[:, None], axis=0, return_inverse=True)
        # Attributes share a system where they have the same rows on both sides: what is held out is part of the choice.
        whole, owner = np.unique(known, axis=1, return_inverse=True)
        self.label_sets = [tuple(np.flatnonzero(owner.ravel() == s).tolist()) for s in range(whole.shape[1])]
        if len(patterns) > 2 * len(self.label_sets) + 1:  # labels missing at random: each set of labels sums its own rows
            self.patterns: dict[tuple[int, ...], np.ndarray] = {(s,): np.flatnonzero(whole[:, s] & fitted_N) for s in range(whole.shape[1])}
        else:
            members = [tuple(s for s in range(whole.shape[1]) if pattern[self.label_sets[s][0]]) for pattern in patterns]
            self.patterns = {m: np.flatnonzero(inverse.ravel() == i) for i, m in enumerate(members) if m}
        self.sums: dict[tuple[int, ...], Sums] = {}

    def rows(self, columns: Sequence[int]) -> np.ndarray:
        """Training rows of a set of labels."""
        mine = self.label_sets.index(tuple(columns))
        return np.sort(np.concatenate([rows for members, rows in self.patterns.items() if mine in members]))

    def system(self, columns: Sequence[int], intercept: bool) -> System:
        """The equations of a set of labels: primal, or dual where its rows are fewer than the features."""
        mine, rows = self.label_sets.index(tuple(columns)), self.rows(columns)
        if len(rows) < self.blocks.size:
            if self.progress:
                self.progress(len(rows))
            return Dual(self.blocks, rows, self.labels, columns, intercept)
        total: Sums | None = None
        for members in sorted((m for m in self.patterns if mine in m), key=lambda m: m not in self.sums):
            if members[-1] == mine:  # its last use: the sums themselves are taken, and what follows is added to them
                held = self.sums.pop(members, None)
                joined = held if total is None or held is None else total.merge(held)
                total = self._add(total, self.patterns[members]) if joined is None else joined
            elif members not in self.sums and len(self.sums) >= _HELD:  # summed again when it is next asked for
                total = self._add(total, self.patterns[members])
            else:
                if members not in self.sums:
                    self.sums[members] = self._add(None, self.patterns[members])
                total = self.sums[members].copy() if total is None else total.merge(self.sums[members])
        assert total is not None
        return Primal(self.blocks, total, columns, intercept)

    def _add(self, total: Sums | None, rows: np.ndarray) -> Sums:
        total = Sums(self.blocks.size, self.labels.shape[1]) if total is None else total
        for part in parts(rows):
            total.add(self.blocks(part), self.labels[part])
            if self.progress:
                self.progress(len(part))
        return total
