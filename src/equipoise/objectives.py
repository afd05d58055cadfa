"""Objectives, points of the simplex and the ways to make one number of a reward vector.

Weights are non-negative and sum to 1. Rewards are standardised on the reference's rollouts before they are weighted,
so that equal weights mean equal influence, whatever units the scorers use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real

from equipoise.types import UserError


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Standardises rewards: z = (r - mean) / sd, per objective, over the reference's scored rollouts."""

    objectives: tuple[str, ...]
    mean_K: tuple[float, ...]
    sd_K: tuple[float, ...]

    @classmethod
    def fit(cls, objectives: Sequence[str], reward_NK: Real[np.ndarray, "N K"]) -> Normaliser:
        """Mean and sd (ddof 1) of each column, NaN left out. Raises `UserError` for a constant or unscored objective."""
        means, sds = [], []
        for name, column in zip(objectives, np.asarray(reward_NK, dtype=np.float64).T, strict=True):
            scored = column[np.isfinite(column)]
            if len(scored) < 2:
                raise UserError(f"objective {name!r} has {len(scored)} scored responses of {len(column)}; it needs at least 2")
            sd = float(scored.std(ddof=1))
            if sd <= 1e-12 * max(1.0, float(np.abs(scored).max())):
                raise UserError(f"objective {name!r} is constant ({scored[0]:g}) on the reference's rollouts: nothing to trade off")
            means.append(float(scored.mean()))
            sds.append(sd)
        return cls(objectives=tuple(objectives), mean_K=tuple(means), sd_K=tuple(sds))

    def __call__(self, reward_NK: Real[np.ndarray, "*N K"]) -> Float[np.ndarray, "*N K"]:
        """z_NK = (r - mean) / sd; NaN stays NaN."""
        return scaled(reward_NK, self.mean_K, self.sd_K)


def join_scales(scales: Sequence[Normaliser]) -> Normaliser:
    """The objectives of several scales, one after the other."""
    return Normaliser(
        objectives=tuple(name for scale in scales for name in scale.objectives),
        mean_K=tuple(mean for scale in scales for mean in scale.mean_K),
        sd_K=tuple(sd for scale in scales for sd in scale.sd_K),
    )


def scaled(reward_NK: Real[np.ndarray, "*N K"], offset_K: Sequence[float], scale_K: Sequence[float]) -> Float[np.ndarray, "*N K"]:
    """(r - offset) / scale, per objective; NaN stays NaN."""
    return (np.asarray(reward_NK, dtype=np.float64) - np.array(offset_K)) / np.array(scale_K)


def unscaled(value_NK: Real[np.ndarray, "*N K"], offset_K: Sequence[float], scale_K: Sequence[float]) -> Float[np.ndarray, "*N K"]:
    """The inverse of `scaled`: offset + scale value, in the rewards' own units."""
    return np.asarray(value_NK, dtype=np.float64) * np.array(scale_K) + np.array(offset_K)


def sign_labels(
    first_PK: Float[np.ndarray, "P K"], second_PK: Float[np.ndarray, "P K"], threshold_K: Float[np.ndarray, " K"]
) -> Float[np.ndarray, "P K"]:
    """Which of two responses is better by its reward: 1 the first, -1 the second, 0 a tie, NaN where either is unscored.

    label_k = sign(r_k(first) - r_k(second)), or 0 where |r_k(first) - r_k(second)| < threshold_k.
    """
    difference_PK = first_PK - second_PK
    return np.where(np.abs(difference_PK) < threshold_K, 0.0, np.sign(difference_PK))


def tie_thresholds(objectives: Sequence[str], reward_NK: Real[np.ndarray, "N K"], margin: float) -> Float[np.ndarray, " K"]:
    """threshold_k = margin sd_k, sd over the scored responses (ddof 1), so that one margin serves objectives in any units.

    Raises `UserError` for a margin below 0, and for an objective that is constant or unscored.
    """
    if not 0 <= margin < math.inf:
        raise UserError(f"the margin is in standard deviations and must be at least 0, got {margin:g}")
    return margin * np.array(Normaliser.fit(objectives, reward_NK).sd_K)


Weights = Mapping[str, float] | Sequence[float] | Real[np.ndarray, " K"] | str


def parse_weights(weights: Weights, objectives: Sequence[str]) -> tuple[float, ...]:
    """A point of the simplex in the order of `objectives`, read as `named_weights` does.

    Raises `UserError` for an unknown objective, a negative weight or a sum that isn't 1 (to 1e-6).
    """
    values = named_weights(weights, objectives)
    for name, value in zip(objectives, values, strict=True):
        if value < 0:
            raise UserError(f"the weight of {name!r} is {value:g}; weights are at least 0 and sum to 1")
    if abs(sum(values) - 1) > 1e-6:
        raise UserError(
            f"the weights {', '.join(f'{n}={v:g}' for n, v in zip(objectives, values, strict=True))} sum to {sum(values):g}, not 1"
        )
    return values


def named_weights(weights: Weights, objectives: Sequence[str]) -> tuple[float, ...]:
    """Finite numbers in the order of `objectives`, on the simplex or not.

    Accepts a mapping (missing objectives weigh 0), a sequence, or a string: "helpful=0.7,harmless=0.3" or "0.7,0.3";
    an empty slot of the latter ("0.2,,0.8") weighs 0. Raises `UserError` for an unknown objective, NaN or infinity.
    """
    if isinstance(weights, str):
        weights = _parse_text(weights)
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in objectives:
                raise UserError(f"unknown objective {name!r} in the weights; known: {', '.join(objectives)}")
        values = tuple(float(weights.get(name, 0.0)) for name in objectives)
    else:
        values = tuple(float(w) for w in weights)
        if len(values) != len(objectives):
            raise UserError(f"{len(values)} weights {values} for {len(objectives)} objectives ({', '.join(objectives)})")
    for name, value in zip(objectives, values, strict=True):
        if not math.isfinite(value):
            raise UserError(f"the weight of {name!r} is {value:g}; weights are finite numbers")
    return values


def _parse_text(text: str) -> Mapping[str, float] | list[float]:
    parts = [p.strip() for p in text.split(",")]
    try:
        if not any("=" in p for p in parts):
            return [float(p) if p else 0.0 for p in parts]
        named = [(k.strip(), float(v)) for k, v in (p.split("=", 1) for p in parts if p)]
    except ValueError:
        raise UserError(f"can't read the weights {text!r}; write helpful=0.7,harmless=0.3 or 0.7,0.3") from None
    if len(dict(named)) < len(named):
        raise UserError(f"an objective is named twice in the weights {text!r}")
    return dict(named)


def simplex_grid(objectives: int, steps: int) -> list[tuple[float, ...]]:
    """All weight vectors whose entries are multiples of 1/steps: C(steps + K - 1, K - 1) points, first objective falling.

    >>> simplex_grid(2, 2)
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    """
    if objectives < 1 or steps < 1:
        raise UserError(f"a weight grid needs at least 1 objective and 1 step, got {objectives} and {steps}")
    points = []
    for cuts in itertools.combinations_with_replacement(range(steps + 1), objectives - 1):
        edges = [0, *cuts, steps]
        points.append(tuple((b - a) / steps for a, b in itertools.pairwise(edges)))
    return sorted(points, reverse=True)


def on_face(weights: Sequence[float] | None, objectives: Sequence[int]) -> bool:
    """Whether all weight lies on these objectives; so it does where nothing is weighed."""
    return not weights or sum(weights[k] for k in objectives) > 1 - 1e-9


def random_weights(seed: Sequence[int], objectives: int, concentration: float = 1.0, grid: int = 0) -> tuple[float, ...]:
    """A point of the simplex, a function of the seed alone: from Dirichlet(p, .., p), p = `concentration`, or of the grid of 1/grid."""
    rng = np.random.default_rng(list(seed))
    if grid:
        points = simplex_grid(objectives, grid)
        return points[rng.integers(len(points))]
    return tuple(rng.dirichlet([concentration] * objectives).tolist())


def linear(reward_NK: Real[np.ndarray, "*N K"], weights_K: Sequence[float]) -> Float[np.ndarray, "*N"]:
    """sum_k w_k r_k; an objective of weight 0 may be unscored."""
    weights = np.asarray(weights_K, dtype=np.float64)
    used = weights != 0
    return np.asarray(reward_NK, dtype=np.float64)[..., used] @ weights[used]


def chebyshev(reward_NK: Real[np.ndarray, "N K"], weights_K: Sequence[float], ideal_K: Sequence[float]) -> Float[np.ndarray, " N"]:
    """-max_k w_k (ideal_k - r_k): the worst weighted shortfall, which also reaches concave parts of a front."""
    weights = np.asarray(weights_K, dtype=np.float64)
    used = weights > 0
    gap = np.asarray(ideal_K, dtype=np.float64)[used] - np.asarray(reward_NK, dtype=np.float64)[:, used]
    return -np.max(weights[used] * gap, axis=1)


def weight_label(objectives: Sequence[str], weights: Sequence[float] | None) -> str:
    """ "helpful=0.75 harmless=0.25", or "reference" where there are no weights."""
    if weights is None:
        return "reference"
    return " ".join(f"{name}={value:g}" for name, value in zip(objectives, weights, strict=True))
