"""The one token loop: ragged prompts to rollouts, plain or guided, as many rows at a time as a batch has.

What a step is, and the law that its token is drawn from, says `models/steps.py`. Places of finished rows go to waiting
prompts. Every row has its own random numbers, fixed by its seed, and its own weights: what a row draws does not depend on
its batch. Tokens are drawn by inverting the CDF of the candidates in order of pi_ref, so that equal seeds couple methods.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from equipoise.models.chat import prompt_ids
from equipoise.models.hypotheses import Gate, Job, Place, Row, Search, Stream, by_job, finish, record
from equipoise.models.rows import Batch
from equipoise.models.steps import Guide, Sampling, Start, Step, branches, candidates, invert_cdf, known_tokens, law_of
from equipoise.types import Request, Rollout, UserError

if TYPE_CHECKING:
    import torch

    from equipoise.models.loading import LanguageModel

__all__ = ["Guide", "Sampling", "Start", "Step", "generate", "known_tokens", "row_uniforms", "stream"]


def generate(
    lm: LanguageModel,
    requests: Sequence[Request],
    config: Sampling,
    guide: Guide | None = None,
    *,
    search: Search | None = None,
    gate: Gate | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample one response per request, in the order of the requests, or go on with the response that a request gives.

    `search` and `gate` choose in other ways than by a draw. Prompts of similar length share a batch, and the place of a
    response that is finished goes to the next prompt. `progress` is told of every finished response. Raises `UserError` for an
    empty prompt, one that leaves no room for the response, weights of the wrong length, or a given response that is finished.
    """
    import torch

    narrowed = getattr(guide, "narrowed", None)  # what nobody here asks for needn't run
    guide = narrowed(requests) if narrowed else guide
    loop = Loop(lm, config, guide, search, gate, progress)
    jobs = [loop.job(request) for request in requests]
    loop.submit(sorted(jobs, key=lambda job: len(job.prompt)))
    with torch.inference_mode():
        while loop.turn():
            pass
    return [loop.rollout(job) for job in jobs]


def stream(seed: int) -> Stream:
    """The row's random numbers, as many as it needs."""
    return Stream(lambda count: row_uniforms(seed, count))


def row_uniforms(seed: int, count: int) -> np.ndarray:
    """The row's random numbers in [0, 1): fixed by its seed alone."""
    digest = hashlib.sha256(f"equipoise:{seed}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little"))).random(count)


def _most(request: Request, config: Sampling) -> int:
    left = config.max_new_tokens - len(request.given)
    return left if request.most_tokens is None else min(request.most_tokens, left)


def _check_request(lm: LanguageModel, request: Request, length: int, config: Sampling, guide: Guide | None) -> None:
    most = _most(request, config)
    if most < 1 or not lm.eos_ids.isdisjoint(request.given):
        raise UserError(
            f"request {request.id!r} gives {len(request.given)} tokens to continue by at most {request.most_tokens}, with "
            f"max_new_tokens={config.max_new_tokens}: give fewer, and none that ends the turn"
        )
    if length + most > lm.context_length:
        raise UserError(
            f"prompt {request.prompt.id!r} has {length - len(request.given)} tokens; with max_new_tokens={most + len(request.given)} that "
            f"exceeds the context of {lm.context_length}: shorten the prompt or max_new_tokens"
        )
    if request.weights is not None:
        if guide is None:
            raise UserError(f"request {request.id!r} has weights {request.weights} but no guide was given")
        if not all(math.isfinite(w) for w in request.weights):
            raise UserError(f"request {request.id!r} has weights {request.weights}; weights are finite numbers")
        if len(request.weights) != len(guide.objectives):
            raise UserError(f"request {request.id!r} has {len(request.weights)} weights for objectives {', '.join(guide.objectives)}")


class Loop:
    """The running batch, and the requests that wait for a place in it; more may be submitted between turns.

    Each turn fills the free places, lets the gate look at the rows, and draws a token for each of them. A row that ends
    keeps its place through one forward, which it idles, where a prompt waits to take it: a copy of the rest would cost more.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: Sampling,
        guide: Guide | None = None,
        search: Search | None = None,
        gate: Gate | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.lm, self.config, self.guide, self.search, self.gate, self.progress = lm, config, guide, search, gate, progress
        self.known = known_tokens(lm.tokenizer)
        self.at_once = max(1, config.batch_size // (search.width if search else 1))
        self.waiting: deque[Job] = deque()
        self.ready: deque[tuple[int, Job]] = deque()
        """Requests whose prompts were run, as rows of `incoming`."""
        self.incoming: Batch | None = None
        self.batch: Batch | None = None
        self.rows: list[Row] = []
        self._law: tuple[Step, torch.Tensor] | None = None

    def job(self, request: Request, ids: Sequence[int] | None = None) -> Job:
        """A request as the loop takes it; `ids` are its prompt's tokens where they aren't those of the chat template.

        Raises `UserError` as `generate` does.
        """
        prompt = [*(prompt_ids(self.lm.tokenizer, request.prompt) if ids is None else ids), *request.given]
        _check_request(self.lm, request, len(prompt), self.config, self.guide)
        return Job(request, prompt, _most(request, self.config), stream(request.seed))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let these wait for a place, in this order; prompts of similar length are best run together."""
        self.waiting.extend(jobs)

    def cancel(self, job: Job) -> None:
        """Forget a request, wherever it is; its place is free from the next turn on."""
        self.waiting = deque(one for one in self.waiting if one is not job)
        self.ready = deque((at, one) for at, one in self.ready if one is not job)
        if not self.ready:
            self.incoming = None
        for row in self.rows:
            row.over |= row.job is job

    def turn(self) -> bool:
        """Bring every row a token further, or back where the gate wants it; False where all are finished."""
        if not self._fill():
            return False
        assert self.batch is not None
        if self.gate is None or not self.gate.review(self):
            self._turn(self.batch)
        return True

    def rollout(self, job: Job) -> Rollout:
        """The response of a request that is finished, and what it has cost."""
        return finish(job, self.lm, self.guide.forwards_per_step if self.guide else 0, self.config.whole_sentences)

    @property
    def law(self) -> tuple[Step, torch.Tensor]:
        """The step that comes next, and -log of its candidates' mass under the reference."""
        if self._law is None:
            assert self.batch is not None
            self._law = candidates(self.batch, self._weights([row.job for row in self.rows]), self.rows, self.known, self.config)
        return self._law

    def place(self, at: int) -> Place:
        """Where a row is now. Raises `UserError` where one of the models can't go back."""
        assert self.batch is not None
        if not self.batch.mergeable:
            raise UserError("going back on tokens needs models whose layers all attend to the full past: sample in another way")
        return Place(self.batch.mark(at), self.rows[at].copy())

    def restore(self, at: int, place: Place) -> None:
        """Bring a row back to one of its places; the random numbers that it has used stay used."""
        assert self.batch is not None
        self.batch.restore(at, place.mark)
        now, self.rows[at] = self.rows[at], place.row.copy()
        self.rows[at].drawn, self.rows[at].followed = now.drawn, now.followed
        self._law = None

    def count_followers(self) -> None:
        """Add what the followers have run since they were last asked to what the requests have cost."""
        assert self.batch is not None
        counts = [follower.forwards_R.tolist() for follower in self.batch.followers]
        for row, *own in zip(self.rows, *counts, strict=True):
            count = sum(own)
            if not row.over:
                row.job.followed += count - row.followed
            row.followed = count

    def end(self, job: Job, row: Row) -> None:
        """Make the row its request's response."""
        row.over, job.result = True, row
        if self.progress:
            self.progress(1)

    def _weights(self, jobs: Sequence[Job]) -> torch.Tensor:
        import torch

        count = len(self.guide.objectives) if self.guide else 0
        rows = [[float("nan")] * count if job.request.weights is None else list(job.request.weights) for job in jobs]
        return torch.tensor(rows, dtype=torch.float32, device=self.lm.device).reshape(len(jobs), count)

    def _fill(self) -> bool:
        """Give free places to waiting requests; False where all are finished."""
        if self.batch is None or all(row.over for row in self.rows):
            return self._start()
        free = [at for at, row in enumerate(self.rows) if row.over]
        new = self._room()
        more = max(new - len(free), 0)
        self._select([at for at in range(len(self.rows)) if at not in free[new:]] + [0] * more)
        fill = [at for at, row in enumerate(self.rows) if row.over or at >= len(self.rows) - more]
        while fill:
            self._prefill()
            slots, fill = fill[: len(self.ready)], fill[len(self.ready) :]
            self._take(slots)
        return True

    def _start(self) -> bool:
        """Make the requests that are ready the running batch."""
        import torch

        self._prefill()
        self.batch, self.rows = self.incoming, [Row(job) for _, job in self.ready]
        if self.batch is not None and len(self.ready) < len(self.batch.lengths_R):
            self.batch.select(torch.tensor([row for row, _ in self.ready], device=self.lm.device))
        self.incoming, self._law = None, None
        self.ready.clear()
        return self.batch is not None

    def _take(self, slots: list[int]) -> None:
        """Put the next requests that are ready in these places."""
        import torch

        assert self.batch is not None
        assert self.incoming is not None
        taken, device = [self.ready.popleft() for _ in slots], self.lm.device
        self.batch.take(torch.tensor(slots, device=device), self.incoming, torch.tensor([row for row, _ in taken], device=device))
        for at, (_, job) in zip(slots, taken, strict=True):
            self.rows[at] = Row(job)
        self._law = None
        if not self.ready:
            self.incoming = None

    def _room(self) -> int:
        """How many waiting requests may start now."""
        if not (self.waiting or self.ready) or self.batch is None or not self.batch.mergeable:
            return 0
        running = len({id(row.job) for row in self.rows if not row.over})
        return min(self.at_once - running, len(self.waiting) + len(self.ready))

    def _prefill(self) -> None:
        """Run the prompts of as many requests as run at once, where none is ready."""
        if self.ready or not self.waiting:
            return
        jobs = [self.waiting.popleft() for _ in range(min(self.at_once, len(self.waiting)))]
        prompts, guide = [job.prompt for job in jobs], self.guide
        count = branches(self.lm, self.config)
        room = max(job.most for job in jobs) + (count if guide and guide.forwards_per_step else 0)
        requests = [job.request for job in jobs]
        stems = [len(job.prompt) - len(job.request.given) for job in jobs]
        self.incoming = Batch(self.lm, prompts, guide.layers if guide else (), room, stems=stems)
        start = Start(batch=self.incoming, requests=requests, prompts=prompts, weights_RK=self._weights(jobs), candidates=count)
        self.incoming.followers += guide.follow(start) if guide else ()
        self.ready.extend(enumerate(jobs))

    def _select(self, keep: list[int]) -> None:
        import torch

        assert self.batch is not None
        if keep != list(range(len(self.rows))):
            self.batch.select(torch.tensor(keep, dtype=torch.long, device=self.lm.device))
            self.rows = [self.rows[at] for at in keep]
            self._law = None

    def _turn(self, batch: Batch) -> None:
        """Draw a token for each row, and run those that go on."""
        import torch

        step, floor_R = self.law
        law_RC = law_of(self.guide, step, self.config.greedy)
        self._law = None
        self.count_followers()
        for row in self.rows:
            row.job.reads += 1
        origin, choice_R, scores = self._choose(step, law_RC)
        from_R = torch.tensor(origin, device=self.lm.device)
        tokens_R = step.candidates_RC[from_R, choice_R]
        rows = self.rows if origin == list(range(len(self.rows))) else [self.rows[at].copy() for at in origin]
        record(rows, tokens_R, choice_R, law_RC[from_R], step.ref_logprobs_RC[from_R], floor_R[from_R])
        for row, score in zip(rows, scores, strict=True):
            row.score = score
            row.ended = row.tokens[-1] in self.lm.eos_ids or len(row.tokens) == row.job.most
        self._settle(rows)
        keep = self._stay(rows)
        if keep:
            self._run(batch, step, from_R[keep], choice_R[keep])
        else:
            self.batch = None

    def _run(self, batch: Batch, step: Step, from_R: torch.Tensor, choice_R: torch.Tensor) -> None:
        """Run the chosen candidates of the rows that keep their places."""
        if from_R.tolist() != list(range(len(step.candidates_RC))):
            batch.select(from_R)
            step = step.select(from_R)
        ahead = self.guide.advance(step, choice_R) if self.guide else None
        if ahead is None:
            batch.append(step.candidates_RC.gather(1, choice_R[:, None])[:, 0])
        else:
            batch.states = ahead
        for row in self.rows:
            row.job.runs += not row.over

    def _choose(self, step: Step, law_RC: torch.Tensor) -> tuple[list[int], torch.Tensor, list[float]]:
        """Which rows go on with which of their candidates, and what a search makes of it."""
        if self.search is not None:
            return self.search.extend(self.rows, law_RC, step)
        return list(range(len(self.rows))), invert_cdf(law_RC, [row.job.uniforms[row.drawn] for row in self.rows]), [0.0] * len(self.rows)

    def _settle(self, rows: Sequence[Row]) -> None:
        """Mark the rows that are over, and end the requests that have their response."""
        if self.search is not None:
            for job, own in by_job(rows):
                job.pool += [row for row in own if row.ended]
                going = [row for row in own if not row.ended]
                done = not going or self.search.over(job, going)
                for row in own:
                    row.over = done or row.ended
                if done:
                    self.end(job, self.search.best(job))
        elif self.gate is None:
            for row in rows:
                if row.ended:
                    self.end(row.job, row)

    def _stay(self, rows: Sequence[Row]) -> list[int]:
        """The rows that keep their places: those that go on, and as many of the others as prompts wait, if any row goes on."""
        self.rows = list(rows)
        spare = self._room() if self.search is None and not all(row.over for row in rows) else 0
        keep = []
        for at, row in enumerate(rows):
            if not row.over or spare > 0:
                keep.append(at)
                spare -= row.over
        self.rows = [rows[at] for at in keep]
        return keep
