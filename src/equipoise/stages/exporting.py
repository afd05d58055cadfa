"""The stage `export`: what other engines can serve of a policy that follows weights, with the commands that serve it.

| policy | vLLM, SGLang, LoRAX | llama.cpp |
|---|---|---|
| a soup of adapters | a LoRA per weight vector, the exact sum | the adapters; w_k are their scales in a request |
| adapters that read weights | a LoRA per weight vector, W + s B C(w) A with C(w) in A | dW_0 .. dW_K; the scales are 1, w_1 .. w_K |
| weights or scores in the prompt | the policy, and what follows the user's text at each weight vector | the same |

A LoRA's rank is padded with zeros to one that vLLM takes. Writes: the LoRA folders, export.json (name -> weights and what serves
them) and README.md with commands, which nobody ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from equipoise.goals import Targets
from equipoise.objectives import parse_weights
from equipoise.progress import bar, say
from equipoise.runs import plain, read_json, stage, write_json, write_text
from equipoise.stages import common
from equipoise.stages.export_text import lora_folders, readme
from equipoise.stages.soups import adapter_files, weight_points
from equipoise.stages.ways import named, parents_of, trained_at
from equipoise.training.soup import Config as SoupConfig
from equipoise.training.soup import extrapolated, solve_tensors
from equipoise.types import Message, Prompt, Request, UserError

if TYPE_CHECKING:
    from equipoise.models.adapters import Layers
    from equipoise.models.loading import Base

RECORD = "export.json"
_EMPTY = Prompt(id="export", messages=(Message(role="user", content=""),))
Point = tuple[float, ...]
"""Weights of the objectives, in order."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write what another engine can serve of a policy that follows weights, and the commands."""

    out: Path
    """Run folder to write."""
    engine: Literal["vllm", "sglang", "lorax", "llama.cpp"]
    """What is to serve it."""
    soup: tuple[str, ...] = ()
    """LoRA adapters of one model, as [helpful=FOLDER,harmless=FOLDER]."""
    policy: str = ""
    """A policy that reads weights instead, in its adapters or its prompt: its folder."""
    in_context: str = ""
    """A policy that reads scores in its prompt instead: a `train ric` folder."""
    targets: Targets = field(default_factory=Targets)
    """in_context: how weights become scores."""
    model: str = ""
    """What the engine loads under the adapters: "smollm2", a Hub id, a folder or a .gguf file; empty for what they were trained on."""
    steps: int = 4
    """The weights are multiples of 1/steps."""
    weights: tuple[str, ...] = ()
    """These weights instead, as ["0.7,0.3","helpful=1,harmless=0"]; those of a soup need not sum to 1."""
    rank: int = 0
    """Cut what is written to this rank, where it has more; 0 keeps it whole."""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.soup, self.policy, self.in_context))) != 1:
            raise UserError("what is exported is one of soup, policy and in_context: give one of the three")
        if self.targets != Targets() and not self.in_context:
            raise UserError("targets are read beside in_context alone: leave them away")
        SoupConfig(rank=self.rank)


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """A policy whose parameters follow the weights."""

    objectives: tuple[str, ...]
    parents: Mapping[str, Path]
    base: Base
    """Of which the adapters are, as far as they say."""
    task: str | None
    transposed: bool
    parts: Mapping[str, Layers]
    """The update at weights w is the sum of these, those of objectives times w_k."""
    at: Callable[[Point], tuple[Sequence[Layers], Sequence[float]]]
    """The same as fewer or smaller LoRAs, and what each is multiplied by."""
    simplex: bool
    """Whether the policy knows no other weights than those of the simplex."""


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A policy that reads its prompt."""

    objectives: tuple[str, ...]
    parents: Mapping[str, Path]
    folder: Path
    """Of an adapter or a model."""
    asked: Callable[[Point], tuple[Prompt, Mapping[str, Any]]]
    """An empty request as the policy is to read it, and what more is to be said of it."""
    guarded: Sequence[str]
    """What a user's text must not hold."""


def export(config: Export) -> Path:
    """Write the adapters or prompts, the record and the commands; returns the run folder.

    Raises `UserError` for adapters of another model, weights that the policy doesn't know, and ranks that no engine takes.
    """
    policy = _soup(config) if config.soup else _policy(config) if config.policy else _in_context(config)
    points = weight_points(config.weights, config.steps, policy.objectives)
    if isinstance(policy, Prompted) or policy.simplex:
        points = {label: parse_weights(weights, policy.objectives) for label, weights in points.items()}
    with stage(config.out, "export", common.settings_of(config), policy.parents) as run:
        if not run.done:
            made = _prompts(config, policy, points) if isinstance(policy, Prompted) else _adapters(config, policy, points)
            record = plain({"engine": config.engine, "objectives": policy.objectives, **made})
            write_json(run.folder / RECORD, record)
            write_text(run.folder / "README.md", readme(record, run.folder))
            folders = [run.folder / name for name in lora_folders(record).values()]
            run.outputs += [run.folder / RECORD, run.folder / "README.md"]
            run.outputs += [path for folder in folders for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
            run.facts |= {"served": len(points)}
            if config.engine == "llama.cpp" and lora_folders(record):
                say(
                    "llama.cpp reads adapters as GGUF, which its convert_lora_to_gguf.py makes of these folders: README.md has the commands"
                )
    return config.out


def _adapters(config: Export, policy: Adapters, points: Mapping[str, Point]) -> dict[str, Any]:
    """Write the LoRAs; returns what the record says."""
    base = _base(config.model, policy.base)
    how = {"base": base, "task": policy.task, "transposed": policy.transposed}
    served: dict[str, dict[str, Any]] = {}
    for label, weights in points.items():
        served[label] = {"weights": _by_name(policy, weights), "extrapolated": extrapolated(weights)}
    said = {**_model(config.engine, base.name), "base": base, "served": served}
    if config.engine == "llama.cpp":
        parts: dict[str, dict[str, Any]] = {}
        for number, (name, layers) in enumerate(policy.parts.items()):
            parts[name] = {"id": number, **_write(config, f"part{number}", [layers], (1.0,), how)}
        for one in served.values():
            one["lora"] = [{"id": part["id"], "scale": one["weights"].get(name, 1.0)} for name, part in parts.items()]
        return {**said, "parts": parts}
    with bar(f"{len(points)} adapters of {', '.join(policy.objectives)}", len(points)) as advance:
        for label, weights in points.items():
            served[label] |= _write(config, label, *policy.at(weights), how)
            advance(1)
    most = max(one["padded"] for one in served.values())
    return {**said, "max_lora_rank": most, "modules": _modules(policy.parts.values())}


def _prompts(config: Export, policy: Prompted, points: Mapping[str, Point]) -> dict[str, Any]:
    """Write the policy, where it is an adapter; returns what the record says."""
    from equipoise.models.adapters import read_adapter
    from equipoise.models.loading import ADAPTER_CONFIG

    said: dict[str, Any] = {"guarded": policy.guarded, "served": {}}
    for label, weights in points.items():
        prompt, more = policy.asked(weights)
        said["served"][label] = {"weights": _by_name(policy, weights), **more, "suffix": prompt.text}
    if not (policy.folder / ADAPTER_CONFIG).is_file():
        return {**_model(config.engine, str(policy.folder)), **said}
    found = read_adapter(policy.folder)
    base = _base(config.model, found.base)
    how = {"base": base, "task": found.task, "transposed": found.transposed}
    adapter = _write(config, "policy", [found.layers], (1.0,), how)
    said |= {"max_lora_rank": adapter["padded"], "modules": _modules([found.layers]), "adapter": adapter}
    return {**_model(config.engine, base.name), "base": base, **said}


def _write(config: Export, folder: str, parts: Sequence[Layers], weights: Sequence[float], how: Mapping[str, Any]) -> dict[str, Any]:
    """Write the weighted sum of LoRAs as one; returns what the record says of it. Raises `UserError` for a rank that no engine takes."""
    from equipoise.models.adapters import SERVED_RANKS, served_rank, write_adapter

    layers, found = solve_tensors(parts, weights, SoupConfig(rank=config.rank))
    rank = max(down.shape[0] for down, _ in layers.values())
    least = 0 if config.engine == "llama.cpp" else served_rank(rank)
    if least is None:
        most = SERVED_RANKS[-1]
        raise UserError(f"the adapter has rank {rank}, and engines take {most} at most: cut it with --rank {most}")
    return {"folder": folder, "rank": rank, "padded": write_adapter(config.out / folder, layers, least=least, **how), "error": found.error}


def _by_name(policy: Adapters | Prompted, weights: Point) -> dict[str, float]:
    return dict(zip(policy.objectives, weights, strict=True))


def _modules(parts: Iterable[Layers]) -> list[str]:
    return sorted({name.rpartition(".")[2] for layers in parts for name in layers})


def _base(model: str, said: Base) -> Base:
    """What the engine loads. Raises `UserError` where it isn't known, or not what the adapters were trained on."""
    from equipoise.models.loading import base_named

    name = model or said.name
    if not name:
        raise UserError("the adapters don't say which model they are for: give --model")
    given = base_named(name)
    if said.key and given.key and said.key != given.key:
        raise UserError(f"the adapters were trained on {said.name!r} ({said.key[-12:]}), not on the weights of {name!r}: name that model")
    return given


def _model(engine: str, name: str) -> dict[str, str]:
    """What the engine is told to load: a folder or Hub id, and the GGUF file where llama.cpp has one."""
    from equipoise.models.loading import packaged_smollm2, resolve

    found = resolve(name)[0]
    said = {"model": str(Path(found).absolute()) if Path(found).is_dir() else found}
    gguf = packaged_smollm2() if name == "smollm2" else Path(name).expanduser()
    if engine == "llama.cpp" and gguf and gguf.suffix == ".gguf":
        said["gguf"] = str(gguf.absolute())
    return said


def _soup(config: Export) -> Adapters:
    from equipoise.models.adapters import common_base, read_adapter

    folders = {name: Path(folder).expanduser() for name, folder in named("soup", config.soup).items()}
    adapters = [read_adapter(folder) for folder in folders.values()]
    return Adapters(
        objectives=tuple(folders),
        parents={f"{name}: {file.name}": file for name, folder in folders.items() for file in adapter_files(folder)},
        base=common_base(adapters),
        task=adapters[0].task,
        transposed=adapters[0].transposed,
        parts={name: adapter.layers for name, adapter in zip(folders, adapters, strict=True)},
        at=lambda weights: ([adapter.layers for adapter in adapters], weights),
        simplex=False,
    )


def _policy(config: Export) -> Adapters | Prompted:
    """A folder whose adapters read weights, or whose card says that its prompt does. Raises `UserError` for others."""
    from equipoise.models.conditions import guarded, special_strings, weights_in_prompt
    from equipoise.models.loading import ADAPTER_CONFIG, WEIGHTED, base_of, load_tokenizer

    folder = Path(config.policy).expanduser()
    if not folder.is_dir():
        raise UserError(f"no policy folder at {config.policy}: name what `train` wrote")
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if adapter and read_json(folder / ADAPTER_CONFIG).get("peft_type") == WEIGHTED:
        return _weighted(folder)
    objectives, weights = trained_at(folder)
    if weights is not None:
        raise UserError(
            f"{config.policy} reads no weights, neither in adapters nor in its prompt: engines serve it as it is, or soups of such"
        )
    tokenizer = load_tokenizer(_base(config.model, base_of(folder)).name if adapter else str(folder))
    asked = weights_in_prompt(tokenizer, objectives)

    def prompt(weights: Point) -> tuple[Prompt, Mapping[str, Any]]:
        return asked(Request(id="", prompt=_EMPTY, seed=0, weights=weights)), {}

    names = guarded(objectives, special_strings(tokenizer))
    return Prompted(objectives=objectives, parents=parents_of({"policy": config.policy}), folder=folder, asked=prompt, guarded=names)


def _weighted(folder: Path) -> Adapters:
    from equipoise.models.loading import base_of
    from equipoise.models.weighted_lora import folded, read_header, read_layers, terms

    objectives, layers = tuple(read_header(folder)["objectives"]), read_layers(folder)
    sums = {name: terms(parts, scale) for name, (parts, scale) in layers.items()}
    shared = any(len(own[0][0]) for own in sums.values())
    names = (("what all weights share",) if shared else ()) + objectives
    return Adapters(
        objectives=objectives,
        parents={file.name: file for file in adapter_files(folder)},
        base=base_of(folder),
        task="CAUSAL_LM",
        transposed=False,
        parts={name: {layer: own[k + (not shared)] for layer, own in sums.items()} for k, name in enumerate(names)},
        at=lambda weights: ([{name: folded(parts, scale, weights) for name, (parts, scale) in layers.items()}], (1.0,)),
        simplex=True,
    )


def _in_context(config: Export) -> Prompted:
    from equipoise.models.conditions import guarded
    from equipoise.models.in_context import InContext
    from equipoise.stages.in_context import in_context_parents, scores_at
    from equipoise.stages.preferences import trained_folder

    folder = Path(config.in_context).expanduser()
    record = InContext.read(folder)

    def prompt(weights: Point) -> tuple[Prompt, Mapping[str, Any]]:
        scores = scores_at(record, weights, config.targets)
        return record.asked(_EMPTY, scores), {"scores": dict(zip(record.names, scores, strict=True))}

    return Prompted(
        objectives=record.objectives,
        parents=in_context_parents(folder),
        folder=trained_folder(folder),
        asked=prompt,
        guarded=guarded(record.names, record.wording.specials),
    )
