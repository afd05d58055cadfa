"""What chooses a `sample` run's responses, read from its settings: the best or one of n, judged segments or blocks, beams."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.decoding.beam import Beams, BeamSampler
from equipoise.decoding.choosing import ChoosingSampler, WeightedRewards
from equipoise.decoding.rejection import Segments, SegmentSampler
from equipoise.decoding.value_guided import PolicySampler
from equipoise.models.generation import Guide, Sampling
from equipoise.types import Sampler, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel

HOW = ("best_of", "resampling", "rejection", "blocks", "beam")
_READ_BY = {
    "n": ("best_of", "resampling", "blocks"),
    "beta": ("resampling",),
    "block": ("blocks",),
    "segments": ("rejection",),
    "beams": ("beam",),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a response is chosen among proposals of the policy, steered or not."""

    how: str = ""
    """best_of, resampling, rejection, blocks or beam; empty takes what is drawn first."""
    rewards: tuple[str, ...] = ()
    """Scorers that choose, in the order of the weights; objective=SCORER renames one. Beams need none."""
    scale: str = ""
    """Statistics of `normalise`, by which the rewards are standardised; empty takes them as they are."""
    n: int = 4
    """Candidates of best_of and resampling, proposals of each block."""
    beta: float = 0.5
    """Of resampling, in units of the weighted reward."""
    block: int = 16
    """Tokens of a block."""
    segments: Segments = field(default_factory=lambda: Segments(threshold=1.0))
    """Of rejection."""
    beams: Beams = field(default_factory=Beams)
    """Of beam."""

    def __post_init__(self) -> None:
        if self.how and self.how not in HOW:
            raise UserError(f"unknown choice {self.how!r}; known: {', '.join(HOW)}")
        if bool(self.rewards) != (self.how in HOW[:-1]):
            raise UserError(
                f"a choice by {', '.join(HOW[:-1])} needs rewards, and nothing else does; got how={self.how!r} and {self.rewards}"
            )
        if self.scale and not self.rewards:
            raise UserError(f"the scale {self.scale} is of rewards, and none are named")
        for name in ("n", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        for name, readers in _READ_BY.items():
            if self.how not in readers and getattr(self, name) != defaults[name]:
                raise UserError(f"choice.{name} is read where how is {' or '.join(readers)}, not where it is {self.how!r}")


def choice_of(sampled: Mapping[str, Any]) -> Choice | None:
    """The choice of a run's settings; None where it takes what is drawn, as all runs of older versions."""
    found = sampled.get("choice") or {}
    if not found.get("how"):
        return None
    # A manifest has null for infinity.
    segments: dict[str, Any] = {name: math.inf if value is None else value for name, value in found["segments"].items()}
    nested = {"segments": Segments(**segments), "beams": Beams(**found["beams"]), "rewards": tuple(found["rewards"])}
    return Choice(**{**found, **nested})


def choosing_parents(choice: Choice) -> dict[str, Path]:
    """The files that a choice rests on."""
    from equipoise.rewards import artefacts

    files = {f"choice: {file}": file for file in artefacts(choice.rewards)}
    return files | ({"scale of the choice": Path(choice.scale).expanduser()} if choice.scale else {})


def choosing_objectives(choice: Choice, steered: Sequence[str] | None) -> tuple[str, ...]:
    """The objectives that the weights are for. Raises `UserError` where the choice and what steers have different ones."""
    from equipoise.rewards import parse_name

    named = tuple(parse_name(entry)[0] for entry in choice.rewards)
    if steered is not None and named and tuple(steered) != named:
        raise UserError(f"the choice is by {', '.join(named)}, the steering by {', '.join(steered)}: name the same, in the same order")
    return named or tuple(steered or ())


def choosing_sampler(lm: LanguageModel, choice: Choice, sampling: Sampling, guide: Guide | None) -> Sampler:
    """The sampler that chooses."""
    if choice.how == "beam":
        return BeamSampler(lm=lm, sampling=sampling, beams=choice.beams, guide=guide)
    rewards = choosing_rewards(lm, choice)
    if choice.how in ("rejection", "blocks"):
        segments = choice.segments if choice.how == "rejection" else Segments.blocks(choice.block, choice.n)
        return SegmentSampler(lm=lm, sampling=sampling, segments=segments, rewards=rewards, guide=guide)
    return one_of_n(PolicySampler(lm, sampling, guide), rewards, choice, sampling.greedy)


def one_of_n(inner: Sampler, rewards: WeightedRewards, choice: Choice, greedy: bool) -> Sampler:
    """Best-of-n or resampling over a sampler. Raises `UserError` for greedy candidates."""
    if greedy and choice.n > 1:
        raise UserError(f"greedy candidates are all the same: set greedy to false, or n to 1, not {choice.n}")
    return ChoosingSampler(inner=inner, rewards=rewards, n=choice.n, beta=choice.beta if choice.how == "resampling" else None)


def choosing_rewards(lm: LanguageModel | None, choice: Choice) -> WeightedRewards:
    """The rewards that choose, on their scale; `lm` is behind those that read states."""
    from equipoise.rewards import load_rewards, parse_name
    from equipoise.rewards.normalisation import Statistics

    rewards = load_rewards(choice.rewards, lm)
    if not choice.scale:
        return WeightedRewards(rewards=rewards)
    known = {r.name: getattr(r, "identity", parse_name(entry)[1]) for entry, r in zip(choice.rewards, rewards, strict=True)}
    scale = Statistics.read(Path(choice.scale).expanduser()).normaliser([r.name for r in rewards], known)
    return WeightedRewards(rewards=rewards, normaliser=scale)
