"""Choose among samples: best-of-n and Monte-Carlo resampling, over any sampler (`choosing.py` is that sampler).

Per prompt, n candidates y_1..y_n of a sampler with scores s_j = sum_k w_k z_jk (z: standardised rewards, w: weights):

    best-of-n   j = argmax_j s_j                        KL <= log n - (n - 1)/n nats
    resampling  j ~ softmax(s_j / beta)                 pi_ref exp(s/beta)/Z as n grows; no more than log n nats

Paper: best-of-n, Stiennon et al. 2020; its KL, Beirami et al. 2024 (an upper bound, exact without ties); resampling,
MAP (arXiv 2410.19198), section 3. Departures: the draw is a Gumbel-argmax with the request's own seed, so it does not
depend on batch or order; an unscored candidate is never chosen unless none is scored.
Reads: scored candidates. Writes: nothing. The weights enter: the choice among samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from equipoise.models.generation import row_uniforms
from equipoise.types import UserError


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n, nats: the KL of best-of-n from its sampler (exact without ties, else an upper bound)."""
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n(score_PN: Float[np.ndarray, "P N"]) -> Int[np.ndarray, " P"]:
    """Index of each row's best scored candidate; 0 where none is scored."""
    return np.where(np.isfinite(score_PN), score_PN, -np.inf).argmax(axis=1)


def resample(score_PN: Float[np.ndarray, "P N"], beta: float, seeds_P: Sequence[int]) -> Int[np.ndarray, " P"]:
    """A draw from softmax(score / beta) per row, by Gumbel-argmax with the row's seed. Raises `UserError` for beta <= 0."""
    if not beta > 0:
        raise UserError(f"beta must be positive, got {beta:g}")
    uniform_PN = np.stack([row_uniforms(seed, score_PN.shape[1]) for seed in seeds_P])
    gumbel_PN = -np.log(-np.log(np.clip(uniform_PN, 1e-300, 1 - 1e-16)))
    return np.where(np.isfinite(score_PN), score_PN / beta + gumbel_PN, -np.inf).argmax(axis=1)


def resampling_probabilities(score_PN: Float[np.ndarray, "P N"], beta: float) -> Float[np.ndarray, "P N"]:
    """softmax(score / beta) over each row's scored candidates; uniform where none is scored."""
    scaled = np.where(np.isfinite(score_PN), score_PN / beta, -np.inf)
    top = scaled.max(axis=1, keepdims=True)
    weight = np.where(np.isfinite(top), np.exp(scaled - np.where(np.isfinite(top), top, 0.0)), 1.0)
    return weight / weight.sum(axis=1, keepdims=True)


def resampling_kl(score_PN: Float[np.ndarray, "P N"], beta: float) -> float:
    """mean_P sum_j p_j log(n p_j), nats, at most log n: the KL of the candidates and which is drawn, so no less than the response's.

    No choice among n moves the response's law by more than the best of n does, so a mean over prompts above `best_of_n_kl` may be
    put there.
    """
    p = resampling_probabilities(score_PN, beta)
    return float(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) * p.shape[1]), 0.0).sum(axis=1).mean())
