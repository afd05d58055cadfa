"""Reward models that score every candidate: every response of tiny models against uncached forwards, rows, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, MistralConfig

from conftest import TINY_WORDS, build_tokenizer
from decoding.rows import PROMPTS, Plain, check_batches, check_every_response, leaves
from equipoise.decoding.scorer_guided import ScorerGuide
from equipoise.decoding.value_guided import PolicySampler
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel
from equipoise.objectives import Normaliser
from equipoise.types import Request, UserError

BETA, SD_K = 0.6, (2.0, 0.5)
WEIGHTS = ((0.3, 0.7), (1.0, 0.0), None)
SCALE = Normaliser(objectives=("x", "y"), mean_K=(5.0, -1.0), sd_K=SD_K)


def scorer(tokenizer, seed: int, config_class=LlamaConfig, **settings) -> LanguageModel:
    config = config_class(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.35,
        num_labels=1,
        pad_token_id=0,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config).float().eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, f"scorer-{seed}", "")


@pytest.fixture(scope="module")
def scorers(tiny_tokenizer):
    return {"x": scorer(tiny_tokenizer, 51), "y": scorer(tiny_tokenizer, 52)}


@pytest.mark.parametrize(
    "config",
    [
        Sampling(max_new_tokens=2, top_k=0, batch_size=40),
        Sampling(max_new_tokens=4, top_k=3, temperature=0.7, allow_eos_first=True, batch_size=40),
    ],
    ids=str,
)
def test_every_response(tiny_lm, scorers, monkeypatch, config):
    plain = Plain()

    def fused(weights):
        def law(head, prefixes, allowed):
            out = plain.along(tiny_lm, head, prefixes)[1]
            for w, sd, model in zip(weights or (), SD_K, scorers.values(), strict=False):
                # pi_ref is tempered and the tilt is added to it, so that the helper's division by T is undone here.
                texts = torch.tensor([[*head, *p, a] for p in prefixes for a in range(8)])
                with torch.no_grad():
                    score = model.model.score(model.model.model(input_ids=texts).last_hidden_state[:, -1])
                out = out + config.temperature * w / (BETA * sd) * score.double().numpy().reshape(len(prefixes), 8)
            return out

        return law

    wanted = [x for which in (0, 1) for w in WEIGHTS for x in leaves(plain, tiny_lm, which, w, config, fused(w))]
    got = check_every_response(tiny_lm, ScorerGuide(tiny_lm, scorers, BETA, SCALE), config, wanted, monkeypatch)
    assert np.mean([r.kl for r in got if r.weights]) > 0.3  # the scorers do tilt


def test_a_row_does_not_depend_on_its_batch(tiny_lm, scorers):
    for rollout in check_batches(tiny_lm, ScorerGuide(tiny_lm, scorers, BETA), Sampling(max_new_tokens=9, top_k=5), WEIGHTS):
        head = next(prompt_ids(tiny_lm.tokenizer, p) for p in PROMPTS if p.id == rollout.prompt_id)
        asked = sum(w != 0 for w in rollout.weights or ())  # whichever scorers run for others
        assert rollout.guide_forwards == asked * (len(head) + 5 * len(rollout.tokens))


def test_scorers_that_nobody_asks_for_do_not_run(tiny_lm, scorers, tiny_tokenizer):
    broken = scorer(tiny_tokenizer, 53)
    broken.model.forward = broken.model.model.forward = None  # would raise
    one = ScorerGuide(tiny_lm, {"x": scorers["x"], "y": broken}, BETA)
    both, config = ScorerGuide(tiny_lm, scorers, BETA), Sampling(max_new_tokens=6, top_k=5)
    rows = [Request(id=f"r-{i}", prompt=PROMPTS[i], seed=i, weights=w) for i, w in enumerate(((0.7, 0.0), None))]
    got, want = PolicySampler(tiny_lm, config, one)(rows), generate(tiny_lm, rows, config, both)
    assert [(r.tokens, r.guide_forwards) for r in got] == [(r.tokens, r.guide_forwards) for r in want]
    assert [r.kl for r in got] == pytest.approx([r.kl for r in want], abs=1e-6)
    assert PolicySampler(tiny_lm, config, one)(rows[1:])[0].guide_forwards == 0


def test_a_scorer_of_weight_zero_is_left_out_and_one_that_says_nan_is_named(tiny_lm, scorers, tiny_tokenizer):
    broken = scorer(tiny_tokenizer, 53)
    broken.model.score.weight.data[:] = float("nan")
    guide = ScorerGuide(tiny_lm, {"x": scorers["x"], "y": broken}, BETA)
    rows = [Request(id=f"r-{i}", prompt=PROMPTS[i], seed=i, weights=w) for i, w in enumerate(((1.0, 0.0), (0.5, 0.5)))]
    assert generate(tiny_lm, rows[:1], Sampling(max_new_tokens=3), guide)[0].kl > 0
    with pytest.raises(UserError, match=r"ScorerGuide on x, y returned NaN or infinity for prompt 'short' \(request 'r-1'\) at token 0"):
        generate(tiny_lm, rows, Sampling(), guide)


def test_bad_settings_are_named(tiny_lm, scorers, tiny_tokenizer):
    sliding = scorer(tiny_tokenizer, 54, MistralConfig, sliding_window=4)
    other = replace(scorers["x"], tokenizer=build_tokenizer((*TINY_WORDS[:-1], "!")), name="other")
    only = Normaliser(objectives=("y",), mean_K=(0.0,), sd_K=(1.0,))
    for words, says in (
        ({"beta": 0.0}, "beta must be positive"),
        ({"scorers": {}}, "at least one"),
        ({"scorers": {"x": other}}, r"'other' has another tokenizer than 'tiny': token 7"),
        ({"scorers": {"x": sliding}}, "not all layers of 'scorer-54' attend to the full past"),
        ({"normaliser": only}, "scale is for y, the scorers for x, y"),
    ):
        with pytest.raises(UserError, match=says):
            ScorerGuide(tiny_lm, **({"scorers": scorers, "beta": BETA} | words))
    request = Request(id="r", prompt=PROMPTS[0], seed=0, weights=(0.5, 0.5))
    short = scorer(tiny_tokenizer, 55)
    short.model.config.max_position_embeddings = 20
    with pytest.raises(UserError, match=r"prompt 'long' has \d+ tokens for 'scorer-55'"):
        generate(tiny_lm, [request], Sampling(max_new_tokens=30), ScorerGuide(tiny_lm, {"x": scorers["x"], "y": short}, BETA))
