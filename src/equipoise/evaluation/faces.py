"""Two objectives of several at a time: each method by its points that weigh no other, a face of the simplex of weights.

With three objectives or more, every pair of them is a comparison of two. The formulas, the reference point and the resampled
prompts are those of the whole front.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.evaluation.front import hypervolumes
from equipoise.evaluation.front_metrics import mean_inner_product
from equipoise.evaluation.methods import cost_of, estimate, kl_of, resampled, weights_of
from equipoise.evaluation.summary import Point, Summary
from equipoise.objectives import on_face


def pairs_of(objectives: int) -> list[tuple[int, int]]:
    """Every two of three objectives or more; none of two, where they are the whole front."""
    return list(itertools.combinations(range(objectives), 2)) if objectives > 2 else []


def face_points(points: Sequence[Point], pair: Sequence[int]) -> list[Point]:
    """A method's points on a face: two or more, or the reference; none where they are fewer."""
    found = [p for p in points if on_face(p.weights, pair)]
    return found if len(found) > 1 or (found and found[0].weights is None) else []


def face_rows(summary: Summary, named: Mapping[str, Sequence[Point]], ref_point_K: Sequence[float]) -> list[dict[str, Any]]:
    """For each pair of objectives each method's hypervolume in these two, inner product, KL and cost; cheapest first."""
    faces = []
    for pair in pairs_of(len(summary.objectives)):
        rows: list[dict[str, Any]] = []
        for name, points in named.items():
            found = face_points(points, pair)
            if found:
                front_BWK = resampled(summary, found, pair)
                weights_WK = weights_of(found, len(summary.objectives))[:, pair]
                row: dict[str, Any] = {"method": name, "cost": cost_of(found), "points": len(found)}
                row["hypervolume"] = estimate(hypervolumes(front_BWK, [ref_point_K[k] for k in pair]))
                row["mean_inner_product"] = estimate(mean_inner_product(front_BWK, weights_WK))
                rows.append(row | {"kl": kl_of(summary, found)})
        faces.append({"objectives": [summary.objectives[k] for k in pair], "methods": sorted(rows, key=lambda row: row["cost"])})
    return faces
