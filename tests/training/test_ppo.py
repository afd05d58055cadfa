"""PPO's arithmetic by hand and against direct sums, its gradient against that of the objective itself, and where it converges."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.models.completions import Completions
from equipoise.training.completion_rows import Row, collator
from equipoise.training.ppo import (
    PPO,
    Config,
    adapted,
    clipped_objective,
    decoupled,
    gae,
    half_variance,
    leave_one_out,
    logprobs_and_values,
    standardised,
    token_rewards,
    values_of,
)
from equipoise.types import UserError
from training.every_sequence import PROMPTS, RESPONSES, build, distribution
from training.on_policy_runs import HALF, learner_of

NAN = math.nan


# --- advantages


def test_a_response_is_compared_with_the_others():
    """1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2; unscored ones have no say, and one alone has nothing to be compared with."""
    found = leave_one_out(np.array([[1.0, 2, 6], [NAN, 3, 5], [4, NAN, NAN]]))
    np.testing.assert_allclose(found, [[-3, -1.5, 4.5], [0, -2, 2], [0, 0, 0]])


def test_a_group_in_units_of_its_own_spread():
    """1, 2, 6: mean 3, sd sqrt((4 + 1 + 9)/2) = sqrt 7; 3, 5: mean 4, sd sqrt 2; equal ones are all 0."""
    found = standardised(np.array([[1.0, 2, 6], [NAN, 3, 5], [4, 4, 4], [7, NAN, NAN]]))
    seven, two = math.sqrt(7) + 1e-4, math.sqrt(2) + 1e-4
    np.testing.assert_allclose(found, [[-2 / seven, -1 / seven, 3 / seven], [0, -1 / two, 1 / two], [0] * 3, [0] * 3])


def test_gdpo_keeps_apart_what_one_sum_makes_equal():
    """Rewards (0, 1) and (1, 0) of two prompts' groups of two: by objective +-1/sqrt 2 each, so that w = (1/4, 3/4) gives
    -+1/(2 sqrt 2), and over the batch of four, with sd sqrt(4/3)/(2 sqrt 2), -+sqrt(3)/2."""
    z_BGK = np.array([[[0.0, 1], [1, 0]], [[0, 0.1], [0.1, 0]]])
    found = decoupled(z_BGK, np.array([[0.25, 0.75]] * 2))
    np.testing.assert_allclose(found, np.sqrt(0.75) * np.array([[1, -1], [1, -1]]), rtol=2e-3)
    found = decoupled(np.array([[[0.0, 1], [1, NAN], [2, 3]]]), np.array([[0.5, 0.5]]))
    assert np.isnan(found[0, 1])
    np.testing.assert_allclose(found[0, [0, 2]], [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-3)
    alone = decoupled(np.array([[[0.0, 1], [1, NAN], [2, 3]]]), np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(alone[0], [-1, 0, 1], rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(z_BGK=hnp.arrays(float, (3, 4, 2), elements=st.floats(-2, 2).map(lambda v: round(v, 1))), scale=st.sampled_from([10.0, 1000.0]))
def test_gdpo_does_not_know_an_objectives_scale_and_one_sum_does(z_BGK, scale):
    weights_BK = np.array([[0.5, 0.5]] * 3)
    larger_BGK = z_BGK * np.array([1.0, scale])
    each = [decoupled(z, weights_BK) for z in (z_BGK, larger_BGK)]
    np.testing.assert_allclose(*each, atol=0.02)
    if z_BGK[..., 0].std(axis=1).min() > 0.3 and z_BGK[..., 1].std(axis=1).min() > 0.3:
        mostly = standardised(larger_BGK.mean(axis=2)) - standardised(z_BGK[..., 1])
        assert np.abs(mostly).max() < 2.5 / scale * 10, "the larger objective is all that is left"


def test_rewards_of_tokens_by_hand():
    found = token_rewards(np.array([2.0, -1.0]), np.array([[0.5, 1.0, 9.0], [0.1, 0.2, 0.3]]), np.array([[1.0, 1, 0], [1, 1, 1]]), 0.5)
    np.testing.assert_allclose(found, [[-0.25, 1.5, 0], [-0.05, -0.1, -1.15]])


def test_gae_by_hand():
    """gamma 0.5, lambda 0.5: delta = 1 + 0.5 2 - 1, 2 + 0 - 2 of the first; A_0 = 1 + 0.25 0. The second ends after one token."""
    found = gae(np.array([[1.0, 2.0], [3.0, 9.0]]), np.array([[1.0, 2.0], [1.0, 9.0]]), np.array([[1.0, 1], [1, 0]]), 0.5, 0.5)
    np.testing.assert_allclose(found, [[1, 0], [2, 0]])


@settings(max_examples=60, deadline=None)
@given(
    reward_NT=hnp.arrays(float, (2, 5), elements=st.floats(-3, 3)),
    value_NT=hnp.arrays(float, (2, 5), elements=st.floats(-3, 3)),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_gae_is_the_double_sum_and_has_its_limits(reward_NT, value_NT, lengths, gamma, lam):
    real_NT = (np.arange(5) < np.array(lengths)[:, None]).astype(float)
    found = gae(reward_NT, value_NT, real_NT, gamma, lam)
    for n, length in enumerate(lengths):
        r, v = reward_NT[n, :length], [*value_NT[n, :length], 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length)) for t in range(length)]
        np.testing.assert_allclose(found[n, :length], expected, atol=1e-9)
        assert not found[n, length:].any()
        if lam == 1:  # the return less the value
            returns = [sum(gamma ** (s - t) * r[s] for s in range(t, length)) for t in range(length)]
            np.testing.assert_allclose(found[n, :length] + value_NT[n, :length], returns, atol=1e-9)


def test_the_adaptive_beta_by_hand():
    """KL 6 at a target of 3 is twice it: cut to a fifth, over 64 of 10000 responses; KL 2.7 is a tenth below."""
    assert adapted(0.2, 6.0, 3.0, 10000, 64) == pytest.approx(0.2 * (1 + 0.2 * 0.0064))
    assert adapted(0.2, 2.7, 3.0, 1000, 64) == pytest.approx(0.2 * (1 - 0.1 * 0.064))
    assert adapted(0.2, 3.0, 3.0, 1000, 64) == 0.2
    method = PPO(Config(kl_target=3.0, kl_horizon=1000), HALF)
    assert method.settings([]) == {"beta": HALF.beta}
    count = HALF.prompts * HALF.samples
    found = method.settings([{"beta": 0.1, "kl_exact": 9.0}])["beta"]
    assert found == pytest.approx(0.1 * (1 + 0.2 * count / 1000))
    assert PPO(Config(), HALF).settings([{"beta": 0.1, "kl_exact": 9.0}]) == {"beta": HALF.beta}


def test_the_clipped_objective_and_its_slope():
    """Ratio 1.5, 0.5 and 1 with A = 2 and -2 at eps 0.2: what has moved too far the right way earns no more and has no slope."""
    logratio = torch.tensor([[[1.5, 1.5, 0.5, 0.5, 1.0, 1.0]]]).log().requires_grad_(True)
    advantage = torch.tensor([[[2.0, -2, 2, -2, 2, -2]]])
    found = clipped_objective(logratio, advantage, 0.2)
    torch.testing.assert_close(found.detach(), torch.tensor([[[2.4, -3.0, 1.0, -1.6, 2.0, -2.0]]]))
    found.sum().backward()
    torch.testing.assert_close(logratio.grad, torch.tensor([[[0.0, -3.0, 1.0, 0.0, 2.0, -2.0]]]))


# --- the gradient


def every_response(scalar_PS: np.ndarray, weight_PS: np.ndarray) -> list[Row]:
    """All responses of both prompts, each with its share of the expectation in its advantage."""
    model, rows = build(), []
    for p, prompt in enumerate(PROMPTS):
        law_S = distribution(model, prompt)
        share_S = len(RESPONSES) * law_S * scalar_PS[p] * weight_PS[p]
        logprob = [token_logprobs(model, prompt, s) for s in RESPONSES]
        told = {"drawn": logprob, "reference": logprob, "advantage": [np.full(len(s), a) for s, a in zip(RESPONSES, share_S, strict=True)]}
        numbers = {"weights": [1.0], "scored": [1.0] * len(RESPONSES)}
        rows.append(Row(Completions(prompt, tuple(RESPONSES)), numbers, told))
    return rows


def token_logprobs(model, prompt, response) -> np.ndarray:
    with torch.inference_mode():
        law = torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0].double(), -1)
    return np.array([law[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)])


def exact_gradient(scalar_PS: np.ndarray) -> dict[str, torch.Tensor]:
    """Of mean_p sum_y pi(y) s(y), all responses listed."""
    model = build().requires_grad_(True)
    total = 0.0
    for p, prompt in enumerate(PROMPTS):
        for s, response in enumerate(RESPONSES):
            law = torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0], -1)
            sum_logprob = sum(law[len(prompt) - 1 + t, token] for t, token in enumerate(response))
            total = total + sum_logprob.exp() * scalar_PS[p, s] / len(PROMPTS)
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shared", [True, False])
def test_where_it_was_drawn_the_losses_gradient_is_that_of_the_expected_reward(shared):
    scalar_PS = np.random.default_rng(1).normal(size=(len(PROMPTS), len(RESPONSES)))
    rows = every_response(scalar_PS, np.ones_like(scalar_PS))
    model = build().requires_grad_(True)
    found = PPO(Config(kl="reward"), HALF).loss({"beta": 0.5})(model, collator(shared=shared)(rows))
    found.loss.backward()
    assert found.logged["clip_fraction"] == 0
    assert float(found.logged["kl_k3_to_drawn"]) == pytest.approx(0, abs=1e-5)
    for name, gradient in exact_gradient(scalar_PS).items():
        torch.testing.assert_close(-dict(model.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5)


def test_an_unscored_response_has_no_gradient():
    scalar_PS = np.random.default_rng(1).normal(size=(len(PROMPTS), len(RESPONSES)))
    scored = np.ones_like(scalar_PS)
    scored[1, 3] = 0
    rows = [
        replace(r, numbers={**r.numbers, "scored": told.tolist()})
        for r, told in zip(every_response(scalar_PS, np.ones_like(scored)), scored, strict=True)
    ]
    without = every_response(scalar_PS, scored)
    gradients = []
    for each in (rows, without):
        model = build().requires_grad_(True)
        PPO(Config(kl="loss"), HALF).loss({"beta": 0.0})(model, collator(shared=True)(each)).loss.backward()
        gradients.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_kl_in_the_loss_is_half_the_variance_of_the_log_ratio():
    """Log-ratios 0.1 a token: sums of 0.1 and 0.2 over a prompt's responses, at beta 0.6."""
    rows = every_response(np.zeros((2, len(RESPONSES))), np.ones((2, len(RESPONSES))))
    rows = [replace(r, per_token={**r.per_token, "reference": [x - 0.1 for x in r.per_token["reference"]]}) for r in rows]
    found = PPO(Config(kl="loss"), HALF).loss({"beta": 0.6})(build(), collator(shared=True)(rows)).loss
    assert found.item() == pytest.approx(0.3 * np.var([0.1 * len(s) for s in RESPONSES], ddof=1), rel=1e-3)
    one = half_variance(torch.tensor([[1.0, 4.0, 9.0], [2.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert one.tolist() == [2.25, 0.0]


def test_its_gradient_is_that_of_the_kl():
    """The mean over 4000 draws of pairs of responses, against the KL of all responses listed, in one direction of the logits."""
    rng, reference = np.random.default_rng(0), torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    logits = torch.tensor([0.5, -0.3, 0.2, 0.0], requires_grad=True)
    law = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((law.exp() * (law - reference)).sum(), logits, retain_graph=True)
    drawn = torch.tensor(rng.choice(4, size=(4000, 2), p=law.exp().detach().double().numpy() / law.exp().detach().double().sum().item()))
    (found,) = torch.autograd.grad(half_variance((law - reference)[drawn], torch.ones(4000, 2)).mean(), logits)
    torch.testing.assert_close(found, exact, atol=0.012, rtol=0)
    assert exact.abs().max() > 0.1


# --- values


def test_values_are_a_linear_function_of_the_state_before_each_token(tmp_path):
    learner = PPO(Config(advantage="gae"), HALF).prepared(learner_of("nothing"))
    model = learner.trained
    torch.nn.init.normal_(model.value.weight)
    torch.nn.init.constant_(model.value.bias, 0.3)
    rows = [Row(Completions((3, 4), ((4, 2), (3,)))), Row(Completions((4, 4, 3), ((3, 3), (4, 2))))]
    states = {}
    for row in rows:
        for y in row.completions.responses:
            ids = torch.tensor([[*row.completions.prompt, *y]])
            with torch.no_grad():
                states[row.completions.prompt, y] = learner.policy.model(ids, output_hidden_states=True).hidden_states[-1][0]
    for shared in (True, False):
        found = values_of(model, rows, shared=shared)
        for row, own in zip(rows, found, strict=True):
            for y, value_T in zip(row.completions.responses, own, strict=True):
                before = states[row.completions.prompt, y][len(row.completions.prompt) - 1 : -1]
                np.testing.assert_allclose(value_T, (before @ model.value.weight[0] + 0.3).detach().numpy(), rtol=1e-4, atol=1e-5)
    batch = collator(shared=True)(rows)
    logprob, value = logprobs_and_values(model, batch)
    assert logprob.shape == value.shape == (2, 2, 2)
    assert not value[0, 1, 1], "padding"


# --- settings


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"advantage": "best"}, "advantage is one of rloo, grpo, gdpo, gae"),
        ({"kl": "k3"}, "kl reward or loss, got 'rloo' and 'k3'"),
        ({"advantage": "gae", "kl": "loss"}, "gae takes the KL as a reward of every token"),
        ({"kl_target": -1.0}, "kl_target and value_coefficient must not be negative"),
        ({"clip": 0.0}, "clip and value_clip must be positive"),
        ({"lam": 1.5}, "gamma lies above 0 and lam from 0"),
    ],
)
def test_settings_are_checked(unchecked, bad, says):
    with pytest.raises(UserError, match=says):
        Config(**bad)
