"""A sweep's folder to the evaluation that the report draws: points, hypervolumes, comparisons, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.evaluation.equal import equal_rows
from equipoise.evaluation.methods import between_rows, ends, equal_length_rows, hypervolume_rows, method_rows
from equipoise.evaluation.summary import Point, Summary
from equipoise.evaluation.sweep import Scored, point_folder, read_point
from equipoise.models.value_heads import ValueHeads
from equipoise.objectives import Normaliser, simplex_grid, weight_label
from equipoise.runs import read_json
from equipoise.types import Prompt


def evaluation_of(
    folder: Path, values: Path, prompts: Mapping[str, Prompt], sweep: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of one sweep as the report reads them."""
    heads = ValueHeads.load(values / "values.safetensors")
    grid = simplex_grid(len(heads.objectives), sweep["steps"])
    reference = read_point(folder, "reference", None)
    steered = [read_point(folder, "single-pass", w) for w in grid]
    summary = Summary(reference, heads.normaliser, settings["n_boot"], settings["seed"])
    ours = [summary.point(s) for s in steered]
    best = {n: [summary.best_of(reference, w, n, "best-of-n") for w in grid] for n in settings["best_of"]}
    weighted = list(zip(steered, grid, strict=True))
    both = {n: [summary.best_of(s, w, n, "guided best-of-n") for s, w in weighted] for n in settings["guided_best_of"]}
    drawn = [summary.resampled(reference, w, settings["resampling_beta"]) for w in grid]
    prefix = _prefix(folder, heads, settings, grid)
    chosen = [p for groups in (both, best) for group in groups.values() for p in group]
    points = [summary.reference, *ours, *chosen, *drawn]
    ref_point = [settings["ref_point"]] * len(heads.objectives)
    methods = {"single-pass": ours} | {f"guided best-of-{n}": found for n, found in both.items()} | {"resampling": drawn}
    named = methods | {f"best-of-{n}": found for n, found in best.items()}
    fronts = {"reference (= best-of-1)": [summary.reference]} | named
    return {
        "title": "One model, steered between " + " and ".join(heads.objectives),
        "objectives": list(heads.objectives),
        "judges": list(summary.judges),
        "ref_point_K": ref_point,
        "settings": {"sweep": dict(sweep), "evaluate": dict(settings)},
        "points": [*(summary.row(p) for p in points), *prefix],
        "front": [asdict(summary.front_point(p)) for p in points],
        "hypervolume": hypervolume_rows(summary, fronts, ref_point),
        "methods": method_rows(summary, fronts),
        "between": between_rows(summary, methods, best, ref_point, settings["n_boot"]),
        "equal_length": equal_length_rows(summary, named),
        "equal_compute": _equal_compute(summary, ours, both, best),
        "equal_kl": equal_rows(summary, {"single-pass": ours}, best, "kl"),
        "examples": examples_of(prompts, reference, steered, heads.normaliser, settings["examples"]),
        "values": _value_quality(values),
        "calibration": [{"weights": list(p.weights or ()), "asked": sweep["kl_budget"], "realised": p.kl} for p in ours],
    }


def _prefix(folder: Path, heads: ValueHeads, settings: Mapping[str, Any], grid: Sequence[tuple[float, ...]]) -> list[dict[str, Any]]:
    """The prefix form's points, against the reference's samples of the same prompts."""
    rows = []
    for scored in _where_sampled(folder, "prefix", grid):
        asked = {r.prompt_id for r in scored.rollouts}
        reference = read_point(folder, "reference", None)
        keep = [i for i, r in enumerate(reference.rollouts) if r.prompt_id in asked]
        rollouts = [reference.rollouts[i] for i in keep]
        few = Scored("reference", None, rollouts, reference.reward_NK[keep], reference.names, 0.0, reference.source)
        summary = Summary(few, heads.normaliser, settings["n_boot"], settings["seed"])
        rows.append(summary.row(summary.point(scored)))
    return rows


def _equal_compute(summary: Summary, ours: list[Point], both: dict[int, list[Point]], best: dict[int, list[Point]]) -> list[dict[str, Any]]:
    """Steering against best-of-1, and steering under best-of-n against best-of-n alone, each at its own objective."""
    rows = []
    for k, point in ends(ours):
        rows.append(
            summary.compare(point.z_PK[:, k], summary.reference.z_PK[:, k], k, ours="single-pass", other="best-of-1", cost=point.cost)
        )
    for n in sorted(set(both) & set(best)):
        for k, point in ends(both[n]):
            other = dict(ends(best[n]))[k]
            labels = {"ours": f"guided best-of-{n}", "other": f"best-of-{n}", "cost": point.cost}
            rows.append(summary.compare(point.z_PK[:, k], other.z_PK[:, k], k, **labels))
    return rows


def points_of(folder: Path, objectives: int, steps: int) -> list[Scored]:
    """Every point that a sweep sampled."""
    grid = simplex_grid(objectives, steps)
    steered = [scored for method in ("single-pass", "prefix") for scored in _where_sampled(folder, method, grid)]
    return [read_point(folder, "reference", None), *steered]


def _where_sampled(folder: Path, method: str, grid: Sequence[tuple[float, ...]]) -> list[Scored]:
    return [read_point(folder, method, w) for w in grid if point_folder(folder, method, w).exists()]


def examples_of(
    by_id: Mapping[str, Prompt], reference: Scored, steered: Sequence[Scored], normaliser: Normaliser, count: int
) -> list[dict[str, Any]]:
    """The first sample of evenly spaced prompts: the reference's, then along the weights. Not chosen by outcome."""
    prompts = list(dict.fromkeys(r.prompt_id for r in reference.rollouts))
    chosen = [prompts[i * len(prompts) // count] for i in range(min(count, len(prompts)))]
    split, examples = len(normaliser.objectives), []
    for prompt_id in chosen:
        responses = []
        for scored in (reference, *steered):
            index = next(i for i, r in enumerate(scored.rollouts) if r.prompt_id == prompt_id)
            z = normaliser(scored.reward_NK[index, :split])
            label = weight_label(normaliser.objectives, scored.weights)
            reward = [None if np.isnan(v) else float(v) for v in z]
            responses.append({"label": label, "text": scored.rollouts[index].text, "reward": reward})
        examples.append({"prompt_id": prompt_id, "prompt": by_id[prompt_id].text, "responses": responses})
    return examples


def _value_quality(values: Path) -> list[dict[str, Any]]:
    quality = read_json(values / "quality.json")
    rows = []
    for form in ("teacher", "single-pass", "prefix"):
        for k, objective in enumerate(quality["objectives"]):
            figures = quality[form]
            by_position = [[position, r2[k]] for position, r2 in figures.get("r2_by_position", [])]
            row = {"form": form, "objective": objective, "r2": figures["r2"][k], "r2_by_position": by_position}
            if "efficiency" in figures:
                row["efficiency"] = figures["efficiency"][k]
            rows.append(row)
    return rows
