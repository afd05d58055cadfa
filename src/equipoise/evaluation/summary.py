"""From scored points to the table and the comparisons of a report.

Everything is averaged per prompt first; intervals resample prompts. Rewards are in standard deviations of the reference's
rollouts that the values were trained on (0 is their mean); a gain is the paired difference to the reference on the same
prompts. Best-of-n and resampling choose among the reference's own samples of each prompt, or among a guided point's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from equipoise.decoding.resampling import best_of_n, best_of_n_kl, resample, resampling_kl
from equipoise.evaluation.front import (
    bootstrap_indices,
    mean_interval,
    permutation_pvalue,
    scored_mean,
)
from equipoise.evaluation.sweep import Scored, mean_cost, seconds_per_response, tokens_per_second
from equipoise.objectives import Normaliser, linear, weight_label
from equipoise.progress import say
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
        judged = [_scale_of(name, column) for name, column in zip(self.names, reference.reward_NK.T, strict=True) if name in self.judges]
        self._mean = np.array([*normaliser.mean_K, *(mean for mean, _ in judged)])
        self._sd = np.array([*normaliser.sd_K, *(sd for _, sd in judged)])
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

    def best_of(self, scored: Scored, weights: tuple[float, ...], n: int, method: str, groups: int | None = None) -> Point:
        """Best-of-n by the weighted rewards, averaged over the disjoint groups of n samples of each prompt, or the first `groups`.

        A front of noisier points has more regret, sparsity and volume: what is set side by side should have as many responses.
        """
        groups_PGN = self._groups(scored, n)[:, :groups]
        score = linear(self._z(scored)[:, : len(self.objectives)], weights)[groups_PGN]
        pick_PG = best_of_n(score.reshape(-1, n)).reshape(score.shape[:2])
        choice_PG = np.take_along_axis(groups_PGN, pick_PG[..., None], axis=2)[..., 0]
        kl_P = self._drift(scored, choice_PG) + best_of_n_kl(n)
        return self.point(scored, choice_PG, method=method, weights=weights, kl_P=kl_P, **self._candidates(scored, n))

    def resampled(self, scored: Scored, weights: tuple[float, ...], beta: float) -> Point:
        """One draw per prompt from softmax(score / beta) over all its samples."""
        rows_PS = scored.by_prompt(self.prompt_ids)
        score = linear(self._z(scored)[:, : len(self.objectives)], weights)[rows_PS]
        pick = resample(score, beta, [scored.rollouts[i].seed for i in rows_PS[:, 0]])
        choice_PG = np.take_along_axis(rows_PS, pick[:, None], axis=1)
        kl_P, bound = np.array([resampling_kl(score_N, beta) for score_N in score[:, None]]), best_of_n_kl(rows_PS.shape[1])
        kl_P = self._drift(scored, choice_PG) + (kl_P if kl_P.mean() < bound else bound)
        candidates = self._candidates(scored, rows_PS.shape[1])
        return self.point(scored, choice_PG, method="resampling", weights=weights, kl_P=kl_P, **candidates)

    def _drift(self, scored: Scored, choice_PG: np.ndarray) -> np.ndarray:
        """E_q[log pi/pi_ref] of a choice q among pi's samples: their mean KL, and how far the chosen log-ratios are from all of them.

        The KL of q is this and q's own from pi. 0 of the reference's samples; the more, the more the choice agrees with what steered.
        """
        ratio_N = np.array([r.log_ratio for r in scored.rollouts])
        beyond_N = np.array([r.kl for r in scored.rollouts]) - ratio_N
        return np.asarray(beyond_N[scored.by_prompt(self.prompt_ids)].mean(axis=1) + ratio_N[choice_PG].mean(axis=1))

    def _candidates(self, scored: Scored, n: int) -> dict[str, Any]:
        """What a choice among n candidates costs: every objective scores each, and the policy reads their prompt once.

        What guides is charged for the prompt with each candidate. The seconds of scoring weren't measured, so there are none.
        """
        one = self.point(scored)
        prompt = float(np.mean([r.prompt_tokens for r in scored.rollouts])) * scored.reference_counts
        return {
            "n": n,
            "cost": n * one.cost - (n - 1) * prompt / self._unit,
            "base_forwards": n * one.base_forwards - (n - 1) * prompt,
            "guide_forwards": n * one.guide_forwards,
            "reward_calls": n * (one.reward_calls + len(self.objectives)),
            "tokens_per_s": None,
            "seconds": None,
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
        """{mean, lo, hi}; NaN where fewer than two prompts are scored, as those of a policy that has nothing left to say."""
        found = mean_interval(values_P, self.indices) if np.isfinite(values_P).sum() > 1 else (np.nan,) * 3
        return dict(zip(("mean", "lo", "hi"), found, strict=True))

    def gain(self, point: Point, k: int) -> dict[str, float]:
        """{mean, lo, hi} of the paired difference to the reference on objective or judge k."""
        return self._interval(point.z_PK[:, k] - self.reference.z_PK[:, k])

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

    def compare(self, ours_P: np.ndarray, other_P: np.ndarray, k: int, **labels: Any) -> dict[str, Any]:
        """Paired difference of objective k between two points' per-prompt means."""
        difference = self._interval(ours_P - other_P)
        return {
            "objective": self.objectives[k],
            "difference": difference,
            "p": permutation_pvalue(ours_P, other_P, 10000, self.seed) if np.isfinite(difference["mean"]) else np.nan,
            **labels,
        }


def _scale_of(judge: str, value_N: np.ndarray) -> tuple[float, float]:
    """(mean, sd) of a judge on the reference's responses; NaN of one that can't tell them apart, which is said once."""
    try:
        found = Normaliser.fit((judge,), value_N[:, None])
    except UserError as error:
        say(f"the judge {judge} is left out: {error}")
        return np.nan, np.nan
    return found.mean_K[0], found.sd_K[0]


@lru_cache(maxsize=1 << 16)
def _facts(text: str) -> tuple[int, bool, bool, bool]:
    """(words, refusal, repetitive, leak) of a text; best-of-n meets the same one at many weights."""
    return word_count(text), is_refusal(text), is_repetitive(text), leaks_format(text)
