"""The stage `train ric`, and what steers by a policy that reads scores in its prompt (rewards-in-context)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.goals import Targets, goal, target
from equipoise.models.in_context import RECORD, InContext, Scale
from equipoise.progress import say
from equipoise.rewards.scoring import ScoredRun
from equipoise.runs import manifest_of, read_json, stage
from equipoise.stages import common
from equipoise.stages.preferences import parents_of, trained_folder
from equipoise.stages.ways import Settings, Way, tuned_voice
from equipoise.stages.ways import parents_of as models_of
from equipoise.training import rewards_in_context as ric
from equipoise.training import sft
from equipoise.types import Prompt, Request, UserError

if TYPE_CHECKING:
    from equipoise.models.generation import Guide
    from equipoise.models.loading import LanguageModel


@dataclass(frozen=True, kw_only=True)
class TrainRiC:
    """Train a model on responses behind the scores that they got (rewards-in-context), offline or after an online round."""

    out: Path
    """Run folder to write."""
    runs: tuple[Path, ...]
    """Folders that `score` scored, whose selected responses are learnt: the first time the offline ones, later every online round's."""
    replay: tuple[Path, ...] = ()
    """Scored folders of which some responses are learnt again: the offline ones of a later round."""
    model: str = "smollm2"
    """What training starts from: "smollm2", a Hub id, a folder, a .gguf file, or the adapter of an earlier `train ric`."""
    normalisation: Path | None = None
    """Frozen statistics (`normalise`) that give the scores their scale; without, those of the first training's rows as released."""
    ric: ric.Config = field(default_factory=ric.Config)
    """Which responses are learnt, and how scores are written."""
    sft: sft.Config = field(default_factory=sft.Config)
    """Settings of the training."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("there is nothing to learn: give runs=[FOLDER] that `score` scored")


def train_ric(config: TrainRiC) -> Path:
    """Train and return the adapter's or the model's folder."""
    parents = parents_of((), config.model)
    fresh, replay = ([common.scored_run(folder) for folder in folders] for folders in (config.runs, config.replay))
    parents |= {f"rewards of {one.folder}": one.folder / "rewards" / "manifest.json" for one in (*fresh, *replay)}
    before = _before(config.model)
    if before:
        parents |= {f"model: {RECORD}": Path(config.model).expanduser().parent / RECORD}
    if config.normalisation:
        parents |= {"normalisation": config.normalisation}
    scale = _scale(config.normalisation, before, [*fresh, *replay])
    with stage(config.out, "train ric", common.settings_of(config), parents) as run:
        if not run.done:
            ric.train(fresh, replay, scale, before, config.model, config.ric, config.sft, run)
            run.facts |= {"followed": {str(one.folder): found for one in fresh if (found := _followed(one, scale))}}
    _say(manifest_of(config.out, "train ric")["facts"], read_json(config.out / "card.json")["held_out"], scale)
    return trained_folder(config.out)


def _say(facts: Mapping[str, Any], held_out: Mapping[str, Any], scale: Scale) -> None:
    say(f"{facts['learnt']} responses learnt and {facts['replayed']} replayed; left out: {facts['left_out']}")
    for name, found in facts["followed"].items():
        for objective, error, rank in zip(scale.normaliser.objectives, found["error"], found["spearman"], strict=True):
            related = "–" if rank is None else f"{rank:.2f}"
            say(f"{name}: {objective} came {error:.2f} sd from its goals on average, rank correlation {related}")
    for name in ("untrained", "trained"):
        low, high = held_out[name]["interval"]
        say(f"{name}: held-out perplexity {held_out[name]['perplexity']:.3g} [{low:.3g}, {high:.3g}]")


def _before(model: str) -> InContext | None:
    """The record of the run that trained this adapter or model, if it was `train ric`."""
    folder = Path(model).expanduser().parent
    return InContext.read(folder) if Path(model).expanduser().is_dir() and (folder / RECORD).is_file() else None


def _scale(normalisation: Path | None, before: InContext | None, sources: Sequence[ScoredRun]) -> Scale:
    """The scale of the numbers. Raises `UserError` where another one is asked for than the policy knows."""
    from equipoise.rewards.normalisation import Statistics

    if normalisation is None:
        return before.scale if before else ric.scale_of(sources)
    frozen = Statistics.read(normalisation)
    scorers = dict(zip(frozen.objectives, frozen.scorers, strict=True))
    scale = Scale(normaliser=frozen.normaliser(frozen.objectives, scorers), scorers=scorers)
    if before:
        before.scale.check(scale, str(normalisation))
    return scale


def _followed(run: ScoredRun, scale: Scale) -> Mapping[str, Any] | None:
    """How well the goals of an online round were met; None for other runs."""
    path = run.folder / "manifest.json"
    if not path.is_file() or not read_json(path)["config"].get("goals"):
        return None
    goal_NK = np.array([getattr(response, "weights", None) for response in run.responses], dtype=np.float64)
    return ric.followed(goal_NK, ric.scores_of(run, scale))


def scores_at(record: InContext, weights: Sequence[float], targets: Targets) -> tuple[float, ...]:
    """The scores that a policy is asked for at these weights."""
    return tuple(target(np.array(weights), record.rows_NK, targets).tolist())


def in_context_parents(folder: Path) -> dict[str, Path]:
    """The files that a policy of `train ric` rests on."""
    return {RECORD: folder / RECORD, **models_of({"policy": str(trained_folder(folder))})}


def context_way(sampled: Settings) -> Way:
    """Steering by a policy that reads scores: those of a request's weights, or goals that it draws for itself."""
    from equipoise.decoding.logit_mixing import tuned_guide

    folder, goals = Path(sampled["in_context"]).expanduser(), sampled.get("goals")
    record, policy = InContext.read(folder), str(trained_folder(folder))
    targets = Targets(rule=sampled["targets"], span=sampled["span"], share=sampled["share"])

    def drawn(request: Request) -> tuple[float, ...]:
        assert goals, "drawn where there are goals alone"
        # Another stream than the tokens', which begin at the same seed.
        found = goal(goals, np.random.default_rng([request.seed, 1]), record.rows_NK, targets)
        return tuple(found.round(record.wording.decimals).tolist())

    @functools.cache
    def scores(weights: tuple[float, ...]) -> tuple[float, ...]:
        return weights if goals else scores_at(record, weights, targets)

    def asked(request: Request) -> Prompt:
        assert request.weights is not None, "a request without weights is the reference's"
        return record.asked(request.prompt, scores(request.weights))

    def guide(lm: LanguageModel) -> Guide:
        return tuned_guide(lm, tuned_voice(lm, policy, sampled, asked), record.objectives)

    return Way(
        objectives=record.objectives,
        parents=in_context_parents(folder),
        guide=guide,
        fixed=() if goals else None,
        goal=drawn if goals else None,
        reference_measures=True,
    )
