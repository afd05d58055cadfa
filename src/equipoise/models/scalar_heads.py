"""A transformer with one score per text: any sequence-classification model, or a causal one whose last token is read.

What is saved is a plain Hub folder, which `AutoModelForSequenceClassification` and the tokenizer's chat template read
without this package and with the same scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from equipoise.models.chat import PLAIN_TEMPLATE
from equipoise.models.loading import LanguageModel, eos_ids, resolve
from equipoise.types import UserError

if TYPE_CHECKING:
    from torch import nn

PAD = "<|pad|>"


def load_scalar(name: str, *, layers: int = 0, max_length: int = 0) -> tuple[Any, Any]:
    """(model with one logit, tokenizer) of "smollm2", a .gguf file, a folder or a Hub id, in float32. A head
    for other than one label is replaced by a new one.

    `layers` keeps that many transformer blocks from the bottom, under the model's own final norm; 0 keeps all. Where the
    tokenizer has no pad token of its own, or one that ends texts, one is added: a classifier pools at the last token that
    isn't a pad. `max_length` becomes the tokenizer's limit. Raises `UserError` where the model can't be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source, _ = resolve(name)
    try:
        config = AutoConfig.from_pretrained(source)
        new_head = config.num_labels != 1
        config.num_labels = 1
        _keep_layers(config, layers, name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its report of the weights that were left out or are new
        model = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=new_head
        )
        logging.set_verbosity(verbosity)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{name!r} could not be loaded as a sequence classifier ({first}): give a Hub id or a folder") from None
    _own_pad(model, tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    if max_length:
        tokenizer.model_max_length = max_length
    return model, tokenizer


def load_scorer(name: str) -> LanguageModel:
    """A trained model with one logit, to be read token by token. Raises `UserError` where it has another number of logits."""
    import torch
    from transformers import AutoConfig

    model, tokenizer = load_scalar(name)
    source, revision = resolve(name)
    labels = AutoConfig.from_pretrained(source).num_labels
    if labels != 1:
        raise UserError(f"{name!r} has {labels} logits, where a scorer has one: train one with `train bradley_terry`, or name another")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LanguageModel(model.eval().requires_grad_(False).to(device), tokenizer, name, revision)


def _keep_layers(config: Any, layers: int, name: str) -> None:
    """Let the config describe only the lowest blocks."""
    text = config.get_text_config()
    if not layers:
        return
    if not 1 <= layers <= text.num_hidden_layers:
        raise UserError(f"layers must be 1 to {text.num_hidden_layers} for {name!r}, or 0 for all, got {layers}")
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers


def _own_pad(model: Any, tokenizer: Any) -> None:
    """Give tokenizer and config a pad token that ends no text."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in eos_ids(model, tokenizer):
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def head_of(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the score; peft's trained copy where there is one. Raises `UserError` where there is none."""
    from torch import nn

    found = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1 and "lora_" not in name]
    found = [m for m in found if m.weight.requires_grad] or found
    if len(found) != 1:
        raise UserError(f"{type(model).__name__} has {len(found)} linear layers with one output, where its score should be the only one")
    return found[0]


@contextlib.contextmanager
def watch_head(model: nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """What goes into the score's linear layer and what comes out of it, of every forward, before any pooling."""
    seen: list[tuple[Any, Any]] = []
    hook = head_of(model).register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    try:
        yield seen
    finally:
        hook.remove()


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> dict[str, Any]:
    """input_ids and attention_mask [B, T]."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
