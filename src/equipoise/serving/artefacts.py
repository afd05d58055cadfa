"""Offers from what lies in run folders: their manifests say what was made there, and so what can be served of it.

train value, train value_model                    values          steered by them, weights and KL budget or beta per request
train dpo, modpo, ppo, online_dpo, sft, map       policy          the tuned policy; weights where it reads them
train autoregressive                              guides          reward models that read along
train ric                                         in_context      asked for scores
sample, with rewards beside it                    the bank        targets, and the scale of the rewards
sweep, compare                                    the front       what the page draws
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.runs import read_json
from equipoise.types import UserError

_POLICIES = ("dpo", "modpo", "ppo", "online_dpo", "sft", "map")


@dataclass(kw_only=True)
class Found:
    """What was found."""

    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> what steers it."""
    bank: Path | None = None
    fronts: list[Path] = field(default_factory=list)
    """Files evaluation.json."""


def find(folders: Sequence[Path]) -> Found:
    """What can be served of these folders and of those right inside them.

    Raises `UserError` for a folder without anything, and for one whose manifest can't be read.
    """
    found = Found()
    for folder in folders:
        inside = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())] if folder.is_dir() else []
        known = [_take(found, path) for path in inside if (path / "manifest.json").is_file()]
        if not any(known):
            raise UserError(f"{folder} has nothing to serve: name a run folder, or one that holds some, as runs/demo")
    return found


def _take(found: Found, path: Path) -> bool:
    """Add what the folder has; False where that is nothing to serve."""
    command = str(read_json(path / "manifest.json").get("command", ""))
    steered = _steering(command.removeprefix("train "), path) if command.startswith("train ") else None
    if steered:
        name = path.name if path.name not in found.methods else f"{path.parent.name}-{path.name}"
        found.methods[name] = steered
    elif command == "sample" and (path / "rewards" / "manifest.json").is_file():
        found.bank = found.bank or path
    elif command in ("sweep", "compare") and (path / "evaluation.json").is_file():
        found.fronts.append(path / "evaluation.json")
    else:
        return False
    return True


def _steering(kind: str, path: Path) -> dict[str, Any] | None:
    from equipoise.stages.preferences import trained_folder

    if kind in ("value", "value_model"):
        return {"values": str(path)}
    if kind in _POLICIES:
        return {"policy": str(trained_folder(path))}
    if kind == "autoregressive":
        return {"guides": (str(trained_folder(path)),)}
    return {"in_context": str(path)} if kind == "ric" else None
