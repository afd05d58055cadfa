"""On-policy training of a model that is small enough to list all it can say, and the optimum that it should reach."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import Digits, Whitespace
from tokenizers.pre_tokenizers import Sequence as Sequence_
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import prompt
from equipoise.models.chat import prompt_ids
from equipoise.models.conditions import weights_in_prompt
from equipoise.models.generation import Sampling
from equipoise.models.loading import Base, LanguageModel, eos_ids
from equipoise.models.lora import Lora, WeightedLora
from equipoise.models.weighted_lora import conditioned
from equipoise.objectives import Normaliser, chebyshev
from equipoise.stages.on_policy import policy_sampler
from equipoise.tiny import SPECIAL, build_tokenizer
from equipoise.training import on_policy
from equipoise.training.fit import FitConfig
from equipoise.training.learner import Learner, Reads, make_learner
from equipoise.training.policy import Start
from equipoise.types import Prompt, Request

ASKED = ("a b", "b a a")
EOS = 2


@dataclass(frozen=True)
class World:
    """All that a model of so many words can say in so many tokens, and rewards of it."""

    words: tuple[str, ...]
    horizon: int
    width: int = 16

    @cached_property
    def tokenizer(self) -> Any:
        """Words and single digits."""
        made = build_tokenizer(self.words)
        made._tokenizer.pre_tokenizer = Sequence_([Whitespace(), Digits(individual_digits=True)])
        return made

    @cached_property
    def said(self) -> list[tuple[int, ...]]:
        """Every response: those that end with EOS or reach the horizon."""
        every = [s for n in range(1, self.horizon + 1) for s in itertools.product(range(len(self.words)), repeat=n)]
        return [s for s in every if EOS not in s[:-1] and (s[-1] == EOS or len(s) == self.horizon)]

    @cached_property
    def texts(self) -> list[str]:
        """What each of them reads."""
        return [self.tokenizer.decode(s, skip_special_tokens=True) for s in self.said]

    @cached_property
    def reward(self) -> dict[tuple[str, str], np.ndarray]:
        """By text and prompt, on x and y."""
        keys = list(itertools.product(sorted(set(self.texts)), ASKED))
        return dict(zip(keys, np.random.default_rng(0).normal(size=(len(keys), 2)), strict=True))

    @cached_property
    def lm(self) -> LanguageModel:
        """Two layers."""
        sizes = {"vocab_size": len(self.words), "hidden_size": self.width, "intermediate_size": 2 * self.width, "num_hidden_layers": 2}
        ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": EOS}
        config = LlamaConfig(
            **sizes, **ids, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.35 * 4 / self.width**0.5
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
        return LanguageModel(model=model, tokenizer=self.tokenizer, name="small", revision="seed 0", eos_ids=eos_ids(model, self.tokenizer))


SMALL = World((*SPECIAL, "a", "b"), horizon=2)
"""Five tokens, 21 responses."""
NUMBERS = World((*SPECIAL, "a", "b", "x", "y", "<", ">", ".", *"0123456789"), horizon=1, width=48)
"""In whose words weights can be told: 20 tokens, as many responses."""
PLAIN = Normaliser(objectives=("x", "y"), mean_K=(0.0, 0.0), sd_K=(1.0, 1.0))
WEIGHTS = (0.3, 0.7)
SAMPLING = Sampling(top_k=0, allow_eos_first=True, max_new_tokens=SMALL.horizon, batch_size=512, whole_sentences=False)
FIT = FitConfig(learning_rate=0.01, batch_size=4, schedule="linear", warmup=0.1)
HALF = on_policy.Config(
    weights="0.3,0.7", beta=0.7, rounds=12, prompts=2, samples=200, steps=6, sampling=SAMPLING, lora=Lora(rank=0), fit=FIT
)


class Table:
    """A reward that is looked up, of one objective."""

    def __init__(self, name: str, world: World = SMALL) -> None:
        self.name, self.world = name, world

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        return np.array(
            [self.world.reward[response, p.text][PLAIN.objectives.index(self.name)] for p, response in zip(prompts, responses, strict=True)]
        )


class Failing(Table):
    """A reward that fails from its third call on, until it is mended."""

    calls = 0

    def __call__(self, prompts, responses):
        self.calls += 1
        if 3 <= self.calls < 100:
            raise RuntimeError("out of memory")
        return super().__call__(prompts, responses)


def prompts_of(copies: int = 1) -> list[Prompt]:
    """Both prompts, so often that a round has many weights for each."""
    return [prompt(f"{text}-{i}", text) for text in ASKED for i in range(copies)]


def learner_of(reads: Reads, lora: Lora | None = None, world: World = SMALL) -> Learner:
    start = Start(world.lm, Base(name="small", key="seed 0"))
    weighted = WeightedLora(
        shared_rank=8, rank=8, alpha=16.0, dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    )
    return make_learner(start, PLAIN.objectives, reads, lora or Lora(rank=0), weighted, 0)


def make_rounds(method_of, config: on_policy.Config, out: Path, rewards=None, copies: int = 1, world: World = SMALL) -> on_policy.Rounds:
    """A run of the method that `method_of(config)` gives."""
    config = replace(config, sampling=replace(config.sampling, max_new_tokens=world.horizon))
    method = method_of(config)
    learner = method.prepared(learner_of(config.reading, config.lora, world))
    rewards = rewards or [Table("x", world), Table("y", world)]
    return on_policy.Rounds(learner, prompts_of(copies), rewards, PLAIN, policy_sampler(learner, config), method, config, out)


def law(world: World, model: Any, asked: Prompt) -> np.ndarray:
    """The probability of each of the world's responses, by a plain forward each."""
    ids, found = prompt_ids(world.tokenizer, asked), []
    with torch.inference_mode():
        for response in world.said:
            logits = model(torch.tensor([[*ids, *response]])).logits[0].double().log_softmax(-1)
            found.append(sum(logits[len(ids) - 1 + t, token].item() for t, token in enumerate(response)))
    assert abs(np.exp(found).sum() - 1) < 1e-6
    return np.exp(found)


def optimum(world: World, asked: Prompt, weights: Sequence[float], config: on_policy.Config) -> np.ndarray:
    """pi_ref exp(s / beta) / Z."""
    reward_SK = np.array([world.reward[text, asked.text] for text in world.texts])
    scalar_S = reward_SK @ weights if config.scalarisation == "linear" else chebyshev(reward_SK, weights, config.ideal)
    tilted_S = law(world, world.lm.model, asked) * np.exp(scalar_S / config.beta)
    return tilted_S / tilted_S.sum()


def far(
    learner: Learner, weights: Sequence[float], config: on_policy.Config, world: World = SMALL, told: Sequence[float] | None = None
) -> float:
    """The larger of the two prompts' total variations from the optimum, at these weights unless the policy is told others."""
    aim, weights = weights, told or weights
    learner.trained.eval()
    said, found = weights_in_prompt(world.tokenizer, PLAIN.objectives), []
    for asked in prompts_of():
        own = said(Request(id="", prompt=asked, seed=0, weights=tuple(weights))) if learner.reads == "prompt" else asked
        with conditioned(learner.policy.model, torch.tensor([list(weights)]) if learner.reads == "parameters" else None):
            has = law(world, learner.policy.model, own)
        found.append(np.abs(has - optimum(world, asked, aim, config)).sum() / 2)
    return float(max(found))
