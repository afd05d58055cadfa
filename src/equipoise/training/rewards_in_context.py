"""Rewards-in-context: a model learns responses behind prompts that say how good each response is, on every objective.

    min_theta  -E log pi_theta(y | x, z_1, .., z_K)          z_k = (r_k(x, y) - mean_k) / sd_k, written into the prompt

so that scores that are asked for bring responses that have them. Offline: scored responses. Online, as often as wanted: ask for goals
(`goals.py`), sample, score, and learn what came with the scores that it got, the best of it (`Selection`), beside a part of the offline
rows. Every round starts from the last policy and keeps the first one's scale.

r: rewards in their own units; mean, sd: frozen, of a reference run (`normalise`), or as the released code has them, of the first
training's rows: rewards rounded to 0.1, sd over the population. z is rounded only where it is written.

Which rows are learnt, per run:
    any_quantile   z_k >= the quantile of z_k for any k: the released code's rule, which also keeps what is bad at everything else
    layers         the first L layers of the non-dominated order: layer 0 no row dominates, layer 1 none but those of layer 0, ..
    direction      of these layers, the rows nearest to each ray from the best of all objectives through best - (1 - w) (best - worst),
                   w on a grid of the simplex (ParetoHqD's preference directions, one model for all)

Papers: RiC, arXiv 2402.10207, and its released code; ParetoHqD, arXiv 2504.16628. Departures: one completion-only loss with the
token that ends a turn, except after responses that were cut; a round adds an adapter to the last one's in place of training it on;
fewer replayed rows than asked for are all there are; the filters see z unrounded; no rule against degenerate texts.
Reads: scored runs. Writes: what `training/sft.py` writes, and in_context.json. The weights enter: the prompt, when sampling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from equipoise.data.demonstrations import Demonstration
from equipoise.data.splits import opening
from equipoise.models.chat import special_strings
from equipoise.models.conditions import RELEASED, Wording
from equipoise.models.in_context import InContext, Scale
from equipoise.objectives import Normaliser, simplex_grid
from equipoise.rewards.scoring import ScoredRun
from equipoise.runs import Manifest
from equipoise.training import sft
from equipoise.training.policy import load_start
from equipoise.types import UserError

By = Literal["all", "any_quantile", "layers", "direction"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows of a run are learnt."""

    by: By = "all"
    """all, any_quantile, layers or direction."""
    quantile: float = 0.7
    """any_quantile: the quantile that one objective has to reach."""
    layers: int = 3
    """layers and direction: how many layers of the non-dominated order."""
    steps: int = 4
    """direction: rays at the weights that are multiples of 1/steps."""
    nearest: int = 100
    """direction: rows of each ray."""

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise UserError(f"rows are selected by {', '.join(get_args(By))}, not {self.by!r}")
        if not 0 <= self.quantile <= 1 or min(self.layers, self.steps, self.nearest) < 1:
            raise UserError(
                "a quantile lies between 0 and 1, and layers, steps and nearest are at least 1; got "
                f"{self.quantile:g}, {self.layers}, {self.steps} and {self.nearest}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training."""

    wording: Literal["named", "released"] = "named"
    """How scores are written: by the objectives' names in a line of their own, or as the released code does."""
    decimals: int = 1
    """Digits of the numbers in the prompts."""
    selection: Selection = field(default_factory=Selection)
    """Which rows are learnt, of every run and of what is replayed."""
    replay_rows: int = 10_000
    """Most selected rows of the replayed runs, drawn at random."""
    seen_rows: int = 4096
    """Most scores that are kept for targets, drawn at random."""
    seed: int = 0
    """Of both draws."""

    def __post_init__(self) -> None:
        if min(self.replay_rows, self.seen_rows) < 1:
            raise UserError(f"replay_rows and seen_rows must be at least 1, got {self.replay_rows} and {self.seen_rows}")


def released_normaliser(objectives: Sequence[str], reward_NK: Real[np.ndarray, "N K"]) -> Normaliser:
    """Mean and population sd (ddof 0) of the rewards rounded to 0.1, as the released code has them; NaN left out."""
    rounded_NK = np.asarray(reward_NK, dtype=np.float64).round(1)
    found, count_K = Normaliser.fit(objectives, rounded_NK), np.isfinite(rounded_NK).sum(axis=0)
    return replace(found, sd_K=tuple((np.array(found.sd_K) * np.sqrt((count_K - 1) / count_K)).tolist()))


def any_quantile(z_NK: Real[np.ndarray, "N K"], quantile: float) -> Bool[np.ndarray, " N"]:
    """Rows that reach the quantile of their column in at least one."""
    return (z_NK >= np.quantile(z_NK, quantile, axis=0)).any(axis=1)


def front_layers(z_NK: Real[np.ndarray, "N K"]) -> Int[np.ndarray, " N"]:
    """The layer of each row: 0 where no row dominates it, 1 where only those of layer 0 do, and so on; equal rows share one."""
    import moocore

    return np.asarray(moocore.pareto_rank(np.asarray(z_NK, dtype=np.float64), maximise=True), dtype=np.int64)


def ray_distances(z_NK: Real[np.ndarray, "N K"], weights_WK: Real[np.ndarray, "W K"]) -> Float[np.ndarray, "N W"]:
    """Distance of each row from the ray of each weight vector, all objectives scaled to [0, 1] over the rows.

    The ray runs from the ideal (1, .., 1) through w:  |d - (d.u) u|,  d = z - 1,  u = (w - 1) / |w - 1|. A constant objective is 1.
    """
    low_K, spread_K = z_NK.min(axis=0), np.ptp(z_NK, axis=0)
    d_NK = np.where(spread_K > 0, (z_NK - low_K) / np.where(spread_K > 0, spread_K, 1.0), 1.0) - 1.0
    u_WK = np.asarray(weights_WK, dtype=np.float64) - 1.0
    u_WK /= np.linalg.norm(u_WK, axis=1, keepdims=True)
    along_NW = d_NK @ u_WK.T
    return np.linalg.norm(d_NK[:, None] - along_NW[..., None] * u_WK, axis=2)


def selected(z_NK: Real[np.ndarray, "N K"], selection: Selection) -> Bool[np.ndarray, " N"]:
    """Which rows are learnt; a row that any objective left unscored never is."""
    mask_N = np.isfinite(z_NK).all(axis=1)
    known_NK = np.asarray(z_NK, dtype=np.float64)[mask_N]
    if selection.by == "all" or not len(known_NK):
        return mask_N
    wide = selection.by == "any_quantile"
    kept_N = any_quantile(known_NK, selection.quantile) if wide else front_layers(known_NK) < selection.layers
    if selection.by == "direction" and known_NK.shape[1] > 1:  # one objective has one direction
        rows = np.flatnonzero(kept_N)
        far_NW = ray_distances(known_NK[rows], np.array(simplex_grid(known_NK.shape[1], selection.steps)))
        near = np.argsort(far_NW, axis=0, kind="stable")[: selection.nearest]
        kept_N = np.isin(np.arange(len(known_NK)), rows[np.unique(near)])
    mask_N[mask_N] = kept_N
    return mask_N


def followed(goal_NK: Real[np.ndarray, "N K"], got_NK: Real[np.ndarray, "N K"]) -> dict[str, list[float]]:
    """How well goals were met, per objective: mean |asked - got|, and Spearman's correlation; NaN where all goals are equal."""
    from scipy.stats import spearmanr

    known_N = np.isfinite(got_NK).all(axis=1)
    goal, got = goal_NK[known_N], got_NK[known_N]
    ranks = [float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else np.nan for a, b in zip(goal.T, got.T, strict=True)]
    return {"error": np.abs(goal - got).mean(axis=0).tolist(), "spearman": ranks}


def scale_of(sources: Sequence[ScoredRun]) -> Scale:
    """The scale as released: of these rows. Raises `UserError` where they were scored by different scorers."""
    first = sources[0]
    objectives = first.rewards.objectives
    reward_NK = np.concatenate([source.reward_of(objectives) for source in sources])
    scale = Scale(normaliser=released_normaliser(objectives, reward_NK), scorers={name: first.scorers[name] for name in objectives})
    for source in sources:
        scale.check_scorers(source.scorers, str(source.folder))
    return scale


def scores_of(source: ScoredRun, scale: Scale) -> Float[np.ndarray, "N K"]:
    """z of a run's responses. Raises `UserError` where they were scored by other scorers than the scale's."""
    reward_NK = source.reward_of(scale.normaliser.objectives)
    scale.check_scorers(source.scorers, str(source.folder))
    return scale.normaliser(reward_NK)


def demonstrations(source: ScoredRun, z_NK: np.ndarray, mask_N: np.ndarray, record: InContext) -> list[Demonstration]:
    """The rows of the mask, each behind its prompt with the scores that it got."""
    made = []
    for row in np.flatnonzero(mask_N).tolist():
        response, z_K = source.responses[row], z_NK[row].tolist()
        plain = source.prompts[response.prompt_id]
        made.append(
            Demonstration(
                id=f"{source.folder}/{response.id}",
                prompt=record.asked(plain, z_K),
                response=response.text.strip(),
                finished=getattr(response, "finish_reason", "stop") == "stop",
                group=opening(plain),  # the rewritten prompt differs with every score, and would lie on both sides of the split
            )
        )
    return made


def written(config: Config, objectives: Sequence[str]) -> tuple[tuple[str, ...], Wording]:
    """(what the prompts call the objectives, how numbers are written)."""
    if config.wording == "released":
        return tuple(f"rm{k}_score" for k in range(1, len(objectives) + 1)), replace(RELEASED, decimals=config.decimals)
    return tuple(objectives), Wording(decimals=config.decimals)


def train(
    fresh: Sequence[ScoredRun],
    replay: Sequence[ScoredRun],
    scale: Scale,
    before: InContext | None,
    source: str,
    config: Config,
    sft_config: sft.Config,
    run: Manifest,
) -> Path:
    """Learn the selected rows of `fresh` runs and some of `replay`, and say how likely held-out responses are; returns the folder.

    `before` is the record of the policy that training starts from, if it reads scores already. Raises `UserError` where no row is left,
    where the numbers would be written in another way than before, and as `sft.train` does.
    """
    names, wording = written(config, scale.normaliser.objectives)
    if before and (before.names, replace(before.wording, specials=())) != (names, wording):
        reads = f"{', '.join(before.names)} with {before.wording.decimals} decimals"
        raise UserError(f"{source} reads {reads}: set ric.wording and ric.decimals to that, not {config.wording}, {config.decimals}")
    start = load_start(source, eight_bit=sft_config.eight_bit)
    wording = before.wording if before else replace(wording, specials=special_strings(start.lm.tokenizer))
    generator, counts = np.random.default_rng(config.seed), Counter[str]()
    found = [(one, scores_of(one, scale), again) for again, runs in ((False, fresh), (True, replay)) for one in runs]
    seen_NK = np.concatenate([z_NK[np.isfinite(z_NK).all(axis=1)] for _, z_NK, _ in found])
    kept = np.sort(generator.permutation(len(seen_NK))[: config.seen_rows])
    record = InContext(scale=scale, names=names, wording=wording, rows_NK=seen_NK[kept])
    rows: dict[bool, list[Demonstration]] = {False: [], True: []}
    for one, z_NK, again in found:
        said_N = np.array([bool(response.text.strip()) for response in one.responses])
        scored_N = np.isfinite(z_NK).all(axis=1)
        z_NK = np.where(said_N[:, None], z_NK, np.nan)
        mask_N = selected(z_NK, config.selection)
        counts.update({"blank response": int((~said_N).sum()), "unscored": int((said_N & ~scored_N).sum())})
        counts.update({"not selected": int((said_N & scored_N & ~mask_N).sum())})
        rows[again] += demonstrations(one, z_NK, mask_N, record)
    picked = np.sort(generator.permutation(len(rows[True]))[: config.replay_rows])
    counts.update({"not replayed": len(rows[True]) - len(picked)})
    examples = rows[False] + [rows[True][i] for i in picked]
    if not examples:
        raise UserError(f"no row of {', '.join(str(one.folder) for one in fresh)} is left to learn: {dict(counts)}")
    run.facts |= {"scale": scale.digest, "learnt": len(rows[False]), "replayed": len(picked), "left_out": dict(counts)}
    run.outputs.append(record.write(run.folder))
    return sft.train(examples, source, sft_config, run, start=start)
