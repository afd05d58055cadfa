"""A round of on-policy training as its rewards have it, and what it says of the policy that its responses are from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from equipoise.types import Request, Rollout

Record = dict[str, Any]
"""Statistics of a round, as round.json and a line of log.jsonl have them."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """The scored responses of a round: P prompts, G each."""

    number: int
    requests: list[list[Request]]
    rollouts: list[list[Rollout]]
    weights_PK: np.ndarray
    reward_PGK: np.ndarray
    """In the scorers' own units, NaN where unscored."""
    z_PGK: np.ndarray
    """In standard deviations of the reference's."""
    scalar_PG: np.ndarray
    """Scalarised; NaN where an objective that has weight is unscored."""


def covariance_within(z_PGK: Float[np.ndarray, "P G K"]) -> Float[np.ndarray, "K K"]:
    """Mean over prompts of the covariance (ddof 1) of a prompt's responses, of those that are scored on all objectives.

    Prompts with fewer than two of them are left out; NaN where that leaves none.
    """
    there_PG = np.isfinite(z_PGK).all(axis=2)
    each = [np.cov(z_GK[there_G], rowvar=False, ddof=1) for z_GK, there_G in zip(z_PGK, there_PG, strict=True) if there_G.sum() > 1]
    size = z_PGK.shape[2]
    return np.mean(each, axis=0).reshape(size, size) if each else np.full((size, size), math.nan)


def standard_error(z_PGK: Float[np.ndarray, "P G K"]) -> Float[np.ndarray, " K"]:
    """Standard error of each objective's mean, from the spread of the prompts' own means (ddof 1); NaN from fewer than two prompts."""
    found = []
    for z_PG in np.moveaxis(z_PGK, 2, 0):
        means = [z_G[np.isfinite(z_G)].mean() for z_G in z_PG if np.isfinite(z_G).any()]
        found.append(np.std(means, ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan)
    return np.array(found)


def statistics(scored: Round, objectives: Sequence[str]) -> Record:
    """What a round's responses say of the policy they are from."""
    rollouts = [rollout for group in scored.rollouts for rollout in group]
    kl_N, length_N = np.array([r.kl for r in rollouts]), np.array([len(r.tokens) for r in rollouts])
    unscored_K = np.isnan(scored.reward_PGK).sum(axis=(0, 1))
    return {
        "round": scored.number,
        "reward": {name: float(np.nanmean(scored.z_PGK[..., k])) for k, name in enumerate(objectives)},
        "stderr": dict(zip(objectives, standard_error(scored.z_PGK).tolist(), strict=True)),
        "covariance": covariance_within(scored.z_PGK).tolist(),
        "raw": {name: float(np.nanmean(scored.reward_PGK[..., k])) for k, name in enumerate(objectives)},
        "unscored": {name: int(unscored_K[k]) for k, name in enumerate(objectives)},
        "scalar": float(np.nanmean(scored.scalar_PG)),
        "kl_exact": float(kl_N.mean()),
        "kl_exact_p95": float(np.quantile(kl_N, 0.95)),
        "entropy_per_token": float(-sum(sum(r.logprobs) for r in rollouts) / length_N.sum()),
        "length": float(length_N.mean()),
        "truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }


def summary(history: Sequence[Mapping[str, float]]) -> Record:
    """What a round's steps logged: the largest norm of a gradient, the last learning rate, means of the rest."""
    names = [name for name in history[0] if name != "step"]
    found = {name: float(np.mean([entry[name] for entry in history])) for name in names}
    return found | {"grad_norm": max(entry["grad_norm"] for entry in history), "learning_rate": history[-1]["learning_rate"]}
