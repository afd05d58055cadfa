"""The teacher of the value heads: what a prefix of the reference is worth, held out by prompt.

    V_k(s) ~ E[z_k | s]     ridge on [m, c] and p [m, c]

m: sum of the response's states so far at the teacher's layer; c: state of s; p: position in [-1, 1]. The sum knows what
was said, the state what is about to be. See value.py for the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.training.linear import Moments, cross_validate, fold_moments
from equipoise.training.value_states import NO_TOKEN, States
from equipoise.types import Rollout, UserError

if TYPE_CHECKING:
    from equipoise.training.value import Config

_BLOCK = 2048


@dataclass(frozen=True)
class Targets:
    """Per rollout: standardised rewards z_RK, their prompt-centred form, fold, and the tokens that count."""

    z_RK: np.ndarray
    centred_RK: np.ndarray
    fold_R: np.ndarray
    kept_R: np.ndarray
    stopped_R: np.ndarray


def make_targets(rollouts: Sequence[Rollout], z_RK: np.ndarray, folds: int, seed: int) -> Targets:
    """Centre rewards within prompts and deal prompts into folds. Unscored rollouts stay NaN and are left out later."""
    names, prompt_R = np.unique([r.prompt_id for r in rollouts], return_inverse=True)
    if len(names) < folds:
        raise UserError(f"value heads need rollouts of at least {folds} prompts, got {len(names)}")
    scored = np.isfinite(z_RK)
    counts = np.stack([np.bincount(prompt_R, s, len(names)) for s in scored.T], axis=1)
    sums = np.stack([np.bincount(prompt_R, np.where(s, z, 0.0), len(names)) for z, s in zip(z_RK.T, scored.T, strict=True)], axis=1)
    fold_P = np.random.default_rng(seed).permutation(len(names)) % folds
    return Targets(
        z_RK=z_RK,
        centred_RK=z_RK - (sums / np.maximum(counts, 1))[prompt_R],
        fold_R=fold_P[prompt_R],
        kept_R=np.array([r.text_tokens for r in rollouts]),
        stopped_R=np.array([r.finish_reason == "stop" for r in rollouts]),
    )


Value = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def response_sums(states: States, layer: int) -> np.ndarray:
    """Sum over the response's tokens so far of their states at `layer` (an index into open_SLD), [S, D] float32."""
    out_SD = states.open_SLD[:, layer].astype(np.float32)
    first_S = states.position_S == 0
    out_SD[first_S] = 0.0  # the state at t = 0 belongs to the prompt
    np.cumsum(out_SD, axis=0, out=out_SD)
    begun_S = np.maximum.accumulate(np.where(first_S, np.arange(len(first_S)), 0))
    return out_SD - out_SD[begun_S]


def fit_teacher(
    states: States, sums_SD: np.ndarray, layer: int, targets: Targets, horizon: int, config: Config
) -> tuple[Value, dict[str, Any]]:
    """Ridge of prompt-centred rewards on f = [m, c] and p f, for the sum m and the state c; returns value() and figures.

    `value(sums, states, position, fold)` predicts each row with the fit that left its fold out.
    """
    states_SD = states.open_SLD[:, layer]
    scale = [np.maximum(part.astype(np.float32).std(axis=0), 1e-3) for part in (sums_SD, states_SD)]

    def features(sums: np.ndarray, current: np.ndarray, position: np.ndarray) -> np.ndarray:
        p = np.minimum(2.0 * position / horizon - 1.0, 1.0).astype(np.float32)[:, None]
        f = np.concatenate([sums / scale[0], current.astype(np.float32) / scale[1]], axis=1)
        return np.concatenate([f, p * f, p, np.ones_like(p)], axis=1)

    fold_S, y_SK = targets.fold_R[states.rollout_S], targets.centred_RK[states.rollout_S]
    live_S = (states.position_S <= targets.kept_R[states.rollout_S]) & np.isfinite(y_SK).all(axis=1)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        for rows in blocks_of(np.flatnonzero(live_S)):
            yield features(sums_SD[rows], states_SD[rows], states.position_S[rows]), y_SK[rows], np.ones(len(rows)), fold_S[rows]

    moments = fold_moments(blocks(), config.folds)
    l2_K, held, r2_K = cross_validate(moments, config.l2_teacher, lambda l2: relative_penalty(l2, moments[0]))

    def value(sums: np.ndarray, current: np.ndarray, position: np.ndarray, fold: np.ndarray) -> np.ndarray:
        out = np.empty((len(sums), y_SK.shape[1]))
        for rows in blocks_of(np.arange(len(sums))):
            x = features(sums[rows], current[rows], position[rows])
            for f in np.unique(fold[rows]):
                mine = fold[rows] == f
                out[rows[mine]] = x[mine] @ held[f]
        return out

    predicted = value(sums_SD, states_SD, states.position_S, fold_S)
    return value, {"l2": l2_K, "r2": r2_K, "r2_by_position": _by_position(states, live_S, y_SK, predicted, horizon)}


def relative_penalty(l2: float, moments: Moments) -> np.ndarray:
    """l2 in units of the features' mean square, so that a penalty means the same for any scale of states."""
    return np.full(len(moments.xx), l2 * np.trace(moments.xx) / len(moments.xx) / max(moments.count, 1.0))


def blocks_of(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK]


def _by_position(states: States, live_S: np.ndarray, y_SK: np.ndarray, predicted_SK: np.ndarray, horizon: int) -> list[list[Any]]:
    """[[first position, R2 per objective], ...] in eight bins."""
    out = []
    edges = np.unique(np.linspace(0, horizon + 1, 9).astype(int))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        rows = live_S & (states.position_S >= low) & (states.position_S < high)
        if rows.sum() > 20:
            error = ((y_SK[rows] - predicted_SK[rows]) ** 2).sum(axis=0)
            out.append([int(low), (1 - error / np.maximum((y_SK[rows] ** 2).sum(axis=0), 1e-30)).tolist()])
    return out


@dataclass(frozen=True)
class Actions:
    """Drawn and tried actions with the teacher's advantage of each; `drawn_A` marks those that the rollout took."""

    state_A: np.ndarray
    token_A: np.ndarray
    advantage_AK: np.ndarray
    drawn_A: np.ndarray


def make_actions(states: States, sums_SD: np.ndarray, layer: int, targets: Targets, value: Value) -> tuple[Actions, np.ndarray]:
    """V(s + a) - V(s) of drawn and tried actions, and V(s) itself. What ends a turn is worth the reward it was given."""
    fold_S, kept_S = targets.fold_R[states.rollout_S], targets.kept_R[states.rollout_S]
    value_SK = value(sums_SD, states.open_SLD[:, layer], states.position_S, fold_S)
    drawn = np.flatnonzero(states.position_S < kept_S)  # the next state is the next row: rollouts are stored in order
    ends = np.flatnonzero((states.token_S != NO_TOKEN) & targets.stopped_R[states.rollout_S] & (states.position_S == kept_S))
    tried = np.flatnonzero((states.position_S < kept_S)[states.extra_state_X])
    at = states.extra_state_X[tried]
    after = states.extra_open_XD[tried].astype(np.float32)
    tried_value = value(sums_SD[at] + after, after, states.position_S[at] + 1, fold_S[at])
    advantage = [
        value_SK[drawn + 1] - value_SK[drawn],
        targets.centred_RK[states.rollout_S[ends]] - value_SK[ends],
        tried_value - value_SK[at],
    ]
    actions = Actions(
        state_A=np.concatenate([drawn, ends, at]),
        token_A=np.concatenate([states.token_S[drawn], states.token_S[ends], states.extra_token_X[tried]]),
        advantage_AK=np.concatenate(advantage),
        drawn_A=np.concatenate([np.ones(len(drawn) + len(ends), dtype=bool), np.zeros(len(at), dtype=bool)]),
    )
    scored = np.isfinite(actions.advantage_AK).all(axis=1)
    return Actions(actions.state_A[scored], actions.token_A[scored], actions.advantage_AK[scored], actions.drawn_A[scored]), value_SK
