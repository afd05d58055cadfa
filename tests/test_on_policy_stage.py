"""`train ppo`, `online_dpo`, `map` and `trl` from the command line: what they write, how it is served, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.cli import main
from equipoise.models.chat import prompt_ids
from equipoise.models.conditions import weights_in_prompt
from equipoise.models.loading import load_model
from equipoise.models.weighted_lora import conditioned
from equipoise.palette.dual import prepare, solve
from equipoise.rollouts import read_rollouts
from equipoise.runs import read_json
from equipoise.stages.common import prompts_of, scored_run
from equipoise.tiny import write_tiny
from equipoise.types import Request

REWARDS = "[long,readable]"
LOOP = [f"--loop.{line}" for line in ("rounds=2", "prompts=4", "samples=3", "steps=2", "lora.rank=2", "fit.learning_rate=0.02")]
LOOP += ["--loop.sampling.max_new_tokens=6"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model, prompts, a scored run of the reference and its statistics."""
    out = tmp_path_factory.mktemp("on-policy")
    write_tiny(out)
    sample = f"sample --out {out}/own --model {out}/model --prompts {out}/prompts.jsonl --samples 2 --sampling.max_new_tokens 6"
    assert main(sample.split()) == 0
    assert main(f"score --run {out}/own --model {out}/model --rewards {REWARDS}".split()) == 0
    assert main(f"normalise --run {out}/own --out {out}/statistics.json".split()) == 0
    return out


def words(tiny: Path, command: str, out: Path, *more: str) -> list[str]:
    asked = f"train {command} --out {out} --model {tiny}/model --prompts {tiny}/prompts.jsonl --rewards {REWARDS}"
    return [*asked.split(), "--statistics", str(tiny / "statistics.json"), *LOOP, *more]


def refused(line: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(line) == 2
    said = [text for text in capsys.readouterr().err.splitlines() if not re.match(r"loading |round \d|the bank: ", text)]
    assert len(said) == 1, said
    return said[0]


def test_morlhf_at_one_weighting_and_its_card(tiny, tmp_path):
    line = words(tiny, "ppo", tmp_path, "--loop.weights", "long=0.25,readable=0.75", "--ppo.advantage", "gdpo")
    assert main(line) == 0
    card = read_json(tmp_path / "card.json")
    assert (card["method"], card["objectives"], card["weights"]) == ("PPO", ["long", "readable"], [0.25, 0.75])
    assert card["responses"] == 24
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4]
    rewards, scale = read_json(tmp_path / "rounds" / "0001" / "round.json"), read_json(tiny / "statistics.json")
    for k, name in enumerate(scale["objectives"]):
        z = (rewards["raw"][name] - scale["mean_K"][k]) / scale["sd_K"][k]
        assert rewards["reward"][name] == pytest.approx(z, rel=1e-9)
    assert not (tmp_path / "checkpoints").exists()
    manifest = (tmp_path / "manifest.json").read_bytes()
    assert main(line) == 0, "a finished run returns"
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    served = f"sample --out {tmp_path}/said --model {tiny}/model --prompts {tiny}/prompts.jsonl --limit 2 --samples 1"
    assert main([*served.split(), "--policy", str(tmp_path / "adapter"), "--sampling.max_new_tokens", "4"]) == 0
    assert {r.weights for r in read_rollouts(tmp_path / "said" / "rollouts")} == {(0.25, 0.75)}


@pytest.mark.parametrize("reads", ["prompt", "parameters"])
def test_a_policy_that_reads_weights_is_served_as_it_was_trained(tiny, tmp_path, reads):
    """The log-probabilities that serving draws by are those of the trained model, told the weights as in training."""
    assert main(words(tiny, "online_dpo", tmp_path / "run", "--loop.reads", reads)) == 0
    folder = tmp_path / "run" / "adapter"
    served = f"sample --out {tmp_path}/said --model {tiny}/model --prompts {tiny}/prompts.jsonl --limit 3 --samples 2 --policy {folder}"
    drawn = [
        "--weights",
        "long=0.3,readable=0.7",
        "--sampling.top_k",
        "0",
        "--sampling.max_new_tokens",
        "5",
        "--sampling.allow_eos_first",
        "true",
    ]
    assert main([*served.split(), *drawn]) == 0
    policy = load_model(str(folder))
    asked = {p.id: p for p in prompts_of(str(tiny / "prompts.jsonl"), "train", 0)}
    said = weights_in_prompt(policy.tokenizer, ("long", "readable"))
    differ = 0.0
    for rollout in read_rollouts(tmp_path / "said" / "rollouts"):
        plain = Request(id="", prompt=asked[rollout.prompt_id], seed=0, weights=(0.3, 0.7))
        ids = prompt_ids(policy.tokenizer, said(plain) if reads == "prompt" else plain.prompt)
        with torch.inference_mode(), conditioned(policy.model, torch.tensor([[0.3, 0.7]]) if reads == "parameters" else None):
            law = policy.model(torch.tensor([[*ids, *rollout.tokens]])).logits[0].log_softmax(-1)
        expected = [law[len(ids) - 1 + t, token].item() for t, token in enumerate(rollout.tokens)]
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
        differ = max(differ, float(np.abs(np.subtract(rollout.logprobs, rollout.ref_logprobs)).max()))
    assert differ > 1e-3


ASK = "readable>=+0.2sd long>=keep-1"


def test_map_is_trained_towards_its_targets(tiny, tmp_path):
    """Two corrections in three rounds; the bank's multipliers are the dual's, per unit, times the sd; floors are the bank's levels."""
    line = words(tiny, "map", tmp_path, "--bank", str(tiny / "own"), "--ask", ASK, "--map.every", "1", "--loop.rounds", "3")
    assert main(line) == 0
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    run, scale = scored_run(tiny / "own"), read_json(tiny / "statistics.json")
    raw_NK = run.reward_of(["readable", "long"])
    there_N = np.isfinite(raw_NK).all(axis=1)
    raw_NK, groups = raw_NK[there_N], np.array([r.prompt_id for r in run.responses])[there_N]
    floor = {"readable": raw_NK[:, 0].mean() + 0.2 * raw_NK[:, 0].std(), "long": raw_NK[:, 1].mean() - 1}
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    dual = solve(prepare(raw_NK, starts), np.array([floor["readable"], floor["long"]]))
    first = [records[0]["weights"][name] / scale["sd_K"][scale["objectives"].index(name)] for name in ("readable", "long")]
    np.testing.assert_allclose(first, dual.multiplier_K, rtol=1e-9, atol=1e-12)
    assert [sorted(r.keys() & {"gap"}) for r in records] == [[], ["gap"], ["gap"]]
    lacks = (floor["readable"] - records[0]["raw"]["readable"]) / scale["sd_K"][scale["objectives"].index("readable")]
    assert records[1]["gap"]["readable"] == pytest.approx(lacks)
    assert records[1]["weights"] != records[0]["weights"]
    said = read_json(tmp_path / "manifest.json")["facts"]["targets"]
    assert said["readable"]["floor"] == pytest.approx(floor["readable"])
    assert said["readable"]["level"] == pytest.approx(records[2]["raw"]["readable"])
    assert said["readable"]["ceiling"] is None
    card, total = read_json(tmp_path / "card.json"), sum(records[2]["weights"].values())
    assert (card["method"], card["responses"], card["beta"]) == ("MAP", 36, pytest.approx(1 / total))
    assert card["weights"] == pytest.approx([records[2]["weights"][name] / total for name in ("long", "readable")])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--ask", "kind>=q70"), "the bank has no objective 'kind'"),
        (("--ask", "readable>=+9sd"), "'readable>=+9sd' can't be had of the responses in"),
        (("--ask", "readable>=+9sd"), "Ask for less, or sample more responses per prompt"),
        (("--ask", ASK, "--rewards", "[long]"), "the ask is about 'readable', and the rewards are long"),
        (("--ask", ASK, "--loop.weights", "0.5,0.5"), "`train map` alone makes its own weights"),
        (("--ask", ASK, "--loop.beta", "0.5"), "MAP needs loop.beta 1"),
        (("--ask", ASK, "--bank", "own.csv"), "the bank own.csv is no folder"),
    ],
)
def test_targets_that_cant_be_trained_for(tiny, tmp_path, capsys, more, says):
    assert says in refused(words(tiny, "map", tmp_path, "--bank", str(tiny / "own"), "--map.every", "1", *more), capsys)


def test_a_bank_of_other_responses_than_the_statistics(tiny, tmp_path, capsys):
    line = (
        f"sample --out {tmp_path}/own --model {tiny}/model --prompts {tiny}/prompts.jsonl --limit 4 --samples 1 --sampling.max_new_tokens 6"
    )
    assert main(line.split()) == 0
    assert main(f"score --run {tmp_path}/own --model {tiny}/model --rewards {REWARDS}".split()) == 0
    asked = words(tiny, "map", tmp_path / "map", "--bank", str(tmp_path / "own"), "--ask", ASK)
    assert "has the statistics of other responses than" in refused(asked, capsys)
    assert main(f"normalise --run {tmp_path}/own --out {tmp_path}/statistics.json".split()) == 0
    own = [*asked, "--out", str(tmp_path / "one"), "--statistics", str(tmp_path / "statistics.json")]
    assert "has one response per prompt: sample several, or say --dual pooled" in refused(own, capsys)


def test_trl_trains_on_our_rewards(tiny, tmp_path, capsys):
    """Two steps, whose rewards TRL logs in sd of the statistics; the adapter is served at the weights of its card."""
    pytest.importorskip("trl")
    asked = f"train trl --out {tmp_path}/run --model {tiny}/model --prompts {tiny}/prompts.jsonl --rewards {REWARDS}"
    line = [*asked.split(), "--statistics", str(tiny / "statistics.json"), "--trl.weights", "long=0.25,readable=0.75"]
    line += [f"--trl.{word}" for word in ("steps=2", "prompts=4", "samples=3", "batch_size=6", "lora.rank=2", "max_new_tokens=6")]
    assert main(line) == 0
    history = read_json(tmp_path / "run" / "history.json")
    assert [entry["step"] for entry in history] == [1, 2]
    assert all(abs(entry[f"rewards/{name}/mean"]) < 4 for entry in history for name in ("long", "readable"))
    served = f"sample --out {tmp_path}/said --model {tiny}/model --prompts {tiny}/prompts.jsonl --limit 2 --samples 1"
    assert main([*served.split(), "--policy", str(tmp_path / "run" / "adapter"), "--sampling.max_new_tokens", "4"]) == 0
    assert {r.weights for r in read_rollouts(tmp_path / "said" / "rollouts")} == {(0.25, 0.75)}
    assert "beta is 0; rloo, or" in refused([*line, "--out", str(tmp_path / "grpo"), "--trl.algorithm", "grpo"], capsys)


def test_ppo_has_to_be_told_its_weights(tiny, tmp_path, capsys):
    assert "PPO with weights '' and reads 'nothing'" in refused(words(tiny, "ppo", tmp_path, "--loop.reads", "nothing"), capsys)


def test_another_scale_of_the_rewards_is_refused(tiny, tmp_path, capsys):
    """Other statistics than the run began with, changed ones, ones of other scorers, and of other objectives."""
    whole, own = (tiny / "statistics.json").read_text(), tmp_path / "statistics.json"
    own.write_text(whole)
    line = words(tiny, "ppo", tmp_path / "run", "--loop.weights", "0.5,0.5", "--statistics", str(own))
    assert main(line) == 0
    own.write_text(whole + "\n")
    assert "holds a run with another parents.statistics" in refused(line, capsys)
    own.write_text(json.dumps({**json.loads(whole), "sd_K": [1.0, 2.0]}))
    assert "was changed after it was made (its digest doesn't fit)" in refused([*line, "--out", str(tmp_path / "a")], capsys)
    own.write_text(whole)
    renamed = [*line, "--rewards", "[long=brief,readable]", "--out", str(tmp_path / "b")]
    assert "'long' was scored by another scorer" in refused(renamed, capsys)
    lacks = [*line, "--rewards", "[brief,readable]", "--out", str(tmp_path / "c")]
    assert "has no statistics of 'brief', only of long, readable" in refused(lacks, capsys)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--loop.weights", "long=0.5"), "sum to 0.5, not 1"),
        (("--loop.weights", "kind=1"), "unknown objective 'kind' in the weights; known: long, readable"),
        (("--loop.prompts", "99"), "a round takes 99 prompts, and there are 32"),
        (("--loop.scalarisation", "chebyshev", "--loop.ideal", "[1,2,3]"), "the ideal (1.0, 2.0, 3.0) is of 3 objectives"),
        (("--loop.sampling.top_k", "40"), "sampling needs temperature 1, top_k 0"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, capsys, more, says):
    assert says in refused(words(tiny, "ppo", tmp_path, *more), capsys)
