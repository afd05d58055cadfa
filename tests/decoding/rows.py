"""What the tests of decoding share: ragged prompts, plain forwards, a guide that knows its rows, and all responses of tiny models."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from conftest import build_llama, prompt
from equipoise.models import generation
from equipoise.models.chat import prompt_ids
from equipoise.models.loading import LanguageModel
from equipoise.types import Request, Rollout

PROMPTS = (prompt("long", "d a b c . a"), prompt("short", "c"), prompt("middle", "a b d"))
EOS = 2
OBJECTIVES = ("x", "y")
Prefix = tuple[int, ...]
Weights = tuple[float, ...] | None


def sibling(lm, seed: int, rows: int = 8, tokenizer=None, name: str = "") -> LanguageModel:
    """Another random model of the same tokens; rows beyond them are padding."""
    model = build_llama(rows, layers=2, max_position=64, seed=seed)
    return LanguageModel(model, tokenizer or lm.tokenizer, name or f"sibling-{seed}", f"seed {seed}", lm.eos_ids)


def plain_forward(lm, ids_BT) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(logits_BV, layer -> state_BD) after equally long sequences, uncached and unpadded."""
    with torch.no_grad():
        out = lm.model(input_ids=torch.tensor(ids_BT), use_cache=False, output_hidden_states=True)
    return out.logits[:, -1].double().numpy(), {i: h[:, -1].double().numpy() for i, h in enumerate(out.hidden_states)}


class KnowsItsRows:
    """A guide that knows which prompt and prefix each row of a step holds, and checks the loop's first states against plain ones."""

    objectives = OBJECTIVES
    layers: tuple[int, ...] = ()
    forwards_per_step = 0

    def __init__(self, lm):
        self.lm = lm
        self.heads = [prompt_ids(lm.tokenizer, p) for p in PROMPTS]
        self.roots = np.concatenate([plain_forward(lm, [ids])[1][lm.num_layers] for ids in self.heads])

    def rows_of(self, step) -> list[tuple[int, Prefix]]:
        rows = [(PROMPTS.index(request.prompt), tuple(said)) for request, said in zip(step.requests, step.responses, strict=True)]
        assert step.length_R.tolist() == [len(said) for _, said in rows]
        states = step.states[self.lm.num_layers].double().numpy()
        for (which, said), state, asked in zip(rows, states, step.prompts, strict=True):
            assert list(asked) == self.heads[which]
            assert said or np.abs(state - self.roots[which]).max() < 1e-4
        assert len(rows) == len(step.candidates_RC)
        return rows

    def follow(self, start):
        return ()

    def advance(self, step, choice_R):
        return None


@dataclass(frozen=True)
class Leaf:
    """One response, with what plain forwards say of it and the random numbers that lead there."""

    which: int
    weights: Weights
    tokens: Prefix
    logprob: float
    ref_logprob: float
    kl: float
    kl_floor: float
    uniforms: tuple[float, ...]


class Plain:
    """log pi(. | ids) of models over the tokens that the tokenizer knows, from uncached forwards of one model at a time."""

    def __init__(self, known: int = 8):
        self.known = known
        self.seen: dict[tuple[int, Prefix], np.ndarray] = {}
        self.models: dict[int, LanguageModel] = {}  # kept, so that no other model gets the id of one that is gone

    def __call__(self, lm, sequences: Sequence[Prefix]) -> np.ndarray:
        self.models[id(lm)] = lm
        missing = [s for s in dict.fromkeys(map(tuple, sequences)) if (id(lm), s) not in self.seen]
        if missing:
            for s, row in zip(missing, plain_forward(lm, [list(s) for s in missing])[0], strict=True):
                self.seen[id(lm), s] = log_softmax(row[: self.known])
        return np.stack([self.seen[id(lm), tuple(s)] for s in sequences])

    def along(self, lm, head: Sequence[int], prefixes: Sequence[Prefix]) -> tuple[np.ndarray, np.ndarray]:
        """(log pi of each whole prefix [n], log pi of the next token [n, V])."""
        past = np.zeros(len(prefixes))
        for t in range(len(prefixes[0])):
            step = self(lm, [(*head, *p[:t]) for p in prefixes])
            past += step[range(len(prefixes)), [p[t] for p in prefixes]]
        return past, self(lm, [(*head, *p) for p in prefixes])


Fused = Callable[[list[int], list[Prefix], np.ndarray], np.ndarray]
"""(prompt ids, prefixes of one length, which tokens may be drawn [n, V]) -> log of the law at temperature 1 up to constants."""


def leaves(plain: Plain, lm, which: int, weights: Weights, config, fused: Fused) -> list[Leaf]:
    """Every response of one prompt, by plain forwards: the law is restricted to the reference's top k and tempered."""
    head = prompt_ids(lm.tokenizer, PROMPTS[which])
    level, done = [Leaf(which, weights, (), 0.0, 0.0, 0.0, 0.0, ())], []
    for depth in range(config.max_new_tokens):
        prefixes = [leaf.tokens for leaf in level]
        ref = log_softmax(plain(lm, [(*head, *p) for p in prefixes]) / config.temperature, axis=1)
        if depth == 0 and not config.allow_eos_first:
            ref[:, EOS] = -np.inf
            ref = log_softmax(ref, axis=1)
        allowed = np.zeros(ref.shape, dtype=bool)
        np.put_along_axis(allowed, np.argsort(-ref, axis=1)[:, : config.top_k or ref.shape[1]], True, axis=1)
        allowed &= ref > -np.inf
        law = log_softmax(np.where(allowed, fused(head, prefixes, allowed) / config.temperature, -np.inf), axis=1)
        following = []
        for leaf, p, q, ok in zip(level, law, ref, allowed, strict=True):
            mass, order = logsumexp(q[ok]), [a for a in np.argsort(-q) if ok[a]]
            kl, ends = leaf.kl + float(np.exp(p[ok]) @ (p[ok] - q[ok] + mass)), np.cumsum(np.exp(p[order]))
            for a, end in zip(order, ends, strict=True):
                uniforms = (*leaf.uniforms, float(end - np.exp(p[a]) / 2))
                grown = (leaf.logprob + p[a], leaf.ref_logprob + q[a], kl, leaf.kl_floor - mass, uniforms)
                longer = Leaf(which, weights, (*leaf.tokens, int(a)), *grown)
                (done if a == EOS or depth + 1 == config.max_new_tokens else following).append(longer)
        level = following
        if not level:
            break
    assert logsumexp([leaf.logprob for leaf in done]) == pytest.approx(0, abs=1e-9)
    return done


def check_every_response(lm, guide, config, wanted: list[Leaf], monkeypatch) -> list[Rollout]:
    """Force every response through the token loop, prompts and weights mixed in each batch, and hold it against plain forwards."""
    requests = [Request(id=str(i), prompt=PROMPTS[leaf.which], seed=i, weights=leaf.weights) for i, leaf in enumerate(wanted)]
    monkeypatch.setattr(generation, "row_uniforms", lambda seed, count: np.array([*wanted[seed].uniforms, *[0.5] * count])[:count])
    mixed = np.random.default_rng(0).permutation(len(requests))
    rollouts = {int(r.id): r for r in generation.generate(lm, [requests[i] for i in mixed], config, guide)}
    got = [rollouts[i] for i in range(len(requests))]
    assert [r.tokens for r in got] == [leaf.tokens for leaf in wanted]
    np.testing.assert_allclose([sum(r.logprobs) for r in got], [leaf.logprob for leaf in wanted], atol=2e-4)
    np.testing.assert_allclose([sum(r.ref_logprobs) for r in got], [leaf.ref_logprob for leaf in wanted], atol=2e-4)
    np.testing.assert_allclose([r.kl for r in got], [leaf.kl for leaf in wanted], atol=2e-4)
    np.testing.assert_allclose([r.kl_floor for r in got], [leaf.kl_floor for leaf in wanted], atol=2e-4)
    return got


def check_batches(lm, guide, config, weights: Sequence[Weights], samples: int = 4) -> list[Rollout]:
    """The same seed and row give the same tokens, price and counts whatever the batch's size, order and other rows."""
    turn = itertools.cycle(weights)
    requests = [
        Request(id=f"{p.id}/{i}", prompt=p, seed=100 * n + i, weights=next(turn)) for i in range(samples) for n, p in enumerate(PROMPTS)
    ]
    alone = {r.id: generation.generate(lm, [r], config, guide)[0] for r in requests}
    assert len({len(r.tokens) for r in alone.values()}) > 2  # rows leave the batch at different steps
    for size, order in ((3, requests[::-1]), (64, requests[::2] + requests[1::2]), (5, requests)):
        for got in generation.generate(lm, order, replace(config, batch_size=size), guide):
            want = alone[got.id]
            assert (got.tokens, got.base_forwards, got.guide_forwards) == (want.tokens, want.base_forwards, want.guide_forwards)
            np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
            np.testing.assert_allclose([got.kl, got.kl_floor], [want.kl, want.kl_floor], atol=1e-4)
    return [alone[r.id] for r in requests]


def count_tokens(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tokens that each model's backbone runs from here on, by the model's name."""
    run: Counter[str] = Counter()

    class Counted:
        def __init__(self, lm):
            self.lm = lm

        def __call__(self, input_ids, **settings):
            run[self.lm.name] += input_ids.numel()
            return self.lm.model.base_model(input_ids=input_ids, **settings)

    monkeypatch.setattr(LanguageModel, "backbone", property(Counted))
    return run
