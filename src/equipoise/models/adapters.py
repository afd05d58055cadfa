"""PEFT's LoRA folders as plain factors, read and written: layer -> (A [r, in], B [out, r]) with W' = W + B A.

The scale that the folder's config states (alpha / r, or alpha / sqrt(r) with rslora, or a layer's own rank and alpha) is in B.
What is written has one rank for all layers, padded with zeros, and scale 1: engines differ in how they read patterns of
ranks, and all of them read this.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.models.loading import ADAPTER_CONFIG, ADAPTER_TENSORS, WEIGHTED, Base, base_of, write_base
from equipoise.runs import read_json, write_atomic, write_json
from equipoise.types import UserError

if TYPE_CHECKING:
    import torch

    Layers = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

_PEFT_KEY = "base_model.model."
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank; it starts with 16."""
_OTHER_FUNCTIONS = (
    *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "alora_invocation_tokens"),
    *("lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "modules_to_save"),
)
"""Settings of peft's with which a layer isn't W + s B A, or another weight is changed too."""
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave W as it was; pissa, olora, corda, loftq and the like change it."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter as it changes the weights."""

    folder: Path
    layers: Layers
    base: Base
    task: str | None
    """peft's task_type."""
    transposed: bool
    """Whether its layers keep their matrices as [in, out] (peft's fan_in_fan_out)."""


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a PEFT folder, in float32. Raises `UserError` where it is damaged or is no plain LoRA adapter."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / ADAPTER_TENSORS)
        config = read_json(folder / ADAPTER_CONFIG)
    except (OSError, SafetensorError, UserError) as error:
        raise UserError(f"{folder} is no adapter folder ({error}): it needs {ADAPTER_CONFIG} and {ADAPTER_TENSORS}") from None
    if config.get("peft_type") == WEIGHTED:
        raise UserError(f"{folder} holds adapters that read weights, not a plain LoRA adapter: steer by it instead (policy, guides)")
    odd = [key for key in _OTHER_FUNCTIONS if config.get(key)]
    odd += [] if config.get("init_lora_weights") in _PLAIN_STARTS else [f"init_lora_weights {config['init_lora_weights']}"]
    odd += [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if config.get("peft_type") != "LORA" or odd:
        said = ", ".join([str(config.get("peft_type")), *odd][:3])
        raise UserError(f"{folder} is no plain LoRA adapter ({said}); merge it into a model instead (`equipoise merge`)")
    layers = {}
    try:
        for key in dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors):
            down, up = tensors[f"{key}.lora_A.weight"].float(), tensors[f"{key}.lora_B.weight"].float()
            if down.shape[0] != up.shape[1]:
                raise UserError(f"{folder} is damaged: {key} has ranks {down.shape[0]} and {up.shape[1]}; save it again")
            name = key.removeprefix(_PEFT_KEY)
            layers[name] = (down, _scale(config, name, down.shape[0]) * up)
    except KeyError as error:
        raise UserError(f"{folder} is no whole LoRA adapter: {error} is missing; save it again") from None
    return Adapter(
        folder=folder,
        layers=layers,
        base=base_of(folder),
        task=config.get("task_type"),
        transposed=bool(config.get("fan_in_fan_out")),
    )


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r of a layer, its alpha by the first pattern that ends its name, as peft reads them."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)]
    alpha = own[0] if own else config["lora_alpha"]
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def served_rank(rank: int) -> int | None:
    """The least of `SERVED_RANKS` with room for this rank; None where there is none."""
    return next((most for most in SERVED_RANKS if most >= rank), None)


def write_adapter(folder: Path, layers: Layers, *, base: Base, task: str | None, transposed: bool = False, least: int = 0) -> int:
    """Write a PEFT folder of these factors and return its rank, the largest of a layer's or `least`; raises `UserError` on a full disk."""
    import torch
    from safetensors.torch import save_file

    rank = max(least, *(down.shape[0] for down, _ in layers.values()))
    tensors = {}
    for name, (down, up) in layers.items():
        room = rank - down.shape[0]
        key = f"{_PEFT_KEY}{name}"
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, room)).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(up, (0, room)).contiguous()
    config = {
        **{"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base.name, "inference_mode": True},
        **{"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False},
        **{"fan_in_fan_out": transposed, "target_modules": sorted(layers)},
    }
    write_atomic(folder / ADAPTER_TENSORS, lambda scratch: save_file(tensors, scratch, metadata={"format": "pt"}))
    write_base(folder, base)
    write_json(folder / ADAPTER_CONFIG, config)
    return rank


def common_base(adapters: Sequence[Adapter]) -> Base:
    """The base of all of them, as far as they say. Raises `UserError` that names two which were trained on different ones."""
    for one, other in itertools.combinations(adapters, 2):
        # The name of a folder says less than what is in it.
        ours, theirs = (one.base.key, other.base.key) if one.base.key and other.base.key else (one.base.name, other.base.name)
        if ours and theirs and ours != theirs:
            said = " and ".join(f"{a.folder} on {a.base.name!r} ({(a.base.key or 'unknown')[-12:]})" for a in (one, other))
            raise UserError(f"these adapters were trained on different models: {said}; train them on one")
        for name in one.layers.keys() & other.layers.keys():
            sizes = [(a.layers[name][0].shape[1], a.layers[name][1].shape[0]) for a in (one, other)]
            if sizes[0] != sizes[1]:
                raise UserError(f"{one.folder} and {other.folder} are for different models: {name} is {sizes[0]} and {sizes[1]}")
    return Base(
        name=next((a.base.name for a in adapters if a.base.name), ""),
        key=next((a.base.key for a in adapters if a.base.key), ""),
    )
