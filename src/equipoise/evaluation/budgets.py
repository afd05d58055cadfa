"""Methods on the same terms: brought to one KL by mixing with the reference, and put in classes by what a response costs.

A mixture that answers with the method with probability a, and with the reference otherwise, has

    reward  a r + (1 - a) r_ref        KL(a pi + (1 - a) pi_ref || pi_ref) <= a KL(pi || pi_ref)

the first exactly and the second since the KL is jointly convex. So a = min(1, kappa / KL) keeps any point within kappa nats per
response. Anyone can build it; a method that is trained or decoded for kappa may gain more. KL is the mean over prompts and
without the floor of truncation, and a is held at it while prompts are resampled: the intervals are of the mixture that was named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from equipoise.evaluation.faces import face_points, pairs_of
from equipoise.evaluation.front import hypervolumes, mean_interval, paired_interval, resampled_front
from equipoise.evaluation.methods import cost_of, ends, estimate
from equipoise.evaluation.summary import Point, Summary

KL_BUDGET = 1.0
"""Nats per response that methods are brought to."""
_DEARER = 1.5


def share_within(kl: float, budget: float) -> float:
    """a = min(1, budget / kl): how often the method may answer; NaN where the KL isn't known."""
    if np.isnan(kl):
        return float("nan")
    return min(1.0, budget / kl) if kl > 0 else 1.0


def mixed_means(mean_PK: Real[np.ndarray, "P K"], reference_PK: Real[np.ndarray, "P K"], share: float) -> Float[np.ndarray, "P K"]:
    """share mean + (1 - share) reference, prompt by prompt; NaN where a side that takes part is unscored."""
    return mean_PK.astype(np.float64) if share == 1 else share * mean_PK + (1 - share) * reference_PK


def at_budget(summary: Summary, named: Mapping[str, Sequence[Point]], ref_point_K: Sequence[float], budget: float) -> dict[str, Any]:
    """Each method brought to `budget` nats, every point by its own share: its points, hypervolumes and gains of its ends.

    Methods with a point whose KL isn't known are left out. Cheapest first; a method that spends less is unchanged, its shares 1.
    """
    rows, drawn, objectives = [], [], len(summary.objectives)
    reference_PK = summary.reference.z_PK[:, :objectives]
    for name, points in named.items():
        shares = [share_within(p.kl, budget) for p in points]
        if not np.isfinite(shares).all():
            continue
        mixed = {id(p): mixed_means(p.z_PK[:, :objectives], reference_PK, a) for p, a in zip(points, shares, strict=True)}

        def volume(found: Sequence[Point], columns: Sequence[int], mixed: Mapping[int, np.ndarray] = mixed) -> dict[str, float]:
            front_BWK = resampled_front(np.stack([mixed[id(p)][:, columns] for p in found]), summary.indices)
            return estimate(hypervolumes(front_BWK, [ref_point_K[k] for k in columns]))

        faces = [(face_points(points, pair), pair) for pair in pairs_of(objectives)]
        gains: list[dict[str, float] | None] = [None] * objectives
        for k, point in ends(points):
            gains[k] = _interval(paired_interval(mixed[id(point)][:, k], reference_PK[:, k], summary.indices))
        rows.append(
            {
                "method": name,
                "cost": cost_of(points),
                "points": len(points),
                "spent": float(np.mean([p.kl for p in points])),
                "kl": float(np.mean([a * p.kl for p, a in zip(points, shares, strict=True)])),
                "share": [min(shares), max(shares)],
                "hypervolume": volume(points, range(objectives)),
                "faces": [volume(found, pair) if found else None for found, pair in faces],
                "gains": gains,
            }
        )
        for point, share in zip(points, shares, strict=True):
            reward = [_interval(mean_interval(mixed[id(point)][:, k], summary.indices)) for k in range(objectives)]
            facts = {"method": point.method, "weights": point.weights, "n_candidates": point.n, "cost": point.cost}
            drawn.append(facts | {"share": share, "kl": share * point.kl, "reward": reward})
    return {"budget": budget, "methods": sorted(rows, key=lambda row: row["cost"]), "points": drawn}


def _interval(found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "lo", "hi"), found, strict=True))


def cost_class(ladder: Mapping[int, Sequence[Point]], cost: float) -> int:
    """The n of best-of-n beside which a method of this cost is shown: the nearest in price, as a ratio; 1 is the reference.

    0 of a method that costs more than one and a half times the largest.
    """
    prices = {1: 1.0} | {n: cost_of(points) for n, points in ladder.items()}
    if cost > _DEARER * max(prices.values()):
        return 0
    return min(prices, key=lambda n: abs(np.log(cost / prices[n])))
