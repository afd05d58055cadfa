"""Whether two methods differ on the same prompts: swapped prompts, several metrics, and what is left at equal length.

A paired permutation test between methods: under the hypothesis that, prompt by prompt, either method could have given
the other's rewards, the labels of any prompts may be swapped, all weights of a prompt together.

    p_m = (1 + #{s : |t_m(s)| >= |t_m|}) / (n + 1),    t_m(s) = metric_m(mean_p A(s)) - metric_m(mean_p B(s))

s swaps each prompt with probability 1/2. Of a mean it is the sign-flip test (`front.permutation_pvalue`).
Holm's step-down keeps the chance of one false rejection among all M metrics at alpha:

    adjusted p_(i) = max_{j <= i} min(1, (M - j + 1) p_(j)),    p_(1) <= p_(2) <= ..

The difference at equal length is that of an analysis of covariance with one slope for both methods,

    d = (mean y_a - mean y_b) - slope (mean x_a - mean x_b),    slope = (S_xy,a + S_xy,b) / (S_xx,a + S_xx,b)

y the reward, x = log(1 + words), S the sums of squares and products within a method: the least-squares coefficient of
"is a" in y ~ 1 + x + is_a. It asks what the methods' rewards would differ by if their answers were as long as each
other's; it is linear in x, and no experiment: a method that needs length to be good is charged for it too.

Sources: Fisher 1935 and Phipson & Smyth 2010 (the +1); Holm 1979; analysis of covariance, Fisher 1932, as length control
in the spirit of Dubois et al. 2024 (2404.04475), who use a logistic model of win rates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Real

from equipoise.evaluation.front import divide, drawn_times, exact_patterns
from equipoise.types import UserError

_CHUNK = 1024


def swap_pvalues(
    a_PS: Real[np.ndarray, "P S"],
    b_PS: Real[np.ndarray, "P S"],
    metrics: Callable[[np.ndarray], np.ndarray],
    n: int,
    seed: int,
) -> Float[np.ndarray, " M"]:
    """Two-sided p of each of M metrics of the S column means of two methods; all swaps are enumerated where there are at most n.

    `metrics` maps means [N, S] to [N, M], a NaN where a metric isn't defined; its p is NaN too. A cell that either side left
    unscored is left out of both. Raises `UserError` for fewer than 2 prompts, for other shapes on the two sides and n below 1.
    """
    a, b = np.asarray(a_PS, dtype=np.float64), np.asarray(b_PS, dtype=np.float64)
    if a.shape != b.shape or len(a) < 2:
        raise UserError(f"prompts are swapped between two methods on the same 2 or more of them; got shapes {a.shape} and {b.shape}")
    if n < 1:
        raise UserError(f"a permutation test needs at least 1 permutation, got {n}; 10000 is usual")
    scored = ~np.isnan(a + b)
    count_S = scored.sum(axis=0)
    both_S = divide(np.where(scored, a + b, 0.0).sum(axis=0), count_S)
    apart_PS = np.where(scored, a - b, 0.0)

    def difference(sign_NP: np.ndarray) -> np.ndarray:
        apart_NS = divide(sign_NP @ apart_PS, np.broadcast_to(count_S, (len(sign_NP), len(count_S))))
        return metrics((both_S + apart_NS) / 2) - metrics((both_S - apart_NS) / 2)

    observed_M = np.abs(difference(np.ones((1, len(a))))[0])
    # Differences that are equal in exact arithmetic must tie, or p would depend on the order of the additions.
    observed_M = observed_M - 1e-9 * np.maximum(observed_M, 1e-3)
    every = exact_patterns(len(a), n)
    extreme_M, rng = np.zeros(len(observed_M)), np.random.default_rng(seed)
    for start in range(0, n if every is None else len(every), _CHUNK):
        sign_NP = _signs(rng, min(_CHUNK, n - start), len(a)) if every is None else every[start : start + _CHUNK]
        extreme_M += (np.abs(difference(sign_NP)) >= observed_M).sum(axis=0)
    p_M = (1 + extreme_M) / (n + 1) if every is None else extreme_M / len(every)
    return np.where(np.isnan(observed_M), np.nan, p_M)


def _signs(rng: np.random.Generator, n: int, prompts: int) -> np.ndarray:
    return 1.0 - 2.0 * rng.integers(0, 2, size=(n, prompts))


def holm(p_M: Real[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """p values adjusted for the number of them that were tested, in the order given; a NaN wasn't tested and stays NaN."""
    p = np.asarray(p_M, dtype=np.float64)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # NaN goes last
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def equal_length_difference(
    reward_aPG: Real[np.ndarray, "P G"],
    length_aPG: Real[np.ndarray, "P G"],
    reward_bPH: Real[np.ndarray, "P H"],
    length_bPH: Real[np.ndarray, "P H"],
    indices: Int[np.ndarray, "n_boot P"],
) -> Float[np.ndarray, "n_boot+1 2"]:
    """(d, slope) of the data in row 0 and of resampled prompts in the rest; G and H responses per prompt, NaN unscored.

    d is in units of the reward, the slope per unit of x. Where no method's lengths vary the slope is 0 and d the plain
    difference. NaN where a method has no scored response.
    """
    times_BP = drawn_times(indices)
    n_a, x_a, y_a, xx_a, xy_a = _moments(times_BP, reward_aPG, length_aPG)
    n_b, x_b, y_b, xx_b, xy_b = _moments(times_BP, reward_bPH, length_bPH)
    varies = xx_a + xx_b > 1e-12 * (n_a * x_a**2 + n_b * x_b**2)
    slope = np.where(varies, divide(xy_a + xy_b, np.where(varies, xx_a + xx_b, 1.0)), 0.0)
    return np.stack([(y_a - y_b) - slope * (x_a - x_b), slope], axis=1)


def _moments(times_BP: np.ndarray, reward_PG: np.ndarray, length_PG: np.ndarray) -> tuple[np.ndarray, ...]:
    """(n, mean x, mean y, S_xx, S_xy) of each resample, over scored responses."""
    scored = ~np.isnan(reward_PG)
    # Centred once, so that the sums of squares lose no digits.
    y0, x0 = (float(part[scored].mean()) if scored.any() else 0.0 for part in (reward_PG, length_PG))
    y, x = np.where(scored, reward_PG - y0, 0.0), np.where(scored, length_PG - x0, 0.0)
    sums_PS = np.stack([part.sum(axis=1) for part in (scored, x, y, x * x, x * y)], axis=1)
    n, sum_x, sum_y, sum_xx, sum_xy = (times_BP @ sums_PS).T
    mean_x, mean_y = divide(sum_x, n), divide(sum_y, n)
    return n, x0 + mean_x, y0 + mean_y, sum_xx - n * mean_x**2, sum_xy - n * mean_x * mean_y
