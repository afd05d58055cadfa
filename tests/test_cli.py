"""The command line: quick help, one line for every kind of bad input, and recipes that parse."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.cli import COMMANDS, _command, _parse, main
from equipoise.runs import file_digest, read_json
from small_pipeline import command_lines, write_prompts

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "scipy", "pyarrow", "matplotlib")


@pytest.fixture(scope="module")
def small(tiny_folder, tmp_path_factory):
    """The stages run once: (folder with train, values and sweep, arguments of each stage, the prompts' file)."""
    out = tmp_path_factory.mktemp("cli")
    prompts = write_prompts(out / "prompts.jsonl")
    lines = command_lines(out, tiny_folder, prompts)
    for words in lines.values():
        assert main(words) == 0, words
    return out, lines, prompts


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a bad input gets on stderr; progress apart."""
    assert main(words) == 2
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if not re.match(r"loading |sampling |scoring |sweeping |learning ", line)]
    assert len(said) == 1, captured.err
    assert said[0].startswith("equipoise: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return said[0]


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- help


def test_help_is_quick_and_imports_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-X", "importtime", "-m", "equipoise.cli", "--help"]
    found = subprocess.run(line, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(f"  {name}" in found.stdout for name in COMMANDS)
    imported = {row.split("|")[-1].strip() for row in found.stderr.splitlines()}
    assert not imported & {*HEAVY, "numpy", "jsonargparse"}
    # Processor time, so that a busy machine doesn't fail the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_of_every_command_imports_nothing_heavy():
    script = f"""
import sys
from equipoise.cli import COMMANDS, main
for name in COMMANDS:
    assert main([*name.split(), "--help"]) == 0, name
print("heavy:", [m for m in {HEAVY!r} if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "heavy: []"
    for name in COMMANDS:
        assert f"usage: equipoise {name}" in out


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_usage(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: equipoise COMMAND")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_doctor_says_what_is_there(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("python 3", "torch ", "accelerators:", "model smollm2:", "harmless, helpful, judge_harmless, judge_helpful", "GiB free"):
        assert part in out


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--json", True),
        ("--json true", True),
        ("--json false", False),
        ("--json --n 4", True),
        ("--n 4 --json", True),
        ("--json=true", True),
    ],
)
def test_a_switch_may_stand_alone(words, value):
    config, _ = _parse("palette", ["--bank", "b.csv", *words.split(), "--ask", "a>=-1"])
    assert config.json is value
    assert config.ask == "a>=-1"


# --- keys and types


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("smaple --out x", "unknown command 'smaple'; did you mean 'sample'?"),
        ("train valeu --out x", "unknown command 'train valeu'; did you mean 'train value'?"),
        ("zzz", "unknown command 'zzz'; known: demo, data, sample"),
        ("sample --out x --max_new_token 3", "sample has no setting 'max_new_token'; did you mean 'sampling.max_new_tokens'?"),
        ("sample --out x --sampling.max_new_token 3", "did you mean 'sampling.max_new_tokens'?"),
        ("sample --out x --sample 3", "sample has no setting 'sample'; did you mean 'samples'?"),
        ("sweep --out x --kl-budget 1", "did you mean 'kl_budget'?"),
        ("train value --out x --run y --value.fold 3", "did you mean 'value.folds'?"),
        ("sample --out x --sampling {max_new_token: 3}", "did you mean 'sampling.max_new_tokens'?"),
        ("sample --out x extra", "sample has no setting 'extra'"),
        ("sample", "required: out"),
        ("sample --out x --samples many", "samples"),
        ("sample --out x --sampling.temperature warm", "sampling.temperature"),
        ("sample --out x --trust_remote_code maybe", "trust_remote_code"),
        ("score --run x --rewards brief", "write a list such as [a,b]"),
        ("evaluate --sweep x --best_of [a]", "best_of"),
        ("sample --out x --sampling.top_k -1", "top_k must be at least 0, got -1"),
        ("sample --out x --sampling.temperature 0", "temperature must be positive, got 0"),
        ("train value --out x --run y --value.folds 2", "folds must be at least 3, got 2"),
        ("palette --bank x --ask y --jsno", "palette has no setting 'jsno'; did you mean 'json'?"),
        ("palette --bank x --ask y --json maybe", "json"),
        ("demo --size huge", "unknown size 'huge'; known: smoke, demo, full"),
    ],
)
def test_bad_settings_are_named(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(shlex.split(words.replace("{max_new_token: 3}", "'{max_new_token: 3}'")), capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"out: [1,", "arsing"),
        (b"out: x\n  samples: 3", "arsing"),
        (b"- a\n- b\n", "a"),
        (b"\xff\xfe\x00\x01", "decode"),
        (b"outt: x\n", "no setting 'outt'; did you mean 'out'?"),
        (b"sampling:\n  max_new_token: 3\n", "no setting 'max_new_token'; did you mean 'sampling.max_new_tokens'?"),
        (b"samples: many\n", "samples"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, content, says, capsys):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert says in refused(["sample", "--out", str(tmp_path / "x"), "--config", str(tmp_path / "recipe.yaml")], capsys)


def test_a_missing_recipe_is_named(tmp_path, capsys):
    assert "absent.yaml" in refused(["sample", "--config", str(tmp_path / "absent.yaml")], capsys)


def test_the_command_line_goes_on_top_of_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("out: from-recipe\nsamples: 3\nvalues: heads\nsampling: {top_k: 7}\n")
    config, _ = _parse("sample", ["--config", str(recipe), "--samples", "5", "--sampling.max_new_tokens", "9"])
    assert (str(config.out), config.samples, config.values) == ("from-recipe", 5, "heads")
    assert (config.sampling.top_k, config.sampling.max_new_tokens) == (7, 9)


# --- bad input to the stages


def test_a_sweep_over_prompts_that_the_values_saw(small, tmp_path, capsys):
    _, lines, _ = small
    words = [*lines["sweep"], "--split", "train"]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert refused(words, capsys) == "equipoise: prompt 't00' and 11 more were used to train the values; sweep another split"


def test_an_empty_prompt_in_a_file(small, tiny_folder, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "how are you"}\n{"prompt": "  "}\n')
    line = refused(f"sample --out {tmp_path}/x --model {tiny_folder} --prompts {path} --split=".split(), capsys)
    assert f"{path}: row 2 has no non-empty prompt" in line


def test_an_empty_last_turn_in_a_file(small, tiny_folder, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"id": "hollow", "messages": [{"role": "user", "content": " "}]}) + "\n")
    line = refused(f"sample --out {tmp_path}/x --model {tiny_folder} --prompts {path} --split=".split(), capsys)
    assert "prompt 'hollow' is empty" in line


def test_a_prompt_longer_than_the_context(small, tiny_folder, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"id": "long", "prompt": "how are you " * 100}) + "\n")
    line = refused(f"sample --out {tmp_path}/x --model {tiny_folder} --prompts {path} --split=".split(), capsys)
    assert "prompt 'long' has " in line
    assert "exceeds the context of 256" in line


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("brief=-0.5,diverse=1.5", "the weight of 'brief' is -0.5"),
        ("brief=0.5,diverse=0.6", "sum to 1.1, not 1"),
        ("0.5,0.5,0", "3 weights"),
        ("kind=1", "unknown objective 'kind' in the weights; known: brief, diverse"),
        ("half and half", "can't read the weights"),
    ],
)
def test_bad_weights(small, tmp_path, capsys, weights, says):
    out, lines, _ = small
    words = [*lines["sample"], "--out", str(tmp_path / "x"), "--values", str(out / "values"), "--weights", weights]
    assert says in refused(words, capsys)


def test_weights_without_values_and_values_without_weights(small, tmp_path, capsys):
    out, lines, _ = small
    for words in (["--weights", "brief=1"], ["--values", str(out / "values")]):
        assert "steering needs both" in refused([*lines["sample"], "--out", str(tmp_path / "x"), *words], capsys)


def test_a_steered_sample_goes_through(small, tmp_path, capsys):
    out, lines, _ = small
    words = [*lines["sample"], "--out", str(tmp_path / "x"), "--values", str(out / "values"), "--weights", "brief=0.25,diverse=0.75"]
    assert main(words) == 0
    capsys.readouterr()
    # Values are of the reference: a steered policy's rollouts may not train them.
    assert main(f"score --run {tmp_path}/x --model {lines['sample'][4]} --rewards [brief,diverse]".split()) == 0
    capsys.readouterr()
    assert "sampled from a steered policy" in refused(f"train value --run {tmp_path}/x --out {tmp_path}/v".split(), capsys)


def test_settings_that_heads_would_not_read(small, tmp_path, capsys):
    out, lines, _ = small
    words = [*lines["sample"], "--out", str(tmp_path / "x"), "--values", str(out / "values"), "--weights", "brief=1"]
    assert "skip_above=0.5 is for value models" in refused([*words, "--skip_above", "0.5"], capsys)
    assert "beta=0.5 divides values where there is no budget, and kl_budget is 1: set it" in refused([*words, "--beta", "0.5"], capsys)


def test_a_file_without_prompts(small, tmp_path, capsys):
    _, lines, _ = small
    (tmp_path / "none.jsonl").write_text("\n")
    words = [*lines["sample"], "--out", str(tmp_path / "x"), "--prompts", str(tmp_path / "none.jsonl")]
    assert refused(words, capsys) == f"equipoise: {tmp_path}/none.jsonl has no prompts"


@pytest.mark.parametrize("budget", ["0", "-1", "100000"])
def test_a_budget_that_cannot_be_spent(small, tmp_path, capsys, budget):
    out, lines, _ = small
    words = [*lines["sample"], "--out", str(tmp_path / "x"), "--values", str(out / "values"), "--weights", "brief=1"]
    assert "kl_budget" in refused([*words, "--kl_budget", budget], capsys)


def test_truncated_parquet_shards(small, tmp_path, capsys):
    out, lines, _ = small
    run = copied(out / "train", tmp_path / "train")
    halved(run / "rollouts" / "part-00001.parquet")
    broken = f"{run}/rollouts/part-00001.parquet is damaged"
    assert broken in refused([*lines["sample"], "--out", str(run)], capsys)
    assert broken in refused([*lines["score"], "--run", str(run)], capsys)
    assert broken in refused([*lines["train value"], "--run", str(run), "--out", str(tmp_path / "v")], capsys)
    run = copied(out / "train", tmp_path / "again")
    halved(run / "rewards" / "part-00002.parquet")
    line = refused([*lines["train value"], "--run", str(run), "--out", str(tmp_path / "v")], capsys)
    assert f"{run}/rewards/part-00002.parquet is damaged" in line


@pytest.mark.parametrize("model", ["/no/such/model", "./absent", "no-such-org/no-such-model", "/no/such/model.gguf"])
def test_a_missing_model(small, tmp_path, capsys, model):
    _, lines, _ = small
    assert model in refused([*lines["sample"], "--out", str(tmp_path / "x"), "--model", model], capsys)


def test_a_folder_that_is_no_model(small, tmp_path, capsys):
    _, lines, _ = small
    assert str(tmp_path) in refused([*lines["sample"], "--out", str(tmp_path / "x"), "--model", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    "words",
    [
        "score --run {absent} --rewards [brief]",
        "train value --run {absent} --out {new}",
        "sweep --values {absent} --out {new}",
        "evaluate --sweep {absent}",
        "report --evaluation {absent}/evaluation.json --out {new}/report.html",
        "train reward_head --out {new} --pairs [hh:{absent}] --head.objective x",
        "sample --out {new} --values {absent} --weights 1,0",
        "data --prompts {absent}",
        "data --pairs [hh:{absent}]",
    ],
)
def test_a_missing_folder_or_file(tmp_path, capsys, words):
    absent = tmp_path / "absent"
    assert str(absent) in refused(words.format(absent=absent, new=tmp_path / "new").split(), capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "score --run {out}/values --rewards [brief]",
        "train value --run {out}/values --out {new}",
        "train value --run {out}/sweep --out {new}",
        "sweep --values {out}/train --out {new}",
        "evaluate --sweep {out}/train",
        "evaluate --sweep {out}/values",
        "report --evaluation {out}/values/manifest.json --out {new}/report.html",
    ],
)
def test_the_wrong_kind_of_folder(small, tmp_path, capsys, words):
    refused(words.format(out=small[0], new=tmp_path / "new").split(), capsys)


def test_a_stage_whose_parent_never_finished(small, tmp_path, capsys):
    out, lines, _ = small
    run = copied(out / "train", tmp_path / "train")
    (run / "rewards" / "manifest.json").unlink()
    line = refused([*lines["train value"], "--run", str(run), "--out", str(tmp_path / "v")], capsys)
    assert "rewards/manifest.json" in line
    (run / "manifest.json").unlink()
    assert f"{run}/manifest.json" in refused([*lines["score"], "--run", str(run)], capsys)


def test_an_unknown_reward(small, tmp_path, capsys):
    out, lines, _ = small
    run = copied(out / "train", tmp_path / "train")
    shutil.rmtree(run / "rewards")
    line = refused([*lines["score"], "--run", str(run), "--rewards", "[breif,diverse]"], capsys)
    assert "unknown reward 'breif'; known: helpful, harmless" in line


@pytest.mark.parametrize("harm", [halved, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"no heads")])
def test_a_corrupt_values_file(small, tmp_path, capsys, harm):
    out, lines, _ = small
    values = copied(out / "values", tmp_path / "values")
    harm(values / "values.safetensors")
    for words in (
        [*lines["sample"], "--out", str(tmp_path / "x"), "--values", str(values), "--weights", "brief=1"],
        [*lines["sweep"], "--out", str(tmp_path / "x"), "--values", str(values)],
    ):
        assert f"{values}/values.safetensors is damaged" in refused(words, capsys)


def test_a_corrupt_manifest(small, tmp_path, capsys):
    out, lines, _ = small
    run = copied(out / "train", tmp_path / "train")
    halved(run / "manifest.json")
    assert f"{run}/manifest.json is not valid JSON" in refused([*lines["sample"], "--out", str(run)], capsys)


def test_prompts_that_the_values_saw_are_not_swept(small, tmp_path, capsys):
    _, lines, _ = small
    assert "used to train the values" in refused([*lines["sweep"], "--out", str(tmp_path / "x"), "--split", "train"], capsys)


def test_values_of_another_model(small, tiny_folder, tmp_path, capsys):
    out, lines, _ = small
    other = copied(tiny_folder, tmp_path / "other")
    words = [*lines["sample"], "--out", str(tmp_path / "x"), "--model", str(other), "--values", str(out / "values"), "--weights", "1,0"]
    assert f"trained on {str(tiny_folder)!r}, not on {str(other)!r}" in refused(words, capsys)


def test_rewards_other_than_the_values_were_trained_on(small, tmp_path, capsys):
    _, lines, _ = small
    words = [*lines["sweep"], "--out", str(tmp_path / "x"), "--rewards", "[diverse,brief]"]
    assert "the values are for brief, diverse" in refused(words, capsys)
    assert not (tmp_path / "x").exists(), "said before anything is spent"


def test_another_setting_in_the_same_folder(small, capsys):
    _, lines, _ = small
    assert "another config.seed (0, now 9)" in refused([*lines["sample"], "--seed", "9"], capsys)


def test_more_candidates_than_samples(small, capsys):
    _, lines, _ = small
    assert "best-of-9 needs 9 samples per prompt, the sweep has 4" in refused([*lines["evaluate"], "--best_of", "[9]"], capsys)


def test_the_same_from_a_shell(tmp_path):
    line = [str(Path(sys.executable).parent / "equipoise"), "score", "--run", str(tmp_path / "absent")]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""


# --- what the stages leave


def test_results_go_to_stdout_and_progress_to_stderr(small, capsys):
    out, lines, _ = small
    for words in lines.values():
        assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        str(out / "train"),
        str(out / "train" / "rewards"),
        str(out / "values"),
        str(out / "sweep"),
        str(out / "sweep" / "evaluation.json"),
        str(out / "report.html"),
    ]
    assert "loading" not in captured.err, "nothing is left to do, so no model is loaded"


def test_every_number_traces_back_to_its_prompts(small):
    out, _, prompts = small
    parents = {name: read_json(out / name / "manifest.json")["parents"] for name in ("train", "train/rewards", "values", "sweep")}
    digest = {name: file_digest(out / name / "manifest.json") for name in parents}
    assert parents == {
        "train": {"prompts": file_digest(prompts)},
        "train/rewards": {"rollouts": digest["train"]},
        "values": {"rollouts": digest["train"], "rewards": digest["train/rewards"]},
        "sweep": {"prompts": file_digest(prompts), "values": digest["values"]},
    }


def test_prompts_that_changed_since_are_named(small, tmp_path, tiny_folder, capsys):
    """Scores pair responses with their prompts: another text under the same id would go unnoticed."""
    _, _, prompts = small
    mine = tmp_path / "prompts.jsonl"
    mine.write_text(prompts.read_text())
    lines = command_lines(tmp_path, tiny_folder, mine)
    assert main(lines["sample"]) == 0
    capsys.readouterr()
    mine.write_text(prompts.read_text().replace("bread", "money"))
    assert "another parents.prompts" in refused(lines["sample"], capsys)
    assert f"{mine} has changed since" in refused(lines["score"], capsys)


# --- recipes


def recipe_lines() -> list:
    return [pytest.param(path, id=path.stem) for path in sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.mark.parametrize("path", recipe_lines())
def test_every_recipe_parses_into_the_config_of_the_command_that_its_header_names(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    header = path.read_text().splitlines()[:6]
    for key in ("tested on:", "needs:", "command:", "expect:"):
        assert any(key in line and line.startswith("#") for line in header), f"{path.name} doesn't say {key}"
    line = next(line for line in header if "command:" in line)
    words = shlex.split(line.split("command:")[1])
    assert words[0] == "equipoise"
    name, rest = _command(words[1:])
    assert rest[:2] == ["--config", f"recipes/{path.name}"]
    config, function = _parse(name, rest)
    assert type(config).__name__ == COMMANDS[name][1]
    assert callable(function)


PIPELINES = [p for p in sorted((ROOT / "pipelines").glob("*.sh")) if p.stem != "common"]


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in PIPELINES])
def test_every_command_of_a_pipeline_parses(path):
    listed = subprocess.run(["bash", path, "--list", "runs/x"], capture_output=True, text=True, check=True).stdout
    lines = [words for line in listed.splitlines() if (words := shlex.split(line, comments=True))]
    assert lines
    for words in lines:
        _parse(*_command(words))


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in PIPELINES])
def test_a_dry_run_says_what_would_be_fetched_and_what_it_costs(path, tmp_path):
    listed = subprocess.run(["bash", path, "--list", str(tmp_path / "x")], capture_output=True, text=True, check=True).stdout
    said = [line for line in listed.splitlines() if line.startswith("#")]
    assert any(line.startswith("# needs:") for line in said)
    assert any(line.startswith(("# takes:", "# fetches:")) for line in said)
    assert "fetch " not in path.read_text() or any(line.startswith("# fetches:") for line in said)
    assert not (tmp_path / "x").exists()
