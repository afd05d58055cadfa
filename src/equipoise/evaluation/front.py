"""Fronts of maximised objectives: dominance, hypervolume, and intervals that resample prompts.

Arrays in, arrays out, float64. Every objective is maximised. NaN is unscored: it is left out of a mean and keeps a
point off the front. Prompts, not responses, are resampled, since responses to one prompt aren't independent; what is
compared shares the resampled prompts.

Sources: hypervolume, Zitzler & Thiele 1998, computed exactly: here in two objectives and for small fronts in three, else by
moocore; percentile bootstrap, Efron & Tibshirani 1993,
chapter 13; sign-flip test, Fisher 1935, with the +1 of Phipson & Smyth 2010.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from equipoise.types import UserError

_EXACT_FLIPS = 1 << 14
_CHUNK = 1024
_SWEPT = 16
"""Most points of a front in three objectives that are swept for all fronts at once; of more, moocore is quicker one by one."""


def dominates(a_K: Real[np.ndarray, " K"], b_K: Real[np.ndarray, " K"]) -> bool:
    """Whether `a` is at least `b` on every objective and above it on one; a NaN on either side dominates nothing."""
    a, b = np.asarray(a_K, dtype=np.float64), np.asarray(b_K, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise UserError(f"dominance compares two vectors of the same objectives, got shapes {a.shape} and {b.shape}")
    return bool(np.all(a >= b) and np.any(a > b))


def non_dominated(points_NK: Real[np.ndarray, "N K"]) -> Bool[np.ndarray, " N"]:
    """Mask [N] of the rows that no other row dominates; equal rows are both kept, rows with a NaN never."""
    import moocore

    points = _matrix(points_NK, "points")
    scored = ~np.isnan(points).any(axis=1)
    mask = np.zeros(len(points), dtype=bool)
    if scored.any():
        mask[scored] = moocore.is_nondominated(points[scored], maximise=True, keep_weakly=True)
    return mask


def hypervolume(points_NK: Real[np.ndarray, "N K"], ref_point_K: Sequence[float] | Real[np.ndarray, " K"]) -> float:
    """Volume that is dominated by the points and lies above the reference point.

        HV = vol( union_n { z : ref_point <= z <= points_n } )

    In the product of the objectives' units. Rows with a NaN are left out; rows that don't exceed the reference point on
    every objective add 0. Raises `UserError` for a reference point that isn't finite or of another size, and for
    infinite points.
    """
    return float(hypervolumes(_matrix(points_NK, "points"), ref_point_K))


def hypervolumes(points_BNK: Real[np.ndarray, "*B N K"], ref_point_K: Sequence[float] | Real[np.ndarray, " K"]) -> Float[np.ndarray, "*B"]:
    """`hypervolume` of each of many fronts of N points."""
    import moocore

    points = np.asarray(points_BNK, dtype=np.float64)
    ref_point = _ref_point(ref_point_K, points.shape[-1])
    if np.isinf(points).any():
        raise UserError("a point of the front is infinite, so its hypervolume is too; look for a reward that overflows")
    above = np.all(points > ref_point, axis=-1)  # a NaN isn't
    if points.shape[-1] == 2 or (points.shape[-1] == 3 and points.shape[-2] <= _SWEPT):
        over_BNK = np.where(above[..., None], points - ref_point, 0.0)
        return _areas(over_BNK) if points.shape[-1] == 2 else _volumes(over_BNK)
    found = np.zeros(points.shape[:-2])
    for at in np.ndindex(found.shape):
        if above[at].any():
            found[at] = moocore.hypervolume(points[at][above[at]], ref=ref_point, maximise=True)
    return found


def _areas(over_BN2: np.ndarray) -> np.ndarray:
    """Hypervolume above 0 of two objectives: a sweep down the first, under the best second so far."""
    order_BN = np.argsort(-over_BN2[..., 0], axis=-1)
    x_BN, y_BN = (np.take_along_axis(over_BN2[..., k], order_BN, axis=-1) for k in (0, 1))
    return np.asarray((_steps(x_BN) * np.maximum.accumulate(y_BN, axis=-1)).sum(axis=-1))


def _volumes(over_BN3: np.ndarray) -> np.ndarray:
    """Hypervolume above 0 of three objectives: a sweep down the third, over the area of the points that reach as high."""
    order_BN = np.argsort(-over_BN3[..., 2], axis=-1)
    over_BN3 = np.take_along_axis(over_BN3, order_BN[..., None], axis=-2)
    height_BN, total_B = _steps(over_BN3[..., 2]), np.zeros(over_BN3.shape[:-2])
    for reached in range(1, over_BN3.shape[-2] + 1):
        total_B += height_BN[..., reached - 1] * _areas(over_BN3[..., :reached, :2])
    return total_B


def _steps(value_BN: np.ndarray) -> np.ndarray:
    """How far each of a falling row of numbers is above the next one, the last above 0."""
    return value_BN - np.concatenate([value_BN[..., 1:], np.zeros_like(value_BN[..., :1])], axis=-1)


def prompt_means(reward_NK: Real[np.ndarray, "N K"], prompt_ids: Sequence[str]) -> tuple[tuple[str, ...], Float[np.ndarray, "P K"]]:
    """Mean over the scored responses of each prompt: (ids, mean_PK), prompts in the order of their first response.

    A prompt without a scored response has NaN. Raises `UserError` where ids and rows differ in number.
    """
    ids, total_PK, count_PK = _totals(reward_NK, prompt_ids)
    return ids, divide(total_PK, count_PK)


def resampled_means(
    value_NS: Real[np.ndarray, "N S"], prompt_ids: Sequence[str], n_boot: int, seed: int
) -> Float[np.ndarray, "{n_boot}+1 S"]:
    """Mean of each column over its scored rows, [1 + n_boot, S]: row 0 of the data, the others of resampled prompts.

        mean_bs = sum_p m_bp total_ps / sum_p m_bp count_ps,  m_bp: how often resample b drew prompt p, m_0p = 1

    total_ps and count_ps run over the scored rows of prompt p, so a prompt with many rows counts for more and its rows are
    drawn together. NaN where no drawn row is scored. Any formula of the columns, applied row by row, has its estimate in
    row 0 and its bootstrap in the rest. Raises `UserError` for fewer than 2 prompts.
    """
    ids, total_PS, count_PS = _totals(value_NS, prompt_ids)
    times_BP = drawn_times(bootstrap_indices(len(ids), n_boot, seed))
    return divide(times_BP @ total_PS, times_BP @ count_PS)


def _totals(reward_NK: np.ndarray, prompt_ids: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """(ids, total_PK, count_PK) of the scored rows of each prompt, prompts in the order of their first row."""
    reward = _matrix(reward_NK, "rewards")
    if len(reward) != len(prompt_ids):
        raise UserError(f"{len(reward)} rows of rewards for {len(prompt_ids)} prompt ids")
    rows: dict[str, int] = {}
    index = np.array([rows.setdefault(prompt, len(rows)) for prompt in prompt_ids], dtype=np.int64)
    scored = ~np.isnan(reward)
    total, count = np.zeros((len(rows), reward.shape[1])), np.zeros((len(rows), reward.shape[1]))
    np.add.at(total, index, np.where(scored, reward, 0.0))
    np.add.at(count, index, scored)
    return tuple(rows), total, count


def bootstrap_indices(n_prompts: int, n_boot: int, seed: int) -> Int[np.ndarray, "{n_boot} {n_prompts}"]:
    """Prompts drawn with replacement, int64 [n_boot, P]: one table serves every point, so that differences are paired."""
    if n_prompts < 2:
        raise UserError(f"an interval over prompts needs at least 2 prompts, got {n_prompts}")
    if n_boot < 1:
        raise UserError(f"a bootstrap needs at least 1 resample, got {n_boot}; 2000 is usual")
    return np.random.default_rng(seed).integers(0, n_prompts, size=(n_boot, n_prompts), dtype=np.int64)


def mean_interval(
    values_P: Real[np.ndarray, " P"], indices: Int[np.ndarray, "n_boot P"], level: float = 0.95
) -> tuple[float, float, float]:
    """(mean, lo, hi): the mean over scored prompts and its percentile interval over the resamples `indices` [n_boot, P].

    Raises `UserError` where fewer than 2 prompts are scored or the table is for another number of prompts.
    """
    values = _vector(values_P)
    _check_table(indices, len(values))
    _check_scored(values, "values")
    lo, hi = percentiles(scored_mean(values[indices], axis=1), level)
    return float(scored_mean(values, axis=0)), lo, hi


def paired_interval(
    a_P: Real[np.ndarray, " P"], b_P: Real[np.ndarray, " P"], indices: Int[np.ndarray, "n_boot P"], level: float = 0.95
) -> tuple[float, float, float]:
    """(mean, lo, hi) of a - b on the same prompts; a prompt that either side left unscored is left out."""
    return mean_interval(_difference(a_P, b_P), indices, level)


def drawn_times(indices: Int[np.ndarray, "n_boot P"]) -> Float[np.ndarray, "n_boot+1 P"]:
    """How often each resample drew each prompt, [1 + n_boot, P]; row 0 is the data, every prompt once."""
    n_boot, prompts = indices.shape
    drawn = indices + prompts * np.arange(n_boot)[:, None]
    times_BP = np.bincount(drawn.ravel(), minlength=n_boot * prompts).reshape(n_boot, prompts)
    return np.concatenate([np.ones((1, prompts)), times_BP])


def resampled_front(reward_WPK: Real[np.ndarray, "W P K"], indices: Int[np.ndarray, "n_boot P"]) -> Float[np.ndarray, "n_boot+1 W K"]:
    """W points, each the mean over prompts, [1 + n_boot, W, K]: row 0 of the data, the others of resampled prompts.

    All points share the resampled prompts, so that any formula of a front, applied row by row, has its estimate in row 0
    and its bootstrap in the rest (`interval_of`). A maximum over noisy points is biased upwards, more so for many close
    points, and its interval isn't corrected for it: compare methods at the same W. NaN where no drawn prompt is scored.
    Raises `UserError` for fewer than 2 prompts and for an objective that no point was scored on.
    """
    reward = np.asarray(reward_WPK, dtype=np.float64)
    if reward.ndim != 3:
        raise UserError(f"rewards of a front have the axes weights, prompts, objectives; got shape {reward.shape}")
    _check_table(indices, reward.shape[1])
    for k in range(reward.shape[2]):
        _check_scored(reward[:, :, k].T, f"objective {k}")
    times_BP, scored = drawn_times(indices), ~np.isnan(reward)
    total, count = (np.tensordot(times_BP, np.moveaxis(part, 1, 0), axes=1) for part in (np.where(scored, reward, 0.0), scored))
    return divide(total, count)


def interval_of(value_B: Float[np.ndarray, " B"], level: float = 0.95) -> tuple[float, float, float]:
    """(value, lo, hi) from an estimate in element 0 and its bootstrap in the rest; no interval (NaN) where either is NaN."""
    if np.isnan(value_B[0]) or np.isnan(value_B[1:]).all():
        return float(value_B[0]), float("nan"), float("nan")
    return float(value_B[0]), *percentiles(value_B[1:], level)


def percentiles(replicates: Real[np.ndarray, " n_boot"], level: float = 0.95) -> tuple[float, float]:
    """(lo, hi): the quantiles of the replicates that leave out (1 - level) / 2 at each end; NaN replicates are left out.

    A replicate is NaN where it happened to draw no scored prompt. Raises `UserError` for a level outside (0, 1) and where
    every replicate is NaN.
    """
    if not 0 < level < 1:
        raise UserError(f"an interval's level lies between 0 and 1, got {level:g}; 0.95 is usual")
    found = replicates[~np.isnan(replicates)]
    if not len(found):
        raise UserError("an interval needs scored prompts, and none of the resamples drew one")
    tail = (1 - level) / 2
    lo, hi = np.quantile(found, [tail, 1 - tail])
    return float(lo), float(hi)


def permutation_pvalue(a_P: Real[np.ndarray, " P"], b_P: Real[np.ndarray, " P"], n: int, seed: int) -> float:
    """Two-sided p of the paired sign-flip test that a - b is symmetric about 0.

        p = (1 + #{s : |mean s d| >= |mean d|}) / (n + 1),  d = a - b over the prompts both scored, s random signs

    All 2^P sign patterns are used instead, and the +1 dropped, where they are at most n and at most 16384. Unitless,
    never 0. Raises `UserError` for fewer than 2 prompts in common or n below 1.
    """
    difference = _difference(a_P, b_P)
    _check_scored(difference, "differences")
    if n < 1:
        raise UserError(f"a permutation test needs at least 1 permutation, got {n}; 10000 is usual")
    difference = difference[~np.isnan(difference)]
    # Sums that are equal in exact arithmetic must tie, or p would depend on the order of the additions.
    observed = abs(difference.sum()) - 1e-12 * np.abs(difference).sum()
    every = exact_patterns(len(difference), n)
    if every is not None:
        return float(np.mean(np.abs(every @ difference) >= observed))
    rng, extreme = np.random.default_rng(seed), 0
    for start in range(0, n, _CHUNK):
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=(min(_CHUNK, n - start), len(difference)))
        extreme += int(np.sum(np.abs(signs @ difference) >= observed))
    return (1 + extreme) / (n + 1)


def exact_patterns(prompts: int, n: int) -> np.ndarray | None:
    """All 2^P patterns of signs, [2^P, P], where they are at most n and at most 16384; None where they are more."""
    patterns = 1 << min(prompts, 62)
    if patterns > min(n, _EXACT_FLIPS):
        return None
    return 1.0 - 2.0 * ((np.arange(patterns)[:, None] >> np.arange(prompts)) & 1)


def _matrix(values: np.ndarray, what: str) -> np.ndarray:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise UserError(f"{what} are a table with one row each and one column per objective; got shape {matrix.shape}")
    return matrix


def _vector(values: np.ndarray) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise UserError(f"an interval is taken of one number per prompt; got shape {vector.shape}")
    return vector


def _ref_point(ref_point: Sequence[float] | np.ndarray, objectives: int) -> np.ndarray:
    vector = np.asarray(ref_point, dtype=np.float64)
    if vector.shape != (objectives,) or not np.isfinite(vector).all():
        raise UserError(f"the reference point {vector.tolist()} must have one finite number for each of {objectives} objectives")
    return vector


def _difference(a_P: np.ndarray, b_P: np.ndarray) -> np.ndarray:
    a, b = _vector(a_P), _vector(b_P)
    if a.shape != b.shape:
        raise UserError(f"a paired comparison needs the same prompts on both sides, got {len(a)} and {len(b)}")
    return a - b


def _check_table(indices: np.ndarray, prompts: int) -> None:
    if prompts < 2:
        raise UserError(f"an interval over prompts needs at least 2 prompts, got {prompts}")
    if indices.ndim != 2 or indices.shape[1] != prompts:
        raise UserError(f"the bootstrap table of shape {indices.shape} isn't for {prompts} prompts; make it with bootstrap_indices")


def _check_scored(values: np.ndarray, what: str) -> None:
    """Fewer than 2 scored prompts have no spread to speak of; a prompt (axis 0) counts once, however many points scored it."""
    scored = ~np.isnan(values)
    found = int(scored.any(axis=1).sum() if scored.ndim == 2 else scored.sum())
    if found < 2:
        raise UserError(f"{what}: {found} of {len(values)} prompts are scored; an interval needs at least 2")


def divide(total: np.ndarray | np.generic, count: np.ndarray | np.generic) -> np.ndarray:
    """total / count, NaN where the count isn't above 0."""
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=np.asarray(count) > 0)


def scored_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis of what is scored, NaN where nothing is."""
    scored = ~np.isnan(values)
    return divide(np.where(scored, values, 0.0).sum(axis=axis), scored.sum(axis=axis))
