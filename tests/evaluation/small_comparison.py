"""A comparison whose numbers can be worked by hand: the reference at 0 on every objective, methods where they are put."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.evaluation.summary import Point, Summary
from equipoise.evaluation.sweep import Scored
from equipoise.objectives import Normaliser
from equipoise.types import Rollout

PROMPTS = ("p", "q")
OBJECTIVES = ("helpful", "harmless", "brief")


def rollout(prompt: str, index: int, text: str = "well then", kl: float = 0.0, cost: int = 1) -> Rollout:
    """A response of `cost` times a plain one."""
    return Rollout(
        id=f"{prompt}{index}", prompt_id=prompt, tokens=(1, 2), text=text, text_tokens=2, logprobs=(-1.0, -1.0), ref_logprobs=(-1.0, -1.0),
        kl=kl, kl_floor=0.0, finish_reason="stop", weights=None, seed=index, base_forwards=10 * cost,
    )  # fmt: skip


def scored(
    method: str,
    weights: Sequence[float] | None,
    reward_NK: Sequence[Sequence[float]],
    kl: float = 0.0,
    cost: int = 1,
    texts: Sequence[str] = (),
) -> Scored:
    """Rows of rewards, as many for each prompt in turn; one row stands for both prompts."""
    rows = [list(r) for r in reward_NK] * (2 if len(reward_NK) == 1 else 1)
    each = len(rows) // len(PROMPTS)
    said = texts or ["well then"] * len(rows)
    rollouts = [rollout(PROMPTS[i // each], i % each, said[i], kl, cost) for i in range(len(rows))]
    source = f"{method}/{'all' if weights is None else weights}"
    return Scored(method, None if weights is None else tuple(weights), rollouts, np.array(rows, dtype=np.float64), OBJECTIVES, 1.0, source)


def summary_of(reference: Scored) -> Summary:
    """In the rewards' own units."""
    scale = Normaliser(objectives=OBJECTIVES, mean_K=(0.0,) * 3, sd_K=(1.0,) * 3)
    return Summary(reference, scale, n_boot=20, seed=0)


def placed(summary: Summary, method: str, places: Sequence[tuple[Sequence[float], Sequence[float], float]], cost: int = 1) -> list[Point]:
    """(weights, mean rewards, KL) of each of a method's points."""
    return [summary.point(scored(method, weights, [reward], kl, cost)) for weights, reward, kl in places]
