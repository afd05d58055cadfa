"""Serving a palette over a real sampler: which candidate, what it costs, and that the law is the one that was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from conftest import prompt
from equipoise.decoding.choosing import candidate_requests
from equipoise.decoding.palette import PaletteSampler, choose, tilt
from equipoise.decoding.value_guided import PolicySampler
from equipoise.models.generation import Sampling
from equipoise.palette.banks import Bank
from equipoise.palette.confidence import Monitor
from equipoise.palette.quote import quote
from equipoise.rewards import load_rewards
from equipoise.rollouts import make_requests
from equipoise.types import UserError

NAN = float("nan")


@pytest.fixture(scope="module")
def policy(tiny_lm):
    return PolicySampler(tiny_lm, Sampling(max_new_tokens=6, top_k=0, whole_sentences=False), None)


@pytest.fixture(scope="module")
def rewards(tiny_lm):
    return load_rewards(["brief", "diverse"], tiny_lm)


def requests(count: int, samples: int = 1, seed: int = 0):
    return make_requests([prompt(f"p{i}", " ".join("abcd"[j] for j in range(1 + i % 4))) for i in range(count)], samples, seed)


def test_candidates_have_seeds_of_their_own():
    asked = requests(2)
    found = candidate_requests(asked, 3)
    assert [r.id for r in found] == ["p0/0#0", "p0/0#1", "p0/0#2", "p1/0#0", "p1/0#1", "p1/0#2"]
    assert len({r.seed for r in found} | {r.seed for r in asked}) == 8
    assert candidate_requests(asked[1:], 2)[0] == found[3]  # whatever else is asked
    with pytest.raises(UserError, match="n must be at least 1, got 0"):
        candidate_requests(asked, 0)


def test_tilt_by_hand():
    reward = np.array([[[1.0, 2.0], [3.0, NAN]]])
    np.testing.assert_array_equal(tilt(reward, np.array([0.5, 1.0])), [[2.5, NAN]])
    np.testing.assert_array_equal(tilt(reward, np.array([0.5, 0.0])), [[0.5, 1.5]])  # what has no price may be unscored


def test_the_draw_follows_the_multipliers():
    reward, v = np.array([[0.3, 1.0], [-1.0, 0.5], [2.0, -0.2]]), np.array([0.8, -0.4])
    drawn = choose(np.tile(reward, (20_000, 1, 1)), v, range(20_000))
    assert chisquare(np.bincount(drawn, minlength=3), 20_000 * softmax(reward @ v)).pvalue > 0.01


def test_what_is_served(policy, rewards):
    asked = requests(5)
    sampler = PaletteSampler(policy, rewards, np.array([4.0, 1.0]), 3)
    served = sampler(asked)
    candidates = policy(candidate_requests(asked, 3))
    for i, (request, rollout) in enumerate(zip(asked, served, strict=True)):
        own = candidates[3 * i : 3 * i + 3]
        chosen = next(c for c in own if c.id == rollout.parent_id)
        assert (rollout.id, rollout.seed, rollout.prompt_id) == (request.id, request.seed, request.prompt.id)
        assert (rollout.text, rollout.tokens, rollout.logprobs) == (chosen.text, chosen.tokens, chosen.logprobs)
        assert rollout.base_forwards == sum(c.base_forwards for c in own) - 2 * chosen.prompt_tokens
        assert -1e-6 <= rollout.kl <= math.log(3) + 1e-6
    alone = [sampler([request])[0] for request in asked]  # whatever the batch
    assert [(r.tokens, r.base_forwards) for r in alone] == [(r.tokens, r.base_forwards) for r in served]
    assert [r.kl for r in alone] == pytest.approx([r.kl for r in served], abs=1e-6)


def test_one_candidate_is_the_sampler_itself(policy, rewards):
    asked = requests(4)
    served = PaletteSampler(policy, rewards, np.array([9.0, 9.0]), 1)(asked)
    assert [r.tokens for r in served] == [r.tokens for r in policy(candidate_requests(asked, 1))]
    assert [r.kl for r in served] == [0.0] * 4


def test_a_solved_palette_meets_its_target_on_other_samples(policy, rewards):
    """Solved on 40 prompts x 6 samples, served with other seeds: the level within four standard errors of the target."""
    asked = requests(40, 6, seed=1)
    from equipoise.rewards.scoring import score

    prompts = {r.prompt.id: r.prompt for r in asked}
    bank = Bank.of(("brief", "diverse"), score(rewards, prompts, policy(asked)), [r.prompt.id for r in asked])
    found = quote(bank, "brief>=+0.5sd", n_boot=0)
    assert found.solution is not None
    served = PaletteSampler(policy, rewards[:1], found.solution.multiplier_K, 6)(requests(40, 4, seed=2))
    level = score(rewards[:1], prompts, served)[:, 0]
    assert level.mean() == pytest.approx(found.targets.floor_K[0], abs=4 * 2**0.5 * level.std() / math.sqrt(len(level)))
    assert level.mean() > bank.reward_NK[:, 0].mean() + 0.2 * bank.reward_NK[:, 0].std()


def test_the_loop_closes(policy, rewards):
    """Multipliers of 0 miss a floor that choosing can reach: the monitor notices and the later responses are better."""
    asked = requests(40, 6, seed=3)
    plain = np.array([len(r.text.split()) for r in policy(asked[:60])])
    floor = -np.log1p(plain).mean() + 0.5 * np.log1p(plain).std()
    monitor = Monitor(np.array([floor]), np.array([np.inf]), np.zeros(1), horizon=60)
    sampler = PaletteSampler(policy, rewards[:1], np.zeros(1), 4, monitor)
    served = [rollout for start in range(0, 240, 40) for rollout in sampler(asked[start : start + 40])]
    assert monitor.served == 240
    assert monitor.corrections
    assert monitor.multiplier_K[0] > 0
    first = monitor.corrections[0]["after"]
    words = np.array([-math.log1p(len(r.text.split())) for r in served])
    assert words[first:].mean() > words[:first].mean()
