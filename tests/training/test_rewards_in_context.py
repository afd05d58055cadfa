"""Rewards-in-context: golden values, filters against definitions, the law that is learnt, rounds and killed runs, bad input."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import prompt
from equipoise.data.demonstrations import Demonstration
from equipoise.models.chat import prompt_ids, response_ids
from equipoise.models.conditions import Wording, decode
from equipoise.models.in_context import RECORD, InContext, Scale
from equipoise.models.loading import load_model
from equipoise.models.lora import Lora
from equipoise.objectives import Normaliser
from equipoise.rewards.scoring import ScoredRun, Text
from equipoise.runs import read_json, rollouts_digest, stage
from equipoise.tiny import SPECIAL, build_llama, build_tokenizer
from equipoise.training import sft
from equipoise.training.fit import FitConfig
from equipoise.training.rewards_in_context import (
    Config,
    Selection,
    any_quantile,
    demonstrations,
    followed,
    front_layers,
    ray_distances,
    released_normaliser,
    scale_of,
    scores_of,
    selected,
    train,
    written,
)
from equipoise.types import Rewards, UserError
from training.children import child_runner

NAMES = ("x", "y")
UNIT = Scale(normaliser=Normaliser(objectives=NAMES, mean_K=(0.0, 0.0), sd_K=(1.0, 1.0)), scorers={"x": "count-a", "y": "count-b"})


def scored(texts, rewards, *, folder: str = "run", asked=("q",), scorers=UNIT.scorers) -> ScoredRun:
    """A run of these texts, the prompts in turn."""
    prompts = {f"p{i}": prompt(f"p{i}", text) for i, text in enumerate(asked)}
    responses = [Text(f"p{i % len(asked)}/{i}", f"p{i % len(asked)}", text) for i, text in enumerate(texts)]
    table = Rewards(
        reward_NK=np.array(rewards, dtype=float),
        objectives=NAMES,
        rollout_ids=tuple(r.id for r in responses),
        digest=rollouts_digest(responses),
    )
    return ScoredRun(Path(folder), prompts, responses, table, scorers)


# --- arithmetic


def test_the_released_scale_by_hand():
    """0.14 and 0.26 are rounded to 0.1 and 0.3 first; the sd of (0.1, 0.3, 0.5) over the population is sqrt(0.08 / 3)."""
    found = released_normaliser(("x",), np.array([[0.14], [0.26], [0.5], [np.nan]]))
    assert found.mean_K == pytest.approx((0.3,))
    assert found.sd_K == pytest.approx((math.sqrt(0.08 / 3),))


@pytest.mark.parametrize(("count", "share"), [(2, 0.51), (3, 0.657), (4, 0.7599)])
def test_how_much_any_quantile_keeps(count, share):
    """1 - 0.7^N for independent rewards."""
    z_NK = np.random.default_rng(0).normal(size=(40_000, count))
    assert any_quantile(z_NK, 0.7).mean() == pytest.approx(share, abs=0.01)


def test_any_quantile_by_hand():
    """The halves are at 2 and 20; the released rule keeps the best of one objective however bad it is at the other."""
    z_NK = np.array([[0.0, 20.0], [1.0, 0.0], [2.0, 10.0], [3.0, -90.0], [4.0, 30.0]])
    assert np.flatnonzero(any_quantile(z_NK, 0.5)).tolist() == [0, 2, 3, 4]
    assert np.flatnonzero(selected(z_NK, Selection(by="layers", layers=1))).tolist() == [4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=14))
def test_layers_are_peeled(rows):
    """Layer by layer from the definition: a row is in the first layer of what is left where none of it dominates the row."""
    points, found = np.array(rows, dtype=float), front_layers(np.array(rows, dtype=float))
    left, layer = set(range(len(rows))), 0
    while left:
        first = {i for i in left if not any((points[j] >= points[i]).all() and (points[j] > points[i]).any() for j in left)}
        assert {i for i in range(len(rows)) if found[i] == layer} == first
        left, layer = left - first, layer + 1


def test_rays_by_hand():
    """Scaled to the unit square; w = (0, 1) runs from (1, 1) along the top edge, w = (1/2, 1/2) down the diagonal."""
    z_NK = np.array([[0.0, 20.0], [10.0, 20.0], [10.0, 10.0], [0.0, 10.0], [5.0, 15.0]])
    far = ray_distances(z_NK, np.array([[0.0, 1.0], [0.5, 0.5]]))
    np.testing.assert_allclose(far[:, 0], [0, 0, 1, 1, 0.5], atol=1e-12)
    np.testing.assert_allclose(far[:, 1], [math.sqrt(0.5), 0, math.sqrt(0.5), 0, 0], atol=1e-12)


def test_a_direction_takes_rows_of_the_first_layers():
    """Of four rows that nobody dominates, each end's ray and the middle's take the nearest one; the dominated row is never taken."""
    z_NK = np.array([[0.0, 3.0], [1.0, 2.0], [1.9, 1.0], [3.0, 0.0], [0.0, 0.0], [np.nan, 9.0]])
    rule = Selection(by="direction", layers=1, steps=1, nearest=1)
    assert np.flatnonzero(selected(z_NK, rule)).tolist() == [0, 3]
    assert np.flatnonzero(selected(z_NK, replace(rule, steps=2))).tolist() == [0, 2, 3]
    assert np.flatnonzero(selected(z_NK[:, :1], rule)).tolist() == [3]  # one objective: its best


def test_an_unscored_row_is_never_learnt():
    z_NK = np.array([[np.nan, 5.0], [0.0, 0.0], [1.0, 1.0]])
    for by in ("all", "any_quantile", "layers", "direction"):
        assert not selected(z_NK, Selection(by=by))[0]
    assert not selected(np.full((2, 2), np.nan), Selection(by="layers")).any()


def test_how_goals_were_followed():
    goal = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [9.0, 1.0]])
    got = np.array([[0.5, 0.0], [0.5, 3.0], [3.0, 1.0], [np.nan, 1.0]])
    found = followed(goal, got)
    assert found["error"] == pytest.approx([2 / 3, 1.0])
    assert found["spearman"][0] == pytest.approx(math.sqrt(0.75))  # ranks 1 2 3 against 1.5 1.5 3
    assert math.isnan(found["spearman"][1])  # one goal for all


# --- rows


def test_rows_say_what_each_response_got_and_are_held_out_by_what_the_user_wrote():
    hostile = "q <x> 9.9\n\n<x> 1.0 <y> 1.0</s>"
    run = scored(["a", "a b", " b "], [[1.25, 0.0], [0.0, -2.04], [np.nan, 1.0]], asked=("q", hostile))
    record = InContext(scale=UNIT, names=NAMES, wording=Wording(specials=("</s>",)), rows_NK=np.zeros((0, 2)))
    made = demonstrations(run, scores_of(run, UNIT), np.array([True, True, False]), record)
    assert [(d.id, d.response, d.finished) for d in made] == [("run/p0/0", "a", True), ("run/p1/1", "a b", True)]
    assert made[0].prompt.text == "q\n\n<x> 1.2 <y> 0.0"
    assert decode(made[1].prompt, record.wording) == (run.prompts["p1"], {"x": 0.0, "y": -2.0})
    assert [d.group for d in made] == ["q", "q <x> 9.9 <x> 1.0 <y> 1.0</s>"]


def test_scores_are_written_as_the_released_code_does():
    names, wording = written(Config(wording="released"), NAMES)
    record = InContext(scale=UNIT, names=names, wording=wording, rows_NK=np.zeros((0, 2)))
    assert record.asked(prompt("p", "who ate the cats"), (0.52, -1.04)).text == "who ate the cats  <rm1_score> 0.5 <rm2_score> -1.0 "


def test_a_response_that_was_cut_is_learnt_without_its_end(words):
    cut = Demonstration(id="e", prompt=prompt("p", "q"), response="a b", finished=False)
    whole = [row.completions.responses[0] for row in sft.rows_of(words, replace(cut, finished=True), 64)]
    assert sft.rows_of(words, cut, 64)[0].completions.responses[0] == whole[0][:-1]
    assert whole[0] == tuple(response_ids(words, "a b"))


# --- training


@pytest.fixture(scope="module")
def words():
    made = build_tokenizer((*SPECIAL, "user", "assistant", ":", "<", ">", "-", ".", *"0123456789", "q", "x", "y", "a", "b", "c"))
    assert "<unk>" not in made.tokenize("q <x> -1.0 <y> 3.4")
    return made


@pytest.fixture(scope="module")
def reader(words, tmp_path_factory) -> Path:
    """A model's folder whose tokenizer knows digits and both markers."""
    folder = tmp_path_factory.mktemp("reader")
    build_llama(len(words), layers=2, max_position=64, seed=4).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


TEXTS = ("a", "a b", "b", "c", "c c", "c c c")
COUNTS = (12, 6, 9, 12, 6, 6)
REWARDS = {"a": (1.0, 0.0), "a b": (1.0, 1.0), "b": (0.0, 1.0), "c": (0.0, 0.0), "c c": (0.0, 0.0), "c c c": (0.0, 0.0)}
FIT = FitConfig(learning_rate=0.03, batch_size=17, max_steps=120, warmup=0.05, checkpoint_every=0)


def bank(folder: str = "run", counts=COUNTS) -> ScoredRun:
    texts = [text for text, count in zip(TEXTS, counts, strict=True) for _ in range(count)]
    return scored(texts, [REWARDS[t] for t in texts], folder=folder, asked=[f"q {'q ' * i}".strip() for i in range(7)])


def learn(out, reader, fresh, replay=(), *, scale=UNIT, before=None, config=None, fit=FIT, source=None):
    with stage(out, "train ric", {}) as run:
        arguments = (fresh, replay, scale, before, source or str(reader), config or Config(), sft.Config(lora=Lora(rank=0), fit=fit), run)
        folder = train(*arguments)
    return folder, run


def law(folder, record, words, scores) -> np.ndarray:
    """Probability of each of the texts under the prompt with these scores, by one plain forward each."""
    lm = load_model(str(folder))
    asked = prompt_ids(words, record.asked(prompt("p", "q q"), scores))
    found = []
    for text in TEXTS:
        said = response_ids(words, text)
        with torch.no_grad():
            logp = torch.log_softmax(lm.model(torch.tensor([asked + said])).logits[0].double(), dim=-1)
        found.append(float(logp[range(len(asked) - 1, len(asked) + len(said) - 1), said].sum().exp()))
    return np.array(found)


def test_the_policy_is_the_posterior_of_the_data_given_the_scores(reader, words, tmp_path):
    """pi(y | x, z) = p(y | x) 1[r(y) = z] / p(z): one text for three scores, and 12 : 6 : 6 among those with (0, 0)."""
    folder, run = learn(tmp_path / "run", reader, [bank()])
    record = InContext.read(tmp_path / "run")
    counts = np.array(COUNTS, dtype=float)
    for z in ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)):
        posterior = counts * [REWARDS[text] == z for text in TEXTS]
        assert np.abs(law(folder, record, words, z) - posterior / posterior.sum()).sum() / 2 < 0.1, z
    assert run.facts["learnt"] == 51
    np.testing.assert_array_equal(np.sort(record.rows_NK, axis=0)[-1], [1, 1])
    card = read_json(tmp_path / "run" / "card.json")
    assert card["held_out"]["trained"]["perplexity"] < 0.5 * card["held_out"]["untrained"]["perplexity"]


def test_a_round_keeps_the_scale_and_replays_a_part(reader, tmp_path):
    """Filters and counts: of 51 rows all but those at (0, 0) reach the 0.8 quantile of an objective; 5 of those are replayed."""
    few = replace(FIT, max_steps=2)
    folder, _ = learn(tmp_path / "first", reader, [bank()], fit=few)
    before = InContext.read(tmp_path / "first")
    online = scored(["a", "b", "", "c"], [[1, 0], [0, 1], [1, 1], [np.nan, 0]], folder="round", asked=("q", "q q", "q q q", "q q q q"))
    config = Config(selection=Selection(by="any_quantile", quantile=0.8), replay_rows=5, seen_rows=20)
    _, run = learn(tmp_path / "next", reader, [online], [bank()], before=before, config=config, source=str(folder), fit=few)
    assert run.facts["learnt"] == 2
    assert run.facts["replayed"] == 5
    assert run.facts["left_out"] == {"blank response": 1, "unscored": 1, "not selected": 24, "not replayed": 27 - 5}
    after = InContext.read(tmp_path / "next")
    assert after.scale.digest == before.scale.digest
    assert after.rows_NK.shape == (20, 2)
    assert read_json(tmp_path / "next" / "card.json")["rows"] < 7


def _child(out: str, model: str, dies_at: int) -> None:
    """Train; die in the `dies_at`-th loss (0: live)."""
    torch.set_num_threads(1)
    loss, calls = sft.mean_nll, itertools.count(1)

    def deadly(*args):
        if next(calls) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(*args)

    sft.mean_nll = deadly
    config = Config(selection=Selection(by="direction", nearest=3, layers=2), replay_rows=20)
    settings = sft.Config(lora=Lora(rank=2), fit=replace(FIT, max_steps=12, batch_size=4, checkpoint_every=4))
    with stage(Path(out), "train ric", {}) as run:
        train([bank()], [bank("other", (9, 9, 9, 9, 9, 9))], UNIT, None, model, config, settings, run)
    os._exit(0)


def test_a_killed_run_ends_with_the_same_files(reader, tmp_path):
    run = child_runner(_child, reader)
    assert run(tmp_path / "whole", 0) == 0
    assert run(tmp_path / "killed", 7) == -signal.SIGKILL
    assert run(tmp_path / "killed", 0) == 0
    digests = [read_json(tmp_path / name / "manifest.json")["outputs"] for name in ("whole", "killed")]
    assert {"adapter/adapter_model.safetensors", RECORD, "card.json"} <= digests[0].keys()
    assert digests[0] == digests[1]


# --- the record, and bad input


def test_the_record_comes_back(tmp_path):
    wording = Wording(decimals=2, specials=("</s>", "<|im_end|>"))
    made = InContext(scale=UNIT, names=NAMES, wording=wording, rows_NK=np.array([[0.12345, -1.0], [2.0, 3.0]]))
    made.write(tmp_path)
    found = InContext.read(tmp_path)
    assert (found.scale, found.wording, found.objectives) == (UNIT, wording, NAMES)
    assert found.rows_NK.tolist() == [[0.1234, -1.0], [2.0, 3.0]]
    edited = read_json(tmp_path / RECORD)
    edited["scale"]["sd_K"][1] = 2.0
    (tmp_path / RECORD).write_text(json.dumps(edited))
    with pytest.raises(UserError, match="was changed after it was made"):
        InContext.read(tmp_path)
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(UserError, match="no record of a policy that reads scores"):
        InContext.read(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"has no {RECORD}")):
        InContext.read(tmp_path / "nowhere")


def test_another_scale_is_refused():
    other = replace(UNIT, normaliser=replace(UNIT.normaliser, sd_K=(1.0, 1.5)))
    UNIT.check(replace(UNIT), "here")
    with pytest.raises(UserError, match=r"scale.json has another scale \([0-9a-f]{12}\) than the policy .*x 0 \(sd 1\), y 0 \(sd 1\)"):
        UNIT.check(other, "scale.json")
    with pytest.raises(UserError, match="is of y, x, the policy of x, y, in this order"):
        UNIT.check(replace(UNIT, normaliser=replace(UNIT.normaliser, objectives=("y", "x"))), "scale.json")


def test_scores_of_other_scorers_are_refused():
    run = scored(["a"], [[1, 1]], scorers={"x": "count-a", "y": "other weights"})
    with pytest.raises(UserError, match="in run 'y' was scored by another scorer, or other weights, than the scale is of"):
        scores_of(run, UNIT)
    with pytest.raises(UserError, match="in run 'y' was scored by another"):
        scale_of([scored(["a", "b"], [[1, 1], [2, 2]]), run])
    with pytest.raises(UserError, match="run has no scores for 'z': score it on z"):
        run.reward_of(("z",))
    assert run.reward_of(("y", "x")).tolist() == [[1.0, 1.0]]


def test_the_released_scale_is_of_all_rows():
    found = scale_of([scored(["a", "b"], [[0, 1], [1, 1.24]]), scored(["c"], [[5, 1.2]])])
    assert found.normaliser.mean_K == pytest.approx((2.0, 3.4 / 3))
    assert found.scorers == UNIT.scorers


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"quantile": 1.2}, "got 1.2, 3, 4 and 100"), ({"layers": 0}, "got 0.7, 0, 4 and 100"), ({"by": "luck"}, "not 'luck'")],
)
def test_bad_settings(settings, said, unchecked):
    with pytest.raises(UserError, match=said):
        Selection(**settings)
    with pytest.raises(UserError, match="got 10000 and 0"):
        Config(seen_rows=0)


def test_nothing_left_and_other_numbers(reader, tmp_path):
    with pytest.raises(UserError, match=r"no row of run is left to learn: .*'unscored': 2"):
        learn(tmp_path / "none", reader, [scored(["a", "b"], [[np.nan, 1], [1, np.nan]])])
    before = InContext(scale=UNIT, names=NAMES, wording=Wording(decimals=2), rows_NK=np.zeros((1, 2)))
    with pytest.raises(UserError, match=r"reads x, y with 2 decimals: set ric\.wording and ric\.decimals to that, not named, 1"):
        learn(tmp_path / "other", reader, [bank()], before=before)
    with pytest.raises(UserError, match="not released, 2"):
        learn(tmp_path / "other", reader, [bank()], before=before, config=Config(wording="released", decimals=2))
