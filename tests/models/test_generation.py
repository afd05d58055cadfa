"""The token loop against plain uncached forwards: batching, prices, bans, cut texts, frequencies, bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import chisquare

from conftest import prompt
from equipoise.models.chat import prompt_ids, whole_sentences
from equipoise.models.generation import Sampling, generate, row_uniforms
from equipoise.types import Prompt, Request, UserError

PROMPTS = (prompt("long", "d a b c . a"), prompt("short", "c"), prompt("middle", "a b d"))
EOS = 2
TABLE_KV = np.random.default_rng(11).normal(scale=1.5, size=(2, 8))
READ_D = np.random.default_rng(12).normal(scale=0.4, size=16)


class TableGuide:
    """shift(a) = tanh(h . u) sum_k w_k table_k[a], with h the state after one layer."""

    objectives = ("x", "y")
    layers = (1,)
    forwards_per_step = 0

    def follow(self, start):
        return ()

    def shift(self, step):
        gate_R = torch.tanh(step.states[1] @ torch.tensor(READ_D, dtype=torch.float32))
        table_RV = step.weights_RK @ torch.tensor(TABLE_KV, dtype=torch.float32)
        return table_RV.gather(1, step.candidates_RC) * gate_R[:, None]

    def advance(self, step, choice_R):
        return None


class Constant(TableGuide):
    """The same shift for every candidate, or for the end of turn only."""

    def __init__(self, value: float, only_eos: bool = False):
        self.value, self.only_eos = value, only_eos

    def shift(self, step):
        shift = torch.full_like(step.ref_logprobs_RC, self.value)
        return torch.where(step.candidates_RC == EOS, shift, torch.zeros_like(shift)) if self.only_eos else shift


def requests_for(samples: int, weights=(None,)) -> list[Request]:
    """`samples` per prompt, with weights in turn."""
    turn = itertools.cycle(weights)
    return [
        Request(id=f"{p.id}/{i}", prompt=p, seed=100 * n + i, weights=next(turn)) for i in range(samples) for n, p in enumerate(PROMPTS)
    ]


def replay(lm, rollout, config: Sampling) -> list[dict]:
    """Every step's distributions over the whole vocabulary, from one uncached forward over prompt and response."""
    [source] = [p for p in PROMPTS if p.id == rollout.prompt_id]
    head = prompt_ids(lm.tokenizer, source)
    with torch.no_grad():
        out = lm.model(input_ids=torch.tensor([[*head, *rollout.tokens]]), use_cache=False, output_hidden_states=True)
    steps = []
    for position in range(len(rollout.tokens)):
        at = len(head) - 1 + position
        logits_V = out.logits[0, at].double().numpy() / config.temperature
        if position == 0 and not config.allow_eos_first:
            logits_V[list(lm.eos_ids)] = -np.inf
        full_V = log_softmax(logits_V)
        kept = np.zeros(len(full_V), dtype=bool)
        kept[np.argsort(-full_V)[: config.top_k or len(full_V)]] = True
        ref_V = log_softmax(np.where(kept, full_V, -np.inf))
        shift_V = 0.0
        if rollout.weights is not None:
            shift_V = np.tanh(out.hidden_states[1][0, at].double().numpy() @ READ_D) * (np.array(rollout.weights) @ TABLE_KV)
        steps.append({"full": full_V, "ref": ref_V, "policy": log_softmax(ref_V + shift_V), "kept": kept})
    return steps


def kl(p_V: np.ndarray, q_V: np.ndarray) -> float:
    support = p_V > -np.inf
    return float((np.exp(p_V[support]) * (p_V[support] - q_V[support])).sum())


SETTINGS = [
    Sampling(max_new_tokens=9, top_k=0),
    Sampling(max_new_tokens=9, top_k=3, temperature=0.7),
    Sampling(max_new_tokens=9, top_k=5, temperature=1.6, allow_eos_first=True),
    Sampling(max_new_tokens=9, top_k=50),
]
MIXED = ((0.3, 0.7), None, (1.0, 0.0), (0.0, 1.0))


@pytest.mark.parametrize("guide", [None, TableGuide()], ids=["plain", "guided"])
def test_a_row_does_not_depend_on_its_batch(tiny_lm, guide):
    requests = requests_for(4, MIXED if guide else (None,))
    config = Sampling(max_new_tokens=10, top_k=5)
    usual = {r.id: generate(tiny_lm, [r], config, guide)[0] for r in requests}
    assert len({len(r.tokens) for r in usual.values()}) > 2  # rows leave the batch at different steps
    for size, order in itertools.product((2, 3, 5, 64), (requests, requests[::-1], requests[::2] + requests[1::2])):
        rollouts = generate(tiny_lm, order, replace(config, batch_size=size), guide)
        assert [r.id for r in rollouts] == [r.id for r in order]
        for got in rollouts:
            want = usual[got.id]
            assert (got.tokens, got.text, got.finish_reason, got.base_forwards) == (
                want.tokens,
                want.text,
                want.finish_reason,
                want.base_forwards,
            )
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
            np.testing.assert_allclose(got.ref_logprobs, want.ref_logprobs, atol=1e-5)
            np.testing.assert_allclose([got.kl, got.kl_floor], [want.kl, want.kl_floor], atol=1e-5)


@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("guide", [None, TableGuide()], ids=["plain", "guided"])
def test_logprobs_and_prices_equal_those_of_an_uncached_forward(tiny_lm, guide, config):
    for rollout in generate(tiny_lm, requests_for(4, MIXED if guide else (None,)), config, guide):
        steps = replay(tiny_lm, rollout, config)
        np.testing.assert_allclose(rollout.logprobs, [s["policy"][t] for s, t in zip(steps, rollout.tokens, strict=True)], atol=1e-4)
        np.testing.assert_allclose(rollout.ref_logprobs, [s["full"][t] for s, t in zip(steps, rollout.tokens, strict=True)], atol=1e-4)
        assert rollout.kl == pytest.approx(sum(kl(s["policy"], s["ref"]) for s in steps), abs=1e-4)
        assert rollout.kl_floor == pytest.approx(sum(-logsumexp(s["full"][s["kept"]]) for s in steps), abs=1e-4)
        assert rollout.kl + rollout.kl_floor == pytest.approx(sum(kl(s["policy"], s["full"]) for s in steps), abs=1e-4)


def test_without_a_guide_there_is_no_tilt_and_without_top_k_no_floor(tiny_lm):
    for top_k in (0, 8, 50):
        rollouts = generate(tiny_lm, requests_for(3), Sampling(max_new_tokens=6, top_k=top_k))
        assert [r.kl for r in rollouts] == [0.0] * 9
        np.testing.assert_allclose([r.kl_floor for r in rollouts], 0.0, atol=1e-5)
        for r in rollouts:
            np.testing.assert_allclose(r.logprobs, r.ref_logprobs, atol=1e-5)
    assert min(r.kl_floor for r in generate(tiny_lm, requests_for(3), Sampling(max_new_tokens=6, top_k=2))) > 0.1


def test_a_constant_shift_changes_nothing(tiny_lm):
    config = Sampling(max_new_tokens=8, top_k=4)
    plain = generate(tiny_lm, requests_for(3), config)
    shifted = generate(tiny_lm, requests_for(3, ((0.5, 0.5),)), config, Constant(3.0))
    assert [r.tokens for r in shifted] == [r.tokens for r in plain]
    np.testing.assert_allclose([r.kl for r in shifted], 0.0, atol=1e-5)


def test_rows_without_weights_are_plain_whatever_the_guide_returns(tiny_lm):
    config = Sampling(max_new_tokens=8, top_k=4)
    plain = generate(tiny_lm, requests_for(3), config)
    guided = generate(tiny_lm, requests_for(3), config, Constant(float("nan")))
    assert [r.tokens for r in guided] == [r.tokens for r in plain]
    np.testing.assert_allclose([r.kl for r in guided], 0.0, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_first_token_does_not_end_the_turn(tiny_lm, top_k):
    config = Sampling(max_new_tokens=4, top_k=top_k, temperature=2.0)
    eager = Constant(60.0, only_eos=True)
    for guide, weights in ((None, None), (eager, (1.0, 0.0))):
        for rollout in generate(tiny_lm, requests_for(40, (weights,)), config, guide):
            assert rollout.tokens[0] != EOS
            assert all(np.isfinite(rollout.logprobs))
            assert np.isfinite([rollout.kl, rollout.kl_floor]).all()
    if top_k == 0:  # the eager guide's turn ends as soon as it may
        assert {r.tokens[1:] for r in generate(tiny_lm, requests_for(3, ((1.0, 0.0),)), config, eager)} == {(EOS,)}


def test_empty_responses_where_they_are_allowed(tiny_lm):
    config = Sampling(max_new_tokens=4, top_k=0, allow_eos_first=True)
    empty = [r for r in generate(tiny_lm, requests_for(60), config) if r.tokens == (EOS,)]
    assert empty
    for rollout in empty:
        [source] = [p for p in PROMPTS if p.id == rollout.prompt_id]
        assert (rollout.text, rollout.text_tokens, rollout.finish_reason) == ("", 0, "stop")
        assert rollout.base_forwards == len(prompt_ids(tiny_lm.tokenizer, source))


def test_every_end_of_turn_ends_the_turn(tiny_lm):
    both = replace(tiny_lm, eos_ids=frozenset({EOS, 7}))
    rollouts = generate(both, requests_for(30), Sampling(max_new_tokens=12, top_k=0))
    assert {r.tokens[-1] for r in rollouts if r.finish_reason == "stop"} == {EOS, 7}
    for r in rollouts:
        assert not {EOS, 7} & set(r.tokens[:-1])
        assert r.tokens[0] not in (EOS, 7)


def test_what_a_rollout_says_of_itself(tiny_lm):
    requests = requests_for(20)
    for whole in (True, False):
        config = Sampling(max_new_tokens=7, top_k=6, whole_sentences=whole)
        for request, r in zip(requests, generate(tiny_lm, requests, config), strict=True):
            assert (r.id, r.prompt_id, r.seed, r.weights) == (request.id, request.prompt.id, request.seed, None)
            assert len(r.tokens) == len(r.logprobs) == len(r.ref_logprobs) <= 7
            assert r.base_forwards == len(prompt_ids(tiny_lm.tokenizer, request.prompt)) + len(r.tokens) - 1
            assert r.guide_forwards == 0
            if r.finish_reason == "stop":
                assert r.tokens.index(EOS) == len(r.tokens) - 1 == r.text_tokens
            else:
                assert len(r.tokens) == 7
                assert EOS not in r.tokens
                last_stop = max((i + 1 for i, token in enumerate(r.tokens) if token == 7), default=7)
                # Tokens that decode to nothing after a full stop are part of its sentence.
                silent = next((i for i, token in enumerate(r.tokens[last_stop:]) if token > 1), 7 - last_stop)
                assert r.text_tokens == (last_stop + silent if whole else 7)
            assert r.text == tiny_lm.tokenizer.decode(r.tokens[: r.text_tokens], skip_special_tokens=True).strip()


def test_progress_counts_every_response_once(tiny_lm):
    seen: list[int] = []
    generate(tiny_lm, requests_for(5), Sampling(max_new_tokens=9, batch_size=4), progress=seen.append)
    assert sum(seen) == 15
    assert min(seen) > 0


def test_no_requests_no_rollouts(tiny_lm):
    assert generate(tiny_lm, [], Sampling()) == []


def test_random_numbers_are_fixed_by_the_seed_alone():
    assert np.array_equal(row_uniforms(7, 3), row_uniforms(7, 40)[:3])
    assert not np.array_equal(row_uniforms(7, 3), row_uniforms(8, 3))
    many = np.concatenate([row_uniforms(seed, 40) for seed in range(100)])
    assert 0 <= many.min() < many.max() < 1
    assert chisquare(np.histogram(many, bins=20, range=(0, 1))[0]).pvalue > 0.01


class Pieces:
    """A tokenizer whose tokens are the pieces of a text."""

    def __init__(self, pieces: list[str]):
        self.pieces = pieces

    def decode(self, tokens, skip_special_tokens):
        return "".join(self.pieces[t] for t in tokens)


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (["Go", ".", " Then", " stop"], 2),
        (["Go", ".", " Stop", "!", " And"], 4),
        (["It", " costs", " 3", ".", "5", " pounds"], 6),  # a decimal, no sentence: all of it stays
        (["Fine", ".", " It", " costs", " 3", ".", "5"], 2),
        (["Fine", ".", " It", " costs", " 3", "."], 2),  # cut inside a decimal, for all we know
        (["1", ".", " Mix", ".", " ", "2", ".", " Bake"], 5),  # the list's next number is no sentence
        (["1.", " Mix"], 2),
        (["He", " said", ' "', "Go", ".", '"', " and"], 6),
        (["He", " said", " \u201cGo", "?", "\u201d", " and"], 5),
        (["(", "Really", "?!", ")", " So"], 4),
        (["**", "Mix", ".", "**", " So"], 4),
        (["Wait", "...", " what"], 2),
        (["no", " sentence", " at", " all"], 4),
        (["Done", ".", "\n", "\n"], 4),
        (["a", ",", " b", ";", " c", ":"], 6),
        ([], 0),
    ],
)
def test_whole_sentences_by_hand(pieces, kept):
    assert whole_sentences(Pieces(pieces), range(len(pieces))) == kept


@pytest.mark.parametrize("weights", [None, (0.3, 0.7)], ids=["plain", "guided"])
@pytest.mark.parametrize("config", [Sampling(max_new_tokens=2, top_k=4), Sampling(max_new_tokens=2, top_k=0, temperature=0.6)], ids=str)
def test_frequencies_match_the_exact_probabilities(tiny_lm, config, weights):
    config = replace(config, batch_size=500)
    guide = TableGuide() if weights else None
    draws = [Request(id=str(i), prompt=PROMPTS[2], seed=i, weights=weights) for i in range(4000)]
    rollouts = generate(tiny_lm, draws, config, guide)
    exact: dict[tuple[int, ...], float] = {}
    for first, second in itertools.product(range(8), repeat=2):
        steps = replay(tiny_lm, replace(rollouts[0], tokens=(first, second)), config)
        prob = float(np.exp(steps[0]["policy"][first] + steps[1]["policy"][second]))
        assert first != EOS or prob == 0
        if prob > 0:
            exact[first, second] = prob
    assert sum(exact.values()) == pytest.approx(1, abs=1e-6)
    counts = {tokens: 0 for tokens in exact}
    for rollout in rollouts:
        counts[rollout.tokens] += 1
    expected = np.array([exact[t] for t in exact]) * len(draws)
    observed = np.array([counts[t] for t in exact], dtype=float)
    rare = expected < 5
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    observed = np.append(observed[~rare], observed[rare].sum())
    if expected[-1] < 1:
        assert observed[-1] < 10
        expected, observed = expected[:-1], observed[:-1]
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


@pytest.mark.parametrize(
    "empty",
    [
        Prompt(id="p-17", messages=()),
        prompt("p-17", ""),
        prompt("p-17", " \n"),
        Prompt(id="p-17", messages=({"role": "user", "content": "a"}, {"role": "user", "content": ""})),
    ],
)
def test_an_empty_prompt_is_named(tiny_lm, empty):
    with pytest.raises(UserError, match=r"p-17.*empty"):
        generate(tiny_lm, [Request(id="r", prompt=empty, seed=0)], Sampling())


def test_a_prompt_without_room_for_a_response_is_named(tiny_lm):
    crowded = prompt("p-18", "a " * 30)
    length = len(prompt_ids(tiny_lm.tokenizer, crowded))
    with pytest.raises(UserError, match=rf"p-18.*{length} tokens.*max_new_tokens=40.*64"):
        generate(tiny_lm, [Request(id="r", prompt=crowded, seed=0)], Sampling(max_new_tokens=40))
    fits = Sampling(max_new_tokens=64 - length)
    [rollout] = generate(tiny_lm, [Request(id="r", prompt=crowded, seed=3)], fits)
    assert 1 <= len(rollout.tokens) <= 64 - length
    with pytest.raises(UserError, match="p-18"):
        generate(tiny_lm, [Request(id="r", prompt=crowded, seed=0)], replace(fits, max_new_tokens=64 - length + 1))


def test_weights_need_a_guide(tiny_lm):
    with pytest.raises(UserError, match=r"'r-1'.*\(0\.3, 0\.7\).*no guide"):
        generate(tiny_lm, [Request(id="r-1", prompt=PROMPTS[0], seed=0, weights=(0.3, 0.7))], Sampling())


@pytest.mark.parametrize("weights", [(1.0,), (0.2, 0.3, 0.5)])
def test_as_many_weights_as_objectives(tiny_lm, weights):
    with pytest.raises(UserError, match=rf"'r-1' has {len(weights)} weights.*x, y"):
        generate(tiny_lm, [Request(id="r-1", prompt=PROMPTS[0], seed=0, weights=weights)], Sampling(), TableGuide())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_guide_that_returns_nonsense_is_named_with_the_row(tiny_lm, value):
    rows = [
        Request(id=f"r-{i}", prompt=p, seed=0, weights=w) for i, (p, w) in enumerate(zip(PROMPTS, (None, (0.5, 0.5), None), strict=True))
    ]
    with pytest.raises(UserError, match=r"Constant on x, y returned NaN or infinity for prompt 'short' \(request 'r-1'\) at token 0"):
        generate(tiny_lm, rows, Sampling(), Constant(value))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive, got nan"),
    ],
)
def test_impossible_settings_are_named(setting, named):
    with pytest.raises(UserError, match=named):
        Sampling(**setting)
