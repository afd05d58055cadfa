"""Segments that are judged before the rest is sampled: the law by enumeration, its price, what was run, rows, bad input."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import chisquare
from transformers import MistralConfig

from conftest import build_llama
from decoding.rows import EOS, PROMPTS, count_tokens, plain_forward, sibling
from decoding.test_scorer_guided import scorers  # noqa: F401 a fixture
from decoding.test_value_guided import guide_of, heads  # noqa: F401 a fixture
from decoding.test_value_models import value_model
from equipoise.decoding.choosing import WeightedRewards
from equipoise.decoding.logit_mixing import mixing_guide
from equipoise.decoding.rejection import Segments, SegmentSampler
from equipoise.decoding.resampling import best_of_n_kl
from equipoise.decoding.scorer_guided import ScorerGuide
from equipoise.decoding.value_guided import ValueModelGuide
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel
from equipoise.objectives import Normaliser
from equipoise.types import Request, UserError

INF = math.inf
CONFIG = Sampling(max_new_tokens=4, top_k=3, batch_size=200, whole_sentences=False)
WEIGHTS = (0.75, 0.25)
DRAWS = 1000


class Hashed:
    """A reward that is some fixed number in [-1, 1] for each text."""

    def __init__(self, name: str):
        self.name, self.asked = name, 0

    def of(self, text: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{self.name}:{text}".encode()).digest()[:4], "little") / 2**31 - 1

    def __call__(self, prompts, responses):
        self.asked += len(responses)
        return np.array([self.of(text) for text in responses])


def rewards() -> WeightedRewards:
    return WeightedRewards(rewards=(Hashed("x"), Hashed("y")))


def said(lm, tokens) -> str:
    return lm.tokenizer.decode([t for t in tokens if t != EOS], skip_special_tokens=True).strip()


def worth(lm, tokens) -> float:
    return sum(w * Hashed(name).of(said(lm, tokens)) for w, name in zip(WEIGHTS, "xy", strict=True))


def asked(count: int, weights=WEIGHTS, which: int = 2) -> list[Request]:
    return [Request(id=str(i), prompt=PROMPTS[which], seed=i, weights=weights) for i in range(count)]


def next_law(lm, head, prefix, cap: int, top_k: int) -> tuple[dict[int, float], float]:
    """(token -> probability among the reference's top k, entropy), from an uncached forward."""
    log_V = log_softmax(plain_forward(lm, [[*head, *prefix]])[0][0])
    if not prefix:
        log_V[EOS] = -np.inf
    kept = np.argsort(-log_V)[:top_k]
    p = np.exp(log_softmax(log_V[kept]))
    return dict(zip(kept.tolist(), p.tolist(), strict=True)), float(-(p * np.log(p)).sum())


def proposals(lm, head, prefix, segments: Segments, cap: int, top_k: int) -> dict[tuple[int, ...], float]:
    """Every segment after a prefix, with its probability; it ends by its length, its entropy or with the response."""
    done, level = {}, {(): 1.0}
    while level:
        following = {}
        for segment, mass in level.items():
            law, entropy = next_law(lm, head, (*prefix, *segment), cap, top_k)
            if len(segment) >= segments.shortest and entropy >= segments.entropy:
                done[segment] = mass
                continue
            for token, probability in law.items():
                longer = (*segment, token)
                ends = token == EOS or len(prefix) + len(longer) == cap or len(longer) == segments.longest
                (done if ends else following)[longer] = mass * probability
        level = following
    return done


def kept_law(lm, head, prefix, segments: Segments, cap: int, top_k: int, empty: float = 0.0) -> tuple[dict[tuple[int, ...], float], float]:
    """(law of the segment that stays, its KL from the proposals)."""
    q = proposals(lm, head, prefix, segments, cap, top_k)
    names, mass = list(q), np.array(list(q.values()))
    score = np.array([worth(lm, (*prefix, *g)) for g in names])
    t = np.array([len(prefix) + len(g) for g in names]) / cap
    begin = (1 - segments.initial) * empty + segments.initial * segments.threshold if segments.initial < 1 else segments.threshold
    tau = begin + (segments.threshold - begin) * t if segments.initial < 1 else np.full(len(names), segments.threshold)
    a = np.exp(np.minimum(0, (score - tau) / segments.beta))
    z = float(mass @ a)
    law = mass * a / z * (1 - (1 - z) ** segments.tries) if z > 0 else np.zeros(len(names))
    if segments.tries < 1000 and z < 1:
        refused = mass * (1 - a) / (1 - z)
        # The best of n refused ones: P(all at most s) - P(all below s), shared by those of that score.
        for value in np.unique(score):
            at, below = refused[score == value].sum(), refused[score < value].sum()
            best = (at + below) ** segments.tries - below**segments.tries
            if at > 0:
                law[score == value] += (1 - z) ** segments.tries * best * refused[score == value] / at
    assert law.sum() == pytest.approx(1)
    nonzero = law > 0
    return dict(zip(names, law.tolist(), strict=True)), float((law[nonzero] * np.log(law[nonzero] / mass[nonzero])).sum())


def whole_law(lm, which: int, segments: Segments, cap: int, top_k: int, empty: float = 0.0) -> tuple[dict[tuple[int, ...], float], float]:
    """(law of the response, KL that the choices cost)."""
    head, done, cost, level = prompt_ids(lm.tokenizer, PROMPTS[which]), {}, 0.0, {(): 1.0}
    while level:
        following: dict[tuple[int, ...], float] = {}
        for prefix, reached in level.items():
            law, kl = kept_law(lm, head, prefix, segments, cap, top_k, empty)
            cost += reached * kl
            for segment, probability in law.items():
                y = (*prefix, *segment)
                (done if y[-1] == EOS or len(y) == cap else following)[y] = reached * probability
        level = following
    return done, cost


def matches(law: dict, tokens: list) -> None:
    """The counts fit the law."""
    counts, total = Counter(tokens), len(tokens)
    assert set(counts) <= {y for y, p in law.items() if p > 0}
    common = [y for y, p in law.items() if p * total >= 5]
    observed = np.array([counts[y] for y in common] + [total - sum(counts[y] for y in common)], dtype=float)
    expected = np.array([law[y] * total for y in common] + [total * (1 - sum(law[y] for y in common))])
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


CASES = {
    "pairs of tokens": Segments(threshold=0.6, beta=0.3, entropy=INF, shortest=2, longest=2, tries=10**6),
    "by entropy": Segments(threshold=0.4, beta=0.4, entropy=0.8, shortest=1, longest=3, tries=10**6),
    "rising threshold": Segments(threshold=0.8, beta=0.4, initial=0.5, entropy=INF, shortest=2, longest=2, tries=10**6),
    "three tries": Segments(threshold=0.9, beta=0.2, entropy=INF, shortest=2, longest=2, tries=3),
    "best of four blocks": Segments.blocks(2, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_law_by_enumeration(tiny_lm, name):
    segments = CASES[name]
    law, cost = whole_law(tiny_lm, 2, segments, CONFIG.max_new_tokens, CONFIG.top_k, worth(tiny_lm, ()))
    plain, _ = whole_law(tiny_lm, 2, replace(segments, threshold=-50.0, initial=1.0), CONFIG.max_new_tokens, CONFIG.top_k)
    assert sum(abs(law[y] - plain[y]) for y in law) > 0.4  # the choice does move it
    found = SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=segments, rewards=rewards())(asked(DRAWS))
    matches(law, [r.tokens for r in found])
    price = np.array([r.kl for r in found])
    if segments.tries > 1000:
        assert abs(price.mean() - cost) < 4 * price.std() / math.sqrt(DRAWS)
    elif math.isinf(segments.threshold):
        # Draws of few outcomes coincide, so the bound is above the truth.
        assert cost < price.mean() <= 2 * best_of_n_kl(4) + 1e-9


def test_the_threshold_by_hand():
    """tau_0 = (0.2 + 0.8) / 2 = 0.5 rises to 0.8 at the cap of ten tokens: 0.62 at four; (0.42 - 0.62) / 0.4 = -0.5."""
    rising = Segments(threshold=0.8, beta=0.4, initial=0.5)
    assert rising.log_acceptance(0.42, 4, 10, 0.2) == pytest.approx(-0.5)
    assert rising.log_acceptance(0.7, 10, 10, 0.2) == pytest.approx(-0.25)
    assert rising.log_acceptance(0.63, 4, 10, 0.2) == 0.0
    assert replace(rising, initial=1.0).log_acceptance(0.6, 4, 10, 0.2) == pytest.approx(-0.5)
    assert rising.log_acceptance(math.nan, 4, 10, 0.2) == -INF


def test_the_threshold_is_whole_at_the_requests_own_cap(tiny_lm):
    """One try of all that a request may say: what stays says log A in its price, with tau in full."""
    rising = Segments(threshold=0.8, beta=1.0, initial=0.5, entropy=INF, shortest=2, longest=2, tries=1)
    short = [replace(r, most_tokens=2) for r in asked(40)]
    stayed = 0
    for got in SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=rising, rewards=rewards())(short):
        assert len(got.tokens) == 2  # none of these ends the turn
        log_a = min(0.0, worth(tiny_lm, got.tokens) - 0.8)
        stayed += got.kl < 0
        assert got.kl == pytest.approx(log_a) or got.kl == 0
    assert stayed > 2


@pytest.mark.parametrize("shortest", [1, 2, 3])
def test_where_segments_end(tiny_lm, shortest):
    """Everything stays, so that rewards are asked once for each segment: from `shortest` tokens on by entropy, at four in any case."""
    segments = Segments(threshold=-50.0, entropy=0.9, shortest=shortest, longest=4, tries=1)
    config, ends = replace(CONFIG, max_new_tokens=9), Counter[int]()
    head = prompt_ids(tiny_lm.tokenizer, PROMPTS[2])
    for got in SegmentSampler(lm=tiny_lm, sampling=config, segments=segments, rewards=rewards())(asked(12)):
        begin = judged = 0
        for at in range(1, len(got.tokens) + 1):
            _, entropy = next_law(tiny_lm, head, got.tokens[:at], 9, config.top_k)
            if at == len(got.tokens) or at - begin == 4 or (at - begin >= shortest and entropy >= 0.9):
                ends[at - begin] += 1
                begin, judged = at, judged + 1
        assert got.reward_calls == 2 * judged
    assert ends[4] > 0
    assert sum(ends[n] for n in range(shortest, 4)) > 3


def test_one_segment_under_a_threshold_that_nothing_passes_is_the_closed_form(tiny_lm):
    """pi_ref exp(r / beta) / Z, computed from the reference's law and the rewards alone."""
    whole = Segments(threshold=1.0, beta=0.5, entropy=INF, shortest=4, longest=4, tries=10**6)
    reference, _ = whole_law(tiny_lm, 2, replace(whole, threshold=-50.0), 4, 3)
    tilted = {y: p * math.exp(worth(tiny_lm, y) / 0.5) for y, p in reference.items()}
    closed = {y: p / sum(tilted.values()) for y, p in tilted.items()}
    matches(closed, [r.tokens for r in SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=whole, rewards=rewards())(asked(DRAWS))])


def test_one_block_is_best_of_n(tiny_lm):
    reference, _ = whole_law(tiny_lm, 2, Segments.blocks(4, 1), 4, 3)
    scores = {y: worth(tiny_lm, y) for y in reference}
    best = {}
    for y, p in reference.items():
        below = sum(q for z, q in reference.items() if scores[z] < scores[y])
        tied = sum(q for z, q in reference.items() if scores[z] == scores[y])
        best[y] = ((below + tied) ** 5 - below**5) * p / tied
    found = SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=Segments.blocks(4, 5), rewards=rewards())(asked(DRAWS))
    matches(best, [r.tokens for r in found])
    assert [r.kl for r in found] == pytest.approx([best_of_n_kl(5)] * len(found), abs=1e-6)
    assert {r.reward_calls for r in found} == {10}


@pytest.mark.parametrize("way", ["plain", "prefix", "jsd", "scorers", "value models"])
def test_going_back_leaves_no_trace(tiny_lm, heads, scorers, way):  # noqa: F811
    """What is said of the response's tokens is what the proposals' law says of them, whatever was refused in between."""
    config = replace(CONFIG, batch_size=7, max_new_tokens=7, top_k=4)
    models = {"x": sibling(tiny_lm, 41), "y": sibling(tiny_lm, 42)}
    guide = {
        "plain": None,
        "prefix": guide_of(tiny_lm, heads, "prefix", config),
        "jsd": mixing_guide(tiny_lm, models, "jsd"),
        "scorers": ScorerGuide(tiny_lm, scorers, 0.8),
        "value models": ValueModelGuide(
            tiny_lm, [value_model(tiny_lm, 61, ("x",)), value_model(tiny_lm, 62, ("y",))], beta=0.6, skip_above=0.6
        ),
    }[way]
    segments = Segments(threshold=0.7, beta=0.2, entropy=INF, shortest=2, longest=3, tries=4)
    requests = [r for which in range(3) for r in asked(6, which=which)]
    requests = [replace(r, id=str(i), seed=i) for i, r in enumerate(requests)]

    def sampler(size: int) -> SegmentSampler:
        return SegmentSampler(lm=tiny_lm, sampling=replace(config, batch_size=size), segments=segments, rewards=rewards(), guide=guide)

    alone = [sampler(1)([r])[0] for r in requests]
    assert sum(r.reward_calls for r in alone) > 2 * 2 * len(alone)  # some were refused
    for size, order in ((4, requests), (5, requests[::-1])):
        by_id = {r.id: r for r in sampler(size)(order)}
        for want in alone:
            got = by_id[want.id]
            counts = ["tokens", "base_forwards", "reward_calls", "weights"]
            counts += ["guide_forwards"] if way != "value models" else []  # a step that all rows skip costs nothing
            assert [getattr(got, name) for name in counts] == [getattr(want, name) for name in counts]
            np.testing.assert_allclose([got.kl, got.kl_floor], [want.kl, want.kl_floor], atol=1e-4)
    for want, request in list(zip(alone, requests, strict=True))[::3]:  # the same tokens with nothing refused
        plain = request if guide else replace(request, weights=None)
        [again] = generate(tiny_lm, [plain], config, guide, search=Told(want.tokens))
        assert again.tokens == want.tokens
        np.testing.assert_allclose(want.logprobs, again.logprobs, atol=1e-4)
        np.testing.assert_allclose(want.ref_logprobs, again.ref_logprobs, atol=1e-4)


class Told:
    """A search that takes the tokens that it was told, one row for the request."""

    width = 1

    def __init__(self, tokens):
        self.tokens = tokens

    def extend(self, rows, law_RC, step):
        return [0], torch.tensor([step.candidates_RC[0].tolist().index(self.tokens[len(rows[0].tokens)])]), [0.0]

    def over(self, job, going):
        return False

    def best(self, job):
        return job.pool[0]


def test_every_token_that_was_run_is_counted(tiny_lm, scorers, monkeypatch):  # noqa: F811
    """Alone in its batch, a request's forwards are all there are: of the policy and of the scorers, refused tokens included."""
    run = count_tokens(monkeypatch)
    segments = Segments(threshold=0.9, beta=0.2, entropy=1.0, shortest=2, longest=3, tries=5)
    for guide in (None, ScorerGuide(tiny_lm, scorers, 0.8)):
        for request in asked(6):
            found = SegmentSampler(
                lm=tiny_lm, sampling=replace(CONFIG, max_new_tokens=8), segments=segments, rewards=(own := rewards()), guide=guide
            )
            run.clear()
            [rollout] = found([request])
            assert rollout.base_forwards == run["tiny"] > len(prompt_ids(tiny_lm.tokenizer, request.prompt)) + len(rollout.tokens)
            assert rollout.guide_forwards == run["scorer-51"] + run["scorer-52"]
            assert rollout.reward_calls == sum(reward.asked for reward in own.rewards)


def test_rewards_without_weight_are_not_asked_and_rows_without_weights_are_plain(tiny_lm):
    own = rewards()
    sampler = SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=CASES["three tries"], rewards=own)
    found = sampler(asked(5, (1.0, 0.0)))
    assert own.rewards[0].asked == sum(r.reward_calls for r in found)
    assert own.rewards[1].asked == 0
    plain = sampler(asked(5, None))
    assert own.rewards[0].asked == sum(r.reward_calls for r in found)
    assert all((r.kl, r.reward_calls, r.weights) == (0.0, 0, None) for r in plain)
    assert [r.tokens for r in plain] == [r.tokens for r in generate(tiny_lm, asked(5, None), CONFIG)]


def test_unscored_segments_are_refused_and_taken_only_where_nothing_else_is(tiny_lm):
    class Silent(Hashed):
        def __init__(self, name, words):
            super().__init__(name)
            self.words = words

        def __call__(self, prompts, responses):
            return np.array([math.nan if any(w in text for w in self.words) else 0.5 for text in responses])

    segments = Segments(threshold=0.0, beta=0.3, entropy=INF, shortest=1, longest=1, tries=30)
    some = WeightedRewards(rewards=(Silent("x", "b"), Hashed("y")))
    found = SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=segments, rewards=some)(asked(60, (1.0, 0.0)))
    assert not any("b" in r.text for r in found)
    everything = WeightedRewards(rewards=(Silent("x", [""]), Hashed("y")))
    found = SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=replace(segments, tries=3), rewards=everything)(asked(20, (1.0, 0.0)))
    assert all(r.reward_calls == 3 * len(r.tokens) for r in found)


def test_the_scale_of_the_rewards(tiny_lm):
    """Rewards of another unit, standardised, choose as the plain ones do."""

    class Scaled(Hashed):
        def __call__(self, prompts, responses):
            return 5.0 + 3.0 * super().__call__(prompts, responses)

    scale = Normaliser(objectives=("x", "y"), mean_K=(5.0, 5.0), sd_K=(3.0, 3.0))
    other = WeightedRewards(rewards=(Scaled("x"), Scaled("y")), normaliser=scale)
    for segments in (CASES["three tries"], CASES["rising threshold"]):
        got, want = (SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=segments, rewards=r)(asked(40)) for r in (other, rewards()))
        assert [r.tokens for r in got] == [r.tokens for r in want]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0"),
        ({"threshold": math.nan}, "threshold must be a number"),
        ({"initial": 1.5}, "initial between 0 and 1, got 1 and 1.5"),
        ({"threshold": INF, "initial": 0.5}, "a share of a finite threshold"),
        ({"shortest": 5, "longest": 4}, "1 <= shortest <= longest, got 5 and 4"),
        ({"tries": 0}, "tries must be at least 1, got 0"),
    ],
)
def test_impossible_segments_are_named(settings, says):
    with pytest.raises(UserError, match=says):
        Segments(**({"threshold": 1.0} | settings))


def test_bad_requests_are_named(tiny_lm):
    segments = CASES["three tries"]
    with pytest.raises(UserError, match="greedy proposals of a segment are all the same"):
        SegmentSampler(lm=tiny_lm, sampling=replace(CONFIG, greedy=True), segments=segments, rewards=rewards())
    sampler = SegmentSampler(lm=tiny_lm, sampling=CONFIG, segments=segments, rewards=rewards())
    with pytest.raises(UserError, match=r"request '0' has weights \(1\.0,\); a choice by x, y needs one each"):
        sampler(asked(1, (1.0,)))
    with pytest.raises(UserError, match="request '0' goes on with a given response, which segments can't judge"):
        sampler([replace(asked(1)[0], given=(3,))])
    steered = replace(sampler, guide=mixing_guide(tiny_lm, {"a": sibling(tiny_lm, 41), "y": sibling(tiny_lm, 42)}))
    with pytest.raises(UserError, match="steered by a, y, the choice by x, y"):
        steered(asked(1))
    sliding = LanguageModel(
        build_llama(8, layers=2, max_position=64, seed=5, config_class=MistralConfig, sliding_window=4),
        tiny_lm.tokenizer,
        "s",
        "",
        frozenset({EOS}),
    )
    with pytest.raises(UserError, match="going back on tokens needs models whose layers all attend to the full past"):
        replace(sampler, lm=sliding)(asked(1))

    class Mute(Hashed):
        def __call__(self, prompts, responses):
            return np.full(len(responses), math.nan)

    mute = replace(sampler, segments=CASES["rising threshold"], rewards=WeightedRewards(rewards=(Mute("x"), Mute("y"))))
    with pytest.raises(UserError, match="can't score an empty response"):
        mute(asked(1))
