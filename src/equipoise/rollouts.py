"""Prompts to rollouts through any Sampler, kept as Parquet shards that survive a kill.

Shard i holds requests i*size .. (i+1)*size - 1, so a rerun samples exactly the shards that are missing, each in the
batch it would have had: the result equals that of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.memory import begin_peak, peak_bytes
from equipoise.runs import write_atomic
from equipoise.types import Prompt, Request, Rollout, Sampler, UserError

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_BATCHES = 4
"""Batches of a stage's shard: the places of finished rows are taken over by others of the shard."""
_COLUMNS = [field.name for field in fields(Rollout) if field.metadata.get("stored", True)]
_LATER = {"reward_calls", "prompt_tokens"}
"""What the shards of older versions lack."""


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = {
        "tokens": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "ref_logprobs": pa.list_(pa.float32()),
        "weights": pa.list_(pa.float64()),
        "kl": pa.float64(),
        "kl_floor": pa.float64(),
        "seed": pa.int64(),
        "text_tokens": pa.int64(),
        "base_forwards": pa.int64(),
        "guide_forwards": pa.int64(),
        "reward_calls": pa.int64(),
        "prompt_tokens": pa.int64(),
    }
    return pa.schema([(name, kinds.get(name, pa.string())) for name in _COLUMNS], metadata={"equipoise": "rollouts-1"})


def request_seed(seed: int, request_id: str) -> int:
    """A row's seed from the run's seed and the row's id: 63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{request_id}".encode()).digest()[:8], "little") >> 1


def make_requests(prompts: Sequence[Prompt], samples: int, seed: int, weights: tuple[float, ...] | None = None) -> list[Request]:
    """`samples` requests per prompt. The seed depends on prompt and sample only, so methods share random numbers."""
    tag = "" if weights is None else "@" + ",".join(f"{w:g}" for w in weights)
    return [
        Request(id=f"{p.id}/{i}{tag}", prompt=p, seed=request_seed(seed, f"{p.id}/{i}"), weights=weights)
        for p in prompts
        for i in range(samples)
    ]


def write_rollouts(path: Path, rollouts: Sequence[Rollout], seconds: float = 0.0, peak: int | None = None) -> None:
    """One Parquet shard, under a temporary name until it is whole; it took `seconds` to sample, and `peak` bytes of memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [getattr(r, name) for r in rollouts] for name in _COLUMNS}
    columns = {name: [list(v) if isinstance(v, tuple) else v for v in values] for name, values in columns.items()}
    table = pa.table(columns, schema=_schema())
    cost = {"seconds": f"{seconds:.4f}"} | ({} if peak is None else {"peak_bytes": str(peak)})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **cost})
    write_atomic(path, lambda scratch: pq.write_table(table, scratch, compression="zstd"))


def read_shard(path: Path) -> list[Rollout]:
    """The rollouts of one shard. Raises `UserError` naming a damaged file and what to do."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        there = set(pq.read_schema(path).names)
        rows = pq.read_table(path, columns=[name for name in _COLUMNS if name in there or name not in _LATER]).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = str(error).rpartition("': ")[2]
        raise UserError(
            f"{path} is damaged or not a rollout shard ({reason}); delete it and run `sample` again: it alone is redone"
        ) from None
    return [_rollout(row) for row in rows]


def _rollout(row: Mapping[str, Any]) -> Rollout:
    """A rollout from a row of its shard, whose lists become tuples again."""
    columns: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Rollout(**columns)


def read_rollouts(folder: Path) -> list[Rollout]:
    """All rollouts of a folder, in the order of the shards' names. Raises `UserError` where there are none."""
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise UserError(f"no rollouts in {folder}; run `equipoise sample` first")
    return [rollout for shard in shards for rollout in read_shard(shard)]


def collect(
    sampler: Sampler,
    requests: Sequence[Request],
    folder: Path,
    shard_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample what is missing and return all rollouts, in the order of the requests.

    Raises `UserError` where an existing shard is damaged or holds other requests.
    """
    rollouts: list[Rollout] = []
    for index, start in enumerate(range(0, len(requests), shard_size)):
        part = requests[start : start + shard_size]
        path = folder / f"part-{index:05d}.parquet"
        if path.exists():
            done = read_shard(path)
            if [r.id for r in done] != [r.id for r in part] or [r.seed for r in done] != [r.seed for r in part]:
                raise UserError(f"{path} holds other requests than this run's; choose another folder or delete it")
        else:
            measured, begun = begin_peak(), time.perf_counter()
            done = sampler(part)
            write_rollouts(path, done, time.perf_counter() - begun, peak_bytes() if measured else None)
        rollouts.extend(done)
        if progress:
            progress(len(done))
    return rollouts


def sampling_seconds(folder: Path) -> float:
    """Seconds that the shards of a folder took to sample."""
    return sum(float(facts.get(b"seconds", b"0")) for facts in _facts(folder))


def sampling_peak(folder: Path) -> int | None:
    """The most bytes of memory that a process held while it sampled a shard of the folder; None where a shard doesn't say."""
    peaks = [facts.get(b"peak_bytes") for facts in _facts(folder)]
    known = [int(peak) for peak in peaks if peak is not None]
    return max(known) if known and len(known) == len(peaks) else None


def _facts(folder: Path) -> list[dict[bytes, bytes]]:
    """What each shard of a folder says of its sampling."""
    import pyarrow.parquet as pq

    return [pq.read_schema(path).metadata or {} for path in sorted(folder.glob("*.parquet"))]
