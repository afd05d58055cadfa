"""Low-rank adapters on any transformer's linear layers, and their merge into a plain model.

    W' = W + (alpha / rank) B A,   A [rank, in], B [out, rank], B = 0 at the start

Paper: Hu et al. 2021 (LoRA). peft holds A and B; here is which layers get them, and the merge in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equipoise.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which weights are trained."""

    rank: int = 16
    """Rank of the update; 0 trains all weights instead."""
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    """On the input of the update."""
    blocks: int = 0
    """Only the last so many transformer blocks; those below then run without gradients. 0 for all."""
    targets: tuple[str, ...] = ()
    """Last parts of the names of the linear layers that get one, such as [q_proj,v_proj]; empty for all of the blocks'."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.blocks < 0:
            raise UserError(f"rank and blocks must not be negative, got {self.rank} and {self.blocks}")
        if not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(f"alpha must be positive and dropout between 0 and 1, got {self.alpha} and {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class WeightedLora:
    """PARM's adapter, whose core the weights mix (`models/weighted_lora.py`)."""

    shared_rank: int = 4
    """r1: the part that is the same at all weights."""
    rank: int = 4
    """r2: the part that the weights mix."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    """On the input of the update."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Last parts of the names of the linear layers that get one."""

    def __post_init__(self) -> None:
        if self.shared_rank < 0 or self.rank < 1:
            raise UserError(f"shared_rank must be at least 0 and rank at least 1, got {self.shared_rank} and {self.rank}")
        if not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(f"alpha must be positive and dropout between 0 and 1, got {self.alpha} and {self.dropout}")


def add_lora(model: Any, lora: Lora, task: str) -> Any:
    """The model with its trainable parts marked: adapters (and a classifier's head), or with rank 0 the last blocks whole.

    `task` is peft's, "SEQ_CLS" or "CAUSAL_LM". Raises `UserError` where the model has fewer blocks than `lora.blocks`.
    """
    trained = _trained_blocks(model, lora)
    if lora.rank == 0:
        if lora.blocks:
            blocks = transformer_blocks(model)
            frozen = [model.get_input_embeddings(), *blocks[: len(blocks) - len(trained)]]
            for part in frozen:
                part.requires_grad_(False)
        return model
    from peft import get_peft_model

    settings = lora_settings(model, lora, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        made = get_peft_model(model, settings)
    # With a name peft would ask the Hub at every checkpoint whether the vocabulary is still the base model's.
    made.peft_config["default"].base_model_name_or_path = ""
    return made


def lora_settings(model: Any, lora: Lora, task: str) -> Any:
    """peft's settings of such adapters on a model. Raises `UserError` as `add_lora` does."""
    from peft import LoraConfig

    names = _linear_names(model, _trained_blocks(model, lora), lora.targets)
    return LoraConfig(task_type=task, r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)


def _trained_blocks(model: Any, lora: Lora) -> Any:
    blocks = transformer_blocks(model)
    if lora.blocks > len(blocks):
        raise UserError(f"lora.blocks is {lora.blocks}, but the model has {len(blocks)} blocks")
    return blocks[len(blocks) - lora.blocks :] if lora.blocks else blocks


def merge_lora(model: Any, watch: Callable[[torch.Tensor, torch.Tensor], object] | None = None) -> Any:
    """A plain model of the same function, in float32; `watch` is shown each changed weight before and after, one at a time."""
    model = model.float()
    if not hasattr(model, "merge_and_unload"):
        return model
    if watch:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
            before = layer.get_base_layer().weight.detach().clone()
            layer.merge()
            watch(before, layer.get_base_layer().weight.detach())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return model.merge_and_unload()


class Survival:
    """What is left of an update dW of weights W when both are stored in a coarser number format.

        e = round(W + dW) - round(W)        share = <e, dW> / <dW, dW>        noise = ||e - dW|| / ||dW||

    Where W lies on the format's grid, as the weights of a bfloat16 checkpoint do, an update far below half a step is erased
    and share goes to 0; where it doesn't, share stays near 1 and the noise says how much of e is rounding.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._dot = self._square = self._rest = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count a weight in, before and after its update, both float32."""
        update = (after - before).double()
        left = after.to(self.dtype).double() - before.to(self.dtype).double()
        self._dot += float((left * update).sum())
        self._square += float((update * update).sum())
        self._rest += float(((left - update) ** 2).sum())

    @property
    def share(self) -> float:
        """NaN where nothing was changed."""
        return self._dot / self._square if self._square else float("nan")

    @property
    def noise(self) -> float:
        """NaN where nothing was changed."""
        return math.sqrt(self._rest / self._square) if self._square else float("nan")


def transformer_blocks(model: Any) -> Any:
    """The model's blocks, bottom first. Raises `UserError` where they can't be told."""
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise UserError(f"{type(model).__name__} keeps its {count} blocks in no list: LoRA doesn't know where to go")
    return found[0]


_LINEAR = ("Linear", "Conv1D", "Linear8bitLt")


def _linear_names(model: nn.Module, blocks: Any, targets: Sequence[str]) -> list[str]:
    """Full names of the blocks' linear layers that are targets, GPT-2's and bitsandbytes' own too. Raises `UserError` where none is."""
    inside = {id(module) for block in blocks for module in block.modules()}
    every = [name for name, m in model.named_modules() if id(m) in inside and type(m).__name__ in _LINEAR]
    found = [name for name in every if not targets or name.rpartition(".")[2] in targets]
    if not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in every}))
        raise UserError(f"no linear layer is named {' or '.join(targets)}; targets can be {known}")
    return found


def lora_factors(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (A [rank, in], (alpha / rank) B [out, rank]) of what `add_lora` added, by the plain model's names, float32."""
    return {
        name.removeprefix("base_model.model."): (
            part.lora_A["default"].weight.detach().float().cpu(),
            part.scaling["default"] * part.lora_B["default"].weight.detach().float().cpu(),
        )
        for name, part in model.named_modules()
        if "default" in getattr(part, "lora_A", {})
    }


def no_dropout(model: nn.Module) -> None:
    """Set every share of dropout in the model to 0, whether it is a module's or a number that a forward reads."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
