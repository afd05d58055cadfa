"""`prompts` and `compare` on tiny models: splits that hold, points that a plain `sample` draws too, bad input by name."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from chat_server import fenced, longer_wins, serving
from conftest import FOLDER_WORDS, build_llama
from equipoise.cli import Run, main, run_lines
from equipoise.data.prompts import load_prompts
from equipoise.data.splits import opening
from equipoise.evaluation.sweep import point_folder, read_point
from equipoise.rollouts import read_rollouts
from equipoise.runs import file_digest, read_json
from equipoise.stages.methods import Method, with_recipe
from equipoise.stages.winning import judged_points
from equipoise.stages.workers import claimed, each_once, run_workers
from equipoise.types import UserError
from small_pipeline import REWARDS, write_prompts
from test_resume import PRELOAD, SERVER, tortured

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
    assert read_json(compared / "evaluation.json")["settings"]["methods"] == METHODS, "a method's settings are those that were said"
    found = read_json(compared / "evaluation.json")
    methods = [(p["method"], p["n_candidates"]) for p in found["points"]]
    assert methods.count(("reference", 1)) == 1
    assert methods.count(("contrast", 1)) == 3
    assert methods.count(("contrast, best-of-n", 2)) == 3
    assert methods.count(("best-of-n", 2)) == methods.count(("best-of-n", 4)) == 3
    assert {row["other"] for row in found["equal_compute"]} == {"best-of-n"}
    assert all(np.isfinite(row["value"]) for row in found["hypervolume"])
    # the contrast costs more than best-of-4, which reads its prompt once: it is brought to that one's cost
    dearest = max(p["cost"] for p in found["points"] if p["method"] == "best-of-n")
    for row in found["equal_compute"]:
        assert row["cost"] == pytest.approx(min(row["spent"], dearest))
        assert row["share"] == pytest.approx((row["cost"] - 1) / (row["spent"] - 1))
    page = (compared / "report.html").read_text()
    assert "brief follows its weight" in page
    assert (compared / "front.svg").exists()


def test_every_method_has_its_metrics_and_is_tested_beside_others(compared):
    found = read_json(compared / "evaluation.json")
    names = {"reference", "contrast", "contrast, best-of-2", "best-of-2", "best-of-4"}
    methods = {row["method"]: row for row in found["methods"]}
    assert set(methods) == {row["method"] for row in found["hypervolume"]} == names
    responses = {name: row["responses"] for name, row in methods.items()}
    assert responses == {"reference": 24, "contrast": 36, "contrast, best-of-2": 18, "best-of-2": 18, "best-of-4": 18}  # noise alike
    for name in names - {"reference"}:
        assert all(
            np.isfinite(methods[name][key]["mean"]) for key in ("mean_inner_product", "regret", "epsilon", "sparsity", "spacing", "kl")
        )
    # nothing is asked of the reference, so that nothing is said of how it was followed
    assert methods["reference"]["mean_inner_product"]["mean"] is methods["reference"]["follows"][0]["mean"] is None
    plain = methods["reference"]["base_forwards"]
    prompt = np.mean([r.prompt_tokens for r in read_point(compared, "reference", None).rollouts])
    assert methods["best-of-4"]["base_forwards"] == pytest.approx(4 * plain - 3 * prompt)
    assert methods["best-of-4"]["reward_calls"] == 4 * len(REWARDS)
    assert methods["contrast"]["cost"] == pytest.approx(
        (methods["contrast"]["base_forwards"] + methods["contrast"]["guide_forwards"]) / plain
    )
    for row in found["hypervolume"]:
        assert [at["ref_point_K"] for at in row["at"]] == [[-1.5, -1.5], [-0.5, -0.5]]
        assert row["at"][0]["mean"] >= row["value"] >= row["at"][1]["mean"]
    pairs = [(row["ours"], row["other"]) for row in found["between"]]
    assert pairs[0] == ("contrast", "contrast, best-of-2")
    assert len(pairs) == 1 + 2
    for row in found["between"]:
        assert row["points"] == 3
        assert all(m["p_holm"] is None or 1 >= m["p_holm"] >= m["p"] > 0 for m in row["metrics"])
    ends = [(row["method"], row["objective"]) for row in found["equal_length"]]
    assert ends[:2] == [("contrast", "brief"), ("contrast", "diverse")]
    # brevity is minus the log length itself, so that nothing of it is left at equal length
    brief = found["equal_length"][0]["gains"][0]
    assert brief["name"] == "brief"
    assert brief["equal_length"]["mean"] == pytest.approx(0, abs=1e-9)
    assert brief["slope"]["mean"] < 0
    assert [g["name"] for g in found["equal_length"][0]["gains"]] == ["brief", "readable"]
    page = (compared / "report.html").read_text()
    for title in ("Metrics of the fronts", "Methods side by side", "Responses that went wrong", "Gains at equal length"):
        assert title in page


def test_every_response_is_a_row_of_the_table(compared):
    table = pq.read_table(compared / "responses.parquet").to_pylist()
    assert len(table) == 24 + 3 * 12
    half = read_point(compared, "contrast", (0.5, 0.5))
    rows = [row for row in table if row["method"] == "contrast" and row["weights"] == [0.5, 0.5]]
    assert [row["response_id"] for row in rows] == [r.id for r in half.rollouts]
    assert [row["reward:diverse"] for row in rows] == pytest.approx(half.reward_NK[:, 1].tolist(), nan_ok=True)
    first, sampled = rows[0], half.rollouts[0]
    for name in ("prompt_id", "kl", "kl_floor", "base_forwards", "guide_forwards", "reward_calls", "finish_reason"):
        assert first[name] == getattr(sampled, name)
    assert first["tokens"] == len(sampled.tokens)
    assert {row["weights"] is None for row in table if row["method"] == "reference"} == {True}


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
    assert main(command(compared, tiny_folder, asked)) == 0
    assert read_rollouts(lost.parent) == kept
    again = read_json(compared / "evaluation.json")
    assert [p | {"tokens_per_s": 0} for p in again["points"]] == [p | {"tokens_per_s": 0} for p in before["points"]]


def statistics(folder):
    """All of an evaluation but how long things took, and the digests of files that say so."""

    def kept(value):
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if k not in ("tokens_per_s", "seconds", "peak_memory", "files")}
        return [kept(v) for v in value] if isinstance(value, list) else value

    return kept(read_json(folder / "evaluation.json"))


def assert_same_comparison(one, other):
    assert statistics(one) == statistics(other)
    rows = [repr(pq.read_table(folder / "responses.parquet").to_pylist()) for folder in (one, other)]  # NaN isn't equal to itself
    assert rows[0] == rows[1]


def test_killed_at_random_and_run_again_it_gives_the_same_table(compared, tiny_folder, asked, tmp_path):
    SERVER.set_forkserver_preload(PRELOAD)
    out = tmp_path / "out"
    assert tortured(command(out, tiny_folder, asked), out, seed=3, writes=20) >= 4
    assert_same_comparison(out, compared)


def claims(out):
    """Of each worker, by its process: which point it has claimed."""
    found = {}
    for log in sorted((out / ".workers").glob("*.log")):
        said = log.read_text().split()
        with contextlib.suppress(OSError, IndexError):
            open_files = [os.readlink(link) for link in Path(f"/proc/{said[1]}/fd").iterdir()]
            found |= {int(said[1]): str(Path(name).parent) for name in open_files if name.endswith(".claim")}
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads from /proc which process is at a point")
def test_workers_share_the_points_and_what_a_killed_one_leaves(compared, tiny_folder, asked, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    words = [sys.executable, "-m", "equipoise.cli", *command(out, tiny_folder, asked), "--workers", "2"]

    def start():
        with open(said, "w") as handle:
            return subprocess.Popen(words, stderr=handle, stdout=handle)

    def wait_for_claims(parent):
        while not (at := claims(out)):
            assert parent.poll() is None, said.read_text()
            time.sleep(0.002)
        return at

    parent = start()
    first = wait_for_claims(parent)
    parent.kill()  # and its workers end with it, so that nobody holds a point
    parent.wait(60)
    assert not (out / "manifest.json").exists()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in first) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in first if Path(f"/proc/{pid}").exists()]
    for log in (out / ".workers").glob("*.log"):
        log.unlink()
    parent = start()
    victim = next(iter(wait_for_claims(parent)))
    os.kill(victim, signal.SIGKILL)
    assert parent.wait(240) == 0, said.read_text()
    dead = [line for line in said.read_text().splitlines() if "ended with exit code" in line]
    assert len(dead) == 1
    assert "exit code -9" in dead[0]
    assert str(out / ".workers" / "worker-") in dead[0]
    assert_same_comparison(out, compared)


def test_no_two_processes_have_a_claim(tmp_path):
    with claimed(tmp_path / "a") as mine, claimed(tmp_path / "a") as again, claimed(tmp_path / "b") as other:
        assert (mine, again, other) == (True, False, True)
    with claimed(tmp_path / "a") as freed:
        assert freed


def test_pieces_that_others_hold_are_come_back_to(tmp_path):
    done = []
    holder = claimed(tmp_path / "1")
    holder.__enter__()

    def work(piece):
        done.append(piece)
        if piece == 2:
            holder.__exit__(None, None, None)

    each_once([0, 1, 2], lambda piece: tmp_path / str(piece), work)
    assert done == [0, 2, 1]


def test_where_no_worker_reaches_the_end_one_line_says_why(tmp_path):
    with pytest.raises(UserError) as caught:
        run_workers(2, tmp_path / "logs", run_lines, [Run(commands=tmp_path / "none")], lambda: None)
    assert "ended with exit code 2 (can't read commands from" in str(caught.value)
    assert str(tmp_path / "logs" / "worker-") in str(caught.value)
    assert "run the same command again" in str(caught.value)


def test_a_judge_sets_ends_and_middle_beside_the_reference(tiny_folder, asked, tmp_path, capsys):
    down, unread = True, "brief"

    def answer(question, number):
        if down and number >= 7:
            return 401, {}, "{}"
        return "I can't say" if "no padding" in question and fenced(question)["CONVERSATION"] == hard else longer_wins(question, number)

    hard = load_prompts(str(asked))[2].text  # a test prompt, on which the judge of brevity fails
    with serving(answer) as server:
        words = [*command(tmp_path / "out", tiny_folder, asked), "--each_best_of", "[]", "--judge.engine", f"m@{server.url}"]
        words += ["--judge.rubrics", f"[{unread}=concise]", "--judge.cache", str(tmp_path / "cache")]
        words += ["--judge.calls.retries", "0", "--judge.calls.concurrency", "1"]
        assert main(words) == 2
        assert "are kept: mend it and run again" in capsys.readouterr().err
        assert not (tmp_path / "out" / "evaluation.json").exists()
        down, before = False, len(server.requests)
        assert main(words) == 0
        once = server.asked
        assert main(words) == 0  # finished: nobody is asked again
        assert server.asked == once
    found = read_json(tmp_path / "out" / "evaluation.json")["win_rates"]
    assert [(row["method"], row["objective"], row["rubric"], row["weights"]) for row in found["rows"]] == [
        ("contrast", "brief", "concise", [1, 0]),
        ("contrast", "mixed", "overall", [0.5, 0.5]),
    ]  # nothing in rubrics is called diverse
    first = {r.prompt_id: r.text for r in reversed(read_point(tmp_path / "out", "reference", None).rollouts)}
    for row in found["rows"]:
        texts = {r.prompt_id: r.text for r in reversed(read_point(tmp_path / "out", "contrast", tuple(row["weights"])).rollouts)}
        lost = {"t02"} if row["objective"] == "brief" else set()
        wins = [1.0 * (len(texts[p]) > len(first[p])) + 0.5 * (len(texts[p]) == len(first[p])) for p in texts if p not in lost]
        assert row["win_rate"] == pytest.approx(np.mean(wins))
        assert (row["n_pairs"], row["n_judged"], row["n_unparsed"], row["n_failed"]) == (6, 6 - len(lost), 2 * len(lost), 0)
        assert row["agreement"] == 1
        assert row["lo"] <= row["win_rate"] <= row["hi"]
    # Seven questions were answered before the key was refused, and not asked again.
    assert not set(once[:7]) & set(once[before:]) - {q for q in once if fenced(q)["CONVERSATION"] == hard}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Win rates before a judge" in page
    assert f"m@{server.url}" in page


def test_which_points_are_judged():
    names = ("a", "b", "c")
    points = [(1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.2, 0.4, 0.4), (0.0, 0.0, 1.0)]
    assert judged_points(points, names) == {"a": points[0], "c": points[3], "mixed": points[2]}
    assert judged_points(points[:1], names) == {"a": points[0]}  # one trained at an end has no middle


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
    assert "'m': steered by odd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "more", "says"),
    [
        ({"contrast": {}}, [], "method 'contrast': steering needs both"),
        ({"reference": METHODS["contrast"]}, [], "can't be a method's name"),
        ({"best-of-4": METHODS["contrast"]}, [], "best-of-n comes with every comparison"),
        ({"m, best-of-2": METHODS["contrast"]}, [], "best-of-n comes with every comparison"),
        (METHODS, ["--best_of", "[0]"], "best_of must be at least 1, got 0"),
        (METHODS, ["--n_boot", "0"], "n_boot must be at least 1"),
        (METHODS, ["--ref_point", ".inf"], "ref_point is a number of standard deviations"),
        ({"m": {"messages": ["diverse=a", "brief=b"]}}, [], "steered by diverse, brief"),
        (METHODS, ["--best_of", "[2,8]"], "reference_samples of at least 8"),
        (METHODS, ["--each_best_of", "[3]"], "samples of at least as many"),
        ({"m": {"mesages": ["brief=a"]}}, [], "mesages"),
        (METHODS, ["--weights", '["0.5,0.6"]'], "sum to 1.1, not 1"),
        (METHODS, ["--weights", '["brief=0.5,funny=0.5"]'], "unknown objective 'funny'"),
        (METHODS, ["--weights", '["0.5,0.5", "diverse=0.5,brief=0.5"]'], "'diverse=0.5,brief=0.5' are there twice"),
        ({"m": METHODS["contrast"] | {"weights": ["1,0", "brief=1"]}}, [], "points 1 and 2 are both at brief=1 diverse=0"),
        ({"m": {"palettes": ["x"], "beta": 0.5, "weights": ["1,0"]}}, [], "leave beta, weights away"),
        ({"m": METHODS["contrast"] | {"palette_n": 3}}, [], "palette_n=3 is read beside palettes alone"),
        (METHODS, ["--judge.engine", "m@http://localhost:1", "--judge.rubrics", "[brief=short]"], "no rubric for the objective 'short'"),
        (METHODS, ["--judge.engine", "m@http://localhost:1", "--judge.rubrics", "[odd=helpful]"], "judge.rubrics names odd"),
        (METHODS, ["--judge.engine", "m@http://localhost:1", "--judge.mixed", ""], "none of brief, diverse has a rubric"),
        (METHODS, ["--workers", "0"], "workers must be at least 1"),
    ],
)
def test_bad_input_is_one_line_that_names_it(methods, more, says, tiny_folder, asked, tmp_path, capsys):
    assert main(command(tmp_path / "out", tiny_folder, asked, *more, methods=methods)) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert len(error.splitlines()) == 1


def test_weights_take_the_place_of_the_grid_but_not_of_a_methods_own(tiny_folder, asked, tmp_path):
    methods = {"grid": METHODS["contrast"], "own": METHODS["contrast"] | {"weights": ["1,0", "0.1,0.9"]}}
    asked_for = ["--weights", '["brief=0.25,diverse=0.75", "0.8,0.2"]', "--each_best_of", "[]"]
    assert main([*command(tmp_path / "out", tiny_folder, asked, methods=methods), *asked_for]) == 0
    found = read_json(tmp_path / "out" / "evaluation.json")
    weights = {
        name: [tuple(p["weights"]) for p in found["points"] if p["method"] == name and p["n_candidates"] in (1, 4)]
        for name in ("grid", "own", "best-of-n")
    }
    # best-of-n comes at the weights that were asked for, and at the one end that a method has, which it is set beside
    assert weights == {"grid": [(0.25, 0.75), (0.8, 0.2)], "own": [(1, 0), (0.1, 0.9)], "best-of-n": [(0.25, 0.75), (0.8, 0.2), (1, 0)]}
    assert [(row["ours"], row["objective"]) for row in found["equal_compute"]] == [("own", "brief")]


@pytest.fixture(scope="module")
def bank(tiny_folder, asked):
    """Scored responses of the reference to the training prompts, and palettes that were solved on them."""
    out = asked.parent / "bank"
    sampled = f"sample --out {out} --model {tiny_folder} --prompts {asked} --samples 6".split()
    assert main([*sampled, *SETTINGS]) == 0
    assert main(f"score --run {out} --model {tiny_folder} --rewards [readable,{','.join(REWARDS)}]".split()) == 0
    asks = {
        "both": (["--n", "3"], "diverse>=+0.2sd brief>=+0.3sd"),
        "brief": (["--n", "3"], "brief>=+0.4sd"),
        "pooled": (["--dual", "pooled"], "brief>=+0.3sd diverse>=+0.2sd"),
        "less": (["--n", "3"], "brief<=-0.3sd"),
        "other": (["--n", "3"], "readable>=+0.2sd"),
        "free": (["--n", "3"], "brief>=-1sd"),
    }
    for name, (more, ask) in asks.items():
        assert main([*f"palette --bank {out} --n_boot 0 --out {asked.parent}/palette-{name}".split(), *more, "--ask", ask]) == 0
    return asked.parent


def test_palettes_are_points_where_their_multipliers_pull(bank, tiny_folder, asked, tmp_path):
    methods = {
        "palette": {"palettes": [f"{bank}/palette-{name}" for name in ("both", "brief")]},
        "pooled": {"palettes": [f"{bank}/palette-pooled"], "palette_n": 2},
    }
    out = tmp_path / "out"
    assert main([*command(out, tiny_folder, asked, methods=methods), "--each_best_of", "[]"]) == 0
    points = {(p["method"], tuple(p["weights"])): p for p in read_json(out / "evaluation.json")["points"] if p["weights"]}
    solved = {name: read_json(bank / f"palette-{name}" / "palette.json") for name in ("both", "brief", "pooled")}
    rows = np.array([[row[name] for name in REWARDS] for row in rewards_of(bank / "bank")])
    scored = dict(zip(REWARDS, rows[np.isfinite(rows).all(axis=1)].T, strict=True))
    places = {}
    for name in ("both", "pooled"):
        pull = {k: solved[name]["multipliers"][k] * scored[k].std() for k in REWARDS}
        places[name] = tuple(pull[k] / sum(pull.values()) for k in REWARDS)
    own = [weights for name, weights in points if name == "palette"]
    assert own == [pytest.approx(places["both"], rel=1e-6), (1.0, 0.0)]
    assert [weights for name, weights in points if name == "pooled"] == [pytest.approx(places["pooled"], rel=1e-6)]
    # Each response is one of n candidates, scored on what the palette asks for.
    for name, n, weights in (("both", 3, own[0]), ("brief", 3, own[1])):
        rollouts = read_point(out, "palette", weights).rollouts
        assert {r.reward_calls for r in rollouts} == {n * len(solved[name]["multipliers"])}
        assert len({r.parent_id.rpartition("#")[2] for r in rollouts}) > 1
        assert all(0 <= r.kl <= np.log(n) for r in rollouts)
    for name, weights in (("both", own[0]), ("brief", own[1])):
        known = read_json(point_folder(out, "palette", weights) / "manifest.json")["parents"]
        assert file_digest(Path(f"{bank}/palette-{name}/palette.json")) in known.values()
    made = {row["method"]: row["training_seconds"] for row in read_json(out / "evaluation.json")["methods"]}
    assert made["palette"] > 0  # of the bank, its scores and two dual problems
    assert made["reference"] is None
    # softmax(v R) is resampling at beta = 1 / v
    again = f"sample --out {tmp_path / 'one'} --model {tiny_folder} --prompts {asked} --split test --samples 2 --seed 1".split()
    choice = {"how": "resampling", "rewards": ["brief"], "n": 3, "beta": 1 / solved["brief"]["multipliers"]["brief"]}
    assert main([*again, *SETTINGS, "--weights", "brief=1", "--choice", json.dumps(choice)]) == 0
    drawn = read_rollouts(tmp_path / "one" / "rollouts")
    assert [r.tokens for r in drawn] == [r.tokens for r in read_point(out, "palette", (1.0, 0.0)).rollouts]


def rewards_of(run):
    return pq.read_table(sorted((run / "rewards").glob("*.parquet"))).to_pylist()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("less", "has no place among weights of at least 0: brief has the multiplier -"),
        ("other", "asks for readable; the rewards are brief, diverse"),
        ("pooled", "says no number of candidates: set palette_n"),
        ("free", "all its multipliers are 0"),
        ("none", "no such file"),
    ],
)
def test_a_palette_that_cant_be_placed_or_served_is_one_line(name, says, bank, tiny_folder, asked, tmp_path, capsys):
    assert main(command(tmp_path / "out", tiny_folder, asked, methods={"m": {"palettes": [f"{bank}/palette-{name}"]}})) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert len(error.splitlines()) == 1


def test_a_palette_of_another_model_is_refused(bank, asked, tmp_path, capsys):
    assert main(command(tmp_path / "out", "elsewhere", asked, methods={"m": {"palettes": [f"{bank}/palette-both"]}})) == 2
    assert "and the comparison is of elsewhere" in capsys.readouterr().err


def test_a_method_may_come_from_a_recipe(compared, tiny_folder, asked, tmp_path, capsys):
    recipe = tmp_path / "contrast.yaml"
    contrast = METHODS["contrast"]
    lines = [f"messages: {json.dumps(contrast['messages'])}", "beta: 2.0", "model: another", "samples: 7", "sampling: {top_k: 3}"]
    recipe.write_text("\n".join([*lines, "weights: brief=0.5,diverse=0.5"]) + "\n")
    method = with_recipe(Method(recipe=str(recipe), beta=contrast["beta"]))
    assert method == Method(
        recipe=str(recipe), messages=tuple(contrast["messages"]), beta=contrast["beta"], weights=("brief=0.5,diverse=0.5",)
    )
    out = tmp_path / "out"
    methods = {"contrast": {"recipe": str(recipe), "beta": contrast["beta"]}}
    assert main(command(out, tiny_folder, asked, methods=methods)) == 0
    half = [read_point(folder, "contrast", (0.5, 0.5)).rollouts for folder in (out, compared)]
    assert half[0] == half[1]  # the comparison's own model, sampling and samples
    settings = read_json(point_folder(out, "contrast", (0.5, 0.5)) / "manifest.json")["config"]["method"]
    assert (settings["messages"], settings["beta"]) == (contrast["messages"], contrast["beta"])
    capsys.readouterr()
    for text, says in (("mesages: [a]", "mesages"), ("goals: simplex", "draws by goals"), (None, "nowhere.yaml")):
        bad = tmp_path / ("bad.yaml" if text else "nowhere.yaml")
        if text:
            bad.write_text(text + "\n")
        assert main(command(tmp_path / "bad", tiny_folder, asked, methods={"m": {"recipe": str(bad)}})) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1
        assert "method 'm'" in error
        assert says in error


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


def test_methods_may_come_and_go_and_all_else_is_evaluated_anew_without_sampling(tiny_folder, asked, tmp_path, capsys):
    out, gentle = tmp_path / "out", {"messages": METHODS["contrast"]["messages"], "beta": 2.0}
    run = partial(command, out, tiny_folder, asked)
    assert main(run()) == 0
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/*.parquet")}
    one = read_json(out / "evaluation.json")
    assert main(run(methods=METHODS | {"gentle": gentle})) == 0
    both = read_json(out / "evaluation.json")
    assert {p["method"] for p in both["points"]} == {p["method"] for p in one["points"]} | {"gentle", "gentle, best-of-n"}
    assert [p for p in both["points"] if not p["method"].startswith("gentle")] == one["points"]
    assert main([*run(), "--ref_point", "-2.0", "--n_boot", "20", "--best_of", "[2]"]) == 0
    again = read_json(out / "evaluation.json")
    assert again["ref_point_K"] == [-2.0, -2.0]
    assert {r["method"] for r in again["hypervolume"]} == {"reference", "contrast", "contrast, best-of-2", "best-of-2"}
    assert all(path.stat().st_mtime_ns == at for path, at in first.items()), "nothing was sampled or scored again"
    capsys.readouterr()
    assert main(run(methods={"contrast": METHODS["contrast"] | {"beta": 0.25}})) == 2
    said = capsys.readouterr().err
    assert f"{out / 'contrast' / 'w1_0'} holds a run with another config.method.beta (0.5, now 0.25)" in said
    assert main([*run(), "--seed", "5"]) == 2
    assert f"{out} holds a run with another config.seed (1, now 5)" in capsys.readouterr().err
