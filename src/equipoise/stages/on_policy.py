"""The stages `train ppo` and `train online_dpo`: policies that learn from rewards of what they say themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.runs import EXECUTION, stage
from equipoise.stages import common
from equipoise.stages.preferences import parents_of, trained_folder
from equipoise.training import on_policy, online_dpo, ppo
from equipoise.types import Sampler

if TYPE_CHECKING:
    from equipoise.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """What is sampled and scored."""

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
    loop: on_policy.Config = field(default_factory=on_policy.Config)
    """Rounds, weights, and what the policy reads of them."""
    cache: Path | None = field(default=None, metadata=EXECUTION)
    """Folder of scores that are kept between runs."""


@dataclass(frozen=True, kw_only=True)
class TrainPPO(OnPolicy):
    """Train a policy by PPO, on one reward or on several (MORLHF)."""

    ppo: ppo.Config = field(default_factory=ppo.Config)
    """Advantages, KL and clipping."""


def train_ppo(config: TrainPPO) -> Path:
    """Train and return the adapter's or the model's folder."""
    return _train(config, "train ppo", ppo.PPO(config.ppo, config.loop))


@dataclass(frozen=True, kw_only=True)
class TrainOnlineDPO(OnPolicy):
    """Train a policy by DPO on its own responses, ordered by their rewards at the weights it is given."""

    online_dpo: online_dpo.Config = field(default_factory=online_dpo.Config)
    """Pairs, labels and loss."""


def train_online_dpo(config: TrainOnlineDPO) -> Path:
    """Train and return the adapter's or the model's folder."""
    return _train(config, "train online_dpo", online_dpo.OnlineDPO(config.online_dpo, config.loop))


def _train(config: OnPolicy, command: str, method: on_policy.Method) -> Path:
    from equipoise.data.prompts import prompts_file
    from equipoise.rewards import artefacts, load_rewards, needs_model, parse_name
    from equipoise.rewards.normalisation import Statistics

    parents = {"prompts": prompts_file(config.prompts), "statistics": config.statistics, **parents_of((), config.model)}
    parents |= {str(file): file for file in artefacts(config.rewards)}
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
            on_policy.train(
                prompts, rewards, scale, config.model, config.loop, method, run, lambda learner: policy_sampler(learner, config.loop)
            )
            run.facts |= {"scorers": scorers}
    return trained_folder(config.out)


def policy_sampler(learner: Learner, loop: on_policy.Config) -> Sampler:
    """What draws the policy's responses as it is now, with their exact KL to the reference."""
    from equipoise.decoding.logit_mixing import tuned_guide
    from equipoise.decoding.value_guided import PolicySampler
    from equipoise.models.companions import Voice

    voice = Voice(lm=learner.policy, condition="weights" if learner.reads == "parameters" else None, asked=learner.asked)
    return PolicySampler(learner.reference, loop.sampling, tuned_guide(learner.reference, voice, learner.objectives))
