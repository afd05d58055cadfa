"""The two value forms that a guide reads, fitted to the teacher's advantages and values (see value.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.models.chat import prompt_ids
from equipoise.models.trees import TokenTree, tree_states
from equipoise.models.value_heads import Calibration, state_features
from equipoise.training.linear import Moments, cross_validate, fold_moments, refit
from equipoise.training.value_states import NO_TOKEN, States
from equipoise.training.value_teacher import Actions, Targets, blocks_of, relative_penalty
from equipoise.types import Prompt, Rollout

if TYPE_CHECKING:
    import torch

    from equipoise.models.loading import LanguageModel
    from equipoise.training.value import Config


class SinglePass:
    """Design of the single-pass regression: x(s) (x) e_a with e_a centred over the step's candidates."""

    def __init__(self, lm: LanguageModel, states: States, horizon: int, config: Config) -> None:
        import torch

        self.states, self.horizon = states, horizon
        flat = torch.from_numpy(states.open_SLD.reshape(len(states.open_SLD), -1)).float()
        self.mean_I, self.whiten_IM = _whitening(flat, config.state_features)
        self.x_SX = state_features(flat, torch.from_numpy(states.position_S), self.mean_I, self.whiten_IM, horizon)
        table = lm.model.get_input_embeddings().weight.detach().float().cpu()
        self.scale = float(table.std())
        self.table_VD = table / self.scale
        self.prob_SC = torch.from_numpy(states.logprobs_SC).exp()
        sample = np.linspace(0, len(states.token_S) - 1, min(len(states.token_S), 8192)).astype(int)
        centred = self._centred(sample, np.maximum(states.token_S[sample], 0))
        spread, basis = torch.linalg.eigh(centred.T @ centred / len(centred))
        count = min(config.token_features, basis.shape[1])
        # The leading directions at a common scale, so that one penalty serves all interactions.
        self.basis_DE = basis[:, -count:] / spread[-count:].mean().clamp(min=1e-12).sqrt()

    def _centred(self, state_A: np.ndarray, token_A: np.ndarray) -> torch.Tensor:
        import torch

        ids = torch.from_numpy(self.states.candidates_SC[state_A]).long()
        mean_AD = torch.einsum("ac,acd->ad", self.prob_SC[state_A], self.table_VD[ids])
        return self.table_VD[torch.from_numpy(token_A).long()] - mean_AD

    def rows(self, state_A: np.ndarray, token_A: np.ndarray) -> np.ndarray:
        """Design matrix [A, D + X E]: the candidate alone at full width, then state times candidate."""
        import torch

        e_AD = self._centred(state_A, token_A)
        product = self.x_SX[state_A][:, 1:, None] * (e_AD @ self.basis_DE)[:, None, :]
        return torch.cat([e_AD, product.flatten(1)], dim=1).numpy()

    def penalty(self, l2: float, moments: Moments) -> np.ndarray:
        """The interactions at l2, the candidate alone at a tenth of it."""
        size = self.table_VD.shape[1]
        scale = np.diag(moments.xx).copy() / max(moments.count, 1.0)
        return np.where(np.arange(len(scale)) < size, 0.1 * l2 * scale[:size].mean(), l2 * scale[size:].mean())

    def unpack(self, B_FK: np.ndarray) -> np.ndarray:
        """Coefficients as single_KXD of `ValueHeads`, for embeddings in their own scale."""
        size, states = self.table_VD.shape[1], self.x_SX.shape[1]
        alone_KD = B_FK[:size].T
        product_KXE = B_FK[size:].T.reshape(-1, states - 1, self.basis_DE.shape[1])
        inner_KXD = product_KXE @ self.basis_DE.T.numpy()
        return np.concatenate([alone_KD[:, None], inner_KXD], axis=1) / self.scale


def _whitening(flat_SI: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, and the leading principal directions of the standardised states, each at unit variance."""
    import torch

    mean_I, sd_I = flat_SI.mean(dim=0), flat_SI.std(dim=0).clamp(min=1e-3)
    unit = (flat_SI - mean_I) / sd_I
    spread, basis = torch.linalg.eigh(unit.T @ unit / len(unit))
    keep = min(count, basis.shape[1])
    whiten = basis[:, -keep:].flip(1) / spread[-keep:].flip(0).clamp(min=1e-6).sqrt()
    return mean_I, whiten / sd_I[:, None]


def fit_single_pass(
    design: SinglePass, actions: Actions, targets: Targets, states: States, config: Config
) -> tuple[np.ndarray, dict[str, Any]]:
    """single_KXD and its figures: held-out R2 of the advantage, and `efficiency` on held-out rollouts."""
    fold_A = targets.fold_R[states.rollout_S[actions.state_A]]
    count = actions.advantage_AK.shape[1]
    y_AK = np.concatenate([actions.advantage_AK, actions.blind_AFK.reshape(len(fold_A), -1)], axis=1)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        for rows in blocks_of(np.arange(len(fold_A))):
            yield design.rows(actions.state_A[rows], actions.token_A[rows]), y_AK[rows], np.ones(len(rows)), fold_A[rows]

    moments = fold_moments(blocks(), config.folds)
    some = next(fold for fold in moments if fold.count)
    blind = [fold.targets(slice(count, None)) for fold in moments]
    l2_K, held, r2_K = cross_validate(blind, config.l2_heads, lambda l2: design.penalty(l2, some), per_fold=True)
    q_AK = np.zeros_like(actions.advantage_AK)
    for rows in blocks_of(np.arange(len(fold_A))):
        x = design.rows(actions.state_A[rows], actions.token_A[rows])
        for fold in np.unique(fold_A[rows]):
            mine = fold_A[rows] == fold
            q_AK[rows[mine]] = x[mine] @ held[fold]
    B_FK = refit([fold.targets(slice(count)) for fold in moments], l2_K, lambda l2: design.penalty(l2, some))
    return design.unpack(B_FK), {"l2": l2_K, "r2": r2_K, "efficiency": efficiency(q_AK, actions, targets, states)}


def efficiency(q_AK: np.ndarray, actions: Actions, targets: Targets, states: States) -> list[float]:
    """Correlation over rollouts of the prompt-centred reward with the summed advantages of its drawn tokens."""
    total_RK = np.zeros_like(targets.centred_RK)
    np.add.at(total_RK, states.rollout_S[actions.state_A], q_AK)
    out = []
    for k in range(total_RK.shape[1]):
        scored = np.isfinite(targets.centred_RK[:, k])
        both = np.corrcoef(total_RK[scored, k], targets.centred_RK[scored, k])[0, 1] if total_RK[scored, k].std() > 0 else 0.0
        out.append(float(both))
    return out


def fit_prefix(
    states: States, value_SK: np.ndarray, targets: Targets, horizon: int, config: Config
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """prefix_KPI and prefix_mean_I: ridge of the teacher's V(s) on [h, p h] for open states h, and held-out R2."""
    flat = states.open_SLD.reshape(len(states.open_SLD), -1)
    mean_I, scale_I = flat.mean(axis=0, dtype=np.float32), np.maximum(flat.astype(np.float32).std(axis=0), 1e-3)
    live = np.flatnonzero(states.position_S > 0)
    fold_S = targets.fold_R[states.rollout_S]

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        for rows in blocks_of(live):
            h = (flat[rows].astype(np.float32) - mean_I) / scale_I
            p = np.minimum(2.0 * states.position_S[rows] / horizon - 1.0, 1.0).astype(np.float32)[:, None]
            x = np.concatenate([h, p * h, np.ones_like(p), p], axis=1)
            yield x, value_SK[rows], np.ones(len(rows)), fold_S[rows]

    moments = fold_moments(blocks(), config.folds)
    l2_K, _, r2_K = cross_validate(moments, config.l2_heads, lambda l2: relative_penalty(l2, moments[0]))
    B_FK = refit(moments, l2_K, lambda l2: relative_penalty(l2, moments[0]))
    size = len(mean_I)
    weight_KPI = np.stack([B_FK[:size].T, B_FK[size : 2 * size].T], axis=1) / scale_I
    return {"prefix_KPI": weight_KPI, "prefix_mean_I": mean_I}, {"l2": l2_K, "r2": r2_K}


def calibrate_single_pass(design: SinglePass, single_KXD: np.ndarray, states: States, targets: Targets, config: Config) -> Calibration:
    """q of all candidates at evenly spaced states that matter."""
    import torch

    live = np.flatnonzero(states.token_S != NO_TOKEN)
    pick = live[np.linspace(0, len(live) - 1, min(config.calibration_states, len(live))).astype(int)]
    e_SCD = design.table_VD[torch.from_numpy(states.candidates_SC[pick]).long()] * design.scale
    read_SKD = torch.einsum("sx,kxd->skd", design.x_SX[pick], torch.from_numpy(single_KXD).float())
    q_SCK = torch.einsum("scd,skd->sck", e_SCD, read_SKD).numpy()
    return Calibration(logprobs_SC=states.logprobs_SC[pick], q_SCK=q_SCK, steps=len(live) / len(targets.fold_R))


def calibrate_prefix(
    lm: LanguageModel,
    prompts: Mapping[str, Prompt],
    rollouts: Sequence[Rollout],
    states: States,
    layers: Sequence[int],
    tensors: Mapping[str, np.ndarray],
    horizon: int,
    count: int = 96,
) -> Calibration:
    """v of all candidates at about `count` states: each chosen rollout once, with its candidates as branches."""
    live = states.token_S != NO_TOKEN
    first_R = np.flatnonzero(states.position_S == 0)
    chosen = np.linspace(0, len(rollouts) - 1, min(len(rollouts), max(1, count // 4))).astype(int)
    trees, picked = [], []
    for index in chosen:
        length = int(live[states.rollout_S == index].sum())
        tree = TokenTree()
        stem = tree.chain(-1, prompt_ids(lm.tokenizer, prompts[rollouts[index].prompt_id]))[-1]
        nodes = [stem, *tree.chain(stem, rollouts[index].tokens[: max(0, length - 1)])]
        steps = np.unique(np.linspace(0, max(0, length - 1), 4).astype(int))
        for step in steps:
            state = first_R[index] + step
            tree.wanted += [tree.chain(nodes[step], [token])[0] for token in states.candidates_SC[state]]
            picked.append(state)
        trees.append(tree)
    found = np.concatenate(tree_states(lm, trees, layers))
    h = found.reshape(len(picked), states.candidates_SC.shape[1], -1) - tensors["prefix_mean_I"]
    p = np.minimum(2.0 * (states.position_S[picked] + 1) / horizon - 1.0, 1.0)
    weight_SKI = tensors["prefix_KPI"][:, 0][None] + p[:, None, None] * tensors["prefix_KPI"][:, 1][None]
    q_SCK = np.einsum("sci,ski->sck", h, weight_SKI)
    return Calibration(logprobs_SC=states.logprobs_SC[picked], q_SCK=q_SCK, steps=float(live.sum()) / len(rollouts))
