"""A real HTTP server in a thread that speaks the schema of OpenAI's chat completions, well or badly."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | tuple[int, dict[str, str], str | bytes] | None
"""The text of a good completion, (status, headers, body), or None for a connection that is dropped."""


@dataclass
class Server:
    """What was asked, and how it is answered: `answer(text of the last turn, number of this request)`."""

    answer: Callable[[str, int], Answer]
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Body, headers and time of each, in the order of arrival."""
    busy: int = 0
    busiest: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> list[str]:
        return [r["body"]["messages"][-1]["content"] for r in self.requests]


def completion(text: Any, finish: str = "stop", **more: Any) -> str:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], **more})


@contextlib.contextmanager
def serving(answer: Callable[[str, int], Answer]) -> Iterator[Server]:
    state = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.requests)
                state.requests.append(
                    {"body": body, "headers": {k.lower(): v for k, v in self.headers.items()}, "path": self.path, "time": time.monotonic()}
                )
                state.busy += 1
                state.busiest = max(state.busiest, state.busy)
            try:
                found = state.answer(body["messages"][-1]["content"], number)
            finally:
                with state.lock:
                    state.busy -= 1
            if found is None:
                self.close_connection = True
                return
            status, headers, content = (200, {}, completion(found)) if isinstance(found, str) else found
            payload = content.encode() if isinstance(content, str) else content
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that lost its patience
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def fenced(question: str) -> dict[str, str]:
    """The texts between a judge's marks: {"CONVERSATION": ..., "ANSWER A": ..., ...}."""
    found = re.findall(r"<<<(CONVERSATION|ANSWER(?: [AB])?) (\w{8})>>>\n(.*?)\n<<<END OF \1 \2>>>", question, re.DOTALL)
    return {name: text for name, _, text in found}


def longer_wins(question: str, number: int) -> str:
    """A fair judge: the longer answer wins, whatever its place."""
    found = fenced(question)
    a, b = len(found["ANSWER A"]), len(found["ANSWER B"])
    return f"They have {a} and {b} letters.\n[[{'A' if a > b else 'B' if b > a else 'tie'}]]"
