"""What a method's front is worth and how well its weights control it: one number from W points and their weights.

f_w [K] is the mean reward at weight vector w, every objective maximised. A point with an objective unscored is left out
of what needs that objective, and NaN comes back where too few points are left. Leading axes are many fronts at once,
such as the resamples of `front.resampled_front`. Rewards should be in comparable units (here: standard deviations of the
reference's own rewards, 0 their mean), since all but the ranks depend on them.

| metric | formula | better |
|---|---|---|
| mean inner product | mean_w w.f_w | larger |
| regret | max_v w.f_v - w.f_w: 0 where each weight's own point serves it best | smaller |
| sparsity | 1/(W - 1) sum_k sum_i (f_k(i+1) - f_k(i))^2, f_k(1) <= f_k(2) <= .. sorted per objective | smaller |
| spacing | sd of d_w = min_v sum_k abs(f_wk - f_vk) | smaller |
| spread | max_w f_wk - min_w f_wk | larger |
| additive epsilon | max_r min_w max_k (r_k - f_wk): what must be added for the points to cover a reference front | smaller |
| follows | Spearman's correlation of w_k and f_wk | larger |
| violations | share of the pairs with v_k < w_k where f_vk > f_wk | smaller |

Noise spreads points apart, so sparsity, spacing, spread and regret are biased upwards; compare methods at the same
number of points and responses. Sources: inner product and sparsity, Xu et al. 2020 (PGMORL) and Zhong et al. 2024 (Panacea,
2402.02030); spacing, Schott 1995; epsilon, Zitzler et al. 2003, computed by moocore; Spearman 1904. Departure: sparsity is
of all W points and not of the non-dominated ones, so that a dominated point doesn't make room for a better figure.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real

from equipoise.evaluation.front import divide, scored_mean
from equipoise.types import UserError


def mean_inner_product(points_BWK: Real[np.ndarray, "*B W K"], weights_WK: Real[np.ndarray, "W K"]) -> Float[np.ndarray, "*B"]:
    """mean_w w.f_w, in the units of the rewards; an objective of weight 0 may be unscored."""
    utility_BWW = _utility(points_BWK, weights_WK)
    return scored_mean(np.diagonal(utility_BWW, axis1=-2, axis2=-1), -1)


def regrets(points_BWK: Real[np.ndarray, "*B W K"], weights_WK: Real[np.ndarray, "W K"]) -> Float[np.ndarray, "*B W"]:
    """max_v w.f_v - w.f_w of each weight vector, at least 0: what the method's best point for w has over the one it gave."""
    utility_BWW = _utility(points_BWK, weights_WK)
    best_BW = np.where(np.isnan(utility_BWW), -np.inf, utility_BWW).max(axis=-1)
    return best_BW - np.diagonal(utility_BWW, axis1=-2, axis2=-1)


def mean_regret(points_BWK: Real[np.ndarray, "*B W K"], weights_WK: Real[np.ndarray, "W K"]) -> Float[np.ndarray, "*B"]:
    """The mean of `regrets` over the weights whose own point is scored."""
    return scored_mean(regrets(points_BWK, weights_WK), -1)


def sparsity(points_BWK: Real[np.ndarray, "*B W K"]) -> Float[np.ndarray, "*B"]:
    """Mean squared gap between neighbours, summed over objectives, in squared units; NaN below 2 points."""
    points = np.sort(_complete(points_BWK), axis=-2)  # NaN goes last
    gap = np.nan_to_num(np.diff(points, axis=-2)) ** 2
    return divide(gap.sum(axis=(-2, -1)), _count(points) - 1)


def spacing(points_BWK: Real[np.ndarray, "*B W K"]) -> Float[np.ndarray, "*B"]:
    """Sample sd (ddof 1) of each point's L1 distance to its nearest neighbour: 0 for even steps; NaN below 2 points."""
    points = _complete(points_BWK)
    distance = np.abs(points[..., :, None, :] - points[..., None, :, :]).sum(axis=-1)
    itself = np.eye(points.shape[-2], dtype=bool)
    near = np.where(itself | np.isnan(distance), np.inf, distance).min(axis=-1)
    near = np.where(np.isinf(near), np.nan, near)
    off = np.nan_to_num(near - scored_mean(near, -1)[..., None]) ** 2
    return np.asarray(np.sqrt(divide(off.sum(axis=-1), _count(points) - 1)))


def spread(points_BWK: Real[np.ndarray, "*B W K"]) -> Float[np.ndarray, "*B K"]:
    """max_w f_wk - min_w f_wk of each objective: 0 of one point, NaN where nothing is scored."""
    points = np.asarray(points_BWK, dtype=np.float64)
    unscored = np.isnan(points)
    reach = np.where(unscored, -np.inf, points).max(axis=-2) - np.where(unscored, np.inf, points).min(axis=-2)
    return np.where(unscored.all(axis=-2), np.nan, reach)


def additive_epsilon(points_BWK: Real[np.ndarray, "*B W K"], front_BRK: Real[np.ndarray, "*B R K"]) -> Float[np.ndarray, "*B"]:
    """The smallest shift of the points, in the units of the rewards, after which each of the front's points is weakly dominated.

    0 where they cover the front exactly and negative where they stand beyond it. Points that others of the front dominate
    change nothing. NaN where either side has no scored point.
    """
    import moocore

    points, front = np.asarray(points_BWK, dtype=np.float64), np.asarray(front_BRK, dtype=np.float64)
    found = np.full(points.shape[:-2], np.nan)
    for at in np.ndindex(found.shape):
        ours, theirs = (part[at][~np.isnan(part[at]).any(axis=-1)] for part in (points, front))
        if len(ours) and len(theirs):
            found[at] = moocore.epsilon_additive(ours, ref=theirs, maximise=True)
    return found


def follows(points_BWK: Real[np.ndarray, "*B W K"], weights_WK: Real[np.ndarray, "W K"]) -> Float[np.ndarray, "*B K"]:
    """Spearman's correlation of each objective's weight with its mean reward, ties sharing their mean rank.

    NaN below three scored points, and where the weight or the reward is constant.
    """
    points, weights = _by_objective(points_BWK, weights_WK)
    above_W, above_F = (_below(x).sum(axis=-2) - _below(x).sum(axis=-1) for x in (weights, points))  # 2 rank, less its mean
    product, square_W, square_F = (above_W * above_F).sum(-1), (above_W**2).sum(-1), (above_F**2).sum(-1)
    found = divide(product, np.sqrt(square_W * square_F))
    return np.where((~np.isnan(points)).sum(axis=-1) >= 3, found, np.nan)


def violations(points_BWK: Real[np.ndarray, "*B W K"], weights_WK: Real[np.ndarray, "W K"]) -> Float[np.ndarray, "*B K"]:
    """Share of the pairs of points, the one with more weight on an objective having less of it; NaN where no weights differ."""
    points, weights = _by_objective(points_BWK, weights_WK)
    ordered = _below(weights)
    return divide((ordered & np.swapaxes(_below(points), -1, -2)).sum(axis=(-2, -1)), ordered.sum(axis=(-2, -1)))


def _utility(points_BWK: np.ndarray, weights_WK: np.ndarray) -> np.ndarray:
    """u [*B, W, V] = w.f_v; NaN where an objective that w weighs is unscored at v."""
    points, weights = _per_weight(points_BWK, weights_WK)
    parts = weights[:, None, :] * points[..., None, :, :]
    return np.where(weights[:, None, :] == 0, 0.0, parts).sum(axis=-1)


def _by_objective(points_BWK: np.ndarray, weights_WK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both [*B, K, W], a weight NaN where the point is."""
    points, weights = (np.swapaxes(part, -1, -2) for part in _per_weight(points_BWK, weights_WK))
    return points, np.where(np.isnan(points), np.nan, weights)


def _per_weight(points_BWK: np.ndarray, weights_WK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points, weights = np.asarray(points_BWK, dtype=np.float64), np.asarray(weights_WK, dtype=np.float64)
    if points.shape[-2:] != weights.shape:
        raise UserError(f"a front has a point per weight vector; got points of shape {points.shape} for weights of shape {weights.shape}")
    return points, weights


def _below(value_BW: np.ndarray) -> np.ndarray:
    """[*B, V, W]: whether v is below w; a NaN is below nothing."""
    return value_BW[..., :, None] < value_BW[..., None, :]


def _complete(points_BWK: np.ndarray) -> np.ndarray:
    """The points, all NaN where an objective is."""
    points = np.asarray(points_BWK, dtype=np.float64)
    return np.where(np.isnan(points).any(axis=-1, keepdims=True), np.nan, points)


def _count(complete_BWK: np.ndarray) -> np.ndarray:
    return np.asarray((~np.isnan(complete_BWK[..., 0])).sum(axis=-1))
