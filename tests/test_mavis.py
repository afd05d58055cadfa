"""MAVIS's stages as commands: killed ones that go on, several collectors, an iteration, a distillation, the log, bad input."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from equipoise.cli import main
from equipoise.forests.backups import path_sums
from equipoise.forests.labelling import read_labels
from equipoise.forests.records import read_forest
from equipoise.models.value_heads import ValueHeads
from equipoise.models.value_models import load_value_model
from equipoise.rewards.scoring import read_rewards
from equipoise.rollouts import read_rollouts
from equipoise.runs import read_json
from equipoise.stages.trees import draw_weights
from equipoise.tiny import write_tiny
from small_pipeline import write_prompts
from test_resume import PRELOAD, SERVER, run, run_and_kill

SMALL = "--sampling.max_new_tokens 8 --sampling.top_k 12 --growth.layers 3 --shard 3 --limit 9"
VALUE = (
    "--value.validation_share 0.34 --value.calibration_states 16 --value.lora.rank 4 --value.lora.dropout 0.1 --value.fit.max_steps 6 "
    "--value.fit.batch_size 2 --value.fit.checkpoint_every 2 --value.fit.learning_rate 1e-3"
)


def lines(root: Path) -> dict[str, list[str]]:
    """The commands, in their order; every folder lies under `root`."""
    rewards, from_tiny = "--rewards [brief,diverse]", f"--model {root}/tiny/model --prompts {root}/prompts.jsonl {SMALL}"
    steered = f"--values {root}/values0 --weights mixed --kl_budget 0.5 --seed 3"
    texts = {
        "trees0": f"grow {from_tiny} --out {root}/trees0",
        "labels0": f"label nodes --trees {root}/trees0 {rewards} --out {root}/labels0",
        "values0": f"train value_model --labels {root}/labels0 {VALUE} --out {root}/values0",
        "trees1": f"grow {from_tiny} {steered} --out {root}/trees1",
        "labels1": f"label nodes --trees {root}/trees1 {rewards} --out {root}/labels1",
        "values1": f"train value_model --labels {root}/labels1 --start_from {root}/values0 {VALUE} --out {root}/values1",
        "brief": f"train value_model --labels {root}/labels0 --objectives [brief] {VALUE} --out {root}/brief",
        "distilled": f"distil --trees {root}/trees0 --values [{root}/brief,{root}/diverse] {VALUE} --out {root}/distilled",
    }
    texts["diverse"] = texts["brief"].replace("brief", "diverse")
    order = ("trees0", "labels0", "values0", "trees1", "labels1", "values1", "brief", "diverse", "distilled")
    return {name: texts[name].split() for name in order}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """All stages, run in peace."""
    root = tmp_path_factory.mktemp("mavis")
    write_tiny(root / "tiny")
    write_prompts(root / "prompts.jsonl")
    for words in lines(root).values():
        assert main(words) == 0, words
    return root


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("equipoise: ")
    return error


def files(folder: Path) -> dict[str, bytes]:
    """All files but the manifests, whose times differ."""
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("manifest.json", "started.json") and p.name[0] != ".")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(kept)}


# --- kills


def elsewhere(words: list[str], folder: Path) -> list[str]:
    at = words.index("--out")
    return [*words[: at + 1], str(folder), *words[at + 2 :]]


@pytest.mark.parametrize("name", ["trees1", "values1"])
def test_a_stage_that_is_killed_again_and_again_ends_as_an_undisturbed_one(done, tmp_path, name):
    """Kills at writes (before and after the file gets its name), and from outside while it works; the bytes are the same."""
    SERVER.set_forkserver_preload(PRELOAD)
    words = elsewhere(lines(done)[name], tmp_path / name)
    killed = [run(words, dies_at, renamed) == -signal.SIGKILL for dies_at, renamed in ((2, False), (2, True))]
    killed.append(run_and_kill(words, tmp_path, 1, 0.002) == -signal.SIGKILL)
    assert sum(killed) >= 2
    assert not (tmp_path / name / "manifest.json").exists()
    assert run(words) == 0
    made = {"trees1": "trees", "values1": ""}[name]  # the labels' scores lie beside the trees
    assert files(tmp_path / name / made) == files(done / name / made)
    assert read_json(tmp_path / name / "manifest.json")["outputs"] == read_json(done / name / "manifest.json")["outputs"]


def test_a_finished_stage_is_left_as_it_is(done, capsys):
    for name in ("trees0", "labels0", "distilled"):
        before = {p: p.stat().st_mtime_ns for p in (done / name).rglob("*.*") if p.name != "started.json"}
        assert main(lines(done)[name]) == 0
        assert {p: p.stat().st_mtime_ns for p in before} == before


def test_collectors_share_a_run_without_locks(done, tmp_path, capsys):
    """Three shards for two collectors: the first to finish leaves the run open, the last closes it, and a reader sees one run."""
    words = elsewhere(lines(done)["trees0"], tmp_path / "trees0")
    assert main([*words, "--collectors", "2", "--collector", "1"]) == 0
    assert "other collectors' shards are missing" in capsys.readouterr().err
    assert not (tmp_path / "trees0" / "manifest.json").exists()
    assert "no such file" in refused(f"label nodes --trees {tmp_path}/trees0 --out {tmp_path}/l", capsys)
    assert main([*words, "--collectors", "2", "--collector", "0"]) == 0
    shards = sorted(p.name for p in (tmp_path / "trees0" / "trees").iterdir())
    assert shards == ["c0-00000.parquet", "c0-00002.parquet", "c1-00001.parquet"]
    one, merged = ({name[2:]: content for name, content in files(root / "trees0" / "trees").items()} for root in (done, tmp_path))
    assert merged == one
    assert read_json(tmp_path / "trees0" / "manifest.json")["facts"] == read_json(done / "trees0" / "manifest.json")["facts"]


# --- what the stages wrote


def scores_of(folder: Path) -> dict[str, list]:
    return pa.concat_tables([pq.read_table(p).replace_schema_metadata() for p in sorted(folder.glob("*.parquet"))]).to_pydict()


def test_labels_are_the_leaves_rewards_backed_up(done):
    """On the steered trees, with each tree's own beta as the price: by following every leaf up, one at a time."""
    forest, rewards = read_forest(done / "trees1" / "trees"), scores_of(done / "trees1" / "rewards")
    labels = read_labels(done / "labels1" / "labels.parquet", forest)
    scale = read_labels(done / "labels0" / "labels.parquet", read_forest(done / "trees0" / "trees")).normaliser
    assert labels.normaliser == scale, "later iterations stay on the reference's scale"
    by_leaf = {name: dict(zip(rewards["rollout_id"], rewards[name], strict=True)) for name in ("brief", "diverse")}
    ids = forest.node_ids()

    def value(node: int, k: int, price: float) -> float:
        children = np.flatnonzero(forest.parent_N == node)
        if not len(children):
            name = scale.objectives[k]
            return (by_leaf[name][ids[node]] - scale.mean_K[k]) / scale.sd_K[k]
        found = [value(c, k, price) - price * forest.kl_T[forest.offset_M[c] : forest.offset_M[c + 1]].sum() for c in children]
        scored = [v for v in found if not np.isnan(v)]
        return float(np.mean(scored)) if scored else float("nan")

    assert len(set(forest.weights)) == len(forest.weights), "every tree drew its own weights"
    assert all(sum(w) == pytest.approx(1) for w in forest.weights)
    for node in range(len(forest)):
        beta = float(forest.beta_F[forest.tree_N[node]])
        for k in range(2):
            np.testing.assert_allclose(labels.target_NK[node, k], value(node, k, beta), atol=1e-5)
            np.testing.assert_allclose(labels.value_NK[node, k], value(node, k, 0.0), atol=1e-5)
    kl = path_sums(forest.parent_N, forest.segment_sums(forest.kl_T))[forest.leaf_N]
    assert read_json(done / "trees1" / "manifest.json")["facts"]["kl_per_leaf"] == pytest.approx(kl.mean())
    assert 0.05 < kl.mean() < 3, "near the budget of half a nat that a table of few states predicts"


def test_the_beta_of_a_tree_is_the_guides(done):
    forest, model = read_forest(done / "trees1" / "trees"), load_value_model(done / "values0" / "model")
    table = model.heads.calibration["prefix"]
    for weights, beta in zip(forest.weights, forest.beta_F, strict=True):
        assert table.kl(weights, beta) == pytest.approx(0.5, rel=1e-6)


def test_mixed_weights_are_uniform_on_the_simplex():
    drawn = np.array([draw_weights(3, 0, f"t{i}") for i in range(4000)])
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    np.testing.assert_allclose(drawn.mean(axis=0), 1 / 3, atol=4 * np.sqrt(1 / 18 / 4000))
    assert (drawn[:, 0] > 0.5).mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 4000))  # (1 - 1/2)^2
    assert draw_weights(3, 0, "t1") != draw_weights(3, 1, "t1")


def test_values_of_an_iteration_begin_at_those_before(done):
    zero, one = (load_value_model(done / name / "model") for name in ("values0", "values1"))
    assert zero.heads.normaliser == one.heads.normaliser
    assert zero.heads.model == one.heads.model == str(done / "tiny" / "model")
    moved = np.abs(one.heads.tensors["prefix_KPI"] - zero.heads.tensors["prefix_KPI"]).max()
    assert 0 < moved < 0.1
    assert load_value_model(done / "distilled" / "model").objectives == ("brief", "diverse")
    assert load_value_model(done / "brief" / "model").objectives == ("brief",)


# --- sampling with value models, and the log


@pytest.fixture(scope="module")
def sampled(done) -> Path:
    """One joint value model at mixed weights, and two models at a beta, each sampled, scored and logged."""
    base = f"sample --model {done}/tiny/model --prompts {done}/prompts.jsonl --split test --samples 3 --sampling.max_new_tokens 8"
    ways = {
        "joint": f"--values {done}/distilled --weights 0.2,0.8 --kl_budget 0.5",
        "apart": f"--values {done}/brief,{done}/diverse --weights ,1 --kl_budget null --beta 0.3 --skip_above 0.9 --value_dtype bfloat16",
        "reference": "",
    }
    for name, way in ways.items():
        assert main(f"{base} {way} --out {done}/{name}".split()) == 0
        assert main(f"score --run {done}/{name} --rewards [brief,diverse]".split()) == 0
        assert main(f"log --run {done}/{name} --n_boot 200".split()) == 0
    return done


def test_the_log_by_hand(sampled):
    rollouts = read_rollouts(sampled / "joint" / "rollouts")
    reward_NK = read_rewards(sampled / "joint" / "rewards", rollouts).reward_NK
    rows = pq.read_table(sampled / "joint" / "log" / "prompts.parquet").to_pylist()
    found = read_json(sampled / "joint" / "log" / "overall.json")
    assert [r["prompt_id"] for r in rows] == list(dict.fromkeys(r.prompt_id for r in rollouts))
    running = []
    for row in rows:
        mine = [i for i, r in enumerate(rollouts) if r.prompt_id == row["prompt_id"]]
        assert row["responses"] == len(mine) == 3
        mean_K = [float(np.mean(c[np.isfinite(c)])) if np.isfinite(c).any() else float("nan") for c in reward_NK[mine].T]
        np.testing.assert_allclose([row["reward:brief"], row["reward:diverse"]], mean_K)
        np.testing.assert_allclose(row["mixed"], 0.2 * mean_K[0] + 0.8 * mean_K[1])
        running.append(np.mean([rollouts[i].kl for i in mine]))
        assert row["kl"] == pytest.approx(running[-1])
        assert row["running_kl"] == pytest.approx(np.mean(running))
        ratios = [sum(rollouts[i].logprobs) - sum(rollouts[i].ref_logprobs) for i in mine]
        assert row["kl_sampled"] == pytest.approx(np.mean(ratios), abs=1e-5)
    trials = [reward_NK[i::3, 0] for i in range(3)]
    means = [t[np.isfinite(t)].mean() for t in trials]
    brief = found["objectives"]["brief"]
    np.testing.assert_allclose(brief["trials"], means)
    assert brief["mean_of_trials"] == pytest.approx(np.mean(means))
    assert brief["sd_of_trials"] == pytest.approx(np.std(means))
    assert brief["interval"][0] <= brief["mean"] <= brief["interval"][1]
    assert found["objectives"]["diverse"]["n_unscored"] == np.isnan(reward_NK[:, 1]).sum()
    assert found["weights"] == "brief=0.2 diverse=0.8"
    assert (found["prompts"], found["responses"], found["trials"]) == (len(rows), len(rollouts), 3)
    arguments = read_json(sampled / "joint" / "log" / "arguments.json")
    assert arguments["sample"]["weights"] == "0.2,0.8"
    assert arguments["score"]["rewards"] == ["brief", "diverse"]


def test_the_reference_pays_for_top_k_alone(sampled):
    found = read_json(sampled / "reference" / "log" / "overall.json")
    assert found["weights"] == "reference"
    assert "mixed" not in found
    assert found["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["kl_sampled"]["mean_of_trials"] == pytest.approx(found["kl_floor"], abs=1e-4) or found["kl_floor"] == 0
    steered = read_json(sampled / "apart" / "log" / "overall.json")
    assert steered["kl"]["mean"] > 0
    assert steered["guide_forwards_per_response"] > 0
    rollouts = read_rollouts(sampled / "apart" / "rollouts")
    assert {r.weights for r in rollouts} == {(0.0, 1.0)}


# --- bad input


def test_bad_input(done, tmp_path, capsys):
    grow = f"grow --model {done}/tiny/model --prompts {done}/prompts.jsonl --out {tmp_path}/NEW"
    label = f"label nodes --trees {done}/trees0 --rewards [brief,diverse] --out {tmp_path}/NEW"
    train = f"train value_model --labels {done}/labels0 --out {tmp_path}/NEW"
    for words, says in {
        f"{grow} --growth.layers 1": "at least 1 child per node and 2 layers",
        f"{grow} --collectors 2 --collector 2": "collector must be 0 to collectors - 1",
        f"{grow} --weights mixed": "steering needs both weights and one of values",
        f"{grow} --values {done}/values0 --weights 0.5,0.6": "sum to 1.1, not 1",
        f"{grow} --values {done}/values0 --weights funny=1": "unknown objective 'funny'",
        f"{grow} --values {done}/trees0 --weights mixed": "no value heads at",
        f"{grow} --values {done}/values0,{done}/brief --weights mixed --beta 1": "may have one value model",
        f"{label} --target firm": "target",
        f"{label} --target log_mean_exp": "set zeta to it",
        f"label nodes --trees {done}/labels0 --out {tmp_path}/l": "is not a `grow` folder but one of `label nodes`",
        f"label nodes --trees {done}/trees0 --rewards [brief] --out {tmp_path}/l": "holds a run with another config.rewards",
        f"label nodes --trees {done}/trees1 --rewards [diverse,brief] --out {tmp_path}/l": "holds a run with another config.rewards",
        f"{train} --objectives [funny]": "unknown objective 'funny'; the labels have brief, diverse",
        f"{train} --start_from {done}/brief": "values brief, the targets are brief, diverse",
        f"{train} --start_from {done}/brief --base {done}/tiny": "two beginnings",
        f"{train} --value.bottom_fraction 0": "bottom_fraction",
        f"distil --trees {done}/trees0 --values [{done}/brief,{done}/brief] --out {tmp_path}/d": "share an objective: brief, brief",
        f"distil --trees {done}/trees0 --values [{done}/labels0] --out {tmp_path}/e": "no value model at",
        f"sweep --values {done}/values0 --out {tmp_path}/s": "is a value model, which `compare` takes as a method",
        f"log --run {done}/trees0": "is not a `sample` folder but one of `grow`",
    }.items():
        # A run that is refused once it has begun leaves its folder with its settings.
        fresh = words.replace("NEW", f"{abs(hash(words))}")
        assert says in refused(fresh, capsys), words


def test_value_models_that_do_not_fit_the_policy(done, tmp_path, capsys):
    """Of a backbone with as many tokens under other ids, alone or beside one that fits; all mass where there is no model."""
    shutil.copytree(done / "tiny" / "model", tmp_path / "swapped")
    path = tmp_path / "swapped" / "tokenizer.json"
    found = json.loads(path.read_text())
    words = found["model"]["vocab"]
    words["home"], words["car"] = words["car"], words["home"]
    path.write_text(json.dumps(found))
    shutil.copytree(done / "diverse", tmp_path / "diverse")
    file = tmp_path / "diverse" / "model" / "heads.safetensors"
    heads = ValueHeads.load(file)
    replace(heads, model=str(tmp_path / "swapped")).save(file)
    base = f"sample --model {done}/tiny/model --prompts {done}/prompts.jsonl --samples 1 --limit 2 --kl_budget null --beta 0.5"
    for number, (values, weights, says) in enumerate(
        (
            (f"{tmp_path}/diverse", "1", f"'{tmp_path}/diverse/model' has another tokenizer than '{done}/tiny/model': token "),
            (f"{done}/brief,{tmp_path}/diverse", "0.5,0.5", f"'{tmp_path}/diverse/model' has another tokenizer than"),
            (f"{done}/brief", "diverse=1", "unknown objective 'diverse' in the weights; known: brief"),
            (f"{done}/brief,{done}/diverse", "0.2,,0.8", "3 weights (0.2, 0.0, 0.8) for 2 objectives (brief, diverse)"),
            (f"{done}/brief,{done}/diverse --kl_budget 1 --beta 1", ",1", "set kl_budget to null and give beta"),
        )
    ):
        assert says in refused(f"{base} --out {tmp_path}/{number} --values {values} --weights {weights}", capsys)
    distil = f"distil --trees {done}/trees0 --values [{done}/brief,{tmp_path}/diverse] --out {tmp_path}/distilled"
    assert f"'{tmp_path}/diverse/model' has another tokenizer than" in refused(distil, capsys)


def test_beams_by_the_values_of_a_value_model(done, tmp_path, capsys):
    base = f"sample --model {done}/tiny/model --prompts {done}/prompts.jsonl --samples 1 --limit 3 --sampling.max_new_tokens 5"
    beams = f"{base} --values {done}/values0 --weights 0.5,0.5 --choice.how beam --choice.beams.score value"
    assert main(f"{beams} --out {tmp_path}/beams".split()) == 0
    assert len(read_rollouts(tmp_path / "beams" / "rollouts")) == 3
    assert "of value models never skipped" in refused(f"{beams} --skip_above 0.9 --out {tmp_path}/skip", capsys)


def test_labels_that_are_not_of_these_trees_are_refused(done, tmp_path, capsys):
    shutil.copytree(done / "labels0", tmp_path / "labels0")
    path = tmp_path / "labels0" / "labels.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)  # one node fewer
    train = f"train value_model --labels {tmp_path}/labels0 --out {tmp_path}"
    assert "labels other trees" in refused(f"{train}/a", capsys)
    (tmp_path / "labels0" / "labels.parquet").write_bytes(b"PAR1")
    assert "missing, damaged or no labels" in refused(f"{train}/b", capsys)
    (tmp_path / "labels0" / "manifest.json").write_text(json.dumps({"command": "sweep"}))
    assert "not a `label nodes` folder but one of `sweep`" in refused(f"{train}/c", capsys)
