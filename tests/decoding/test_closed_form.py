"""Value-guided decoding is exact: with exact soft values, what is sampled is the closed form, sequence by sequence.

The closed form is enumerated from plain uncached forwards; the loop under test is the real one, with ragged prompts and
different weights in one batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from decoding.rows import EOS, OBJECTIVES, PROMPTS, KnowsItsRows, Prefix, Weights, plain_forward
from equipoise.models import generation
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.types import Request


@dataclass
class World:
    """One prompt's tree of all responses: the reference by plain forwards, arbitrary rewards, and the closed form."""

    ref: dict[Prefix, np.ndarray]
    """log pi_ref(. | prefix) restricted to the candidates."""
    mass: dict[Prefix, float]
    """log of the candidates' mass under the full reference."""
    sequences: list[Prefix]
    reward_SK: np.ndarray

    @classmethod
    def enumerate(cls, lm, head: list[int], config: Sampling, seed: int) -> World:
        ref, mass, sequences, level = {}, {}, [], [()]
        for depth in range(config.max_new_tokens):
            logits_BV = plain_forward(lm, [[*head, *prefix] for prefix in level])[0] / config.temperature
            if depth == 0 and not config.allow_eos_first:
                logits_BV[:, EOS] = -np.inf
            following = []
            for prefix, full_V in zip(level, log_softmax(logits_BV, axis=1), strict=True):
                kept = np.argsort(-full_V)[: config.top_k or len(full_V)]
                mass[prefix] = float(logsumexp(full_V[kept]))
                ref[prefix] = np.full(len(full_V), -np.inf)
                ref[prefix][kept] = full_V[kept] - mass[prefix]
                for token in np.flatnonzero(ref[prefix] > -np.inf).tolist():
                    longer = (*prefix, token)
                    (sequences if token == EOS or depth + 1 == config.max_new_tokens else following).append(longer)
            level = following
        rewards = np.random.default_rng(seed).normal(size=(len(sequences), len(OBJECTIVES)))
        return cls(ref, mass, sequences, rewards)

    def log_ref(self) -> np.ndarray:
        """log pi_ref(y) of every response."""
        return np.array([sum(self.ref[y[:t]][y[t]] for t in range(len(y))) for y in self.sequences])

    def scaled_reward(self, weights: Weights, beta: float) -> np.ndarray:
        return self.reward_SK @ np.array(weights) / beta if weights else np.zeros(len(self.sequences))

    def closed_form(self, weights: Weights, beta: float) -> np.ndarray:
        """log [pi_ref(y) exp(r(y) / beta) / Z] of every response."""
        return log_softmax(self.log_ref() + self.scaled_reward(weights, beta))

    def totals(self, log_S: np.ndarray) -> dict[Prefix, float]:
        """log of the summed mass of the responses under each prefix."""
        under: dict[Prefix, list[float]] = {}
        for y, value in zip(self.sequences, log_S, strict=True):
            for t in range(len(y) + 1):
                under.setdefault(y[:t], []).append(value)
        return {prefix: float(logsumexp(values)) for prefix, values in under.items()}

    def soft_values(self, weights: Weights, beta: float) -> dict[Prefix, float]:
        """log sum over completions of pi_ref(completion | prefix) exp(r / beta)."""
        plain = self.totals(self.log_ref())
        return {prefix: value - plain[prefix] for prefix, value in self.totals(self.log_ref() + self.scaled_reward(weights, beta)).items()}


class ExactGuide(KnowsItsRows):
    """shift(s, a) = the exact soft value of s + a, for each row's own weights."""

    def __init__(self, lm, worlds: list[World], all_weights: list[Weights], beta: float):
        super().__init__(lm)
        self.worlds = worlds
        self.values = [{w: world.soft_values(w, beta) for w in all_weights if w} for world in worlds]
        self.visited: set[tuple[int, Weights, Prefix]] = set()

    def shift(self, step):
        shift_RC = torch.full_like(step.ref_logprobs_RC, float("nan"))
        for row, (which, prefix) in enumerate(self.rows_of(step)):
            tokens = step.candidates_RC[row].tolist()
            expected = self.worlds[which].ref[prefix][tokens]
            np.testing.assert_allclose(step.ref_logprobs_RC[row].numpy(), expected, atol=1e-4, err_msg=str(prefix))
            weights = tuple(round(w, 6) for w in step.weights_RK[row].tolist())
            if any(w != w for w in weights):
                self.visited.add((which, None, prefix))
                continue
            self.visited.add((which, weights, prefix))
            values = self.values[which][weights]
            shift_RC[row] = torch.tensor([values.get((*prefix, t), 0.0) for t in tokens])
        return shift_RC


CASES = {
    "whole vocabulary": Sampling(max_new_tokens=3, top_k=0),
    "top 3, tempered, empty allowed": Sampling(max_new_tokens=4, top_k=3, temperature=0.7, allow_eos_first=True),
    "top 2": Sampling(max_new_tokens=4, top_k=2),
}
ALL_WEIGHTS: list[Weights] = [(1.0, 0.0), (0.25, 0.75), (0.0, 1.0), None]


@pytest.mark.parametrize("name", CASES)
def test_exact_soft_values_sample_the_closed_form(tiny_lm, monkeypatch, name):
    """Every response is forced once per prompt and weights, by random numbers in the middle of its tokens' intervals."""
    config, beta, batch = replace(CASES[name], batch_size=48), 0.5, 48
    worlds = [World.enumerate(tiny_lm, prompt_ids(tiny_lm.tokenizer, p), config, seed) for seed, p in enumerate(PROMPTS)]
    guide = ExactGuide(tiny_lm, worlds, ALL_WEIGHTS, beta)
    uniforms: list[np.ndarray] = []
    requests, wanted = [], []
    for (which, world), weights in itertools.product(enumerate(worlds), ALL_WEIGHTS):
        closed_S = world.closed_form(weights, beta)
        assert logsumexp(closed_S) == pytest.approx(0, abs=1e-9)
        totals = world.totals(closed_S)
        for y, logprob in zip(world.sequences, closed_S, strict=True):
            middle = np.full(config.max_new_tokens, 0.5)
            for t, token in enumerate(y):
                order = np.argsort(-world.ref[y[:t]], kind="stable").tolist()
                prob = [np.exp(totals.get((*y[:t], a), -np.inf) - totals[y[:t]]) for a in order]
                at = order.index(token)
                middle[t] = sum(prob[:at]) + prob[at] / 2
            requests.append(Request(id=str(len(requests)), prompt=PROMPTS[which], seed=len(uniforms), weights=weights))
            uniforms.append(middle)
            wanted.append((which, weights, y, logprob))
    monkeypatch.setattr(generation, "row_uniforms", lambda seed, count: uniforms[seed])

    mixed = np.random.default_rng(0).permutation(len(requests))
    rollouts = {}
    for start in range(0, len(mixed), batch):
        part = [requests[i] for i in mixed[start : start + batch]]
        assert len({r.prompt.id for r in part}) == len(PROMPTS) or len(part) < batch
        rollouts.update({int(r.id): r for r in generate(tiny_lm, part, config, guide)})

    got = [rollouts[i] for i in range(len(requests))]
    assert [r.tokens for r in got] == [y for _, _, y, _ in wanted]
    closed = np.array([logprob for *_, logprob in wanted])
    stepwise = np.array([sum(r.logprobs) for r in got])
    np.testing.assert_allclose(stepwise, closed, atol=1e-5)
    np.testing.assert_allclose(np.exp(stepwise), np.exp(closed), atol=1e-6)
    assert guide.visited == {(p, w, prefix) for p, world in enumerate(worlds) for w in ALL_WEIGHTS for prefix in world.ref}

    # Averaged over the closed form, the two prices of a response are the whole divergence from the untruncated reference.
    for which, weights in itertools.product(range(len(PROMPTS)), ALL_WEIGHTS):
        rows = [i for i, (p, w, _, _) in enumerate(wanted) if (p, w) == (which, weights)]
        law, full = np.exp(closed[rows]), np.array([sum(got[i].ref_logprobs) for i in rows])
        tilt, floor = (law @ np.array([getattr(got[i], part) for i in rows]) for part in ("kl", "kl_floor"))
        assert tilt + floor == pytest.approx(law @ (closed[rows] - full), abs=1e-4)
        assert tilt == pytest.approx(law @ (closed[rows] - worlds[which].log_ref()), abs=1e-4)


def test_exact_soft_values_without_forcing(tiny_lm):
    """The same law with the loop's own random numbers: mean rewards of both objectives within four standard errors."""
    config, beta, weights = Sampling(max_new_tokens=4, top_k=3, batch_size=100), 0.5, (0.25, 0.75)
    worlds = [World.enumerate(tiny_lm, prompt_ids(tiny_lm.tokenizer, p), config, seed) for seed, p in enumerate(PROMPTS)]
    guide = ExactGuide(tiny_lm, worlds, [weights], beta)
    samples = 500
    requests = [
        Request(id=f"{p}/{i}", prompt=PROMPTS[p], seed=1000 * p + i, weights=weights) for i in range(samples) for p in range(len(PROMPTS))
    ]
    rollouts = generate(tiny_lm, requests, config, guide)
    for which, world in enumerate(worlds):
        law = np.exp(world.closed_form(weights, beta))
        index = {y: i for i, y in enumerate(world.sequences)}
        mean_K = np.mean([world.reward_SK[index[r.tokens]] for r in rollouts[which :: len(PROMPTS)]], axis=0)
        exact_K = law @ world.reward_SK
        sd_K = np.sqrt(law @ (world.reward_SK - exact_K) ** 2)
        assert (np.abs(mean_K - exact_K) < 4 * sd_K / np.sqrt(samples)).all()
        assert (np.array(weights) @ exact_K) > (np.array(weights) @ (np.exp(world.log_ref()) @ world.reward_SK)) + 0.3
