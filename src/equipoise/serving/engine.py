"""The thread that owns the models: requests of many clients share its batches, whatever their weights and lengths.

    submit -> a line per client -> places, one client after another -> token loops, one per method and way of drawing -> replies

A place is a row of a batch; there are `places` of them over all loops, which take turns. A response's tokens don't depend on who else
is there: every row has its own random numbers (models/generation.py). Work that is cancelled gives its places back at the next token.
Nothing here knows HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from equipoise.serving.explaining import Explained
from equipoise.types import Request, Rollout, UserError

if TYPE_CHECKING:
    from equipoise.models.generation import Loop
    from equipoise.models.hypotheses import Job, Row


class BusyError(UserError):
    """There is no room for more requests; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one of the responses has gained."""

    index: int
    text: str
    push: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """(token's text, nats by objective) of each new token, where they were asked for."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A response as it is shown."""

    rollout: Rollout
    text: str
    """All of it, up to a stop string."""
    push: tuple[tuple[str, tuple[float, ...]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Done:
    """What `conclude` made of the replies."""

    result: Any


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Why there is no result."""

    error: Exception


Event = Piece | Done | Failed


@dataclass(eq=False, kw_only=True)
class Work:
    """What a client waits for: requests that run in one loop."""

    client: str
    """Clients take turns."""
    key: Hashable
    """Work of equal keys shares a loop."""
    open: Callable[[], Loop]
    """Makes the loop, where none of this key runs."""
    requests: Sequence[Request]
    ids: Sequence[int]
    """Tokens of the prompt, the same for all of them."""
    tell: Callable[[Event], None]
    """Called from the engine's thread."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, and are no part of it."""
    streams: bool = False
    """Whether pieces are told."""
    explains: bool = False
    """Whether it is told what pushed each token."""
    about: Any = None
    """For `conclude`."""
    cancelled: bool = False
    replies: dict[int, Reply] = field(default_factory=dict)


@dataclass(eq=False)
class _Running:
    work: Work
    index: int
    job: Job
    seen: int = 0
    shown: str = ""
    stopped: str | None = None
    """The text up to a stop string."""
    push: list[tuple[str, tuple[float, ...]]] = field(default_factory=list)


class FairQueue:
    """Items of several clients, which take turns; those of one client in the order in which they came."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Any]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def put(self, client: str, item: Any) -> None:
        """Let the item wait behind its client's others."""
        self._lines.setdefault(client, deque()).append(item)

    def pop(self) -> Any:
        """The first item of the client whose turn it is, who goes behind the others. Raises `StopIteration` where nobody waits."""
        client = next(iter(self._lines))
        line = self._lines.pop(client)
        item = line.popleft()
        if line:
            self._lines[client] = line
        return item

    def drop(self, gone: Callable[[Any], bool]) -> None:
        """Forget items."""
        kept = {client: deque(item for item in line if not gone(item)) for client, line in self._lines.items()}
        self._lines = {client: line for client, line in kept.items() if line}


@dataclass
class Counts:
    """What the engine has done since it began."""

    tokens: int = 0
    responses: int = 0
    failed: int = 0
    busy_s: float = 0.0
    turns: int = 0


class Engine:
    """Runs work until it is closed."""

    def __init__(self, conclude: Callable[[Sequence[Work]], Sequence[Any]], places: int, queue: int) -> None:
        """`conclude` makes the results of finished work, several at once; `queue` is how many responses may wait."""
        self._conclude, self.places, self.limit = conclude, places, queue
        self._queue, self._changed = FairQueue(), threading.Condition()
        self._loops: dict[Hashable, tuple[Loop, list[_Running]]] = {}
        self._closing = False
        self._rate = 0.0
        """Responses per busy second, lately."""
        self.counts = Counts()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, wait_s: float | None = None) -> None:
        """Finish all that was submitted, take no more, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    @property
    def alive(self) -> bool:
        """Whether work would be done."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Responses that wait for a place."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Responses that have one."""
        return sum(len(active) for _, active in list(self._loops.values()))

    def submit(self, work: Work) -> None:
        """Let work wait for its places. Raises `BusyError` where too much waits already, or no more is taken."""
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise BusyError("the server is going down: ask it again when it is back", 5.0)
            if len(self._queue) + len(work.requests) > self.limit:
                after = min(60.0, max(1.0, len(self._queue) / self._rate)) if self._rate else 5.0
                raise BusyError(f"{len(self._queue)} responses wait already, of at most {self.limit}: try again later", after)
            for index in range(len(work.requests)):
                self._queue.put(work.client, (work, index))
            self._changed.notify()

    def cancel(self, work: Work) -> None:
        """Nobody waits for it any more."""
        with self._changed:
            work.cancelled = True
            self._changed.notify()

    # --- in the thread

    def _run(self) -> None:
        import torch

        with torch.inference_mode():
            while self._wait():
                begun = time.perf_counter()
                self._drop_cancelled()
                self._admit()
                finished = [work for key in list(self._loops) for work in self._turn(key)]
                if finished:
                    self._finish(finished)
                self.counts.busy_s += time.perf_counter() - begun

    def _wait(self) -> bool:
        """Until there is something to do; False where there will be nothing any more."""
        with self._changed:
            while not (len(self._queue) or self._loops or self._closing):
                self._changed.wait()
            return bool(len(self._queue) or self._loops)

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._queue.drop(lambda item: item[0].cancelled)
        for key, (loop, active) in list(self._loops.items()):
            for one in active:
                if one.work.cancelled:
                    loop.cancel(one.job)
            self._keep(key, [one for one in active if not one.work.cancelled])

    def _keep(self, key: Hashable, active: list[_Running]) -> None:
        """What is left of a loop; one that nobody uses is given up, with its cache."""
        if active:
            self._loops[key] = (self._loops[key][0], active)
        else:
            del self._loops[key]

    def _admit(self) -> None:
        while self.running < self.places:
            with self._changed:
                if not len(self._queue):
                    return
                work, index = self._queue.pop()
            if work.cancelled:
                continue
            try:
                loop, active = self._loops.get(work.key) or (work.open(), [])
                job = loop.job(work.requests[index], work.ids)
            except Exception as error:  # noqa: BLE001 whatever is wrong with one request, the others go on
                self._fail([work], error)
                continue
            loop.submit([job])
            active.append(_Running(work, index, job))
            self._loops[work.key] = (loop, active)

    def _turn(self, key: Hashable) -> list[Work]:
        """A token for every row of a loop; returns the work that is finished by it."""
        loop, active = self._loops[key]
        try:
            loop.turn()
        except Exception as error:  # noqa: BLE001 the loop's rows are lost; the server is not
            self._fail([one.work for one in active], error)
            self._keep(key, [])
            return []
        self.counts.turns += 1
        rows = {id(row.job): row for row in loop.rows}
        for one in active:
            row = one.job.result or rows.get(id(one.job))
            if row is not None and len(row.tokens) > one.seen:
                self._observe(loop, one, row)
        done = [one for one in active if one.job.result is not None]
        for one in done:
            self._reply(loop, one)
        self._keep(key, [one for one in active if one.job.result is None])
        return list(dict.fromkeys(one.work for one in done if len(one.work.replies) == len(one.work.requests)))

    def _observe(self, loop: Loop, one: _Running, row: Row) -> None:
        """Count what is new, tell it, and end the response at a stop string."""
        new, work = row.tokens[one.seen :], one.work
        self.counts.tokens += len(new)
        one.seen = len(row.tokens)
        push: list[tuple[str, tuple[float, ...]]] = []
        if work.explains and isinstance(loop.guide, Explained):
            # A token of half a character shows as a replacement mark; the page joins those of one character.
            push = [(loop.lm.tokenizer.decode([token]), loop.guide.push(work.requests[one.index].id, token)) for token in new]
            one.push += push
        if not (work.streams or work.stop):
            return
        text = row.text(loop.lm, whole=False)[0]
        cut = min((at for at in (text.find(s) for s in work.stop) if at >= 0), default=None)
        if cut is not None:
            text = one.stopped = text[:cut]
            if one.job.result is None:
                loop.end(one.job, row)
        # Half a character, or the beginning of a stop string, waits for what comes next.
        steady = text if one.job.result is not None else _steady(text, work.stop)
        if work.streams and (len(steady) > len(one.shown) or push):
            work.tell(Piece(index=one.index, text=steady[len(one.shown) :], push=tuple(push)))
            one.shown = max(steady, one.shown, key=len)

    def _reply(self, loop: Loop, one: _Running) -> None:
        rollout, result = loop.rollout(one.job), one.job.result
        assert result is not None
        text = result.text(loop.lm, whole=False)[0] if one.stopped is None else one.stopped
        if one.stopped is not None:
            rollout = replace(rollout, text=text, finish_reason="stop")
        one.work.replies[one.index] = Reply(rollout=rollout, text=text, push=tuple(one.push))
        self.counts.responses += 1

    def _finish(self, finished: list[Work]) -> None:
        begun = time.perf_counter()
        try:
            results = self._conclude(finished)
        except Exception as error:  # noqa: BLE001 one of them is to blame, who is found alone
            if len(finished) == 1:
                return self._fail(finished, error)
            for work in finished:
                self._finish([work])
            return None
        for work, result in zip(finished, results, strict=True):
            work.tell(Done(result=result))
        rate = self.counts.responses / max(self.counts.busy_s + time.perf_counter() - begun, 1e-9)
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        for work in dict.fromkeys(works):
            work.cancelled = True  # what else of it waits or runs is dropped
            self.counts.failed += 1
            work.tell(Failed(error=error))


def _steady(text: str, stops: Sequence[str]) -> str:
    """As much of a growing text as no further token can change."""
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]
