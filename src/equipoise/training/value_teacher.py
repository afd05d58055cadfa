"""The teacher of the value heads: what a prefix of the reference is worth, held out by prompt.

    V_k(s) ~ E[z_k | s]     ridge on f = [m, d, c] and p f

At the teacher's layer, m: sum of the response's states so far, over the horizon; d: mean of its states up to its last
whole sentence, which is what would be scored if it were cut here; c: state of s. p: position in [-1, 1]. The first two
know what was said, the last what is about to be. See value.py for the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.training.linear import Moments, cross_validate, fold_moments, refit
from equipoise.training.value_states import NO_TOKEN, States
from equipoise.types import Rollout, UserError

if TYPE_CHECKING:
    from equipoise.training.value import Config

_BLOCK = 2048


@dataclass(frozen=True)
class Targets:
    """Per rollout: standardised rewards, the same less the mean of the prompt's others, the fold, and whether it ended by itself."""

    z_RK: np.ndarray
    centred_RK: np.ndarray
    fold_R: np.ndarray
    stopped_R: np.ndarray


def make_targets(rollouts: Sequence[Rollout], z_RK: np.ndarray, folds: int, seed: int) -> Targets:
    """Centre rewards within prompts and deal prompts into folds. Unscored rollouts are NaN and left out later, as a prompt's only one is.

        centred_i = z_i - mean_{j != i} z_j = (z_i - mean z) G / (G - 1)

    whose mean given what was said so far is E[z_i | s] less the prompt's; a mean that holds z_i itself would shrink it by 1 - 1/G.
    """
    names, prompt_R = np.unique([r.prompt_id for r in rollouts], return_inverse=True)
    if len(names) < folds:
        raise UserError(f"value heads need rollouts of at least {folds} prompts, got {len(names)}")
    scored = np.isfinite(z_RK)
    counts = np.stack([np.bincount(prompt_R, s, len(names)) for s in scored.T], axis=1)
    sums = np.stack([np.bincount(prompt_R, np.where(s, z, 0.0), len(names)) for z, s in zip(z_RK.T, scored.T, strict=True)], axis=1)
    others = np.where(counts > 1, counts / np.maximum(counts - 1, 1), np.nan)
    fold_P = np.random.default_rng(seed).permutation(len(names)) % folds
    return Targets(
        z_RK=z_RK,
        centred_RK=(z_RK - (sums / np.maximum(counts, 1))[prompt_R]) * others[prompt_R],
        fold_R=fold_P[prompt_R],
        stopped_R=np.array([r.finish_reason == "stop" for r in rollouts]),
    )


def response_sums(states_SD: np.ndarray, position_S: np.ndarray) -> np.ndarray:
    """Sum over the response's tokens so far of their states, [S, D] float32; 0 at position 0."""
    out_SD = states_SD.astype(np.float64)
    out_SD[position_S == 0] = 0.0  # the state at t = 0 belongs to the prompt
    np.cumsum(out_SD, axis=0, out=out_SD)
    begun_S = np.arange(len(position_S)) - position_S
    return (out_SD - out_SD[begun_S]).astype(np.float32)


class TeacherFeatures:
    """[f, p f, p, 1] for f = [m, d, c], each part divided by its sd."""

    def __init__(self, states: States, layer: int, horizon: int) -> None:
        self.states, self.current_SD = states, states.open_SLD[:, layer]
        position_S = states.position_S
        self.sum_SD = response_sums(self.current_SD, position_S) / horizon
        at_S = np.arange(len(position_S)) - position_S + states.scored_S  # the row at which the scored text ends
        self.mean_SD = horizon * self.sum_SD[at_S] / np.maximum(states.scored_S, 1)[:, None].astype(np.float32)
        self.p_S = np.minimum(2.0 * position_S / horizon - 1.0, 1.0).astype(np.float32)
        parts = (self.sum_SD, self.mean_SD, self.current_SD)
        self._sd = [np.maximum(part.std(axis=0, dtype=np.float32), 1e-3) for part in parts]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The features of these states."""
        parts = (self.sum_SD, self.mean_SD, self.current_SD)
        f = np.concatenate([part[rows].astype(np.float32) / sd for part, sd in zip(parts, self._sd, strict=True)], axis=1)
        p = self.p_S[rows][:, None]
        return np.concatenate([f, p * f, p, np.ones_like(p)], axis=1)


def fit_teacher(states: States, layer: int, targets: Targets, horizon: int, config: Config) -> tuple[np.ndarray, dict[str, Any]]:
    """V(s) of every state by the fits that left out its prompt's fold and fold f, [F, S, K], and the teacher's figures.

    At its own fold only that one is left out. Rollouts with an unscored objective are left out of all fits.
    """
    features = TeacherFeatures(states, layer, horizon)
    fold_S, y_SK = targets.fold_R[states.rollout_S], targets.centred_RK[states.rollout_S]
    scored_S = np.isfinite(y_SK).all(axis=1)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        for rows in blocks_of(np.flatnonzero(scored_S)):
            yield features.rows(rows), y_SK[rows], np.ones(len(rows)), fold_S[rows]

    moments = fold_moments(blocks(), config.folds)
    some = next(fold for fold in moments if fold.count)
    l2_K, held, r2_K = cross_validate(moments, config.l2_teacher, lambda l2: relative_penalty(l2, some))
    fits = {(f, f): B_DK for f, B_DK in enumerate(held)}
    for pair in itertools.combinations(range(config.folds), 2):
        fits[pair] = fits[pair[::-1]] = refit(moments, l2_K, lambda l2: relative_penalty(l2, some), without=pair)
    value_FSK = np.empty((config.folds, *y_SK.shape))
    for rows in blocks_of(np.arange(len(y_SK))):
        x = features.rows(rows)
        for fold in np.unique(fold_S[rows]):
            mine = fold_S[rows] == fold
            for f in range(config.folds):
                value_FSK[f, rows[mine]] = x[mine] @ fits[f, fold]
    value_SK = value_FSK[fold_S, np.arange(len(y_SK))]
    return value_FSK, {"l2": l2_K, "r2": r2_K, "r2_by_position": _by_position(states, scored_S, y_SK, value_SK, horizon)}


def relative_penalty(l2: float, moments: Moments) -> np.ndarray:
    """l2 in units of the features' mean square, so that a penalty means the same for any scale of states."""
    return np.full(len(moments.xx), l2 * np.trace(moments.xx) / len(moments.xx) / max(moments.count, 1.0))


def blocks_of(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in order, few enough at a time for their features to fit into memory."""
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK]


def _by_position(states: States, scored_S: np.ndarray, y_SK: np.ndarray, predicted_SK: np.ndarray, horizon: int) -> list[list[Any]]:
    """[[first position, R2 per objective], ...] in eight bins."""
    out = []
    edges = np.unique(np.linspace(0, horizon + 1, 9).astype(int))
    for low, high in itertools.pairwise(edges):
        rows = scored_S & (states.position_S >= low) & (states.position_S < high)
        if rows.sum() > 20:
            error = ((y_SK[rows] - predicted_SK[rows]) ** 2).sum(axis=0)
            out.append([int(low), (1 - error / np.maximum((y_SK[rows] ** 2).sum(axis=0), 1e-30)).tolist()])
    return out


@dataclass(frozen=True)
class Actions:
    """Drawn tokens with the teacher's advantage of each."""

    state_A: np.ndarray
    token_A: np.ndarray
    advantage_AK: np.ndarray
    """By teachers that never saw the token's own fold: what heads learn from."""
    blind_AFK: np.ndarray
    """By teachers that never saw fold f either: what is held out from fold f's prompts learns from these."""


def make_actions(states: States, targets: Targets, value_FSK: np.ndarray) -> Actions:
    """V(s + a) - V(s) of the drawn tokens; the end of a turn is worth the reward it was given.

    At the cap the teacher's V stands in for the reward: it already knows what will be scored there, without the noise.
    """
    drawn = np.flatnonzero(states.token_S != NO_TOKEN)
    last = np.append(states.rollout_S[1:] != states.rollout_S[:-1], True)[drawn]  # rollouts are stored in order
    reward_AK = targets.centred_RK[states.rollout_S[drawn]]
    drawn, last, reward_AK = (part[np.isfinite(reward_AK).all(axis=1)] for part in (drawn, last, reward_AK))
    after_FAK = np.where(last[:, None], reward_AK, value_FSK[:, np.minimum(drawn + 1, len(states.token_S) - 1)])
    blind_AFK = (after_FAK - value_FSK[:, drawn]).transpose(1, 0, 2)
    fold_A = targets.fold_R[states.rollout_S[drawn]]
    return Actions(drawn, states.token_S[drawn], blind_AFK[np.arange(len(drawn)), fold_A], blind_AFK)
