"""What stands between the endpoint and the engine: asks become work for the engine, and finished work becomes answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.models.chat import plain_ids, prompt_ids
from equipoise.models.generation import Loop
from equipoise.rewards.scoring import score
from equipoise.serving.engine import Engine, Event, Reply, Work
from equipoise.serving.explaining import Explained
from equipoise.serving.offers import Ask, Offer, Plan, replied, standardised
from equipoise.types import Prompt, Reward, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel
    from equipoise.objectives import Normaliser


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a client may ask for."""

    places: int = 32
    """Responses that are decoded together."""
    queue: int = 256
    """Responses that may wait; more are refused with the time after which to ask again."""
    prompt_tokens: int = 2048
    """Longest prompt."""
    max_tokens: int = 512
    """Longest response."""
    responses: int = 16
    """Most responses of a request."""
    candidates: int = 64
    """Most candidates of all responses of a request together."""
    body_bytes: int = 1_000_000
    """Longest body of a request."""
    body_s: float = 10.0
    """Seconds in which a request's body has to be there."""

    def __post_init__(self) -> None:
        for name in ("places", "queue", "prompt_tokens", "max_tokens", "responses", "candidates", "body_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"limits.{name} must be at least 1, got {getattr(self, name)}")
        if not self.body_s > 0:
            raise UserError(f"limits.body_s must be positive, got {self.body_s:g}")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A reply with its rewards, by objective; NaN where unscored, none where nobody asked."""

    reply: Reply
    reward: Mapping[str, float] = field(default_factory=dict)
    """In the scorers' own units."""
    z: Mapping[str, float] = field(default_factory=dict)
    """In standard deviations above the reference's mean; none where its statistics aren't known."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All that is known of what an ask was given."""

    replies: tuple[Scored, ...]
    offer: str
    facts: Mapping[str, Any]
    prompt_tokens: int
    completion_tokens: int
    """Of all candidates."""
    base_forwards: int
    guide_forwards: int
    reward_calls: int


@dataclass(frozen=True)
class _About:
    ask: Ask
    offer: Offer
    plan: Plan
    scores: bool


class Service:
    """Offers over one model and one engine."""

    def __init__(
        self, lm: LanguageModel, offers: Sequence[Offer], rewards: Sequence[Reward], scale: Normaliser | None, limits: Limits, top_k: int
    ) -> None:
        """`scale` is for the rewards, in their order."""
        self.lm, self.offers = lm, {offer.name: offer for offer in offers}
        self.rewards, self.scale, self.limits, self.top_k = list(rewards), scale, limits, top_k
        self.names = tuple(reward.name for reward in rewards)
        self.engine = Engine(self._conclude, limits.places, limits.queue)
        self.started = int(time.time())
        self._encoding = threading.Lock()
        for offer in offers:
            unknown = [name for name in offer.objectives if offer.choice and name not in self.names]
            if unknown:
                raise UserError(f"method {offer.name!r} chooses by {unknown[0]!r}, which isn't among the rewards {', '.join(self.names)}")

    def encode(self, prompt: Prompt, *, completes: bool = False) -> tuple[int, ...]:
        """Token ids of a prompt, or of a text to be continued. Raises `UserError` for one that is empty or too long."""
        with self._encoding:  # tokenizers of transformers aren't made for several threads
            ids = self._beginning() + plain_ids(self.lm.tokenizer, prompt.text) if completes else prompt_ids(self.lm.tokenizer, prompt)
        most = min(self.limits.prompt_tokens, self.lm.context_length - 1)
        if not ids:
            raise UserError("the prompt is empty: give it at least one token")
        if len(ids) > most:
            raise UserError(f"the prompt has {len(ids)} tokens, of at most {most}: shorten it")
        return tuple(ids)

    def _beginning(self) -> list[int]:
        return list(self.lm.tokenizer("")["input_ids"])[:1] if self.lm.tokenizer.bos_token_id is not None else []

    def work(
        self,
        ask: Ask,
        offer: Offer,
        tell: Callable[[Event], None],
        *,
        client: str,
        stop: Sequence[str] = (),
        streams: bool = False,
        explains: bool = False,
        scores: bool = True,
    ) -> Work:
        """The work of an ask, for the engine. Raises `UserError` as `Offer.plan` does, and where prompt and response don't fit."""
        if len(ask.ids) + ask.max_tokens > self.lm.context_length:
            raise UserError(
                f"the prompt's {len(ask.ids)} tokens and max_tokens={ask.max_tokens} are more than the model's context of "
                f"{self.lm.context_length}: lower max_tokens"
            )
        plan = offer.plan(ask, self.limits.candidates)
        sampling = offer.sampling(ask, self.top_k, self.limits.places, min(self.limits.max_tokens, self.lm.context_length - 1))
        explains = explains and offer.explains
        guide = Explained(offer.guide) if offer.guide is not None and offer.explains else offer.guide
        # A response that is chosen among several is only there when all of them are.
        return Work(
            client=client,
            key=(offer.key, sampling.temperature, sampling.greedy),
            open=lambda: Loop(self.lm, sampling, guide),
            requests=[replace(request, explained=explains) for request in plan.requests],
            ids=ask.ids,
            tell=tell,
            stop=tuple(stop),
            streams=streams and plan.choose is None,
            explains=explains,
            about=_About(ask, offer, plan, scores),
        )

    def _conclude(self, works: Sequence[Work]) -> list[Answer]:
        """Score what is finished, all at once, and choose."""
        abouts: list[_About] = [work.about for work in works]
        replies = [[work.replies[i] for i in range(len(work.requests))] for work in works]
        scored = [about.plan.choose is not None or about.scores for about in abouts]
        rollouts = [reply.rollout for own, wanted in zip(replies, scored, strict=True) if wanted for reply in own]
        prompts = {about.ask.prompt.id: about.ask.prompt for about in abouts}
        reward_NK = score(self.rewards, prompts, rollouts) if rollouts else np.zeros((0, len(self.rewards)))
        answers, at = [], 0
        for about, own, wanted in zip(abouts, replies, scored, strict=True):
            part_NK = reward_NK[at : at + len(own)] if wanted else np.full((len(own), len(self.rewards)), np.nan)
            at += len(own) if wanted else 0
            answers.append(self._answer(about, own, part_NK, wanted))
        return answers

    def _answer(self, about: _About, replies: Sequence[Reply], reward_NK: np.ndarray, wanted: bool) -> Answer:
        z_NK = standardised(reward_NK, self.scale)
        columns = [self.names.index(name) for name in about.plan.objectives]
        found = []
        for reply, row in replied(about.ask, about.plan, replies, reward_NK[:, columns], z_NK[:, columns]):
            reward = dict(zip(self.names, reward_NK[row].tolist(), strict=True)) if wanted else {}
            z = dict(zip(self.names, z_NK[row].tolist(), strict=True)) if wanted and self.scale else {}
            found.append(Scored(reply=reply, reward=reward, z=z))
        rollouts = [one.reply.rollout for one in found]
        return Answer(
            replies=tuple(found),
            offer=about.offer.name,
            facts=about.plan.facts,
            prompt_tokens=len(about.ask.ids),
            completion_tokens=sum(len(reply.rollout.tokens) for reply in replies),
            base_forwards=sum(r.base_forwards for r in rollouts),
            guide_forwards=sum(r.guide_forwards for r in rollouts),
            reward_calls=sum(r.reward_calls for r in rollouts),
        )
