"""Numbers in a prompt, and out of it again: scores that an answer is to have (RiC), or weights (a policy that reads them).

    what is h2o                        user's text, then an empty line, then the numbers by name
                                       in the last user turn:
    <helpful> 0.5 <harmless> -1.0

They stand at the end of the last user turn. A system turn isn't taken by every chat template, and where a template has one of its
own (SmolLM2, Qwen) ours would replace it, so that a policy would differ from its reference by more than the numbers. At the end they are
the last thing read before the answer, they stay when a long prompt loses its beginning, everything before them is the same for all
numbers, and nothing that a user writes can stand behind them.

Users write what they like. Of a text, `s` is what is left without escape characters (a backslash, as a rule). Where a guarded string
(a marker, or a special token of the tokenizer, in any case) stands in `s`, one escape more goes behind its first character; to read it
back one goes away at the same places, which `s` alone decides. So the text that is written holds no guarded string, whatever the
user wrote, an ordinary text stays as it is, and

    decode(encode(prompt, z)) = (prompt, z rounded)        encode(decode(x)) = x        for every x that encode wrote.

Format: RiC (arXiv 2402.10207) writes "<rm1_score> 0.5 <rm2_score> -1.0 " after two spaces, in the order of its rewards; `RELEASED`
does, given those names. Departures: names in place of numbers, so that another order or another set is seen; -0.0 is written 0.0.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from equipoise.models.chat import special_strings
from equipoise.types import Message, Prompt, Request, UserError

_NAME = re.compile(r"[\w.-]+")
_ESCAPES = "\\~^`"


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How numbers are written into a prompt."""

    decimals: int = 1
    """Digits after the point."""
    before: str = "\n\n"
    """Between the user's text and the numbers."""
    after: str = ""
    """Behind them."""
    specials: tuple[str, ...] = ()
    """Strings that a user's text must not hold, besides the markers: the tokenizer's special tokens (`special_strings`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.decimals <= 15:
            raise UserError(f"numbers are written with 0 to 15 decimals, not {self.decimals}")
        if self.before in ("", " ") or self.before.strip() or self.after.strip():  # one space stands between the numbers themselves
            raise UserError(f"numbers stand between blanks, more than one space before them; got {self.before!r} and {self.after!r}")


RELEASED = Wording(before="  ", after=" ")
"""As RiC's released code writes them, where the names are rm1_score, rm2_score, ..."""


def encode(prompt: Prompt, numbers: Mapping[str, float], wording: Wording | None = None) -> Prompt:
    """The prompt with these numbers, rounded, in the order given; the id stays.

    Raises `UserError` for no numbers, one that isn't finite, a name that has blanks or brackets, and a conversation that doesn't end
    with a user's turn.
    """
    wording = wording or Wording()
    if not prompt.messages or prompt.messages[-1]["role"] != "user":
        last = prompt.messages[-1]["role"] if prompt.messages else "nothing"
        raise UserError(f"prompt {prompt.id!r} ends with {last}: numbers are written into a user's turn, which has to be the last")
    if not numbers:
        raise UserError(f"prompt {prompt.id!r}: no numbers to write")
    for name, value in numbers.items():
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} can't be a marker: a name has letters, digits and any of _ . - alone")
        if any(special in f"<{name}>" for special in wording.specials):
            raise UserError(f"<{name}> is one of the tokenizer's special tokens: give the objective another name")
        if not math.isfinite(value):
            raise UserError(f"prompt {prompt.id!r}: {name} is {value}; only finite numbers are written")
    guard = _Guard(guarded(numbers, wording.specials))
    messages = [Message(role=m["role"], content=guard.escape(m["content"])) for m in prompt.messages]
    line = " ".join(f"{marker} {_written(value, wording)}" for marker, value in zip(_markers(numbers), numbers.values(), strict=True))
    messages[-1] = Message(role="user", content=f"{messages[-1]['content']}{wording.before}{line}{wording.after}")
    return replace(prompt, messages=tuple(messages))


def decode(prompt: Prompt, wording: Wording | None = None) -> tuple[Prompt, dict[str, float]]:
    """(the prompt as the user wrote it, the numbers as they were written). Raises `UserError` where `encode` didn't write it."""
    wording = wording or Wording()
    number = "-?[0-9]+" + (rf"\.[0-9]{{{wording.decimals}}}" if wording.decimals else "")
    entry = rf"<{_NAME.pattern}> {number}"
    shape = rf"(.*){re.escape(wording.before)}({entry}(?: {entry})*){re.escape(wording.after)}"
    found = re.fullmatch(shape, prompt.text, re.DOTALL)
    if not found or prompt.messages[-1]["role"] != "user":
        raise UserError(f"prompt {prompt.id!r} has no numbers at its end: it wasn't written by `encode`, or with another wording")
    text, line = found.groups()
    numbers = {name: float(value) for name, value in re.findall(rf"<({_NAME.pattern})> ({number})", line)}
    guard = _Guard(guarded(numbers, wording.specials))
    turns = [*prompt.messages[:-1], Message(role="user", content=text)]
    messages = tuple(Message(role=m["role"], content=guard.unescape(m["content"])) for m in turns)
    plain = replace(prompt, messages=messages)
    if encode(plain, numbers, wording) != prompt:
        raise UserError(f"prompt {prompt.id!r} wasn't written by `encode`, or with another wording: writing it again gives another text")
    return plain, numbers


def weights_in_prompt(tokenizer: Any, objectives: Sequence[str]) -> Callable[[Request], Prompt]:
    """A request to the prompt that says its weights, to two decimals: what a policy that reads them there is trained and served on."""
    wording = Wording(decimals=2, specials=special_strings(tokenizer))

    def asked(request: Request) -> Prompt:
        assert request.weights is not None, "only requests with weights reach a tuned policy"
        return encode(request.prompt, dict(zip(objectives, request.weights, strict=True)), wording)

    return asked


def guarded(names: Iterable[str], specials: Sequence[str]) -> list[str]:
    """What a user's text must not hold, in any case: the markers of these names, and the special tokens."""
    return [*_markers(names), *specials]


def _markers(names: Iterable[str]) -> list[str]:
    return [f"<{name}>" for name in names]


def _written(value: float, wording: Wording) -> str:
    text = f"{value:.{wording.decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


class _Guard:
    """Keeps strings out of a text, and lets the text be had back."""

    def __init__(self, guarded: Sequence[str]) -> None:
        free = [mark for mark in _ESCAPES if not any(mark in text for text in guarded)]
        if not free:
            raise UserError(f"the special tokens hold all of {_ESCAPES}, so none of these can escape them: name fewer")
        self.mark = free[0]
        self.places = re.compile("(?=" + "|".join(map(re.escape, guarded)) + ")", re.IGNORECASE)

    def escape(self, text: str) -> str:
        return self._shifted(text, lambda run: run + self.mark)

    def unescape(self, text: str) -> str:
        return self._shifted(text, lambda run: run[1:])

    def _shifted(self, text: str, change: Callable[[str], str]) -> str:
        """The text with the run of escapes behind the first character of every guarded string changed."""
        first = {found.start() for found in self.places.finditer(text.replace(self.mark, ""))}
        at = itertools.count()

        def changed(found: re.Match[str]) -> str:
            return found[1] + (change(found[2]) if next(at) in first else found[2])

        return re.sub(rf"([^{re.escape(self.mark)}])({re.escape(self.mark)}*)", changed, text) if first else text
