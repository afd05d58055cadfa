"""Every pipeline from its script to its figure, on the tiny model that `--tiny` writes; and `run`, which goes through its stages."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import equipoise
from equipoise.cli import _command, main
from equipoise.rewards.field import beaver_text
from equipoise.runs import read_json
from equipoise.tiny import SPECIAL, build_tokenizer
from equipoise.types import Message, Prompt

FOLDER = Path(__file__).parent.parent / "pipelines"
METHODS = {
    "rewarded_soups_hh": {"soup", "factors", "MOD"},
    "sipo_helpsteer": {"MOD", "SIPO", "soup", "SIPO-soup"},
    "modpo_saferlhf": {"MODPO", "MOD", "soup"},
    "morlhf_hh": {"MORLHF"},
    "map_training_hh": {"MAP"},
    "online_dpo_hh": {"prompt", "parameters"},
    "parm_saferlhf": {"PARM", "GenARM", "MOD", "soup"},
    "sipo_beavertails": {"MOD", "SIPO", "soup", "SIPO-soup"},
    "sipo_smollm2": {"MOD", "SIPO"},
    "comparison": {
        "soup",
        "MOD",
        "MODPO",
        "SIPO",
        "GenARM",
        "PARM",
        "MORLHF",
        "online DPO",
        "RiC",
        "single-pass",
        "contrast of prompts",
        "rejection",
        "single-pass best-of-4",
        "palette",
        "prefix",
        "value model",
        "ARGS",
        "blocks",
    },
    "ric_hh": {"RiC", "RiC-released", "offline"},
    "ric_summary": {"RiC", "RiC-released", "offline"},
}
TABLE = {"sipo_smollm2": "sipo/compare"}
"""Where the table is, of those that can share a folder with another pipeline."""
SHELL = "modpo_saferlhf"
"""The one that is run as its user does; the others run in the tests' process, which has imported what takes seconds."""


def commands(name: str, *options: str) -> str:
    done = subprocess.run(["bash", FOLDER / f"{name}.sh", "--list", *options], capture_output=True, text=True, check=True)
    return done.stdout


def check(table: Path, methods: set[str]) -> None:
    """The table has a finite number for every point, and its figures are there."""
    found = read_json(table / "evaluation.json")
    assert {p["method"] for p in found["points"]} >= methods | {"reference"}
    for point in found["points"]:
        assert all(math.isfinite(r["mean"]) for r in point["reward"]), point["method"]
        assert math.isfinite(point["kl"])
    assert (table / "front.svg").read_text().startswith("<")
    assert (table / "report.html").exists()


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {SHELL}))
def test_every_stage_of_a_pipeline_runs_and_its_table_has_numbers(name, tmp_path):
    lines = tmp_path / "commands"
    lines.write_text(commands(name, "--tiny", str(tmp_path)))
    assert main(["run", "--commands", str(lines)]) == 0
    check(tmp_path / TABLE.get(name, "compare"), METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_tiny_has_every_stage_of_the_real_pipeline(name):
    """Each stage once, in the same order; `test_cli` parses the settings of both."""
    real, small = (
        [_command(shlex.split(line))[0] for line in commands(name, *options).splitlines() if line[0] != "#"]
        for options in ((), ("--tiny",))
    )
    assert small == ["tiny", *real]


def test_beavers_template_writes_what_its_reward_reads():
    tokenizer = build_tokenizer(SPECIAL)
    tokenizer.chat_template = (FOLDER / "beaver.jinja").read_text()
    turns = [Message(role=role, content=text) for role, text in (("user", "Is it?"), ("assistant", "Yes."), ("user", "Why?"))]
    for said in (turns[:1], turns):
        made = tokenizer.apply_chat_template([dict(t) for t in said], tokenize=False, add_generation_prompt=True)
        assert made == beaver_text(Prompt(id="p", messages=tuple(said)), "")
    whole = tokenizer.apply_chat_template([dict(t) for t in turns[:2]], tokenize=False)
    assert whole == "BEGINNING OF CONVERSATION: USER: Is it? ASSISTANT:Yes.</s>"


def test_tiny_runs_from_the_shell_in_one_process(tmp_path):
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "equipoise"
    shim.write_text(f'#!/bin/sh\necho started >> {tmp_path}/starts\nexec {sys.executable} -m equipoise.cli "$@"\n')
    shim.chmod(0o755)
    src = Path(equipoise.__file__).parent.parent
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1"}
    words = ["bash", FOLDER / f"{SHELL}.sh", "--tiny", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "starts").read_text() == "started\n"
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "compare" / "report.html")
    check(tmp_path / "out" / "compare", METHODS[SHELL])


def test_run_names_the_line_that_fails(tmp_path, capsys):
    lines = tmp_path / "commands"
    lines.write_text("# a comment\ndata --prompts equipoise --show 1\n\nsample --out x --samples none\ndoctor\n")
    assert main(["run", "--commands", str(lines)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("240 prompts")
    assert f"line 4 of {lines} ended with an error" in said.err
    assert main(["run", "--commands", str(tmp_path / "absent")]) == 2
    assert "can't read commands from" in capsys.readouterr().err


def test_an_unknown_option_is_refused():
    done = subprocess.run(["bash", FOLDER / "sipo_smollm2.sh", "--fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr
