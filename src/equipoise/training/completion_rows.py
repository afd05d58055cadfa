"""What the trainers of causal models share: pairs as rows of token ids, their batches, and the frozen reference's log-probabilities.

The reference reads every row once, before the first step, in shards that a killed run keeps; no batch of training runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.models.completions import Completions, completion_batch, completions_of
from equipoise.models.logprobs import completion_logprobs, completion_sums
from equipoise.progress import bar
from equipoise.runs import digest_of
from equipoise.training.embeddings import encode_shards
from equipoise.types import LabelledPair, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SHARD = 256


@dataclass(frozen=True)
class Row:
    """A row of training: its tokens, and numbers that the loss reads of it by name."""

    completions: Completions
    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    per_token: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """Numbers of every token of every response."""


@dataclass(frozen=True)
class PairRows:
    """Pairs that can be trained on."""

    completions: list[Completions]
    """First response, second response."""
    kept: list[int]
    """Which of the pairs they are."""
    counts: dict[str, int]
    """equal: pairs left out since both responses have the same tokens; cut: pairs that lost the beginning of their prompt, or
    the end of a response, to the limit."""


def pair_rows(pairs: Sequence[LabelledPair], tokenizer: Any, limit: int) -> PairRows:
    """The pairs as token ids, whoever prefers which response, at most `limit` tokens to a conversation.

    Raises `UserError` where nothing is left, and for a limit without room for a response.
    """
    every = [completions_of(tokenizer, pair.prompt, pair.responses, limit, finished=pair.finished) for pair in pairs]
    kept = [at for at, row in enumerate(every) if row.responses[0] != row.responses[1]]
    if not kept:
        raise UserError(f"none of {len(pairs)} pairs has two responses that differ within {limit} tokens: raise max_length")
    rows = [every[at] for at in kept]
    return PairRows(rows, kept, {"equal": len(every) - len(kept), "cut": sum(row.cut for row in rows)})


def collator(*, shared: bool) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
    """Rows to a `completion_batch`, their numbers, [B, count] each, and those of their tokens, [B, M, T] with 0 at padding."""

    def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
        import torch

        numbers = {name: torch.tensor([list(row.numbers[name]) for row in rows], dtype=torch.float32) for name in rows[0].numbers}
        batch = completion_batch([row.completions for row in rows], shared=shared) | numbers
        for name in rows[0].per_token:
            batch[name] = torch.zeros_like(batch["real"])
            for b, row in enumerate(rows):
                for m, told in enumerate(row.per_token[name]):
                    batch[name][b, m, : len(told)] = torch.tensor(told)
        return batch

    return collate


def row_logprobs(model: Any, batch: dict[str, Any]) -> Tensor:
    """log p of every response token, [B, M, T], at the row's `weights` where the model's adapters read some. Differentiable."""
    from equipoise.models.weighted_lora import conditioned, objectives_of

    inner = getattr(model, "module", model)
    if not objectives_of(inner):
        return completion_logprobs(model, batch)
    # A row is one sequence of the forward (a tree), or one per response, which follow each other.
    copies = len(batch["input_ids"]) // len(batch["weights"])
    with conditioned(inner, batch["weights"].repeat_interleave(copies, dim=0)):
        return completion_logprobs(model, batch)


def reference_logprobs(
    model: Any, rows: Sequence[Completions], folder: Path, *, shared: bool, batch_tokens: int = 2048, title: str = "the reference"
) -> np.ndarray:
    """log p(y | x) of every row's responses under the model as it is, float32 [N, M], in shards that a rerun keeps."""
    with bar(f"log-probabilities of {title}", len(rows)) as advance:

        def encode(part: Sequence[Completions]) -> dict[str, np.ndarray]:
            return {"logprob": np.stack(completion_sums(model, part, shared=shared, batch_tokens=batch_tokens))}

        return encode_shards(rows, encode, _SHARD, folder, advance)["logprob"][:]


def kept_logprobs(
    model: Any, weights: str, rows: Sequence[Completions], folder: Path, *, shared: bool, precision: str = "float32", title: str
) -> np.ndarray:
    """`reference_logprobs` of a model of this `weights_key`, kept under `folder` for every run on the same pairs, [N, M].

    A pair is the same whichever of its responses is called the first.
    """
    order_NM = np.array([sorted(range(len(row.responses)), key=lambda m, row=row: row.responses[m]) for row in rows])  # type: ignore[misc]
    ordered = [replace(row, responses=tuple(row.responses[m] for m in order_M)) for row, order_M in zip(rows, order_NM, strict=True)]
    asked = {"weights": weights, "rows": [[row.prompt, row.responses] for row in ordered], "shared": shared, "precision": precision}
    found_NM = reference_logprobs(model, ordered, folder / digest_of(asked)[:16], shared=shared, title=title)
    out_NM = np.empty_like(found_NM)
    np.put_along_axis(out_NM, order_NM, found_NM, axis=1)
    return out_NM
