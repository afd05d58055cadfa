"""Low-rank adapters whose core is mixed by weights, a vector per row: PARM's bilinear LoRA, and adapters routed by row.

    W'(w) = W + s B [ C_0      0           ] A          A [r1 + r2, in], B [out, r1 + r2], C_0 [r1, r1], C_k [r2, r2]
                    [ 0    sum_k w_k C_k   ]

In factored form, s B (C (A x)), a row costs 2 (in + out) r multiplications per token whatever its weights, so that every row
of a batch may have its own; the dense update (`dense_update`) is the same function of one weight vector.

PARM (arXiv 2505.06274), PBLoRA: C_0 and C_k trained, B = 0 at the start, s = alpha / r2.
Routed adapters: K LoRA adapters of one base, A and B stacked, r1 = 0, C_k the identity on block k. Then w = e_k is adapter k,
w = 0 the base itself, and any other w the soup W + sum_k w_k dW_k, exactly.
Departures: PARM writes one weight vector into the adapter's file and forms the dense update at every call.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise.models.adapters import read_adapter
from equipoise.models.loading import ADAPTER_CONFIG, ADAPTER_TENSORS, BASE, WEIGHTED, LanguageModel, as_base, base_of, write_base
from equipoise.models.lora import WeightedLora
from equipoise.runs import write_atomic, write_json
from equipoise.types import UserError

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""A, B, C_0 and C_k [K, r2, r2] of a layer."""


class RowWeights:
    """The weights of the rows that a model runs next, which all of its adapters read."""

    def __init__(self, objectives: Sequence[str]) -> None:
        self.objectives = tuple(objectives)
        self.now_RK: torch.Tensor | None = None


class WeightedLinear(nn.Module):
    """A linear layer and its weighted update."""

    def __init__(
        self,
        base: nn.Module,
        down_rI: torch.Tensor,
        up_Or: torch.Tensor,
        fixed: torch.Tensor,
        cores_K: torch.Tensor,
        *,
        scale: float,
        dropout: float,
        asked: RowWeights,
    ) -> None:
        super().__init__()
        self.base, self.scale, self.asked = base, scale, asked
        self.down_rI, self.up_Or = nn.Parameter(down_rI), nn.Parameter(up_Or)
        self.fixed, self.cores_K = nn.Parameter(fixed), nn.Parameter(cores_K)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_RTI: torch.Tensor) -> torch.Tensor:
        """W'(w_R) x of each row R, [R, T, out]."""
        weights_RK = self.asked.now_RK
        if weights_RK is None:
            raise UserError(f"this model's adapters read weights on {', '.join(self.asked.objectives)}, and none were given")
        core_R = torch.einsum("rk,kij->rij", weights_RK.to(self.cores_K.dtype), self.cores_K)
        low = nn.functional.linear(self.dropout(x_RTI.to(self.down_rI.dtype)), self.down_rI)
        split = self.fixed.shape[0]
        mixed = torch.cat([nn.functional.linear(low[..., :split], self.fixed), low[..., split:] @ core_R.transpose(1, 2)], dim=-1)
        base = self.base(x_RTI)
        return base + (self.scale * nn.functional.linear(mixed, self.up_Or)).to(base.dtype)


def dense_update(layer: WeightedLinear, weights_K: Sequence[float]) -> torch.Tensor:
    """W'(w) - W = s B C(w) A, [out, in]."""
    down, up = folded((layer.down_rI, layer.up_Or, layer.fixed, layer.cores_K), layer.scale, weights_K)
    return up @ down


def folded(parts: Parts, scale: float, weights_K: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(C(w) A [r, in], s B [out, r]): the plain LoRA of one weight vector, exactly; `parts` are A, B, C_0 and C_k."""
    down_rI, up_Or, fixed, cores_K = parts
    core = torch.einsum("k,kij->ij", cores_K.new_tensor(weights_K), cores_K)
    return torch.block_diag(fixed, core) @ down_rI, scale * up_Or


def terms(parts: Parts, scale: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of dW_0, dW_1, .., dW_K with W'(w) - W = dW_0 + sum_k w_k dW_k; dW_0 has no rank where nothing is shared."""
    down_rI, up_Or, fixed, cores_K = parts
    split = fixed.shape[0]
    shared = (fixed @ down_rI[:split], scale * up_Or[:, :split])
    return [shared, *((core @ down_rI[split:], scale * up_Or[:, split:]) for core in cores_K)]


@contextlib.contextmanager
def conditioned(model: Any, weights_RK: torch.Tensor | None) -> Iterator[None]:
    """Within it the model's adapters read these weights, a row each or one row [1, K] for all; plain models take None."""
    asked = getattr(model, "row_weights", None)
    if asked is None:
        assert weights_RK is None, "weights for a model without weighted adapters"
        yield
        return
    before, asked.now_RK = asked.now_RK, weights_RK
    try:
        yield
    finally:
        asked.now_RK = before


def objectives_of(model: Any) -> tuple[str, ...] | None:
    """The objectives whose weights a model's adapters read, in order; None for a plain model."""
    asked = getattr(model, "row_weights", None)
    return asked.objectives if asked else None


def add_weighted_lora(lm: LanguageModel, lora: WeightedLora, objectives: Sequence[str], seed: int = 0) -> LanguageModel:
    """A model that shares the weights of `lm`, with PARM's adapters at their start: the same function at any weights.

    Raises `UserError` where no linear layer has a name in `lora.targets`.
    """
    generator = torch.Generator().manual_seed(seed)

    def kaiming(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])

    model, asked = shared_copy(lm.model), RowWeights(objectives)
    found = [name for name, m in model.named_modules() if _is_linear(m) and name.rsplit(".", 1)[-1] in lora.targets]
    if not found:
        raise UserError(f"{lm.name!r} has no linear layers named {', '.join(lora.targets)}: name its own in targets")
    width = lora.shared_rank + lora.rank
    for name in found:
        inputs, outputs = _sizes(model.get_submodule(name))
        down, fixed = kaiming(width, inputs), kaiming(lora.shared_rank, lora.shared_rank) if lora.shared_rank else torch.zeros(0, 0)
        cores = kaiming(len(asked.objectives), lora.rank, lora.rank)
        _wrap(model, name, (down, torch.zeros(outputs, width), fixed, cores), lora.alpha / lora.rank, lora.dropout, asked)
    return _finished(lm, model, asked, lm.name)


def route_adapters(lm: LanguageModel, folders: Mapping[str, Path]) -> LanguageModel:
    """A model that shares the weights of `lm`, with the LoRA adapters of PEFT folders, one objective each, switched by row.

    Raises `UserError` where a folder is no plain LoRA adapter of this model.
    """
    for folder in folders.values():
        check_base(lm, Path(folder))
    adapters = [read_adapter(Path(folder)).layers for folder in folders.values()]
    model, asked = shared_copy(lm.model), RowWeights(tuple(folders))
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        try:
            sizes = _sizes(model.get_submodule(name))
        except AttributeError:
            raise UserError(f"an adapter of {', '.join(folders)} is for a layer {name!r}, which {lm.name!r} hasn't") from None
        here = [adapter.get(name, (torch.zeros(0, sizes[0]), torch.zeros(sizes[1], 0))) for adapter in adapters]
        for folder, (down, up) in zip(folders.values(), here, strict=True):
            _check_sizes(f"{folder} is for another model than {lm.name!r}", name, sizes, down, up)
        block = torch.cat([torch.full((down.shape[0],), k) for k, (down, _) in enumerate(here)])
        cores = torch.stack([torch.diag((block == k).float()) for k in range(len(here))])
        parts = (torch.cat([down for down, _ in here]), torch.cat([up for _, up in here], dim=1), torch.zeros(0, 0), cores)
        _wrap(model, name, parts, 1.0, 0.0, asked)
    return _finished(lm, model, asked, "+".join([lm.name, *folders]))


def check_base(lm: LanguageModel, folder: Path) -> None:
    """Check that an adapter of a folder was trained on these weights, if it says. Raises `UserError` where it was not."""
    said = base_of(folder) if (folder / ADAPTER_CONFIG).is_file() else None
    if said and said.key and said.key != as_base(lm).key:
        raise UserError(
            f"the adapter of {folder} was trained on {said.name!r} ({said.key[-12:]}), not on the weights of {lm.name!r}; "
            f"if they are the same under another name, delete {folder / BASE}"
        )


def save_weighted(lm: LanguageModel, path: Path) -> None:
    """The adapters alone: an adapter folder that `load_model` reads, or one safetensors file where `path` is named so.

    Each file is written whole or not at all, the folder's config last.
    """
    from safetensors.torch import save_file

    layers = {name: m for name, m in lm.model.named_modules() if isinstance(m, WeightedLinear)}
    header = {"model": lm.name, "objectives": objectives_of(lm.model), "scale": {name: layer.scale for name, layer in layers.items()}}
    tensors = {f"{n}.{part}": getattr(layer, part).detach().contiguous() for n, layer in layers.items() for part in _PARTS}
    alone = path.suffix == ".safetensors"
    file = path if alone else path / ADAPTER_TENSORS
    write_atomic(file, lambda scratch: save_file(tensors, scratch, metadata={"equipoise": json.dumps(header)}))
    if not alone:
        write_base(path, as_base(lm))
        config = {"peft_type": WEIGHTED, "base_model_name_or_path": lm.name, "objectives": header["objectives"]}
        write_json(path / ADAPTER_CONFIG, config)


def read_header(path: Path) -> dict[str, Any]:
    """`model`, `objectives` and the layers' `scale` of what `save_weighted` wrote. Raises `UserError` where there is none."""
    from safetensors import SafetensorError, safe_open

    file = _tensors_file(path)
    if not file.is_file():
        raise UserError(f"no weighted adapters at {path}: give a folder or file that was saved with them")
    try:
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {})["equipoise"])
            return {key: header[key] for key in ("model", "objectives", "scale")}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or holds no weighted adapters ({error}); save them again") from None


def read_layers(path: Path) -> dict[str, tuple[Parts, float]]:
    """Layer -> ((A, B, C_0, C_k), s) of what `save_weighted` wrote. Raises `UserError` where they are missing or damaged."""
    from safetensors.torch import load_file

    scales, tensors = read_header(path)["scale"], load_file(_tensors_file(path))
    layers: dict[str, tuple[Parts, float]] = {}
    try:
        for name, scale in scales.items():
            down_rI, up_Or, fixed, cores_K = (tensors[f"{name}.{part}"] for part in _PARTS)
            layers[name] = ((down_rI, up_Or, fixed, cores_K), scale)
    except KeyError as error:
        raise UserError(f"{path} holds no whole adapters: {error} is missing; save them again") from None
    return layers


def load_weighted(lm: LanguageModel, path: Path) -> LanguageModel:
    """`lm` with the adapters that `save_weighted` wrote. Raises `UserError` where they are missing, damaged or another model's."""
    header, layers = read_header(path), read_layers(path)
    if path.is_dir():
        check_base(lm, path)
    model, asked = shared_copy(lm.model), RowWeights(header["objectives"])
    try:
        for name, (parts, scale) in layers.items():
            _wrap(model, name, parts, scale, 0.0, asked)
    except AttributeError as error:
        raise UserError(f"the adapters of {path} are for {header['model']!r}, not for {lm.name!r} ({error})") from None
    return _finished(lm, model, asked, lm.name)


def _tensors_file(path: Path) -> Path:
    return path / ADAPTER_TENSORS if path.is_dir() else path


_PARTS = ("down_rI", "up_Or", "fixed", "cores_K")


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _sizes(layer: Any) -> tuple[int, int]:
    """(in, out); GPT-2's Conv1D keeps its matrix the other way round."""
    shape = layer.weight.shape if type(layer).__name__ == "Linear" else layer.weight.shape[::-1]
    return int(shape[1]), int(shape[0])


def _check_sizes(says: str, name: str, sizes: tuple[int, int], down: torch.Tensor, up: torch.Tensor) -> None:
    found = (down.shape[1], up.shape[0])
    if found != sizes:
        raise UserError(f"{says}: {name} takes {found[0]} to {found[1]}, not {sizes[0]} to {sizes[1]}")


def shared_copy(model: Any) -> Any:
    """The same tensors in modules of their own, so that what is hung in leaves the original as it was."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


def _wrap(model: Any, name: str, parts: Sequence[torch.Tensor], scale: float, dropout: float, asked: RowWeights) -> None:
    parent, _, leaf = name.rpartition(".")
    base = model.get_submodule(name)
    if not _is_linear(base):
        raise UserError(f"{name!r} is a {type(base).__name__}, not a linear layer")
    _check_sizes("these adapters are for another model", name, _sizes(base), parts[0], parts[1])
    device = base.weight.device
    down, up, fixed, cores = (part.float().to(device) for part in parts)
    setattr(model.get_submodule(parent), leaf, WeightedLinear(base, down, up, fixed, cores, scale=scale, dropout=dropout, asked=asked))


def _finished(lm: LanguageModel, model: Any, asked: RowWeights, name: str) -> LanguageModel:
    model.row_weights = asked
    return replace(lm, model=model.eval(), name=name)
