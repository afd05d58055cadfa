"""What draws a `sample` run's responses in the model's place, read from its settings: a chat server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from equipoise.decoding.upstream import UpstreamSampler
from equipoise.models.engines import Calls, HTTPEngine, load_engine
from equipoise.models.generation import Sampling
from equipoise.runs import EXECUTION
from equipoise.stages.choosing import Choice, choosing_rewards, one_of_n
from equipoise.types import Sampler, UserError

if TYPE_CHECKING:
    from equipoise.models.loading import LanguageModel

_CHOICES = ("", "best_of", "resampling")


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A server that draws responses."""

    source: str = ""
    """MODEL@URL of an OpenAI-compatible server, or a MODEL of OpenAI; empty draws with the model here."""
    timeout: float = field(default=60.0, metadata=EXECUTION)
    """Seconds that the server may stay silent."""
    retries: int = field(default=5, metadata=EXECUTION)
    """Tries after the first one, where the server is busy, broken, silent or gone."""

    def check(self, sampling: Sampling, how: str, ways: Sequence[str]) -> None:
        """Refuse what a server can't do, or isn't told."""
        if ways:
            raise UserError(f"{ways[0]} steers tokens, and {self.source} gives whole texts: choose among them instead (choice.how)")
        if how not in _CHOICES:
            raise UserError(f"choice.how={how} reads a model's tokens, and {self.source} gives whole texts: choose best_of or resampling")
        plain = Sampling()
        for name in ("top_k", "allow_eos_first"):
            if getattr(sampling, name) != getattr(plain, name):
                raise UserError(f"sampling.{name} isn't told to a server, whose own law counts: leave it at {getattr(plain, name)}")
        self.engine(sampling)

    def engine(self, sampling: Sampling) -> HTTPEngine:
        """The client of the server. Raises `UserError` where the source is none, its key is missing or a number is out of range."""
        if self.source.startswith("local:"):
            raise UserError(f"{self.source} is no server: name it as the model instead, which is then drawn from here")
        calls = Calls(
            max_tokens=sampling.max_new_tokens,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            concurrency=sampling.batch_size,
            timeout=self.timeout,
            retries=self.retries,
        )
        engine = load_engine(self.source, calls)
        assert isinstance(engine, HTTPEngine), "other sources are local"
        return engine


def upstream_sampler(upstream: Upstream, sampling: Sampling, choice: Choice | None, lm: LanguageModel | None) -> Sampler:
    """The server as a sampler, or what chooses among its responses; `lm` is behind rewards that read states.

    Raises `UserError` as `Upstream.engine` does, and for greedy candidates.
    """
    from equipoise.models.loading import cache_folder
    from equipoise.rewards.cache import Store

    inner = UpstreamSampler(engine=upstream.engine(sampling), store=Store(cache_folder()), whole_sentences=sampling.whole_sentences)
    return one_of_n(inner, choosing_rewards(lm, choice), choice, sampling.greedy) if choice else inner
