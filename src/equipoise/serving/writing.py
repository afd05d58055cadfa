"""Answers as OpenAI's API writes them, whole or as chunks of a stream, with what it has no field for under `equipoise`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from equipoise.runs import plain
from equipoise.serving.engine import Piece
from equipoise.serving.offers import Ask, Offer
from equipoise.serving.service import Answer, Scored, Service


class Writer:
    """Writes answers as OpenAI's API has them."""

    def __init__(self, service: Service, offer: Offer, ask: Ask, *, chat: bool) -> None:
        self._service, self.offer, self._ask, self._chat = service, offer, ask, chat
        self._sent: dict[int, int] = {}
        self._head = {"id": ask.id, "created": int(time.time()), "model": f"{service.lm.name}:{offer.name}"}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of a response that isn't streamed."""
        choices = []
        for index, scored in enumerate(answer.replies):
            text = {"message": {"role": "assistant", "content": scored.reply.text}} if self._chat else {"text": scored.reply.text}
            reason = scored.reply.rollout.finish_reason
            choices.append({"index": index, **text, "logprobs": None, "finish_reason": reason, "equipoise": self._of_reply(scored)})
        kind = "chat.completion" if self._chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": _usage(answer), "equipoise": self._of_answer(answer)}

    def openings(self) -> Iterator[str]:
        """The first line of each response."""
        if self._chat:
            for index in range(self._ask.n):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> str:
        """What a response has gained."""
        self._sent[piece.index] = self._sent.get(piece.index, 0) + len(piece.text)
        extra = {"push": _push(self.offer, piece.push)} if piece.push else None
        return self._chunk(piece.index, {"content": piece.text}, extra=extra)

    def closings(self, answer: Answer, usage: bool) -> Iterator[str]:
        """What wasn't sent yet of each response, its end with what is known of it, and the usage."""
        for index, scored in enumerate(answer.replies):
            rest = scored.reply.text[self._sent.get(index, 0) :]
            if rest:
                yield self._chunk(index, {"content": rest})
            said = self._of_reply(scored) | {"answer": self._of_answer(answer)}
            yield self._chunk(index, {}, scored.reply.rollout.finish_reason, said)
        if usage:
            yield line_of(self._head | {"object": self._kind, "choices": [], "usage": _usage(answer)})

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None, extra: dict[str, Any] | None = None) -> str:
        part = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": index, **part, "logprobs": None, "finish_reason": reason}
        return line_of(self._head | {"object": self._kind, "choices": [choice | ({"equipoise": extra} if extra else {})]})

    def _of_reply(self, scored: Scored) -> dict[str, Any]:
        rollout, reply = scored.reply.rollout, scored.reply
        said: dict[str, Any] = {"kl": rollout.kl, "kl_floor": rollout.kl_floor, "tokens": len(rollout.tokens), "seed": rollout.seed}
        said |= {"rewards": dict(scored.reward), "scores": dict(scored.z)} if scored.reward else {}
        return said | ({"push": _push(self.offer, reply.push)} if reply.push else {})

    def _of_answer(self, answer: Answer) -> dict[str, Any]:
        cost = {"base_forwards": answer.base_forwards, "guide_forwards": answer.guide_forwards, "reward_calls": answer.reward_calls}
        return {"method": answer.offer, "seed": self._ask.seed, **answer.facts, **cost}


def _push(offer: Offer, push: tuple[tuple[str, tuple[float, ...]], ...]) -> list[dict[str, Any]]:
    return [{"token": text, "nats": dict(zip(offer.objectives, values, strict=False))} for text, values in push]


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.completion_tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens, "total_tokens": total}


def line_of(body: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(plain(body), allow_nan=False)}\n\n"
