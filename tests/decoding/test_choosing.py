"""Choosing while sampling: which candidate, by whose weights, at what cost, and that only the request decides."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from decoding.rows import PROMPTS, sibling
from decoding.test_rejection import CONFIG, DRAWS, WEIGHTS, Hashed, asked, matches, rewards, whole_law, worth
from equipoise.decoding.choosing import ChoosingSampler, WeightedRewards, candidate_requests, served
from equipoise.decoding.logit_mixing import mixing_guide
from equipoise.decoding.rejection import Segments
from equipoise.decoding.resampling import best_of_n_kl
from equipoise.decoding.value_guided import PolicySampler
from equipoise.types import Request, Rollout, UserError


def plain(lm, **changes):
    return PolicySampler(lm, replace(CONFIG, **changes))


def test_the_best_and_the_draw_by_enumeration(tiny_lm):
    """Best of 3: P(all at most s) - P(all below). Draw of 2: sum over pairs of their probabilities times the softmax's."""
    reference, _ = whole_law(tiny_lm, 2, Segments.blocks(4, 1), 4, 3)
    names, p = list(reference), np.array(list(reference.values()))
    score = np.array([worth(tiny_lm, y) for y in names])
    at_most, below = ((p * np.array([[op(b, a) for b in score] for a in score])).sum(axis=1) for op in (np.less_equal, np.less))
    tied = at_most - below
    best = dict(zip(names, (at_most**3 - below**3) * p / tied, strict=True))
    matches(best, [r.tokens for r in ChoosingSampler(inner=plain(tiny_lm), rewards=rewards(), n=3)(asked(DRAWS))])
    tilt = np.exp(score / 0.3)
    drawn = dict(zip(names, 2 * p * tilt * (p / (tilt[:, None] + tilt[None, :])).sum(axis=1), strict=True))
    assert sum(drawn.values()) == pytest.approx(1)
    matches(drawn, [r.tokens for r in ChoosingSampler(inner=plain(tiny_lm), rewards=rewards(), n=2, beta=0.3)(asked(DRAWS))])


def test_one_of_its_candidates_at_the_price_of_all(tiny_lm):
    requests = asked(6, (1.0, 0.0))
    for beta in (None, 0.3):
        own = rewards()
        found = ChoosingSampler(inner=plain(tiny_lm), rewards=own, n=4, beta=beta)(requests)
        for request, got in zip(requests, found, strict=True):
            candidates = plain(tiny_lm)(candidate_requests([replace(request, weights=None)], 4))
            [chosen] = [c for c in candidates if c.id == got.parent_id]
            scores = [Hashed("x").of(c.text) for c in candidates]
            if beta is None:
                assert Hashed("x").of(got.text) == max(scores)
                assert got.kl == pytest.approx(best_of_n_kl(4))
            else:
                weights = np.exp(np.array(scores) / beta) / np.exp(np.array(scores) / beta).sum()
                assert got.kl == pytest.approx(float(weights @ np.log(4 * weights)), abs=1e-6)
            assert (got.id, got.seed, got.weights, got.tokens) == (request.id, request.seed, request.weights, chosen.tokens)
            assert got.base_forwards == got.prompt_tokens + sum(c.base_forwards - c.prompt_tokens for c in candidates)
            assert 0 < got.prompt_tokens == candidates[0].prompt_tokens < candidates[0].base_forwards
            assert got.reward_calls == 4  # the objective without weight isn't asked
        assert [reward.asked for reward in own.rewards] == [24, 0]


def test_the_kl_of_a_choice_among_steered_candidates_by_enumeration():
    """E[kl] over all draws of two candidates is E_q[log pi/pi_ref] + the bound, at least KL(q || pi_ref), which it meets without ties."""
    ref, pi, score = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6]), [0.0, 1.0, 2.0]
    ratio = np.log(pi / ref)

    def candidate(y: int) -> Rollout:
        facts = {"text": str(y), "text_tokens": 1, "finish_reason": "stop", "weights": (1.0,), "seed": 0, "base_forwards": 5}
        logs = {"logprobs": (math.log(pi[y]),), "ref_logprobs": (math.log(ref[y]) - 0.1,), "kl_floor": 0.1}
        return Rollout(id=f"p/0#{y}", prompt_id="p", tokens=(y,), kl=float(pi @ ratio), prompt_tokens=4, **logs, **facts)

    expected, q = 0.0, np.zeros(3)
    for drawn in itertools.product(range(3), repeat=2):
        at = int(np.argmax([score[y] for y in drawn]))
        got = served(asked(1)[0], [candidate(y) for y in drawn], at, best_of_n_kl(2), 2)
        assert got.base_forwards == 4 + 1 + 1
        q[drawn[at]] += math.prod(pi[list(drawn)])
        expected += math.prod(pi[list(drawn)]) * got.kl
    assert expected == pytest.approx(q @ ratio + best_of_n_kl(2))
    assert q @ np.log(q / ref) <= expected
    below = float(pi @ ratio) + best_of_n_kl(2)  # what adding the bound to the candidates' KL would say
    assert below < q @ np.log(q / ref) - 0.1


def test_the_same_request_gets_the_same_choice(tiny_lm):
    requests = [Request(id=f"{p.id}/{i}", prompt=p, seed=i, weights=WEIGHTS) for i in range(5) for p in PROMPTS]
    alone = {r.id: ChoosingSampler(inner=plain(tiny_lm), rewards=rewards(), n=3, beta=0.5)([r])[0] for r in requests}
    for size, order in ((2, requests), (64, requests[::-1])):
        for got in ChoosingSampler(inner=plain(tiny_lm, batch_size=size), rewards=rewards(), n=3, beta=0.5)(order):
            assert (got.tokens, got.parent_id, got.reward_calls) == (alone[got.id].tokens, alone[got.id].parent_id, 6)


def test_weights_are_per_row_and_reach_what_steers_the_candidates(tiny_lm):
    inner = PolicySampler(tiny_lm, CONFIG, mixing_guide(tiny_lm, {"x": sibling(tiny_lm, 41), "y": sibling(tiny_lm, 42)}))
    both = ChoosingSampler(inner=inner, rewards=rewards(), n=3)
    mixed = [replace(r, weights=w) for r, w in zip(asked(12), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)] * 4, strict=True)]
    together = both(mixed)
    assert [r.tokens for r in together] == [both([r])[0].tokens for r in mixed]
    candidates = inner(candidate_requests(mixed[1:2], 3))
    assert together[1].text == max(candidates, key=lambda c: Hashed("y").of(c.text)).text
    assert together[1].guide_forwards == sum(c.guide_forwards for c in candidates) > 0
    over = ChoosingSampler(inner=both, rewards=rewards(), n=2)(mixed[:1])[0]  # a choice over a choice pays for both
    assert over.reward_calls == 2 * 3 + 2


def test_the_unscored_are_not_chosen(tiny_lm):
    class Silent(Hashed):
        def __call__(self, prompts, responses):
            return np.array([math.nan if "b" in text else self.of(text) for text in responses])

    some = WeightedRewards(rewards=(Silent("x"), Hashed("y")))
    for beta in (None, 0.5):
        found = ChoosingSampler(inner=plain(tiny_lm), rewards=some, n=16, beta=beta)(asked(30, (1.0, 0.0)))
        assert not any("b" in r.text for r in found)
    # An objective without weight may be unscored.
    assert any("b" in r.text for r in ChoosingSampler(inner=plain(tiny_lm), rewards=some, n=16)(asked(30, (0.0, 1.0))))


def test_seeds_spread_over_the_candidates(tiny_lm):
    """Equal scores: every candidate is drawn equally often."""

    class Flat(Hashed):
        def of(self, text):
            return 0.0

    found = ChoosingSampler(inner=plain(tiny_lm), rewards=WeightedRewards(rewards=(Flat("x"),)), n=4, beta=1.0)(asked(400, (1.0,)))
    counts = Counter(r.parent_id.rpartition("#")[2] for r in found)
    assert chisquare([counts[str(j)] for j in range(4)]).pvalue > 0.01


def test_bad_choices_are_named(tiny_lm):
    for words, says in (({"n": 0}, "n must be at least 1, got 0"), ({"beta": 0.0}, "beta must be positive, got 0")):
        with pytest.raises(UserError, match=says):
            ChoosingSampler(**({"inner": plain(tiny_lm), "rewards": rewards(), "n": 2} | words))
    with pytest.raises(UserError, match="choosing by rewards needs at least one"):
        WeightedRewards(rewards=())
    with pytest.raises(UserError, match=r"request '0' has weights None; a choice by x, y needs one each"):
        ChoosingSampler(inner=plain(tiny_lm), rewards=rewards(), n=2)(asked(1, None))
