"""Milliseconds a step, memory and bandwidth of plain and guided decoding at the sizes of MAVIS, on a GPU.

    python benchmarks/decode_gpu.py [--batches 1 8 64] [--methods plain single_pass value_model ..] [--tokens 64] [--rounds 3]

The policy has the shape of Llama-2 7B, the value models that of TinyLlama 1.1B; both are filled with random bfloat16 numbers
where they run, so no weights are needed. Ways are those of `decode.py`; `value_model` is the prefix form with one model of two
heads, `value_models` with a model for each of two objectives. Goals at batch 1: single_pass at most 1.1 times plain, the prefix
form at most 1.5 times. A step is (seconds of a call - seconds of a call for one token) / (tokens - 1), so prompts aren't in it.
Memory is a way's own weights and the most that its call takes beside them.

    bytes a step    the weights once (of the embedding table only the tokens' rows, left out) and every row's keys and values
    operations      2 for each weight and token that is run
    at best         the larger of bytes / bandwidth and operations / rate, both measured: by a copy, which reads and writes each byte,
                    and by a product of square matrices

Without a GPU everything is run at a toy size on the processor, which shows that it runs and says nothing about the goals. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from decode_methods import Methods
from random_models import Shape, fill, llama_config

from equipoise.models.chat import PLAIN_TEMPLATE, prompt_ids
from equipoise.models.loading import LanguageModel
from equipoise.tiny import SPECIAL, build_tokenizer
from equipoise.types import Message, Prompt

SEVEN = Shape(layers=32, width=4096, inner=11008, heads=32, kv_heads=32, tied=False)
ONE = Shape(layers=22, width=2048, inner=5632, heads=32, kv_heads=4, tied=False)
TOY_POLICY = Shape(layers=4, width=256, inner=688, heads=8, kv_heads=8, tied=False)
TOY_VALUE = Shape(layers=2, width=128, inner=344, heads=8, kv_heads=2, tied=False)
GUIDES = {"plain": 0, "generate": 0, "single_pass": 0, "value_model": 1, "value_models": 2}
"""How many value models a way runs."""
TOP_K = 40


def backbone_weights(shape: Shape) -> int:
    """Parameters that every token of a step meets, without embeddings and vocabulary projection."""
    attention = 2 * shape.width**2 + 2 * shape.width * (shape.width // shape.heads) * shape.kv_heads
    return shape.layers * (attention + 3 * shape.width * shape.inner + 2 * shape.width) + shape.width


def cache_numbers(shape: Shape, tokens: float) -> float:
    """Keys and values of one row of so many tokens."""
    return 2 * shape.layers * shape.kv_heads * (shape.width // shape.heads) * tokens


def step_bytes(policy: Shape, value: Shape, models: int, vocabulary: int, rows: int, tokens: float, size: int) -> float:
    """Bytes that a step has to read: weights and caches of the policy and of its value models, `size` bytes a number."""
    own = backbone_weights(policy) + vocabulary * policy.width + rows * cache_numbers(policy, tokens)
    return size * (own + models * (backbone_weights(value) + rows * cache_numbers(value, tokens)))


def held_bytes(policy: Shape, value: Shape, models: int, vocabulary: int, size: int) -> float:
    """Bytes of all weights, embeddings among them."""
    own = backbone_weights(policy) + 2 * vocabulary * policy.width
    return size * (own + models * (backbone_weights(value) + vocabulary * value.width))


def step_operations(policy: Shape, value: Shape, models: int, vocabulary: int, rows: int, candidates: int) -> float:
    """Multiplications and additions of a step's matrices: one token a row of the policy, all candidates of each value model."""
    own = backbone_weights(policy) + vocabulary * policy.width
    return 2.0 * rows * (own + models * candidates * backbone_weights(value))


def at_best(step: float, operations: float, bandwidth: float, rate: float) -> float:
    """Seconds below which no step can be."""
    return max(step / bandwidth, operations / rate)


def _seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call, after one that isn't counted."""
    found = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def device_limits(device: str) -> tuple[float, float]:
    """(bytes per second of a copy, operations per second of a product in bfloat16)."""
    count, side = (2**30, 8192) if device == "cuda" else (2**27, 512)
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    square = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    return 2 * count / _seconds(lambda: target.copy_(source)), 2.0 * side**3 / _seconds(lambda: square @ square)


def build_policy(shape: Shape, vocabulary: int, device: str) -> LanguageModel:
    tokenizer = build_tokenizer((*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))))
    tokenizer.chat_template = PLAIN_TEMPLATE
    model = fill(llama_config(shape, vocabulary, 4096), "causal", torch.bfloat16, device, 0)
    held = sum(p.numel() for p in model.parameters())
    assert 2 * held == held_bytes(shape, shape, 0, vocabulary, size=2), "the arithmetic is of another model"
    return LanguageModel(model, tokenizer, "random policy", "seed 0")


def mixed_prompts(count: int, vocabulary: int) -> list[Prompt]:
    """Of 64 to 128 random words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, vocabulary - len(SPECIAL), size=n)) for n in rng.integers(64, 129, size=count)]
    return [Prompt(id=str(i), messages=(Message(role="user", content=text),)) for i, text in enumerate(texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--methods", nargs="+", default=list(GUIDES), choices=list(GUIDES), help="plain is always among them")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens is at least 2: a step is what a further token takes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, value, vocabulary = (SEVEN, ONE, 32000) if device == "cuda" else (TOY_POLICY, TOY_VALUE, 2048)
    said = torch.cuda.get_device_name() if device == "cuda" else "no GPU: toy sizes on the processor, which say nothing about the goals"
    bandwidth, rate = device_limits(device)
    print(f"{said}; a copy moves {bandwidth / 1e9:.0f} GB/s, a product does {rate / 1e12:.2f} Tflop/s", flush=True)
    lm, result = build_policy(policy, vocabulary, device), {"device": said, "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    methods = Methods(lm, mixed_prompts(max(args.batches), vocabulary), TOP_K, small=value)
    for batch in args.batches:
        result |= decode(methods, policy, value, vocabulary, batch, args, (bandwidth, rate))
    print(json.dumps(result))


def decode(
    methods: Methods, policy: Shape, value: Shape, vocabulary: int, batch: int, args: argparse.Namespace, limits: tuple[float, float]
) -> dict[str, Any]:
    """All ways at one batch size, which take turns."""
    names = ["plain", *(name for name in args.methods if name != "plain")]
    ways, makers = {}, methods.ways(batch, 2)
    steps: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, float] = {}
    for name in names:
        ways[name] = makers[name]()
        ways[name](2)
    for _ in range(args.rounds):
        for name, way in ways.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            long, short = (_seconds(lambda way=way, n=n: way(n), 1) for n in (args.tokens, 1))
            steps[name].append((long - short) / (args.tokens - 1))
            if torch.cuda.is_available():  # other ways' models are on the device too
                own = held_bytes(policy, value, GUIDES[name], vocabulary, size=2)
                memory[name] = (torch.cuda.max_memory_allocated() - before + own) / 2**30
    lengths = [len(prompt_ids(methods.lm.tokenizer, p)) for p in methods.prompts[:batch]]
    tokens, result = float(np.mean(lengths)) + args.tokens / 2, {}
    for name, found in steps.items():
        step = statistics.median(found)
        times = statistics.median(a / b for a, b in zip(found, steps["plain"], strict=True))
        read = step_bytes(policy, value, GUIDES[name], vocabulary, batch, tokens, size=2)
        best = at_best(read, step_operations(policy, value, GUIDES[name], vocabulary, batch, TOP_K), *limits)
        held = f"{memory[name]:6.2f} GiB   " if memory else ""
        print(
            f"batch {batch:>2}  {name:<13} {1e3 * step:8.2f} ms a step, {times:5.2f} times plain   {batch / step:8.1f} tokens/s   "
            f"{held}{read / step / 1e9:7.1f} GB/s   at best {1e3 * best:7.2f} ms ({best / step:4.0%})",
            flush=True,
        )
        figures = {"ms_a_step": 1e3 * step, "times_plain": times, "gb_per_s": read / step / 1e9, "of_best": best / step}
        result |= {f"{name}_{key}_b{batch}": round(figure, 3) for key, figure in figures.items()}
        if memory:
            result[f"{name}_gib_b{batch}"] = round(memory[name], 2)
    return result


if __name__ == "__main__":
    main()
