"""Run folders: what a stage wrote, from what, with which settings; and files that are never half-written.

A stage's folder holds `manifest.json` and the stage's files. Running a stage again with the same settings and parents
continues it; with others it is refused, so that no figure ever mixes two settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from equipoise.types import Response, UserError

EXECUTION = {"execution": True}
"""Metadata of a config's field that says how a stage runs (workers, timeouts, a cache) and not what it makes."""

_PACKAGES = ("equipoise", "torch", "transformers", "numpy", "safetensors", "pyarrow", "moocore")


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises `UserError` where there is none."""
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; run the stage that writes it to its end") from None


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of the files that lie in a folder, hidden ones and subfolders left out."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return digest_of([[p.name, file_digest(p)] for p in files])


def rollouts_digest(rollouts: Sequence[Response]) -> str:
    """SHA-256 over ids and texts, which scores are bound to."""
    digest = hashlib.sha256()
    for rollout in rollouts:
        digest.update(f"{rollout.id}\0{rollout.prompt_id}\0{rollout.text}\0".encode())
    return digest.hexdigest()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it; on failure nothing is left.

    Raises `UserError` naming the file where the disk is full or the folder can't be written.
    """
    from safetensors import SafetensorError  # what it raises on a full disk is no OSError

    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        with open(scratch, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"could not write {path} ({reason}); what was finished before is kept: make room and run again") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` for text."""
    write_atomic(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for JSON; NaN and infinity become null."""
    write_text(path, json.dumps(plain(value), indent=1, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file; raises `UserError` where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run the stage that writes it again") from None


def manifest_of(folder: Path, command: str) -> dict[str, Any]:
    """What a finished stage left on record. Raises `UserError` where the folder holds no such stage."""
    record = read_json(folder / "manifest.json")
    if not isinstance(record, dict) or record.get("command") != command:
        found = record.get("command") if isinstance(record, dict) else None
        raise UserError(f"{folder} is not a `{command}` folder" + (f" but one of `{found}`" if found else ""))
    return record


def recorded(config: Any) -> dict[str, Any]:
    """A config as a manifest keeps it: what decides the result, without the fields marked `EXECUTION`."""
    kept = {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata.get("execution")}
    return {name: recorded(value) if is_dataclass(value) else value for name, value in kept.items()}


def plain(value: Any) -> Any:
    """A value as JSON holds it: records, arrays and paths made plain, NaN and infinity null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # arrays and their scalars
        return plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def stage(folder: Path, command: str, config: Any, parents: Mapping[str, Path] | None = None) -> Iterator[Manifest]:
    """Open a stage's folder: check that it belongs to these settings, and write the manifest when the stage ends well.

    `parents` are the manifests or files the stage reads; their digests go into the manifest, so that any number traces
    back to its prompts. Raises `UserError` where the folder holds a run of other settings.
    """
    with begun(Manifest(folder, command, plain(config), {k: file_digest(p) for k, p in (parents or {}).items()})) as manifest:
        yield manifest


@contextlib.contextmanager
def begun(manifest: Manifest) -> Iterator[Manifest]:
    """Check that the manifest's folder belongs to it, and write it when the block ends well. Raises `UserError` as `stage` does."""
    manifest.check()
    write_json(manifest.folder / "started.json", manifest.identity())
    yield manifest
    manifest.finish()


class Manifest:
    """What identifies a stage's result, what it cost and what it wrote."""

    def __init__(self, folder: Path, command: str, config: Any, parents: dict[str, str]) -> None:
        self.folder, self.command, self.config, self.parents = folder, command, config, parents
        self.outputs: list[Path] = []
        self.facts: dict[str, Any] = {}
        self.pending = False
        """Whether other processes are still at work on the folder: the last one writes the manifest."""
        self.begun, self.cpu_begun = time.time(), time.process_time()

    @property
    def path(self) -> Path:
        """Where the manifest is written."""
        return self.folder / "manifest.json"

    @property
    def done(self) -> bool:
        """Whether an earlier run of the same settings finished and all it wrote is still there, unchanged."""
        if not self.path.exists():
            return False
        outputs = read_json(self.path)["outputs"]
        return all((self.folder / n).exists() and file_digest(self.folder / n) == digest for n, digest in outputs.items())

    def identity(self) -> dict[str, Any]:
        """What must be equal for a stage to be continued."""
        return {"command": self.command, "config": self.config, "parents": self.parents}

    def check(self) -> None:
        """Refuse a folder that holds another run."""
        for name in ("manifest.json", "started.json"):
            path = self.folder / name
            if not path.exists():
                continue
            earlier = read_json(path)
            for key, value in self.identity().items():
                if earlier.get(key) != value:
                    other = _difference(key, earlier.get(key), value)
                    raise UserError(f"{self.folder} holds a run with another {other}; choose another folder or delete it")

    def finish(self) -> None:
        """Write the manifest. It is a parent of later stages, so a finished one is left byte for byte as it was."""
        if self.pending or self.done:
            return
        outputs = {str(p.relative_to(self.folder)): file_digest(p) for p in self.outputs}
        record = {
            **self.identity(),
            "versions": versions(),
            "outputs": outputs,
            "facts": self.facts,
            "seconds": round(time.time() - self.begun, 1),
            "cpu_seconds": round(time.process_time() - self.cpu_begun, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(self.path, record)


def _difference(key: str, old: Any, new: Any) -> str:
    """The first entry that differs, as "config.max_new_tokens: 32, now 40"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                return _difference(f"{key}.{name}", old.get(name), new.get(name))
    return f"{key} ({old!r}, now {new!r})"
