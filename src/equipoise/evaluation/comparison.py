"""Any methods on the same prompts, against the same reference samples: the evaluation that the report draws.

Rewards are standardised by the reference's own samples here. Best-of-n has as many responses per prompt as the methods, so that
noise makes nobody's front look larger. A method's ends are set against it at the KL and at the cost that they spent (`equal.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from equipoise.evaluation.budgets import KL_BUDGET, at_budget, cost_class
from equipoise.evaluation.equal import equal_rows
from equipoise.evaluation.evaluate import examples_of
from equipoise.evaluation.faces import face_rows
from equipoise.evaluation.methods import (
    between_rows,
    cost_of,
    distribution_rows,
    equal_length_rows,
    hypervolume_rows,
    method_rows,
)
from equipoise.evaluation.summary import Summary
from equipoise.evaluation.sweep import read_point
from equipoise.objectives import Normaliser
from equipoise.types import Prompt

Weights = tuple[float, ...]
_NAMED = 4
"""Most methods that a title names."""


def comparison_of(
    folder: Path,
    objectives: Sequence[str],
    prompts: Mapping[str, Prompt],
    plan: Mapping[str, Sequence[Weights]],
    grid: Sequence[Weights],
    settings: Mapping[str, Any],
    measured: Collection[str] = (),
) -> dict[str, Any]:
    """All figures of a comparison. `plan` is each method's weights; best-of-n is taken at every weight of `grid`.

    `measured`: methods beside which the reference runs only to measure them, so that its forwards aren't in their cost.
    `settings`: best_of, each_best_of, ref_point, kl_budget, n_boot, examples, seed.
    """
    reference = read_point(folder, "reference", None)
    normaliser = Normaliser.fit(tuple(objectives), reference.reward_NK[:, : len(objectives)])
    summary = Summary(reference, normaliser, settings["n_boot"], settings["seed"])
    scored = {
        method: [replace(read_point(folder, method, w), reference_counts=method not in measured) for w in weights]
        for method, weights in plan.items()
    }
    points = {method: [summary.point(s) for s in found] for method, found in scored.items()}
    then = {
        f"{method}, best-of-{n}": [summary.best_of(s, s.weights, n, f"{method}, best-of-n") for s in found if s.weights]
        for method, found in scored.items()
        for n in settings["each_best_of"]
    }
    ref_point = [settings["ref_point"]] * len(objectives)
    methods = points | then
    responses = min(found[0].z_PSK.shape[1] for found in methods.values())
    ladder = {n: [summary.best_of(reference, w, n, "best-of-n", responses) for w in grid] for n in sorted(settings["best_of"])}
    named = methods | {f"best-of-{n}": found for n, found in ladder.items()}
    fronts = {"reference": [summary.reference]} | named
    every = [(p, cost_class(ladder, cost_of(found))) for found in fronts.values() for p in found]
    shown = next(iter(scored.values()), [])
    return {
        "title": _listed(objectives) + f": {', '.join(plan) if len(plan) <= _NAMED else f'{len(plan)} methods'} on the same prompts",
        "objectives": list(objectives),
        "judges": list(summary.judges),
        "ref_point_K": ref_point,
        "points": [summary.row(p) | {"cost_class": n} for p, n in every],
        "front": [asdict(summary.front_point(p)) for p, _ in every],
        "hypervolume": [row | {"cost_class": cost_class(ladder, row["cost"])} for row in hypervolume_rows(summary, fronts, ref_point)],
        "methods": method_rows(summary, fronts),
        "faces": face_rows(summary, fronts, ref_point),
        "at_kl": at_budget(summary, fronts, ref_point, settings.get("kl_budget", KL_BUDGET)),
        "distributions": distribution_rows(summary, named),
        "between": between_rows(summary, methods, ladder, ref_point, settings["n_boot"]),
        "equal_length": equal_length_rows(summary, named),
        "equal_compute": equal_rows(summary, methods, ladder, "cost"),
        "equal_kl": equal_rows(summary, methods, ladder, "kl"),
        "examples": examples_of(prompts, reference, shown, normaliser, settings["examples"]),
        "normaliser": asdict(normaliser),
    }


def _listed(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), names[-1]])
