"""Rollouts on disk: nothing lost on the way, nothing redone that is there, damage named."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import prompt
from equipoise.memory import begin_peak
from equipoise.rollouts import (
    collect,
    make_requests,
    read_rollouts,
    read_shard,
    request_seed,
    sampling_peak,
    sampling_seconds,
    write_rollouts,
)
from equipoise.types import Request, Rollout, UserError

PLAIN = Rollout(
    id="p/0",
    prompt_id="p",
    tokens=(5, 2),
    text="yes",
    text_tokens=1,
    logprobs=(-0.5, -0.25),
    ref_logprobs=(-1.5, -0.125),
    kl=0.1,
    kl_floor=0.2,
    finish_reason="stop",
    weights=None,
    seed=2**63 - 1,
    base_forwards=7,
)
STEERED = replace(PLAIN, id="p/0@0.7,0.3", weights=(0.7, 0.3), guide_forwards=80, parent_id="p/0", finish_reason="length")
PROMPTS = [prompt(f"p{i}", "how are you") for i in range(5)]


class Echo:
    """A sampler whose rollout is fixed by the request; remembers what it was asked."""

    objectives = ()

    def __init__(self, dies_after: int = 10**9) -> None:
        self.asked: list[list[str]] = []
        self.dies_after = dies_after

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        if len(self.asked) == self.dies_after:
            raise KeyboardInterrupt
        self.asked.append([r.id for r in requests])
        return [replace(PLAIN, id=r.id, prompt_id=r.prompt.id, text=str(r.seed % 97), seed=r.seed, weights=r.weights) for r in requests]


def parts(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path):
    write_rollouts(tmp_path / "part-00000.parquet", [PLAIN, STEERED], seconds=1.5)
    assert read_rollouts(tmp_path) == [PLAIN, STEERED]
    assert sampling_seconds(tmp_path) == 1.5
    assert parts(tmp_path) == ["part-00000.parquet"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_round_trip_of_anything(tmp_path, data):
    f32 = st.floats(width=32, allow_nan=False)
    rows = data.draw(
        st.lists(
            st.builds(
                Rollout,
                id=st.text(min_size=1),
                prompt_id=st.text(),
                tokens=st.lists(st.integers(0, 2**31 - 1)).map(tuple),
                text=st.text(),
                text_tokens=st.integers(0, 9),
                logprobs=st.lists(f32).map(tuple),
                ref_logprobs=st.lists(f32).map(tuple),
                kl=st.floats(allow_nan=False),
                kl_floor=st.floats(allow_nan=False),
                finish_reason=st.sampled_from(["stop", "length"]),
                weights=st.none() | st.lists(st.floats(0, 1), max_size=3).map(tuple),
                seed=st.integers(0, 2**63 - 1),
                base_forwards=st.integers(0, 2**40),
                guide_forwards=st.integers(0, 2**40),
                parent_id=st.none() | st.text(),
            ),
            max_size=4,
        )
    )
    write_rollouts(tmp_path / "any.parquet", rows)
    assert read_shard(tmp_path / "any.parquet") == rows


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_shard_is_named_and_the_others_are_intact(tmp_path, share):
    requests = make_requests(PROMPTS, 2, seed=3)
    whole = collect(Echo(), requests, tmp_path, 4)
    broken, others = tmp_path / "part-00001.parquet", [tmp_path / f"part-0000{i}.parquet" for i in (0, 2)]
    content = broken.read_bytes()
    broken.write_bytes(content[: int(share * len(content))])
    for read in (lambda: read_rollouts(tmp_path), lambda: collect(Echo(), requests, tmp_path, 4)):
        with pytest.raises(UserError) as caught:
            read()
        message = str(caught.value)
        assert str(broken) in message
        assert "delete it and run `sample` again" in message
        assert "\n" not in message
    assert [r for path in others for r in read_shard(path)] == whole[:4] + whole[8:]
    broken.unlink()
    again = Echo()
    assert collect(again, requests, tmp_path, 4) == whole
    assert again.asked == [[r.id for r in requests[4:8]]]


def test_another_kind_of_parquet_is_no_shard(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"rollout_id": ["a"], "helpful": [1.0]}), tmp_path / "part-00000.parquet")
    with pytest.raises(UserError, match="not a rollout shard"):
        read_rollouts(tmp_path)


def test_no_rollouts(tmp_path):
    with pytest.raises(UserError, match="run `equipoise sample` first"):
        read_rollouts(tmp_path / "absent")


def test_collect_keeps_what_is_complete_and_redoes_what_is_not(tmp_path):
    requests = make_requests(PROMPTS, 2, seed=3)
    undisturbed = collect(Echo(), requests, tmp_path / "a", 3)
    with pytest.raises(KeyboardInterrupt):
        collect(Echo(dies_after=2), requests, tmp_path / "b", 3)
    assert parts(tmp_path / "b") == ["part-00000.parquet", "part-00001.parquet"]
    rest, told = Echo(), []
    assert collect(rest, requests, tmp_path / "b", 3, told.append) == undisturbed == read_rollouts(tmp_path / "b")
    assert rest.asked == [[r.id for r in requests[6:9]], [r.id for r in requests[9:]]]
    assert told == [3, 3, 3, 1]
    idle = Echo()
    assert collect(idle, requests, tmp_path / "b", 3) == undisturbed
    assert idle.asked == []


def test_a_file_that_a_killed_run_left_half_written_is_no_shard(tmp_path):
    requests = make_requests(PROMPTS, 1, seed=3)
    (tmp_path / ".part-00000.parquet.123.tmp").write_bytes(b"PAR1 and then the power went")
    undisturbed = collect(Echo(), requests, tmp_path, 3)
    assert read_rollouts(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "other", [make_requests(PROMPTS, 2, seed=4), make_requests(PROMPTS[::-1], 2, seed=3), make_requests(PROMPTS, 2, 3, (1.0, 0.0))]
)
def test_shards_of_other_requests_are_refused(tmp_path, other):
    collect(Echo(), make_requests(PROMPTS, 2, seed=3), tmp_path, 4)
    with pytest.raises(UserError, match=r"part-00000\.parquet holds other requests"):
        collect(Echo(), other, tmp_path, 4)


def test_a_sampler_that_fails_leaves_the_finished_shards(tmp_path):
    class Choosy(Echo):
        def __call__(self, requests):
            if any(r.prompt.id == "p3" for r in requests):
                raise UserError("prompt 'p3' is empty")
            return super().__call__(requests)

    with pytest.raises(UserError, match="p3"):
        collect(Choosy(), make_requests(PROMPTS, 2, seed=3), tmp_path, 4)
    assert parts(tmp_path) == ["part-00000.parquet"]


def test_seeds_depend_on_prompt_and_sample_only():
    plain, steered = make_requests(PROMPTS, 3, 7), make_requests(PROMPTS, 3, 7, (0.25, 0.75))
    assert [r.seed for r in plain] == [r.seed for r in steered]
    assert len({r.seed for r in plain}) == len(plain)
    assert {r.id for r in plain}.isdisjoint(r.id for r in steered)
    assert len({r.id for r in steered}) == len(steered)
    alone = make_requests(PROMPTS[2:3], 1, 7)[0]
    assert alone.seed == next(r.seed for r in plain if r.id == alone.id) == request_seed(7, "p2/0")
    assert not {r.seed for r in plain} & {r.seed for r in make_requests(PROMPTS, 3, 8)}
    assert all(0 <= r.seed < 2**63 for r in plain)


def test_seeds_do_not_move_between_versions():
    """printf '0:eq-000/0' | sha256sum, the first eight bytes, little end first, halved."""
    assert request_seed(0, "eq-000/0") == int.from_bytes(bytes.fromhex("0dfff4592bdabd54"), "little") // 2


class Greedy(Echo):
    """Holds as many bytes as the request's prompt id says while it answers."""

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        with mmap.mmap(-1, int(requests[0].prompt.id)) as held:  # the system's own, whatever the heap has kept of earlier tests
            np.frombuffer(held, dtype=np.uint8)[:] = 1  # written to, so that it is there
            return super().__call__(requests)


def test_a_shard_keeps_the_most_memory_that_its_own_sampling_took(tmp_path):
    if not begin_peak():
        pytest.skip("this system can't say how much memory a process took since a point in time")
    large, small = make_requests([prompt(str(200 * 2**20), "a")], 1, 0), make_requests([prompt("1", "a")], 1, 0)
    collect(Greedy(), small, tmp_path / "first", 1)  # which loads what writes shards
    collect(Greedy(), large, tmp_path / "large", 1)
    collect(Greedy(), small, tmp_path / "small", 1)  # after the large one, whose peak it must not inherit
    high, low = sampling_peak(tmp_path / "large"), sampling_peak(tmp_path / "small")
    assert high is not None
    assert low is not None
    assert high - low == pytest.approx(200 * 2**20, rel=0.25), (high, low)
    collect(Greedy(), large, tmp_path / "large", 1)
    assert sampling_peak(tmp_path / "large") == high
    # one shard of an older version, which doesn't say, and nothing is known of the folder
    write_rollouts(tmp_path / "large" / "part-00001.parquet", [PLAIN], 1.0)
    assert sampling_peak(tmp_path / "large") is None
