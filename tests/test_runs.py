"""Files that are whole or absent, and run folders that never mix two settings."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from equipoise.runs import digest_of, file_digest, read_json, rollouts_digest, stage, write_atomic, write_json, write_text
from equipoise.types import Rollout, UserError


@dataclass(frozen=True)
class Inner:
    tokens: int = 32


@dataclass(frozen=True)
class Config:
    seed: int = 0
    inner: Inner = Inner()
    names: tuple[str, ...] = ("a", "b")
    out: Path = Path("runs/x")


def run_once(folder: Path, config: object, parents: dict[str, Path] | None = None, text: str = "done") -> None:
    with stage(folder, "work", config, parents) as run:
        if run.done:
            return
        write_text(folder / "out.txt", text)
        run.outputs.append(folder / "out.txt")
        run.facts["rows"] = np.int64(3)


def test_write_atomic_leaves_the_earlier_file_and_nothing_else_on_failure(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "earlier")

    def half(scratch: Path) -> None:
        scratch.write_text("half of a lon")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_atomic(path, half)
    assert path.read_text() == "earlier"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"could not write .*file/out\.txt"):
        write_text(tmp_path / "file" / "out.txt", "x")


def test_a_full_disk_is_a_user_error_and_keeps_the_earlier_file(tmp_path):
    """A limit on the size of a file fails like a full disk does, for every library that writes: the error is the kernel's."""
    script = f"""
        import json, resource, signal
        from pathlib import Path
        import numpy as np, pyarrow as pa, pyarrow.parquet as pq
        from safetensors.numpy import save_file
        from equipoise.runs import write_atomic, write_text
        from equipoise.types import UserError

        folder, big = Path({str(tmp_path)!r}), np.random.default_rng(0).random(100_000)
        writers = {{
            "a.txt": lambda path: write_text(path, "x" * 500_000),
            "a.safetensors": lambda path: write_atomic(path, lambda scratch: save_file({{"a": big}}, scratch)),
            "a.parquet": lambda path: write_atomic(path, lambda scratch: pq.write_table(pa.table({{"a": big}}), scratch)),
        }}
        for name in writers:
            (folder / name).write_text("earlier")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        found = {{}}
        for name, write in writers.items():
            try:
                write(folder / name)
            except UserError as error:
                found[name] = str(error)
        print(json.dumps(found))
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True).stdout
    found = json.loads(out)
    names = ["a.parquet", "a.safetensors", "a.txt"]
    assert sorted(found) == names
    for name, message in found.items():
        assert str(tmp_path / name) in message
        assert "File too large" in message
        assert "run again" in message
        assert "\n" not in message
        assert (tmp_path / name).read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_nan_and_infinity_become_null(tmp_path):
    value = {"a": float("nan"), "b": [1.5, np.inf], "c": np.array([1.0, np.nan]), "d": Inner(), "e": Path("x"), "f": np.float32(2)}
    write_json(tmp_path / "v.json", value)
    text = (tmp_path / "v.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_json(tmp_path / "v.json") == {"a": None, "b": [1.5, None], "c": [1.0, None], "d": {"tokens": 32}, "e": "x", "f": 2.0}


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe\x00", b"not json"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(UserError, match=r"v\.json is not valid JSON"):
        read_json(tmp_path / "v.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*v\.json"):
        read_json(tmp_path / "v.json")


def test_a_finished_manifest_stays_byte_for_byte(tmp_path):
    run_once(tmp_path, Config())
    before = (tmp_path / "manifest.json").read_bytes()
    run_once(tmp_path, Config(), text="never written")
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert (tmp_path / "out.txt").read_text() == "done"
    record = json.loads(before)
    assert record["outputs"] == {"out.txt": file_digest(tmp_path / "out.txt")}
    assert record["facts"] == {"rows": 3}
    assert record["config"]["names"] == ["a", "b"]
    assert {"python", "equipoise", "torch"} <= set(record["versions"])


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_text("other")])
def test_a_stage_whose_output_is_gone_or_changed_is_not_done(tmp_path, harm):
    run_once(tmp_path, Config())
    harm(tmp_path / "out.txt")
    run_once(tmp_path, Config())
    assert (tmp_path / "out.txt").read_text() == "done"


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (Config(seed=1), r"config\.seed \(0, now 1\)"),
        (Config(inner=Inner(40)), r"config\.inner\.tokens \(32, now 40\)"),
        (Config(names=("a",)), r"config\.names \(\['a', 'b'\], now \['a'\]\)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(tmp_path, other, key, finished):
    if finished:
        run_once(tmp_path, Config())
    else:
        with pytest.raises(RuntimeError), stage(tmp_path, "work", Config()):
            raise RuntimeError("killed")
        assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(UserError, match=f"holds a run with another {key}"):
        run_once(tmp_path, other)


def test_another_command_and_other_parents_are_refused(tmp_path):
    parent = tmp_path / "parent.json"
    parent.write_text("one")
    run_once(tmp_path / "run", Config(), {"rollouts": parent})
    assert read_json(tmp_path / "run" / "manifest.json")["parents"] == {"rollouts": file_digest(parent)}
    with pytest.raises(UserError, match=r"another command \('work', now 'play'\)"), stage(tmp_path / "run", "play", Config()):
        pass
    parent.write_text("two")
    with pytest.raises(UserError, match=r"another parents\.rollouts"):
        run_once(tmp_path / "run", Config(), {"rollouts": parent})


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*absent/manifest\.json"):
        run_once(tmp_path / "run", Config(), {"rollouts": tmp_path / "absent" / "manifest.json"})
    assert not (tmp_path / "run").exists()


def test_a_failed_stage_has_no_manifest(tmp_path):
    with pytest.raises(ValueError, match="bad"), stage(tmp_path, "work", Config()):
        raise ValueError("bad")
    assert not (tmp_path / "manifest.json").exists()


def test_digests_depend_on_what_they_should():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})
    plain = {"tokens": (1,), "text_tokens": 1, "logprobs": (0.0,), "ref_logprobs": (0.0,), "kl": 0.0, "kl_floor": 0.0, "seed": 0}
    rest = {"finish_reason": "stop", "weights": None, "base_forwards": 1}
    one = Rollout(id="a", prompt_id="p", text="t", **plain, **rest)
    assert rollouts_digest([one]) == rollouts_digest([Rollout(id="a", prompt_id="p", text="t", **(plain | {"kl": 1.0}), **rest)])
    for change in ({"id": "b"}, {"prompt_id": "q"}, {"text": "u"}):
        other = Rollout(**({"id": "a", "prompt_id": "p", "text": "t"} | change), **plain, **rest)
        assert rollouts_digest([one]) != rollouts_digest([other])
