"""The evaluation log of one scored run: a table of prompts, overall statistics, and the run's own arguments beside them.

    trial i      the i-th sample of every prompt
    mixed        sum_k w_k mean r_k, over the objectives with weight
    kl           mean over responses of sum_t KL(pi || pi_ref restricted to the same candidates), exact
    kl_sampled   mean of sum_t log pi(a_t) - log pi_ref(a_t), pi_ref over the full vocabulary: MAVIS's estimator (equation 6)

The sampled estimate holds the price of top-k, kl_floor, and is positive where nothing is tilted; it is logged to compare with
published figures. Paper: MAVIS (arXiv 2508.13415), as its evaluation scripts log. Departures: a mean over responses that
somebody scored; intervals over prompts beside the spread over trials; the exact KL, and its floor apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.evaluation.front import bootstrap_indices, mean_interval, prompt_means
from equipoise.evaluation.sweep import Scored
from equipoise.rewards.text import is_repetitive, leaks_format
from equipoise.runs import write_atomic
from equipoise.types import Rewards, Rollout


def prompt_table(rollouts: Sequence[Rollout], rewards: Rewards, weights: Sequence[float] | None) -> dict[str, list[Any]]:
    """Columns of the table, a row per prompt in the order of the rollouts; NaN where nothing was scored."""
    asked = [r.prompt_id for r in rollouts]
    price_RC = np.array([[r.kl, r.kl_floor, _sampled(r), r.length] for r in rollouts], dtype=np.float64)
    ids, reward_PK = prompt_means(rewards.reward_NK, asked)
    price_PC = prompt_means(price_RC, asked)[1]
    count = {name: asked.count(name) for name in ids}
    columns: dict[str, list[Any]] = {"prompt_id": list(ids), "responses": [count[name] for name in ids]}
    columns |= {f"reward:{name}": reward_PK[:, k].tolist() for k, name in enumerate(rewards.objectives)}
    if weights is not None:
        used = np.asarray(weights) > 0
        columns["mixed"] = (reward_PK[:, used] @ np.asarray(weights)[used]).tolist()
    columns |= {name: price_PC[:, c].tolist() for c, name in enumerate(("kl", "kl_floor", "kl_sampled", "tokens"))}
    columns["running_kl"] = (np.cumsum(price_PC[:, 0]) / np.arange(1, len(ids) + 1)).tolist()
    return columns


def _sampled(rollout: Rollout) -> float:
    return float(np.sum(rollout.logprobs) - np.sum(rollout.ref_logprobs))


def response_table(points: Sequence[Scored]) -> dict[str, list[Any]]:
    """Columns of a comparison's table, a row per sampled response of every point: its scores as they were given, and its price."""
    rows = [(point, rollout) for point in points for rollout in point.rollouts]
    columns: dict[str, list[Any]] = {
        "method": [p.method for p, _ in rows],
        "weights": [None if p.weights is None else list(p.weights) for p, _ in rows],
        "prompt_id": [r.prompt_id for _, r in rows],
        "response_id": [r.id for _, r in rows],
    }
    reward_RK = np.concatenate([p.reward_NK for p in points])
    columns |= {f"reward:{name}": reward_RK[:, k].tolist() for k, name in enumerate(points[0].names)}
    columns |= {name: [getattr(r, name) for _, r in rows] for name in ("kl", "kl_floor")}
    columns["tokens"] = [len(r.tokens) for _, r in rows]
    columns |= {name: [getattr(r, name) for _, r in rows] for name in ("base_forwards", "guide_forwards", "reward_calls", "finish_reason")}
    columns |= {name: [check(r.text) for _, r in rows] for name, check in (("repetitive", is_repetitive), ("leaks_format", leaks_format))}
    return columns


def trials_of(rollouts: Sequence[Rollout]) -> np.ndarray:
    """Which trial each rollout belongs to: how many of its prompt came before."""
    seen: dict[str, int] = {}
    trials = []
    for rollout in rollouts:
        trials.append(seen.get(rollout.prompt_id, 0))
        seen[rollout.prompt_id] = trials[-1] + 1
    return np.array(trials)


def overall(
    table: dict[str, list[Any]], rollouts: Sequence[Rollout], rewards: Rewards, seconds: float, n_boot: int, seed: int
) -> dict[str, Any]:
    """Statistics of the whole run. `sd_of_trials` is the population's, as MAVIS states it; intervals are 95 % over prompts."""
    trial_R, prompts = trials_of(rollouts), len(table["prompt_id"])
    indices = bootstrap_indices(prompts, n_boot, seed) if prompts > 1 else None
    sampled_R = np.array([_sampled(r) for r in rollouts])
    found: dict[str, Any] = {"prompts": prompts, "responses": len(rollouts), "trials": int(trial_R.max()) + 1, "objectives": {}}
    for k, name in enumerate(rewards.objectives):
        column = rewards.reward_NK[:, k]
        found["objectives"][name] = _spread(column, trial_R) | _interval(table[f"reward:{name}"], indices)
        found["objectives"][name]["n_unscored"] = int(np.isnan(column).sum())
    if "mixed" in table:
        found["mixed"] = _interval(table["mixed"], indices)
    found["kl"] = _interval(table["kl"], indices)
    found["kl_floor"] = float(np.mean(table["kl_floor"]))
    found["kl_sampled"] = _spread(sampled_R, trial_R)
    tokens = sum(r.length for r in rollouts)
    found["tokens_per_response"] = tokens / len(rollouts)
    found["base_forwards_per_response"] = float(np.mean([r.base_forwards for r in rollouts]))
    found["guide_forwards_per_response"] = float(np.mean([r.guide_forwards for r in rollouts]))
    found["tokens_per_second"] = tokens / seconds if seconds > 0 else None
    return found


def _spread(value_R: np.ndarray, trial_R: np.ndarray) -> dict[str, Any]:
    """Means of the trials, scored responses only, their mean and population sd."""
    means = np.array([_mean(value_R[trial_R == t]) for t in range(int(trial_R.max()) + 1)])
    scored = means[np.isfinite(means)]
    return {"mean_of_trials": _mean(means), "sd_of_trials": float(scored.std()) if len(scored) else float("nan"), "trials": means.tolist()}


def _mean(values: np.ndarray) -> float:
    scored = values[np.isfinite(values)]
    return float(scored.mean()) if len(scored) else float("nan")


def _interval(values: Sequence[float], indices: np.ndarray | None) -> dict[str, Any]:
    array = np.asarray(values, dtype=np.float64)
    if indices is None or np.isfinite(array).sum() < 2:
        return {"mean": _mean(array), "interval": None}
    mean, low, high = mean_interval(array, indices)
    return {"mean": mean, "interval": [low, high]}


def write_table(path: Path, table: dict[str, list[Any]]) -> None:
    """A table as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_atomic(path, lambda scratch: pq.write_table(pa.table(table), scratch, compression="zstd"))
