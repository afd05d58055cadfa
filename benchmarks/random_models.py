"""Models and heads that are randomly filled: what decoding costs doesn't depend on what they know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from equipoise.models.loading import LanguageModel
from equipoise.models.value_heads import ValueHeads
from equipoise.models.value_models import ValueModel
from equipoise.objectives import Normaliser


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a Llama."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    tied: bool


SEVENTH = Shape(layers=6, width=288, inner=768, heads=9, kv_heads=3, tied=True)
"""19.5 million parameters under SmolLM2's vocabulary: about a seventh of its 134.5 million."""


def filled(lm: LanguageModel, shape: Shape, kind: Literal["model", "causal", "scalar"], seed: int) -> LanguageModel:
    """A Llama of this shape with the tokenizer, the vocabulary and the number format of `lm`, beside it."""
    config = llama_config(shape, int(lm.model.config.vocab_size), int(lm.model.config.max_position_embeddings))
    model = fill(config, kind, lm.model.dtype, lm.device, seed)
    return LanguageModel(model, lm.tokenizer, f"random {kind} {seed}", f"seed {seed}", lm.eos_ids)


def llama_config(shape: Shape, vocabulary: int, positions: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        num_labels=1,
    )


def fill(config: Any, kind: Literal["model", "causal", "scalar"], dtype: Any, device: Any, seed: int) -> Any:
    """The model of a config, filled where it will run."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    made = {"model": AutoModel, "causal": AutoModelForCausalLM, "scalar": AutoModelForSequenceClassification}[kind]
    torch.manual_seed(seed)
    with torch.device(device):
        return made.from_config(config, dtype=dtype).eval().requires_grad_(False)


def objective_names(count: int) -> tuple[str, ...]:
    return tuple(f"objective_{k}" for k in range(count))


def _heads(lm: LanguageModel, names: Sequence[str], layers: tuple[int, ...], tensors: dict[str, np.ndarray]) -> ValueHeads:
    return ValueHeads(
        normaliser=Normaliser(objectives=tuple(names), mean_K=(0.0,) * len(names), sd_K=(1.0,) * len(names)),
        model=lm.name,
        layers=layers,
        horizon=40,
        tensors={name: tensor.astype(np.float32) for name, tensor in tensors.items()},
        calibration={},
    )


def random_heads(lm: LanguageModel, objectives: int) -> ValueHeads:
    """Heads on the policy's own states of the trained shape: two layers, 16 state components."""
    rng = np.random.default_rng(0)
    layers = (lm.num_layers // 2, lm.num_layers)
    width = len(layers) * lm.hidden_size
    tensors = {
        "mean_I": np.zeros(width),
        "whiten_IM": rng.normal(size=(width, 16)) * 0.01,
        "single_KXD": rng.normal(size=(objectives, 19, lm.hidden_size)) * 0.01,
        "prefix_KPI": rng.normal(size=(objectives, 2, width)) * 0.001,
        "prefix_mean_I": np.zeros(width),
    }
    return _heads(lm, objective_names(objectives), layers, tensors)


def value_model(lm: LanguageModel, names: Sequence[str], seed: int, shape: Shape = SEVENTH) -> ValueModel:
    """A value model of these objectives beside `lm`."""
    backbone = filled(lm, shape, "model", seed)
    weight_KPI = np.zeros((len(names), 2, shape.width))
    weight_KPI[:, 0] = np.random.default_rng(seed).normal(size=(len(names), shape.width)) / shape.width**0.5
    tensors = {"prefix_KPI": weight_KPI, "prefix_mean_I": np.zeros(shape.width), "bias_K": np.zeros(len(names))}
    return ValueModel(backbone, _heads(backbone, names, (shape.layers,), tensors))
