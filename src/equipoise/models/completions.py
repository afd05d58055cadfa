"""Prompts with one or more responses each, as token ids, and the batches in which their log-probabilities are read.

A row of a batch is a tree: the prompt's tokens once, and under them the responses, none of which sees another. That is exact
for decoders that read any 4D mask; for other models every response is a row of its own, after a copy of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equipoise.models.chat import response_ids, turn_ids
from equipoise.models.trees import TokenTree, tree_batch
from equipoise.types import Prompt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Completions:
    """A prompt and responses to it, token ids; a prompt has at least one token."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    cut: bool = False
    """Whether it was longer than the limit: the beginning of the prompt went first, then the end of the responses."""

    def tokens(self, *, shared: bool) -> int:
        """Tokens of a batch that it takes, without the padding of the batch."""
        if shared:
            return len(self.prompt) + sum(map(len, self.responses))
        return len(self.responses) * (len(self.prompt) + max(map(len, self.responses)))


def completions_of(
    tokenizer: Any, prompt: Prompt, responses: Sequence[str], limit: int | None = None, *, finished: Sequence[bool] | None = None
) -> Completions:
    """The prompt in the chat template and the responses, each with the token that ends a turn unless it isn't `finished` or is cut.

    With a `limit` the longest response and the prompt have at most so many tokens: the beginning of the prompt goes first, the
    same for all responses, then the end of a response that is too long alone. Raises `UserError` for a limit without room.
    """
    turns = [turn_ids(tokenizer, prompt, response, limit) for response in responses]
    context = min((context for context, _, _ in turns), key=len)
    done, said = finished or [True] * len(responses), []
    for (_, answer, cut), response, ended in zip(turns, responses, done, strict=True):
        whole = ended and not (cut and len(answer) < len(response_ids(tokenizer, response)))
        said.append(tuple(answer if whole else answer[:-1]))  # nobody ends where the limit is
    return Completions(tuple(context), tuple(said), any(cut for _, _, cut in turns))


def completion_batch(rows: Sequence[Completions], *, shared: bool) -> dict[str, torch.Tensor]:
    """Inputs of a causal model, and which of its states predict which tokens.

    `input_ids`, `attention_mask`, `position_ids` [R, N]; `predictor`, `target`, `real` [B, M, T]: token t of response m is
    `target`, and state number `predictor` (row times N plus node) is the one before it; `real` is 0 at padding. All rows have
    the same number of responses.
    """
    import torch

    trees: list[TokenTree] = []
    ends: list[tuple[int, list[int]]] = []  # per response: its tree, its nodes and the one before them
    for row in rows:
        for responses in [row.responses] if shared else [(response,) for response in row.responses]:
            tree = TokenTree()
            stem = tree.chain(-1, row.prompt)[-1]
            ends += [(len(trees), [stem, *tree.chain(stem, response)]) for response in responses]
            trees.append(tree)
    ids, mask, positions = tree_batch(trees)
    if not shared:  # plain rows need no 4D mask, and every model reads a plain one
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([len(tree) for tree in trees])[:, None]
    count, longest = len(rows[0].responses), max(len(nodes) - 1 for _, nodes in ends)
    predictor, target = (torch.zeros(len(ends), longest, dtype=torch.long) for _ in range(2))
    real = torch.zeros(len(ends), longest)
    for at, (index, nodes) in enumerate(ends):
        size = len(nodes) - 1
        predictor[at, :size] = index * ids.shape[1] + torch.tensor(nodes[:-1], dtype=torch.long)
        target[at, :size] = ids[index, torch.tensor(nodes[1:], dtype=torch.long)]
        real[at, :size] = 1.0
    shape = (len(rows), count, longest)
    batch = {"predictor": predictor.view(shape), "target": target.view(shape), "real": real.view(shape)}
    return batch | {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
