"""Tokens per second of the token loop: plain, guided in two forms, and transformers' `generate`, on the same prompts.

    python benchmarks/decode.py [--quick] [--model smollm2] [--tokens 32] [--rounds 5]
    python benchmarks/decode.py --refill [--prompts 64] [--cap 128] [--batch 8]

Every way makes the same number of tokens per row (the end of turn is switched off), from the same ragged prompts, with
the same top k; ways take turns within a round and each ratio is the median over rounds, so that a noisy machine hurts
all of them alike. The heads are randomly filled: their cost doesn't depend on what they know. The last line is JSON.

`--refill` measures instead what it is worth that waiting prompts take the places of finished rows: all requests in one call
against a call per batch, in seconds of the processor, for responses of very different lengths (the first paragraph) and for
whole ones, most of which run into the cap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from equipoise.data.prompts import load_prompts
from equipoise.decoding.value_guided import PrefixGuide, SinglePassGuide
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel, load_model
from equipoise.models.value_heads import ValueHeads
from equipoise.objectives import Normaliser
from equipoise.rollouts import make_requests


def random_heads(lm: LanguageModel, objectives: int) -> ValueHeads:
    """Heads of the trained shape (two layers, 16 state components) with random numbers."""
    rng = np.random.default_rng(0)
    names = tuple(f"objective_{k}" for k in range(objectives))
    layers = (lm.num_layers // 2, lm.num_layers)
    width = len(layers) * lm.hidden_size
    tensors = {
        "mean_I": np.zeros(width),
        "whiten_IM": rng.normal(size=(width, 16)) * 0.01,
        "single_KXD": rng.normal(size=(objectives, 19, lm.hidden_size)) * 0.01,
        "prefix_KPI": rng.normal(size=(objectives, 2, width)) * 0.001,
        "prefix_mean_I": np.zeros(width),
    }
    return ValueHeads(
        normaliser=Normaliser(objectives=names, mean_K=(0.0,) * objectives, sd_K=(1.0,) * objectives),
        model=lm.name,
        layers=layers,
        horizon=40,
        tensors={k: v.astype(np.float32) for k, v in tensors.items()},
        calibration={},
    )


def ways(lm: LanguageModel, batch: int, tokens: int, top_k: int, objectives: int, with_prefix: bool) -> dict[str, Callable[[], None]]:
    """What is timed: each makes batch * tokens tokens."""
    endless = replace(lm, eos_ids=frozenset())
    prompts = load_prompts()[:batch]
    config = Sampling(max_new_tokens=tokens, top_k=top_k, batch_size=batch, allow_eos_first=True, whole_sentences=False)
    plain = make_requests(prompts, 1, 0)
    weights = tuple(1.0 / objectives for _ in range(objectives))
    guided = make_requests(prompts, 1, 0, weights)
    heads = random_heads(lm, objectives)
    single = SinglePassGuide(endless, heads, beta=10.0)
    prefix = PrefixGuide(endless, heads, top_k, beta=10.0)
    encoded = [prompt_ids(lm.tokenizer, p) for p in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(e)) + e for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])

    def by_generate() -> None:
        lm.model.generation_config.eos_token_id = None
        with torch.inference_mode():
            out = lm.model.generate(
                ids, attention_mask=mask, do_sample=True, top_k=top_k, top_p=1.0, temperature=1.0, max_new_tokens=tokens, pad_token_id=0
            )
        assert out.shape[1] == width + tokens, "generate stopped early: the comparison would not be fair"

    found: dict[str, Callable[[], None]] = {
        "plain": lambda: _full(generate(endless, plain, config), tokens),
        "single_pass": lambda: _full(generate(endless, guided, config, single), tokens),
        "generate": by_generate,
    }
    if with_prefix:
        found["prefix"] = lambda: _full(generate(endless, guided, config, prefix), tokens)
    return found


def _full(rollouts: list[Any], tokens: int) -> None:
    assert all(len(r.tokens) == tokens for r in rollouts), "a row stopped early: the comparison would not be fair"


def measure(timed: dict[str, Callable[[], None]], rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each way per round; one unmeasured round first. Stops after `budget` seconds, but not before two rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    begun = time.perf_counter()
    for index in range(rounds + 1):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - start)
        if index >= 2 and time.perf_counter() - begun > budget:
            break
    return seconds


def refill(lm: LanguageModel, prompts: int, cap: int, batch: int, top_k: int, objectives: int) -> dict[str, float]:
    """Plain and single-pass responses of one call, and of one call per batch of the same order."""
    chosen = sorted(load_prompts()[:prompts], key=lambda p: len(prompt_ids(lm.tokenizer, p)))
    config = Sampling(max_new_tokens=cap, top_k=top_k, batch_size=batch)
    breaks = frozenset(index for index in lm.tokenizer.get_vocab().values() if "\n" in lm.tokenizer.decode([index]))
    weights = tuple(1.0 / objectives for _ in range(objectives))
    result: dict[str, float] = {}
    for length, stops in (("paragraph", replace(lm, eos_ids=lm.eos_ids | breaks)), ("whole", lm)):
        for name, guide in (("plain", None), ("single_pass", SinglePassGuide(lm, random_heads(lm, objectives), beta=10.0))):
            requests = make_requests(chosen, 1, 0, weights if guide else None)
            speed, found = {}, {}
            for way, size in (("refill", len(requests)), ("by_batch", batch)):
                begun = time.process_time()
                calls = [generate(stops, requests[start : start + size], config, guide) for start in range(0, len(requests), size)]
                found[way] = [rollout.tokens for call in calls for rollout in call]
                speed[way] = sum(map(len, found[way])) / (time.process_time() - begun)
                quartiles = np.percentile(list(map(len, found[way])), [0, 25, 50, 75, 100])
                print(f"{length:<10} {name:<12} {way:<9} {speed[way]:7.1f} tokens/s   quartiles of the lengths {quartiles}", flush=True)
            differ = sum(a != b for a, b in zip(found["refill"], found["by_batch"], strict=True))
            assert differ <= 1 + len(chosen) // 32, f"{differ} responses differ, more than rounding explains"
            result |= {f"{length}_{name}_{way}": round(value, 1) for way, value in speed.items()}
            result[f"{length}_{name}_ratio"] = round(speed["refill"] / speed["by_batch"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer tokens and rounds")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--top_k", type=int, default=40)
    parser.add_argument("--objectives", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--refill", action="store_true", help="what it is worth to fill the places of finished rows")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--cap", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    lm = load_model(args.model)
    if args.refill:
        print(json.dumps(refill(lm, args.prompts, args.cap, args.batch, args.top_k, args.objectives)))
        return
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "model": args.model, "top_k": args.top_k, "objectives": args.objectives}
    for batch in (1, 8, 32):
        tokens = {1: 8, 8: 8, 32: 6}[batch] if args.quick else args.tokens
        timed = ways(lm, batch, tokens, args.top_k, args.objectives, with_prefix=batch == 1 or (batch == 8 and not args.quick))
        seconds = measure(timed, 2 if args.quick else args.rounds, 12.0 if args.quick else 300.0)
        for name, taken in seconds.items():
            speed = batch * tokens / statistics.median(taken)
            result[f"{name}_tokens_per_s_b{batch}"] = round(speed, 1)
            print(f"batch {batch:>2}  {name:<12} {speed:8.1f} tokens/s")
        for name, base in (("single_pass", "plain"), ("prefix", "plain"), ("plain", "generate")):
            if name in seconds:
                ratios = [b / a for a, b in zip(seconds[name], seconds[base], strict=True)]
                result[f"{name}_vs_{base}_b{batch}"] = round(statistics.median(ratios), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
