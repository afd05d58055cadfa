"""A sampler over weights: rollouts and scores per point, kept in folders that survive a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise.rewards.scoring import read_rewards, score_shards
from equipoise.rollouts import collect, make_requests, read_rollouts, sampling_peak, sampling_seconds
from equipoise.types import Prompt, Reward, Rollout, Sampler


@dataclass(frozen=True)
class Scored:
    """Rollouts of one point with their scores: objectives first, then judges."""

    method: str
    weights: tuple[float, ...] | None
    rollouts: list[Rollout]
    reward_NK: np.ndarray
    names: tuple[str, ...]
    seconds: float
    source: str
    reference_counts: bool = True
    """Whether the reference's forwards are part of the method, or only measure its KL and name its candidates."""
    peak_bytes: int | None = None
    """Of the process that sampled it, with all that it had loaded; None where nobody measured it."""

    def by_prompt(self, prompt_ids: Sequence[str]) -> np.ndarray:
        """Row indices [P, S] of each prompt's samples, in the order they were asked for."""
        rows: dict[str, list[int]] = {}
        for index, rollout in enumerate(self.rollouts):
            rows.setdefault(rollout.prompt_id, []).append(index)
        return np.array([rows[p] for p in prompt_ids])


def point_folder(root: Path, method: str, weights: tuple[float, ...] | None) -> Path:
    """Where one point's files lie."""
    return root / method / ("all" if weights is None else "w" + "_".join(f"{w:g}" for w in weights))


def sweep_point(
    root: Path,
    method: str,
    sampler: Sampler,
    weights: tuple[float, ...] | None,
    prompts: Sequence[Prompt],
    samples: int,
    seed: int,
    rewards: Sequence[Reward],
    shard_size: int,
    sampled: Callable[[int], None] | None = None,
    scored: Callable[[int], None] | None = None,
) -> Scored:
    """Sample and score one point, doing only what is missing."""
    folder = point_folder(root, method, weights)
    requests = make_requests(prompts, samples, seed, weights)
    rollouts = collect(sampler, requests, folder / "rollouts", shard_size, sampled)
    by_id = {p.id: p for p in prompts}
    score_shards(rewards, by_id, rollouts, folder / "rewards", len(rollouts), scored)
    return read_point(root, method, weights)


def read_point(root: Path, method: str, weights: tuple[float, ...] | None) -> Scored:
    """A point that was sampled and scored."""
    folder = point_folder(root, method, weights)
    rollouts = read_rollouts(folder / "rollouts")
    rewards = read_rewards(folder / "rewards", rollouts)
    seconds, peak = sampling_seconds(folder / "rollouts"), sampling_peak(folder / "rollouts")
    source = str(folder.relative_to(root))
    return Scored(method, weights, rollouts, rewards.reward_NK, rewards.objectives, seconds, source, peak_bytes=peak)


def mean_cost(point: Scored) -> float:
    """Tokens that backbones read per response, prompt included; the reference's only where the method needs them."""
    return float(np.mean([r.base_forwards * point.reference_counts + r.guide_forwards for r in point.rollouts]))


def seconds_per_response(point: Scored) -> float | None:
    """Of sampling; None where nobody measured it."""
    return point.seconds / len(point.rollouts) if point.seconds > 0 else None


def tokens_per_second(point: Scored) -> float | None:
    """Response tokens per second of sampling, prompts included in the time."""
    return sum(len(r.tokens) for r in point.rollouts) / point.seconds if point.seconds > 0 else None
