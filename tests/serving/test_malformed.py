"""A thousand malformed requests: no 5xx, no rows or ids left behind, memory stable."""

from __future__ import annotations

import json
import os
import random
import socket
import time
import urllib.error
import urllib.request

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from serving.conftest import asked

PATHS = ("/v1/chat/completions", "/v1/completions")


def post(address: str, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    """(status, the JSON that came back)."""
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def resident() -> float:
    """MiB of this process."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def empty(served) -> bool:
    """Whether nothing runs, waits or is remembered of any request, after a moment."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if served.engine.running + served.engine.waiting == 0 and served.engine.alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("path", PATHS)
def test_what_the_schema_forbids(address, served, path):
    """Hypothesis makes requests from the schema, right and wrong ones; none is answered with a 5xx, and errors have OpenAI's shape."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json").include(path=path)
    operation = schema[path]["POST"]
    counted = {"refused": 0, "all": 0}

    @settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def check(case):
        case.headers = {name: value for name, value in (case.headers or {}).items() if name.isascii()}
        answer = case.call(base_url=address, timeout=20)
        assert answer.status_code < 500, answer.text
        counted["all"] += 1
        if answer.status_code >= 400:
            counted["refused"] += 1
            assert {"message", "type", "param", "code"} == set(answer.json()["error"])

    check()
    assert counted["refused"] > 0.8 * counted["all"]
    assert empty(served)


def hostile(rng: random.Random) -> bytes:
    """A body that is wrong somewhere."""
    deep = "[" * rng.choice([50, 5000]) + "]" * 50
    values = [
        "NaN",
        "Infinity",
        "-1e999",
        "1" * 5000,
        "true",
        "null",
        '""',
        "{}",
        "[[]]",
        '"\\ud800"',
        '"\\u0000"',
        deep,
        '"' + "x" * 3000 + '"',
        "-0.0",
        "1e308",
    ]
    fields = [
        "n",
        "seed",
        "max_tokens",
        "temperature",
        "weights",
        "targets",
        "kl_budget",
        "beta",
        "stop",
        "messages",
        "method",
        "model",
        "stream",
        "prompt",
    ]
    body = json.dumps(asked(max_tokens=2)).rstrip("}")
    body += "".join(f', "{rng.choice(fields)}": {rng.choice(values)}' for _ in range(rng.randint(1, 3))) + "}"
    raw = body.encode()
    kind = rng.randint(0, 5)
    if kind == 0:
        return raw[: rng.randint(0, len(raw))]
    if kind == 1:
        at = rng.randint(0, len(raw) - 1)
        return raw[:at] + bytes([rng.choice([0xFF, 0xC0, 0x80, 0x00])]) + raw[at:]
    return raw


def test_a_thousand_hostile_bodies(address, served):
    """Wrong types, huge numbers, NaN, deep nesting, half characters, cut bodies, bad UTF-8: 4xx or an answer, and nothing is left."""
    rng, seen = random.Random(7), []
    for i in range(1000):
        if i == 500:
            assert empty(served)
            middle = resident()
        status, body = post(address, PATHS[i % 2], hostile(rng))
        assert status < 500, body
        assert ("error" in body) == (status >= 400)
        seen.append(status)
    assert empty(served)
    assert seen.count(200) < 500
    assert resident() - middle < 30


def test_bodies_that_never_end_and_clients_that_go(address, served):
    """A slow body is given up with 408; dropped connections, before and during an answer, leave no rows."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(asked(max_tokens=48, n=8)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(head + body[:10])
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    for cut in (len(head) // 2, len(head), len(head) + 20, len(head) + len(body)):
        with socket.create_connection((host, int(port)), timeout=20) as gone:
            gone.sendall((head + body)[:cut])
            time.sleep(0.05)
    assert empty(served)
    assert post(address, PATHS[0], json.dumps(asked()).encode())[0] == 200


def test_a_body_that_is_too_long(address):
    status, said = post(address, PATHS[0], b"x" * 30_000)
    assert status == 413
    assert "20000 bytes" in said["error"]["message"]


def test_other_methods_and_paths_have_errors_of_the_same_shape(address):
    assert post(address, "/v1/nothing", b"{}")[0] == 404
    status, said = post(address, "/health", b"{}")
    assert status == 405
    assert said["error"]["message"]
