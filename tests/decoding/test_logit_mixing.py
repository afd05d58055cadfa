"""MOD: the closed forms against naive arithmetic and direct optimisation, then every response of tiny models against them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy.optimize import brentq
from scipy.special import log_softmax

from conftest import build_llama
from decoding.rows import EOS, PROMPTS, Plain, check_batches, check_every_response, leaves, sibling
from equipoise.decoding.logit_mixing import Divergence, closed_form, log_ratio, mixing_guide
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.models.weighted_lora import route_adapters
from equipoise.types import Request, UserError

NAMES = ("reverse_kl", "forward_kl", "alpha:0.3", "jsd")
SCOPES = ("prefix", "token")
F = {
    "reverse_kl": lambda r: r * np.log(r),
    "forward_kl": lambda r: -np.log(r),
    "alpha:0.3": lambda r: (r - r**0.7 / 0.7) / 0.3,
    "jsd": lambda r: r * np.log(r) - (r + 1) * np.log((r + 1) / 2),
}
"""The convex f of each divergence, D_f(p || q) = sum q f(p / q); f' is the module's g up to a constant."""
G = {
    "reverse_kl": np.log,
    "forward_kl": lambda r: -1 / r,
    "alpha:0.3": lambda r: (1 - r**-0.3) / 0.3,
    "jsd": lambda r: np.log(r / (1 + r)),
}


def laws(seed: int, models: int, outcomes: int, scale: float = 1.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log pi_m [M, C], log pi_ref [C], weights [M])."""
    rng = np.random.default_rng(seed)
    return (
        log_softmax(rng.normal(scale=scale, size=(models, outcomes)), axis=1),
        log_softmax(rng.normal(size=outcomes)),
        rng.dirichlet(np.ones(models)),
    )


def solve(name: str, log_MC, logref_C, weights_M) -> np.ndarray:
    """log of the optimum by root finding alone: g inverted and Z found with Brent's method."""
    ratio_MC = np.exp(log_MC - logref_C)
    mixed_C = weights_M @ G[name](ratio_MC)
    low, high = 1e-9, 1e9

    def law(z: float) -> np.ndarray:
        inverse = []
        for target in mixed_C - z:
            if G[name](high) <= target:
                inverse.append(high)
            elif G[name](low) >= target:
                inverse.append(low)
            else:
                inverse.append(np.exp(brentq(lambda u, t=target: G[name](np.exp(u)) - t, np.log(low), np.log(high), xtol=1e-13)))
        return np.exp(logref_C) * np.array(inverse)

    # brentq wants the two signs: at z = 0 there is too little mass, and below it grows without end.
    z = brentq(lambda z: np.log(law(z).sum()), -5.0, 1e-9, xtol=1e-13)
    return np.log(law(z))


def tensors(log_MC, logref_C, weights_M):
    return torch.tensor(log_MC)[None], torch.tensor(logref_C)[None], torch.tensor(weights_M)[None]


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_by_another_solver(name):
    for seed in range(3):
        log_MC, logref_C, weights_M = laws(seed, models=3, outcomes=5)
        log_RMC, ref_RC, w_RM = tensors(log_MC, logref_C, weights_M)
        got = closed_form(Divergence.parse(name), log_RMC, ref_RC, w_RM)[0].numpy()
        assert np.exp(got).sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(got, solve(name, log_MC, logref_C, weights_M), atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_no_other_law_earns_more(name):
    """The value sum_i w_i E[R_i] - D_f with R_i = g(pi_i / pi_ref): steps from the optimum in any direction lose."""
    log_MC, logref_C, weights_M = laws(7, models=2, outcomes=6)
    reward_C = weights_M @ G[name](np.exp(log_MC - logref_C))

    def value(p_C):
        return float(p_C @ reward_C - np.exp(logref_C) @ F[name](p_C / np.exp(logref_C)))

    best_C = np.exp(closed_form(Divergence.parse(name), *tensors(log_MC, logref_C, weights_M))[0].numpy())
    rng = np.random.default_rng(0)
    for size in (1e-4, 1e-2, 0.3):
        for _ in range(50):
            other_C = best_C * np.exp(size * rng.normal(size=6))
            assert value(other_C / other_C.sum()) < value(best_C)


def test_by_hand():
    """pi_1 = (.8, .2), pi_2 = (.2, .8), pi_ref = (.5, .5), v = (3/4, 1/4), the first outcome, before Z."""
    gap = np.log(np.array([[0.8, 0.2], [0.2, 0.8]]) / 0.5)
    gap_RMC, v = torch.tensor(gap)[None], torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    expected = {
        "reverse_kl": 0.75 * np.log(1.6) + 0.25 * np.log(0.4),
        "forward_kl": -np.log(0.75 / 1.6 + 0.25 / 0.4),
        "alpha:0.5": -2 * np.log(0.75 / np.sqrt(1.6) + 0.25 / np.sqrt(0.4)),
        # r / (1 + r) is 8/13 and 2/7; r = x / (1 - x) of their geometric mean x
        "jsd": np.log((x := (8 / 13) ** 0.75 * (2 / 7) ** 0.25) / (1 - x)),
    }
    for name, value in expected.items():
        assert log_ratio(Divergence.parse(name), gap_RMC, v)[0, 0].item() == pytest.approx(value, abs=1e-12)
    # The sum of the JSD with that of the reverse KL in its place is another number.
    assert abs(expected["jsd"] - expected["reverse_kl"]) > 0.005


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 8.0]))
@settings(max_examples=15, deadline=None)
def test_equal_models_and_whole_weights_give_that_model(name, seed, scale):
    log_MC, logref_C, weights_M = laws(seed, models=3, outcomes=5, scale=scale)
    kind, (log_RMC, ref_RC, w_RM) = Divergence.parse(name), tensors(log_MC, logref_C, weights_M)
    same = log_RMC[:, :1].expand_as(log_RMC)
    for normalised in (None, ref_RC):
        got = ref_RC + log_ratio(kind, same - ref_RC[:, None], w_RM, normalised)
        torch.testing.assert_close(got, log_RMC[:, 0], atol=1e-7, rtol=1e-9)
        only = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
        # A model of weight 0 is left out, even where it says NaN or infinity.
        broken = (log_RMC - ref_RC[:, None]).clone()
        broken[:, 0], broken[:, 2] = float("inf"), float("-inf")
        got = ref_RC + log_ratio(kind, broken, only, normalised)
        torch.testing.assert_close(got, log_RMC[:, 1], atol=1e-7, rtol=1e-9)


@pytest.mark.parametrize("scope", ["Z = 0", "Z solved"])
def test_alpha_joins_the_reverse_and_the_forward_kl(scope):
    log_RMC, ref_RC, w_RM = tensors(*laws(3, models=2, outcomes=5))
    gap, z = log_RMC - ref_RC[:, None], None if scope == "Z = 0" else ref_RC
    near = {a: log_ratio(Divergence(alpha=a), gap, w_RM, z) for a in (1e-7, 1.0)}
    torch.testing.assert_close(near[1e-7], log_ratio(Divergence.parse("reverse_kl"), gap, w_RM, z), atol=1e-5, rtol=0)
    torch.testing.assert_close(near[1.0], log_ratio(Divergence.parse("forward_kl"), gap, w_RM, z))


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_whole_prefixes_hundreds_of_nats_apart(name, times):
    """One model of the weights lags behind by 700 or 2,800 nats, beyond what exp can hold: no overflow, and the known limits."""
    gap = times * torch.tensor([[[300.0, -300.0], [-400.0, 400.0]]], dtype=torch.float64)
    for weights in ((0.5, 0.5), (1.0, 0.0)):
        w_RM = torch.tensor([weights], dtype=torch.float64)
        got = log_ratio(Divergence.parse(name), gap, w_RM)[0].numpy()
        if weights == (1.0, 0.0):
            limit = [times * 300, times * -300]
        else:  # the harmonic kinds follow the model that lags: -(1/a) log(0.5 exp(a lag)); the JSD its log(r) up to there
            lag = {"forward_kl": np.log(2), "alpha:0.3": np.log(2) / 0.3}
            least = {"reverse_kl": [-50, 50], "jsd": [-200, -150]}.get(name, [-400, -300])
            limit = [times * x + lag.get(name, 0) for x in least]
        np.testing.assert_allclose(got, limit, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_models_that_agree_on_one_outcome_alone(name):
    """Before Z it has half of the mass, after it nearly all: Z is as far off as it can be."""
    log_MC = np.log([[0.5, 0.5 - 1e-6, 1e-6], [0.5, 1e-6, 0.5 - 1e-6]])
    logref_C, weights_M = np.log([0.98, 0.01, 0.01]), np.array([0.5, 0.5])
    got = closed_form(Divergence.parse(name), *tensors(log_MC, logref_C, weights_M))[0].numpy()
    assert np.exp(got).sum() == pytest.approx(1, abs=1e-12)
    assert np.exp(got)[0] > 0.99
    np.testing.assert_allclose(got, solve(name, log_MC, logref_C, weights_M), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_outcomes_that_cannot_happen(name):
    log_MC, logref_C, weights_M = laws(5, models=2, outcomes=4)
    fewer = closed_form(Divergence.parse(name), *tensors(log_MC, logref_C, weights_M))
    padded = [np.concatenate([x, np.full((*x.shape[:-1], 2), -np.inf)], axis=-1) for x in (log_MC, logref_C)]
    got = closed_form(Divergence.parse(name), *tensors(*padded, weights_M))
    torch.testing.assert_close(got[:, :4], fewer)
    assert got[:, 4:].isneginf().all()


def naive(name: str, scope: str, plain: Plain, lm, models, weights):
    """The law of one step from plain forwards, in linear arithmetic (Z by Brent's method)."""

    def fused(head, prefixes, allowed):
        if weights is None:
            return plain(lm, [(*head, *p) for p in prefixes])
        chosen = [(w, m) for w, m in zip(weights, models, strict=True) if w]
        w_M = np.array([w for w, _ in chosen])
        past_ref, next_ref = plain.along(lm, head, prefixes)
        along = [plain.along(m, head, prefixes) for _, m in chosen]
        if scope == "token":
            out = np.zeros(allowed.shape)
            for row, ok in enumerate(allowed):
                log_MC = np.stack([log_softmax(step[row, ok]) for _, step in along])
                out[row, ok] = solve(name, log_MC, log_softmax(next_ref[row, ok]), w_M)
            return out
        ref_C = np.exp(past_ref[:, None] + next_ref)
        prob_MC = np.stack([np.exp(past[:, None] + step) for past, step in along])
        if name == "reverse_kl":
            return np.log(np.prod(prob_MC ** w_M[:, None, None], axis=0))
        mixed = np.tensordot(w_M, G[name](prob_MC / ref_C), axes=1)
        inverse = {
            "forward_kl": lambda s: -1 / s,
            "alpha:0.3": lambda s: (1 - 0.3 * s) ** (-1 / 0.3),
            "jsd": lambda s: 1 / (np.exp(-s) - 1),
        }
        return np.log(ref_C * inverse[name](mixed))

    return fused


CASES = {
    "whole vocabulary": Sampling(max_new_tokens=2, top_k=0, batch_size=40),
    "top 3, tempered, empty allowed": Sampling(max_new_tokens=4, top_k=3, temperature=0.7, allow_eos_first=True, batch_size=40),
}
WEIGHTS = ((0.3, 0.7), (1.0, 0.0), None)


@pytest.fixture(scope="module")
def models(tiny_lm):
    return {"x": sibling(tiny_lm, 21), "y": sibling(tiny_lm, 22)}


@pytest.mark.parametrize("case", CASES)
# The reverse KL has one law in both scopes, so one of them is enough.
@pytest.mark.parametrize(("name", "scope"), [(n, s) for n in NAMES for s in SCOPES if (n, s) != ("reverse_kl", "token")])
def test_every_response_has_its_closed_form(tiny_lm, models, monkeypatch, name, scope, case):
    plain, config = Plain(), CASES[case]
    wanted = [
        leaf
        for which in (0, 1)
        for w in WEIGHTS
        for leaf in leaves(plain, tiny_lm, which, w, config, naive(name, scope, plain, tiny_lm, models.values(), w))
    ]
    check_every_response(tiny_lm, mixing_guide(tiny_lm, models, name, scope), config, wanted, monkeypatch)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", NAMES)
def test_equal_models_are_that_model(tiny_lm, models, name, scope):
    """At any weights, and model x itself at (1, 0): what it says of its own tokens."""
    config = Sampling(max_new_tokens=5, top_k=0)
    for pair, weights in (((models["x"], models["x"]), (0.4, 0.6)), (tuple(models.values()), (1.0, 0.0))):
        guide = mixing_guide(tiny_lm, dict(zip("xy", pair, strict=True)), name, scope)
        requests = [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=weights) for i in range(9)]
        plain = Plain()
        for rollout in generate(tiny_lm, requests, config, guide):
            head = prompt_ids(tiny_lm.tokenizer, PROMPTS[int(rollout.id) % 3])
            for t, (token, logprob) in enumerate(zip(rollout.tokens, rollout.logprobs, strict=True)):
                own = plain(models["x"], [(*head, *rollout.tokens[:t])])[0]
                if t == 0:
                    own = log_softmax(np.where(np.arange(8) == EOS, -np.inf, own))
                assert logprob == pytest.approx(own[token], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_greedy(tiny_lm, models, name):
    """The mode of the rule at each step; w = (1, 0) and equal models are the greedy choice of that model."""
    config = Sampling(max_new_tokens=8, top_k=0, greedy=True)
    of_x = [r.tokens for r in generate(models["x"], [Request(id=str(i), prompt=p, seed=0) for i, p in enumerate(PROMPTS)], config)]
    for pair, weights in ((models, (1.0, 0.0)), ({"x": models["x"], "y": models["x"]}, (0.4, 0.6))):
        requests = [Request(id=str(i), prompt=p, seed=5, weights=weights) for i, p in enumerate(PROMPTS)]
        assert [r.tokens for r in generate(tiny_lm, requests, config, mixing_guide(tiny_lm, pair, name))] == of_x
    plain, requests = Plain(), [Request(id=str(i), prompt=p, seed=5, weights=(0.3, 0.7)) for i, p in enumerate(PROMPTS)]
    for rollout in generate(tiny_lm, requests, config, mixing_guide(tiny_lm, models, name)):
        head = prompt_ids(tiny_lm.tokenizer, PROMPTS[int(rollout.id)])
        for t, token in enumerate(rollout.tokens):
            law = naive(name, "prefix", plain, tiny_lm, models.values(), (0.3, 0.7))(head, [rollout.tokens[:t]], None)[0]
            law[EOS] = -np.inf if t == 0 else law[EOS]
            assert law[token] == law.max()
        # All mass on one token: it costs what the reference would have paid for it.
        assert rollout.logprobs == (0.0,) * len(rollout.tokens)
        assert rollout.kl + rollout.kl_floor == pytest.approx(-sum(rollout.ref_logprobs), abs=1e-5)


def test_strengths_and_weights_that_do_not_sum_to_one(tiny_lm, models, monkeypatch):
    """Policies tuned at other betas: log pi = (1 - sum v) log pi_ref + sum v_i log pi_i with v_i = w_i beta_i / beta."""
    plain, config = Plain(), Sampling(max_new_tokens=3, top_k=3)

    def fused(v):
        return lambda head, prefixes, allowed: (
            (1 - sum(v)) * plain.along(tiny_lm, head, prefixes)[1]
            + sum(w * plain.along(m, head, prefixes)[1] for w, m in zip(v, models.values(), strict=True))
        )

    guide = mixing_guide(tiny_lm, models, strengths={"y": 2.5})
    wanted = [x for w in ((0.4, 0.6), (0.0, 0.0), (1.5, -0.5)) for x in leaves(plain, tiny_lm, 0, w, config, fused((w[0], 2.5 * w[1])))]
    check_every_response(tiny_lm, guide, config, wanted, monkeypatch)


def test_a_constant_on_a_models_logits_changes_nothing(tiny_lm, models):
    """Raw logits are never mixed: the same tokens and log-probabilities for every f."""
    raised = sibling(tiny_lm, 21)
    raised.model.lm_head.bias = torch.nn.Parameter(torch.full((8,), 7.5), requires_grad=False)
    config, weights = Sampling(max_new_tokens=6, top_k=4), (0.3, 0.7)
    requests = [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=weights) for i in range(6)]
    for name in NAMES:
        usual = generate(tiny_lm, requests, config, mixing_guide(tiny_lm, models, name))
        moved = generate(tiny_lm, requests, config, mixing_guide(tiny_lm, {**models, "x": raised}, name))
        assert [r.tokens for r in moved] == [r.tokens for r in usual]
        for a, b in zip(moved, usual, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch(tiny_lm, models, name):
    rollouts = check_batches(
        tiny_lm, mixing_guide(tiny_lm, models, name), Sampling(max_new_tokens=9, top_k=5), ((0.3, 0.7), None, (1.0, 0.0), (0.0, 1.0))
    )
    for rollout in rollouts:
        voices = sum(w != 0 for w in rollout.weights or ())  # a model of weight 0 isn't run
        head = next(prompt_ids(tiny_lm.tokenizer, p) for p in PROMPTS if p.id == rollout.prompt_id)
        assert rollout.guide_forwards == voices * (len(head) + len(rollout.tokens) - 1)


@pytest.fixture(scope="module")
def adapters(tiny_lm, tmp_path_factory):
    """Two PEFT folders on the tiny model, of other ranks and layers, with weights far from zero."""
    folders = {}
    for seed, (name, targets) in enumerate({"x": ["q_proj", "down_proj"], "y": ["q_proj", "v_proj"]}.items()):
        base = build_llama(8, layers=3, max_position=64, seed=0)
        made = get_peft_model(base, LoraConfig(r=2 + seed, lora_alpha=5, target_modules=targets, use_rslora=bool(seed)))
        generator = torch.Generator().manual_seed(seed)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        folders[name] = tmp_path_factory.mktemp("adapter") / name
        made.save_pretrained(folders[name])
    return folders


def merged(lm, adapters, name):
    from peft import PeftModel

    base = build_llama(8, layers=3, max_position=64, seed=0)
    return replace(lm, model=PeftModel.from_pretrained(base, str(adapters[name])).merge_and_unload().eval(), name=f"merged-{name}")


def test_routed_adapters_are_the_models_they_make(tiny_lm, adapters):
    """One forward of all adapters, routed by row, against a model per adapter that peft merged; the base stays as it was."""
    before = tiny_lm.model(torch.tensor([[3, 4, 5]])).logits
    routed = route_adapters(tiny_lm, adapters)
    apart = {name: merged(tiny_lm, adapters, name) for name in adapters}
    config = Sampling(max_new_tokens=8, top_k=5)
    weights = ((0.3, 0.7), (1.0, 0.0), None)
    requests = [Request(id=str(i), prompt=PROMPTS[i % 3], seed=i, weights=weights[i % 3]) for i in range(12)]
    for name in NAMES:
        one = generate(tiny_lm, requests, config, mixing_guide(tiny_lm, routed, name))
        two = generate(tiny_lm, requests, config, mixing_guide(tiny_lm, apart, name))
        assert [(r.tokens, r.guide_forwards) for r in one] == [(r.tokens, r.guide_forwards) for r in two]
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            np.testing.assert_allclose(a.kl, b.kl, atol=1e-4)
    assert sum(r.kl for r in one) > 0.5  # the adapters do change the model
    assert torch.equal(tiny_lm.model(torch.tensor([[3, 4, 5]])).logits, before)


@pytest.mark.parametrize("text", ["kl", "alpha:1.5", "alpha:0", "alpha:x", "alpha", ""])
def test_unknown_divergences(text):
    with pytest.raises(UserError, match=f"unknown divergence '{text}'.*forward_kl"):
        Divergence.parse(text)
    with pytest.raises(UserError, match=r"alpha must be between 0 and 1, got 1\.5"):
        Divergence(alpha=1.5)


def test_bad_mixtures_are_named(tiny_lm, models):
    for words, says in (
        ({"strengths": {"z": 1.0}}, "'z', which has no model; known: x, y"),
        ({"strengths": {"x": 1.0}, "divergence": "jsd"}, "strengths need the divergence reverse_kl, not jsd"),
        ({"strengths": {"x": -1.0}}, "strength of 'x' is -1"),
    ):
        with pytest.raises(UserError, match=says):
            mixing_guide(tiny_lm, models, **words)
    for weights in ((0.5, 0.6), (-0.5, 1.5)):
        with pytest.raises(UserError, match=r"jsd mixes with weights that are at least 0 and sum to 1"):
            generate(
                tiny_lm, [Request(id="r", prompt=PROMPTS[0], seed=0, weights=weights)], Sampling(), mixing_guide(tiny_lm, models, "jsd")
            )
    only = mixing_guide(tiny_lm, {"x": models["x"]})
    with pytest.raises(UserError, match=r"2 weights for objectives x$"):
        generate(tiny_lm, [Request(id="r", prompt=PROMPTS[0], seed=0, weights=(0.0, 1.0))], Sampling(), only)
