"""Palettes in numbers and pictures: what a quote shows before anything is served, and what serving delivered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from equipoise.decoding.palette import choose
from equipoise.evaluation import palette_figures as draw
from equipoise.evaluation.realised import closed_loop, realised_levels, target_misses, verdict
from equipoise.palette.banks import Bank
from equipoise.palette.confidence import Monitor
from equipoise.palette.dual import Problem, law, shortfall
from equipoise.palette.explore import Explored, base_quantile, reachable
from equipoise.palette.quote import Quote
from equipoise.types import Request


def palette_figures(found: Quote, bank: Bank, problem: Problem, explored: Explored | None) -> dict[str, str]:
    """Figures of a quote by file name: distributions and radar of a palette that can be had, regions where it was explored."""
    names = found.targets.objectives
    figures: dict[str, str] = {}
    delivered = found.solution
    if delivered is not None:
        # The groups' own rows: with several shuffles a row is in several groups.
        reward_MK = (problem.z_KM * problem.sd_K[:, None] + problem.mean_K[:, None]).T
        weight_M = law(problem, delivered.multiplier_K * problem.sd_K).weight_M
        asked = {
            name: [b for b in pair if np.isfinite(b)]
            for name, pair in zip(names, zip(found.targets.floor_K, found.targets.ceiling_K, strict=True), strict=True)
        }
        figures["distributions.svg"] = draw.distributions_figure(names, reward_MK, weight_M, asked)
        columns = bank.scored(names).reward_NK
        quantiles = {
            "base model": [base_quantile(columns[:, k], float(columns[:, k].mean())) for k in range(len(names))],
            found.ask: [base_quantile(columns[:, k], float(delivered.level_K[k])) for k in range(len(names))],
        }
        figures["radar.svg"] = draw.radar_figure(names, quantiles)
    if explored is not None:
        own = None if delivered is None else delivered.multiplier_K
        figures["multipliers.svg"] = draw.region_figure(names[:2], explored.multiplier_DK, explored.improves_D, own)
        if len(names) > 2:
            figures["multipliers-3d.svg"] = draw.region_figure(names, explored.multiplier_DK, explored.improves_D, own, "multipliers-3d")
        if len(names) > 1:
            asked_2 = np.where(np.isfinite(found.targets.floor_K[:2]), found.targets.floor_K[:2], found.targets.ceiling_K[:2])
            level_2 = None if delivered is None else delivered.level_K[:2]
            figures["reachable.svg"] = draw.reachable_figure(
                (names[0], names[1]), reachable(problem, 0, 1), explored.level_DK[:, :2], problem.mean_K[:2], asked_2, level_2
            )
    return {name: text for name, text in figures.items() if text}


def applied(
    records: Sequence[Mapping[str, Any]],
    requests: Sequence[Request],
    reward_QNK: np.ndarray,
    objectives: Sequence[str],
    loop: bool,
    n_boot: int,
    seed: int,
) -> dict[str, Any]:
    """Every palette on the same candidates: its levels beside its targets, and a verdict per objective."""
    seeds, prompts = [r.seed for r in requests], [r.prompt.id for r in requests]
    rows: list[dict[str, Any]] = []
    for record in records:
        names = list(record["multipliers"])
        columns = [list(objectives).index(name) for name in names]
        candidates = reward_QNK[:, : record["n"]]
        chosen = choose(candidates[:, :, columns], np.array(list(record["multipliers"].values())), seeds)
        replicates = np.array(record["multiplier_replicates"], dtype=np.float64).reshape(-1, len(names))
        found = realised_levels(candidates, objectives, prompts, record["multipliers"], chosen, replicates, n_boot, seed)
        row = {key: record[key] for key in ("ask", "dual", "n", "targets", "floors", "ceilings", "multipliers")}
        row |= found | {"quoted": record["levels"], "quoted_kl": record["kl"]}
        row["verdict"] = {name: verdict(found["levels"][name]["expected"], *_bounds(record, name)) for name in names}
        row["shortfall"] = {name: _shortfall(found["levels"][name]["expected"]["mean"], *_bounds(record, name)) for name in names}
        if loop:
            row["closed_loop"] = _looped(record, names, candidates[:, :, columns], seeds)
        rows.append(row)
    served = list(zip(rows, records, strict=True))
    duals = {dual: _misses([(row, r) for row, r in served if r["dual"] == dual]) for dual in dict.fromkeys(r["dual"] for r in records)}
    return {"objectives": list(objectives), "responses": len(requests), "prompts": len(set(prompts)), "palettes": rows, "duals": duals}


def _misses(served: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, float | int]:
    """`target_misses` over every objective that these palettes asked for."""
    asked = [(row, record, name) for row, record in served for name in record["multipliers"]]
    level_N = np.array([row["levels"][name]["expected"]["mean"] for row, _, name in asked], dtype=np.float64)  # None becomes NaN
    floor_N, ceiling_N = np.array([_bounds(record, name) for _, record, name in asked]).reshape(-1, 2).T
    sd_N = np.array([record["sd"][name] for _, record, name in asked])
    return target_misses(level_N, floor_N, ceiling_N, sd_N, [row["verdict"][name] for row, _, name in asked])


def _bounds(record: Mapping[str, Any], name: str) -> tuple[float, float]:
    return record["floors"].get(name, -np.inf), record["ceilings"].get(name, np.inf)


def _shortfall(level: float | None, floor: float, ceiling: float) -> float | None:
    return None if level is None else float(shortfall(np.array([level]), np.array([floor]), np.array([ceiling]))[0])


def _looped(record: Mapping[str, Any], names: Sequence[str], reward_QNK: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    floor_K, ceiling_K = np.array([_bounds(record, name) for name in names]).T
    monitor = Monitor(floor_K, ceiling_K, np.array(list(record["multipliers"].values())), horizon=max(2, len(seeds)))
    chosen, _ = closed_loop(reward_QNK, seeds, monitor)
    lo, hi = monitor.interval()
    served = reward_QNK[np.arange(len(chosen)), chosen]
    return {
        "realised": dict(zip(names, np.nanmean(served, axis=0).tolist(), strict=True)),
        "multipliers": dict(zip(names, monitor.multiplier_K.tolist(), strict=True)),
        "interval": {name: [low, high] for name, low, high in zip(names, lo.tolist(), hi.tolist(), strict=True)},
        "corrections": monitor.corrections,
    }


def applied_figures(result: Mapping[str, Any], bank: Bank) -> dict[str, str]:
    """Realised against asked, and the radar of realised quantiles of the palettes that the grouped dual solved."""
    names = list(result["objectives"])
    figures = {"asked.svg": draw.asked_figure(result["palettes"], names)}
    columns = {name: bank.reward_NK[:, bank.objectives.index(name)] for name in names}
    quantiles = {"base model": [base_quantile(columns[name], float(np.nanmean(columns[name]))) for name in names]}
    for row in result["palettes"]:
        if row["dual"] == "grouped":
            means = [row["levels"][name]["expected"]["mean"] for name in names]
            quantiles[row["ask"]] = [base_quantile(columns[n], np.nan if m is None else m) for n, m in zip(names, means, strict=True)]
    figures["radar.svg"] = draw.radar_figure(names, quantiles)
    return {name: text for name, text in figures.items() if text}
