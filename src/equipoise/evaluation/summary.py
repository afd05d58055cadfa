"""From scored points to the table and the comparisons of a report.

Everything is averaged per prompt first; intervals resample prompts. Rewards are in standard deviations of the reference's
rollouts that the values were trained on (0 is their mean); a gain is the paired difference to the reference on the same
prompts. Best-of-n and resampling choose among the reference's own samples of each prompt, or among a guided point's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from equipoise.decoding.resampling import best_of_n, best_of_n_kl, resample, resampling_kl
from equipoise.evaluation.front import (
    bootstrap_indices,
    mean_interval,
    paired_interval,
    permutation_pvalue,
    scored_mean,
)
from equipoise.evaluation.sweep import Scored, mean_cost, seconds_per_response, tokens_per_second
from equipoise.objectives import Normaliser, linear, weight_label
from equipoise.rewards.text import is_refusal, is_repetitive, leaks_format, word_count
from equipoise.types import FrontPoint, UserError


@dataclass(frozen=True)
class Point:
    """One method at one weight vector: z per response and prompt (objectives, then judges), and its price."""

    method: str
    weights: tuple[float, ...] | None
    n: int
    z_PSK: np.ndarray
    length_PS: np.ndarray
    """log(1 + words)."""
    kl_P: np.ndarray
    kl_floor: float
    cost: float
    base_forwards: float
    guide_forwards: float
    reward_calls: float
    words: float
    refusals: float
    truncated: int
    repetitive: int
    leaks: int
    """Responses that hold something of a chat template."""
    unscored: int
    responses: int
    tokens_per_s: float | None
    seconds: float | None
    """Of sampling, per response; None where nobody measured it."""
    peak_bytes: int | None
    """Of memory, while the point was sampled; None where nobody measured it."""
    source: str
    chosen: tuple[int, ...] = ()
    """Which of the source's responses these are, where they were chosen among them; empty where they are all of them."""

    @cached_property
    def z_PK(self) -> np.ndarray:
        """Mean over a prompt's samples, unscored ones left out; NaN where none is scored."""
        return scored_mean(self.z_PSK, axis=1)

    @property
    def kl(self) -> float:
        """Mean over prompts, nats per response."""
        return float(self.kl_P.mean())


class Summary:
    """Builds points on one set of prompts, all against the same reference samples."""

    def __init__(self, reference: Scored, normaliser: Normaliser, n_boot: int, seed: int) -> None:
        self.objectives, self.seed = normaliser.objectives, seed
        self.names = reference.names
        self.judges = tuple(n for n in self.names if n not in self.objectives)
        if self.names[: len(self.objectives)] != self.objectives:
            raise UserError(f"the sweep scored {self.names}, but the values are for {self.objectives}; score those first and in that order")
        self.prompt_ids = list(dict.fromkeys(r.prompt_id for r in reference.rollouts))
        judged = Normaliser.fit(self.judges, reference.reward_NK[:, len(self.objectives) :])
        self._mean = np.array([*normaliser.mean_K, *judged.mean_K])
        self._sd = np.array([*normaliser.sd_K, *judged.sd_K])
        self.indices = bootstrap_indices(len(self.prompt_ids), n_boot, seed)
        self._unit = mean_cost(reference)
        self.reference = self.point(reference)

    def _z(self, scored: Scored) -> np.ndarray:
        return (scored.reward_NK - self._mean) / self._sd

    def point(self, scored: Scored, choice_PG: np.ndarray | None = None, **overrides: Any) -> Point:
        """A point over all samples, or over the chosen row per prompt and group, `choice_PG`."""
        rows_PS = scored.by_prompt(self.prompt_ids) if choice_PG is None else choice_PG
        z_PSK = self._z(scored)[rows_PS]
        chosen = [scored.rollouts[i] for i in rows_PS.ravel()]
        every_PS = scored.by_prompt(self.prompt_ids)
        facts: dict[str, Any] = {
            "method": scored.method,
            "weights": scored.weights,
            "n": 1,
            "kl_P": np.array([r.kl for r in scored.rollouts])[every_PS].mean(axis=1),
            "cost": mean_cost(scored) / self._unit,
            "base_forwards": float(np.mean([r.base_forwards for r in scored.rollouts])) * scored.reference_counts,
            "guide_forwards": float(np.mean([r.guide_forwards for r in scored.rollouts])),
            "reward_calls": float(np.mean([r.reward_calls for r in scored.rollouts])),
            "tokens_per_s": tokens_per_second(scored),
            "seconds": seconds_per_response(scored),
            "peak_bytes": scored.peak_bytes,
        }
        words, refusals, repetitive, leaks = np.array([_facts(r.text) for r in chosen]).T
        return Point(
            z_PSK=np.where(np.isfinite(z_PSK), z_PSK, np.nan),
            length_PS=np.log1p(words).reshape(rows_PS.shape),
            kl_floor=float(np.mean([r.kl_floor for r in scored.rollouts])),
            words=float(words.mean()),
            refusals=float(refusals.mean()),
            truncated=sum(r.finish_reason == "length" for r in chosen),
            repetitive=int(repetitive.sum()),
            leaks=int(leaks.sum()),
            unscored=int((~np.isfinite(z_PSK)).any(axis=-1).sum()),
            responses=len(chosen),
            source=scored.source,
            chosen=() if choice_PG is None else tuple(choice_PG.ravel().tolist()),
            **(facts | overrides),
        )

    def best_of(self, scored: Scored, weights: tuple[float, ...], n: int, method: str) -> Point:
        """Best-of-n by the weighted rewards, averaged over the disjoint groups of n samples of each prompt."""
        groups_PGN = self._groups(scored, n)
        score = linear(self._z(scored)[:, : len(self.objectives)], weights)[groups_PGN]
        pick_PG = best_of_n(score.reshape(-1, n)).reshape(score.shape[:2])
        choice_PG = np.take_along_axis(groups_PGN, pick_PG[..., None], axis=2)[..., 0]
        base = self.point(scored)
        return self.point(scored, choice_PG, method=method, weights=weights, kl_P=base.kl_P + best_of_n_kl(n), **self._candidates(base, n))

    def resampled(self, scored: Scored, weights: tuple[float, ...], beta: float) -> Point:
        """One draw per prompt from softmax(score / beta) over all its samples."""
        rows_PS = scored.by_prompt(self.prompt_ids)
        score = linear(self._z(scored)[:, : len(self.objectives)], weights)[rows_PS]
        pick = resample(score, beta, [scored.rollouts[i].seed for i in rows_PS[:, 0]])
        choice_PG = np.take_along_axis(rows_PS, pick[:, None], axis=1)
        kl_P = np.array([resampling_kl(score_N, beta) for score_N in score[:, None]])
        candidates = self._candidates(self.point(scored), rows_PS.shape[1])
        return self.point(scored, choice_PG, method="resampling", weights=weights, kl_P=kl_P, **candidates)

    def _candidates(self, one: Point, n: int) -> dict[str, Any]:
        """What a choice among n candidates costs, where one costs this much: every objective scores each of them."""
        return {
            "n": n,
            "cost": n * one.cost,
            "base_forwards": n * one.base_forwards,
            "guide_forwards": n * one.guide_forwards,
            "reward_calls": n * (one.reward_calls + len(self.objectives)),
            "tokens_per_s": None,
            "seconds": None if one.seconds is None else n * one.seconds,
        }

    def _groups(self, scored: Scored, n: int) -> np.ndarray:
        rows_PS = scored.by_prompt(self.prompt_ids)
        groups = rows_PS.shape[1] // n
        if groups < 1:
            raise UserError(f"best-of-{n} needs {n} samples per prompt, the sweep has {rows_PS.shape[1]}")
        return rows_PS[:, : groups * n].reshape(len(rows_PS), groups, n)

    def row(self, point: Point) -> dict[str, Any]:
        """A point as the report's table has it."""
        split = len(self.objectives)
        means = [self._interval(point.z_PK[:, k]) for k in range(point.z_PK.shape[1])]
        gains = [self.gain(point, k) for k in range(point.z_PK.shape[1])]
        return {
            "method": point.method,
            "label": f"{point.method} {weight_label(self.objectives, point.weights)}",
            "weights": point.weights,
            "n_candidates": point.n,
            "reward": means[:split],
            "judge": means[split:],
            "gain": gains[:split],
            "judge_gain": gains[split:],
            "words": point.words,
            "refusals": point.refusals,
            "truncated": point.truncated / point.responses,
            "kl": point.kl,
            "kl_floor": point.kl_floor,
            "cost": point.cost,
            "tokens_per_s": point.tokens_per_s,
            "n": point.responses,
            "n_unscored": point.unscored,
            "source": point.source,
            **({"chosen": list(point.chosen)} if point.chosen else {}),
        }

    def _interval(self, values_P: np.ndarray) -> dict[str, float]:
        return dict(zip(("mean", "lo", "hi"), mean_interval(values_P, self.indices), strict=True))

    def gain(self, point: Point, k: int) -> dict[str, float]:
        """{mean, lo, hi} of the paired difference to the reference on objective or judge k."""
        return dict(zip(("mean", "lo", "hi"), paired_interval(point.z_PK[:, k], self.reference.z_PK[:, k], self.indices), strict=True))

    def front_point(self, point: Point) -> FrontPoint:
        """A point as the record that front.json holds; its standard error is over prompts."""
        z_PK = point.z_PK[:, : len(self.objectives)]
        scored = np.isfinite(z_PK).sum(axis=0)
        return FrontPoint(
            method=point.method,
            weights=point.weights,
            objectives=self.objectives,
            reward_mean_K=tuple(np.nanmean(z_PK, axis=0).tolist()),
            stderr_K=tuple((np.nanstd(z_PK, axis=0, ddof=1) / np.sqrt(scored)).tolist()),
            kl=point.kl,
            kl_floor=point.kl_floor,
            cost=point.cost,
            n=point.responses,
            n_unscored=point.unscored,
        )

    def compare(self, point: Point, other_P: np.ndarray, k: int, **labels: Any) -> dict[str, Any]:
        """Paired difference of objective k between a point and another's per-prompt means."""
        mine = point.z_PK[:, k]
        difference = dict(zip(("mean", "lo", "hi"), paired_interval(mine, other_P, self.indices), strict=True))
        return {
            "objective": self.objectives[k],
            "difference": difference,
            "p": permutation_pvalue(mine, other_P, 10000, self.seed),
            **labels,
        }


def at_kl(points: Sequence[Point], kl: float, k: int) -> np.ndarray:
    """Per-prompt means of objective k at a KL between two points, by linear interpolation in KL; the last one's beyond."""
    ordered = sorted(points, key=lambda p: p.kl)
    if kl >= ordered[-1].kl:
        return ordered[-1].z_PK[:, k]
    for low, high in itertools.pairwise(ordered):
        if low.kl <= kl <= high.kl:
            share = (kl - low.kl) / max(high.kl - low.kl, 1e-12)
            return (1 - share) * low.z_PK[:, k] + share * high.z_PK[:, k]
    return ordered[0].z_PK[:, k]


@lru_cache(maxsize=1 << 16)
def _facts(text: str) -> tuple[int, bool, bool, bool]:
    """(words, refusal, repetitive, leak) of a text; best-of-n meets the same one at many weights."""
    return word_count(text), is_refusal(text), is_repetitive(text), leaks_format(text)
