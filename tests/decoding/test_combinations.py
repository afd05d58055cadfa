"""Every way to steer under every choice among proposals: a response depends on nothing but its request."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from equipoise.decoding.logit_mixing import tuned_guide
from equipoise.decoding.rejection import Segments, SegmentSampler
from equipoise.decoding.value_guided import PolicySampler
from equipoise.models.companions import Voice
from equipoise.models.weighted_lora import route_adapters
from equipoise.types import Request

CONFIG = replace(WHOLE, max_new_tokens=4, top_k=4)
SEGMENTS = Segments(threshold=0.5, beta=0.3, initial=0.5, entropy=1.0, shortest=1, longest=2, tries=3)
CHOICES = {
    "best of 3": lambda lm, config, guide: ChoosingSampler(inner=PolicySampler(lm, config, guide), rewards=rewards(), n=3),
    "one of 2": lambda lm, config, guide: ChoosingSampler(inner=PolicySampler(lm, config, guide), rewards=rewards(), n=2, beta=0.3),
    "segments": lambda lm, config, guide: SegmentSampler(lm=lm, sampling=config, segments=SEGMENTS, rewards=rewards(), guide=guide),
    "blocks": lambda lm, config, guide: SegmentSampler(
        lm=lm, sampling=config, segments=Segments.blocks(2, 3), rewards=rewards(), guide=guide
    ),
    "beams": lambda lm, config, guide: BeamSampler(lm=lm, sampling=config, beams=Beams(beams=2), guide=guide),
}


@pytest.fixture(scope="module")
def every_guide(guides, tiny_lm, adapters):  # noqa: F811
    """Way -> (policy, guide), with a soup of adapters beside those of the refill's test."""
    return {**guides, "soup": (tiny_lm, tuned_guide(tiny_lm, Voice(lm=route_adapters(tiny_lm, adapters[0]), condition="weights")))}


def requests_for(choice: str, guided: bool) -> list[Request]:
    """One for each of five prompts; rows without weights where a choice takes them."""
    known = [w for w in MIXED if w or choice in ("segments", "blocks", "beams")]
    turn = itertools.cycle(known if guided or choice != "beams" else (None,))
    return [Request(id=str(i), prompt=prompt(f"p{i}", TEXTS[i]), seed=10 + i, weights=next(turn)) for i in range(5)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("way", [*WAYS, "soup"])
def test_a_response_depends_on_nothing_but_its_request(every_guide, way, choice):
    """Alone, and in batches of any size and order whose places are refilled: the same tokens, at the same price."""
    lm, guide = every_guide[way]
    requests = requests_for(choice, guide is not None)

    def responses(asked, size):
        return CHOICES[choice](lm, replace(CONFIG, batch_size=size), guide)(asked)

    alone = {r.id: responses([r], 1)[0] for r in requests}

    @settings(max_examples=2, deadline=None)
    @given(order=st.permutations(requests), size=st.integers(2, 5), count=st.integers(3, 5))
    def check(order, size, count):
        for got, asked in zip(responses(order[:count], size), order, strict=False):
            want = alone[asked.id]
            for name in ("id", "tokens", "text", "finish_reason", "weights", "base_forwards", "reward_calls", "parent_id"):
                assert getattr(got, name) == getattr(want, name), name
            assert got.guide_forwards == want.guide_forwards or way == "sure"  # a step that all rows skip costs nothing
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
            np.testing.assert_allclose([got.kl, got.kl_floor], [want.kl, want.kl_floor], atol=1e-4)

    check()
