"""Places of finished rows go to waiting prompts: no response depends on it, whatever steers, and no place is left empty."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig

from conftest import build_llama, prompt
from decoding.rows import EOS, sibling
from decoding.test_reward_guided import base, parm  # noqa: F401 fixtures
from decoding.test_scorer_guided import scorers  # noqa: F401 a fixture
from decoding.test_value_guided import guide_of, heads  # noqa: F401 a fixture
from decoding.test_value_models import value_model
from equipoise.decoding.logit_mixing import mixing_guide
from equipoise.decoding.reward_guided import prompt_guide, reward_guide
from equipoise.decoding.scorer_guided import ScorerGuide
from equipoise.decoding.value_guided import ValueModelGuide
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel
from equipoise.types import Request

TEXTS = ("c", "a b d", "d a b c . a", "b b", "a . c d a b c d a b")
CONFIG = Sampling(max_new_tokens=9, top_k=5, whole_sentences=False)
WAYS = ("plain", "single-pass", "prefix", "reverse_kl", "jsd", "genarm", "parm", "scorers", "messages", "value models", "sure")
MIXED = ((0.3, 0.7), None, (1.0, 0.0), (0.0, 1.0))


@pytest.fixture(scope="module")
def guides(tiny_lm, base, parm, heads, scorers):  # noqa: F811
    """Way -> (policy, guide)."""
    models = {"x": sibling(tiny_lm, 41), "y": sibling(tiny_lm, 42)}
    values = [value_model(tiny_lm, 61, ("x",)), value_model(tiny_lm, 62, ("y",))]
    return {
        "plain": (tiny_lm, None),
        **{form: (tiny_lm, guide_of(tiny_lm, heads, form, CONFIG)) for form in ("single-pass", "prefix")},
        **{kind: (tiny_lm, mixing_guide(tiny_lm, models, kind)) for kind in ("reverse_kl", "jsd")},
        "genarm": (tiny_lm, reward_guide(tiny_lm, models, 0.8)),
        "parm": (base, reward_guide(base, parm, 0.8)),
        "scorers": (tiny_lm, ScorerGuide(tiny_lm, scorers, 0.8)),
        "value models": (tiny_lm, ValueModelGuide(tiny_lm, values, beta=0.6)),
        "sure": (tiny_lm, ValueModelGuide(tiny_lm, values, beta=0.6, skip_above=0.6)),
        "messages": (tiny_lm, prompt_guide(tiny_lm, {"x": ("a b", "c"), "y": "d ."}, 0.8)),
    }


def requests_for(count: int, guided: bool) -> list[Request]:
    turn = itertools.cycle(MIXED)
    return [
        Request(id=str(i), prompt=prompt(f"p{i % 5}", TEXTS[i % 5]), seed=i, weights=next(turn) if guided else None) for i in range(count)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_response_depends_on_nothing_but_its_request(guides, way):
    lm, guide = guides[way]
    requests = requests_for(11, guide is not None)
    alone = {r.id: generate(lm, [r], CONFIG, guide)[0] for r in requests}
    lengths = [len(r.tokens) for r in alone.values()]
    assert len(set(lengths)) > 1  # rows leave at different steps

    @settings(max_examples=4, deadline=None)
    @given(order=st.permutations(requests), size=st.integers(2, 7), count=st.integers(5, 11))
    def check(order, size, count):
        for got, asked in zip(generate(lm, order[:count], replace(CONFIG, batch_size=size), guide), order, strict=False):
            want = alone[asked.id]
            assert (got.id, got.tokens, got.text, got.finish_reason) == (want.id, want.tokens, want.text, want.finish_reason)
            assert got.base_forwards == want.base_forwards
            assert got.guide_forwards == want.guide_forwards or way == "sure"  # a step that all rows skip costs nothing
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
            np.testing.assert_allclose([got.kl, got.kl_floor], [want.kl, want.kl_floor], atol=1e-4)
            np.testing.assert_allclose(got.kl_steps, want.kl_steps, atol=1e-4)

    check()


@pytest.mark.parametrize("way", ["plain", "single-pass", "prefix", "scorers", "value models"])
def test_waiting_requests_may_give_tokens_and_stop_at_their_own_limit(guides, way):
    """Places go from whole responses to continuations of other lengths and back; shared prefixes are encoded as trees meanwhile."""
    lm, guide = guides[way]
    whole = [replace(r, weights=(0.3, 0.7) if guide else None) for r in requests_for(6, guide is not None)]
    said = [r.tokens for r in generate(lm, whole, CONFIG, guide)]
    asked = [replace(r, id=f"{r.id}/{c}", seed=7 * c, given=t[:c]) for r, t in zip(whole, said, strict=True) for c in range(min(len(t), 4))]
    asked += [replace(r, id=f"{r.id}/most", most_tokens=2) for r in asked[::2]]
    alone = {r.id: generate(lm, [r], CONFIG, guide)[0] for r in asked}
    assert len({len(r.tokens) for r in alone.values()}) > 3
    for size, order in ((4, asked), (7, asked[::-1])):
        for got in generate(lm, order, replace(CONFIG, batch_size=size), guide):
            want = alone[got.id]
            assert (got.tokens, got.text, got.text_tokens) == (want.tokens, want.text, want.text_tokens)
            assert (got.base_forwards, got.guide_forwards) == (want.base_forwards, want.guide_forwards)
            np.testing.assert_allclose(got.kl_steps, want.kl_steps, atol=1e-4)


def test_places_do_not_stay_empty(tiny_lm, monkeypatch):
    """Forwards of one token each: with a place refilled as soon as it is free, about tokens / places of them."""
    widths: list[int] = []

    class Counted:
        def __init__(self, backbone):
            self.backbone = backbone

        def __call__(self, input_ids, **settings):
            if input_ids.shape[1] == 1 and settings["past_key_values"].get_seq_length():
                widths.append(len(input_ids))
            return self.backbone(input_ids=input_ids, **settings)

    lm, config = replace(tiny_lm), replace(CONFIG, batch_size=4, max_new_tokens=24)
    monkeypatch.setattr(LanguageModel, "backbone", property(lambda self: Counted(self.model.model)))
    requests = requests_for(40, guided=False)
    lengths = [len(r.tokens) for r in generate(lm, requests, config)]
    assert len(set(lengths)) > 5
    # A response of n tokens needs n - 1 forwards; one idles where its place is handed on.
    needed = sum(lengths) - len(lengths)
    assert needed <= sum(widths) <= needed + len(lengths)
    assert sum(width == 4 for width in widths) > 0.85 * len(widths)
    together = len(widths)
    widths.clear()
    ordered = sorted(requests, key=lambda r: len(prompt_ids(lm.tokenizer, r.prompt)))
    for start in range(0, 40, 4):
        generate(lm, ordered[start : start + 4], config)
    assert together < 0.8 * len(widths)


def test_prompts_are_run_in_the_order_of_their_lengths(tiny_lm, monkeypatch):
    """Eleven prompts in any order, three at a time: the padded tokens of their prefills are those of neighbours in length."""
    run: list[tuple[int, int]] = []

    class Watched:
        def __init__(self, backbone):
            self.backbone = backbone

        def __call__(self, input_ids, **settings):
            if not settings["past_key_values"].get_seq_length():
                run.append(tuple(input_ids.shape))
            return self.backbone(input_ids=input_ids, **settings)

    monkeypatch.setattr(LanguageModel, "backbone", property(lambda self: Watched(self.model.model)))
    words = [7, 1, 11, 4, 9, 2, 10, 3, 8, 5, 6]
    requests = [Request(id=str(n), prompt=prompt(f"p{n}", " ".join("abcd"[n % 4] * n)), seed=n) for n in words]
    lengths = sorted(len(prompt_ids(tiny_lm.tokenizer, r.prompt)) for r in requests)
    assert len(set(lengths)) == 11
    found = generate(tiny_lm, requests, replace(CONFIG, batch_size=3))
    assert [r.id for r in found] == [str(n) for n in words]  # returned as they were asked
    # The waiting ones are prefilled by threes too, whenever a place is free.
    assert run == [(3, lengths[2]), (3, lengths[5]), (3, lengths[8]), (2, lengths[10])]


def test_models_with_a_limited_view_wait_for_the_whole_batch(tiny_lm):
    sliding = LanguageModel(
        build_llama(8, layers=2, max_position=64, seed=5, config_class=MistralConfig, sliding_window=4),
        tiny_lm.tokenizer,
        "s",
        "",
        frozenset({EOS}),
    )
    requests = requests_for(11, guided=False)
    alone = [generate(sliding, [r], CONFIG)[0] for r in requests]
    assert [r.tokens for r in generate(sliding, requests, replace(CONFIG, batch_size=3))] == [r.tokens for r in alone]
    guide = mixing_guide(tiny_lm, {"x": sliding, "y": sibling(tiny_lm, 41)})
    requests = requests_for(11, guided=True)
    alone = [generate(tiny_lm, [r], CONFIG, guide)[0] for r in requests]
    assert [r.tokens for r in generate(tiny_lm, requests, replace(CONFIG, batch_size=3), guide)] == [r.tokens for r in alone]
