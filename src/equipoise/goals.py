"""From weights to the scores that a policy is asked for: maps of a preference to a target, and the goals of an online round.

A policy that reads scores in its prompt (rewards-in-context) has to be told numbers. With N rows z of scores that were seen, and
weights w of K objectives:

    level    linear   l_k = w_k
             lp:P     l   = argmax sum_k w_k l_k  over ||l||_P <= 1, l >= 0:   l_k = w_k^(q-1) / ||w||_q^(q-1),   1/P + 1/q = 1
             linf     l_k = min(K w_k, 1), and 1 for the largest weight
    target   quantiles   t_k = the quantile of z_k at l_k          extremes   t_k = min z_k + l_k (max z_k - min z_k)
             released    the same between the extremes of 50,000 standard normal numbers, whatever was seen
    joint    t = mean of the share Q of rows with the largest sum_k w_k z_k

R_Q = { sum_n p_n z_n : 0 <= p_n <= 1 / (Q N), sum_n p_n = 1 } holds the means of every Q-th part of what was seen: what can be reached by
choosing one response in 1/Q. `joint` is the point of R_Q that is best for w, so no objective is given up for nothing; a target of
another map is drawn towards the mean of all rows until it lies in R_Q (share 0: it stays where it is).

Papers: RiC, arXiv 2402.10207, section 3.3, and its released code, whose evaluation uses lp:2 between released extremes and whose
targets of four standard deviations few responses reach; R_Q is the zonoid-trimmed region of Koshevoy & Mosler 1997. Departures: any
number of objectives; quantiles, joint and the projection are ours.
Reads and writes nothing. The weights enter: here, as the scores of a prompt.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Real

from equipoise.types import UserError

Span = Literal["quantiles", "extremes", "released"]
_SEED = 8888  # of the released code's evaluation


@dataclass(frozen=True, kw_only=True)
class Targets:
    """How weights become target scores."""

    rule: str = "joint"
    """joint, linear, linf or lp:P with P of at least 1."""
    span: Span = "quantiles"
    """Between which scores a level leads: quantiles or extremes of what was seen, or the released code's; joint needs none."""
    share: float = 0.1
    """A target is the mean of such a share of the rows that were seen; 0 for targets that may be out of reach."""

    def __post_init__(self) -> None:
        if self.rule != "joint":
            levels(np.ones(1), self.rule)
        if self.span not in get_args(Span):
            raise UserError(f"no span {self.span!r}: choose {', '.join(get_args(Span))}")
        if not 0 <= self.share <= 1 or (self.rule == "joint" and self.share == 0):
            raise UserError(f"share is a part of the rows, at most 1 and with the rule joint above 0, got {self.share:g}")


def levels(weights_K: Real[np.ndarray, " K"], rule: str) -> Float[np.ndarray, " K"]:
    """How much of each objective's span is asked for, 0 to 1. Raises `UserError` for an unknown rule, or P below 1."""
    weights = np.asarray(weights_K, dtype=np.float64)
    kind, _, power = rule.partition(":")
    if rule == "linear":
        return weights
    if rule == "linf":
        return np.where(weights == weights.max(), 1.0, np.minimum(len(weights) * weights, 1.0))
    try:
        p = float(power) if kind == "lp" else math.nan
    except ValueError:
        p = math.nan
    if not p >= 1:
        raise UserError(f"no rule {rule!r} from weights to targets: choose joint, linear, linf or lp:P with P of at least 1")
    relative = weights / weights.max()  # q is large where P is near 1
    if p == 1:
        return (relative == 1) / (relative == 1).sum()
    power_K = np.where(weights > 0, relative ** (1 / (p - 1)), 0.0)  # q - 1
    return power_K if math.isinf(p) else power_K / (power_K**p).sum() ** (1 / p)


@functools.cache
def released_extremes(objectives: int, draws: int = 50_000) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """(smallest, largest) of so many standard normal numbers for each objective, drawn as the released code does."""
    drawn = np.random.RandomState(_SEED).normal(0, 1, (objectives, draws))  # the code's own generator, so that the numbers are its
    return drawn.min(axis=1), drawn.max(axis=1)


def between(level_K: Real[np.ndarray, " K"], low_K: Real[np.ndarray, " K"], high_K: Real[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """low + level (high - low)."""
    return low_K + level_K * (high_K - low_K)


def best_share(rows_NK: Real[np.ndarray, "N K"], weights_K: Real[np.ndarray, " K"], share: float) -> Float[np.ndarray, " K"]:
    """The mean of the share of rows with the largest sum_k w_k z_k, the last of them in part; of equal ones those of the larger sum."""
    order = np.lexsort((-rows_NK.sum(axis=1), -(rows_NK @ np.asarray(weights_K, dtype=np.float64))))
    mass = np.clip(share * len(rows_NK) - np.arange(len(rows_NK)), 0.0, 1.0)
    return mass @ rows_NK[order] / mass.sum()


def within_reach(rows_NK: Real[np.ndarray, "N K"], target_K: Real[np.ndarray, " K"], share: float) -> Float[np.ndarray, " K"]:
    """The point of R_share that is nearest to the target on the line from the mean of all rows.

    max s <= 1  subject to  sum_n p_n z_n = mean + s (target - mean),  0 <= p_n <= 1 / (share N),  sum_n p_n = 1.
    """
    from scipy.optimize import linprog

    count, mean_K = len(rows_NK), rows_NK.mean(axis=0)
    away_K = np.asarray(target_K, dtype=np.float64) - mean_K
    equal = np.block([[rows_NK.T, -away_K[:, None]], [np.ones((1, count)), np.zeros((1, 1))]])
    bounds = [*[(0, 1 / (share * count))] * count, (0, 1)]
    found = linprog(np.append(np.zeros(count), -1.0), A_eq=equal, b_eq=np.append(mean_K, 1.0), bounds=bounds, method="highs")
    assert found.status == 0, f"all rows alike make the mean, so a solution exists: {found.message}"
    return mean_K + found.x[-1] * away_K


def target(weights_K: Real[np.ndarray, " K"], rows_NK: Real[np.ndarray, "N K"], targets: Targets) -> Float[np.ndarray, " K"]:
    """The scores to ask for at these weights, in the units of the rows. Raises `UserError` where no row was seen."""
    weights, rows = np.asarray(weights_K, dtype=np.float64), np.asarray(rows_NK, dtype=np.float64)
    if not len(rows):
        raise UserError("no scores were seen, so there is nothing to take targets from: train on scored responses first")
    if targets.rule == "joint":
        return best_share(rows, weights, targets.share)
    level_K = levels(weights, targets.rule)
    if targets.span == "quantiles":
        asked = np.array([np.quantile(column, level) for column, level in zip(rows.T, level_K, strict=True)])
    else:
        ends = released_extremes(len(weights)) if targets.span == "released" else (rows.min(axis=0), rows.max(axis=0))
        asked = between(level_K, *ends)
    return within_reach(rows, asked, targets.share) if targets.share else asked


def released_goal(uniform_K: Real[np.ndarray, " K"], low: float, high: float) -> Float[np.ndarray, " K"]:
    """The released code's goal of an online sample: high on all objectives but one, that of the smallest of K uniform numbers.

    That one is low + u (high - low). So every goal lies on an edge of the box, and half of them ask for less than two
    standard deviations below the mean where the box is that of `released_extremes`.
    """
    least = int(np.argmin(uniform_K))
    return np.where(np.arange(len(uniform_K)) == least, low + uniform_K * (high - low), high)


def goal(
    kind: Literal["released", "simplex"], generator: np.random.Generator, rows_NK: Real[np.ndarray, "N K"], targets: Targets
) -> Float[np.ndarray, " K"]:
    """A goal for one sample of an online round: as released, or the target at weights drawn evenly from the simplex."""
    objectives = rows_NK.shape[1]
    if kind == "simplex":
        return target(generator.dirichlet(np.ones(objectives)), rows_NK, targets)
    low_K, high_K = released_extremes(1, 100_000)
    return released_goal(generator.random((objectives,)), float(low_K[0].round(1)), float(high_K[0].round(1)))
