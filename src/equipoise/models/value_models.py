"""A value model as an artefact: a backbone of its own and K linear heads, what `training/value_model.py` writes.

    v_k(s + a) = h(s + a) . B_k + b_k          h: state of the prefix after the final norm; v in sd of the reference's reward

It is the prefix form of `value_heads.py` on another model's states, so the same file holds its heads, its scale and the table
that a beta for a KL budget is solved from. Any causal backbone with the policy's tokens will do.

A folder holds heads.safetensors and either adapter/ (peft's, on the base that the header names) or backbone/ (whole).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from equipoise.models.loading import ADAPTER_CONFIG, LanguageModel, load_model, load_tokenizer, weights_key
from equipoise.models.trees import TokenTree, tree_states
from equipoise.models.value_heads import ValueHeads
from equipoise.runs import read_json, write_json
from equipoise.types import UserError

if TYPE_CHECKING:
    import torch

HEADS = "heads.safetensors"
_PARTS = ("adapter", "backbone")


@dataclass(frozen=True)
class ValueModel:
    """K objectives' values of prefixes under one backbone."""

    lm: LanguageModel
    """The backbone, without a vocabulary projection, adapters merged."""
    heads: ValueHeads
    """Of the form "prefix", with the levels `bias_K`, on the backbone's last state."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the K objectives."""
        return self.heads.objectives

    def predict(
        self, trees: Sequence[TokenTree], tokens_per_batch: int = 2048, progress: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """Values of each tree's wanted nodes, float64 [wanted, K] per tree."""
        weight_KD = self.heads.tensors["prefix_KPI"][:, 0].astype(np.float64)
        states = tree_states(self.lm, trees, [self.lm.num_layers], tokens_per_batch=tokens_per_batch, progress=progress)
        return [h[:, 0] @ weight_KD.T + self.heads.tensors["bias_K"] for h in states]


def load_backbone(name: str) -> LanguageModel:
    """A causal model for values to be read from: a copy of its own, float32, without the vocabulary projection."""
    lm = load_model(name)
    return LanguageModel(lm.backbone, lm.tokenizer, lm.name, lm.revision, lm.eos_ids)


def is_value_model(folder: Path) -> bool:
    """Whether a folder holds a value model, rather than heads on the policy's own states."""
    return (folder / HEADS).exists()


def save_value_model(folder: Path, backbone: Any, heads: ValueHeads) -> list[Path]:
    """Write what was trained of the backbone (a peft model's adapter, or all of it) and the heads; returns the files.

    The heads come last, so that a folder with heads is whole.
    """
    part = folder / ("adapter" if hasattr(backbone, "peft_config") else "backbone")
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{part.name}-", dir=folder))
    try:
        backbone.save_pretrained(scratch)
        (scratch / "README.md").unlink(missing_ok=True)  # peft's blank card
        _sort_sets(scratch / ADAPTER_CONFIG)
        scratch.chmod(0o755)
        shutil.rmtree(part, ignore_errors=True)
        os.rename(scratch, part)
    except OSError as error:
        raise UserError(f"could not write {part} ({error.strerror or error}); make room and run again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    heads.save(folder / HEADS)
    return [folder / HEADS, *sorted(part.iterdir())]


def _sort_sets(path: Path) -> None:
    """peft writes sets as lists in the order of their hashes, which differs between processes."""
    if path.exists():
        settings = read_json(path)
        write_json(path, {name: sorted(value) if isinstance(value, list) else value for name, value in settings.items()})


def load_value_model(folder: Path, *, trainable: bool = False, dtype: Literal["float32", "bfloat16"] = "float32") -> ValueModel:
    """Read a value model; `trainable` leaves its adapter apart and switched on, to go on training it.

    `dtype` is the backbone's; its states are read in float32 whatever that is.

    Raises `UserError` where the folder holds none, or where its base isn't what it was trained on.
    """
    if not is_value_model(folder):
        raise UserError(f"no value model at {folder}; run `equipoise train value_model` first")
    heads = ValueHeads.load(folder / HEADS)
    part = next((folder / name for name in _PARTS if (folder / name).is_dir()), None)
    if part is None:
        raise UserError(f"{folder} has neither of {' and '.join(_PARTS)}: run `equipoise train value_model` again")
    import torch

    if part.name == "backbone":
        from transformers import AutoModel

        model = AutoModel.from_pretrained(part, dtype=getattr(torch, dtype), use_safetensors=True).eval()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = load_tokenizer(heads.model)
        lm = LanguageModel(model.to(device).requires_grad_(trainable), tokenizer, str(folder), "local")
        return ValueModel(lm, heads)
    from peft import PeftModel

    base = load_backbone(heads.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        adapted = PeftModel.from_pretrained(base.model, str(part), is_trainable=trainable)
    adapted.peft_config["default"].base_model_name_or_path = ""
    model = adapted if trainable else adapted.merge_and_unload().to(getattr(torch, dtype)).eval().requires_grad_(False)
    lm = LanguageModel(model, base.tokenizer, str(folder), f"adapter on {weights_key(base)}", base.eos_ids)
    return ValueModel(lm, heads)


def head_values(states: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor) -> torch.Tensor:
    """h . B + b in float32, whatever the states were made in: [..., K]."""
    import torch

    with torch.autocast(states.device.type, enabled=False):
        return torch.nn.functional.linear(states.float(), weight_KD, bias_K)
