"""What value heads learn from: states of the policy along its own rollouts, encoded once, in shards.

For every prefix s_t of every rollout, over token trees that share each prompt: the states at the layers that a guide can
read while decoding, and the policy's candidates at s_t. At a share of the prefixes, also the state after a few
candidates that were not drawn, which show the heads what other choices do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from equipoise.models.chat import prompt_ids
from equipoise.models.trees import TokenTree, tree_states
from equipoise.runs import write_atomic
from equipoise.types import Prompt, Rollout, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel

NO_TOKEN = -1


@dataclass(frozen=True)
class States:
    """S prefixes of R rollouts, in the order of the rollouts; X extra actions.

    `rollout_S` indexes the rollouts, `position_S` counts response tokens; `token_S` is the token that was drawn at s_t
    (-1 where the rollout ends without one). `extra_*` describe candidates that were not drawn.
    """

    rollout_S: np.ndarray
    position_S: np.ndarray
    token_S: np.ndarray
    open_SLD: np.ndarray
    """State of s_t at each layer, float16."""
    candidates_SC: np.ndarray
    logprobs_SC: np.ndarray
    """log pi_ref restricted to the candidates."""
    extra_state_X: np.ndarray
    extra_token_X: np.ndarray
    extra_open_XD: np.ndarray
    """State after the tried candidate, at the teacher's layer."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to encode."""

    layers: tuple[int, ...]
    teacher_layer: int
    top_k: int
    temperature: float
    extra_every: int
    """Every how many prefixes other candidates are tried; 0 for never."""
    extra_candidates: int
    seed: int


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
            tensors = _encode(lm, prompts, part, plan, np.random.default_rng([plan.seed, index]))
            write_atomic(path, lambda scratch, tensors=tensors: save_file(tensors, scratch))  # type: ignore[misc]
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run again: it alone is redone") from None
        tensors["extra_state_X"] = tensors["extra_state_X"] + sum(len(p["rollout_S"]) for p in parts)
        tensors["rollout_S"] = tensors["rollout_S"] + start
        parts.append(tensors)
        if progress:
            progress(len(part))
    return States(**{name: np.concatenate([p[name] for p in parts]) for name in States.__annotations__})


def _encode(
    lm: LanguageModel, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout], plan: Plan, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    bodies = [list(r.tokens[:-1] if r.finish_reason == "stop" else r.tokens) for r in rollouts]
    groups = _by_prompt(rollouts)
    stems = {pid: prompt_ids(lm.tokenizer, prompts[pid]) for pid in groups}
    open_SLD = _open_states(lm, groups, stems, bodies, plan)
    candidates_SC, logprobs_SC = _candidates(lm, open_SLD[:, -1], plan)
    position_S = np.concatenate([np.arange(len(b) + 1) for b in bodies])
    rollout_S = np.repeat(np.arange(len(bodies)), [len(b) + 1 for b in bodies])
    token_S = np.concatenate([[*b, r.tokens[-1] if r.finish_reason == "stop" else NO_TOKEN] for b, r in zip(bodies, rollouts, strict=True)])
    extra_state_X, extra_token_X = _choose_extras(lm, position_S, token_S, candidates_SC, logprobs_SC, plan, rng)
    extra_open_XD = _extra_states(lm, groups, stems, bodies, extra_state_X, extra_token_X, plan)
    return {
        "rollout_S": rollout_S.astype(np.int64),
        "position_S": position_S.astype(np.int64),
        "token_S": token_S.astype(np.int64),
        "open_SLD": open_SLD.astype(np.float16),
        "candidates_SC": candidates_SC.astype(np.int32),
        "logprobs_SC": logprobs_SC.astype(np.float32),
        "extra_state_X": extra_state_X.astype(np.int64),
        "extra_token_X": extra_token_X.astype(np.int64),
        "extra_open_XD": extra_open_XD.astype(np.float16),
    }


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


def _choose_extras(
    lm: LanguageModel,
    position_S: np.ndarray,
    token_S: np.ndarray,
    candidates_SC: np.ndarray,
    logprobs_SC: np.ndarray,
    plan: Plan,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """At every `extra_every`-th prefix, candidates other than the drawn one and the end of turn, likely ones more often."""
    if not plan.extra_every or not plan.extra_candidates:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    offset = rng.integers(plan.extra_every)
    states = np.flatnonzero(((np.arange(len(position_S)) + offset) % plan.extra_every == 0) & (token_S != NO_TOKEN))
    # Gumbel top-m of half the log-probability: a compromise between what is drawn often and what differs.
    noise = rng.gumbel(size=(len(states), candidates_SC.shape[1])) + 0.5 * logprobs_SC[states]
    barred = (candidates_SC[states] == token_S[states][:, None]) | np.isin(candidates_SC[states], list(lm.eos_ids))
    order = np.argsort(-np.where(barred, -np.inf, noise), axis=1)[:, : plan.extra_candidates]
    allowed = ~np.take_along_axis(barred, order, axis=1)
    tokens = np.take_along_axis(candidates_SC[states], order, axis=1)
    return np.repeat(states, order.shape[1])[allowed.ravel()], tokens.ravel()[allowed.ravel()].astype(np.int64)


def _extra_states(
    lm: LanguageModel,
    groups: dict[str, list[list[int]]],
    stems: Mapping[str, list[int]],
    bodies: list[list[int]],
    extra_state_X: np.ndarray,
    extra_token_X: np.ndarray,
    plan: Plan,
) -> np.ndarray:
    """State at the teacher's layer after each tried candidate, [X, D]; the layers above are not run."""
    starts = np.concatenate([[0], np.cumsum([len(b) + 1 for b in bodies])])
    extras: dict[int, list[int]] = {}
    for extra, state in enumerate(extra_state_X.tolist()):
        extras.setdefault(state, []).append(extra)
    trees, asked = [], []
    for pid, lists in groups.items():
        for members in lists:
            tree, tried = TokenTree(), []
            stem = tree.chain(-1, stems[pid])[-1]
            for index in members:
                prefixes = [stem, *tree.chain(stem, bodies[index])]
                tried += [(e, node) for step, node in enumerate(prefixes) for e in extras.get(int(starts[index]) + step, [])]
            tree.wanted = [tree.chain(node, [int(extra_token_X[extra])])[0] for extra, node in tried]
            if tried:
                trees.append(tree)
                asked.append([extra for extra, _ in tried])
    out_XD = np.zeros((len(extra_state_X), lm.hidden_size), dtype=np.float32)
    for extra_ids, states in zip(asked, tree_states(lm, trees, [plan.teacher_layer]), strict=True):
        out_XD[extra_ids] = states[:, 0]
    return out_XD
