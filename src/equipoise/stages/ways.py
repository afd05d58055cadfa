"""The ways to steer that settings can name: value heads, models to mix, reward models, adapters, prompts.

Each is known from the settings before anything is loaded; its guide is made for the policy once that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.runs import read_json
from equipoise.stages import common
from equipoise.types import Prompt, Request, Sampler, UserError

if TYPE_CHECKING:
    from equipoise.models.companions import Voice
    from equipoise.models.generation import Guide
    from equipoise.models.loading import LanguageModel
    from equipoise.objectives import Normaliser

_WEIGHTS = ("manifest.json", "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")

Settings = Mapping[str, Any]
"""Of a `sample` run; a record of an older version may lack the ways that are newer."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to steer: known before anything is loaded, but for the guide."""

    objectives: tuple[str, ...]
    """In the order of the weights."""
    parents: Mapping[str, Path]
    """Files that the steering rests on."""
    guide: Callable[[LanguageModel], Guide | None]
    """Made for the policy, once it is loaded; None where only the choice among its responses steers."""
    fixed: tuple[float, ...] | None = None
    """The weights that a policy was trained at, all that it can be steered by; None where a request brings its own."""
    goal: Callable[[Request], tuple[float, ...]] | None = None
    """Where a request brings scores of its own in place of weights: draws them, by its seed."""
    reference_measures: bool = False
    """Whether the reference's forward only measures the KL and names the candidates: the method itself can do without it."""
    over: Callable[[LanguageModel, Sampler], Sampler] | None = None
    """Chooses among the policy's responses, where that isn't one of the choices by weighted rewards."""


def _by_values(sampled: Settings) -> Way:
    from equipoise.decoding.value_guided import ValueModelGuide, make_guide
    from equipoise.models.steps import Sampling, branches
    from equipoise.models.value_heads import ValueHeads
    from equipoise.models.value_models import is_value_model, load_value_model

    folders = [Path(folder.strip()).expanduser() for folder in sampled["values"].split(",")]
    budget = sampled["kl_budget"]
    if budget is not None and sampled.get("beta", 1.0) != 1.0:
        raise UserError(f"beta={sampled['beta']:g} divides values where there is no budget, and kl_budget is {budget:g}: set it to null")
    strength = {"beta": sampled["beta"]} if budget is None else {"kl_budget": budget}
    if len(folders) > 1 or is_value_model(folders[0] / "model"):
        objectives = value_scale(folders).objectives

        def by_models(lm: LanguageModel) -> Guide:
            models = [load_value_model(folder / "model", dtype=sampled.get("value_dtype", "float32")) for folder in folders]
            return ValueModelGuide(lm, models, skip_above=sampled.get("skip_above", 1.0), **strength)

        parents = {f"values {i}" if i else "values": folder / "manifest.json" for i, folder in enumerate(folders)}
        return Way(objectives=objectives, parents=parents, guide=by_models)
    heads = ValueHeads.load(folders[0] / "values.safetensors")
    if sampled.get("skip_above", 1.0) != 1.0:
        raise UserError(f"skip_above={sampled['skip_above']:g} is for value models; {folders[0]} holds heads on the policy's own states")

    def guide(lm: LanguageModel) -> Guide:
        return make_guide(lm, heads, sampled["form"], branches(lm, Sampling(**sampled["sampling"])), **strength)

    return Way(objectives=heads.objectives, parents={"values": Path(sampled["values"]) / "manifest.json"}, guide=guide)


def value_scale(folders: Sequence[Path]) -> Normaliser:
    """Objectives and scale of value models, or of value heads, one after the other."""
    from equipoise.models.value_heads import ValueHeads
    from equipoise.models.value_models import HEADS, is_value_model
    from equipoise.objectives import join_scales

    files = [f / "model" / HEADS if is_value_model(f / "model") else f / "values.safetensors" for f in folders]
    return join_scales([ValueHeads.load(file).normaliser for file in files])


def _by_mixing(sampled: Settings) -> Way:
    from equipoise.decoding.logit_mixing import Divergence, mixing_guide
    from equipoise.models.loading import ADAPTER_CONFIG
    from equipoise.models.weighted_lora import route_adapters

    Divergence.parse(sampled["divergence"])
    scope = sampled.get("scope", "prefix")
    if scope not in ("prefix", "token"):
        raise UserError(f"models are mixed in the scope prefix or token, not {scope!r}")
    models = named("mixing", sampled["mixing"])
    folders = {name: Path(model).expanduser() for name, model in models.items()}

    def guide(lm: LanguageModel) -> Guide:
        # Adapters run in one forward on the policy's own weights.
        if all((folder / ADAPTER_CONFIG).exists() for folder in folders.values()):
            return mixing_guide(lm, route_adapters(lm, folders), sampled["divergence"], scope)
        tuned = {n: common.model_of(m, sampled["trust_remote_code"]) for n, m in models.items()}
        return mixing_guide(lm, tuned, sampled["divergence"], scope)

    # The reverse KL with weights that sum to 1 mixes the tuned models alone.
    return Way(objectives=tuple(models), parents=parents_of(models), guide=guide, reference_measures=sampled["divergence"] == "reverse_kl")


def _by_guides(sampled: Settings) -> Way:
    from equipoise.decoding.reward_guided import reward_guide
    from equipoise.models.loading import ADAPTER_TENSORS
    from equipoise.models.weighted_lora import load_weighted, read_header

    if len(sampled["guides"]) == 1 and "=" not in sampled["guides"][0]:
        path = Path(sampled["guides"][0]).expanduser()
        header = read_header(path)

        def by_one(lm: LanguageModel) -> Guide:
            return reward_guide(lm, load_weighted(common.model_of(header["model"], sampled["trust_remote_code"]), path), sampled["beta"])

        parents = {"guides": path / ADAPTER_TENSORS if path.is_dir() else path}
        return Way(objectives=tuple(header["objectives"]), parents=parents, guide=by_one)
    models = named("guides", sampled["guides"])

    def guide(lm: LanguageModel) -> Guide:
        return reward_guide(lm, {n: common.model_of(m, sampled["trust_remote_code"]) for n, m in models.items()}, sampled["beta"])

    return Way(objectives=tuple(models), parents=parents_of(models), guide=guide)


def _by_scorers(sampled: Settings) -> Way:
    from equipoise.decoding.scorer_guided import ScorerGuide
    from equipoise.models.scalar_heads import load_scorer

    folders = named("scorers", sampled["scorers"])

    def guide(lm: LanguageModel) -> Guide:
        return ScorerGuide(lm, {name: load_scorer(folder) for name, folder in folders.items()}, sampled["beta"])

    return Way(objectives=tuple(folders), parents=parents_of(folders), guide=guide)


def _by_messages(sampled: Settings) -> Way:
    from equipoise.decoding.reward_guided import prompt_guide

    def sides(text: str) -> tuple[str, str] | str:
        wanted, bar, unwanted = text.partition("|")
        return (wanted, unwanted) if bar else wanted

    messages = {name: sides(text) for name, text in named("messages", sampled["messages"]).items()}
    return Way(objectives=tuple(messages), parents={}, guide=lambda lm: prompt_guide(lm, messages, sampled["beta"]))


def _by_soup(sampled: Settings) -> Way:
    from equipoise.decoding.logit_mixing import tuned_guide
    from equipoise.models.companions import Voice
    from equipoise.models.weighted_lora import route_adapters

    folders = named("soup", sampled["soup"])

    def guide(lm: LanguageModel) -> Guide:
        routed = route_adapters(lm, {name: Path(folder).expanduser() for name, folder in folders.items()})
        return tuned_guide(lm, Voice(lm=routed, condition="weights"))

    return Way(objectives=tuple(folders), parents=parents_of(folders), guide=guide, reference_measures=True)


def _by_policy(sampled: Settings) -> Way:
    from equipoise.decoding.logit_mixing import tuned_guide
    from equipoise.models.companions import Voice
    from equipoise.models.conditions import weights_in_prompt
    from equipoise.models.loading import ADAPTER_CONFIG, WEIGHTED
    from equipoise.models.weighted_lora import load_weighted, read_header

    name, folder = sampled["policy"], Path(sampled["policy"]).expanduser()
    kind = read_json(folder / ADAPTER_CONFIG).get("peft_type") if (folder / ADAPTER_CONFIG).is_file() else None
    if kind == WEIGHTED:
        return Way(
            objectives=tuple(read_header(folder)["objectives"]),
            parents=parents_of({"policy": name}),
            guide=lambda lm: tuned_guide(lm, Voice(lm=load_weighted(lm, folder), condition="weights")),
            reference_measures=True,
        )
    objectives, weights = trained_at(folder)

    def guide(lm: LanguageModel) -> Guide:
        asked = weights_in_prompt(lm.tokenizer, objectives) if weights is None else None
        return tuned_guide(lm, tuned_voice(lm, name, sampled, asked), objectives)

    return Way(objectives=objectives, parents=parents_of({"policy": name}), guide=guide, fixed=weights, reference_measures=True)


def tuned_voice(lm: LanguageModel, name: str, sampled: Settings, asked: Callable[[Request], Prompt] | None = None) -> Voice:
    """A tuned policy: an adapter's folder, which shares the model's own weights, or another model; with prompts of its own, perhaps."""
    from equipoise.models.companions import Voice
    from equipoise.models.loading import ADAPTER_CONFIG
    from equipoise.models.weighted_lora import route_adapters

    folder = Path(name).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        return Voice(lm=route_adapters(lm, {"policy": folder}), asked=asked, condition=(1.0,))
    return Voice(lm=common.model_of(name, sampled["trust_remote_code"]), asked=asked)


def _by_context(sampled: Settings) -> Way:
    from equipoise.stages.in_context import context_way  # it stands on this module

    return context_way(sampled)


def trained_at(folder: Path) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """(objectives, weights) that the card of a policy's folder, or of the run around it, says; none where it says none.

    Weights None are those of a policy that reads them in its prompt.
    """
    from equipoise.objectives import named_weights

    for card in (folder / "card.json", folder.parent / "card.json"):
        said = read_json(card) if card.is_file() else {}
        if isinstance(said, dict) and said.get("objectives") and said.get("reads") == "prompt":
            return tuple(said["objectives"]), None
        if isinstance(said, dict) and said.get("objectives") and said.get("weights"):
            return tuple(said["objectives"]), named_weights(said["weights"], said["objectives"])
    return (), ()


def named(setting: str, entries: Sequence[str]) -> dict[str, str]:
    """Entries objective=WHAT by objective."""
    found = {name.strip(): what for name, _, what in (entry.partition("=") for entry in entries)}
    if len(found) < len(entries) or not all(found) or not all(found.values()):
        raise UserError(f"can't read {setting}={list(entries)}: write objective=WHAT once for each objective, as [helpful=A,harmless=B]")
    return found


def parents_of(models: Mapping[str, str]) -> dict[str, Path]:
    """A file by which each local model is known; a model of the Hub has none."""
    found = {}
    for name, model in models.items():
        files = [path for path in (Path(model).expanduser() / part for part in _WEIGHTS) if path.exists()]
        if files:
            found[f"model of {name}"] = files[0]
    return found


READ_BY = {
    "form": ("values",),
    "skip_above": ("values",),
    "value_dtype": ("values",),
    "divergence": ("mixing",),
    "scope": ("mixing",),
    "beta": ("values", "guides", "scorers", "messages"),
    "targets": ("in_context",),
    "span": ("in_context",),
    "share": ("in_context",),
}
"""Settings that some ways alone read."""

WAYS = {
    "values": _by_values,
    "mixing": _by_mixing,
    "guides": _by_guides,
    "scorers": _by_scorers,
    "messages": _by_messages,
    "soup": _by_soup,
    "policy": _by_policy,
    "in_context": _by_context,
}
