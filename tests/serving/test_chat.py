"""The terminal chat: the same controls over a server, and every mistake a line."""

from __future__ import annotations

import json

import pytest

from equipoise.cli import main
from equipoise.serving.chat import State
from small_pipeline import REWARDS


def said(address: str, lines: list[str], monkeypatch, capsys, **settings: str) -> str:
    """What the chat answers to these lines."""
    waiting = iter(lines)

    def typed(sign: str = "") -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert main(["chat", *(["--url", address] if address else []), *words]) == 0
    return capsys.readouterr().out


def test_weights_targets_and_two_answers(address, monkeypatch, capsys):
    lines = ["/weights brief=0.2,diverse=0.8", "/kl 0.5", "/seed 3", "/length 8", "how do i make bread ?"]
    first = said(address, lines, monkeypatch, capsys)
    assert "values · seed 3 · multipliers brief" in first
    assert "KL " in first
    assert said(address, lines, monkeypatch, capsys) == first  # the seed fixes the answer
    both = said(address, [*lines[:-1], "/compare 1,0", "how do i make bread ?"], monkeypatch, capsys)
    assert "at 1,0:" in both
    assert both.count("multipliers") == 2
    asked = said(address, ["/targets brief>=+0.2sd", "/kl", "how do i make bread ?"], monkeypatch, capsys)
    assert "palette" in asked


def test_the_conversation_goes_on_and_can_be_asked_again(served, address, monkeypatch, capsys):
    seen = []
    conclude = served.engine._conclude
    monkeypatch.setattr(served.engine, "_conclude", lambda works: seen.extend(w.about.ask for w in works) or conclude(works))
    said(address, ["/seed 1", "/length 4", "why ?", "when ?", "/again", "/new", "what ?"], monkeypatch, capsys)
    roles = [[m["role"] for m in ask.prompt.messages] for ask in seen]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"], ["user"]]
    assert seen[1].prompt.messages == seen[2].prompt.messages


def test_mistakes_are_a_line_and_lose_nothing(address, monkeypatch, capsys):
    lines = ["/weights a b", "/nothing", "/kl much", "/weights brief=0.5,diverse=0.9", "why ?", "/weights 0.5,0.5", "/length 4", "why ?"]
    found = said(address, lines, monkeypatch, capsys)
    for part in ("can't read the weights 'a b'", "there is no /nothing", "/kl takes a number", "sum to 1.4, not 1", "multipliers"):
        assert part in found


def test_without_a_server(monkeypatch, capsys):
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 2
    assert "start one with `equipoise serve`" in capsys.readouterr().err


def test_with_a_server_of_its_own(small_run, tiny_folder, monkeypatch, capsys):
    settings = {"model": str(tiny_folder), "runs": f"[{small_run}]", "rewards": f"[{','.join(REWARDS)}]", "weights": "1,0", "length": "4"}
    found = said("", ["/methods", "/explain", "why ?", "/quit"], monkeypatch, capsys, **settings)
    assert "values           reads weights, kl_budget, beta" in found
    assert "multipliers brief" in found


@pytest.mark.parametrize(
    ("state", "body"), [({"weights": "a=1"}, {"weights": {"a": 1.0}}), ({"targets": "a>=1", "weights": "1"}, {"targets": "a>=1"})]
)
def test_a_request_holds_what_was_set(state, body):
    assert json.loads(json.dumps(State(**state).body(state.get("weights", "")))) == {
        "messages": [],
        "max_tokens": 80,
        "explain": False,
        **body,
    }
