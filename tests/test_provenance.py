"""What artefacts took to make, worked by hand on runs that share a bank."""

from __future__ import annotations

from pathlib import Path

from equipoise.runs import file_digest, write_json
from equipoise.stages.provenance import making_seconds


def a_run(folder: Path, file: str, rests_on: list[Path], **seconds: float) -> Path:
    """A finished run that wrote one file of its own, and settings that every run writes alike."""
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text(f"{folder} {file}")
    (folder / "settings").write_text("rank 16")
    parents = {str(at): file_digest(path) for at, path in enumerate([p for f in rests_on for p in (f, *f.parent.glob("../settings"))])}
    made = {"command": "a stage", "parents": parents, "outputs": {n: file_digest(folder / n) for n in (file, "settings")}, **seconds}
    write_json(folder / "manifest.json", made)
    return folder / file


def test_every_run_that_an_artefact_rests_on_counts_once(tmp_path):
    bank = a_run(tmp_path / "bank", "rollouts/0.parquet", [], seconds=90.0, cpu_seconds=100.0)
    scores = a_run(tmp_path / "bank" / "rewards", "0.parquet", [bank.parent.parent / "manifest.json"], seconds=7.0)  # no processor seconds
    pairs = a_run(tmp_path / "pairs", "pairs.jsonl", [bank.parent.parent / "manifest.json", scores], seconds=9.0, cpu_seconds=1.0)
    first = a_run(tmp_path / "first", "adapter/weights", [pairs], seconds=60.0, cpu_seconds=20.0)
    second = a_run(tmp_path / "again" / "second", "adapter/weights", [pairs, first], seconds=60.0, cpu_seconds=40.0)
    a_run(tmp_path / "other", "weights", [pairs], seconds=1000.0, cpu_seconds=1000.0)
    assert making_seconds([bank]) == 100
    assert making_seconds([pairs]) == 100 + 7 + 1
    assert making_seconds([first, first.parent]) == 108 + 20
    assert making_seconds([second]) == 128 + 40
    assert making_seconds([second, bank]) == 168
    assert making_seconds([]) is None


def test_what_no_run_made_has_no_time_and_strange_manifests_are_passed_over(tmp_path):
    (tmp_path / "stray").write_text("a file")
    assert making_seconds([tmp_path / "stray"]) is None
    for name, text in (("a", "[1, 2]"), ("b", "{"), ("c", '{"name": "an extension"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    assert making_seconds([tmp_path / "a" / "manifest.json"]) is None
    assert making_seconds([a_run(tmp_path / "bank", "rollouts", [], seconds=3.0), tmp_path / "stray"]) == 3  # shipped with the package
