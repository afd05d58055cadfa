"""Responses in the making: what the token loop keeps of each request and of each of its rows, and the rollout it ends as."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from equipoise.models.chat import whole_sentences
from equipoise.types import Request, Rollout

if TYPE_CHECKING:
    import numpy as np
    import torch

    from equipoise.models.loading import LanguageModel
    from equipoise.models.rows import Mark
    from equipoise.models.steps import Sampling, Step


class Stream:
    """Random numbers one by one, of a function that gives the first so many of them."""

    def __init__(self, first: Callable[[int], np.ndarray]) -> None:
        self._first, self._drawn = first, first(0)

    def __getitem__(self, at: int) -> float:
        if at >= len(self._drawn):
            self._drawn = self._first(2 * at + 32)
        return float(self._drawn[at])


@dataclass(eq=False)
class Job:
    """A request on its way, with what it has cost on all of its rows."""

    request: Request
    prompt: Sequence[int]
    """Of the prompt and the given response tokens."""
    most: int
    """Tokens that a response may have beyond the given ones."""
    uniforms: Stream
    pool: list[Row] = field(default_factory=list)
    """Rows that are finished, of which one becomes the response."""
    result: Row | None = None
    notes: Any = None
    """What a search or a gate remembers of it."""
    reads: int = 0
    """Laws that were read off its rows."""
    runs: int = 0
    """Response tokens that the policy ran for it."""
    followed: int = 0
    """Tokens that the batch's followers ran for it."""
    reward_calls: int = 0
    choice_kl: float = 0.0
    """Nats by which a choice among proposals moved the law."""


@dataclass(eq=False)
class Row:
    """One row of the batch: a response so far."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    kl_steps: list[float] = field(default_factory=list)
    kl_floor: float = 0.0
    score: float = 0.0
    """What a search ranks it by."""
    drawn: int = 0
    """Random numbers that it has used."""
    followed: int = 0
    """The followers' count of its tokens when it was last read."""
    ended: bool = False
    """Whether its last token ended the turn or reached the cap."""
    over: bool = False
    """Whether its place in the batch is free."""

    def copy(self) -> Row:
        """A row that goes on by itself."""
        other = copy.copy(self)
        other.tokens, other.logprobs = list(self.tokens), list(self.logprobs)
        other.ref_logprobs, other.kl_steps = list(self.ref_logprobs), list(self.kl_steps)
        return other

    def text(self, lm: LanguageModel, whole: bool) -> tuple[str, int]:
        """(what is scored, how many tokens make it up); of a capped response up to its last whole sentence where that is asked for."""
        stopped = bool(self.tokens) and self.tokens[-1] in lm.eos_ids
        body = [*self.job.request.given, *(self.tokens[:-1] if stopped else self.tokens)]
        kept = whole_sentences(lm.tokenizer, body) if whole and self.ended and not stopped else len(body)
        return lm.tokenizer.decode(body[:kept], skip_special_tokens=True).strip(), kept


@dataclass(frozen=True)
class Place:
    """Where a row was, and what it said by then."""

    mark: Mark
    row: Row


class Search(Protocol):
    """Chooses continuations among all rows of a request, in place of a draw for each row."""

    width: int
    """Most rows of a request."""

    def extend(self, rows: Sequence[Row], law_RC: torch.Tensor, step: Step) -> tuple[list[int], torch.Tensor, list[float]]:
        """Row, candidate and score of every continuation, those of one request together."""
        ...

    def over(self, job: Job, going: Sequence[Row]) -> bool:
        """Whether what goes on can't beat what is finished."""
        ...

    def best(self, job: Job) -> Row:
        """The response, of the finished rows in the request's pool."""
        ...


class Gate(Protocol):
    """Looks at the rows before each token, and may bring them back to where they were."""

    def review(self, loop: Running) -> bool:
        """Whether anything has changed; it is then asked again. A row that has `ended` goes no further without it."""
        ...


class Running(Protocol):
    """What a gate sees of the token loop."""

    lm: LanguageModel
    config: Sampling
    rows: list[Row]

    @property
    def law(self) -> tuple[Step, torch.Tensor]:
        """The step that comes next, and -log of its candidates' mass under the reference."""
        ...

    def place(self, at: int) -> Place:
        """Where a row is now."""
        ...

    def restore(self, at: int, place: Place) -> None:
        """Bring a row back to one of its places."""
        ...

    def count_followers(self) -> None:
        """Add what the followers have run to what the requests have cost."""
        ...

    def end(self, job: Job, row: Row) -> None:
        """Make the row its request's response."""
        ...


def by_job(rows: Sequence[Row]) -> Iterator[tuple[Job, list[Row]]]:
    """The rows of each request, which stand together."""
    for _, own in itertools.groupby(rows, key=lambda row: id(row.job)):
        listed = list(own)
        yield listed[0].job, listed


def record(
    rows: Sequence[Row],
    tokens_R: torch.Tensor,
    choice_R: torch.Tensor,
    logprobs_RC: torch.Tensor,
    ref_RC: torch.Tensor,
    floor_R: torch.Tensor,
) -> None:
    """Add each row's chosen token, its log-probabilities, and the exact price of the law that it was chosen by."""
    import torch

    picked = choice_R[:, None]
    terms_RC = logprobs_RC.exp() * (logprobs_RC - ref_RC)
    # A banned first token has probability 0 in both: 0 * (-inf + inf) is 0 here.
    kl_R = torch.nan_to_num(terms_RC, nan=0.0).sum(dim=-1)
    columns = zip(
        rows,
        tokens_R.tolist(),
        logprobs_RC.gather(1, picked)[:, 0].tolist(),
        (ref_RC.gather(1, picked)[:, 0] - floor_R).tolist(),
        kl_R.tolist(),
        floor_R.tolist(),
        strict=True,
    )
    for row, token, logprob, ref_logprob, kl, floor in columns:
        row.tokens.append(token)
        row.logprobs.append(logprob)
        row.ref_logprobs.append(ref_logprob)
        row.kl_steps.append(kl)
        row.kl_floor += floor
        row.drawn += 1


def finish(job: Job, lm: LanguageModel, guided: int, whole: bool) -> Rollout:
    """The rollout of a request whose response is there; `guided` is the guide's own tokens per row and step."""
    row = job.result
    assert row is not None
    text, kept = row.text(lm, whole)
    rollout = Rollout(
        id=job.request.id,
        prompt_id=job.request.prompt.id,
        tokens=tuple(row.tokens),
        text=text,
        text_tokens=kept,
        logprobs=tuple(row.logprobs),
        ref_logprobs=tuple(row.ref_logprobs),
        kl=sum(row.kl_steps),
        kl_steps=tuple(row.kl_steps),
        kl_floor=row.kl_floor,
        finish_reason="stop" if row.tokens[-1] in lm.eos_ids else "length",
        weights=job.request.weights,
        seed=job.request.seed,
        base_forwards=len(job.prompt) + job.runs,
        prompt_tokens=len(job.prompt),
        reward_calls=job.reward_calls,
        # Where the guide runs the chosen token for the policy, nobody needed those that weren't run on.
        guide_forwards=guided * job.reads + (guided > 0) * (job.reads - job.runs) + job.followed,
    )
    # Rewards prefer what the guide pushed: along what they chose the steps' KL would be too little.
    return replace(rollout, kl=rollout.log_ratio + job.choice_kl) if job.reward_calls else rollout
