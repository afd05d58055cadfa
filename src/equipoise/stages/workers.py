"""Several processes share the work of a stage: each piece is done by one of them, and a killed process loses nothing.

A piece is claimed by a lock on a file in its folder, which the operating system frees when its holder ends, however it ends. So
workers need no master: two commands on one folder share the work too, and what a dead process had begun another one takes over.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from equipoise.progress import say
from equipoise.types import UserError

Piece = TypeVar("Piece")
LOGS = ".workers"
"""Folder of the workers' logs; hidden, since the folders beside it have the user's names."""
_CLAIM = ".claim"
_PATIENCE = 0.5  # seconds


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether the folder is this process's own while the block runs; False where another one holds it.

    Raises `UserError` where the file system can't lock.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _CLAIM, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise UserError(f"can't lock {folder / _CLAIM} ({error.strerror}); write to a file system that has locks") from None
        yield True


def each_once(pieces: Sequence[Piece], folder: Callable[[Piece], Path], work: Callable[[Piece], object]) -> None:
    """Do every piece, but those at which another process is, and come back to these until it is known that they are done.

    `work` of a finished piece returns at once, so that a piece whose process died is done here.
    """
    left = list(pieces)
    while left:
        held = []
        for piece in left:
            with claimed(folder(piece)) as mine:
                if mine:
                    work(piece)
                else:
                    held.append(piece)
        if len(held) == len(left):
            time.sleep(_PATIENCE)
        left = held


def run_workers(count: int, logs: Path, work: Callable[..., None], args: Sequence[Any], watch: Callable[[], None]) -> None:
    """`work(*args)` in `count` fresh processes, each of which sees to it that all is done; `watch` is called now and then.

    They divide the cores unless OMP_NUM_THREADS says how many threads each has, and end with this process. A worker that dies is
    reported; the others go on. Raises `UserError` where none reached the end.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    places = [logs / f"worker-{i}.log" for i in range(1, count + 1)]
    children = [context.Process(target=_child, args=(str(place), work, tuple(args)), name=place.stem) for place in places]
    at_work = dict(zip(children, places, strict=True))
    ended = []
    try:
        with _threads(count):
            for child in children:
                child.start()
        while at_work:
            wait([child.sentinel for child in at_work], timeout=_PATIENCE)
            watch()
            for child in [c for c in at_work if not c.is_alive()]:
                place = at_work.pop(child)
                if child.exitcode:
                    ended.append(f"{child.name} ended with exit code {child.exitcode}{_last_line(place)}; its log is {place}")
                    say(ended[-1])
    finally:
        for child in children:
            if child.pid is not None:
                child.kill()
                child.join()
    if len(ended) == count:
        raise UserError(f"{ended[0]}; no worker is left: run the same command again, what is finished is kept")


def _child(log: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    """A worker: its output goes to the log, and it ends when its parent does."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by a process"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    with open(log, "a", buffering=1, encoding="utf-8") as handle:
        os.dup2(handle.fileno(), sys.stdout.fileno())
        os.dup2(handle.fileno(), sys.stderr.fileno())
        threading.Thread(target=end_with_parent, daemon=True).start()
        say(f"process {os.getpid()}")
        try:
            work(*args)
        except UserError as error:
            say(f"equipoise: {' '.join(str(error).splitlines())}")
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """What processes that are started here read from the environment before any of their code runs."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, (os.cpu_count() or 1) // count))
    try:
        yield
    finally:
        del os.environ[name]


def _last_line(log: Path) -> str:
    """What a worker said at last, where it said why it ended."""
    with contextlib.suppress(OSError, IndexError):
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1]
        return f" ({last.removeprefix('equipoise: ')})" if last.startswith("equipoise: ") else ""
    return ""
