"""A sampler whose responses a server draws: any chat completions of OpenAI's schema, over HTTP.

    y ~ pi_ref(. | x)        pi_ref: whatever law the server draws from, its own truncation and hidden prompts included

That law is the reference of what stands over it (best-of-n, resampling, palettes: `choosing.py`, `palette.py`), so a draw has
kl = kl_floor = 0 and the choice adds its own. The server says text, and perhaps how many tokens it read and wrote; which they
are, and their log-probabilities, stays unknown.

Departures: n candidates are n requests with seeds of their own and not one with `n`, which many servers ignore, and which
nobody could continue one by one. A server may ignore the seed too: then a lost reply is drawn anew, and kept ones stay.
Reads: prompts. Writes: nothing but the store. The weights enter: nowhere here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from equipoise.models.chat import whole_sentences_of
from equipoise.models.engines import HTTPEngine, Reply
from equipoise.progress import say
from equipoise.rewards.cache import Store
from equipoise.runs import digest_of
from equipoise.types import Request, Rollout, UserError

_SEED = 2**31 - 1  # what every server's integer holds
_ALIKE = 3


@dataclass(kw_only=True)
class UpstreamSampler:
    """Draws a response per request; what failed is named, what came is kept."""

    engine: HTTPEngine
    store: Store | None = None
    """Where replies are kept by prompt, seed and settings, each as it arrives; None keeps none."""
    whole_sentences: bool = True
    """Whether a response that ran into the longest length is cut to its last whole sentence."""
    objectives: tuple[str, ...] = ()
    """None: a server isn't steered from here."""
    warned: bool = False
    """Whether it was said that the server answers alike whatever the seed."""

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order.

        Raises `UserError` for requests with weights or given tokens, and where a reply never came.
        """
        for request in requests:
            if request.weights is not None or request.given or request.most_tokens is not None:
                raise UserError(f"request {request.id!r}: a server takes a prompt, and neither weights, given tokens nor an own length")
        replies = self._replies(requests)
        self._check_draws(requests, replies)
        return [self._rollout(request, reply) for request, reply in zip(requests, replies, strict=True)]

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        keys = [digest_of([self.engine.identity, list(r.prompt.messages), r.seed]) for r in requests]
        known = {key: Reply(**json.loads(str(kept))) for key, kept in (self.store.find(keys) if self.store else {}).items()}
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        order = list(missing)

        def keep(index: int, reply: Reply) -> None:
            if self.store and reply.text is not None:
                self.store.keep({order[index]: json.dumps(asdict(reply))})

        prompts = [request.prompt.messages for request in missing.values()]
        fresh = self.engine(prompts, keep, [request.seed & _SEED for request in missing.values()]) if missing else []
        lost = [(request, reply) for request, reply in zip(missing.values(), fresh, strict=True) if reply.text is None]
        if lost:
            request, reply = next((pair for pair in lost if pair[1].fatal), lost[0])
            kept = "are kept: mend it and run again" if self.store else "are lost with it"
            raise UserError(
                f"{reply.error} (prompt {request.prompt.id!r}); {len(fresh) - len(lost)} of {len(fresh)} responses came and {kept}"
            )
        known |= dict(zip(order, fresh, strict=True))
        return [known[key] for key in keys]

    def _check_draws(self, requests: Sequence[Request], replies: Sequence[Reply]) -> None:
        """Say once where candidates are no draws, so that there is nothing to choose among."""
        texts: dict[str, set[str | None]] = {}
        for request, reply in zip(requests, replies, strict=True):
            texts.setdefault(request.prompt.id, set()).add(reply.text)
        if not self.warned and len(requests) - len(texts) >= _ALIKE and all(len(found) == 1 for found in texts.values()):
            self.warned = True
            say(f"{self.engine.model} answers alike whatever the seed: is its temperature 0, or a cache before it?")

    def _rollout(self, request: Request, reply: Reply) -> Rollout:
        text = (reply.text or "").strip()
        return Rollout(
            id=request.id,
            prompt_id=request.prompt.id,
            tokens=(),
            text=whole_sentences_of(text) if reply.cut and self.whole_sentences else text,
            text_tokens=reply.tokens,
            logprobs=(),
            ref_logprobs=(),
            kl=0.0,
            kl_floor=0.0,
            finish_reason="length" if reply.cut else "stop",
            weights=None,
            seed=request.seed,
            base_forwards=reply.prompt_tokens + reply.tokens,
        )
