"""A server on the tiny model with values, a bank and a front, in a thread of its own, and the official client."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from openai import OpenAI

from equipoise.cli import main
from equipoise.serving.app import make_app
from equipoise.serving.command import Serve, service_of
from equipoise.serving.service import Limits, Service
from small_pipeline import REWARDS, command_lines, write_prompts

LIMITS = Limits(places=4, queue=40, prompt_tokens=60, max_tokens=48, responses=8, candidates=32, body_bytes=20_000, body_s=1.0)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, tiny_folder) -> Path:
    """A folder with a bank, values and a front of the tiny model."""
    out = tmp_path_factory.mktemp("served")
    for words in command_lines(out, tiny_folder, write_prompts(out / "prompts.jsonl")).values():
        assert main(words) == 0, words
    return out


@pytest.fixture(scope="session")
def settings(small_run, tiny_folder) -> Serve:
    return Serve(model=str(tiny_folder), runs=(small_run,), rewards=REWARDS, best_of=3, top_k=12, port=0, limits=LIMITS)


@pytest.fixture(scope="session")
def make_service(settings):
    """Services with other limits."""

    def make(**limits: float) -> Service:
        return service_of(replace(settings, limits=replace(LIMITS, **limits)))[0]

    return make


@contextlib.contextmanager
def serving(service: Service, about: dict, key: str | None = None) -> Iterator[str]:
    """The address of a server that runs as long as the block."""
    server = uvicorn.Server(uvicorn.Config(make_app(service, about, key), port=0, log_level="warning", timeout_keep_alive=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(settings) -> Service:
    return service_of(settings)[0]


@pytest.fixture(scope="session")
def address(settings, served) -> Iterator[str]:
    with serving(served, service_of(settings)[1]) as found:
        yield found


@pytest.fixture
def client(address) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)


def asked(text: str = "how do i make bread ?", **more) -> dict:
    """A chat request."""
    return {"model": "", "messages": [{"role": "user", "content": text}], "max_tokens": 8, "seed": 3} | more
