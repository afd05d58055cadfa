"""Samplers over a sampler: n candidates for each request, of which the best, or a draw from softmax(score / beta), is the response.

The choice and its price are `resampling.py`'s; the score is sum_k w_k z_k of the request's own weights. The candidates' seeds and
the draw's come from the request's, so that the same request gets the same response, in whatever batch.

Reads: rewards. Writes: nothing. The weights enter: the choice among samples, and the inner sampler where it is steered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from equipoise.decoding.resampling import best_of_n, best_of_n_kl, resample, resampling_kl
from equipoise.objectives import Normaliser
from equipoise.rewards.scoring import score
from equipoise.rollouts import request_seed
from equipoise.types import Prompt, Request, Response, Reward, Rollout, Sampler, UserError


def candidate_requests(requests: Sequence[Request], n: int) -> list[Request]:
    """n requests for each, with seeds of their own."""
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}")
    return [replace(r, id=f"{r.id}#{j}", seed=request_seed(r.seed, str(j))) for r in requests for j in range(n)]


def served(request: Request, candidates: Sequence[Rollout], chosen: int, kl: float, reward_calls: int) -> Rollout:
    """The chosen candidate as the response to the request: its cost is that of all of them, which read their prompt once.

    With q the choice's law over candidates from pi, KL(q || pi_ref) = KL(q || pi) + E_q[log pi/pi_ref]: `kl` is the first of the two,
    and the mean of the candidates' KL, corrected by how far the chosen one's log-ratio is from their mean (mean under q: the second).
    """
    drift = float(np.mean([c.kl - c.log_ratio for c in candidates])) + candidates[chosen].log_ratio
    return replace(
        candidates[chosen],
        id=request.id,
        seed=request.seed,
        weights=request.weights,
        kl=drift + kl,
        kl_steps=(),
        base_forwards=sum(c.base_forwards for c in candidates) - sum(c.prompt_tokens for c in candidates[1:]),
        guide_forwards=sum(c.guide_forwards for c in candidates),
        reward_calls=reward_calls + sum(c.reward_calls for c in candidates),
        parent_id=candidates[chosen].id,
    )


@dataclass(frozen=True, kw_only=True)
class WeightedRewards:
    """sum_k w_k z_k of single responses, each with weights of its own."""

    rewards: Sequence[Reward]
    """One per objective, in the order of the weights."""
    normaliser: Normaliser | None = None
    """Their means and standard deviations; without it the rewards are taken as they are."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise UserError("choosing by rewards needs at least one")
        if self.normaliser is not None and self.normaliser.objectives != self.objectives:
            raise UserError(
                f"the rewards' scale is for {', '.join(self.normaliser.objectives)}, the rewards for {', '.join(self.objectives)}"
            )

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in the order of the weights."""
        return tuple(reward.name for reward in self.rewards)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response], weights_N: Sequence[Sequence[float]]) -> np.ndarray:
        """The N scores; NaN where an objective that has weight is unscored. A reward isn't asked where its weight is 0."""
        total_N, by_id = np.zeros(len(responses)), {prompt.id: prompt for prompt in prompts}
        for k, reward in enumerate(self.rewards):
            asked = [i for i, weights in enumerate(weights_N) if weights[k] != 0]
            if not asked:
                continue
            value_n = score([reward], by_id, [responses[i] for i in asked])[:, 0]
            if self.normaliser is not None:
                value_n = (value_n - self.normaliser.mean_K[k]) / self.normaliser.sd_K[k]
            total_N[asked] += np.array([weights_N[i][k] for i in asked]) * value_n
        return total_N

    def calls(self, weights: Sequence[float]) -> int:
        """How many rewards score a response at these weights."""
        return sum(weight != 0 for weight in weights)

    def inner_requests(self, requests: Sequence[Request], objectives: Sequence[str]) -> list[Request]:
        """The requests for what is chosen from: without weights where nothing there reads them.

        Raises `UserError` where weights are missing or too many, or what steers there has other objectives.
        """
        if objectives and tuple(objectives) != self.objectives:
            raise UserError(
                f"the proposals are steered by {', '.join(objectives)}, the choice by {', '.join(self.objectives)}: name the same"
            )
        for request in requests:
            if request.weights is None or len(request.weights) != len(self.rewards):
                raise UserError(
                    f"request {request.id!r} has weights {request.weights}; a choice by {', '.join(self.objectives)} needs one each"
                )
        return list(requests) if objectives else [replace(request, weights=None) for request in requests]


@dataclass(frozen=True, kw_only=True)
class ChoosingSampler:
    """A sampler over a sampler: n candidates each, of which the best is taken, or one drawn from softmax(score / beta).

    The candidates' seeds and the draw's come from the request's, so that the same request gets the same response.
    """

    inner: Sampler
    rewards: WeightedRewards
    n: int
    beta: float | None = None
    """Of the draw, in units of the score; None takes the best."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"n must be at least 1, got {self.n}")
        if self.beta is not None and not self.beta > 0:
            raise UserError(f"beta must be positive, got {self.beta:g}")

    @property
    def objectives(self) -> tuple[str, ...]:
        """Of the rewards."""
        return self.rewards.objectives

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, as `served` prices it: the choice's KL is the bound of best-of-n, or the draw's."""
        asked = self.rewards.inner_requests(requests, self.inner.objectives)
        candidates = self.inner(candidate_requests(asked, self.n))
        weights_N = [request.weights or () for request in requests for _ in range(self.n)]
        score_PN = self.rewards([r.prompt for r in requests], candidates, weights_N).reshape(len(requests), self.n)
        beta = self.beta
        chosen_P = best_of_n(score_PN) if beta is None else resample(score_PN, beta, [r.seed for r in requests])
        return [
            served(
                request,
                candidates[i * self.n : (i + 1) * self.n],
                int(chosen_P[i]),
                best_of_n_kl(self.n) if beta is None else resampling_kl(score_PN[i : i + 1], beta),
                self.n * self.rewards.calls(request.weights or ()),
            )
            for i, request in enumerate(requests)
        ]
