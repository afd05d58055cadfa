"""What a palette delivered on prompts that it wasn't solved on: realised levels beside the targets, with intervals.

Per objective there are two estimates of one level: `realised`, the mean of what was drawn, and `expected`, the mean over
all draws that the same candidates could have led to, which has less noise. The interval of `expected` is what a promise
is judged by, so it has both of its errors: prompts are resampled, and each time the multipliers are those of another
replicate of the bank. That of `realised` resamples prompts only.
Reads scored candidates; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from equipoise.decoding.palette import choose, tilt
from equipoise.decoding.resampling import resampling_kl, resampling_probabilities
from equipoise.evaluation.front import bootstrap_indices, mean_interval, prompt_means, scored_mean
from equipoise.palette.confidence import Monitor
from equipoise.palette.dual import shortfall


def realised_levels(
    reward_QNK: Float[np.ndarray, "Q N K"],
    names: Sequence[str],
    prompt_ids: Sequence[str],
    multipliers: Mapping[str, float],
    chosen_Q: Int[np.ndarray, " Q"],
    replicate_BK: Float[np.ndarray, "B V"],
    n_boot: int,
    seed: int,
) -> dict[str, Any]:
    """Levels of Q responses with N candidates each: per objective `base`, `realised` and `expected` as {mean, lo, hi}; `kl`.

    `base` is the mean of all candidates: what the sampler does without a palette. 95 % intervals over prompts. An
    objective that too few prompts were scored on has None for its ends.
    """
    used = [names.index(name) for name in multipliers]
    v_V = np.array(list(multipliers.values()), dtype=np.float64)
    scored = np.isfinite(reward_QNK)
    filled = np.where(scored, reward_QNK, 0.0)

    def by_prompt(share_QN: np.ndarray) -> np.ndarray:
        weight = share_QN[:, :, None] * scored
        with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is NaN: nothing scored
            return prompt_means((weight * filled).sum(axis=1) / weight.sum(axis=1), prompt_ids)[1]

    def chosen_by(multiplier_V: np.ndarray) -> np.ndarray:
        return by_prompt(resampling_probabilities(tilt(reward_QNK[:, :, used], multiplier_V), 1.0))

    table = bootstrap_indices(len(set(prompt_ids)), n_boot, seed)
    base_PK, expected_PK = by_prompt(np.ones(reward_QNK.shape[:2])), chosen_by(v_V)
    realised_PK = prompt_means(reward_QNK[np.arange(len(chosen_Q)), chosen_Q], prompt_ids)[1]
    replicates = [chosen_by(v) for v in replicate_BK] or [expected_PK]
    levels = {
        name: {
            "base": _interval(base_PK[:, k], table),
            "realised": _interval(realised_PK[:, k], table),
            "expected": _interval(expected_PK[:, k], table, np.array([r[:, k] for r in replicates])),
        }
        for k, name in enumerate(names)
    }
    return {"levels": levels, "kl": resampling_kl(tilt(reward_QNK[:, :, used], v_V), 1.0)}


def _interval(value_P: np.ndarray, table: np.ndarray, replicate_BP: np.ndarray | None = None) -> dict[str, float | None]:
    """{mean, lo, hi} over prompts; each resample with the next of the replicates, where there are some."""
    if np.isfinite(value_P).sum() < 2:
        return {"mean": None, "lo": None, "hi": None}
    if replicate_BP is None:
        mean, lo, hi = mean_interval(value_P, table)
        return {"mean": mean, "lo": lo, "hi": hi}
    drawn = np.array([np.nanmean(replicate_BP[i % len(replicate_BP)][rows]) for i, rows in enumerate(table)])
    lo, hi = np.quantile(drawn, [0.025, 0.975])
    return {"mean": float(np.nanmean(value_P)), "lo": float(lo), "hi": float(hi)}


def verdict(level: Mapping[str, float | None], floor: float, ceiling: float) -> str:
    """ "met" where the whole interval keeps to the targets, "within" where it holds one of them, "missed", or "unscored".

    A binding target is one that the level should equal, so "within" is what a right palette gets.
    """
    lo, hi = level["lo"], level["hi"]
    if lo is None or hi is None:
        return "unscored"
    if hi < floor or lo > ceiling:
        return "missed"
    return "met" if lo >= floor and hi <= ceiling else "within"


def target_misses(
    level_N: Float[np.ndarray, " N"],
    floor_N: Float[np.ndarray, " N"],
    ceiling_N: Float[np.ndarray, " N"],
    sd_N: Float[np.ndarray, " N"],
    verdicts: Sequence[str],
) -> dict[str, float | int]:
    """Of N targets, one for each objective of each palette: how far they were missed, and how often for certain.

        target_error = mean_n max(floor - level, level - ceiling, 0) / sd,   violation_rate = mean_n [verdict is "missed"]

    In standard deviations of the objective's rewards, over the targets whose level was scored; NaN where none was.
    """
    error_N = shortfall(level_N, floor_N, ceiling_N) / sd_N
    judged = [v == "missed" for v in verdicts if v != "unscored"]
    return {
        "targets": len(level_N),
        "scored": len(judged),
        "target_error": float(scored_mean(error_N, axis=0)),
        "violation_rate": float(np.mean(judged)) if judged else float("nan"),
    }


def closed_loop(
    reward_QNK: Float[np.ndarray, "Q N K"], seeds_Q: Sequence[int], monitor: Monitor
) -> tuple[Int[np.ndarray, " Q"], Float[np.ndarray, "Q K"]]:
    """(which candidate was served, the multipliers it was drawn with) of each response in turn, corrected on the way."""
    chosen, used = [], []
    for reward_NK, seed in zip(reward_QNK, seeds_Q, strict=True):
        used.append(monitor.multiplier_K)
        chosen.append(int(choose(reward_NK[None], monitor.multiplier_K, [seed])[0]))
        monitor.observe(reward_NK, chosen[-1])
    return np.array(chosen), np.array(used)
