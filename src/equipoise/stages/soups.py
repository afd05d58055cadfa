"""The stages `soup` and `merge`: several adapters or models become one, and an adapter becomes part of its model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from equipoise.progress import bar, say
from equipoise.runs import read_json, stage, write_json
from equipoise.stages import common
from equipoise.stages.ways import named
from equipoise.types import UserError


@dataclass(frozen=True, kw_only=True)
class Soup:
    """Write one adapter, or one model, per weight vector: the weighted sum of several."""

    out: Path
    """Run folder to write; each soup is a folder in it, named by its weights, that any engine serves."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters of one model, as [helpful=FOLDER,harmless=FOLDER]."""
    models: tuple[str, ...] = ()
    """Whole models that were tuned from one, instead, as [helpful=FOLDER,harmless=FOLDER]."""
    steps: int = 4
    """The weights are multiples of 1/steps."""
    weights: tuple[str, ...] = ()
    """These weights instead, as ["0.7,0.3","helpful=1.2,harmless=-0.2"]; those of adapters need not sum to 1."""
    rule: Literal["exact", "factors"] = "exact"
    """Adapters: exact sums the updates; factors averages their factors, as the papers' code does, for comparison."""
    rank: int = 0
    """Adapters: cut the sum to this rank; 0 keeps the sum of their ranks."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Models: number format of the result, which is summed in float32."""

    def __post_init__(self) -> None:
        if bool(self.adapters) == bool(self.models):
            raise UserError("a soup is of adapters or of models: give one of the two, as [helpful=FOLDER,harmless=FOLDER]")


def soup(config: Soup) -> Path:
    """Write the soups and return the run folder."""
    from equipoise.models.checkpoints import Checkpoint
    from equipoise.training.soup import Config, extrapolated, soup_adapters, soup_models

    entries = named("adapters" if config.adapters else "models", config.adapters or config.models)
    parts = {name: Path(folder).expanduser() for name, folder in entries.items()}
    how = Config(rule=config.rule, rank=config.rank)
    points = weight_points(config.weights, config.steps, tuple(parts))
    files = {name: adapter_files(folder) if config.adapters else Checkpoint(folder).files for name, folder in parts.items()}
    parents = {f"{name}: {file.name}": file for name, own in files.items() for file in own}
    with stage(config.out, "soup", common.settings_of(config), parents) as run:
        if run.done:
            return config.out
        pieces = 1 if config.adapters else len(Checkpoint(next(iter(parts.values()))).shapes)
        with bar(f"{len(points)} soups of {', '.join(parts)}", len(points) * pieces) as advance:
            for label, weights in points.items():
                folder = run.folder / label
                if (folder / "card.json").exists():
                    advance(pieces)
                else:
                    if config.adapters:
                        made = soup_adapters(list(parts.values()), weights, how, folder)
                        advance(1)
                    else:
                        made = soup_models(list(parts.values()), weights, config.dtype, folder, advance)
                    digests = {n: {f.name: run.parents[f"{n}: {f.name}"] for f in own} for n, own in files.items()}
                    card = {"kind": "soup", "objectives": list(parts), "weights": weights, "extrapolated": extrapolated(weights)}
                    write_json(folder / "card.json", card | made | {"parents": digests})
                run.outputs += sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        _tell(config.out, points)
    return config.out


def weight_points(texts: Sequence[str], steps: int, objectives: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """Folder name -> weights: those of the texts, or else the multiples of 1/steps. Raises `UserError` for the same weights twice."""
    from equipoise.objectives import named_weights, simplex_grid

    asked = [named_weights(text, objectives) for text in texts] or simplex_grid(len(objectives), steps)
    points = {"w" + "_".join(f"{w:g}" for w in weights): weights for weights in asked}
    if len(points) < len(asked):
        raise UserError(f"two of the weights {list(texts)} are the same to six digits: give each once")
    return points


def adapter_files(folder: Path) -> list[Path]:
    """What makes an adapter's folder."""
    from equipoise.models.loading import ADAPTER_CONFIG, ADAPTER_TENSORS

    return [folder / ADAPTER_TENSORS, folder / ADAPTER_CONFIG]


def _tell(out: Path, points: Mapping[str, tuple[float, ...]]) -> None:
    """Say what whoever serves the soups should know."""
    from equipoise.models.adapters import served_rank

    cards = {label: read_json(out / label / "card.json") for label in points}
    for label, card in cards.items():
        if card["extrapolated"]:
            say(f"{label}: extrapolated, the weights sum to {sum(card['weights']):g} and the least is {min(card['weights']):g}")
        if card.get("error"):
            say(f"{label}: differs from the exact sum by {card['error']:.1%} of its norm")
    ranks = [card["rank"] for card in cards.values() if "rank" in card]
    if ranks:
        served = served_rank(max(ranks))
        hint = f"vLLM serves it with --max-lora-rank {served}" if served else "more than vLLM serves: give --rank 512 or less"
        say(f"{len(cards)} adapters of rank {max(ranks)} at most; {hint}")
    if any(not card.get("base_checked", True) for card in cards.values()):
        say("the adapters don't all say which model they were trained on: that it is the same one was not checked")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge an adapter into a plain model folder."""

    out: Path
    """Run folder to write; the model is its folder `model`."""
    adapter: Path
    """Folder of an adapter that peft reads."""
    model: str = ""
    """"smollm2", a Hub id, a folder or a .gguf file; empty for the model that the adapter names."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the result, which is merged in float32."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


def merge(config: Merge) -> Path:
    """Merge and return the model's folder."""
    from equipoise.models.loading import base_of

    parents = {file.name: file for file in adapter_files(config.adapter)}
    with stage(config.out, "merge", common.settings_of(config), parents) as run:
        folder = run.folder / "model"
        if run.done:
            return folder
        base = config.model or base_of(config.adapter).name
        if not base:
            raise UserError(f"{config.adapter} doesn't say which model it is for: give --model")
        card = _merge(config, base, folder)
        write_json(run.folder / "card.json", card)
        run.outputs += [*sorted(folder.iterdir()), run.folder / "card.json"]
        run.facts |= card
    return folder


def _merge(config: Merge, base: str, folder: Path) -> dict[str, float | int | str]:
    """Write the model's folder; returns what the card says."""
    import torch

    from equipoise.models.loading import ADAPTER_CONFIG, WEIGHTED, load_model, save_model, tokenizer_of
    from equipoise.models.lora import Survival, merge_lora
    from equipoise.models.weighted_lora import check_base

    if read_json(config.adapter / ADAPTER_CONFIG).get("peft_type") == WEIGHTED:
        raise UserError(f"{config.adapter} reads weights, so that it is another model at each: nothing to merge")
    say(f"loading {base}")
    lm = load_model(base, trust_remote_code=config.trust_remote_code, device="cpu")
    check_base(lm, config.adapter)
    try:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            wrapped = PeftModel.from_pretrained(lm.model, str(config.adapter))
    except ImportError:
        raise UserError("merging needs peft: pip install 'equipoise[train]'") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{config.adapter} can't be laid on {base!r} ({' '.join(str(error).split())[:200]})") from None
    dtype = getattr(torch, config.dtype)
    left = Survival(dtype)
    plain = merge_lora(wrapped, left.add)
    save_model(folder, plain.to(dtype), tokenizer_of(config.adapter, lm))
    if math.isnan(left.share):
        say(f"{config.adapter} changes nothing: its factors are still at their start")
    else:
        say(f"{left.share:.3f} of the update survives {config.dtype}, with rounding noise of {left.noise:.3f} of its norm")
    if left.share < 0.9:
        say(f"that is less than 0.9: the merged model is not the one that the adapter makes; save it in float32, not {config.dtype}")
    return {"model": base, "dtype": config.dtype, "update_survives": left.share, "rounding_noise": left.noise}
