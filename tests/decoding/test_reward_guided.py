"""GenARM, PARM and contrast of prompts: every response of tiny models against the product law; temperature; rows; bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from conftest import TINY_WORDS, build_tokenizer, prompt
from decoding.rows import EOS, PROMPTS, Plain, check_batches, check_every_response, leaves, sibling
from equipoise.decoding.reward_guided import product_shift, prompt_guide, reward_guide
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.models.weighted_lora import WeightedLinear, WeightedLora, add_weighted_lora, dense_update
from equipoise.types import Message, Prompt, Request, UserError

BETA = 0.8
CASES = {
    "whole vocabulary": Sampling(max_new_tokens=2, top_k=0, batch_size=40),
    "top 3, tempered, empty allowed": Sampling(max_new_tokens=4, top_k=3, temperature=0.7, allow_eos_first=True, batch_size=40),
}
WEIGHTS = ((0.3, 0.7), (1.0, 0.0), None, (0.0, 1.0))


@pytest.fixture(scope="module")
def base(tiny_lm):
    """Two rows of its vocabulary matrix are padding."""
    return sibling(tiny_lm, 31, rows=10)


@pytest.fixture(scope="module")
def rewards(tiny_lm):
    """One knows a token more, as GenARM's reward models do (32001 against 32000)."""
    return {"x": sibling(tiny_lm, 32, rows=12, tokenizer=build_tokenizer((*TINY_WORDS, "<extra>"))), "y": sibling(tiny_lm, 33)}


@pytest.fixture(scope="module")
def parm(base):
    """A conditional reward model whose adapters are far from their start."""
    made = add_weighted_lora(base, WeightedLora(shared_rank=2, rank=3, alpha=6.0, targets=("q_proj", "v_proj", "down_proj")), ("x", "y"))
    generator = torch.Generator().manual_seed(3)
    for module in made.model.modules():
        if isinstance(module, WeightedLinear):
            module.up_Or.data = 0.4 * torch.randn(module.up_Or.shape, generator=generator)
    return made


def dense(base, parm, weights):
    """The plain model that the adapters make at one weight vector, every matrix written out."""
    updates = {name: dense_update(m, weights) for name, m in parm.model.named_modules() if isinstance(m, WeightedLinear)}
    copy = sibling(base, 31, rows=10)
    for name, update in updates.items():
        copy.model.get_submodule(name).weight.data += update.detach()
    return copy


def under(tokenizer, system: str, which: int) -> list[int]:
    asked = Prompt(id="", messages=(Message(role="system", content=system), *PROMPTS[which].messages))
    return prompt_ids(tokenizer, asked)


def test_the_product_by_hand():
    """Two models, three candidates: c = (2, -1/2)."""
    voices = torch.tensor([[[-1.0, -2.0, -3.0], [-4.0, 0.0, -2.0]]], dtype=torch.float64)
    assert product_shift(voices, torch.tensor([[2.0, -0.5]], dtype=torch.float64)).tolist() == [[0.0, -4.0, -5.0]]


def genarm(plain, base, rewards, weights):
    def fused(head, prefixes, allowed):
        out = plain.along(base, head, prefixes)[1]
        for w, model in zip(weights or (), rewards.values(), strict=False):
            out = out + w / BETA * plain.along(model, head, prefixes)[1]
        return out

    return fused


@pytest.mark.parametrize("case", CASES)
def test_genarm_every_response(base, rewards, monkeypatch, case):
    plain, config = Plain(), CASES[case]
    wanted = [x for which in (0, 1) for w in WEIGHTS for x in leaves(plain, base, which, w, config, genarm(plain, base, rewards, w))]
    assert config.top_k or {token for leaf in wanted for token in leaf.tokens} == set(range(8))  # none of the padding rows
    check_every_response(base, reward_guide(base, rewards, BETA), config, wanted, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_parm_every_response(base, parm, monkeypatch, case):
    """Rows of many weights in one batch of one conditional model, against a plain model per weight vector."""
    plain, config = Plain(), CASES[case]

    def fused(weights):
        model = dense(base, parm, weights) if weights else None
        return lambda head, prefixes, allowed: (
            plain.along(base, head, prefixes)[1] + (plain.along(model, head, prefixes)[1] / BETA if model else 0.0)
        )

    wanted = [x for which in (0, 1) for w in WEIGHTS for x in leaves(plain, base, which, w, config, fused(w))]
    check_every_response(base, reward_guide(base, parm, BETA), config, wanted, monkeypatch)
    law = {w: fused(w)(prompt_ids(base.tokenizer, PROMPTS[0]), [()], None) for w in ((1.0, 0.0), (0.0, 1.0))}
    assert np.abs(law[1.0, 0.0] - law[0.0, 1.0]).max() > 0.3  # the weights do change it


@pytest.mark.parametrize("case", CASES)
def test_contrast_of_prompts_every_response(base, monkeypatch, case):
    """x has a message for it and one against it, y one for it only, which is set against the plain prompt."""
    plain, config = Plain(), CASES[case]
    messages = {"x": ("a a b", "d d"), "y": "c . c"}

    def fused(which, weights):
        def law(head, prefixes, allowed):
            own = plain.along(base, head, prefixes)[1]
            if weights is None:
                return own
            said = [plain.along(base, under(base.tokenizer, m, which), prefixes)[1] for m in ("a a b", "d d", "c . c")]
            return own + (weights[0] * (said[0] - said[1]) + weights[1] * (said[2] - own)) / BETA

        return law

    wanted = [x for which in (0, 1) for w in WEIGHTS for x in leaves(plain, base, which, w, config, fused(which, w))]
    check_every_response(base, prompt_guide(base, messages, BETA), config, wanted, monkeypatch)


def test_temperature_of_the_product_and_of_the_mean(base, rewards):
    """a = w / beta = (0.5, 1.5): the product at 1 is the mean of the logs at 1 / (1 + sum a) = 1/3; T = 1/2 squares the product."""
    weights, beta, plain = (0.25, 0.75), 0.5, Plain()
    requests = [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=weights) for i in range(6)]
    for temperature in (1.0, 0.5):
        config = Sampling(max_new_tokens=5, top_k=0, temperature=temperature, allow_eos_first=True)
        for rollout in generate(base, requests, config, reward_guide(base, rewards, beta)):
            head = prompt_ids(base.tokenizer, PROMPTS[int(rollout.id) % 3])
            for t, (token, logprob) in enumerate(zip(rollout.tokens, rollout.logprobs, strict=True)):
                logs = [plain.along(m, head, [rollout.tokens[:t]])[1][0] for m in (base, *rewards.values())]
                mean = (logs[0] + 0.5 * logs[1] + 1.5 * logs[2]) / 3
                assert logprob == pytest.approx(log_softmax(mean / (temperature / 3))[token], abs=1e-4)


def guides(base, rewards, parm):
    return {
        "genarm": reward_guide(base, rewards, BETA),
        "parm": reward_guide(base, parm, BETA),
        "prompts": prompt_guide(base, {"x": ("a a b", "d d"), "y": "c . c"}, BETA),
    }


@pytest.mark.parametrize("method", ["genarm", "parm", "prompts"])
def test_a_row_does_not_depend_on_its_batch(base, rewards, parm, method):
    guide = guides(base, rewards, parm)[method]
    ends = replace(base, eos_ids=frozenset({EOS, 0, 6}))  # tokens that come early enough for rows to finish apart
    for rollout in check_batches(ends, guide, Sampling(max_new_tokens=9, top_k=5), WEIGHTS):
        which = [p.id for p in PROMPTS].index(rollout.prompt_id)
        fed, own = len(rollout.tokens) - 1, len(prompt_ids(base.tokenizer, PROMPTS[which]))
        weights = rollout.weights or (0.0, 0.0)
        said = [len(under(base.tokenizer, m, which)) for m in ("a a b", "d d", "c . c")]
        expected = {
            "genarm": sum(own + fed for w in weights if w),
            "parm": own + fed if rollout.weights else 0,
            "prompts": (said[0] + said[1] + 2 * fed if weights[0] else 0) + (said[2] + fed if weights[1] else 0),
        }
        assert rollout.guide_forwards == expected[method]


def test_greedy_is_the_mode_of_the_product(base, rewards):
    config, plain, weights = Sampling(max_new_tokens=6, top_k=0, allow_eos_first=True, greedy=True), Plain(), (0.3, 0.7)
    requests = [Request(id=str(i), prompt=p, seed=9, weights=weights) for i, p in enumerate(PROMPTS)]
    for rollout in generate(base, requests, config, reward_guide(base, rewards, BETA)):
        head = prompt_ids(base.tokenizer, PROMPTS[int(rollout.id)])
        for t, token in enumerate(rollout.tokens):
            law = genarm(plain, base, rewards, weights)(head, [rollout.tokens[:t]], None)[0]
            assert token == law.argmax()


def test_more_candidates_than_tokens_are_all_tokens(base, rewards):
    requests = [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=(0.5, 0.5)) for i in range(6)]
    guide, config = reward_guide(base, rewards, BETA), Sampling(max_new_tokens=5, top_k=0)
    all_tokens, more = (generate(base, requests, replace(config, top_k=k), guide) for k in (0, 1000))
    assert [(r.tokens, r.logprobs, r.kl_floor) for r in more] == [(r.tokens, r.logprobs, r.kl_floor) for r in all_tokens]
    assert max(r.kl_floor for r in more) < 1e-6


def test_a_model_that_says_nan_is_named_with_the_row(base, rewards, tiny_lm):
    broken = sibling(tiny_lm, 34)
    broken.model.lm_head.weight.data[:] = float("nan")
    rows = [
        Request(id=f"r-{i}", prompt=p, seed=i, weights=w)
        for i, (p, w) in enumerate(zip(PROMPTS, ((1.0, 0.0), None, (0.4, 0.6)), strict=True))
    ]
    with pytest.raises(UserError, match=r"NaN or infinity for prompt '\w+' \(request 'r-2'\) at token 0"):
        generate(base, rows, Sampling(), reward_guide(base, {"x": rewards["x"], "y": broken}, BETA))
    # A row that gives it no weight never meets it.
    assert len(generate(base, rows[:2], Sampling(max_new_tokens=3), reward_guide(base, {"x": rewards["x"], "y": broken}, BETA))) == 2


def test_bad_settings_are_named(base, rewards, parm, tiny_lm):
    for make in (lambda beta: reward_guide(base, rewards, beta), lambda beta: prompt_guide(base, {"x": "a"}, beta)):
        for beta in (0.0, -1.0, float("nan")):
            with pytest.raises(UserError, match="beta must be positive"):
                make(beta)
    with pytest.raises(UserError, match="'sibling-33' has no adapters that read weights"):
        reward_guide(base, rewards["y"], BETA)
    with pytest.raises(UserError, match="'sibling-31' reads weights"):
        reward_guide(base, {"x": parm}, BETA)
    for messages in ({"x": " "}, {"x": ("a", "")}):
        with pytest.raises(UserError, match="system message of 'x' is empty"):
            prompt_guide(base, messages, BETA)
    for none in (reward_guide, prompt_guide):
        with pytest.raises(UserError, match="at least one"):
            none(base, {}, BETA)
    # The weights' objectives are the models': one that has none is refused before anything runs.
    request = Request(id="r-1", prompt=PROMPTS[0], seed=0, weights=(0.0, 0.0, 1.0))
    with pytest.raises(UserError, match="'r-1' has 3 weights for objectives x, y"):
        generate(base, [request], Sampling(), reward_guide(base, rewards, BETA))


def test_a_template_without_system_messages(base):
    tokenizer = build_tokenizer(TINY_WORDS)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    strict = replace(base, tokenizer=tokenizer)
    request = Request(id="r", prompt=PROMPTS[0], seed=0, weights=(1.0,))
    with pytest.raises(UserError, match=r"template of 'sibling-31' takes no system message \(no\)"):
        generate(strict, [request], Sampling(), prompt_guide(strict, {"x": "a"}, BETA))


def test_a_prompt_that_a_system_message_makes_too_long(base):
    guide = prompt_guide(base, {"x": "a " * 30}, BETA)
    request = Request(id="r", prompt=prompt("p-9", "a b"), seed=0, weights=(1.0,))
    with pytest.raises(UserError, match=r"'p-9' has \d+ tokens for 'sibling-31'; with 30 to come that exceeds its context of 64"):
        generate(base, [request], Sampling(max_new_tokens=30), guide)
