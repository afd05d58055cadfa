"""Conversations to token ids: one place for templates, so that sampling and scoring see the same text."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from equipoise.types import Message, Prompt, UserError

_END = r"((?<!\d)\.|[!?])[\"')\]*\u201d\u2019]*"
_SENTENCE_END = re.compile(_END + "$")

PLAIN_TEMPLATE = (
    "{{ cls_token or bos_token or '' }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ (sep_token or eos_token or '') if message['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
"""Given to a tokenizer that comes without a template, so that what is saved with it says how its texts were written."""


_SUMMARY = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction: Generate a one-sentence summary of this post. ### Input: ' + (message['content'] | replace('\n', ' ')) }}"
    "{% else %}{{ ' ### Response: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{{ ' ### Response: ' if add_generation_prompt else '' }}"
)


def summary_template(tokenizer: Any) -> str:
    """A chat template for one post and its summary, on one line, as RiC and MAVIS write them (arXiv 2402.10207, 2508.13415)."""
    bos = tokenizer.bos_token_id
    return "{{ bos_token }}" * (bos is not None and tokenizer("a")["input_ids"][:1] == [bos]) + _SUMMARY


def prompt_ids(tokenizer: Any, prompt: Prompt, *, header: bool = True) -> list[int]:
    """Token ids of a prompt up to where the assistant's answer begins; without `header`, up to its turn's header.

    Uses the tokenizer's chat template; a base model without one gets `role: content` lines. A turn whose text spells a special
    token is text all the same: it opens and closes no turn. Raises `UserError` for an empty conversation or an empty last turn.
    """
    if not prompt.messages or not prompt.text.strip():
        raise UserError(f"prompt {prompt.id!r} is empty: give it at least one non-empty user message")
    templated = bool(getattr(tokenizer, "chat_template", None))

    def render(messages: Sequence[Message]) -> str:
        if templated:
            return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=header))
        return plain_text(messages, header=header)

    if any(special in m["content"] for m in prompt.messages for special in special_strings(tokenizer)):
        return _guarded(tokenizer, prompt.messages, render, first=not templated)
    return list(tokenizer(render(prompt.messages), add_special_tokens=not templated)["input_ids"])


def special_strings(tokenizer: Any) -> tuple[str, ...]:
    """What a tokenizer reads as one of its special tokens wherever it stands in a text; single characters are left out."""
    marked = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(text for text in marked | set(tokenizer.all_special_tokens) if len(text) > 1))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text in which nothing is special, whatever it spells."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _guarded(tokenizer: Any, messages: Sequence[Message], render: Callable[[Sequence[Message]], str], *, first: bool) -> list[int]:
    """The rendered conversation, of which the template's part alone may hold special tokens; `first` adds those of a text's beginning."""
    marks = [f"\ue000{number}\ue001" for number in range(len(messages))]  # for private use: no template writes them
    text = render([Message(role=m["role"], content=mark) for m, mark in zip(messages, marks, strict=True)])
    found = {mark: m["content"] for m, mark in zip(messages, marks, strict=True)}
    ids: list[int] = []
    for number, part in enumerate(re.split("(\ue000\\d+\ue001)", text)):
        ids += plain_ids(tokenizer, found[part]) if part in found else tokenizer(part, add_special_tokens=first and not number)["input_ids"]
    return ids


def plain_text(messages: Sequence[Message], *, header: bool = True) -> str:
    """What `prompt_ids` tokenises where there is no template."""
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:" * header


def turn_end(tokenizer: Any, prompt: Prompt) -> int:
    """Where in `prompt_ids` the last user turn is closed: the last token before the assistant's header that isn't blank.

    In Llama-3's template that is the `<|eot_id|>` at which ArmoRM's gate reads its state.
    """
    closed, opened = prompt_ids(tokenizer, prompt, header=False), prompt_ids(tokenizer, prompt)
    at = max(_shared(closed, opened) - 1, 0)
    while at > 0 and not tokenizer.decode([opened[at]]).strip():
        at -= 1
    return at


def response_ids(tokenizer: Any, response: str) -> list[int]:
    """Token ids of a finished response: its text, then the end-of-turn token. Raises `UserError` where there is none."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no token that ends a turn: set eos_token in its tokenizer_config.json")
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def conversation_ids(tokenizer: Any, prompt: Prompt, response: str, limit: int | None = None) -> tuple[list[int], bool]:
    """`conversation_turns` as one list: (token ids of the prompt and its finished answer, whether they were cut)."""
    context, answer, cut = conversation_turns(tokenizer, prompt, response, limit)
    return [*context, *answer], cut


def conversation_turns(tokenizer: Any, prompt: Prompt, response: str, limit: int | None = None) -> tuple[list[int], list[int], bool]:
    """(token ids of the prompt with the assistant's header, of its finished answer, whether they were cut to `limit` tokens).

    The chat template renders the whole conversation and its text is tokenised once, so that no second BOS is added; without
    a template it is `prompt_ids` and `response_ids`. What is too long loses the beginning of the prompt (a leading BOS
    stays), and where that isn't enough the end of the response; the header that opens the assistant's turn and what closes
    it stay. Raises `UserError` where the limit leaves no room for one token of the response.
    """
    if not getattr(tokenizer, "chat_template", None):
        return turn_ids(tokenizer, prompt, response, limit)
    asked = [dict(m) for m in prompt.messages]
    text = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": response}], tokenize=False)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if limit is None or len(ids) <= limit:
        start = _shared(ids, prompt_ids(tokenizer, prompt))
        return ids[:start], ids[start:], False
    renders = [tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=header) for header in (False, True)]
    header, start = (_shared(text, render) for render in renders)
    content = text.rfind(response.strip(), start)  # templates may strip it
    closing = content + len(response.strip()) if content >= 0 else len(text)
    offsets = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    begins = [begin for begin, _ in offsets]
    cuts = [0, *(bisect.bisect_left(begins, at) for at in (header, start, closing)), len(ids)]
    context, answer = _shorten(tokenizer, [ids[low:high] for low, high in itertools.pairwise(cuts)], limit)
    return context, answer, True


def _shared(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences have in common at their beginnings."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def turn_ids(tokenizer: Any, prompt: Prompt, response: str, limit: int | None = None) -> tuple[list[int], list[int], bool]:
    """(`prompt_ids`, `response_ids`, whether they were cut to `limit` tokens): what a policy reads and what it said.

    They are cut as `conversation_ids` are: the beginning of the prompt goes first, then the end of the response.
    """
    asked, answer = prompt_ids(tokenizer, prompt), response_ids(tokenizer, response)
    if limit is None or len(asked) + len(answer) <= limit:
        return asked, answer, False
    stem = _shared(asked, prompt_ids(tokenizer, prompt, header=False))
    return *_shorten(tokenizer, [asked[:stem], asked[stem:], answer[:-1], answer[-1:]], limit), True


def _shorten(tokenizer: Any, parts: list[list[int]], limit: int) -> tuple[list[int], list[int]]:
    """(prompt and header, response and closing tokens) in at most `limit` tokens."""
    prompt, header, response, closing = parts
    first = prompt[:1] if prompt[:1] == [tokenizer.bos_token_id] else []
    room = limit - len(first) - len(header) - len(closing)
    if room < 1:
        raise UserError(f"a limit of {limit} tokens leaves no room for a response: allow at least {limit - room + 1}")
    response = response[:room]
    left = min(room - len(response), len(prompt) - len(first))
    return [*first, *prompt[len(prompt) - left :], *header], [*response, *closing]


def whole_sentences(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Number of leading tokens that end with the last whole sentence; all of them where there is none.

    A sentence ends with . ! ? or a closing quote or bracket after one; a full stop after a digit (a list number, a
    decimal) doesn't count. Rewards of a text cut in mid-sentence say more about the cut than about the answer.
    """
    for count in range(len(tokens), 0, -1):
        if ends_sentence(tokenizer, tokens[:count]):
            return count
    return len(tokens)


def whole_sentences_of(text: str) -> str:
    """The text up to its last whole sentence, as `whole_sentences` finds them, where no tokens are known; all of it without one."""
    ends = [found.end() for found in re.finditer(_END + r"(?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


def ends_sentence(tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether the text of the tokens ends with a whole sentence."""
    return bool(_SENTENCE_END.search(tokenizer.decode(tokens, skip_special_tokens=True).rstrip()))
