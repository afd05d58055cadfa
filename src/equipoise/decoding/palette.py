"""Serve a palette: n candidates of any sampler, of which one is drawn by the palette's multipliers.

    j ~ softmax(v . R_j),   j = 1..n candidates of one prompt,   v: multipliers, nats per unit of the rewards R

A draw, never the best: argmax v . R is the same for every length of v, so it can't meet a target. v of the grouped dual
at this n (palette/dual.py) delivers the targets on average over prompts. Over a steered sampler v is that of the
residual dual: solved on a bank of the steered sampler, with levels that refer to the base model.

Paper: MAP (arXiv 2410.19198), section 3. Departures: v of the grouped dual; the draw is resampling.py's.
Reads: multipliers. Writes: nothing. The weights enter: the choice among samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int, Real

from equipoise.decoding.choosing import candidate_requests, served
from equipoise.decoding.resampling import resample, resampling_kl
from equipoise.objectives import linear
from equipoise.palette.confidence import Monitor
from equipoise.rewards.scoring import score
from equipoise.types import Request, Reward, Rollout, Sampler


def tilt(reward_PNK: Real[np.ndarray, "P N K"], multiplier_K: Real[np.ndarray, " K"]) -> Float[np.ndarray, "P N"]:
    """v . R in nats; NaN where an objective that counts is unscored."""
    return linear(reward_PNK, np.asarray(multiplier_K).tolist())


def choose(reward_PNK: Real[np.ndarray, "P N K"], multiplier_K: Real[np.ndarray, " K"], seeds_P: Sequence[int]) -> Int[np.ndarray, " P"]:
    """Which candidate of each prompt is served: a draw from softmax(v . R) that the seed alone decides."""
    return resample(tilt(reward_PNK, multiplier_K), 1.0, seeds_P)


@dataclass
class PaletteSampler:
    """A sampler over a sampler: n candidates each, scored, one of them drawn."""

    inner: Sampler
    rewards: Sequence[Reward]
    """One for each multiplier, in their order."""
    multiplier_K: np.ndarray
    n: int
    monitor: Monitor | None = None
    """Closes the loop: it re-measures realised levels and corrects the multipliers between calls."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """The inner sampler's: the palette's own trade-off is in the multipliers."""
        return self.inner.objectives

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request. Its forwards are those of all n candidates; its `kl` adds the choice's, at most log n."""
        asked = requests if self.inner.objectives else [replace(r, weights=None) for r in requests]  # they only say where it stands
        candidates = self.inner(candidate_requests(asked, self.n))
        prompts = {r.prompt.id: r.prompt for r in requests}
        reward_PNK = score(self.rewards, prompts, candidates).reshape(len(requests), self.n, len(self.rewards))
        v = self.multiplier_K if self.monitor is None else self.monitor.multiplier_K
        chosen = choose(reward_PNK, v, [r.seed for r in requests])
        if self.monitor is not None:
            for reward_NK, j in zip(reward_PNK, chosen, strict=True):
                if self.monitor.observe(reward_NK, int(j)):
                    break  # the others were drawn at the multipliers before, of which the new stretch is to say nothing
        score_PN = tilt(reward_PNK, v)
        return [
            served(
                r,
                candidates[i * self.n : (i + 1) * self.n],
                int(j),
                resampling_kl(score_PN[i : i + 1], 1.0),
                self.n * len(self.rewards),
            )
            for i, (r, j) in enumerate(zip(requests, chosen, strict=True))
        ]
