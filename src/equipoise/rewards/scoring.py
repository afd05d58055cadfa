"""Rollouts to reward vectors: every scorer over every response, in shards that survive a kill.

A scorer that raises stops the stage with its name and the response it choked on; finished shards stay. NaN is kept as
"unscored" and counted; it is never a zero. Texts that a scorer had to cut are counted in the shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from equipoise.runs import rollouts_digest, write_atomic
from equipoise.types import Prompt, Response, Reward, Rewards, UserError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Text:
    """A response that wasn't sampled here, as the scorers are given it."""

    id: str
    prompt_id: str
    text: str


@dataclass(frozen=True)
class ScoredRun:
    """The responses of a folder with their scores."""

    folder: Path
    prompts: Mapping[str, Prompt]
    responses: Sequence[Response]
    rewards: Rewards
    scorers: Mapping[str, str]
    """What identifies each objective's scorer, weights included."""

    def reward_of(self, objectives: Sequence[str]) -> np.ndarray:
        """The scores in this order of objectives, [N, K]. Raises `UserError` where one isn't scored."""
        for name in objectives:
            if name not in self.rewards.objectives:
                raise UserError(f"{self.folder} has no scores for {name!r}: score it on {', '.join(objectives)}")
        return self.rewards.reward_NK[:, [self.rewards.objectives.index(name) for name in objectives]]


def score(rewards: Sequence[Reward], prompts: Mapping[str, Prompt], rollouts: Sequence[Response]) -> np.ndarray:
    """reward_NK of the rollouts. Raises `UserError` naming a scorer that failed and on which rollout."""
    asked, texts = [prompts[r.prompt_id] for r in rollouts], [r.text for r in rollouts]
    columns = []
    for reward in rewards:
        try:
            column = checked(reward, reward(asked, texts), len(texts))
        except UserError:
            raise
        except Exception as error:
            raise UserError(_blame(reward, asked, texts, rollouts, error)) from error
        columns.append(np.where(np.isfinite(column), column, np.nan))
    return np.stack(columns, axis=1) if columns else np.zeros((len(rollouts), 0))


def checked(reward: Reward, scores: object, count: int) -> np.ndarray:
    """What a scorer returned, as float64 [count]. Raises `UserError` where it isn't one number per response."""
    column = np.asarray(scores, dtype=np.float64)
    if column.shape != (count,):
        raise UserError(f"reward {reward.name!r} returned shape {column.shape} for {count} responses; it must return one number each")
    return column


def _blame(reward: Reward, prompts: list[Prompt], texts: list[str], rollouts: Sequence[Response], error: Exception) -> str:
    """Find the first response the scorer fails on, so that the message names it."""
    for prompt, text, rollout in zip(prompts, texts, rollouts, strict=True):
        try:
            reward([prompt], [text])
        except Exception as single:  # noqa: BLE001 a scorer may raise anything, and its message goes to the user
            return (
                f"reward {reward.name!r} failed on rollout {rollout.id!r} ({type(single).__name__}: {single}); "
                "mend it and run again: finished shards are kept"
            )
    return f"reward {reward.name!r} failed on a batch of {len(texts)} but on none of them alone ({type(error).__name__}: {error})"


def score_shards(
    rewards: Sequence[Reward],
    prompts: Mapping[str, Prompt],
    rollouts: Sequence[Response],
    folder: Path,
    shard_size: int,
    progress: Callable[[int], None] | None = None,
) -> Rewards:
    """Score what is missing, a shard at a time, and return all scores.

    Raises `UserError` where an objective could score nothing at all, or a shard belongs to other rollouts.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [r.name for r in rewards]
    parts = []
    for index, start in enumerate(range(0, len(rollouts), shard_size)):
        part, path = rollouts[start : start + shard_size], folder / f"part-{index:05d}.parquet"
        if not path.exists():
            before = [_truncated(r) for r in rewards]
            reward_NK = score(rewards, prompts, part)
            cut = {r.name: _truncated(r) - b for r, b in zip(rewards, before, strict=True)}
            columns = {"rollout_id": [r.id for r in part], **{n: reward_NK[:, k] for k, n in enumerate(names)}}
            table = pa.table(columns).replace_schema_metadata({"rollouts": rollouts_digest(part), "truncated": json.dumps(cut)})
            write_atomic(path, lambda scratch, table=table: pq.write_table(table, scratch, compression="zstd"))  # type: ignore[misc]
        parts.append(_read(path, names, rollouts_digest(part)))
        if progress:
            progress(len(part))
    reward_NK = np.concatenate(parts) if parts else np.zeros((0, len(names)))
    for k, name in enumerate(names):
        if len(reward_NK) and not np.isfinite(reward_NK[:, k]).any():
            raise UserError(
                f"reward {name!r} scored none of {len(reward_NK)} responses (all NaN): mend it, delete the folder {folder} and score again"
            )
    return Rewards(
        reward_NK=reward_NK, objectives=tuple(names), rollout_ids=tuple(r.id for r in rollouts), digest=rollouts_digest(rollouts)
    )


def truncated(folder: Path, objectives: Sequence[str]) -> dict[str, int]:
    """How many texts of a folder's shards were longer than a scorer's model allows and were cut, by objective."""
    counts = [json.loads((_table(path).schema.metadata or {}).get(b"truncated", b"{}")) for path in sorted(folder.glob("*.parquet"))]
    return {name: sum(count.get(name, 0) for count in counts) for name in objectives}


def _truncated(reward: Reward) -> int:
    return int(getattr(reward, "n_truncated", 0))


def _read(path: Path, names: Sequence[str], digest: str) -> np.ndarray:
    table = _table(path, digest)
    missing = [n for n in names if n not in table.column_names]
    if missing:
        raise UserError(f"{path} has no scores for {missing[0]!r}; delete the folder {path.parent} and score again")
    return np.stack([table[n].to_numpy(zero_copy_only=False).astype(np.float64) for n in names], axis=1)


def _table(path: Path, digest: str | None = None) -> pa.Table:
    """A shard, of the rollouts with this digest where one is given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).rpartition("': ")[2]
        raise UserError(f"{path} is damaged ({reason}); delete it and run `score` again: it alone is redone") from None
    if digest is not None and (table.schema.metadata or {}).get(b"rollouts", b"").decode() != digest:
        raise UserError(f"{path} holds scores of other rollouts; delete the folder {path.parent} and score again")
    return table


def read_rewards(folder: Path, rollouts: Sequence[Response]) -> Rewards:
    """Scores of a folder. Raises `UserError` where they are of other rollouts, texts included, or of a part of these."""
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise UserError(f"no rewards in {folder}; run `equipoise score` first")
    sizes = [len(_table(path)) for path in shards]
    if sum(sizes) != len(rollouts):
        raise UserError(f"{folder} has scores of {sum(sizes)} rollouts, not of these {len(rollouts)}; run `score` to its end")
    names = [n for n in _table(shards[0]).column_names if n != "rollout_id"]
    starts = np.cumsum([0, *sizes]).tolist()
    parts = [
        _read(path, names, rollouts_digest(rollouts[start:end])) for path, start, end in zip(shards, starts[:-1], starts[1:], strict=True)
    ]
    ids = tuple(r.id for r in rollouts)
    return Rewards(reward_NK=np.concatenate(parts), objectives=tuple(names), rollout_ids=ids, digest=rollouts_digest(rollouts))
