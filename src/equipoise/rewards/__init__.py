"""Rewards by name: (prompts, responses) -> reward_N; larger is better, NaN is unscored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.types import Reward, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel
    from equipoise.rewards.features import Featuriser

# name -> (module, what it is)
REWARDS = {
    "helpful": ("heads", "linear Bradley-Terry head on SmolLM2's states, HH-RLHF helpful-base"),
    "harmless": ("heads", "linear Bradley-Terry head on SmolLM2's states, HH-RLHF harmless-base"),
    "judge_helpful": ("heads", "for evaluation: head on sentence vectors, HH-RLHF helpful-online and rejection-sampled"),
    "judge_harmless": ("heads", "for evaluation: head on sentence vectors, OpenAI moderation set"),
    "positive": ("text", "VADER compound sentiment"),
    "brief": ("text", "minus log word count"),
    "readable": ("text", "minus the automated readability index"),
    "diverse": ("text", "product of distinct n-gram shares, n = 2..4"),
    "unrepetitive": ("text", "minus the share of repeated 4-grams"),
    "relevant": ("embedding", "cosine of prompt and response in static embeddings"),
    "fluent": ("grammar", "mean probability that a grammar tagger keeps the token"),
    "head:PATH": ("heads", "a head trained by `equipoise train reward_head`"),
    "classifier:ID[#LABEL]": ("classifier", "any sequence classifier, label by name"),
}


def load_rewards(names: Sequence[str], lm: LanguageModel | None) -> list[Reward]:
    """The scorers of these names, in this order; heads on the same layer share its forward.

    `objective=head:PATH` or `objective=classifier:ID` names the objective; otherwise it takes the scorer's name. Raises
    `UserError` naming an unknown reward and the known ones.
    """
    shared: dict[str, Featuriser] = {}

    def featurisers(spec: str) -> Featuriser:
        from equipoise.rewards.features import load_features

        if spec not in shared:
            shared[spec] = load_features(spec, lm)
        return shared[spec]

    rewards = []
    for entry in names:
        alias, _, spec = entry.rpartition("=") if "=" in entry.split(":", 1)[0] else ("", "", entry)
        rewards.append(_load(spec, alias or spec, featurisers))
    duplicates = {r.name for r in rewards if sum(o.name == r.name for o in rewards) > 1}
    if duplicates:
        raise UserError(f"objective {sorted(duplicates)[0]!r} is named twice")
    return rewards


def _load(spec: str, name: str, featurisers: object) -> Reward:
    from equipoise.rewards import classifier, embedding, grammar, heads, text

    kind = REWARDS.get(spec, ("", ""))[0]
    reward: Reward
    if spec.startswith("head:"):
        reward = heads.load_head(name, Path(spec[5:]).expanduser(), featurisers)  # type: ignore[arg-type]
    elif spec.startswith("classifier:"):
        reward = classifier.load(spec)
        reward.name = name
    elif kind == "heads":
        reward = heads.load_head(name, heads.FOLDER / f"{spec}.safetensors", featurisers)  # type: ignore[arg-type]
    elif kind == "text":
        reward = text.load(spec)
    elif kind == "embedding":
        reward = embedding.load(spec)
    elif kind == "grammar":
        reward = grammar.load(spec)
    else:
        raise UserError(f"unknown reward {spec!r}; known: {', '.join(REWARDS)}")
    return reward
