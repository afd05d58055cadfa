"""Runs in processes of their own, which a test can kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def child_runner(target: Callable[..., Any], model: Path) -> Callable[[Path, int], int | None]:
    """run(out, dies_at): the exit code of `target(out, model, dies_at)` in a new process."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["equipoise.training.fit", "peft", "transformers.models.llama.modeling_llama"])

    def run(out: Path, dies_at: int) -> int | None:
        child = server.Process(target=target, args=(str(out), str(model), dies_at))
        child.start()
        child.join(120)
        return child.exitcode

    return run


def dying(function: Callable[..., Any], dies_at: int) -> Callable[..., Any]:
    """The function, whose process is killed as it is called for the `dies_at`-th time (0: never)."""
    count = 0

    def deadly(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return deadly
