"""Beam search: the true argmax where the beam holds the tree, a search by hand where it doesn't, greedy with one beam, counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from decoding.rows import PROMPTS, Plain, count_tokens, leaves, sibling
from decoding.test_scorer_guided import scorers  # noqa: F401 a fixture
from decoding.test_value_guided import guide_of, heads  # noqa: F401 a fixture
from decoding.test_value_models import value_model
from equipoise.decoding.beam import Beams, BeamSampler
from equipoise.decoding.logit_mixing import mixing_guide
from equipoise.decoding.scorer_guided import ScorerGuide
from equipoise.decoding.value_guided import ValueModelGuide
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.types import Request, UserError

CONFIG = Sampling(max_new_tokens=4, top_k=3, batch_size=7, whole_sentences=False)
WEIGHTS = ((0.3, 0.7), (1.0, 0.0))
POWERS = (0.0, 1.0)


@pytest.fixture(scope="module")
def models(tiny_lm):
    return {"x": sibling(tiny_lm, 41), "y": sibling(tiny_lm, 42)}


def mixed(plain, models, weights):
    """log of prod_i pi_i^w_i, from plain forwards."""

    def law(head, prefixes, allowed):
        return sum(w * plain.along(m, head, prefixes)[1] for w, m in zip(weights, models.values(), strict=True))

    return law


def requests_for(weights=WEIGHTS) -> list[Request]:
    return [Request(id=f"{n}/{i}", prompt=p, seed=i, weights=w) for n, p in enumerate(PROMPTS) for i, w in enumerate(weights)]


@pytest.mark.parametrize("power", POWERS)
def test_a_beam_for_the_whole_tree_finds_the_argmax(tiny_lm, models, power):
    """Three prompts and two weight vectors in batches together; the tree has at most 3^4 leaves."""
    plain = Plain()
    found = BeamSampler(lm=tiny_lm, sampling=CONFIG, beams=Beams(beams=81, length_power=power), guide=mixing_guide(tiny_lm, models))(
        requests_for()
    )
    lengths = set()
    for request, got in zip(requests_for(), found, strict=True):
        tree = leaves(plain, tiny_lm, PROMPTS.index(request.prompt), request.weights, CONFIG, mixed(plain, models, request.weights))
        best = max(tree, key=lambda leaf: leaf.logprob / len(leaf.tokens) ** power)
        assert got.tokens == best.tokens
        assert (got.id, got.weights, got.seed) == (request.id, request.weights, request.seed)
        assert sum(got.logprobs) == pytest.approx(best.logprob, abs=2e-4)
        assert sum(got.ref_logprobs) == pytest.approx(best.ref_logprob, abs=2e-4)
        # All mass on one response: KL(point || pi_ref) = -log pi_ref(y), of which truncation is charged apart.
        assert got.kl + got.kl_floor == pytest.approx(-best.ref_logprob, abs=2e-4)
        assert got.kl_floor == pytest.approx(best.kl_floor, abs=2e-4)
        lengths.add(len(best.tokens))
    greedy = generate(tiny_lm, requests_for(), replace(CONFIG, greedy=True), mixing_guide(tiny_lm, models))
    assert len(lengths) > 1 or power == 0
    assert [r.tokens for r in greedy] != [r.tokens for r in found]  # one step at a time doesn't find it


@pytest.mark.parametrize("power", POWERS)
def test_given_tokens_are_continued_by_the_best_that_can_follow(tiny_lm, power):
    """Of the whole tree's leaves those behind the given token, up to the request's own limit, scored from there on."""
    plain, wanted, asked, config = Plain(), [], [], replace(CONFIG, max_new_tokens=3)
    for which, prompt in enumerate(PROMPTS):
        tree = leaves(plain, tiny_lm, which, None, config, lambda head, prefixes, allowed: plain.along(tiny_lm, head, prefixes)[1])
        for first in {leaf.tokens[0] for leaf in tree}:
            behind = [leaf for leaf in tree if leaf.tokens[0] == first]
            past = np.logaddexp.reduce([leaf.logprob for leaf in behind])
            best = max(behind, key=lambda leaf, past=past: (leaf.logprob - past) / (len(leaf.tokens) - 1) ** power)
            wanted.append((best.tokens[1:], best.logprob - past))
            asked.append(Request(id=f"{which}/{first}", prompt=prompt, seed=0, given=(first,), most_tokens=2))
    found = BeamSampler(lm=tiny_lm, sampling=CONFIG, beams=Beams(beams=81, length_power=power))(asked)
    assert len(found) == 9
    assert [got.tokens for got in found] == [tokens for tokens, _ in wanted]
    np.testing.assert_allclose([sum(got.logprobs) for got in found], [logprob for _, logprob in wanted], atol=2e-4)


def by_hand(plain, lm, which, weights, beams, power, fused, config=CONFIG) -> tuple[int, ...]:
    """The search as it is described, over the enumerated tree, without any batch or early end."""
    tree = leaves(plain, lm, which, weights, config, fused)
    prefixes: dict[tuple[int, ...], float] = {}
    ended = {leaf.tokens for leaf in tree}
    for leaf in tree:
        for t in range(1, len(leaf.tokens) + 1):
            prefixes[leaf.tokens[:t]] = np.logaddexp(prefixes.get(leaf.tokens[:t], -np.inf), leaf.logprob)
    going, pool = [()], []
    for depth in range(1, config.max_new_tokens + 1):
        ranked = sorted((y for y in prefixes if len(y) == depth and y[:-1] in going), key=lambda y: -prefixes[y])
        pool += [y for y in ranked[:beams] if y in ended]
        going = [y for y in ranked if y not in ended][:beams]
    return max(pool, key=lambda y: prefixes[y] / len(y) ** power)


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("power", POWERS)
def test_narrow_beams_by_hand(tiny_lm, models, beams, power):
    plain, guide, config = Plain(), mixing_guide(tiny_lm, models), replace(CONFIG, top_k=4)
    found = BeamSampler(lm=tiny_lm, sampling=config, beams=Beams(beams=beams, length_power=power), guide=guide)(requests_for())
    for request, got in zip(requests_for(), found, strict=True):
        fused = mixed(plain, models, request.weights)
        assert got.tokens == by_hand(plain, tiny_lm, PROMPTS.index(request.prompt), request.weights, beams, power, fused, config)


def test_one_beam_is_greedy(tiny_lm, models, heads):  # noqa: F811
    config = Sampling(max_new_tokens=9, top_k=4, batch_size=3)
    guides = (None, mixing_guide(tiny_lm, models, "jsd"), *(guide_of(tiny_lm, heads, form, config) for form in ("single-pass", "prefix")))
    for guide in guides:
        requests = requests_for(WEIGHTS if guide else (None,))
        got = BeamSampler(lm=tiny_lm, sampling=config, beams=Beams(beams=1), guide=guide)(requests)
        want = generate(tiny_lm, requests, replace(config, greedy=True), guide)
        assert [r.tokens for r in got] == [r.tokens for r in want]
        np.testing.assert_allclose([(r.kl, r.kl_floor) for r in got], [(r.kl, r.kl_floor) for r in want], atol=1e-4)
        assert [(r.base_forwards, r.guide_forwards) for r in got] == [(r.base_forwards, r.guide_forwards) for r in want]


@pytest.mark.parametrize("by", ["scorers", "value models"])
def test_ranking_by_the_values_of_prefixes(tiny_lm, scorers, by):  # noqa: F811
    """With the whole tree: argmax of log pi_ref(y) + (1/beta) sum_k w_k v_k(y), v read once at the end of each response."""
    plain, beta = Plain(), 0.4
    values = [value_model(tiny_lm, 61, ("x",)), value_model(tiny_lm, 62, ("y",))]
    guide = ScorerGuide(tiny_lm, scorers, beta) if by == "scorers" else ValueModelGuide(tiny_lm, values, beta=beta)
    found = BeamSampler(lm=tiny_lm, sampling=CONFIG, beams=Beams(beams=81, score="value"), guide=guide)(requests_for())
    differs = 0
    for request, got in zip(requests_for(), found, strict=True):
        which = PROMPTS.index(request.prompt)
        head = prompt_ids(tiny_lm.tokenizer, request.prompt)
        tree = leaves(plain, tiny_lm, which, None, CONFIG, lambda head, prefixes, allowed: plain.along(tiny_lm, head, prefixes)[1])

        def worth(leaf, head=head, weights=request.weights):
            ids = torch.tensor([[*head, *leaf.tokens]])
            with torch.no_grad():
                if by == "scorers":
                    read = [float(s.model.score(s.model.model(input_ids=ids).last_hidden_state[0, -1])) for s in scorers.values()]
                else:
                    states = [v.lm.model(input_ids=ids).last_hidden_state[0, -1].numpy() for v in values]
                    read = [float(h @ v.heads.tensors["prefix_KPI"][0, 0]) for h, v in zip(states, values, strict=True)]
            return leaf.logprob + np.dot(weights, read) / beta

        best = max(tree, key=worth)
        assert got.tokens == best.tokens
        differs += best.tokens != max(tree, key=lambda leaf: leaf.logprob).tokens
    assert differs


@pytest.mark.parametrize("way", ["plain", "prefix", "jsd", "scorers"])
def test_a_response_depends_on_nothing_but_its_request(tiny_lm, models, heads, scorers, way):  # noqa: F811
    config = Sampling(max_new_tokens=8, top_k=4, batch_size=9)
    guide = {
        "plain": None,
        "prefix": guide_of(tiny_lm, heads, "prefix", config),
        "jsd": mixing_guide(tiny_lm, models, "jsd"),
        "scorers": ScorerGuide(tiny_lm, scorers, 0.8),
    }[way]
    requests = requests_for((*WEIGHTS, (0.0, 1.0)) if guide else (None,))

    def search(rows, size):
        return BeamSampler(lm=tiny_lm, sampling=replace(config, batch_size=size), beams=Beams(beams=3), guide=guide)(rows)

    alone = [search([r], 1)[0] for r in requests]
    for size, order in ((7, requests), (64, requests[::-1])):
        by_id = {r.id: r for r in search(order, size)}
        for want in alone:
            got = by_id[want.id]
            assert (got.tokens, got.base_forwards, got.guide_forwards) == (want.tokens, want.base_forwards, want.guide_forwards)
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_every_token_that_was_run_is_counted(tiny_lm, models, scorers, monkeypatch):  # noqa: F811
    run = count_tokens(monkeypatch)
    for guide in (mixing_guide(tiny_lm, models), ScorerGuide(tiny_lm, scorers, 0.8)):
        for request in requests_for():
            run.clear()
            [got] = BeamSampler(lm=tiny_lm, sampling=replace(CONFIG, max_new_tokens=6), beams=Beams(beams=3), guide=guide)([request])
            assert got.base_forwards == run.pop("tiny")
            assert got.guide_forwards == sum(run.values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"score": "reward"}, "ranked by logprob or value, not by 'reward'"),
        ({"length_power": -1.0}, "length_power must be at least 0, got -1"),
    ],
)
def test_impossible_beams_are_named(settings, says):
    with pytest.raises(UserError, match=says):
        Beams(**settings)


def test_what_cannot_be_searched_is_named(tiny_lm, models):
    with pytest.raises(UserError, match="greedy leaves a law of one token"):
        BeamSampler(lm=tiny_lm, sampling=replace(CONFIG, greedy=True), beams=Beams())
    with pytest.raises(UserError, match="ranking beams by value needs values of prefixes"):
        BeamSampler(lm=tiny_lm, sampling=CONFIG, beams=Beams(score="value"), guide=mixing_guide(tiny_lm, models))
    skipping = ValueModelGuide(tiny_lm, [value_model(tiny_lm, 61, ("x",))], beta=1.0, skip_above=0.9)
    with pytest.raises(UserError, match="value models never skipped"):
        BeamSampler(lm=tiny_lm, sampling=CONFIG, beams=Beams(score="value"), guide=skipping)
