"""What SIPO asks its policies: a review of a response on the objectives, and a rewrite that follows the review.

Both are chat messages: the fields Question, Response and Review and an instruction in one user turn, after one worked example
in a user and an assistant turn of its own, unless that is switched off. Objectives are named by a phrase that can follow
"more"; `PHRASES` has the field's, and a caller adds others.

Paper: Li et al. 2025, SIPO (arXiv 2502.14354), sections on self-improvement. Departures: any objectives, where the released
prompts name two; turns of the model's own chat template, where the released code writes one text and finds its parts again by a
regular expression; no opening words are put into the model's mouth. Example and instructions are our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from equipoise.types import Message, Prompt, UserError

PHRASES: Mapping[str, str] = {
    "helpful": "helpful",
    "better": "helpful",
    "helpfulness": "helpful",
    "harmless": "harmless",
    "safer": "harmless",
    "harmlessness": "harmless",
    "safety": "harmless",
    "correctness": "correct",
    "truthfulness": "truthful",
    "honesty": "honest",
    "coherence": "coherent",
    "complexity": "thorough",
    "verbosity": "detailed",
    "instruction_following": "faithful to the instructions",
    "overall": "useful as a whole",
    "humor": "humorous",
    "positive": "positive in tone",
    "brief": "concise",
    "long": "detailed",
    "readable": "readable",
    "relevant": "relevant to the question",
}
"""Objective -> what a response becomes more of."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """The worked example; it suits any objectives, as its review says what is missing and not which of them asks for it."""

    question: str
    response: str
    review: str
    rewrite: str


SHOT = Shot(
    question="Why does bread go stale, and can I do something about it?",
    response="Bread goes stale because it dries out. Put it in the fridge.",
    review=(
        "1. Name the cause: starch that hardens again matters more than lost water.\n"
        "2. Mend the advice: a fridge makes bread go stale faster, so name a better place.\n"
        "3. Add what to do with bread that is already stale, and when it should be thrown away."
    ),
    rewrite=(
        "Bread goes stale mostly because its starch hardens again after baking; drying out is the smaller part. A fridge speeds this "
        "up, so keep bread at room temperature in a bag or a box for two or three days, and freeze what you won't eat by then. "
        "Stale bread softens if you sprinkle it with water and warm it for a few minutes, and it makes good toast. Throw it away "
        "if you see mould, as mould reaches further than the spots that show."
    ),
)

_FIELDS = ("Question:", "Response:", "Review:")


def phrases_of(objectives: Sequence[str], own: Mapping[str, str]) -> list[str]:
    """The objectives' phrases, the caller's before the table's. Raises `UserError` naming an objective that has none."""
    for name in objectives:
        if not (own.get(name) or PHRASES.get(name, "")).strip():
            raise UserError(
                f"no phrase for the objective {name!r}: say what a response becomes more of, as --phrases '{{{name}: ADJECTIVE}}'"
            )
    return list(dict.fromkeys(own.get(name) or PHRASES[name] for name in objectives))


def review_prompt(prompt: Prompt, response: str, phrases: Sequence[str], shot: Shot | None = SHOT) -> Prompt:
    """Asks for three suggestions by which the response would gain on every objective; the prompt keeps its id."""
    wish = f"Give exactly three suggestions by which the response would become more {_listed(phrases)}."
    wish += " Number them, one line each, and write nothing else."
    example = _turns(_ask({"Question": shot.question, "Response": shot.response}, wish), shot.review) if shot else ()
    asked = _ask({"Question": question_of(prompt), "Response": response}, wish)
    return Prompt(id=prompt.id, messages=(*example, Message(role="user", content=asked)), split=prompt.split)


def rewrite_prompt(prompt: Prompt, response: str, review: str, phrases: Sequence[str], shot: Shot | None = SHOT) -> Prompt:
    """Asks for the response as the review wants it; the prompt keeps its id."""
    wish = f"Rewrite the response so that it follows the review and becomes more {_listed(phrases)}. Write only the new response."
    fields = {"Question": question_of(prompt), "Response": response, "Review": review}
    example: tuple[Message, ...] = ()
    if shot:
        example = _turns(_ask({"Question": shot.question, "Response": shot.response, "Review": shot.review}, wish), shot.rewrite)
    return Prompt(id=prompt.id, messages=(*example, Message(role="user", content=_ask(fields, wish))), split=prompt.split)


def question_of(prompt: Prompt) -> str:
    """One user turn as it stands; a longer conversation as lines that begin with their roles."""
    if len(prompt.messages) == 1:
        return prompt.messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt.messages)


def parse_review(text: str) -> str:
    """The suggestions: up to where the model begins another field, "" where nothing is said."""
    return _up_to_field(text)[0]


def parse_rewrite(text: str) -> tuple[str, bool]:
    """(the new response, whether the model went on with another field after it); a label that it repeats is left out."""
    text = text.strip()
    return _up_to_field(text.removeprefix("Response:"))


def _up_to_field(text: str) -> tuple[str, bool]:
    lines = text.strip().splitlines()
    end = next((i for i, line in enumerate(lines) if line.lstrip().startswith(_FIELDS)), len(lines))
    return "\n".join(lines[:end]).strip(), end < len(lines)


def _ask(fields: Mapping[str, str], wish: str) -> str:
    return "\n\n".join([*(f"{name}:\n{text.strip()}" for name, text in fields.items()), wish])


def _turns(asked: str, answered: str) -> tuple[Message, ...]:
    return Message(role="user", content=asked), Message(role="assistant", content=answered)


def _listed(phrases: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
