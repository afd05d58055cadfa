"""The server as a process: kill -9 loses only what is in flight, SIGTERM finishes it, and bad settings end in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from openai import OpenAI

from equipoise.cli import main
from serving.conftest import asked
from small_pipeline import REWARDS


@contextlib.contextmanager
def started(small_run, tiny_folder, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in a process of its own, and its address."""
    settings = f"--model {tiny_folder} --runs [{small_run}] --rewards [{','.join(REWARDS)}] --port 0 --best_of 0"
    code = "import sys; from equipoise.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "serve", *settings.split()]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        try:
            said = next((line for line in process.stderr if line.startswith("serving ")), None)
            assert said, f"the server ended with {process.wait()}"
            yield process, said.split(" at ")[1].split()[0]
        finally:
            process.kill()


def client_of(address: str, key: str = "secret") -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=30)


def test_killed_it_comes_back_and_told_to_stop_it_finishes(small_run, tiny_folder):
    request = asked(extra_body={"weights": [0.3, 0.7]})
    with started(small_run, tiny_folder, EQUIPOISE_API_KEY="secret") as (process, address):
        said = client_of(address).chat.completions.create(**request).choices[0].message.content
        process.kill()
        process.wait()
    with started(small_run, tiny_folder, EQUIPOISE_API_KEY="secret") as (process, address):
        client = client_of(address)
        assert client.chat.completions.create(**request).choices[0].message.content == said
        stream = iter(client.chat.completions.create(**asked(max_tokens=150, n=4), stream=True))
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += stream
        assert [c.choices[0].index for c in chunks if c.choices[0].finish_reason] == [0, 1, 2, 3]
        process.wait(20)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=2)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of what a bad setting is answered."""
    assert main(["serve", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("equipoise: ")
    return said


def test_bad_settings_end_in_one_line(small_run, tiny_folder, tmp_path, capsys):
    model = ["--model", str(tiny_folder), "--rewards", f"[{','.join(REWARDS)}]"]
    runs = ["--runs", f"[{small_run}]"]
    assert "has nothing to serve" in refused([*model, "--runs", f"[{tmp_path}]"], capsys)
    assert "limits.places must be at least 1" in refused([*model, "--limits.places", "0"], capsys)
    assert "port below 65536" in refused([*model, "--port", "70000"], capsys)
    assert "can't be a method's name" in refused([*model, "--methods", "{reference: {messages: [brief=be brief]}}"], capsys)
    assert "isn't served" in refused([*model, "--methods", "{b: {messages: [brief=x], choice: {how: beam}}}"], capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"can't listen at 127.0.0.1:{port}" in refused([*model, *runs, "--port", port], capsys)
