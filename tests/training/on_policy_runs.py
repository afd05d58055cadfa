"""On-policy training of a model that is small enough to list all it can say, and the optimum that it should reach."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from conftest import prompt
from equipoise.models.chat import prompt_ids
from equipoise.models.conditions import weights_in_prompt
from equipoise.models.generation import Sampling
from equipoise.models.loading import Base, LanguageModel, eos_ids
from equipoise.models.lora import Lora, WeightedLora
from equipoise.models.weighted_lora import conditioned
from equipoise.objectives import Normaliser, chebyshev
from equipoise.stages.on_policy import policy_sampler
from equipoise.tiny import SPECIAL, build_llama, build_tokenizer
from equipoise.training import on_policy
from equipoise.training.fit import FitConfig
from equipoise.training.learner import Learner, Reads, make_learner
from equipoise.training.policy import Start
from equipoise.types import Prompt, Request

WORDS = (*SPECIAL, "a", "b")
EOS, HORIZON = 2, 2
SAID = [
    s
    for n in range(1, HORIZON + 1)
    for s in itertools.product(range(len(WORDS)), repeat=n)
    if EOS not in s[:-1] and (s[-1] == EOS or n == HORIZON)
]
"""All 21 responses: those that end with EOS or reach the horizon."""
ASKED = ("a b", "b a a")
TOKENIZER = build_tokenizer(WORDS)
TEXTS = [TOKENIZER.decode(s, skip_special_tokens=True) for s in SAID]
REWARD = {
    (text, asked): r
    for (text, asked), r in zip(itertools.product(sorted(set(TEXTS)), ASKED), np.random.default_rng(0).normal(size=(99, 2)), strict=False)
}
"""By text and prompt, on x and y."""
PLAIN = Normaliser(objectives=("x", "y"), mean_K=(0.0, 0.0), sd_K=(1.0, 1.0))
WEIGHTS = (0.3, 0.7)
SAMPLING = Sampling(top_k=0, allow_eos_first=True, max_new_tokens=HORIZON, batch_size=512, whole_sentences=False)
FIT = FitConfig(learning_rate=0.01, batch_size=4, schedule="linear", warmup=0.1)
HALF = on_policy.Config(
    weights="0.3,0.7", beta=0.7, rounds=12, prompts=2, samples=200, steps=6, sampling=SAMPLING, lora=Lora(rank=0), fit=FIT
)


class Table:
    """A reward that is looked up, of one objective."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        return np.array(
            [REWARD[response, p.text][PLAIN.objectives.index(self.name)] for p, response in zip(prompts, responses, strict=True)]
        )


def language_model() -> LanguageModel:
    """Two layers, five tokens."""
    model = build_llama(len(WORDS), layers=2, max_position=64, seed=0)
    return LanguageModel(model=model, tokenizer=TOKENIZER, name="small", revision="seed 0", eos_ids=eos_ids(model, TOKENIZER))


def prompts_of(copies: int = 1) -> list[Prompt]:
    """Both prompts, so often that a round has many weights for each."""
    return [prompt(f"{text}-{i}", text) for text in ASKED for i in range(copies)]


def learner_of(reads: Reads, lora: Lora | None = None, lm: LanguageModel | None = None) -> Learner:
    start = Start(lm or language_model(), Base(name="small", key="seed 0"))
    weighted = WeightedLora(
        shared_rank=8, rank=8, alpha=16.0, dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    )
    return make_learner(start, PLAIN.objectives, reads, lora or Lora(rank=0), weighted, 0)


def make_rounds(method_of, config: on_policy.Config, out: Path, rewards=None, copies: int = 1) -> on_policy.Rounds:
    """A run of the method that `method_of(config)` gives."""
    method = method_of(config)
    learner = method.prepared(learner_of(config.reads, config.lora))
    rewards = rewards or [Table("x"), Table("y")]
    return on_policy.Rounds(learner, prompts_of(copies), rewards, PLAIN, policy_sampler(learner, config), method, config, out)


def law(lm: LanguageModel, asked: Prompt, weights: Sequence[float] | None = None) -> np.ndarray:
    """The probability of each of `SAID`, by a plain forward each."""
    ids, found = prompt_ids(TOKENIZER, asked), []
    with torch.inference_mode(), conditioned(lm.model, None if weights is None else torch.tensor([list(weights)])):
        for response in SAID:
            logits = lm.model(torch.tensor([[*ids, *response]])).logits[0].double().log_softmax(-1)
            found.append(sum(logits[len(ids) - 1 + t, token].item() for t, token in enumerate(response)))
    assert abs(np.exp(found).sum() - 1) < 1e-6
    return np.exp(found)


def optimum(asked: Prompt, weights: Sequence[float], config: on_policy.Config) -> np.ndarray:
    """pi_ref exp(s / beta) / Z."""
    reward_SK = np.array([REWARD[text, asked.text] for text in TEXTS])
    scalar_S = reward_SK @ weights if config.scalarisation == "linear" else chebyshev(reward_SK, weights, config.ideal)
    tilted_S = law(language_model(), asked) * np.exp(scalar_S / config.beta)
    return tilted_S / tilted_S.sum()


def far(learner: Learner, weights: Sequence[float], config: on_policy.Config) -> float:
    """The larger of the two prompts' total variations from the optimum."""
    learner.trained.eval()
    said = weights_in_prompt(TOKENIZER, PLAIN.objectives)
    found = []
    for asked in prompts_of():
        own = said(Request(id="", prompt=asked, seed=0, weights=tuple(weights))) if learner.reads == "prompt" else asked
        has = law(learner.policy, replace(own), weights if learner.reads == "parameters" else None)
        found.append(np.abs(has - optimum(asked, weights, config)).sum() / 2)
    return float(max(found))
