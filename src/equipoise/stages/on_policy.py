"""The stages `train ppo`, `train online_dpo`, `train map` and `train trl`: policies that learn from rewards of what they say themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from equipoise.objectives import Normaliser, scaled
from equipoise.progress import say
from equipoise.runs import EXECUTION, Manifest, stage
from equipoise.stages import common
from equipoise.stages.preferences import parents_of, trained_folder
from equipoise.training import map_ppo, on_policy, online_dpo, ppo, trl_policy
from equipoise.types import Prompt, Reward, Sampler, UserError

if TYPE_CHECKING:
    from equipoise.palette.quote import Quote
    from equipoise.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What is asked and how it is scored."""

    out: Path
    """Run folder to write."""
    prompts: str = "equipoise"
    """"equipoise", KIND:FILE of pairs such as hh:FILE, or a JSON-lines FILE."""
    split: str = "train"
    """Split of the prompts; empty for all."""
    limit: int = 0
    """Most prompts; 0 for all."""
    model: str = "smollm2"
    """What training starts from, and the reference: "smollm2", a Hub id, a folder, a .gguf file, or an adapter's folder."""
    rewards: tuple[str, ...] = ("helpful", "harmless")
    """Scorers by name, the objectives; objective=SCORER renames one."""
    states_model: str = "smollm2"
    """Model behind rewards that are heads on hidden states."""
    statistics: Path
    """Frozen statistics of the reference's rewards, as `normalise` writes them: what a standard deviation of each reward is."""
    cache: Path | None = field(default=None, metadata=EXECUTION)
    """Folder of scores that are kept between runs."""


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Scored):
    """What is sampled and scored in rounds."""

    loop: on_policy.Config = field(default_factory=on_policy.Config)
    """Rounds, weights, and what the policy reads of them."""


@dataclass(frozen=True, kw_only=True)
class TrainPPO(OnPolicy):
    """Train a policy by PPO, on one reward or on several (MORLHF)."""

    ppo: ppo.Config = field(default_factory=ppo.Config)
    """Advantages, KL and clipping."""

    def __post_init__(self) -> None:
        if self.ppo.advantage == "gdpo" and self.loop.scalarisation != "linear":
            raise UserError(
                f"gdpo standardises each reward and adds them up by their weights: take loop.scalarisation linear, not "
                f"{self.loop.scalarisation}, or another ppo.advantage"
            )


def train_ppo(config: TrainPPO) -> Path:
    """Train and return the adapter's or the model's folder."""
    return _train(config, "train ppo", lambda _scale: ppo.PPO(config.ppo, config.loop))


@dataclass(frozen=True, kw_only=True)
class TrainOnlineDPO(OnPolicy):
    """Train a policy by DPO on its own responses, ordered by their rewards at the weights it is given."""

    online_dpo: online_dpo.Config = field(default_factory=online_dpo.Config)
    """Pairs, labels and loss."""


def train_online_dpo(config: TrainOnlineDPO) -> Path:
    """Train and return the adapter's or the model's folder."""
    return _train(config, "train online_dpo", lambda _scale: online_dpo.OnlineDPO(config.online_dpo, config.loop))


@dataclass(frozen=True, kw_only=True)
class TrainMAP(OnPolicy):
    """Train a policy to deliver targets instead of weights: PPO at multipliers that are corrected until the levels are met (MAP)."""

    bank: Path
    """A `sample` folder of the reference that was scored and normalised: levels such as q70, and the first multipliers, are its."""
    ask: str
    """What is wanted, as 'harmless>=q70 helpful>=keep humor>=+0.3 length<=5'; see `palette`."""
    dual: Literal["per-prompt", "pooled"] = "per-prompt"
    """By which the first multipliers are solved; pooled for a bank with one response per prompt, at some error that is corrected."""
    loop: on_policy.Config = field(default_factory=lambda: on_policy.Config(beta=1.0, reads="nothing"))
    """Rounds; what is trained for is in the targets."""
    ppo: ppo.Config = field(default_factory=ppo.Config)
    """Advantages, KL and clipping."""
    map: map_ppo.Config = field(default_factory=map_ppo.Config)
    """How the multipliers are corrected."""


def train_map(config: TrainMAP) -> Path:
    """Train and return the adapter's or the model's folder; the manifest has the levels beside the targets."""
    if not config.bank.is_dir():
        raise UserError(f"the bank {config.bank} is no folder: give a `sample` folder that was scored")
    parents = {"bank": config.bank / "manifest.json", "scores of the bank": config.bank / "rewards" / "manifest.json"}
    return _train(config, "train map", lambda scale: _map_of(config, scale), parents)


def _quoted(config: TrainMAP) -> Quote:
    """What the palette's dual says of the ask on the bank.

    Raises `UserError` for a bank that was steered, isn't that of the statistics, or has one response per prompt, and for targets that
    it can't show to be possible.
    """
    from equipoise.palette.banks import Bank
    from equipoise.palette.quote import quote
    from equipoise.rewards.normalisation import Statistics
    from equipoise.runs import manifest_of

    if manifest_of(config.bank, "sample")["config"]["weights"]:
        raise UserError(f"{config.bank} was steered: the bank is of the reference's own responses")
    run, statistics = common.scored_run(config.bank), Statistics.read(config.statistics)
    if statistics.rollouts != run.rewards.digest:
        raise UserError(f"{config.statistics} has the statistics of other responses than {config.bank}: `normalise` that folder")
    bank = Bank.of(run.rewards.objectives, run.rewards.reward_NK, [response.prompt_id for response in run.responses])
    if config.dual == "per-prompt" and bank.common_size < 2:
        raise UserError(f"{config.bank} has one response per prompt: sample several, or say --dual pooled")
    found = quote(bank, config.ask, dual=config.dual, n_boot=0)
    names, nearest = found.targets.objectives, found.certificate
    statistics.normaliser(names, run.scorers)  # the bank's scorers are those of the statistics
    if found.solution is None or not found.solution.converged:
        bounds = zip(names, nearest.nearest_floor_K.tolist(), nearest.nearest_ceiling_K.tolist(), strict=True)
        levels = [f"{name}{sign}{b:.4g}" for name, *pair in bounds for sign, b in zip((">=", "<="), pair, strict=True) if np.isfinite(b)]
        raise UserError(
            f"{found.ask!r} can't be had of the responses in {config.bank} (margin {nearest.margin_sd:.3f} sd); the nearest that can: "
            f"{' '.join(levels)}. Ask for less, or sample more responses per prompt"
        )
    for warning in found.warnings():
        say(f"the bank: {warning}")
    return found


def _map_of(config: TrainMAP, scale: Normaliser) -> map_ppo.MAP:
    """MAP in standard deviations. Raises `UserError` as `_quoted` does, and for a target on what is no reward."""
    found = _quoted(config)
    assert found.solution is not None, "refused otherwise"
    names = found.targets.objectives
    unknown = [name for name in names if name not in scale.objectives]
    if unknown:
        raise UserError(f"the ask is about {unknown[0]!r}, and the rewards are {', '.join(scale.objectives)}: add it to them")

    def placed(value_K: np.ndarray, rest: float) -> np.ndarray:
        """The values in the order of the rewards."""
        by_name = dict(zip(names, value_K.tolist(), strict=True))
        return np.array([by_name.get(name, rest) for name in scale.objectives])

    floor_K, ceiling_K = placed(found.targets.floor_K, -np.inf), placed(found.targets.ceiling_K, np.inf)
    start_K = placed(found.solution.multiplier_K, 0.0) * np.array(scale.sd_K)
    return map_ppo.MAP(
        config=config.map,
        ppo=ppo.PPO(config.ppo, config.loop),
        objectives=scale.objectives,
        floor_K=tuple(scaled(floor_K, scale.mean_K, scale.sd_K).tolist()),
        ceiling_K=tuple(scaled(ceiling_K, scale.mean_K, scale.sd_K).tolist()),
        start_K=tuple(start_K.tolist()),
    )


def _reached(method: on_policy.Method, records: Sequence[on_policy.Record], scale: Normaliser) -> dict[str, Any]:
    """What became of the targets, where there were any; said, too."""
    if not isinstance(method, map_ppo.MAP):
        return {}
    found = method.outcome(records, scale)
    for name, told in found.items():
        bounds = [f"{sign} {told[key]:.4g}" for sign, key in ((">=", "floor"), ("<=", "ceiling")) if abs(told[key]) < float("inf")]
        level = f"{told['level']:.4g} ± {told['stderr']:.2g} at {told['multiplier']:.4g} nats per unit"
        say(f"{name} {' and '.join(bounds)}: {level}, {'met' if told['met'] else 'NOT met: give more rounds, or a larger map.step'}")
    return {"targets": found}


@dataclass(frozen=True, kw_only=True)
class TrainTRL(Scored):
    """Train adapters by TRL on several rewards at one weighting."""

    trl: trl_policy.Config
    """Algorithm, weights and sizes."""


def train_trl(config: TrainTRL) -> Path:
    """Train and return the adapter's folder."""

    def by_trl(prompts: Sequence[Prompt], rewards: Sequence[Reward], scale: Normaliser, run: Manifest) -> Mapping[str, Any]:
        trl_policy.train(prompts, rewards, scale, config.model, config.trl, run)
        return {}

    return _scored(config, "train trl", by_trl)


def _train(
    config: OnPolicy, command: str, method_of: Callable[[Normaliser], on_policy.Method], more: Mapping[str, Path] | None = None
) -> Path:
    def in_rounds(prompts: Sequence[Prompt], rewards: Sequence[Reward], scale: Normaliser, run: Manifest) -> Mapping[str, Any]:
        method = method_of(scale)
        records = on_policy.train(
            prompts, rewards, scale, config.model, config.loop, method, run, lambda learner: policy_sampler(learner, config.loop)
        )
        return _reached(method, records, scale)

    return _scored(config, command, in_rounds, more)


def _scored(
    config: Scored,
    command: str,
    train: Callable[[Sequence[Prompt], Sequence[Reward], Normaliser, Manifest], Mapping[str, Any]],
    more: Mapping[str, Path] | None = None,
) -> Path:
    """Train in the stage's folder, which is returned; `train` gives what the manifest is to say."""
    from equipoise.data.prompts import prompts_file
    from equipoise.rewards import artefacts, load_rewards, needs_model, parse_name
    from equipoise.rewards.normalisation import Statistics

    parents = {"prompts": prompts_file(config.prompts), "statistics": config.statistics, **parents_of((), config.model)}
    parents |= {str(file): file for file in artefacts(config.rewards)} | dict(more or {})
    with stage(config.out, command, common.settings_of(config), parents) as run:
        if not run.done:
            lm = common.model_of(config.states_model) if needs_model(config.rewards) else None
            rewards = load_rewards(config.rewards, lm, config.cache)
            scorers: dict[str, Any] = {
                reward.name: getattr(reward, "identity", parse_name(entry)[1])
                for entry, reward in zip(config.rewards, rewards, strict=True)
            }
            scale = Statistics.read(config.statistics).normaliser(list(scorers), scorers)
            prompts = common.prompts_of(config.prompts, config.split, config.limit)
            run.facts |= {"scorers": scorers, **train(prompts, rewards, scale, run)}
    return trained_folder(config.out)


def policy_sampler(learner: Learner, loop: on_policy.Config) -> Sampler:
    """What draws the policy's responses as it is now, with their exact KL to the reference."""
    from equipoise.decoding.logit_mixing import tuned_guide
    from equipoise.decoding.value_guided import PolicySampler
    from equipoise.models.companions import Voice

    voice = Voice(lm=learner.policy, condition="weights" if learner.reads == "parameters" else None, asked=learner.asked)
    return PolicySampler(learner.reference, loop.sampling, tuned_guide(learner.reference, voice, learner.objectives))
