"""`sample` steered by other models, adapters and messages: the files go through, are continued, and hold what the library draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import FOLDER_WORDS, build_llama, build_tokenizer
from equipoise.cli import main
from equipoise.data.prompts import load_prompts
from equipoise.decoding.logit_mixing import mixing_guide
from equipoise.models.generation import Sampling, generate
from equipoise.models.loading import load_model
from equipoise.models.weighted_lora import WeightedLinear, WeightedLora, add_weighted_lora, save_weighted
from equipoise.rollouts import make_requests, read_rollouts
from equipoise.runs import read_json
from small_pipeline import write_prompts


@pytest.fixture(scope="module")
def parts(tiny_folder, tmp_path_factory):
    """A folder with models x and y, adapters ax and ay, a conditional adapter parm.safetensors and the prompts."""
    root = tmp_path_factory.mktemp("steering")
    write_prompts(root / "prompts.jsonl")
    generator = torch.Generator().manual_seed(0)
    for seed, name in enumerate("xy"):
        build_llama(len(FOLDER_WORDS), layers=2, max_position=256, seed=40 + seed).save_pretrained(root / name)
        build_tokenizer(FOLDER_WORDS).save_pretrained(root / name)
        base = build_llama(len(FOLDER_WORDS), layers=2, max_position=256, seed=1)
        adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        adapter.save_pretrained(root / f"a{name}")
    conditional = add_weighted_lora(load_model(str(tiny_folder)), WeightedLora(), ("x", "y"))
    for module in conditional.model.modules():
        if isinstance(module, WeightedLinear):
            module.up_Or.data = 0.3 * torch.randn(module.up_Or.shape, generator=generator)
    save_weighted(conditional, root / "parm.safetensors")
    save_weighted(conditional, root / "conditional")
    return root


def command(parts: Path, model: Path, out: Path, *steering: str) -> list[str]:
    settings = ["--sampling.max_new_tokens", "6", "--sampling.top_k", "12", "--sampling.batch_size", "4", "--limit", "3", "--samples", "2"]
    return ["sample", "--out", str(out), "--model", str(model), "--prompts", str(parts / "prompts.jsonl"), *settings, *steering]


def ways(parts: Path) -> dict[str, list[str]]:
    return {
        "mixing": ["--mixing", f"[x={parts}/x,y={parts}/y]", "--divergence", "jsd"],
        "adapters": ["--mixing", f"[x={parts}/ax,y={parts}/ay]"],
        "genarm": ["--guides", f"[x={parts}/x,y={parts}/y]", "--beta", "0.5"],
        "parm": ["--guides", f"[{parts}/parm.safetensors]"],
        "soup": ["--soup", f"[x={parts}/ax,y={parts}/ay]"],
        "conditional": ["--policy", f"{parts}/conditional"],
        "messages": ["--messages", '["x=you are good|you are bad","y=be safe, please"]'],
    }


@pytest.mark.parametrize("way", ["mixing", "adapters", "genarm", "parm", "soup", "conditional", "messages"])
def test_each_way_goes_through_and_continues(parts, tiny_folder, tmp_path, capsys, way):
    words = command(parts, tiny_folder, tmp_path / "run", *ways(parts)[way], "--weights", "x=0.25,y=0.75")
    assert main(words) == 0
    rollouts = read_rollouts(tmp_path / "run" / "rollouts")
    assert len(rollouts) == 6
    assert all(r.weights == (0.25, 0.75) and r.guide_forwards > 0 and r.kl > 0 for r in rollouts)
    (tmp_path / "run" / "rollouts" / "part-00000.parquet").unlink()
    assert main(words) == 0
    again = read_rollouts(tmp_path / "run" / "rollouts")
    assert [(r.tokens, r.kl) for r in again] == [(r.tokens, r.kl) for r in rollouts]
    parents = read_json(tmp_path / "run" / "manifest.json")["parents"]
    assert len(parents) == {"messages": 1, "parm": 2, "conditional": 2}.get(way, 3)
    capsys.readouterr()
    assert main([*words, "--sampling.temperature", "0.7"]) == 2
    assert "another config.sampling.temperature" in capsys.readouterr().err


def test_what_is_sampled_is_what_the_library_draws(parts, tiny_folder, tmp_path):
    assert main(command(parts, tiny_folder, tmp_path / "run", *ways(parts)["mixing"], "--weights", "x=0.25,y=0.75")) == 0
    lm, models = load_model(str(tiny_folder)), {name: load_model(str(parts / name)) for name in "xy"}
    got = read_rollouts(tmp_path / "run" / "rollouts")
    prompts = {p.id: p for p in load_prompts(str(parts / "prompts.jsonl"))}
    requests = make_requests([prompts[i] for i in dict.fromkeys(r.prompt_id for r in got)], 2, 0, (0.25, 0.75))
    want = generate(lm, requests, Sampling(max_new_tokens=6, top_k=12), mixing_guide(lm, models, "jsd"))
    assert [r.tokens for r in got] == [r.tokens for r in want]


def test_a_soup_is_sampled_as_the_policy_that_was_written_of_it(parts, tiny_folder, tmp_path, capsys):
    """--soup at weights, --policy on the adapter that `soup` wrote at them, whose card knows them, and on the model that `merge` made."""
    folders = f"[x={parts}/ax,y={parts}/ay]"
    assert main(["soup", "--out", str(tmp_path / "soups"), "--adapters", folders, "--weights", '["0.25,0.75"]']) == 0
    one = tmp_path / "soups" / "w0.25_0.75"
    assert main(["merge", "--out", str(tmp_path / "plain"), "--adapter", str(one), "--model", str(tiny_folder)]) == 0
    ways = {"soup": ["--soup", folders, "--weights", "x=0.25,y=0.75"], "one": ["--policy", str(one)]}
    ways["merged"] = ["--policy", str(tmp_path / "plain" / "model")]
    made = {}
    for name, words in ways.items():
        assert main(command(parts, tiny_folder, tmp_path / name, *words)) == 0
        made[name] = read_rollouts(tmp_path / name / "rollouts")
    assert [r.tokens for r in made["soup"]] == [r.tokens for r in made["one"]] == [r.tokens for r in made["merged"]]
    for rollouts in made.values():
        np.testing.assert_allclose([r.kl for r in rollouts], [r.kl for r in made["soup"]], atol=1e-4)
    assert {r.weights for r in made["soup"] + made["one"]} == {(0.25, 0.75)}
    assert {r.weights for r in made["merged"]} == {()}
    assert min(r.kl for r in made["soup"]) > 0
    assert "was trained at x=0.25 y=0.75 and takes none: leave weights away" in refused(
        command(parts, tiny_folder, tmp_path / "no", *ways["one"], "--weights", "x=1,y=0"), capsys
    )
    assert "has no weights of its own and takes none" in refused(
        command(parts, tiny_folder, tmp_path / "no", *ways["merged"], "--weights", "x=1,y=0"), capsys
    )
    says = refused(["train", "value", "--out", str(tmp_path / "values"), "--run", str(tmp_path / "one")], capsys)
    assert "was sampled from a steered policy" in says


def refused(words: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(words) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("equipoise: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize(
    ("steering", "says"),
    [
        (["--mixing", "[x={p}/x]", "--guides", "[x={p}/x]", "--weights", "x=1"], "one way at a time, got mixing and guides"),
        (["--mixing", "[x={p}/x]"], "needs both weights and one of values, mixing, guides, scorers, messages, soup, policy"),
        (["--weights", "x=1"], "needs both weights and one of"),
        (["--mixing", "[{p}/x]", "--weights", "x=1"], "write objective=WHAT once for each objective"),
        (["--guides", "[x={p}/x,x={p}/y]", "--weights", "x=1"], "write objective=WHAT once for each objective"),
        (["--mixing", "[x={p}/x,y={p}/y]", "--weights", "z=1"], "unknown objective 'z' in the weights; known: x, y"),
        (["--mixing", "[x={p}/x]", "--divergence", "tv", "--weights", "x=1"], "unknown divergence 'tv'"),
        (["--guides", "[{p}/absent.safetensors]", "--weights", "x=1"], "no weighted adapters at {p}/absent.safetensors"),
        (["--guides", "[{p}/x/model.safetensors]", "--weights", "x=1"], "x/model.safetensors is damaged or holds no weighted adapters"),
        (["--guides", "[x={p}/absent]", "--weights", "x=1"], "no model folder at {p}/absent"),
        (["--guides", "[x={p}/x]", "--weights", "x=1", "--beta", "0"], "beta must be positive"),
        (["--guides", "[x={p}/x]", "--weights", "x=1", "--divergence", "jsd"], "divergence=jsd is read beside mixing alone"),
        (["--mixing", "[x={p}/x]", "--weights", "x=1", "--beta", "0.5"], "beta=0.5 is read beside values or guides or scorers or messages"),
        (["--skip_above", "0.5"], "skip_above=0.5 is read beside values alone: leave it away"),
        (["--mixing", "[x={p}/x,y={p}/y]", "--weights", "-0.5,1.5"], "the weight of 'x' is -0.5; weights are at least 0 and sum to 1"),
        (["--mixing", "[x={p}/x,y={p}/y]", "--weights", "0.2,,0.8"], "3 weights (0.2, 0.0, 0.8) for 2 objectives (x, y)"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--limit", "-1"], "limit must be 0, for all, or more, got -1"),
        (["--soup", "[x={p}/ax]"], "needs both weights and one of"),
        (["--soup", "[x={p}/ax,y={p}/y]", "--weights", "x=1"], "{p}/y is no adapter folder"),
        (["--soup", "[x={p}/ax]", "--policy", "{p}/x", "--weights", "x=1"], "one way at a time, got soup and policy"),
        (["--policy", "{p}/conditional"], "needs both weights and one of"),
        (["--policy", "{p}/absent"], "no model folder at {p}/absent"),
        (["--sampling.greedy", "true"], "greedy responses to one prompt are all the same: set samples to 1, not 2"),
    ],
)
def test_bad_steering_is_one_line(parts, tiny_folder, tmp_path, capsys, steering, says):
    words = command(parts, tiny_folder, tmp_path / "run", *(word.format(p=parts) for word in steering))
    assert says.format(p=parts) in refused(words, capsys)


def test_a_model_with_another_tokenizer_is_named(parts, tiny_folder, tmp_path, capsys):
    other = tmp_path / "other"
    build_llama(len(FOLDER_WORDS), layers=2, max_position=256, seed=40).save_pretrained(other)
    build_tokenizer((*FOLDER_WORDS[:-2], *FOLDER_WORDS[:-3:-1])).save_pretrained(other)
    assert main(command(parts, tiny_folder, tmp_path / "run", "--guides", f"[x={other}]", "--weights", "x=1")) == 2
    assert f"{str(other)!r} has another tokenizer than" in capsys.readouterr().err
