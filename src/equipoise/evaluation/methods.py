"""What a report says of each method and of two methods side by side: metrics of its front, its price, its slips, its length.

Rewards are per-prompt means in standard deviations of the reference's, at every weight vector of the method; intervals
resample prompts, all weights and methods together, so that any two rows share their resamples. The formulas are in
`front_metrics` and `between`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from equipoise.evaluation.between import equal_length_difference, holm, swap_pvalues
from equipoise.evaluation.front import hypervolumes, interval_of, resampled_front
from equipoise.evaluation.front_metrics import (
    additive_epsilon,
    follows,
    mean_inner_product,
    mean_regret,
    spacing,
    sparsity,
    spread,
    violations,
)
from equipoise.evaluation.summary import Point, Summary
from equipoise.types import UserError

OTHER_REF_POINTS = (-0.5, 0.5)
"""By how much the reference point is moved on every objective to show how far the hypervolume hangs on it."""
COMPARED = ("hypervolume", "mean inner product", "regret", "sparsity", "spacing", "KL")
"""What two methods are tested on."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Which quantiles of the rewards of responses are kept."""


def ends(points: Sequence[Point]) -> list[tuple[int, Point]]:
    """(objective, point with all weight on it)."""
    return [(p.weights.index(1.0), p) for p in points if p.weights and max(p.weights) == 1.0]


def hypervolume_rows(summary: Summary, named: Mapping[str, Sequence[Point]], ref_point_K: Sequence[float]) -> list[dict[str, Any]]:
    """Each method's hypervolume above the reference point, with what it is above two others; cheapest first."""
    rows = []
    for name, points in named.items():
        front_BWK = resampled(summary, points)
        value, lo, hi = interval_of(hypervolumes(front_BWK, ref_point_K))
        others = [[r + step for r in ref_point_K] for step in OTHER_REF_POINTS]
        moved = [{"ref_point_K": ref} | estimate(hypervolumes(front_BWK, ref)) for ref in others]
        row = {"method": name, "cost": cost_of(points), "value": value, "lo": lo, "hi": hi, "points": len(points)}
        rows.append(row | {"at": moved})
    return sorted(rows, key=lambda row: row["cost"])


def method_rows(summary: Summary, named: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """Each method's metrics, price and slips; epsilon is to the front of all of them together, whatever they cost. Cheapest first."""
    fronts = {name: resampled(summary, points) for name, points in named.items()}
    union_BRK = np.concatenate(list(fronts.values()), axis=1)
    rows = []
    for name, points in named.items():
        front_BWK, weights_WK = fronts[name], weights_of(points, len(summary.objectives))
        row: dict[str, Any] = {"method": name, "cost": cost_of(points), "points": len(points)}
        row["mean_inner_product"] = estimate(mean_inner_product(front_BWK, weights_WK))
        row["regret"] = estimate(mean_regret(front_BWK, weights_WK))
        row["epsilon"] = estimate(additive_epsilon(front_BWK, union_BRK))
        row |= {"sparsity": estimate(sparsity(front_BWK)), "spacing": estimate(spacing(front_BWK))}
        for key, value_BK in (
            ("spread", spread(front_BWK)),
            ("follows", follows(front_BWK, weights_WK)),
            ("violations", violations(front_BWK, weights_WK)),
        ):
            row[key] = [estimate(value_BK[:, k]) for k in range(value_BK.shape[1])]
        rows.append(row | _price(summary, points))
    return sorted(rows, key=lambda row: row["cost"])


def _price(summary: Summary, points: Sequence[Point]) -> dict[str, Any]:
    """Means over a method's points of what a response costs, and how many of its responses went wrong.

    `seconds` of sampling are NaN where a point's weren't measured, and so is `peak_memory`, in GiB: the largest of its points.
    """
    mean = {
        key: float(np.mean([getattr(p, key) for p in points])) for key in ("kl_floor", "base_forwards", "guide_forwards", "reward_calls")
    }
    total = {key: sum(getattr(p, key) for p in points) for key in ("responses", "unscored", "repetitive", "truncated", "leaks")}
    seconds = [p.seconds for p in points if p.seconds is not None]
    peaks = [p.peak_bytes for p in points if p.peak_bytes is not None]
    mean["seconds"] = float(np.mean(seconds)) if len(seconds) == len(points) else float("nan")
    mean["peak_memory"] = max(peaks) / 2**30 if len(peaks) == len(points) else float("nan")
    return {"kl": kl_of(summary, points), **mean, **total}


def between_rows(
    summary: Summary, methods: Mapping[str, Sequence[Point]], ladder: Mapping[int, Sequence[Point]], ref_point_K: Sequence[float], n: int
) -> list[dict[str, Any]]:
    """Every two methods at the weights that both have, and each beside the largest best-of-n that costs no more.

    Per metric the difference with its interval, p of swapping prompts (n permutations), and Holm's over the row's metrics.
    The reference has one point at all weights, so beside it a front's regret, sparsity and spacing say nothing and are NaN.
    """
    rows = [_between(summary, a, b, methods[a], methods[b], ref_point_K, n) for a, b in itertools.combinations(methods, 2)]
    for name, points in methods.items():
        rung = affordable(ladder, cost_of(points))
        others = ladder[rung] if rung > 1 else [replace(summary.reference, weights=p.weights) for p in points]
        rows.append(_between(summary, name, f"best-of-{rung}", points, others, ref_point_K, n))
    return [row for row in rows if row["points"]]


def affordable(ladder: Mapping[int, Sequence[Point]], cost: float) -> int:
    """The largest n of best-of-n that costs no more; the reference is best-of-1 and costs 1."""
    return max((n for n, points in ladder.items() if cost_of(points) <= cost + 0.05), default=1)


def _between(
    summary: Summary, ours: str, other: str, a: Sequence[Point], b: Sequence[Point], ref_point_K: Sequence[float], n: int
) -> dict[str, Any]:
    theirs = {_rounded(p): p for p in b if p.weights}
    pairs = [(p, theirs[_rounded(p)]) for p in a if _rounded(p) in theirs]
    row: dict[str, Any] = {"ours": ours, "other": other, "points": len(pairs), "cost": cost_of(a), "other_cost": cost_of(b), "metrics": []}
    if not pairs:
        return row
    objectives = len(summary.objectives)
    weights_WK, steered = weights_of([p for p, _ in pairs], objectives), b[0].method != summary.reference.method

    def metrics(mean_NS: np.ndarray) -> np.ndarray:
        front = mean_NS[:, : weights_WK.size].reshape(-1, *weights_WK.shape)
        size, inner = hypervolumes(front, ref_point_K), mean_inner_product(front, weights_WK)
        shape = (mean_regret(front, weights_WK), sparsity(front), spacing(front)) if steered else [np.full(len(front), np.nan)] * 3
        return np.stack([size, inner, *shape, mean_NS[:, weights_WK.size :].mean(axis=1)], axis=1)

    a_PS, b_PS = (_columns([pair[side] for pair in pairs], objectives) for side in (0, 1))
    a_BS, b_BS = (resampled_front(side.T[:, :, None], summary.indices)[:, :, 0] for side in (a_PS, b_PS))
    difference_BM = metrics(a_BS) - metrics(b_BS)
    p_M = swap_pvalues(a_PS, b_PS, metrics, n, summary.seed)
    for m, (name, adjusted) in enumerate(zip(COMPARED, holm(p_M), strict=True)):
        row["metrics"].append({"name": name, "difference": estimate(difference_BM[:, m]), "p": float(p_M[m]), "p_holm": float(adjusted)})
    return row


def distribution_rows(summary: Summary, named: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """Per objective the quantiles `QUANTILES` of the rewards of single responses: each method's with all weight on it, the
    reference's, in standard deviations of the reference's. Unscored responses are left out."""
    rows = []
    for k, objective in enumerate(summary.objectives):
        shown = {"reference": summary.reference} | {
            name: dict(ends(points))[k] for name, points in named.items() if k in dict(ends(points))
        }
        found = []
        for name, point in shown.items():
            scored = point.z_PSK[..., k][np.isfinite(point.z_PSK[..., k])]
            quantiles = np.quantile(scored, QUANTILES).tolist() if len(scored) else None
            found.append({"method": name, "cost": point.cost, "responses": len(scored), "quantiles": quantiles})
        rows.append({"objective": objective, "levels": list(QUANTILES), "methods": found})
    return rows


def _rounded(point: Point) -> tuple[float, ...]:
    """Weights as two methods may be asked for them, one in numbers and the other in text."""
    return tuple(round(w, 9) for w in point.weights or ())


def _columns(points: Sequence[Point], objectives: int) -> np.ndarray:
    """[P, W K + W]: the objectives at every weight vector, then the KL at each."""
    return np.concatenate([*(p.z_PK[:, :objectives] for p in points), np.stack([p.kl_P for p in points], axis=1)], axis=1)


def equal_length_rows(summary: Summary, named: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """The gain of each method's ends over the reference, in its own objective and of every judge, plain and at equal length."""
    rows = []
    split, reference = len(summary.objectives), summary.reference
    for name, points in named.items():
        for k, point in ends(points):
            gains = []
            for column in (k, *range(split, len(summary.names))):
                at_equal_BD = equal_length_difference(
                    point.z_PSK[..., column], point.length_PS, reference.z_PSK[..., column], reference.length_PS, summary.indices
                )
                found = {"gain": summary.gain(point, column), "equal_length": estimate(at_equal_BD[:, 0])}
                gains.append({"name": summary.names[column], **found, "slope": estimate(at_equal_BD[:, 1])})
            rows.append({"method": name, "objective": summary.objectives[k], "words": point.words, "gains": gains})
    return rows


def resampled(summary: Summary, points: Sequence[Point], columns: Sequence[int] | slice = slice(None)) -> np.ndarray:
    """The points' means of the objectives `columns`, of the data and of resampled prompts, [1 + n_boot, W, K].

    Raises `UserError` naming a method and an objective that its responses aren't scored on.
    """
    for k, name in enumerate(summary.objectives):
        if np.any([np.isfinite(p.z_PK[:, k]) for p in points], axis=0).sum() < 2:
            raise UserError(
                f"{points[0].method}: {name} scored its responses to fewer than two prompts; leave the method out, or the objective"
            )
    return resampled_front(np.stack([p.z_PK[:, : len(summary.objectives)][:, columns] for p in points]), summary.indices)


def weights_of(points: Sequence[Point], objectives: int) -> np.ndarray:
    """[W, K]; NaN of a point without weights, the reference's, so that nothing is asked of it."""
    return np.array([p.weights or [np.nan] * objectives for p in points])


def kl_of(summary: Summary, points: Sequence[Point]) -> dict[str, float]:
    """The mean over the points of the KL, nats per response."""
    return estimate(resampled_front(np.stack([p.kl_P for p in points])[..., None], summary.indices)[:, :, 0].mean(axis=1))


def cost_of(points: Sequence[Point]) -> float:
    """What a method's response costs, the mean over its points."""
    return float(np.mean([p.cost for p in points]))


def estimate(value_B: np.ndarray) -> dict[str, float]:
    """{mean, lo, hi} from an estimate in element 0 and its bootstrap in the rest."""
    return dict(zip(("mean", "lo", "hi"), interval_of(value_B), strict=True))
