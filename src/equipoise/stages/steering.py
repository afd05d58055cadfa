"""What steers a `sample` run, read from its settings, and the sampler that they make.

The settings are those that a manifest keeps, so that a later stage draws as an earlier one did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from equipoise.stages import common
from equipoise.stages.upstream import Upstream, upstream_sampler
from equipoise.stages.ways import READ_BY, WAYS, Settings, Way
from equipoise.types import Sampler, UserError

if TYPE_CHECKING:
    from equipoise.models.generation import Guide
    from equipoise.models.loading import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Steer:
    """What a policy is steered by; nothing for the reference."""

    values: str = ""
    """Values to steer with: a `train value` folder, or `train value_model` folders with commas between; empty for the reference."""
    form: str = "single-pass"
    """Form of value heads: single-pass or prefix."""
    kl_budget: float | None = 1.0
    """Nats per response that steering by values may spend; null to divide the values by beta instead."""
    skip_above: float = 1.0
    """Value models are not asked where the likeliest candidate has more than this share of the candidates' mass."""
    value_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of value models; bfloat16 is about twice as fast at large batches, and rounding may then move a draw."""
    mixing: tuple[str, ...] = ()
    """Tuned models to mix instead (MOD), as [helpful=MODEL,harmless=MODEL]; folders of adapters run in one forward."""
    divergence: str = "reverse_kl"
    """With which they were tuned: reverse_kl, forward_kl, jsd or alpha:A."""
    scope: str = "prefix"
    """Mix by the probabilities of whole prefixes, as the paper, or of each token alone: prefix or token."""
    guides: tuple[str, ...] = ()
    """Reward models to steer with instead (GenARM), as [helpful=MODEL,..]; or one file of adapters that read weights (PARM)."""
    scorers: tuple[str, ...] = ()
    """Reward or value models that read every candidate instead (ARGS, VAS, controlled decoding), as [helpful=FOLDER,..]."""
    soup: tuple[str, ...] = ()
    """Adapters whose weighted sum to sample from instead, as [helpful=FOLDER,harmless=FOLDER]."""
    policy: str = ""
    """A tuned policy to sample instead, priced against the model: a folder or Hub id; weights only if it reads them."""
    in_context: str = ""
    """A policy that reads scores in its prompt, to be asked for those of the weights instead: a `train ric` folder."""
    targets: str = "joint"
    """in_context: how weights become scores: joint, linear, linf or lp:P."""
    span: str = "quantiles"
    """in_context, but for joint: between which scores: quantiles or extremes of what was seen, or released."""
    share: float = 0.1
    """in_context: a target is the mean of such a share of what was seen; 0 for targets that may be out of reach."""
    messages: tuple[str, ...] = ()
    """System messages to steer with instead, as [helpful=FOR,harmless=FOR|AGAINST]."""
    beta: float = 1.0
    """Divides the log-probabilities that guides and messages add, scorers' values, and values where kl_budget is null."""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """A way and where it leads."""

    way: Way
    weights: tuple[float, ...]


def steering_of(sampled: Settings) -> Steering | None:
    """The steering that the settings ask for, None for the reference.

    Raises `UserError` for two ways at once, steering without weights or weights without steering, and what isn't objective=WHAT.
    """
    from equipoise.objectives import parse_weights

    way = weighted_way(sampled)
    if way and way.fixed is not None:
        return Steering(way=way, weights=way.fixed)
    return Steering(way=way, weights=parse_weights(sampled["weights"], way.objectives)) if way else None


def weighted_way(sampled: Settings) -> Way | None:
    """`way_of`, with weights that are there just where the way needs them; what they say isn't looked at."""
    from equipoise.objectives import weight_label

    way = way_of(sampled)
    fixed = way is not None and way.fixed is not None
    if way and way.fixed is not None and sampled["weights"]:
        said = f"was trained at {weight_label(way.objectives, way.fixed)}" if way.fixed else "has no weights of its own"
        what = "a policy that is asked for goals" if way.goal else f"the policy {sampled['policy']}"
        raise UserError(f"{what} {said} and takes none: leave weights away")
    if bool(way) != bool(sampled["weights"]) and not fixed:
        raise UserError(f"steering needs both weights and one of {', '.join(WAYS)}; sampling the reference needs neither")
    return way


def way_of(sampled: Settings) -> Way | None:
    """The way to steer that the settings name, None where they name none. Raises `UserError` for two at once."""
    from equipoise.stages.choosing import choice_of

    asked = [name for name in WAYS if sampled.get(name)]
    if len(asked) > 1:
        raise UserError(f"steering goes one way at a time, got {' and '.join(asked)}")
    for f in fields(Steer):
        readers = READ_BY.get(f.name, ())
        if readers and not set(asked) & set(readers) and sampled.get(f.name, f.default) != f.default:
            raise UserError(f"{f.name}={sampled[f.name]} is read beside {' or '.join(readers)} alone: leave it away")
    if sampled.get("goals") and (asked != ["in_context"] or choice_of(sampled)):
        raise UserError("goals are for a policy that reads scores alone: set in_context, and no choice among its responses")
    return _chosen(sampled, WAYS[asked[0]](sampled) if asked else None)


def _chosen(sampled: Settings, way: Way | None) -> Way | None:
    """The way with what the choice among responses adds to it."""
    from equipoise.stages.choosing import choice_of, choosing_objectives, choosing_parents

    choice = choice_of(sampled)
    if choice is None or (way is None and not choice.rewards):
        return way
    weightless = way is not None and way.fixed == ()
    objectives, parents = choosing_objectives(choice, way.objectives if way and not weightless else None), choosing_parents(choice)
    if way is None:
        return Way(objectives=objectives, parents=parents, guide=lambda lm: None)
    if weightless and objectives:  # the weights are the choice's: to the policy they are all the same
        return replace(way, objectives=objectives, parents={**way.parents, **parents}, guide=renamed(way, objectives), fixed=None)
    return replace(way, objectives=objectives, parents={**way.parents, **parents})


def renamed(way: Way, objectives: tuple[str, ...]) -> Callable[[LanguageModel], Guide]:
    """The guide of a policy that is the same whatever the weights say, under these objectives."""

    def guide(lm: LanguageModel) -> Guide:
        made = way.guide(lm)
        assert made is not None, "a tuned policy is a guide"
        made.objectives = objectives
        return made

    return guide


def model_for(sampled: Settings) -> LanguageModel | None:
    """The model of these settings; where an upstream draws, only if rewards that choose read its states."""
    from equipoise.rewards import needs_model
    from equipoise.stages.choosing import choice_of

    choice = choice_of(sampled)
    if sampled.get("upstream") and not (choice and needs_model(choice.rewards)):
        return None
    return common.model_of(sampled["model"], sampled["trust_remote_code"])


def sampler_of(lm: LanguageModel | None, sampled: Settings, steering: Steering | None, upstream: Upstream | None = None) -> Sampler:
    """The sampler of these settings, steered by `steering_of` the same ones; `lm` is `model_for` them.

    `upstream` says how a server is asked, where that isn't as by default. Raises `UserError` for more candidates per token than
    there are tokens.
    """
    from equipoise.decoding.value_guided import PolicySampler
    from equipoise.models.generation import Sampling, known_tokens
    from equipoise.stages.choosing import choice_of, choosing_sampler

    sampling, choice = Sampling(**sampled["sampling"]), choice_of(sampled)
    if sampled.get("upstream"):
        return upstream_sampler(upstream or Upstream(**sampled["upstream"]), sampling, choice, lm)
    assert lm is not None, "only an upstream draws without a model"
    if sampling.top_k > known_tokens(lm.tokenizer):
        raise UserError(f"top_k={sampling.top_k} is more than the {known_tokens(lm.tokenizer)} tokens of {lm.name!r}: 0 takes all of them")
    guide = steering.way.guide(lm) if steering else None
    sampler = choosing_sampler(lm, choice, sampling, guide) if choice else PolicySampler(lm, sampling, guide)
    return steering.way.over(lm, sampler) if steering and steering.way.over else sampler
