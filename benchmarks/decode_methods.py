"""Every way of decoding that `decode.py` times, on randomly filled parts that are built when they are first used."""

from __future__ import annotations

import functools
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from random_models import SEVENTH, Shape, filled, objective_names, random_heads, value_model
from rowwise import decode_rowwise

from equipoise.decoding.beam import Beams, BeamSampler
from equipoise.decoding.choosing import ChoosingSampler, WeightedRewards
from equipoise.decoding.logit_mixing import mixing_guide, tuned_guide
from equipoise.decoding.rejection import Segments, SegmentSampler
from equipoise.decoding.reward_guided import prompt_guide, reward_guide
from equipoise.decoding.scorer_guided import ScorerGuide
from equipoise.decoding.value_guided import PolicySampler, PrefixGuide, SinglePassGuide, ValueModelGuide
from equipoise.models.adapters import write_adapter
from equipoise.models.chat import prompt_ids
from equipoise.models.companions import Voice
from equipoise.models.generation import Guide, Sampling, generate
from equipoise.models.loading import LanguageModel, as_base
from equipoise.models.lora import WeightedLora
from equipoise.models.value_models import ValueModel
from equipoise.models.weighted_lora import add_weighted_lora, route_adapters
from equipoise.rollouts import make_requests
from equipoise.types import Prompt, Rollout, Sampler

BETA = 10.0
RANK = 16


@dataclass(frozen=True)
class Cost:
    """What a call made and ran, in tokens."""

    responses: int
    base: int
    guide: int


Way = Callable[[int], Cost]
"""Decodes so many tokens for each of its prompts."""


class HashReward:
    """A number in [0, 1) that depends on the text alone and costs nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """[N]."""
        return np.array([zlib.crc32(f"{self.name}:{text}".encode()) / 2**32 for text in responses])


class Methods:
    """The ways to decode the same prompts with one policy; responses never end by themselves."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Prompt], top_k: int, small: Shape = SEVENTH) -> None:
        """`small` is the shape of value, reward and scoring models."""
        lm.model.generation_config.eos_token_id = None
        self.lm, self.prompts, self.top_k, self.small = replace(lm, eos_ids=frozenset()), prompts, top_k, small
        self._parts = functools.cache(self._part)

    def ways(self, batch: int, objectives: int) -> dict[str, Callable[[], Way]]:
        """What builds each way for the first `batch` prompts; ways without objectives come with two of them only."""
        k, names = objectives, objective_names(objectives)
        steered: dict[str, Callable[[], Guide]] = {
            "single_pass": lambda: SinglePassGuide(self.lm, random_heads(self.lm, k), beta=BETA),
            "value_model": lambda: ValueModelGuide(self.lm, [self._parts("value_model", k)], beta=BETA),
            "value_models": lambda: ValueModelGuide(self.lm, self._value_models(k), beta=BETA),
            "value_model_bf16": lambda: ValueModelGuide(self.lm, [self._parts("value_model_bf16", k)], beta=BETA),
            "mod": lambda: mixing_guide(self.lm, self._parts("adapters", k)),
            "genarm": lambda: reward_guide(self.lm, {name: self._parts("causal", i) for i, name in enumerate(names)}, BETA),
            "parm": lambda: reward_guide(self.lm, self._parts("weighted", k), BETA),
            "prompts": lambda: prompt_guide(self.lm, {name: f"You care about {name} above all." for name in names}, BETA),
            "args_vas": lambda: ScorerGuide(self.lm, {name: self._parts("scalar", i) for i, name in enumerate(names)}, BETA),
        }
        once: dict[str, Callable[[], Guide]] = {
            "prefix": lambda: PrefixGuide(self.lm, random_heads(self.lm, k), self.top_k, beta=BETA),
            "soup": lambda: tuned_guide(self.lm, Voice(lm=self._parts("adapters", k), condition="weights")),
        }
        if objectives != 2:
            return {f"{name}_k{objectives}": functools.partial(self._guided, batch, k, make) for name, make in steered.items()}
        alone: dict[str, Callable[[], Way]] = {
            "plain": lambda: self._sampled(batch, lambda tokens: PolicySampler(self.lm, self._sampling(batch, tokens))),
            "generate": lambda: self._generated(batch),
            "best_of_4": lambda: self._sampled(batch, lambda tokens: self._best_of(4, batch, tokens), k),
            "segments": lambda: self._sampled(batch, lambda tokens: self._segments(batch, tokens), k),
            "beams_4": lambda: self._sampled(batch, lambda tokens: self._beams(4, batch, tokens)),
            "reference": lambda: self._rowwise(batch, self._value_models(2)),
            "reference_bf16": lambda: self._rowwise(batch, [self._parts("one_value_bf16", i) for i in range(2)]),
        }
        guided = {name: functools.partial(self._guided, batch, k, make) for name, make in (steered | once).items()}
        return {"plain": alone.pop("plain"), **guided, **alone}

    def check_reference(self, tokens: int = 6) -> None:
        """The stand-in and the value models' guide have to choose the same tokens of one prompt."""
        request = make_requests(self.prompts[:1], 1, 0, (0.5, 0.5))
        guide = ValueModelGuide(self.lm, self._value_models(2), beta=0.2)
        ours = generate(self.lm, request, replace(self._sampling(1, tokens), greedy=True), guide)[0].tokens
        prompt = prompt_ids(self.lm.tokenizer, self.prompts[0])
        theirs, _, _ = decode_rowwise(
            self.lm, self._value_models(2), prompt, (0.5, 0.5), tokens=tokens, top_k=self.top_k, beta=0.2, greedy=True
        )
        assert list(ours) == theirs, f"the stand-in for the reference decodes another law: {theirs}, not {list(ours)}"

    def _part(self, kind: str, which: int) -> LanguageModel | ValueModel:
        if kind.endswith("_bf16"):
            half = self._part(kind.removesuffix("_bf16"), which)
            half.lm.model.to(torch.bfloat16)
            return half
        if kind == "value_model":
            return value_model(self.lm, objective_names(which), seed=which, shape=self.small)
        if kind == "one_value":
            return value_model(self.lm, objective_names(which + 1)[-1:], seed=10 + which, shape=self.small)
        if kind == "adapters":
            return self._adapters(which)
        if kind == "weighted":
            return add_weighted_lora(filled(self.lm, self.small, "causal", 20), WeightedLora(), objective_names(which))
        return filled(self.lm, self.small, "causal" if kind == "causal" else "scalar", 30 + which)

    def _value_models(self, objectives: int) -> list[ValueModel]:
        return [self._parts("one_value", i) for i in range(objectives)]

    def _adapters(self, objectives: int) -> LanguageModel:
        """LoRA adapters of rank 16 on every linear layer of the blocks, one per objective, routed by row."""
        generator = torch.Generator().manual_seed(0)
        layers = {
            name: module.weight.shape
            for name, module in self.lm.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not self.lm.head
        }
        with tempfile.TemporaryDirectory() as scratch:
            folders = {name: Path(scratch) / name for name in objective_names(objectives)}
            for folder in folders.values():
                factors = {
                    name: (
                        torch.randn(RANK, inputs, generator=generator) / inputs**0.5,
                        torch.randn(outputs, RANK, generator=generator) * 0.01,
                    )
                    for name, (outputs, inputs) in layers.items()
                }
                write_adapter(folder, factors, base=as_base(self.lm), task="CAUSAL_LM")
            return route_adapters(self.lm, folders)

    def _sampling(self, rows: int, tokens: int) -> Sampling:
        return Sampling(max_new_tokens=tokens, top_k=self.top_k, batch_size=rows, allow_eos_first=True, whole_sentences=False)

    def _guided(self, batch: int, objectives: int, make: Callable[[], Guide]) -> Way:
        guide = make()
        return self._sampled(batch, lambda tokens: PolicySampler(self.lm, self._sampling(batch, tokens), guide), objectives)

    def _sampled(self, batch: int, sampler: Callable[[int], Sampler], objectives: int = 0) -> Way:
        weights = (1.0 / objectives,) * objectives if objectives else None
        requests = make_requests(self.prompts[:batch], 1, 0, weights)

        def run(tokens: int) -> Cost:
            rollouts: list[Rollout] = sampler(tokens)(requests)
            assert all(len(r.tokens) == tokens for r in rollouts), "a row stopped early: the comparison would not be fair"
            return Cost(batch, sum(r.base_forwards for r in rollouts), sum(r.guide_forwards for r in rollouts))

        return run

    def _rewards(self, objectives: int) -> WeightedRewards:
        return WeightedRewards(rewards=[HashReward(name) for name in objective_names(objectives)])

    def _best_of(self, n: int, batch: int, tokens: int) -> Sampler:
        return ChoosingSampler(inner=PolicySampler(self.lm, self._sampling(n * batch, tokens)), rewards=self._rewards(2), n=n)

    def _beams(self, width: int, batch: int, tokens: int) -> Sampler:
        return BeamSampler(lm=self.lm, sampling=self._sampling(width * batch, tokens), beams=Beams(beams=width))

    def _segments(self, batch: int, tokens: int) -> Sampler:
        """About every second proposal stays: E[exp((r - 1) / 0.7)] is 0.5 for the mean of two uniform rewards."""
        segments = Segments(threshold=1.0, beta=0.7, longest=8)
        return SegmentSampler(lm=self.lm, sampling=self._sampling(batch, tokens), segments=segments, rewards=self._rewards(2))

    def _generated(self, batch: int) -> Way:
        encoded = [prompt_ids(self.lm.tokenizer, p) for p in self.prompts[:batch]]
        width, total = max(map(len, encoded)), sum(map(len, encoded))
        ids = torch.tensor([[0] * (width - len(e)) + e for e in encoded], device=self.lm.device)
        mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=self.lm.device)
        settings = {"do_sample": True, "top_k": self.top_k, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}

        def run(tokens: int) -> Cost:
            with torch.inference_mode():
                out = self.lm.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **settings)
            assert out.shape[1] == width + tokens, "generate stopped early: the comparison would not be fair"
            return Cost(batch, total + batch * (tokens - 1), 0)

        return run

    def _rowwise(self, batch: int, models: list[ValueModel]) -> Way:
        encoded = [prompt_ids(self.lm.tokenizer, p) for p in self.prompts[:batch]]

        def run(tokens: int) -> Cost:
            settings = {"tokens": tokens, "top_k": self.top_k, "beta": BETA}
            found = [decode_rowwise(self.lm, models, e, (0.5, 0.5), **settings) for e in encoded]
            return Cost(batch, sum(base for _, base, _ in found), sum(guide for _, _, guide in found))

        return run
