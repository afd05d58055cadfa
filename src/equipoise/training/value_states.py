"""What value heads learn from: states of the policy along its own rollouts, encoded once, in shards.

For every prefix s_t of every rollout, over token trees that share each prompt: the states at the layers that a guide can
read while decoding, the policy's candidates at s_t, and how much of the text would be scored if it were cut there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from equipoise.models.chat import ends_sentence, prompt_ids
from equipoise.models.trees import TokenTree, tree_states
from equipoise.runs import write_atomic
from equipoise.types import Prompt, Rollout, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel

NO_TOKEN = -1


@dataclass(frozen=True)
class States:
    """S prefixes of R rollouts, in the order of the rollouts.

    `rollout_S` indexes the rollouts, `position_S` counts response tokens; `token_S` is the token that was drawn at s_t
    (-1 where the rollout ends without one).
    """

    rollout_S: np.ndarray
    position_S: np.ndarray
    token_S: np.ndarray
    open_SLD: np.ndarray
    """State of s_t at each layer, float16."""
    candidates_SC: np.ndarray
    logprobs_SC: np.ndarray
    """log pi_ref restricted to the candidates."""
    scored_S: np.ndarray
    """Tokens of the response that would be scored if it were cut at s_t (its whole sentences, or all)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to encode."""

    layers: tuple[int, ...]
    top_k: int
    temperature: float
    whole_sentences: bool


def encode_states(
    lm: LanguageModel,
    prompts: Mapping[str, Prompt],
    rollouts: Sequence[Rollout],
    plan: Plan,
    folder: Path,
    shard_rollouts: int,
    progress: Callable[[int], None] | None = None,
) -> States:
    """States of all rollouts; shards that exist are read, the others made. `progress` is told of finished rollouts."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    parts: list[dict[str, np.ndarray]] = []
    for index, start in enumerate(range(0, len(rollouts), shard_rollouts)):
        part, path = rollouts[start : start + shard_rollouts], folder / f"part-{index:05d}.safetensors"
        if not path.exists():
            tensors = _encode(lm, prompts, part, plan)
            write_atomic(path, lambda scratch, tensors=tensors: save_file(tensors, scratch))  # type: ignore[misc]
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run again: it alone is redone") from None
        tensors["rollout_S"] = tensors["rollout_S"] + start
        parts.append(tensors)
        if progress:
            progress(len(part))
    return States(**{name: np.concatenate([p[name] for p in parts]) for name in States.__annotations__})


def _encode(lm: LanguageModel, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout], plan: Plan) -> dict[str, np.ndarray]:
    bodies = [list(r.tokens[:-1] if r.finish_reason == "stop" else r.tokens) for r in rollouts]
    groups = _by_prompt(rollouts)
    stems = {pid: prompt_ids(lm.tokenizer, prompts[pid]) for pid in groups}
    open_SLD = _open_states(lm, groups, stems, bodies, plan)
    candidates_SC, logprobs_SC = _candidates(lm, open_SLD[:, -1], plan)
    token_S = [[*b, r.tokens[-1] if r.finish_reason == "stop" else NO_TOKEN] for b, r in zip(bodies, rollouts, strict=True)]
    return {
        "rollout_S": np.repeat(np.arange(len(bodies)), [len(b) + 1 for b in bodies]).astype(np.int64),
        "position_S": np.concatenate([np.arange(len(b) + 1) for b in bodies]).astype(np.int64),
        "token_S": np.concatenate(token_S).astype(np.int64),
        "open_SLD": open_SLD.astype(np.float16),
        "candidates_SC": candidates_SC.astype(np.int32),
        "logprobs_SC": logprobs_SC.astype(np.float32),
        "scored_S": np.concatenate([_scored(lm, body, plan.whole_sentences) for body in bodies]),
    }


def _scored(lm: LanguageModel, body: Sequence[int], whole: bool) -> np.ndarray:
    """Tokens that would be scored if the body were cut at each length, from 0 on."""
    counts = np.arange(len(body) + 1, dtype=np.int64)
    if whole:
        last = 0
        for count in range(1, len(body) + 1):
            last = count if ends_sentence(lm.tokenizer, body[:count]) else last
            counts[count] = last or count
    return counts


def _by_prompt(rollouts: Sequence[Rollout], most: int = 4) -> dict[str, list[list[int]]]:
    """Rollout indices by prompt, at most `most` to a tree, so that trees stay near the size of a batch."""
    groups: dict[str, list[list[int]]] = {}
    for index, rollout in enumerate(rollouts):
        lists = groups.setdefault(rollout.prompt_id, [])
        if not lists or len(lists[-1]) >= most:
            lists.append([])
        lists[-1].append(index)
    return groups


def _scatter(owners: Sequence[Sequence[int]], states: Sequence[np.ndarray], lengths: Sequence[int]) -> list[np.ndarray]:
    """Cut each tree's states into its rollouts', returned by rollout."""
    by_rollout: dict[int, np.ndarray] = {}
    for members, tree in zip(owners, states, strict=True):
        start = 0
        for index in members:
            by_rollout[index] = tree[start : start + lengths[index]]
            start += lengths[index]
    return [by_rollout[i] for i in range(len(lengths))]


def _open_states(
    lm: LanguageModel, groups: dict[str, list[list[int]]], stems: Mapping[str, list[int]], bodies: list[list[int]], plan: Plan
) -> np.ndarray:
    trees, owners = [], []
    for pid, lists in groups.items():
        for members in lists:
            tree = TokenTree()
            stem = tree.chain(-1, stems[pid])[-1]
            for index in members:
                tree.wanted += [stem, *tree.chain(stem, bodies[index])]
            trees.append(tree)
            owners.append(members)
    states = tree_states(lm, trees, plan.layers)
    return np.concatenate(_scatter(owners, states, [len(b) + 1 for b in bodies]))


def _candidates(lm: LanguageModel, final_SD: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of each state and log pi_ref restricted to them."""
    import torch

    ids, logprobs = [], []
    with torch.inference_mode():
        for start in range(0, len(final_SD), 1024):
            states = torch.from_numpy(final_SD[start : start + 1024]).to(lm.device)
            logits = lm.head(states.to(lm.model.dtype)).float() / plan.temperature
            top, index = logits.topk(min(plan.top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
            ids.append(index.cpu().numpy())
            logprobs.append(torch.log_softmax(top, dim=-1).cpu().numpy())
    return np.concatenate(ids), np.concatenate(logprobs)
