"""Value heads for steering one policy to many objectives: MAVIS's values, in a form that costs nothing to read.

    teacher       V_k(s)     ~ E[z_k | s]                 ridge on what was said and the state of s (value_teacher.py)
    single-pass   q_k(s, a)  ~ V_k(s + a) - V_k(s)        ridge of teacher differences on x(s) (x) e_a, centred over candidates
    prefix        v_k(s + a) ~ V_k(s + a)                 ridge of the teacher on the open state of s + a

z_k: reward in standard deviations of the reference's rollouts, less its prompt's mean (only differences within a prompt
can be steered). Every choice of a penalty and every stated figure is held out by prompt: heads learn from teachers that
never saw their prompt, and what is stated of a fold of prompts rests on teachers that never saw that fold either.
`efficiency` is the correlation, over held-out rollouts, of z_k with the summed advantages of the drawn tokens,
S = sum_t [q(s_t, a_t) - E_a q(s_t, a)]: to first order a tilt by q gains sd(z) * efficiency * sqrt(2 KL), so it says what
a nat will buy before anything is steered.

Paper: MAVIS (arXiv 2508.13415); single-pass form in the manner of Q-heads (VAS, arXiv 2406.04147 discusses the cost).
Departures: rewards are standardised; no language model is fine-tuned: heads are linear in the policy's own states and
solved in closed form; targets are distilled from a teacher instead of raw Monte-Carlo returns, which are too noisy at
this size; all objectives share one pass.
Reads: rollouts of the reference, their rewards. Writes: values.safetensors, quality.json, states/ (shards).
The weights enter: the logits, at decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.models.value_heads import ValueHeads
from equipoise.objectives import Normaliser
from equipoise.runs import Manifest, write_json
from equipoise.training.value_forms import SinglePass, calibrate_prefix, calibrate_single_pass, fit_prefix, fit_single_pass
from equipoise.training.value_states import Plan, encode_states
from equipoise.training.value_teacher import fit_teacher, make_actions, make_targets
from equipoise.types import Prompt, Rewards, Rollout, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the value heads."""

    layers: tuple[int, ...] = ()
    """Hidden states that the guide reads; empty for the middle and the last."""
    teacher_layer: int = 0
    """Layer whose states the teacher reads, one of `layers`; 0 for the middle."""
    state_features: int = 8
    """Principal components of the states that interact with the candidate."""
    token_features: int = 128
    """Principal components of the token embedding that interact with the state."""
    l2_teacher: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    """Penalties for cross-validation: teacher."""
    l2_heads: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Penalties for cross-validation: heads."""
    folds: int = 5
    """Folds by prompt."""
    calibration_states: int = 1024
    """States kept to solve a beta for a KL budget."""
    shard_rollouts: int = 128
    """Rollouts per shard of states; a killed run redoes at most one."""
    seed: int = 0
    """Of the folds."""

    def __post_init__(self) -> None:
        if self.folds < 3:  # one that is stated, one that is valued, and one to learn from
            raise UserError(f"folds must be at least 3, got {self.folds}")
        for name in ("l2_teacher", "l2_heads"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise UserError(f"{name} must hold positive penalties, got {getattr(self, name)}")


def train(
    lm: LanguageModel,
    prompts: Mapping[str, Prompt],
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    config: Config,
    sampling: Mapping[str, Any],
    run: Manifest,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Fit both value forms on rollouts of the reference and save them. Returns the artefact's path."""
    normaliser = Normaliser.fit(rewards.objectives, rewards.reward_NK)
    targets = make_targets(rollouts, normaliser(rewards.reward_NK), config.folds, config.seed)
    whole_R = np.isfinite(targets.centred_RK).all(axis=1)
    if len(set(targets.fold_R[whole_R])) < 3:
        names = ", ".join(rewards.objectives)
        raise UserError(f"{whole_R.sum()} of {len(rollouts)} rollouts are scored on all of {names}: too few prompts to hold some out")
    middle = max(1, lm.num_layers // 2)
    layers = config.layers or tuple(sorted({middle, lm.num_layers}))
    if layers[-1] != lm.num_layers or (config.teacher_layer or middle) not in layers:
        raise UserError(
            f"layers must hold teacher_layer={config.teacher_layer or middle} and end with the last one, {lm.num_layers}; got {layers}"
        )
    plan = Plan(layers=layers, top_k=sampling["top_k"], temperature=sampling["temperature"], whole_sentences=sampling["whole_sentences"])
    horizon = int(sampling["max_new_tokens"])
    states = encode_states(lm, prompts, rollouts, plan, run.folder / "states", config.shard_rollouts, progress)
    value_FSK, teacher = fit_teacher(states, layers.index(config.teacher_layer or middle), targets, horizon, config)
    actions = make_actions(states, targets, value_FSK)
    design = SinglePass(lm, states, horizon, config)
    single_KXD, single = fit_single_pass(design, actions, targets, states, config)
    value_SK = value_FSK[targets.fold_R[states.rollout_S], np.arange(len(states.token_S))]
    prefix_tensors, prefix = fit_prefix(states, value_SK, targets, horizon, config)
    calibration = {
        "single-pass": calibrate_single_pass(design, single_KXD, states, targets, config),
        "prefix": calibrate_prefix(lm, prompts, rollouts, states, layers, prefix_tensors, horizon),
    }
    heads = ValueHeads(
        normaliser=normaliser,
        model=lm.name,
        layers=layers,
        horizon=horizon,
        tensors={"mean_I": design.mean_I.numpy(), "whiten_IM": design.whiten_IM.numpy(), "single_KXD": single_KXD, **prefix_tensors},
        calibration=calibration,
    )
    path = run.folder / "values.safetensors"
    heads.save(path)
    write_json(
        run.folder / "quality.json",
        {"objectives": rewards.objectives, "teacher": teacher, "single-pass": single, "prefix": prefix, "actions": len(actions.state_A)},
    )
    run.outputs += [path, run.folder / "quality.json"]
    run.facts |= {"rollouts": len(rollouts), "states": len(states.position_S), "unscored": int((~np.isfinite(rewards.reward_NK)).sum())}
    return path
