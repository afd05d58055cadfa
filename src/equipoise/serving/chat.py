"""The command `chat`: a conversation in the terminal, with the trade-off at hand, over a server that runs or one of its own.

What is typed is said to the model; lines that begin with / set the trade-off:

    /weights helpful=0.7,harmless=0.3    /targets helpful>=q70 harmless>=keep    /method values    /kl 2    /beta 0.5
    /compare helpful=0,harmless=1 (a second answer at these weights; /compare alone ends it)       /explain (what pushed each token)
    /again    /seed 7    /length 80    /new    /methods    /help    /quit
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from equipoise.serving.command import KEY, Serve, listening, server_of
from equipoise.types import UserError

COLOURS = ("dodger_blue2", "dark_orange", "green4", "magenta", "gold3", "cyan")
FAINT = 0.1
"""Nats below which a token isn't coloured."""


@dataclass(frozen=True, kw_only=True)
class Chat(Serve):
    """Chat in the terminal, the trade-off at hand: with a server that runs, or with what these settings serve."""

    url: str = ""
    """Address of a running server, as http://127.0.0.1:8000; empty to load what the other settings say."""
    weights: str = ""
    """Weights to begin with, as helpful=0.7,harmless=0.3."""
    length: int = 80
    """Longest answer, in tokens."""


def chat(config: Chat) -> None:
    """Read lines until the end or /quit."""
    console = Console(highlight=False, soft_wrap=True)
    if config.url:
        return Conversation(Client(config.url, os.environ.get(KEY)), console, config).read()
    server, service = server_of(config)
    socket = listening(config, port=0)
    thread = threading.Thread(target=lambda: server.run(sockets=[socket]), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        Conversation(Client(f"http://{config.host}:{socket.getsockname()[1]}", os.environ.get(KEY)), console, config).read()
    finally:
        server.should_exit = True
        thread.join(10)
        service.engine.close(1)


class Client:
    """Asks a server."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def get(self, path: str) -> dict[str, Any]:
        """What lies at a path."""
        with self._open(urllib.request.Request(self._url + path, headers=self._headers)) as answer:
            return dict(json.load(answer))

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer. Raises `UserError` with the server's words where it refuses, or isn't there."""
        data = json.dumps({**body, "stream": True}).encode()
        with self._open(urllib.request.Request(f"{self._url}/v1/chat/completions", data, self._headers)) as lines:
            for line in lines:
                said = line.decode().strip().removeprefix("data: ")
                if said and said != "[DONE]":
                    chunk = json.loads(said)
                    if "error" in chunk:
                        raise UserError(chunk["error"]["message"])
                    yield chunk

    @contextlib.contextmanager
    def _open(self, request: urllib.request.Request) -> Iterator[Any]:
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            try:
                said = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                said = f"status {error.code}"
            raise UserError(said) from None
        except OSError as error:
            raise UserError(f"no server at {self._url} ({getattr(error, 'reason', error)}): start one with `equipoise serve`") from None


@dataclass
class State:
    """How the next answer is asked for."""

    weights: str = ""
    other: str = ""
    """Of a second answer beside it."""
    targets: str = ""
    method: str = ""
    kl: float | None = None
    beta: float | None = None
    seed: int | None = None
    length: int = 80
    explain: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self, weights: str) -> dict[str, Any]:
        """The request; weights and targets can't both be in it."""
        found: dict[str, Any] = {"messages": self.messages, "max_tokens": self.length, "explain": self.explain}
        found |= {"seed": self.seed} if self.seed is not None else {}
        found |= {"method": self.method} if self.method else {}
        found |= {"targets": self.targets} if self.targets else {"weights": _weights(weights)} if weights else {}
        found |= {"kl_budget": self.kl} if self.kl is not None else {}
        return found | ({"beta": self.beta} if self.beta is not None else {})


def _weights(text: str) -> dict[str, float] | list[float]:
    parts = [part.partition("=") for part in text.replace(" ", ",").split(",") if part]
    try:
        if all(sign for _, sign, _ in parts):
            return {name: float(value) for name, _, value in parts}
        return [float(name) for name, _, _ in parts]
    except ValueError:
        raise UserError(f"can't read the weights {text!r}: write helpful=0.7,harmless=0.3 or 0.7,0.3") from None


class Conversation:
    """Lines in, answers out."""

    def __init__(self, client: Client, console: Console, config: Chat) -> None:
        self._client, self._console = client, console
        self._about = client.get("/v1/equipoise")
        self._longest = min(config.length, self._about["limits"]["max_tokens"])
        self._state = State(weights=config.weights, length=self._longest)

    def read(self) -> None:
        """Until the input ends or somebody quits; what is wrong is said in a line, and nothing is lost by it."""
        self._console.print(f"[bold]{escape(self._about['model'])}[/] between {', '.join(self._about['objectives'])}. /help says how.")
        while True:
            try:
                line = input(self._sign() if sys.stdin.isatty() else "").strip()
                if line in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    self._command(*line[1:].partition(" ")[::2])
                elif line:
                    self._say(line)
            except UserError as error:
                self._console.print(f"[red]{escape(str(error))}[/]")
            except KeyboardInterrupt:
                self._console.print()
            except EOFError:
                return

    def _sign(self) -> str:
        how = self._state.targets or self._state.weights or self._state.method or "reference"
        return f"[{how}] > "

    def _say(self, text: str) -> None:
        self._state.messages.append({"role": "user", "content": text})
        try:
            self._answers()
        except (UserError, KeyboardInterrupt):
            self._state.messages.pop()  # nothing was answered
            raise

    def _answers(self) -> None:
        if self._state.seed is None and self._state.other:
            self._state.seed = 0  # of two answers, the weights alone should differ
        said = self._answer(self._state.weights)
        if self._state.other:
            self._console.print(f"[dim]at {escape(self._state.other)}:[/]")
            self._answer(self._state.other)
        self._state.messages.append({"role": "assistant", "content": said})

    def _answer(self, weights: str) -> str:
        said, last = "", dict[str, Any]()
        for chunk in self._client.stream(self._state.body(weights)):
            for choice in chunk["choices"]:
                said += choice["delta"].get("content") or ""
                ours = choice.get("equipoise") or {}
                if choice["finish_reason"]:
                    last = ours
                elif ours.get("push"):
                    for token in ours["push"]:
                        self._console.print(self._coloured(token), end="")
                else:
                    self._console.print(escape(choice["delta"].get("content") or ""), end="")
        self._console.print()
        self._console.print(f"[dim]{escape(_facts(last))}[/]")
        return said

    def _coloured(self, token: Mapping[str, Any]) -> str:
        """A token in the colour of the objective that pushed it most, underlined where it was pushed down."""
        text, nats = escape(token["token"]), dict(token["nats"])
        name = max(nats, key=lambda k: abs(nats[k]), default="")
        if not name or abs(nats[name]) < FAINT:
            return text
        colour = COLOURS[list(nats).index(name) % len(COLOURS)]
        return f"[{colour}{' underline' if nats[name] < 0 else ''}]{text}[/]"

    def _command(self, name: str, value: str) -> None:
        value, state = value.strip(), self._state
        numbers: dict[str, tuple[str, Callable[[str], Any]]] = {
            "kl": ("kl", float),
            "beta": ("beta", float),
            "seed": ("seed", int),
            "length": ("length", int),
        }
        if name in ("weights", "compare", "targets", "method"):
            if name in ("weights", "compare"):
                _weights(value)
            setattr(state, {"compare": "other"}.get(name, name), value)
            if name in ("weights", "targets") and value:  # one of them counts
                setattr(state, {"weights": "targets", "targets": "weights"}[name], "")
        elif name in numbers:
            target, read = numbers[name]
            try:
                setattr(state, target, read(value) if value else self._longest if name == "length" else None)
            except ValueError:
                raise UserError(f"/{name} takes a number, not {value!r}") from None
        elif name == "explain":
            state.explain = not state.explain
        elif name == "new":
            state.messages.clear()
        elif name == "again" and state.messages:
            text = [m["content"] for m in state.messages if m["role"] == "user"][-1]
            while state.messages and state.messages.pop()["role"] != "user":
                pass
            self._say(text)
        elif name == "methods":
            for method in self._about["methods"]:
                self._console.print(f"{method['method']:<16} reads {', '.join(method['reads']) or 'nothing'}: {escape(method['about'])}")
        elif name == "help":
            self._console.print(escape("\n".join((__doc__ or "").strip().splitlines()[2:])))
        else:
            raise UserError(f"there is no /{name}: /help lists what there is")


def _facts(said: Mapping[str, Any]) -> str:
    """An answer's numbers in a line."""
    shown = [f"{name} {value:+.2f} sd" if value is not None else f"{name} unscored" for name, value in said.get("scores", {}).items()]
    shown += [f"KL {said['kl']:.2f} nats", f"{said['tokens']} tokens"] if "kl" in said else []
    answer = said.get("answer", {})
    shown += [answer["method"], f"seed {answer['seed']}"] if answer else []
    if answer.get("multipliers"):
        shown.append("multipliers " + ", ".join(f"{name} {value:.3g}" for name, value in answer["multipliers"].items()))
    return " · ".join(shown)
