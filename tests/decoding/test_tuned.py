"""Decoding with parameters that depend on the weights: every response of tiny models against merged models, batches, bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from conftest import build_llama, prompt
from decoding.rows import PROMPTS, Plain, check_batches, check_every_response, leaves, sibling
from equipoise.decoding.logit_mixing import mixing_guide, tuned_guide
from equipoise.models.chat import prompt_ids
from equipoise.models.companions import Voice
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel
from equipoise.models.weighted_lora import WeightedLinear, WeightedLora, add_weighted_lora, dense_update, route_adapters
from equipoise.types import Prompt, Request, UserError
from peft_folders import add_dense, peft_folder, tiny_base, updates

WEIGHTS = ((0.3, 0.7), (1.0, 0.0), (1.4, -0.6), None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders, and each one's update written out."""
    root, folders, dense = tmp_path_factory.mktemp("adapters"), {}, {}
    kinds = {"x": (2, {"target_modules": ["q_proj", "down_proj"]}, 6 / 2)}
    kinds["y"] = (3, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, 6 / np.sqrt(3))
    for seed, (name, (rank, settings, scale)) in enumerate(kinds.items()):
        folders[name], _ = peft_folder(root / name, rank, seed, **settings)
        dense[name] = updates(folders[name], scale)
    return folders, dense


def merged(lm, dense, weights) -> LanguageModel:
    """A plain model whose matrices hold the weighted sum of the dense updates."""
    model = tiny_base()
    for name, w in zip(dense, weights, strict=True):
        add_dense(model, dense[name], w)
    return replace(lm, model=model, name=f"merged at {weights}")


def law_of(plain, model):
    """The policy's own next-token law, whatever the reference keeps of it."""

    def fused(head, prefixes, allowed):
        return log_softmax(np.where(allowed, plain(model, [(*head, *p) for p in prefixes]), -np.inf), axis=1)

    return fused


@pytest.mark.parametrize("config", [Sampling(max_new_tokens=3, top_k=0), Sampling(max_new_tokens=4, top_k=3, temperature=0.7)])
def test_every_response_of_a_soup_is_that_of_the_merged_model(tiny_lm, adapters, monkeypatch, config):
    """With top_k 0 the law at weights w is the merged model's; rows of one batch have their own, and exact KL to the reference."""
    folders, dense = adapters
    guide = tuned_guide(tiny_lm, Voice(lm=route_adapters(tiny_lm, folders), condition="weights"))
    assert guide.objectives == ("x", "y")
    plain, wanted = Plain(), []
    for weights, which in zip(WEIGHTS, itertools.cycle(range(3)), strict=False):
        model = tiny_lm if weights is None else merged(tiny_lm, dense, weights)
        found = leaves(plain, tiny_lm, which, weights, config, law_of(plain, model))
        wanted += found[:: max(1, len(found) // 60)]
    got = check_every_response(tiny_lm, guide, config, wanted, monkeypatch)
    assert np.mean([r.kl for r in got if r.weights]) > 0.2
    assert max(r.kl for r in got if r.weights is None) < 1e-5


def test_over_the_whole_vocabulary_a_soup_is_its_merged_model_to_the_last_token(tiny_lm, adapters):
    """Log-probability of each sampled response, by one forward of the merged model over all of it."""
    folders, dense = adapters
    guide = tuned_guide(tiny_lm, Voice(lm=route_adapters(tiny_lm, folders), condition="weights"))
    weights = ((0.5, 0.5), (0.9, 0.1), (0.0, 1.0), (0.0, 0.0))
    requests = [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=weights[i % 4]) for i in range(12)]
    config = Sampling(max_new_tokens=9, top_k=0, allow_eos_first=True)
    models = {w: merged(tiny_lm, dense, w) for w in weights}
    for request, rollout in zip(requests, generate(tiny_lm, requests, config, guide), strict=True):
        head = prompt_ids(tiny_lm.tokenizer, request.prompt)
        ids = torch.tensor([[*head, *rollout.tokens]])
        sums = []
        for lm in (models[request.weights], tiny_lm):
            with torch.no_grad():
                logprobs = torch.log_softmax(lm.model(ids).logits[0, len(head) - 1 : -1].double(), dim=-1)
            sums.append(logprobs)
        kl = float((sums[0].exp() * (sums[0] - sums[1])).sum())
        picked = sums[0].gather(1, ids[0, len(head) :, None])[:, 0].tolist()
        np.testing.assert_allclose(rollout.logprobs, picked, atol=1e-4)
        assert rollout.kl == pytest.approx(kl, abs=1e-4)
        assert rollout.kl_floor == pytest.approx(0, abs=1e-6)
        assert (rollout.kl > 1e-3) == (request.weights != (0.0, 0.0))  # w = 0 is the reference


def test_a_batch_of_many_weights_costs_one_forward_a_token(tiny_lm, adapters):
    guide = tuned_guide(tiny_lm, Voice(lm=route_adapters(tiny_lm, adapters[0]), condition="weights"))
    config = Sampling(max_new_tokens=9, top_k=5)
    for rollout in check_batches(tiny_lm, guide, config, ((0.3, 0.7), None, (1.0, 0.0), (0.0, 1.0))):
        head = next(prompt_ids(tiny_lm.tokenizer, p) for p in PROMPTS if p.id == rollout.prompt_id)
        assert rollout.guide_forwards == (rollout.weights is not None) * (len(head) + len(rollout.tokens) - 1)


def test_one_policy_is_mod_with_one_model(tiny_lm):
    """Any divergence mixes a single model of weight 1 into itself."""
    other = sibling(tiny_lm, 5)
    tuned = tuned_guide(tiny_lm, Voice(lm=other))
    assert tuned.objectives == ()
    config = Sampling(max_new_tokens=7, top_k=4)
    got = generate(tiny_lm, [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=()) for i in range(9)], config, tuned)
    for divergence in ("reverse_kl", "jsd", "alpha:0.5"):
        mixed = mixing_guide(tiny_lm, {"x": other}, divergence)
        want = generate(tiny_lm, [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=(1.0,)) for i in range(9)], config, mixed)
        assert [r.tokens for r in got] == [r.tokens for r in want]
        np.testing.assert_allclose([r.kl for r in got], [r.kl for r in want], atol=1e-4)
    assert min(r.kl for r in got) > 1e-3


def test_a_policy_without_weights_beside_the_reference(tiny_lm):
    """No objectives, so that weights can't tell the two apart: a request without any is the reference, also in a mixed batch."""
    guide = tuned_guide(tiny_lm, Voice(lm=sibling(tiny_lm, 5)))
    config = Sampling(max_new_tokens=6, top_k=5, batch_size=8)
    requests = [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=() if i % 2 else None) for i in range(8)]
    got = generate(tiny_lm, requests, config, guide)
    want = generate(tiny_lm, requests[::2], config)
    assert [r.tokens for r in got[::2]] == [r.tokens for r in want]
    assert all(r.kl < 1e-5 and r.guide_forwards == 0 for r in got[::2])
    assert all(r.kl > 1e-3 and r.guide_forwards > 0 for r in got[1::2])


def test_a_policy_that_was_trained_at_weights_is_the_same_at_all_of_them(tiny_lm, adapters):
    """Its objectives and weights are what its rollouts say; they steer nothing."""
    routed = route_adapters(tiny_lm, {"policy": adapters[0]["x"]})
    guide = tuned_guide(tiny_lm, Voice(lm=routed, condition=(1.0,)), ("helpful", "harmless"))
    config = Sampling(max_new_tokens=6, top_k=0)
    made = [
        generate(tiny_lm, [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=w) for i in range(6)], config, guide)
        for w in ((0.3, 0.7), (1.0, 0.0))
    ]
    assert [(r.tokens, r.logprobs) for r in made[0]] == [(r.tokens, r.logprobs) for r in made[1]]
    assert made[0][0].weights == (0.3, 0.7)


def test_conditional_adapters_are_a_policy_too(tiny_lm, monkeypatch):
    lm = add_weighted_lora(tiny_lm, WeightedLora(), ("x", "y"), seed=1)
    generator = torch.Generator().manual_seed(0)
    layers = {name: m for name, m in lm.model.named_modules() if isinstance(m, WeightedLinear)}
    for layer in layers.values():
        layer.up_Or.data = 0.4 * torch.randn(layer.up_Or.shape, generator=generator)
    config, plain, wanted = Sampling(max_new_tokens=3, top_k=0), Plain(), []
    for which, weights in enumerate(((0.25, 0.75), (1.0, 0.0))):
        model = build_llama(8, layers=3, max_position=64, seed=0)
        add_dense(model, {name: dense_update(layer, weights).detach().double().numpy() for name, layer in layers.items()}, 1.0)
        wanted += leaves(plain, tiny_lm, which, weights, config, law_of(plain, replace(tiny_lm, model=model)))[::5]
    check_every_response(tiny_lm, tuned_guide(tiny_lm, Voice(lm=lm, condition="weights")), config, wanted, monkeypatch)


def test_bad_policies_are_named(tiny_lm, adapters):
    with pytest.raises(UserError, match="reads weights: give its condition"):
        tuned_guide(tiny_lm, Voice(lm=route_adapters(tiny_lm, adapters[0])))
    guide = tuned_guide(tiny_lm, Voice(lm=route_adapters(tiny_lm, adapters[0]), condition="weights"))
    with pytest.raises(UserError, match="1 weights for objectives x, y"):
        generate(tiny_lm, [Request(id="r", prompt=PROMPTS[0], seed=0, weights=(1.0,))], Sampling(), guide)


@pytest.mark.parametrize("config", [Sampling(max_new_tokens=3, top_k=0), Sampling(max_new_tokens=4, top_k=3, temperature=0.7)])
def test_a_policy_that_is_told_its_weights_in_the_prompt(tiny_lm, monkeypatch, config):
    """Its law is that of its model under the prompt that says the weights; what the KL is against reads the plain prompt."""

    def told(text: str, weights) -> Prompt:
        return prompt("any", text + " d" * round(10 * weights[0]) + " a" * round(10 * weights[1]))

    other = sibling(tiny_lm, 6)
    guide = tuned_guide(tiny_lm, Voice(lm=other, asked=lambda request: told(request.prompt.text, request.weights)), ("x", "y"))
    plain, wanted = Plain(), []
    for weights, which in (((0.3, 0.7), 0), ((1.0, 0.0), 1), ((1.0, 0.0), 2), (None, 0)):
        ids = None if weights is None else prompt_ids(tiny_lm.tokenizer, told(PROMPTS[which].text, weights))

        def law(head, prefixes, allowed, ids=ids):
            model = tiny_lm if ids is None else other
            return log_softmax(np.where(allowed, plain(model, [(*(ids or head), *p) for p in prefixes]), -np.inf), axis=1)

        found = leaves(plain, tiny_lm, which, weights, config, law)
        wanted += found[:: max(1, len(found) // 60)]
    got = check_every_response(tiny_lm, guide, config, wanted, monkeypatch)
    assert {r.guide_forwards - len(r.tokens) + 1 for r in got if r.prompt_id == "short"} == {
        len(prompt_ids(tiny_lm.tokenizer, told("c", (1.0, 0.0))))
    }
