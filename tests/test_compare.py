"""`prompts` and `compare` on tiny models: splits that hold, points that a plain `sample` draws too, bad input by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import FOLDER_WORDS, build_llama
from equipoise.cli import main
from equipoise.data.prompts import load_prompts
from equipoise.data.splits import opening
from equipoise.evaluation.comparison import follows
from equipoise.evaluation.summary import Point
from equipoise.evaluation.sweep import read_point
from equipoise.rollouts import read_rollouts
from equipoise.runs import read_json
from small_pipeline import REWARDS, write_prompts

METHODS = {"contrast": {"messages": ["brief=be good|be bad", "diverse=help people , please"], "beta": 0.5}}
SETTINGS = ["--sampling.max_new_tokens", "10", "--sampling.top_k", "12", "--sampling.batch_size", "4"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("compare") / "prompts.jsonl")


def command(out, model, prompts, *more: str, methods=METHODS) -> list[str]:
    line = f"compare --out {out} --model {model} --prompts {prompts} --steps 2 --samples 2 --reference_samples 4 --n_boot 50".split()
    line += ["--rewards", f"[{','.join(REWARDS)}]", "--judges", "[readable]", "--best_of", "[2,4]", "--each_best_of", "[2]"]
    return [*line, *SETTINGS, "--methods", json.dumps(methods), *more]


@pytest.fixture(scope="module")
def compared(tiny_folder, asked):
    out = asked.parent / "compared"
    assert main(command(out, tiny_folder, asked)) == 0
    return out


def test_every_method_meets_the_same_prompts_and_reference(compared):
    found = read_json(compared / "evaluation.json")
    methods = [(p["method"], p["n_candidates"]) for p in found["points"]]
    assert methods.count(("reference", 1)) == 1
    assert methods.count(("contrast", 1)) == 3
    assert methods.count(("contrast, best-of-n", 2)) == 3
    assert methods.count(("best-of-n", 2)) == methods.count(("best-of-n", 4)) == 3
    assert {row["other"] for row in found["equal_compute"]} <= {"best-of-1", "best-of-2", "best-of-4"}
    assert all(np.isfinite(row["value"]) for row in found["hypervolume"])
    # the contrast costs more than a plain response, so that it is never compared with a cheaper best-of-n than it could have
    for row in found["equal_compute"]:
        assert row["cost"] >= int(row["other"].removeprefix("best-of-"))
    page = (compared / "report.html").read_text()
    assert "brief follows its weight" in page
    assert (compared / "front.svg").exists()


def test_a_point_is_what_sample_draws(compared, tiny_folder, asked, tmp_path):
    assert (
        main(
            f"sample --out {tmp_path / 'run'} --model {tiny_folder} --prompts {asked} --split test --samples 2 --seed 1".split()
            + SETTINGS
            + ["--messages", json.dumps(METHODS["contrast"]["messages"]), "--beta", "0.5", "--weights", "brief=0.5,diverse=0.5"]
        )
        == 0
    )
    alone = read_rollouts(tmp_path / "run" / "rollouts")
    swept = read_point(compared, "contrast", (0.5, 0.5)).rollouts
    assert [r.tokens for r in alone] == [r.tokens for r in swept]


def test_it_continues_where_it_was_killed(compared, tiny_folder, asked, capsys):
    before = read_json(compared / "evaluation.json")
    (compared / "manifest.json").unlink()
    lost = sorted((compared / "contrast").glob("*/rollouts/*.parquet"))[-1]
    kept = read_rollouts(lost.parent)
    lost.unlink()
    assert main(command(compared, tiny_folder, asked, "--from_end")) == 0
    assert read_rollouts(lost.parent) == kept
    again = read_json(compared / "evaluation.json")
    assert [p | {"tokens_per_s": 0} for p in again["points"]] == [p | {"tokens_per_s": 0} for p in before["points"]]


@pytest.fixture(scope="module")
def policies(tiny_folder, asked):
    """Adapters of policies that were trained for both objectives, for one, and for another."""
    from peft import LoraConfig, get_peft_model

    generator, cards = torch.Generator().manual_seed(0), {"both": REWARDS, "one": REWARDS[1:], "odd": ("odd",)}
    for name, objectives in cards.items():
        base = build_llama(len(FOLDER_WORDS), layers=2, max_position=256, seed=1)
        adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        adapter.save_pretrained(asked.parent / name)
        card = {"objectives": objectives, "weights": (0.3, 0.7) if len(objectives) == 2 else (1.0,)}
        (asked.parent / name / "card.json").write_text(json.dumps(card))
    return asked.parent


def test_policies_stand_where_they_were_trained(policies, tiny_folder, asked, tmp_path, capsys):
    methods = {"trained": {"policies": [f"{policies}/both", f"{policies}/one"]}}
    assert main(command(tmp_path / "out", tiny_folder, asked, methods=methods)) == 0
    found = read_json(tmp_path / "out" / "evaluation.json")
    points = [p for p in found["points"] if p["method"] == "trained"]
    assert [p["weights"] for p in points] == [[0.3, 0.7], [0.0, 1.0]]
    assert all(p["kl"] > 0 for p in points)
    # a tuned policy costs what it reads itself; the reference beside it is there for the KL
    plain = np.mean([r.base_forwards for r in read_point(tmp_path / "out", "reference", None).rollouts])
    for point in points:
        rollouts = read_point(tmp_path / "out", "trained", tuple(point["weights"])).rollouts
        assert point["cost"] == pytest.approx(np.mean([r.guide_forwards for r in rollouts]) / plain)
    assert main(command(tmp_path / "odd", tiny_folder, asked, methods={"m": {"policies": [f"{policies}/odd"]}})) == 2
    assert "'m' is steered by odd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "more", "says"),
    [
        ({"contrast": {}}, [], "method 'contrast': steering needs both"),
        ({"reference": METHODS["contrast"]}, [], "can't be a method's name"),
        ({"m": {"messages": ["diverse=a", "brief=b"]}}, [], "steered by diverse, brief"),
        (METHODS, ["--best_of", "[2,8]"], "reference_samples of at least 8"),
        (METHODS, ["--each_best_of", "[3]"], "samples of at least as many"),
        ({"m": {"mesages": ["brief=a"]}}, [], "mesages"),
    ],
)
def test_bad_input_is_one_line_that_names_it(methods, more, says, tiny_folder, asked, tmp_path, capsys):
    assert main(command(tmp_path / "out", tiny_folder, asked, *more, methods=methods)) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert len(error.splitlines()) == 1


def point(weights, z) -> Point:
    price = {"kl": 0.0, "kl_floor": 0.0, "cost": 1.0, "words": 1.0, "refusals": 0.0, "truncated": 0.0, "unscored": 0, "responses": 1}
    return Point(method="m", weights=weights, n=1, z_PK=np.array([z], dtype=float), tokens_per_s=None, source="", **price)


def test_follows_by_hand():
    # the first reward rises with its weight, the second falls with its own: 1 and -1
    points = [point((0.0, 1.0), (0, 0)), point((0.5, 0.5), (1, 5)), point((1.0, 0.0), (2, 7))]
    assert follows(points, 2) == pytest.approx([1.0, -1.0])
    assert follows(points[:2], 2) == [None, None]


def test_prompts_of_two_sources_in_one_file(asked, tmp_path):
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": "How do I make  bread ?"}, {"prompt": "a new one"}, {"prompt": "one " * 40}]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = f"prompts --sources [{asked},{other}] --max_words 12 --out {tmp_path}/all".split()
    assert main([*line, "--shares", '{"train": 0.5, "validation": 0.25, "test": 0.25}']) == 0
    found = load_prompts(str(tmp_path / "all" / "prompts.jsonl"))
    assert len(found) == 18 + 1  # one is there already, one is too long
    assert len({opening(p) for p in found}) == 19
    assert {p.split for p in found} == {"train", "validation", "test"}
    assert read_json(tmp_path / "all" / "manifest.json")["facts"]["prompts"] == 19
    few = [*line[:-1], f"{tmp_path}/few", "--per_source", "1", "--shares", '{"train": 0.5, "test": 0.5}']
    assert main(few) == 0
    assert len(load_prompts(str(tmp_path / "few" / "prompts.jsonl"))) == 1 + 1


def test_prompts_says_what_left_none(asked, tmp_path, capsys):
    assert main(f"prompts --sources [{asked}] --max_words 1 --out {tmp_path}/none".split()) == 2
    assert "raise max_words" in capsys.readouterr().err
