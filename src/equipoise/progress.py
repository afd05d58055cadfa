"""What long work shows: a bar with the time left, on a terminal; a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


def say(text: str) -> None:
    """One line on stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` units of work; yields what is called with the units done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        work = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*work, *times, console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=total)
            yield lambda count: progress.advance(task, count)
        return
    yield _lines(title, total)


def _lines(title: str, total: int, every: float = 15.0) -> Callable[[int], None]:
    """A line at most every `every` seconds, and one at the end."""
    begun = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if done >= total or now - last >= every:
            last = now
            spent = now - begun
            left = f", about {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
            say(f"{title}: {done}/{total} in {spent:.0f} s{left}")

    return advance
