"""The stages `train reward_head`, `train bradley_terry` and `train value`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from equipoise.data.labelled import source_files
from equipoise.progress import bar, say
from equipoise.runs import manifest_of, read_json, stage
from equipoise.stages import common
from equipoise.training import bradley_terry, reward_head, value
from equipoise.types import UserError


@dataclass(frozen=True, kw_only=True)
class TrainRewardHead:
    """Train a linear Bradley-Terry reward on preference pairs."""

    out: Path
    """Run folder to write."""
    pairs: tuple[str, ...]
    """Files of pairs, KIND:FILE: hh, preference (TRL's columns), saferlhf and the others of `data/labelled.py`."""
    model: str = "smollm2"
    """Model behind states:LAYER features."""
    head: reward_head.Config
    """Settings of the head."""


def train_reward_head(config: TrainRewardHead) -> Path:
    """Train and return the head's path."""
    from equipoise.rewards.features import load_features

    dropped = Counter[str]()
    pairs = common.load_pairs(config.pairs, config.head.objective, dropped)
    parents = source_files(config.pairs)
    with stage(config.out, "train reward_head", common.settings_of(config), parents) as run:
        if run.done:
            return config.out / "head.safetensors"
        featuriser = load_features(config.head.features, common.model_of(config.model) if "states:" in config.head.features else None)
        with bar(f"features of {len(pairs)} pairs", len(pairs)) as advance:
            path = reward_head.train(pairs, featuriser, config.head, run, advance)
        run.facts |= {"left_out": dict(dropped)}
    _say_accuracy(config.out)
    return path


def _say_accuracy(out: Path) -> None:
    card = read_json(out / "card.json")
    low, high = card["test_interval"]
    say(f"{card['objective']}: held-out accuracy {card['test_accuracy']:.3f} [{low:.3f}, {high:.3f}] on {card['test_pairs']} pairs")


@dataclass(frozen=True, kw_only=True)
class TrainBradleyTerry:
    """Train a transformer with one score per response on preference pairs."""

    out: Path
    """Run folder to write."""
    pairs: tuple[str, ...]
    """Files of pairs, as for `train reward_head`; a share of their prompts is held out."""
    extra: tuple[str, ...] = ()
    """More files of pairs, to train on only; pairs on a held-out prompt are left out."""
    model: str = "smollm2"
    """"smollm2", a Hub id, a folder or a .gguf file: a sequence classifier, or a causal model whose last token is read."""
    baseline: Path | None = None
    """Folder of another reward that was trained on the same pairs and seed, to compare with pair by pair."""
    reward: bradley_terry.Config
    """Settings of the reward model."""


def train_bradley_terry(config: TrainBradleyTerry) -> Path:
    """Train and return the model's folder."""
    dropped = Counter[str]()
    pairs = common.load_pairs(config.pairs, config.reward.objective, dropped)
    extra = common.load_pairs(config.extra, config.reward.objective, dropped, f"{config.reward.objective}-extra") if config.extra else []
    parents = source_files((*config.pairs, *config.extra))
    parents |= {"baseline": config.baseline / "held_out.json"} if config.baseline else {}
    with stage(config.out, "train bradley_terry", common.settings_of(config), parents) as run:
        if run.done:
            return config.out / "model"
        path = bradley_terry.train(pairs, extra, config.model, config.reward, run, config.baseline)
        run.facts |= {"left_out": dict(dropped)}
    _say_accuracy(config.out)
    return path


@dataclass(frozen=True, kw_only=True)
class TrainValue:
    """Train value heads on rollouts of the reference and their scores."""

    out: Path
    """Run folder to write."""
    run: Path
    """A `sample` folder that was scored."""
    value: value.Config = field(default_factory=value.Config)
    """Settings of the heads."""


def train_value(config: TrainValue) -> Path:
    """Train and return the run folder."""
    from equipoise.rewards.scoring import read_rewards
    from equipoise.rollouts import read_rollouts

    sampled = manifest_of(config.run, "sample")["config"]
    if sampled["weights"] or sampled.get("policy"):
        raise UserError(f"{config.run} was sampled from a steered policy; values are trained on the reference's rollouts")
    if sampled.get("upstream"):
        raise UserError(f"{config.run} was drawn by {sampled['upstream']['source']}, whose tokens aren't known: values need a model's own")
    rollouts = read_rollouts(config.run / "rollouts")
    rewards = read_rewards(config.run / "rewards", rollouts)
    prompts = {p.id: p for p in common.prompts_of_run(config.run, "sample")}
    parents = {"rollouts": config.run / "manifest.json", "rewards": config.run / "rewards" / "manifest.json"}
    with stage(config.out, "train value", common.settings_of(config), parents) as run:
        if run.done:
            return config.out
        lm = common.model_of(sampled["model"], sampled["trust_remote_code"])
        with bar(f"learning values of {', '.join(rewards.objectives)}", len(rollouts)) as advance:
            value.train(lm, prompts, rollouts, rewards, config.value, sampled["sampling"], run, advance)
    return config.out
