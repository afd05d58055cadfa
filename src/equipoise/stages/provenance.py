"""What it took to make a method's artefacts: the time of every run that they rest on, found through the digests of the manifests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from equipoise.runs import file_digest, read_json

_MANIFEST = "manifest.json"
_DEPTH = 4
"""Folders between an artefact's file and its run's."""


def making_seconds(files: Iterable[Path]) -> float | None:
    """Processor seconds of all runs that these files rest on, each counted once; None where none of them has a run.

    A run's parents are known by digest and looked for in its folder's neighbourhood: beside it, one folder down, one up. Where a
    manifest has no processor seconds the clock's stand in; of a run that was killed and continued they are the last process's.
    """
    places: dict[str, set[Path]] = {}
    seen: set[Path] = set()
    told: dict[Path, dict[str, Any]] = {}
    waiting = [folder for file in files if (folder := _run_of(file))]
    if not waiting:
        return None
    while waiting:
        folder = waiting.pop()
        if folder in told:
            continue
        told[folder] = read_json(folder / _MANIFEST)
        if folder.parent not in seen:
            seen.add(folder.parent)
            for digest, made in _made_near(folder):
                places.setdefault(digest, set()).add(made)
        # A file that several runs wrote alike, such as an adapter's settings, doesn't say which of them; its neighbours do.
        waiting += [made for digest in told[folder]["parents"].values() if len(places.get(digest, ())) == 1 for made in places[digest]]
    return sum(float(m.get("cpu_seconds") or m.get("seconds") or 0.0) for m in told.values())


def _run_of(file: Path) -> Path | None:
    """The folder of the run that wrote a file."""
    above = list(file.resolve().parents)[:_DEPTH]
    return next((folder for folder in above if _read(folder / _MANIFEST) is not None), None)


def _made_near(folder: Path) -> Iterator[tuple[str, Path]]:
    """(digest, run folder) of every manifest near a run's folder, and of the files that each lists."""
    beside = folder.parent
    for path in sorted({*beside.glob(f"*/{_MANIFEST}"), *beside.glob(f"*/*/{_MANIFEST}"), *beside.parent.glob(f"*/{_MANIFEST}")}):
        manifest = _read(path)
        if manifest is not None:
            yield file_digest(path), path.parent
            yield from ((digest, path.parent) for digest in manifest["outputs"].values())


def _read(path: Path) -> dict[str, Any] | None:
    """A run's manifest; None of a file that has only its name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"parents", "outputs", "command"} <= found.keys() else None
