"""Demonstrations: conversations whose last turn is to be learnt, from rows with the columns that TRL reads, or from pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.data.files import find_files, read_rows
from equipoise.types import Message, Pair, Prompt, UserError


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A conversation and the answer that it is to have; assistant turns before it stand in the prompt."""

    id: str
    prompt: Prompt
    response: str
    finished: bool = True
    """Whether the response ended by itself; one that was cut at a cap is learnt without the token that ends a turn."""
    group: str = ""
    """What is held out together, where it isn't how the conversation begins."""


def load_demonstrations(places: Sequence[str], dropped: Counter[str]) -> list[Demonstration]:
    """Rows of these files, or of the Hub's data sets, with prompt and completion, or messages.

    A prompt is a text or a list of messages, a completion a text or a list with one message; of messages the last one is the
    answer. Equal conversations have equal prompt ids; rows with a blank answer are counted in `dropped`. Raises `UserError`
    naming a row that is none of these.
    """
    found: list[Demonstration] = []
    first_seen: dict[str, str] = {}
    files = [file for place in places for file in find_files(place)]
    for number, file in enumerate(files):
        for index, row in enumerate(read_rows(file)):
            try:
                *before, last = _conversation(row)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                need = "a prompt and a completion, or messages of which the last is the assistant's"
                raise UserError(f"{file}: row {index + 1} is no demonstration ({error}): it needs {need}") from None
            id = f"{number}-{index:05d}" if len(files) > 1 else f"{index:05d}"
            if last["content"].strip():
                prompt = Prompt(id=first_seen.setdefault(json.dumps(before), id), messages=tuple(before))
                found.append(Demonstration(id=id, prompt=prompt, response=last["content"].strip()))
            else:
                dropped["blank response"] += 1
    return found


def _conversation(row: dict[str, Any]) -> list[Message]:
    """At least one turn and the assistant's."""
    if row.get("messages"):
        turns = row["messages"]
    else:
        asked, said = row["prompt"], row["completion"]
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        turns += [{"role": "assistant", "content": said}] if isinstance(said, str) else said
    messages = [Message(role=turn["role"].strip(), content=turn["content"]) for turn in turns]
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not all(isinstance(m["content"], str) for m in messages):
        raise ValueError(f"its turns are {[m['role'] for m in messages]}")
    return messages


def from_pairs(pairs: Iterable[Pair], *, both: bool) -> list[Demonstration]:
    """The chosen responses, and with `both` the rejected ones after each."""
    sides = ("chosen", "rejected") if both else ("chosen",)
    return [Demonstration(id=f"{p.id}-{side}", prompt=p.prompt, response=getattr(p, side)) for p in pairs for side in sides]
