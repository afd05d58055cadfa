"""Chat models that are asked for text: any OpenAI-compatible server over HTTP, or a local model through the token loop.

An engine takes conversations and returns one `Reply` each, in their order. One that fails is a `Reply` with an error: it
never takes finished ones with it, and `on_reply` sees each as soon as it is there, so that it can be kept.

| source | what is asked |
|---|---|
| `MODEL@URL` | chat completions of the server at URL, for example `qwen@http://localhost:8000/v1` |
| `MODEL` | the same at `https://api.openai.com/v1` |
| `local:NAME` | a model that `models/loading.py` loads, for example `local:smollm2` |

Keys come from the environment: $EQUIPOISE_API_KEY for the server that the user named, $OPENAI_API_KEY for OpenAI's alone,
so that one company's key is never sent to another. Neither is written or shown.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from equipoise.runs import EXECUTION, digest_of
from equipoise.types import Message, Prompt, Request, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel

OPENAI_URL = "https://api.openai.com/v1"
_LOCAL = "local:"
_PATIENCE = 16
_PORT = re.compile(r"[^\s:]+(:\d{1,5})?|\[[\da-fA-F:.]+\](:\d{1,5})?")

Conversation = Sequence[Message]
OnReply = Callable[[int, "Reply"], None]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How a chat model is asked."""

    max_tokens: int = 512
    """Longest reply, in tokens."""
    temperature: float | None = 0.0
    """0 takes the likeliest token; null leaves it to the server, where a model accepts no other."""
    concurrency: int = field(default=8, metadata=EXECUTION)
    """Requests in flight, or rows that a local model decodes together."""
    timeout: float = field(default=60.0, metadata=EXECUTION)
    """Seconds that a server may stay silent."""
    retries: int = field(default=5, metadata=EXECUTION)
    """Tries after the first one, where the server is busy, broken, silent or gone."""

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 1), ("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise UserError(f"timeout must be positive, got {self.timeout}")
        if self.temperature is not None and not self.temperature >= 0:
            raise UserError(f"temperature must be at least 0 or null, got {self.temperature}")


@dataclass(frozen=True)
class Reply:
    """What came back for one conversation: its text, or why there is none."""

    text: str | None
    error: str = ""
    fatal: bool = False
    """Whether nobody can be answered (no key, no such model, a server that is down), so that the rest was not asked."""
    cut: bool = False
    """Whether the server says that it ran into the longest length."""
    prompt_tokens: int = 0
    """As the server counts them; 0 where it doesn't say."""
    tokens: int = 0
    """Of the reply, as the server counts them; 0 where it doesn't say."""


class ChatEngine(Protocol):
    """Asks one model with fixed settings."""

    identity: str
    """Changes with the model and with every setting that its replies depend on; what a cache of replies is keyed by."""

    def __call__(self, conversations: Sequence[Conversation], on_reply: OnReply | None = None) -> list[Reply]:
        """One reply per conversation, in order; `on_reply(index, reply)` is called as each arrives, in any order."""
        ...


def load_engine(source: str, calls: Calls, lm: LanguageModel | None = None) -> ChatEngine:
    """The engine of `MODEL@URL`, `MODEL` or `local:NAME`; `lm` is used where it is the model that is named.

    Raises `UserError` for a source that can't be read, a missing key or a model that can't be loaded.
    """
    if source.startswith(_LOCAL):
        name = source.removeprefix(_LOCAL)
        if lm is None or lm.name != name:
            from equipoise.models.loading import load_model

            lm = load_model(name)
        return LocalEngine(lm, calls)
    model, found, url = source.rpartition("@http")
    if "@" in source and not found:  # and not a model of OpenAI, whom the texts would be sent to
        raise UserError(f"write the address of {source!r} with http:// or https://")
    model, url = (model, "http" + url) if found else (source, OPENAI_URL)
    if not model:
        raise UserError(f"{source!r} names no model: write MODEL@URL, MODEL (of OpenAI) or local:NAME")
    return HTTPEngine(model, url, calls)


class HTTPEngine:
    """Chat completions of an OpenAI-compatible server.

    Status 408, 409, 429 and 5xx, silence and lost connections are tried again after 0.5, 1, 2, 4, 8, 8 ... seconds, less
    up to a quarter at random, or after what `Retry-After` asks (up to two minutes): the official client's rules. A
    refusal of the key or the model ends the batch, and so do 16 failures in a row that aren't refusals of a question: the
    rest is returned as not asked.
    """

    def __init__(self, model: str, url: str, calls: Calls) -> None:
        """Raises `UserError` for an address that isn't one or holds a secret, and where OpenAI's key is missing."""
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            # An address goes into manifests and messages.
            raise UserError(f"the address of {parts.hostname} must hold no user, key or query: put the key into $EQUIPOISE_API_KEY")
        if parts.scheme not in ("http", "https") or not parts.hostname or not _PORT.fullmatch(parts.netloc):
            raise UserError(f"{url!r} is no address of a server; write for example http://localhost:8000/v1")
        self.model, self.url, self.calls = model, url, calls
        self._openai = url.rstrip("/") == OPENAI_URL
        self._variable = "OPENAI_API_KEY" if self._openai else "EQUIPOISE_API_KEY"
        self._key = os.environ.get(self._variable, "").strip()
        if self._openai and not self._key:
            raise UserError(f"{OPENAI_URL} needs a key: set OPENAI_API_KEY, or name another server as MODEL@URL")
        self.identity = digest_of(["http", model, url, calls.max_tokens, calls.temperature])

    def __call__(
        self, conversations: Sequence[Conversation], on_reply: OnReply | None = None, seeds: Sequence[int] | None = None
    ) -> list[Reply]:
        """One reply per conversation, in order, asked for with its seed. Raises `UserError` where the package openai is missing."""
        try:
            import openai  # noqa: F401 its absence is told before anything is asked
        except ImportError:
            raise UserError("asking a server needs the package openai: pip install 'equipoise[http]'") from None
        return _finished(self._ask_all(conversations, on_reply, seeds))

    async def _ask_all(self, conversations: Sequence[Conversation], on_reply: OnReply | None, seeds: Sequence[int] | None) -> list[Reply]:
        import openai

        replies: list[Reply | None] = [None] * len(conversations)
        waiting = iter(range(len(conversations)))
        in_a_row, end = 0, None

        async def worker() -> None:
            nonlocal in_a_row, end
            for index in waiting:  # shared: each worker takes the next one
                if end is not None:
                    return
                reply, refused = await self._ask(client, conversations[index], seeds[index] if seeds else None)
                if not refused:
                    in_a_row = in_a_row + 1 if reply.text is None else 0
                if reply.fatal or in_a_row >= _PATIENCE:
                    end = end or reply.error
                replies[index] = reply
                if on_reply:
                    on_reply(index, reply)

        settings: dict[str, Any] = {"max_retries": self.calls.retries, "timeout": self.calls.timeout}
        if not self._openai:  # whose customer the user is, the client would tell every server
            settings["default_headers"] = dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.Omit())
        # A server that wants no key gets a word that is none: the client insists on one.
        async with openai.AsyncOpenAI(api_key=self._key or "none", base_url=self.url, **settings) as client:
            await asyncio.gather(*(worker() for _ in range(min(self.calls.concurrency, len(conversations)))))
        return [Reply(None, end or "", fatal=True) if reply is None else reply for reply in replies]

    async def _ask(self, client: Any, conversation: Conversation, seed: int | None) -> tuple[Reply, bool]:
        """The reply, and whether the server refused just this question (too long, filtered), and so is alive."""
        import openai

        # OpenAI's newer models refuse `max_tokens`; other servers may not know its successor.
        settings: dict[str, float] = {"max_completion_tokens" if self._openai else "max_tokens": self.calls.max_tokens}
        if self.calls.temperature is not None:
            settings["temperature"] = self.calls.temperature
        if seed is not None:
            settings["seed"] = seed
        try:
            answer = await client.chat.completions.create(model=self.model, messages=[dict(m) for m in conversation], **settings)
        except openai.APITimeoutError:
            return self._failed(f"no answer within {self.calls.timeout:g} s, {self.calls.retries + 1} times")
        except openai.APIConnectionError as error:
            return self._failed(f"could not be reached ({error.__cause__ or error})")
        except openai.APIStatusError as error:
            mend = {401: f": set {self._variable}", 403: ": the key may not do this", 404: ": no such model or address"}
            status = error.status_code
            return self._failed(f"said {error}{mend.get(status, '')}", status in mend, status < 500 and status not in (408, 409, 429))
        except (openai.OpenAIError, ValueError) as error:  # ValueError: said to be JSON, but isn't
            return self._failed(f"sent what is no chat completion ({error})")
        try:
            text, cut = answer.choices[0].message.content, answer.choices[0].finish_reason == "length"
        except (AttributeError, IndexError, TypeError):
            return self._failed(f"sent what is no chat completion ({str(answer)[:80]!r})")
        if not isinstance(text, str):
            return self._failed("sent a message without text")
        counts = (getattr(getattr(answer, "usage", None), name, 0) for name in ("prompt_tokens", "completion_tokens"))
        prompt_tokens, tokens = (count if isinstance(count, int) else 0 for count in counts)
        return Reply(text, cut=cut, prompt_tokens=prompt_tokens, tokens=tokens), False

    def _failed(self, reason: str, fatal: bool = False, refused: bool = False) -> tuple[Reply, bool]:
        hidden = reason.replace(self._key, "***") if self._key else reason
        return Reply(None, " ".join(f"{self.model} at {self.url} {hidden}".split())[:400], fatal), refused


class LocalEngine:
    """A local model, asked through the token loop; conversations of similar length are decoded together."""

    def __init__(self, lm: LanguageModel, calls: Calls) -> None:
        from equipoise.models.generation import Sampling
        from equipoise.models.loading import weights_key

        self.lm = lm
        self.sampling = Sampling(
            max_new_tokens=calls.max_tokens,
            temperature=calls.temperature or 1.0,
            top_k=1 if calls.temperature == 0 else 0,
            whole_sentences=False,
            batch_size=calls.concurrency,
        )
        self.identity = digest_of(["local", weights_key(lm), calls.max_tokens, calls.temperature])

    def __call__(self, conversations: Sequence[Conversation], on_reply: OnReply | None = None) -> list[Reply]:
        """One reply per conversation, in order; one that leaves no room for a reply within the context is an error."""
        from equipoise.models.chat import prompt_ids
        from equipoise.models.generation import generate

        prompts = [Prompt(id=str(i), messages=tuple(messages)) for i, messages in enumerate(conversations)]
        lengths = [len(prompt_ids(self.lm.tokenizer, prompt)) for prompt in prompts]
        replies: dict[int, Reply] = {}

        def keep(index: int, reply: Reply) -> None:
            replies[index] = reply
            if on_reply:
                on_reply(index, reply)

        room = self.lm.context_length - self.sampling.max_new_tokens
        for index, length in enumerate(lengths):
            if length > room:
                keep(index, Reply(None, f"{length} tokens and a reply exceed the context of {self.lm.context_length} of {self.lm.name}"))
        order = sorted((i for i in range(len(prompts)) if i not in replies), key=lambda i: (lengths[i], i))
        size = self.sampling.batch_size
        for chunk in (order[start : start + size] for start in range(0, len(order), size)):
            # Where tokens are drawn, the same conversation draws the same ones whatever stands beside it.
            seeds = [int(digest_of(prompts[i].messages)[:15], 16) for i in chunk]
            requests = [Request(id=str(i), prompt=prompts[i], seed=seed) for i, seed in zip(chunk, seeds, strict=True)]
            for index, rollout in zip(chunk, generate(self.lm, requests, self.sampling), strict=True):
                keep(index, Reply(rollout.text))
        return [replies[i] for i in range(len(prompts))]


def _finished(work: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """The result of `work`, also where the caller already runs a loop, as a notebook does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 it is raised again in the caller's thread
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]
