"""Every way to steer under every choice among proposals: a response depends on nothing but its request."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest

from conftest import prompt
from decoding.test_refill import CONFIG as WHOLE
from decoding.test_refill import MIXED, TEXTS, WAYS, guides  # noqa: F401 a fixture
from decoding.test_rejection import rewards
from decoding.test_reward_guided import base, parm  # noqa: F401 fixtures
from decoding.test_scorer_guided import scorers  # noqa: F401 a fixture
from decoding.test_tuned import adapters  # noqa: F401 a fixture
from decoding.test_value_guided import heads  # noqa: F401 a fixture
from equipoise.decoding.beam import Beams, BeamSampler
from equipoise.decoding.choosing import ChoosingSampler
from equipoise.decoding.logit_mixing import mixing_guide, tuned_guide
from equipoise.decoding.rejection import Segments, SegmentSampler
from equipoise.decoding.value_guided import PolicySampler
from equipoise.models.companions import Voice
from equipoise.models.loading import LanguageModel
from equipoise.models.weighted_lora import route_adapters
from equipoise.types import Request

CONFIG = replace(WHOLE, max_new_tokens=4)
EVERY = (*WAYS, "soup", "adapters")
SEGMENTS = Segments(threshold=0.5, beta=0.3, initial=0.5, entropy=1.0, shortest=1, longest=2, tries=2)
CHOICES = {
    "best of 2": lambda lm, config, guide: ChoosingSampler(inner=PolicySampler(lm, config, guide), rewards=rewards(), n=2),
    "one of 2": lambda lm, config, guide: ChoosingSampler(inner=PolicySampler(lm, config, guide), rewards=rewards(), n=2, beta=0.3),
    "segments": lambda lm, config, guide: SegmentSampler(lm=lm, sampling=config, segments=SEGMENTS, rewards=rewards(), guide=guide),
    "blocks": lambda lm, config, guide: SegmentSampler(
        lm=lm, sampling=config, segments=Segments.blocks(2, 2), rewards=rewards(), guide=guide
    ),
    "beams": lambda lm, config, guide: BeamSampler(lm=lm, sampling=config, beams=Beams(beams=2), guide=guide),
}


@pytest.fixture(scope="module")
def every_guide(guides, tiny_lm, adapters):  # noqa: F811
    """Way -> (policy, guide), with adapters mixed and summed beside those of the refill's test."""
    routed = route_adapters(tiny_lm, adapters[0])
    soup = tuned_guide(tiny_lm, Voice(lm=routed, condition="weights"))
    return {**guides, "soup": (tiny_lm, soup), "adapters": (tiny_lm, mixing_guide(tiny_lm, routed, "jsd"))}


def requests_for(choice: str, guided: bool) -> list[Request]:
    """One for each of five prompts; rows without weights where a choice takes them."""
    known = [w for w in MIXED if w or choice in ("segments", "blocks", "beams")]
    turn = itertools.cycle(known if guided or choice != "beams" else (None,))
    return [Request(id=str(i), prompt=prompt(f"p{i}", TEXTS[i]), seed=10 + i, weights=next(turn)) for i in range(5)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("way", EVERY)
def test_a_response_depends_on_nothing_but_its_request(every_guide, way, choice):
    """Alone, and in a batch of some size and order whose places are refilled: the same tokens, at the same price."""
    lm, guide = every_guide[way]
    requests = requests_for(choice, guide is not None)

    def responses(asked, size):
        return CHOICES[choice](lm, replace(CONFIG, batch_size=size), guide)(asked)

    alone = {r.id: responses([r], 1)[0] for r in requests}
    rng = np.random.default_rng(crc32(f"{way}, {choice}".encode()))  # each pair has a size and an order of its own
    order = [requests[i] for i in rng.permutation(len(requests))]
    for got, asked in zip(responses(order, int(rng.integers(2, 5))), order, strict=True):
        want = alone[asked.id]
        for name in ("id", "tokens", "text", "finish_reason", "weights", "base_forwards", "reward_calls", "parent_id"):
            assert getattr(got, name) == getattr(want, name), name
        assert got.guide_forwards == want.guide_forwards or way == "sure"  # a step that all rows skip costs nothing
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
        np.testing.assert_allclose([got.kl, got.kl_floor], [want.kl, want.kl_floor], atol=1e-4)


@pytest.mark.parametrize("way", EVERY)
def test_every_token_that_was_run_is_counted_and_each_model_runs_once_a_token(every_guide, way, monkeypatch):
    """Alone, a request's forwards are all there are: the prefix form's chosen candidate isn't run again, adapters share a forward."""
    lm, guide = every_guide[way]
    tokens: Counter[int] = Counter()
    calls: Counter[int] = Counter()

    class Counted:
        def __init__(self, other):
            self.other = other

        def __call__(self, input_ids, attention_mask, **settings):
            # The voices of one model have prompts of several lengths, whose padding is nobody's token.
            padded = attention_mask.shape == input_ids.shape
            tokens[id(self.other.model)] += int(attention_mask.sum()) if padded else input_ids.numel()
            calls[id(self.other.model)] += 1
            return self.other.model.base_model(input_ids=input_ids, attention_mask=attention_mask, **settings)

    monkeypatch.setattr(LanguageModel, "backbone", property(Counted))
    for request in requests_for("best of 2", guide is not None):
        asked = request if guide else replace(request, weights=None)
        tokens.clear()
        calls.clear()
        [got] = PolicySampler(lm, replace(CONFIG, max_new_tokens=9), guide)([asked])
        assert got.base_forwards + got.guide_forwards == sum(tokens.values())
        # One forward for the prompt and one for each token that goes on; a candidate's prefix is read once more than that.
        runs = len(got.tokens) + (way in ("prefix", "scorers", "value models"))
        if way == "sure":  # what was drawn at skipped steps is run before the candidates of the next
            runs = 2 * len(got.tokens)
        for model, count in calls.items():
            itself = way == "messages" and model == id(lm.model)  # the policy, and beside it the policy under all messages at once
            assert count <= runs * (1 + itself)
