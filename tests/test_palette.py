"""`palette` and `palette apply` from the command line: a real bank, a tiny model end to end, and what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from equipoise.cli import main
from equipoise.rewards.scoring import read_rewards
from equipoise.rollouts import read_rollouts
from equipoise.runs import read_json
from palette.rows import map_ask, shared_path
from small_pipeline import ASKED, command_lines
from test_resume import PRELOAD, SERVER, run

ASKS = ("brief>=+0.4sd positive>=keep", "brief<=keep-0.1 positive>=keep-0.05", "positive>=+0.3sd")
NAMES = ("brief", "positive")


def write_prompts(path: Path) -> Path:
    """54 prompts in words that the tiny model knows; every third is held out."""
    ends = ("?", "please ?", ", yes or no ?", "with my people ?", "in the car ?", "at home ?", "and the water ?", ". help me", "? i do not")
    rows = [{"id": f"t{i:02d}", "prompt": f"{a} {e}"} for i, (a, e) in enumerate(itertools.product(ASKED, ends))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_lines(out: Path, model: Path, prompts: Path) -> list[list[str]]:
    """Every command, from sampling to serving, for three asks and both duals."""
    bank, palettes = out / "bank", [out / f"{i}-{dual}" for i in range(3) for dual in ("grouped", "pooled")]
    lines = [
        [
            *f"sample --out {bank} --model {model} --prompts {prompts} --samples 8".split(),
            *["--sampling.max_new_tokens", "8", "--sampling.top_k", "12", "--sampling.batch_size", "16"],
        ],
        f"score --run {bank} --model {model} --rewards [brief,positive] --shard 16".split(),
    ]
    for i, ask in enumerate(ASKS):
        for dual in ("grouped", "pooled"):
            lines.append([*f"palette --bank {bank} --dual {dual} --n_boot 40 --out {out}/{i}-{dual}".split(), "--ask", ask])
    chosen = f"[{','.join(map(str, palettes))}]"
    served = f"palette apply --out {out}/applied --prompts {prompts} --responses 2 --n_boot 200 --closed_loop --palettes {chosen}"
    return [*lines, served.split()]


@pytest.fixture(scope="module")
def small(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("palette")
    lines = run_lines(out, tiny_folder, write_prompts(out / "prompts.jsonl"))
    for words in lines:
        assert main(words) == 0, words
    return out, lines


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = [line for line in captured.err.splitlines() if line.startswith("equipoise: ")]
    assert len(said) == 1
    return said[0]


# --- the shared bank


def test_one_json_object_for_the_shared_bank(capsys):
    assert main(["palette", "--bank", str(shared_path()), "--ask", "humor>=q70 gpt2-helpful>=keep", "--n_boot", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with open_text(shared_path()) as handle:
        columns = list(zip(*list(csv.reader(handle))[1:], strict=True))
    humor, helpful = (np.array(columns[k], dtype=float) for k in (0, 1))
    assert found["feasible"]
    assert found["targets"] == {"humor": pytest.approx(np.quantile(humor, 0.7)), "gpt2-helpful": pytest.approx(helpful.mean())}
    weight = np.exp(found["multipliers"]["humor"] * humor + found["multipliers"]["gpt2-helpful"] * helpful)
    weight /= weight.sum()
    assert found["levels"]["humor"] == pytest.approx(weight @ humor)
    assert found["levels"]["humor"] == pytest.approx(found["targets"]["humor"], abs=1e-6)
    assert found["kl"] == pytest.approx(float(weight @ np.log(weight * len(weight))))
    assert found["ess"] == pytest.approx(1 / (weight @ weight))
    assert found["level_intervals"]["humor"][0] < found["levels"]["humor"] < found["level_intervals"]["humor"][1]
    assert found["dual"] == "pooled"


def open_text(path: Path):
    import gzip

    return gzip.open(path, "rt")


def test_what_cant_be_had_is_said_and_exits_with_0(capsys):
    assert main(["palette", "--bank", str(shared_path()), "--ask", map_ask(90), "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["feasible"] is False
    assert found["margin_sd"] == pytest.approx(-0.065, abs=5e-4)
    assert found["multipliers"] is None
    assert found["nearest"]["humor"] < found["targets"]["humor"]
    assert main(["palette", "--bank", str(shared_path()), "--ask", map_ask(90)]) == 0
    assert "feasible  no, margin -0.065 sd" in capsys.readouterr().out


def test_what_is_refused(capsys, tmp_path):
    bank = ["palette", "--bank", str(shared_path()), "--ask"]
    assert "'humor>=q90 humor<=q10' contradict each other" in refused([*bank, "humor>=q90 humor<=q10"], capsys)
    assert "no objective 'humour'; did you mean 'humor'?" in refused([*bank, "humour>=q90"], capsys)
    said = refused([*bank, "humor>=q60", "--dual", "grouped"], capsys)
    assert "one sample per prompt" in said
    assert "equipoise sample --samples 16" in said
    assert "can't read 'humor>q60'" in refused([*bank, "humor>q60"], capsys)
    assert "n_boot must be at least 0, got -1" in refused([*bank, "humor>=q60", "--n_boot", "-1"], capsys)
    assert "no bank at" in refused(["palette", "--bank", str(tmp_path / "no.csv"), "--ask", "a>=1"], capsys)
    assert "no such file" in refused(["palette", "--bank", str(tmp_path), "--ask", "a>=1"], capsys)


# --- a tiny model, end to end


def test_the_table_says_what_the_json_says(small, capsys):
    out, _ = small
    words = ["palette", "--bank", str(out / "bank"), "--ask", ASKS[0], "--n_boot", "40", "--sequential", "3"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    table = capsys.readouterr().out
    assert f"ask       {ASKS[0]}" in table
    assert "grouped dual, n = 8" in table
    for name in NAMES:
        assert f"{record['multipliers'][name]:.3f} [" in table
        assert f">= {record['targets'][name]:.3f}" in table
    assert f"n needed  {record['smallest_n']}" in table
    assert len(record["sequential"]["shortfall"]) == 3
    assert record["sequential"]["shortfall"][2] < 0.1 * record["sd"]["brief"]
    rollouts = read_rollouts(out / "bank" / "rollouts")
    assert record["cost"]["backbone_tokens"] == pytest.approx(np.mean([8 * r.base_forwards - 7 * r.prompt_tokens for r in rollouts]))


def test_served_levels_are_those_of_the_shards(small):
    """Every number of applied.json again, from the Parquet files and the definition."""
    out, _ = small
    result = read_json(out / "applied" / "applied.json")
    rollouts = read_rollouts(out / "applied" / "rollouts")
    reward = read_rewards(out / "applied" / "rewards", rollouts).reward_NK.reshape(result["responses"], 8, 2)
    assert result["responses"] == 18 * 2
    for row in result["palettes"]:
        v = np.array([row["multipliers"].get(name, 0.0) for name in NAMES])
        share = np.exp(reward @ v)
        share /= share.sum(axis=1, keepdims=True)
        level = (share[:, :, None] * reward).sum(axis=1).mean(axis=0)
        for k, name in enumerate(NAMES):
            assert row["levels"][name]["expected"]["mean"] == pytest.approx(level[k])
            assert row["levels"][name]["base"]["mean"] == pytest.approx(reward[:, :, k].mean())
            assert row["levels"][name]["realised"]["lo"] <= row["levels"][name]["realised"]["mean"] <= row["levels"][name]["realised"]["hi"]
        assert row["kl"] == pytest.approx(float(np.mean((share * np.log(share * 8)).sum(axis=1))))


def test_the_grouped_dual_meets_its_targets_on_held_out_prompts(small):
    """Within twice the 95 % interval, as 18 prompts are few; the pooled dual delivers less of each asked change."""
    out, _ = small
    rows = read_json(out / "applied" / "applied.json")["palettes"]
    for row in rows[::2]:
        assert row["dual"] == "grouped"
        for name in row["targets"]:
            level, floor, ceiling = row["levels"][name]["expected"], row["floors"].get(name, -np.inf), row["ceilings"].get(name, np.inf)
            room = level["hi"] - level["lo"]
            assert floor - room < level["mean"] < ceiling + room, (row["ask"], name)
            assert (row["verdict"][name] == "missed") == (level["hi"] < floor or level["lo"] > ceiling)
            assert row["shortfall"][name] == pytest.approx(max(0, floor - level["mean"], level["mean"] - ceiling))
    for grouped, pooled in zip(rows[::2], rows[1::2], strict=True):
        assert grouped["ask"] == pooled["ask"]
        asked = next(iter(grouped["multipliers"]))
        up = 1 if asked in grouped["floors"] else -1
        # The pooled dual takes credit for what lies between prompts: choosing among one prompt's candidates delivers less.
        short = grouped["levels"][asked]["expected"]["mean"] - pooled["levels"][asked]["expected"]["mean"]
        assert up * short > 0


def test_figures_are_well_formed_and_name_what_they_show(small):
    out, _ = small
    main(
        [
            "palette",
            "--bank",
            str(out / "bank"),
            "--ask",
            ASKS[0],
            "--n_boot",
            "0",
            "--explore",
            "--draws",
            "30",
            "--out",
            str(out / "explored"),
        ]
    )
    found = {path.name for path in (out / "explored").glob("*.svg")}
    assert found == {"distributions.svg", "multipliers.svg", "reachable.svg"}  # two objectives have no radar
    assert {path.name for path in (out / "applied").glob("*.svg")} == {"asked.svg"}
    for path in [*(out / "explored").glob("*.svg"), out / "applied" / "asked.svg"]:
        text = "".join(ElementTree.fromstring(path.read_text()).itertext())
        assert "brief" in text
        assert "nan" not in path.read_text().lower()
    assert "grouped dual" in (out / "applied" / "asked.svg").read_text()


def test_serving_again_returns_the_same_bytes_and_continues_where_it_was(small):
    out, lines = small
    applied = out / "applied"
    before = {p.relative_to(applied): p.read_bytes() for p in applied.rglob("*") if p.is_file()}
    assert main(lines[-1]) == 0
    assert {p.relative_to(applied): p.read_bytes() for p in applied.rglob("*") if p.is_file()} == before
    shard = sorted((applied / "rollouts").glob("*.parquet"))[1]
    texts = [r.text for r in read_rollouts(applied / "rollouts")]
    shard.unlink()
    (applied / "manifest.json").unlink()
    (applied / "applied.json").unlink()
    assert main(lines[-1]) == 0
    assert [r.text for r in read_rollouts(applied / "rollouts")] == texts
    assert (applied / "applied.json").read_bytes() == before[Path("applied.json")]


def test_palettes_that_cant_be_served_are_refused(small, capsys, tmp_path):
    out, _ = small
    bank, prompts = out / "bank", out / "prompts.jsonl"
    serve = ["palette", "apply", "--out", str(tmp_path / "x"), "--prompts", str(prompts), "--palettes"]
    assert "are in the bank" in refused([*serve, f"[{out}/0-grouped]", "--split", "train"], capsys)
    assert "no palettes given" in refused([*serve, "[]"], capsys)
    assert "give --n" in refused([*serve, f"[{out}/0-pooled]"], capsys)
    main(["palette", "--bank", str(bank), "--ask", "brief>=1000", "--out", str(tmp_path / "never"), "--n_boot", "0"])
    capsys.readouterr()
    assert "can't be had" in refused([*serve, f"[{tmp_path}/never]"], capsys)
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n2,1\n3,3\n")
    main(["palette", "--bank", str(table), "--ask", "a>=keep", "--out", str(tmp_path / "table"), "--n_boot", "0"])
    capsys.readouterr()
    assert "a table without a sampler" in refused([*serve, f"[{tmp_path}/table]"], capsys)
    shutil.copytree(out / "0-grouped", tmp_path / "other")
    record = read_json(tmp_path / "other" / "palette.json")
    record["serve"]["bank"] = "0" * 64
    (tmp_path / "other" / "palette.json").write_text(json.dumps(record))
    assert "was sampled or scored again" in refused([*serve, f"[{tmp_path}/other]"], capsys)


def test_a_reference_bank_gives_the_residual_dual(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, shift in (("base", 0.0), ("steered", 0.4)):
        rows = rng.normal(size=200) + shift
        (tmp_path / f"{name}.csv").write_text("prompt_id,a\n" + "".join(f"p{i // 4},{v}\n" for i, v in enumerate(rows)))
    words = ["palette", "--bank", str(tmp_path / "steered.csv"), "--ask", "a>=+0.5", "--n_boot", "0", "--json"]
    assert main([*words, "--reference", str(tmp_path / "base.csv")]) == 0
    on_top = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    assert on_top["targets"]["a"] == pytest.approx(0.5, abs=0.2)
    assert 0 < on_top["multipliers"]["a"] < 0.6 * alone["multipliers"]["a"]
    assert on_top["dual"] == "grouped"


def test_a_killed_run_continues_to_the_same_bytes(small, tmp_path):
    """`palette apply` killed while sampling and while scoring, then run to its end: what an undisturbed run wrote."""
    out, lines = small
    SERVER.set_forkserver_preload(PRELOAD)
    again = tmp_path / "applied"
    words = [str(again) if word == str(out / "applied") else word for word in lines[-1]]
    assert run(words, dies_at=9) == -signal.SIGKILL
    assert run(words, dies_at=14, renamed=True) == -signal.SIGKILL
    assert not (again / "manifest.json").exists()
    assert run(words) == 0
    for name in ("applied.json", "asked.svg"):
        assert (again / name).read_bytes() == (out / "applied" / name).read_bytes()
    assert read_rollouts(again / "rollouts") == read_rollouts(out / "applied" / "rollouts")


def test_a_palette_over_a_steered_sampler(tiny_folder, tmp_path, capsys):
    """The residual dual: the ask refers to the base model's bank, the candidates are the steered sampler's."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    steered = tmp_path / "steered"
    lines = command_lines(tmp_path, tiny_folder, prompts)
    base = [w for w in lines["sample"] if w != "6"]
    base.insert(base.index("--samples") + 1, "8")
    score = [w.replace("diverse", "positive") for w in lines["score"]]
    sample = [*base, "--values", str(tmp_path / "values"), "--weights", "brief=1,positive=0", "--kl_budget", "0.5"]
    sample[sample.index("--out") + 1] = str(steered)
    over = [*score]
    over[over.index("--run") + 1] = str(steered)
    ask = ["palette", "--bank", str(steered), "--reference", str(tmp_path / "train"), "--ask", "brief>=+0.6sd", "--n_boot", "0"]
    plain = ["palette", "--bank", str(tmp_path / "train"), "--ask", "brief>=+0.6sd", "--n_boot", "0", "--json"]
    serve = f"palette apply --out {tmp_path}/served --prompts {prompts} --n_boot 50 --palettes [{tmp_path}/asked]".split()
    for words in (base, score, lines["train value"], sample, over, [*ask, "--out", str(tmp_path / "asked")]):
        assert main(words) == 0, words
    capsys.readouterr()
    assert main(plain) == 0
    alone = json.loads(capsys.readouterr().out)
    record = read_json(tmp_path / "asked" / "palette.json")
    assert record["targets"] == pytest.approx(alone["targets"])
    assert 0 <= record["multipliers"]["brief"] < alone["multipliers"]["brief"]  # steering has paid for a part
    assert main(serve) == 0
    assert "brief" in capsys.readouterr().out
    rollouts = read_rollouts(tmp_path / "served" / "rollouts")
    assert {r.weights for r in rollouts} == {(1.0, 0.0)}
    assert np.mean([r.kl for r in rollouts]) > 0.05
