"""What sharing batches is worth to many clients, and what the HTTP path costs.

    python benchmarks/serve.py [--clients 32] [--tokens 40] [--rounds 3] [--threads 1] [--quick]

SmolLM2-135M with value heads (randomly filled: what they cost doesn't depend on what they know). Each client asks once, with weights and a
seed of its own. In every round, in turn: all clients at once over HTTP, the same requests given to the engine itself, and one
client that asks for some of them one after the other, over HTTP. The client is a process of its own; the server runs in this one, as
`equipoise serve` does.

batching_gain        tokens per second of all clients at once by those of one client, over HTTP, median over rounds
overhead_vs_engine   seconds over HTTP by those of the engine itself, minus 1, median over rounds
as_alone             share of the responses that are, text by text, what their client gets alone

Seconds are the clock's; `cpu_` before a name says that they are the server's of the processor, which a busy machine disturbs least.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ASKED = (
    "How do I make bread?",
    "My neighbour plays loud music every night and I can't sleep. What can I do about it?",
    "Why is the sky blue?",
    "Write two sentences about the sea.",
    "What should I cook for six guests, two of whom don't eat meat, if I have only one hour and a small oven?",
)


def request(i: int, clients: int, tokens: int, scores: bool) -> dict[str, Any]:
    """What client i asks."""
    share = i / max(1, clients - 1)
    ours = {"method": "values", "weights": [share, 1 - share], "scores": scores}
    turn = {"role": "user", "content": ASKED[i % len(ASKED)]}
    return {"model": "smollm2", "messages": [turn], "max_tokens": tokens, "seed": i, "extra_body": ours}


def client(address: str) -> None:
    """Ask what a line of stdin says, at once or one after the other, and print the seconds and the texts."""
    from openai import AsyncOpenAI

    async def all_of(line: dict[str, Any]) -> dict[str, Any]:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as api:
            begun, gate = time.perf_counter(), asyncio.Semaphore(line["at_once"])

            async def one(asked: dict[str, Any]) -> tuple[str, int]:
                async with gate:
                    answer = await api.chat.completions.create(**asked)
                return answer.choices[0].message.content, answer.usage.completion_tokens

            found = await asyncio.gather(*(one(asked) for asked in line["requests"]))
            seconds = time.perf_counter() - begun
        return {"seconds": seconds, "texts": [text for text, _ in found], "tokens": sum(count for _, count in found)}

    for line in sys.stdin:
        print(json.dumps(asyncio.run(all_of(json.loads(line)))), flush=True)


def engine_alone(service: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """The same requests given to the engine."""
    from equipoise.serving.engine import Done
    from equipoise.serving.offers import Ask
    from equipoise.types import Message, Prompt

    ends: dict[int, Any] = {}
    over = threading.Event()

    def teller(i: int) -> Any:
        def tell(event: Any) -> None:
            if isinstance(event, Done):
                ends[i] = event.result
            if len(ends) == len(requests):
                over.set()

        return tell

    begun = time.perf_counter()
    for i, asked in enumerate(requests):
        turns = tuple(Message(**turn) for turn in asked["messages"])
        prompt, ours = Prompt(id=str(i), messages=turns), asked["extra_body"]
        drawn = {"seed": asked["seed"], "max_tokens": asked["max_tokens"], "weights": ours["weights"]}
        ask = Ask(id=str(i), prompt=prompt, ids=service.encode(prompt), **drawn)
        service.engine.submit(service.work(ask, service.offers["values"], teller(i), client=str(i), scores=ours["scores"]))
    if not over.wait(600):
        raise SystemExit("the engine didn't end")
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "texts": [ends[i].replies[0].reply.text for i in range(len(requests))]}


def measure(args: argparse.Namespace, service: Any, ask: Any) -> dict[str, Any]:
    """The rounds."""
    requests = [request(i, args.clients, args.tokens, args.scores) for i in range(args.clients)]
    few = requests[:: max(1, args.clients // args.alone)][: args.alone]
    ask(requests, args.clients)  # warm
    rounds = []
    for number in range(args.rounds):
        marks, found = [time.process_time()], []
        for run in (lambda: ask(requests, args.clients), lambda: engine_alone(service, requests), lambda: ask(few, 1)):
            found.append(run())
            marks.append(time.process_time())
        (http, engine, one), cpu = found, [after - before for before, after in itertools.pairwise(marks)]
        rate = {"all": http["tokens"] / http["seconds"], "one": one["tokens"] / one["seconds"]}
        rounds.append({"gain": rate["all"] / rate["one"], "overhead": http["seconds"] / engine["seconds"] - 1, **rate})
        rounds[-1]["cpu_gain"] = (http["tokens"] / cpu[0]) / (one["tokens"] / cpu[2])
        rounds[-1]["cpu_overhead"] = cpu[0] / cpu[1] - 1
        same = [text == http["texts"][requests.index(asked)] for asked, text in zip(few, one["texts"], strict=True)]
        rounds[-1]["as_alone"] = sum(same) / len(same)
        rounds[-1]["as_engine"] = sum(a == b for a, b in zip(http["texts"], engine["texts"], strict=True)) / len(requests)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in rounds[-1].items())
        print(f"round {number + 1}/{args.rounds}: {shown}", flush=True)
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    return {
        "batching_gain": median["gain"],
        "overhead_vs_engine": median["overhead"],
        "cpu_batching_gain": median["cpu_gain"],
        "cpu_overhead_vs_engine": median["cpu_overhead"],
        "as_alone": median["as_alone"],
        "as_engine": median["as_engine"],
        "tokens_per_s_all": median["all"],
        "tokens_per_s_one": median["one"],
        "clients": args.clients,
        "scores": args.scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", type=int, default=8, help="requests of the one client")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scores", action="store_true", help="score every response")
    parser.add_argument("--quick", action="store_true", help="one round of shorter responses")
    parser.add_argument("--client", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        return client(args.client)
    if args.quick:
        args.rounds, args.tokens, args.alone = 1, 16, 4
    import torch
    import uvicorn
    from random_models import random_heads

    from equipoise.models.loading import load_model
    from equipoise.serving.app import make_app
    from equipoise.serving.command import Serve, Served, service_of

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        heads = random_heads(load_model("smollm2"), 2)
        heads.save(Path(folder) / "values.safetensors")
        values = Served(values=folder, kl_budget=None, beta=0.5)
        service, about = service_of(Serve(methods={"values": values}, best_of=0))
    server = uvicorn.Server(uvicorn.Config(make_app(service, about), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    child = subprocess.Popen([sys.executable, __file__, "--client", address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(requests: list[dict[str, Any]], at_once: int) -> dict[str, Any]:
        assert child.stdin is not None
        assert child.stdout is not None
        print(json.dumps({"requests": requests, "at_once": at_once}), file=child.stdin, flush=True)
        return dict(json.loads(child.stdout.readline()))

    found = measure(args, service, ask)
    child.kill()
    server.should_exit = True
    print(json.dumps(found))


if __name__ == "__main__":
    main()
