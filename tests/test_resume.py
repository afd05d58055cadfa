"""Stages that are killed, again and again, and run once more: the result is that of an undisturbed run, to the last bit.

Every run is a process of its own that gets SIGKILL, so nothing is tidied up: either when it writes its n-th file, with the
file whole but not yet named, or just named; or from outside, some milliseconds after its n-th file appeared.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from equipoise.rewards.scoring import read_rewards
from equipoise.rollouts import read_rollouts
from equipoise.runs import read_json
from small_pipeline import command_lines, write_prompts

# Children are forked from a server that has imported what takes seconds, and only that.
SERVER = multiprocessing.get_context("forkserver")
PRELOAD = [
    "equipoise.stages.training",
    "equipoise.stages.evaluation",
    "pyarrow.parquet",
    "scipy.linalg",
    "torch",
    "transformers.models.llama.modeling_llama",
]
TIMING = ("seconds", "cpu_seconds", "finished", "outputs")  # of a manifest; the digests of rollouts cover the seconds they took


def _child(words: list[str], dies_at: int, renamed: bool) -> None:
    """Run a command; die at the `dies_at`-th file it writes, before or after the file gets its name (0: live)."""
    import torch

    from equipoise.cli import main

    torch.set_num_threads(1)
    replace, count = os.replace, 0

    def deadly(source: str, target: str) -> None:
        nonlocal count
        count += 1
        if count == dies_at and not renamed:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly  # type: ignore[assignment]
    os._exit(main(words))


def run(words: list[str], dies_at: int = 0, renamed: bool = False) -> int:
    """Exit code of the command, -9 where it was killed."""
    child = SERVER.Process(target=_child, args=(words, dies_at, renamed))
    child.start()
    child.join(120)
    assert child.exitcode is not None, "the command hangs"
    return child.exitcode


def run_and_kill(words: list[str], out: Path, files: int, delay: float) -> int:
    """Kill the command `delay` seconds after `files` more files than there are now lie under `out`."""
    before = sum(1 for _ in out.rglob("*"))
    child = SERVER.Process(target=_child, args=(words, 0, False))
    child.start()
    while child.is_alive() and sum(1 for _ in out.rglob("*")) < before + files:
        time.sleep(0.0005)
    time.sleep(delay)
    child.kill()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def tortured(words: list[str], out: Path, seed: int, writes: int) -> int:
    """Kill the command five times at moments that the seed fixes, then let it finish; how often it was hit."""
    rng = random.Random(seed)
    killed = [run(words, rng.randint(2, max(2, writes // 4)), renamed) == -signal.SIGKILL for renamed in (False, True, False)]
    killed += [run_and_kill(words, out, rng.randint(1, 3), rng.uniform(0, 0.005)) == -signal.SIGKILL for _ in range(2)]
    assert not (out / "manifest.json").exists(), "it had finished: the kills came too late to prove anything"
    assert run(words) == 0
    return sum(killed)


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, tmp_path_factory):
    """All stages, run in peace: (folder, arguments of each stage)."""
    SERVER.set_forkserver_preload(PRELOAD)
    out = tmp_path_factory.mktemp("undisturbed")
    lines = command_lines(out, tiny_folder, write_prompts(out / "prompts.jsonl"))
    for words in lines.values():
        assert run(words) == 0, words
    return out, lines


def elsewhere(words: list[str], out: Path) -> list[str]:
    """The same command, written to another folder."""
    at = words.index("--out")
    return [*words[: at + 1], str(out), *words[at + 2 :]]


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(pattern) if not p.name.startswith("."))


def assert_same_shards(one: Path, other: Path) -> None:
    """The same shards, with the same rollouts and rewards in them."""
    found = names(one, "part-*.parquet")
    assert found
    assert found == names(other, "part-*.parquet")
    for part in sorted({Path(name).parent for name in found}):
        if part.name != "rewards":
            assert read_rollouts(one / part) == read_rollouts(other / part)
            continue
        rollouts = read_rollouts(one / part.parent / "rollouts")
        scores = [read_rewards(folder / part, rollouts) for folder in (one, other)]
        assert scores[0].objectives == scores[1].objectives
        np.testing.assert_array_equal(scores[0].reward_NK, scores[1].reward_NK)


def assert_same_manifest(one: Path, other: Path) -> None:
    records = [read_json(folder / "manifest.json") for folder in (one, other)]
    assert sorted(records[0]["outputs"]) == sorted(records[1]["outputs"])
    assert all({k: v for k, v in r.items() if k not in TIMING} == {k: v for k, v in records[0].items() if k not in TIMING} for r in records)


@pytest.mark.parametrize("seed", [1, 2])
def test_sample(undisturbed, tmp_path, seed):
    whole, lines = undisturbed
    words = elsewhere(lines["sample"], tmp_path / "train")
    assert tortured(words, tmp_path / "train", seed, writes=18) >= 4
    assert_same_shards(whole / "train" / "rollouts", tmp_path / "train" / "rollouts")
    assert_same_manifest(whole / "train", tmp_path / "train")


@pytest.mark.parametrize("seed", [1, 2])
def test_train_value(undisturbed, tmp_path, seed):
    whole, lines = undisturbed
    words = elsewhere(lines["train value"], tmp_path / "values")
    assert tortured(words, tmp_path / "values", seed, writes=14) >= 4
    for name in names(whole / "values", "*.safetensors"):
        one, other = load_file(whole / "values" / name), load_file(tmp_path / "values" / name)
        assert sorted(one) == sorted(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=f"{name}: {key}")
    assert names(whole / "values", "*.safetensors") == names(tmp_path / "values", "*.safetensors")
    assert read_json(whole / "values" / "quality.json") == read_json(tmp_path / "values" / "quality.json")
    assert_same_manifest(whole / "values", tmp_path / "values")
    digests = [read_json(folder / "values" / "manifest.json")["outputs"] for folder in (whole, tmp_path)]
    assert digests[0] == digests[1], "value heads hold no times, so their files are equal to the last byte"


@pytest.mark.parametrize("seed", [1, 2])
def test_sweep(undisturbed, tmp_path, seed):
    whole, lines = undisturbed
    words = elsewhere(lines["sweep"], tmp_path / "sweep")
    assert tortured(words, tmp_path / "sweep", seed, writes=30) >= 4
    assert_same_shards(whole / "sweep", tmp_path / "sweep")
    assert_same_manifest(whole / "sweep", tmp_path / "sweep")
    evaluate = lines["evaluate"]
    assert run([*evaluate[:2], str(tmp_path / "sweep"), *evaluate[3:]]) == 0
    found = [read_json(folder / "sweep" / "evaluation.json") for folder in (whole, tmp_path)]
    for evaluation in found:
        for point in evaluation["points"]:
            del point["tokens_per_s"]
        for row in evaluation["methods"]:
            del row["seconds"], row["peak_memory"]
        del evaluation["files"], evaluation["settings"]["evaluate"]["sweep"]
    assert found[0] == found[1]


def test_score(undisturbed, tmp_path):
    whole, lines = undisturbed
    words = elsewhere(lines["sample"], tmp_path / "train")
    assert run(words) == 0
    score = lines["score"]
    score = [*score[:2], str(tmp_path / "train"), *score[3:]]
    for writes, renamed in ((1, False), (2, False), (2, True), (3, False)):
        assert run(score, writes, renamed) == -signal.SIGKILL
    assert not (tmp_path / "train" / "rewards" / "manifest.json").exists()
    assert run(score) == 0
    assert_same_shards(whole / "train", tmp_path / "train")


def test_rewardbench(tmp_path):
    rows = [{"prompt": f"q {i}", "chosen": f"long enough {i}", "rejected": f"short {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"rewardbench --data [{tmp_path}/rows.jsonl] --rewards [brief,readable] --shard 4 --n_boot 50 --out".split()
    # Once named, what stays: the start, three shards, then rows, results, table and manifest, which are written anew.
    for dies_at in (1, 2, 2, 2, 2, 3, 4, 5):
        assert run([*words, str(tmp_path / "killed")], dies_at, renamed=True) == -signal.SIGKILL
    assert run([*words, str(tmp_path / "killed")]) == run([*words, str(tmp_path / "whole")]) == 0
    found = names(tmp_path / "whole", "*")
    assert names(tmp_path / "killed", "*") == found
    for name in found:
        if (tmp_path / "whole" / name).is_file() and name != "manifest.json":
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert_same_manifest(tmp_path / "whole", tmp_path / "killed")


def test_evaluating_again_writes_the_same_bytes(undisturbed):
    out, lines = undisturbed
    files = [out / "sweep" / name for name in ("evaluation.json", "front.json", "responses.parquet")]
    before = [path.read_bytes() for path in files]
    table = pq.read_table(files[2])
    # 6 prompts: 4 samples of the reference, 3 at each of 3 weights, and the prefix form once on 2 prompts at both ends
    assert table.num_rows == 6 * 4 + 6 * 3 * 3 + 2 * 2
    assert set(table["method"].to_pylist()) == {"reference", "single-pass", "prefix"}
    assert {row["method"] for row in read_json(files[0])["methods"]} >= {"single-pass", "guided best-of-2", "best-of-4", "resampling"}
    for path in files:
        path.unlink()
    assert run(lines["evaluate"]) == 0
    assert [path.read_bytes() for path in files] == before


def test_a_finished_stage_run_again_changes_nothing(undisturbed):
    whole, lines = undisturbed
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "started.json"}
    for words in lines.values():
        assert run(words) == 0
    after = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and p.name != "started.json"}
    assert sorted(before) == sorted(after)
    assert [str(p) for p in before if before[p] != after[p]] == []


def test_a_full_disk_stops_a_stage_with_one_line_and_it_goes_on_later(undisturbed, tmp_path):
    whole, lines = undisturbed
    words = elsewhere(lines["sample"], tmp_path / "train")
    assert run_on_a_small_disk(words, tmp_path) == 2
    done = names(tmp_path / "train", "*.parquet")
    assert 2 <= len(done) < 18
    stamps = {name: (tmp_path / "train" / name).stat().st_mtime_ns for name in done}
    assert run(words) == 0
    assert {name: (tmp_path / "train" / name).stat().st_mtime_ns for name in done} == stamps
    assert_same_shards(whole / "train" / "rollouts", tmp_path / "train" / "rollouts")


def run_on_a_small_disk(words: list[str], folder: Path) -> int:
    child = SERVER.Process(target=_small_disk, args=(words,))
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def _small_disk(words: list[str]) -> None:
    """Files may not grow past a kilobyte once two shards are written."""
    import resource

    replace = os.replace

    def watch(source: str, target: str) -> None:
        replace(source, target)
        if str(target).endswith("part-00001.parquet"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    os.replace = watch  # type: ignore[assignment]
    from equipoise.cli import main

    os._exit(main(words))
