"""SIPO: pairs whose objectives disagree are replaced by pairs that all of them agree on, made by the policies themselves.

For a pair (y_A, y_B) on which objectives conflict, candidates y come from mixed policies along a grid of weights, each perhaps
rewritten after a review. With scorers s and their rewards z_s, in standard deviations over the responses of the human pairs,

    gain_s(y) = z_s(y) - max(z_s(y_A), z_s(y_B))
    combine   a rewrite n replaces its sample m if   not_dominated: z_s(n) > z_s(m) for some s
                                                     no_worse:      z_s(n) >= z_s(m) for all s, > for some s
                                                     weighted_sum:  sum_s w_s z_s(n) > sum_s w_s z_s(m), w the sample's weights
                                                     (both: neither replaces, and both are candidates)
    accept    gain_s(y) > delta_s for all s
    choose    at most one accepted y per pair: the one of the largest mean, or of the largest smallest, gain_s
    relabel   (y over y_A) and (y over y_B), the same for every objective

and every objective's policy is trained on with DPO + alpha NLL on these (`train dpo --model`). Equal rewards keep the sample and
are no gain. What a scorer couldn't score replaces nothing and isn't accepted.

Paper: Li et al. 2025 (arXiv 2502.14354). The released code has `not_dominated`, delta = 0 and the mean over all scorers.
Departures: any number of objectives and scorers; margins, in units that compare; rewards per token as an option; a response
that ran into the cap is flagged, scored without the token that ends a turn, and left out unless asked for; pairs without a
conflict can be replayed; the same response is never on both sides of a pair.
Reads and writes: nothing; `stages/sipo.py` keeps the files. The weights enter: the logits of the samplers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from equipoise.data.splits import shuffled_ranks
from equipoise.types import LabelledPair, UserError

Rule = Literal["not_dominated", "no_worse", "weighted_sum", "both"]
Stage = Literal["human", "sample", "rewrite"]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A response on its way through the stages."""

    id: str
    """Of a pair's responses PAIR/0 and PAIR/1; else of the rollout."""
    prompt_id: str
    stage: Stage
    text: str
    finished: bool = True
    """Whether it ended by itself; without, it ran into the length cap and is scored without the token that ends a turn."""
    weights: tuple[float, ...] | None = None
    """At which the policies were mixed, in the order of the objectives."""
    parent_id: str | None = None
    """Of a rewrite: its sample."""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A pair and the response that is better than both of its own."""

    pair: LabelledPair
    candidate: Text
    gain_S: tuple[float, ...]
    """By scorer of the filter, in standard deviations."""


def human_texts(pairs: Sequence[LabelledPair]) -> list[Text]:
    """Both responses of every pair, next to each other."""
    return [
        Text(id=f"{p.id}/{side}", prompt_id=p.prompt.id, stage="human", text=p.responses[side], finished=p.finished[side])
        for p in pairs
        for side in (0, 1)
    ]


def combine(
    sample_NS: Float[np.ndarray, "N S"],
    rewrite_NS: Float[np.ndarray, "N S"],
    rule: Rule,
    weights_NK: Float[np.ndarray, "N K"] | None = None,
) -> Bool[np.ndarray, " N"]:
    """Whether each rewrite replaces its sample, by the rule in the module's docstring.

    A rewrite that a scorer couldn't score replaces nothing, and a sample that one couldn't score is replaced by any rewrite that all
    could. Only `weighted_sum` reads the weights; raises `UserError` where they are not one for each scorer.
    """
    scored_N, unscored_N = ~np.isnan(rewrite_NS).any(axis=1), np.isnan(sample_NS).any(axis=1)
    if rule == "not_dominated":
        better_N = (rewrite_NS > sample_NS).any(axis=1)
    elif rule == "no_worse":
        better_N = (rewrite_NS >= sample_NS).all(axis=1) & (rewrite_NS > sample_NS).any(axis=1)
    else:
        if weights_NK is None or weights_NK.shape != rewrite_NS.shape:
            got = "none" if weights_NK is None else str(weights_NK.shape[1])
            raise UserError(f"weighted_sum needs a weight for each of {rewrite_NS.shape[1]} scorers, got {got}: name one per objective")
        better_N = (weights_NK * (rewrite_NS - sample_NS)).sum(axis=1) > 0
    return scored_N & (unscored_N | better_N)


def gains(
    candidate_NS: Float[np.ndarray, "N S"], first_NS: Float[np.ndarray, "N S"], second_NS: Float[np.ndarray, "N S"]
) -> Float[np.ndarray, "N S"]:
    """By how much each candidate is above the better response of its pair, on each scorer; NaN where one of the three is unscored."""
    return candidate_NS - np.maximum(first_NS, second_NS)


def accept(gain_NS: Float[np.ndarray, "N S"], margin_S: Float[np.ndarray, " S"]) -> Bool[np.ndarray, " N"]:
    """Whether all gains are larger than their margins; an unscored one is not."""
    return np.all(gain_NS > margin_S, axis=1)


def best_of_groups(
    accepted_N: Bool[np.ndarray, " N"], score_N: Float[np.ndarray, " N"], groups: Sequence[str], ids: Sequence[str]
) -> list[int]:
    """The accepted row of the highest score of each group, groups in the order of their names; the smaller id wins a tie.

    Neither the order of the rows nor how groups are spread over calls changes which rows are chosen.
    """
    best: dict[str, int] = {}
    for row in np.flatnonzero(accepted_N).tolist():
        held = best.get(groups[row])
        if held is None or (-score_N[row], ids[row]) < (-score_N[held], ids[held]):
            best[groups[row]] = row
    return [best[group] for group in sorted(best)]


def combined(samples: Sequence[Text], rewrites: Sequence[Text], z: Mapping[str, Float[np.ndarray, " S"]], rule: Rule) -> list[Text]:
    """The candidates: each sample, or the rewrite of it where that replaces it, in the samples' order; with `both` all of them.

    `z` are the rewards by id; with `weighted_sum` one for each objective, in the order of the weights.
    """
    if rule == "both" or not rewrites:
        return [*samples, *rewrites]
    at = {sample.id: i for i, sample in enumerate(samples)}
    chosen, places = list(samples), [at[str(rewrite.parent_id)] for rewrite in rewrites]
    before_NS, after_NS = np.stack([z[samples[i].id] for i in places]), np.stack([z[rewrite.id] for rewrite in rewrites])
    weights_NK = np.array([rewrite.weights for rewrite in rewrites], dtype=np.float64) if rule == "weighted_sum" else None
    replaces_N = combine(before_NS, after_NS, rule, weights_NK)
    for rewrite, i, replaces in zip(rewrites, places, replaces_N, strict=True):
        # Equal texts may differ by rounding where they were scored in two batches.
        if replaces and rewrite.text != samples[i].text:
            chosen[i] = rewrite
    return chosen


@dataclass(frozen=True)
class Proposals:
    """Every candidate beside every pair of its prompt: N rows."""

    pairs: list[LabelledPair]
    candidates: list[Text]
    gain_NS: np.ndarray


def proposals(pairs: Sequence[LabelledPair], candidates: Sequence[Text], z: Mapping[str, Float[np.ndarray, " S"]]) -> Proposals:
    """The rows and their gains; `z` holds the rewards of the candidates and of the pairs' responses (PAIR/0, PAIR/1) by id."""
    by_prompt: dict[str, list[Text]] = defaultdict(list)
    for candidate in candidates:
        by_prompt[candidate.prompt_id].append(candidate)
    return _beside([(pair, candidate) for pair in pairs for candidate in by_prompt[pair.prompt.id]], z)


def chosen_rows(accepted: Sequence[Accepted], z: Mapping[str, Float[np.ndarray, " S"]]) -> Proposals:
    """The rows of the chosen candidates alone, perhaps with other scorers."""
    return _beside([(a.pair, a.candidate) for a in accepted], z)


def _beside(rows: Sequence[tuple[LabelledPair, Text]], z: Mapping[str, np.ndarray]) -> Proposals:
    if not rows:
        return Proposals([], [], np.zeros((0, 0)))
    candidate_NS, first_NS, second_NS = (
        np.stack([z[id] for id in ids]) for ids in ([c.id for _, c in rows], *([f"{p.id}/{side}" for p, _ in rows] for side in (0, 1)))
    )
    return Proposals([p for p, _ in rows], [c for _, c in rows], gains(candidate_NS, first_NS, second_NS))


def choose(
    found: Proposals, margin_S: Float[np.ndarray, " S"], by: Int[np.ndarray, " C"], score: Literal["mean", "worst"]
) -> tuple[list[Accepted], Bool[np.ndarray, " N"]]:
    """(the chosen candidate of each pair that has one, by pair id; which rows were accepted).

    `by`: the scorers whose mean, or smallest, gain chooses among the accepted candidates of a pair.
    """
    if not found.pairs:
        return [], np.zeros(0, dtype=bool)
    accepted_N = accept(found.gain_NS, margin_S)
    seen = found.gain_NS[:, by]
    score_N = seen.mean(axis=1) if score == "mean" else seen.min(axis=1)
    rows = best_of_groups(accepted_N, score_N, [p.id for p in found.pairs], [c.id for c in found.candidates])
    return [Accepted(pair=found.pairs[i], candidate=found.candidates[i], gain_S=tuple(found.gain_NS[i].tolist())) for i in rows], accepted_N


def relabelled(accepted: Sequence[Accepted]) -> list[LabelledPair]:
    """The accepted response over each of its pair's, on every objective: ids PAIR/over-0 and PAIR/over-1."""
    return [
        LabelledPair(
            id=f"{a.pair.id}/over-{side}",
            prompt=a.pair.prompt,
            responses=(a.candidate.text, a.pair.responses[side]),
            objectives=a.pair.objectives,
            label_K=(1.0,) * len(a.pair.objectives),
            finished=(a.candidate.finished, a.pair.finished[side]),
        )
        for a in accepted
        for side in (0, 1)
        if a.pair.responses[side] != a.candidate.text
    ]


def replayed(pairs: Sequence[LabelledPair], new: int, share: float, seed: int) -> list[LabelledPair]:
    """Pairs without a conflict that make up `share` of the training pairs when `new` others are there, or all there are; by id.

    round(new share / (1 - share)) of them, by the seed; of one seed a smaller share's are among a larger one's. Raises
    `UserError` for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise UserError(f"replay is a share of the training pairs, 0 to less than 1, got {share:g}")
    agreeing = sorted((p for p in pairs if not p.conflict and any(p.pair(o) for o in p.objectives)), key=lambda p: p.id)
    wanted = min(math.floor(new * share / (1 - share) + 0.5), len(agreeing))
    rank_N = shuffled_ranks([p.id for p in agreeing], seed)
    return [pair for pair, rank in zip(agreeing, rank_N, strict=True) if rank < wanted]


def rewritten(sample: Text, id: str, text: str, finished: bool) -> Text:
    """The rewrite of a sample, at the sample's weights."""
    return replace(sample, id=id, stage="rewrite", text=text, finished=finished, parent_id=sample.id)


def duplicates(texts: Sequence[Text]) -> float:
    """Share of the responses that repeat another one to the same prompt; NaN of none."""
    distinct = {(t.prompt_id, t.text) for t in texts}
    return 1 - len(distinct) / len(texts) if texts else math.nan
