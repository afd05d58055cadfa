"""`sample` with a choice among proposals: every way through the command line holds what the library draws; bad input is one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig

from conftest import FOLDER_WORDS, build_llama, build_tokenizer
from equipoise.cli import main
from equipoise.data.prompts import load_prompts
from equipoise.decoding.beam import Beams, BeamSampler
from equipoise.decoding.choosing import ChoosingSampler, WeightedRewards
from equipoise.decoding.logit_mixing import mixing_guide, tuned_guide
from equipoise.decoding.rejection import Segments, SegmentSampler
from equipoise.decoding.scorer_guided import ScorerGuide
from equipoise.decoding.value_guided import PolicySampler
from equipoise.models.companions import Voice
from equipoise.models.generation import Sampling
from equipoise.models.loading import load_model
from equipoise.models.scalar_heads import load_scorer
from equipoise.models.steps import branches
from equipoise.objectives import Normaliser
from equipoise.rewards import load_rewards
from equipoise.rollouts import make_requests, read_rollouts
from equipoise.runs import read_json
from equipoise.stages.choosing import choice_of
from small_pipeline import write_prompts

SAMPLING = Sampling(max_new_tokens=8, top_k=12, batch_size=4)
WEIGHTS = (0.25, 0.75)
BY = ["--choice.rewards", "[brief,diverse]", "--weights", "brief=0.25,diverse=0.75"]


@pytest.fixture(scope="module")
def parts(tiny_folder, tmp_path_factory):
    """A folder with models x and y, broken (all NaN) and other (another tokenizer), scorers sx, sy and snan, and the prompts."""
    root = tmp_path_factory.mktemp("choosing")
    write_prompts(root / "prompts.jsonl")
    for seed, name in enumerate(("x", "y", "broken", "other")):
        model = build_llama(len(FOLDER_WORDS), layers=2, max_position=256, seed=40 + seed)
        if name == "broken":
            model.model.norm.weight.data[:] = float("nan")
        model.save_pretrained(root / name)
        words = (*FOLDER_WORDS[:-2], *FOLDER_WORDS[:-3:-1]) if name == "other" else FOLDER_WORDS
        build_tokenizer(words).save_pretrained(root / name)
    for seed, name in enumerate(("sx", "sy", "snan", "sother", "stwo")):
        base = AutoModelForCausalLM.from_pretrained(root / "x").config.to_dict()
        config = LlamaConfig(**{**base, "num_labels": 2 if name == "stwo" else 1})
        with torch.random.fork_rng():
            torch.manual_seed(50 + seed)
            model = AutoModelForSequenceClassification.from_config(config).float()
        if name == "snan":
            model.score.weight.data[:] = float("nan")
        model.save_pretrained(root / name)
        build_tokenizer(words if name == "sother" else FOLDER_WORDS).save_pretrained(root / name)
    return root


def command(parts: Path, model: Path, out: Path, *more: str) -> list[str]:
    settings = ["--sampling.max_new_tokens", "8", "--sampling.top_k", "12", "--sampling.batch_size", "4", "--limit", "3", "--samples", "2"]
    return ["sample", "--out", str(out), "--model", str(model), "--prompts", str(parts / "prompts.jsonl"), *settings, *more]


def asked(parts: Path, got, samples: int, weights=WEIGHTS):
    prompts = {p.id: p for p in load_prompts(str(parts / "prompts.jsonl"))}
    return make_requests([prompts[i] for i in dict.fromkeys(r.prompt_id for r in got)], samples, 0, weights)


SEGMENTS = Segments(threshold=-0.5, beta=0.4, entropy=1.5, shortest=2, longest=5, tries=3)
CHOICES = {
    "best_of": ["--choice.how", "best_of", "--choice.n", "3", *BY],
    "resampling": ["--choice.how", "resampling", "--choice.n", "3", "--choice.beta", "0.2", *BY],
    "rejection": [
        *["--choice.how", "rejection", "--choice.segments.threshold", "-0.5", "--choice.segments.beta", "0.4", *BY],
        *["--choice.segments.entropy", "1.5", "--choice.segments.shortest", "2", "--choice.segments.longest", "5"],
        *["--choice.segments.tries", "3"],
    ],
    "blocks": ["--choice.how", "blocks", "--choice.n", "3", "--choice.block", "4", *BY],
}


@pytest.mark.parametrize("how", CHOICES)
def test_what_is_sampled_is_what_the_library_draws(parts, tiny_folder, tmp_path, capsys, how):
    words = command(parts, tiny_folder, tmp_path / "run", *CHOICES[how])
    assert main(words) == 0
    got = read_rollouts(tmp_path / "run" / "rollouts")
    lm = load_model(str(tiny_folder))
    rewards = WeightedRewards(rewards=load_rewards(["brief", "diverse"], lm))
    plain = PolicySampler(lm, SAMPLING)
    sampler = {
        "best_of": ChoosingSampler(inner=plain, rewards=rewards, n=3),
        "resampling": ChoosingSampler(inner=plain, rewards=rewards, n=3, beta=0.2),
        "rejection": SegmentSampler(lm=lm, sampling=SAMPLING, segments=SEGMENTS, rewards=rewards),
        "blocks": SegmentSampler(lm=lm, sampling=SAMPLING, segments=Segments.blocks(4, 3), rewards=rewards),
    }[how]
    want = sampler(asked(parts, got, 2))
    assert [(r.id, r.tokens, r.weights, r.reward_calls) for r in got] == [(r.id, r.tokens, r.weights, r.reward_calls) for r in want]
    assert read_json(tmp_path / "run" / "manifest.json")["facts"]["reward_calls"] == sum(r.reward_calls for r in got) > 0
    (tmp_path / "run" / "rollouts" / "part-00000.parquet").unlink()
    assert main(words) == 0
    assert read_rollouts(tmp_path / "run" / "rollouts") == got
    capsys.readouterr()
    assert main([*words, "--choice.rewards", "[diverse,brief]"]) == 2
    assert "another config.choice" in capsys.readouterr().err


def test_rewards_on_the_scale_of_a_scored_run(parts, tiny_folder, tmp_path):
    run = tmp_path / "reference"
    assert main(command(parts, tiny_folder, run)) == 0
    assert main(["score", "--run", str(run), "--model", str(tiny_folder), "--rewards", "[brief,diverse]"]) == 0
    assert main(["normalise", "--run", str(run), "--out", str(tmp_path / "scale.json")]) == 0
    words = command(parts, tiny_folder, tmp_path / "run", *CHOICES["best_of"], "--choice.scale", str(tmp_path / "scale.json"))
    assert main(words) == 0
    got, found = read_rollouts(tmp_path / "run" / "rollouts"), read_json(tmp_path / "scale.json")
    scale = Normaliser(objectives=("brief", "diverse"), mean_K=tuple(found["mean_K"]), sd_K=tuple(found["sd_K"]))
    lm = load_model(str(tiny_folder))
    rewards = WeightedRewards(rewards=load_rewards(["brief", "diverse"], lm), normaliser=scale)
    want = ChoosingSampler(inner=PolicySampler(lm, SAMPLING), rewards=rewards, n=3)(asked(parts, got, 2))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert "scale of the choice" in read_json(tmp_path / "run" / "manifest.json")["parents"]


def test_steered_proposals_beams_and_scorers(parts, tiny_folder, tmp_path):
    lm, models = load_model(str(tiny_folder)), {name: load_model(str(parts / name)) for name in "xy"}
    mixing = ["--mixing", f"[x={parts}/x,y={parts}/y]", "--divergence", "jsd", "--scope", "token", "--weights", "x=0.25,y=0.75"]
    assert (
        main(command(parts, tiny_folder, tmp_path / "beam", *mixing, "--choice.how", "beam", "--choice.beams.beams", "3", "--samples", "1"))
        == 0
    )
    got = read_rollouts(tmp_path / "beam" / "rollouts")
    guide = mixing_guide(lm, models, "jsd", "token")
    want = BeamSampler(lm=lm, sampling=SAMPLING, beams=Beams(beams=3), guide=guide)(asked(parts, got, 1))
    assert [r.tokens for r in got] == [r.tokens for r in want]

    scorers = ["--scorers", f"[x={parts}/sx,y={parts}/sy]", "--beta", "0.7", "--weights", "x=0.25,y=0.75"]
    best = ["--choice.how", "best_of", "--choice.n", "2", "--choice.rewards", "[x=brief,y=diverse]"]
    assert main(command(parts, tiny_folder, tmp_path / "both", *scorers, *best)) == 0
    got = read_rollouts(tmp_path / "both" / "rollouts")
    guide = ScorerGuide(lm, {name: load_scorer(str(parts / f"s{name}")) for name in "xy"}, 0.7)
    inner = PolicySampler(lm, SAMPLING, guide)
    rewards = WeightedRewards(rewards=load_rewards(["x=brief", "y=diverse"], lm))
    want = ChoosingSampler(inner=inner, rewards=rewards, n=2)(asked(parts, got, 2))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert all(r.guide_forwards > 0 for r in got)
    assert len([p for p in read_json(tmp_path / "both" / "manifest.json")["parents"] if p.startswith("model of")]) == 2
    # The reference's own beams need no weights.
    assert main(command(parts, tiny_folder, tmp_path / "plain", "--choice.how", "beam", "--samples", "1")) == 0
    got = read_rollouts(tmp_path / "plain" / "rollouts")
    want = BeamSampler(lm=lm, sampling=SAMPLING, beams=Beams())([replace(r, weights=None) for r in asked(parts, got, 1, None)])
    assert [r.tokens for r in got] == [r.tokens for r in want]


def test_a_tuned_policy_is_chosen_among_by_weights_that_it_has_not(parts, tiny_folder, tmp_path, capsys):
    words = command(parts, tiny_folder, tmp_path / "best", "--policy", str(parts / "x"), *CHOICES["best_of"])
    assert main(words) == 0
    lm, model = load_model(str(tiny_folder)), load_model(str(parts / "x"))
    got = read_rollouts(tmp_path / "best" / "rollouts")
    inner = PolicySampler(lm, SAMPLING, tuned_guide(lm, Voice(lm=model), ("brief", "diverse")))
    rewards = WeightedRewards(rewards=load_rewards(["brief", "diverse"], lm))
    want = ChoosingSampler(inner=inner, rewards=rewards, n=3)(asked(parts, got, 2))
    assert [(r.tokens, r.weights) for r in got] == [(r.tokens, r.weights) for r in want]
    assert all(r.guide_forwards > 0 for r in got)
    capsys.readouterr()
    assert main([*words[: words.index("--weights")], "--out", str(tmp_path / "none")]) == 2
    assert "steering needs both weights and one of" in capsys.readouterr().err


def test_an_endless_threshold_is_read_again_from_the_record(parts, tiny_folder, tmp_path):
    """Infinity is null in a manifest: the best of all tries, which the log of the run reads too."""
    words = [*CHOICES["rejection"], "--choice.segments.threshold", ".inf"]
    assert main(command(parts, tiny_folder, tmp_path / "run", *words)) == 0
    got = read_rollouts(tmp_path / "run" / "rollouts")
    lm = load_model(str(tiny_folder))
    rewards = WeightedRewards(rewards=load_rewards(["brief", "diverse"], lm))
    endless = replace(SEGMENTS, threshold=math.inf)
    want = SegmentSampler(lm=lm, sampling=SAMPLING, segments=endless, rewards=rewards)(asked(parts, got, 2))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert choice_of(read_json(tmp_path / "run" / "manifest.json")["config"]).segments == endless
    assert main(["score", "--run", str(tmp_path / "run"), "--model", str(tiny_folder), "--rewards", "[brief,diverse]"]) == 0
    assert main(["log", "--run", str(tmp_path / "run"), "--n_boot", "20"]) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["--guides", "[x={p}/broken]", "--weights", "x=1"], "CompanionGuide on x returned NaN or infinity for prompt 't"),
        (["--scorers", "[x={p}/snan]", "--weights", "x=1"], "ScorerGuide on x returned NaN or infinity for prompt 't"),
        (["--scorers", "[x={p}/sother]", "--weights", "x=1"], "'{p}/sother' has another tokenizer than"),
        (["--mixing", "[x={p}/other]", "--weights", "x=1"], "'{p}/other' has another tokenizer than"),
        (["--scorers", "[x={p}/stwo]", "--weights", "x=1"], "'{p}/stwo' has 2 logits, where a scorer has one"),
        (["--scorers", "[x={p}/absent]", "--weights", "x=1"], "no model folder at {p}/absent"),
        (["--sampling.top_k", "5000"], "top_k=5000 is more than the "),
        (["--mixing", "[x={p}/x,y={p}/y]", "--weights", "z=1"], "unknown objective 'z' in the weights; known: x, y"),
        (
            [*BY[:2], "--choice.how", "best_of", "--weights", "helpful=1"],
            "unknown objective 'helpful' in the weights; known: brief, diverse",
        ),
        (["--mixing", "[x={p}/x]", "--scope", "word", "--weights", "x=1"], "scope prefix or token, not 'word'"),
        (["--choice.how", "best"], "unknown choice 'best'; known: best_of, resampling, rejection, blocks, beam"),
        (["--choice.how", "best_of", "--weights", "x=1"], "needs rewards, and nothing else does"),
        (["--choice.how", "best_of", "--choice.rewards", "[brief]"], "steering needs both weights and one of"),
        (["--choice.how", "beam"], "searched responses to one prompt are all the same: set samples to 1, not 2"),
        (["--choice.how", "best_of", "--choice.n", "0", *BY], "n must be at least 1, got 0"),
        (["--choice.how", "blocks", "--choice.block", "0", *BY], "block must be at least 1, got 0"),
        (["--choice.how", "resampling", "--choice.beta", "-1", *BY], "beta must be positive, got -1"),
        (["--choice.segments.tries", "0"], "tries must be at least 1, got 0"),
        (["--choice.n", "5"], "choice.n is read where how is best_of or resampling or blocks, not where it is ''"),
        (["--choice.how", "best_of", "--choice.beta", "2", *BY], "choice.beta is read where how is resampling, not where it is 'best_of'"),
        (["--choice.how", "best_of", *BY, "--sampling.greedy", "true", "--samples", "1"], "greedy candidates are all the same"),
        (["--messages", "[x=help]", "--weights", "-0.5,1.5"], "2 weights (-0.5, 1.5) for 1 objectives (x)"),
        (
            ["--guides", "[x={p}/x]", "--choice.how", "best_of", "--choice.rewards", "[brief]", "--weights", "x=1"],
            "the choice is by brief, the steering by x: name the same",
        ),
        (["--choice.how", "best_of", *BY, "--choice.scale", "{p}/prompts.jsonl"], "prompts.jsonl"),
        (
            ["--choice.how", "rejection", *BY, "--sampling.greedy", "true", "--samples", "1"],
            "greedy proposals of a segment are all the same",
        ),
    ],
)
def test_bad_settings_are_one_line(parts, tiny_folder, tmp_path, capsys, settings, says):
    words = command(parts, tiny_folder, tmp_path / "run", *(word.format(p=parts) for word in settings))
    assert main(words) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("equipoise: ")]
    assert len(said) == 1
    assert says.format(p=parts) in said[0]


def test_the_prompt_and_the_token_of_a_nan_are_named(parts, tiny_folder, tmp_path, capsys):
    """A scorer that breaks at one token only: the line says which prompt and where."""
    model = AutoModelForSequenceClassification.from_pretrained(parts / "sx")
    word = build_tokenizer(FOLDER_WORDS).convert_tokens_to_ids("home")
    model.model.embed_tokens.weight.data[word] = float("nan")
    model.save_pretrained(tmp_path / "home")
    build_tokenizer(FOLDER_WORDS).save_pretrained(tmp_path / "home")
    rows = [{"id": "calm", "prompt": "please help me ."}, {"id": "odd", "prompt": "what is home ?"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = command(parts, tiny_folder, tmp_path / "run", "--scorers", f"[x={tmp_path}/home]", "--weights", "x=1", "--split", "")
    words[words.index("--prompts") + 1] = str(tmp_path / "prompts.jsonl")
    assert main(words) == 2
    assert "for prompt 'odd' (request 'odd/0@1') at token 0" in capsys.readouterr().err


def test_a_nan_later_on_loses_nothing_that_was_finished(parts, tiny_folder, tmp_path, capsys):
    """At token 3, in the second shard: the first one stays as it is, and the same command goes on behind it."""
    from equipoise.models.chat import prompt_ids

    lm = load_model(str(tiny_folder))
    prompts = [p for p in load_prompts(str(parts / "prompts.jsonl")) if p.id < "t09"]
    room = max(len(prompt_ids(lm.tokenizer, p)) for p in prompts)
    # Position embeddings that are NaN from some place on break only what is longer.
    config = GPT2Config(
        vocab_size=len(FOLDER_WORDS), n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=2, pad_token_id=0, bos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    model.transformer.wpe.weight.data[room + 2 :] = float("nan")
    model.save_pretrained(tmp_path / "late")
    build_tokenizer(FOLDER_WORDS).save_pretrained(tmp_path / "late")
    long = max(prompts, key=lambda p: len(prompt_ids(lm.tokenizer, p)))
    rows = [{"id": f"s{i}", "prompt": "help"} for i in range(4)] + [{"id": "long", "prompt": long.text}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = command(parts, tiny_folder, tmp_path / "run", "--guides", f"[x={tmp_path}/late]", "--weights", "x=1", "--split", "")
    words += ["--limit", "0", "--samples", "1", "--sampling.batch_size", "1", "--sampling.max_new_tokens", "4"]
    words[words.index("--prompts") + 1] = str(tmp_path / "prompts.jsonl")
    for _ in range(2):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "CompanionGuide on x returned NaN or infinity for prompt 'long' (request 'long/0@1') at token 3" in said
        first = tmp_path / "run" / "rollouts" / "part-00000.parquet"
        assert [r.prompt_id for r in read_rollouts(first.parent)] == ["s0", "s1", "s2", "s3"]
        written = first.stat().st_mtime_ns
    assert first.stat().st_mtime_ns == written


def test_the_whole_vocabulary_has_as_many_candidates_as_tokens(tiny_lm):
    assert [branches(tiny_lm, replace(SAMPLING, top_k=k)) for k in (0, 3, 8, 50)] == [8, 3, 8, 8]
