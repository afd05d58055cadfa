"""Tokens per second of every way of decoding, as a ratio to the plain token loop on the same prompts in the same minutes.

    python benchmarks/decode.py [--quick] [--methods plain prefix ..] [--batches 1 8 32] [--objectives 2 3] [--threads 2]
    python benchmarks/decode.py --refill [--prompts 64] [--cap 128] [--batch 8]

plain          the token loop, no guide                       generate      transformers' `generate`
single_pass    heads on the policy's own states               prefix        heads on its states after each candidate
value_model    one value model of a seventh of the policy,    value_models  one such model for each objective
               a head for each objective                      reference     rowwise.py: those, one prompt at a time
mod, soup      LoRA adapters of rank 16, mixed by logits or   genarm, parm  reward models of a seventh of the policy
               weights, routed by row beside the policy       args_vas      scorers of that size, one for each objective
prompts        a system message for each objective            best_of_4, segments, beams_4    rewards that cost nothing

Two objectives, and `_k3` with three; `_bf16`: value models in bfloat16. Every way makes the same number of tokens per row (the end
of turn is switched off), from the same ragged prompts, with the same top k, and everything is randomly filled: what it costs
doesn't depend on what it knows. Ways take turns within a round; `vs plain` is the median over rounds of plain's seconds by a way's,
of the clock and of the processor, which a busy machine disturbs least. Prompts are part of what is timed. Forwards are tokens
run per response, by the policy and by all else. The last line is JSON.

`--refill` measures instead what it is worth that waiting prompts take the places of finished rows: all requests in one call
against a call per batch, in seconds of the processor, for responses of very different lengths (the first paragraph) and for
whole ones, most of which run into the cap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from decode_methods import Cost, Methods, Way
from random_models import random_heads

from equipoise.data.prompts import load_prompts
from equipoise.decoding.value_guided import SinglePassGuide
from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import LanguageModel, load_model
from equipoise.rollouts import make_requests

_REFERENCES = ("reference", "reference_bf16")
_AGAINST = ("value_model", "value_models", "value_model_bf16")
"""What does the same as the stand-ins, which have two objectives."""
QUICK = {1: ("plain", "single_pass", "generate", "prefix", "value_models", "reference"), 8: ("plain", "single_pass", "generate")}
QUICK_TOKENS = 8


@dataclass(frozen=True)
class Run:
    """One call's seconds, of the clock and of the processor, and what it cost."""

    wall: float
    cpu: float
    cost: Cost


def timed(way: Way, tokens: int) -> Run:
    wall, cpu = time.perf_counter(), time.process_time()
    cost = way(tokens)
    return Run(time.perf_counter() - wall, time.process_time() - cpu, cost)


def measure(ways: Mapping[str, Way], tokens: int, rounds: int, budget: float) -> dict[str, dict[int, Run]]:
    """Each way's runs by round. A way sits out once it has had its share of the `budget`, in seconds; plain goes on beside the others."""
    found: dict[str, dict[int, Run]] = {name: {} for name in ways}
    for index in range(rounds):
        due = {name for name, runs in found.items() if sum(run.wall for run in runs.values()) < budget / len(ways)}
        for name in ways if due - {"plain"} or len(ways) == 1 else ():
            if name in due or name == "plain":
                found[name][index] = timed(ways[name], tokens)
                print(f"round {index + 1}: {name} {found[name][index].wall:.1f} s", file=sys.stderr, flush=True)
    return found


def report(found: Mapping[str, Mapping[int, Run]], batch: int, tokens: int) -> dict[str, float]:
    """Print a line per way, and return what the JSON has of them."""
    result: dict[str, float] = {}

    def ratio(name: str, to: str, kind: str) -> float:
        shared = found[name].keys() & found[to].keys()
        return round(statistics.median(getattr(found[to][i], kind) / getattr(found[name][i], kind) for i in shared), 3)

    for name, runs in found.items():
        cost = next(iter(runs.values())).cost
        speed = batch * tokens / statistics.median(run.wall for run in runs.values())
        base, guide = cost.base / cost.responses, cost.guide / cost.responses
        result |= {f"{name}_tokens_per_s_b{batch}": round(speed, 1)}
        result |= {f"{name}_base_forwards_b{batch}": round(base, 1), f"{name}_guide_forwards_b{batch}": round(guide, 1)}
        line = f"batch {batch:>2}  {name:<20} {speed:8.1f} tokens/s"
        if name != "plain" and "plain" in found:
            wall, cpu = ratio(name, "plain", "wall"), ratio(name, "plain", "cpu")
            result |= {f"{name}_vs_plain_b{batch}": wall, f"{name}_cpu_vs_plain_b{batch}": cpu}
            line += f"   vs plain {wall:5.2f} (processor {cpu:5.2f})"
        print(f"{line:<80}   forwards {base:7.1f} + {guide:7.1f}   {len(runs)} rounds", flush=True)
    pairs = [("plain", "generate", "plain_vs_generate")]
    pairs += [(name, to, f"{name}_gain_over_{to}") for name in found for to in _REFERENCES if name in _AGAINST]
    for name, to, key in pairs:
        if {name, to} <= found.keys():
            wall, cpu = ratio(name, to, "wall"), ratio(name, to, "cpu")
            result |= {f"{key}_b{batch}": wall, f"{key}_cpu_b{batch}": cpu}
            print(f"batch {batch:>2}  {name} makes {wall:.2f} times the tokens/s of {to} (processor {cpu:.2f})")
    return result


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


def decode(lm: LanguageModel, args: argparse.Namespace) -> dict[str, Any]:
    """All batch sizes."""
    methods, result = Methods(lm, load_prompts()[: max(args.batches)], args.top_k), {}
    ready: set[str] = set()
    for batch in args.batches:
        makers, of_one = ({name: make for k in args.objectives for name, make in methods.ways(n, k).items()} for n in (batch, 1))
        asked = args.methods or (QUICK.get(batch, QUICK[8]) if args.quick else tuple(makers))
        if lost := [name for name in asked if name not in makers]:
            raise SystemExit(f"unknown method {lost[0]!r}; known: {', '.join(makers)}")
        ways = {name: makers[name]() for name in makers if name in asked}
        for name in [name for name in ways if name not in ready]:  # what is built and allocated at the first use isn't timed
            of_one[name]()(2)
            if name == "reference":
                methods.check_reference()
            ready.add(name)
        tokens = QUICK_TOKENS if args.quick else (args.tokens if batch < 32 else args.tokens // 2)
        found = measure(ways, tokens, 2 if args.quick else args.rounds, 20.0 if args.quick else args.budget)
        result |= report(found, batch, tokens)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute: few ways, few tokens")
    parser.add_argument("--methods", nargs="+", default=[], help="only these; plain among them gives ratios")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--objectives", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=32, help="half of it from batch 32 on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for each batch size, of which a way's first run may take more")
    parser.add_argument("--top_k", type=int, default=40)
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
        print(json.dumps(refill(lm, args.prompts, args.cap, args.batch, args.top_k, args.objectives[0])))
        return
    settings = {"threads": torch.get_num_threads(), "model": args.model, "top_k": args.top_k, "objectives": args.objectives}
    print(json.dumps(settings | decode(lm, args)))


if __name__ == "__main__":
    main()
