"""DPO: the losses by hand, the optimum on all pairs of a tiny model, TRL's own values, and policies trained, saved, killed and read."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from conftest import FOLDER_WORDS, build_llama, build_tokenizer, prompt
from decoding.rows import plain_forward
from equipoise.cli import main
from equipoise.data.labelled import write_labelled
from equipoise.models.completions import Completions
from equipoise.models.loading import load_model
from equipoise.models.lora import Lora
from equipoise.models.weighted_lora import route_adapters
from equipoise.rewards import load_rewards
from equipoise.runs import read_json, stage
from equipoise.training.completion_rows import Row, collator
from equipoise.training.dpo import Config, chosen_nll, label_weights, labelled, labelled_losses, make_loss, preference_losses, train
from equipoise.training.fit import FitConfig
from equipoise.types import LabelledPair, Pair, UserError
from training.children import child_runner, dying
from training.every_sequence import RESPONSES, far, optimum, train_on_all_pairs
from training.test_bradley_terry import pairs_of

QUICK = FitConfig(learning_rate=0.01, epochs=3, batch_size=8, checkpoint_every=4)
SETTINGS = {"objectives": ("kind",), "max_length": 64, "fit": QUICK, "lora": Lora(rank=4, dropout=0.0)}
LOG2 = math.log(2)


def trained(out: Path, model: Path | str, pairs: list[Pair], **settings) -> dict:
    """The card of a run."""
    found, margin_N = labelled(pairs)
    with stage(out, "train dpo", {}) as run:
        train(found, str(model), Config(**SETTINGS | settings), run, margin_N=margin_N)
    return read_json(out / "card.json")


# --- the arithmetic


def test_losses_by_hand():
    s_B = torch.tensor([0.0, 2.0, -1.0])
    assert preference_losses(s_B, "sigmoid", 0.1).tolist() == pytest.approx([LOG2, math.log(1 + math.exp(-2)), math.log(1 + math.e)])
    assert preference_losses(s_B, "hinge", 0.1).tolist() == pytest.approx([1.0, 0.0, 2.0])
    # z = s / beta against 1 / (2 beta): (0 - 5)^2, (20 - 5)^2, (-10 - 5)^2 at beta 0.1
    assert preference_losses(s_B, "ipo", 0.1).tolist() == pytest.approx([25.0, 225.0, 225.0])
    with pytest.raises(UserError, match="unknown loss 'kto'; known: sigmoid, hinge, ipo"):
        preference_losses(s_B, "kto", 0.1)


def test_both_sides_of_a_label_by_hand():
    s_B, label_B2 = torch.tensor([1.0, 1.0]), torch.tensor([[0.75, 0.25], [0.0, 2.0]])
    first, second = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert labelled_losses(s_B, label_B2, "sigmoid", 0.1).tolist() == pytest.approx([0.75 * first + 0.25 * second, 2 * second])
    assert labelled_losses(s_B, label_B2, "hinge", 0.1).tolist() == pytest.approx([0.5, 4.0])


def test_labels_of_three_objectives_by_hand():
    """Who agrees adds up, who disagrees stands on the other side, and a tie or no label leaves only the others' weights."""
    nan = math.nan
    label_NK = np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [0.0, -1.0, nan], [nan, nan, 1.0], [0.0, 0.0, 0.0]])
    found = label_weights(label_NK, (0.5, 0.3, 0.2))
    np.testing.assert_allclose(found, [[1, 0], [0.7, 0.3], [0, 0.3], [0.2, 0], [0, 0]])
    np.testing.assert_allclose(label_weights(label_NK, (0.5, 0.3, 0.2), 0.1)[1:3], [[0.66, 0.34], [0.03, 0.27]])


@settings(deadline=None, max_examples=20)
@given(w=st.floats(0.05, 0.95))
def test_a_conflict_pair_rests_where_the_weights_say(w):
    """On a pair in conflict w l(s) + (1 - w) l(-s) has its minimum at s = log(w / (1 - w))."""
    label_12 = torch.from_numpy(label_weights(np.array([[1.0, -1.0]]), (w, 1 - w))).float()
    slopes = []
    for off in (0.0, 0.5, -0.5):
        s_B = torch.tensor([math.log(w / (1 - w)) + off], requires_grad=True)
        labelled_losses(s_B, label_12, "sigmoid", 0.1).sum().backward()
        slopes.append(float(s_B.grad))
    assert abs(slopes[0]) < 1e-6
    assert slopes[1] > 0 > slopes[2]


@settings(deadline=None, max_examples=20)
@given(w=st.floats(0, 1), s=st.floats(-5, 5))
def test_where_label_sets_agree_or_one_has_all_weight_it_is_dpo(w, s):
    s_B = torch.tensor([s])
    dpo = labelled_losses(s_B, torch.tensor([[1.0, 0.0]]), "sigmoid", 0.1)
    agreed = torch.from_numpy(label_weights(np.array([[1.0, 1.0]]), (w, 1 - w))).float()
    only = torch.from_numpy(label_weights(np.array([[1.0, -1.0]]), (1.0, 0.0))).float()
    for label_12 in (agreed, only):
        torch.testing.assert_close(labelled_losses(s_B, label_12, "sigmoid", 0.1), dpo, atol=1e-5, rtol=1e-5)


def test_the_nll_is_a_mean_over_real_tokens_by_hand():
    logprob_B2T = torch.tensor([[[-1.0, -3.0, 0.0], [-2.0, -2.0, -5.0]]])
    real_B2T = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]])
    assert chosen_nll(logprob_B2T, real_B2T, torch.tensor([[1.0, 0.0]])).tolist() == [2.0]
    assert chosen_nll(logprob_B2T, real_B2T, torch.tensor([[0.25, 0.75]])).tolist() == [0.25 * 2 + 0.75 * 3]
    wider = [torch.nn.functional.pad(x, (0, 4)) for x in (logprob_B2T, real_B2T)]
    assert chosen_nll(*wider, torch.tensor([[1.0, 0.0]])).tolist() == [2.0]


# --- the loss on a model

REALIGNED = [
    Row(Completions((3, 4, 5), ((6, 2), (6, 7, 3, 4, 2))), {"label": (1.0, 0.0), "margin": (0.3,), "reference": (-5.0, -9.0)}),
    Row(Completions((4,), ((5, 5, 2), (2,))), {"label": (0.8, 0.2), "margin": (0.0,), "reference": (-7.0, -2.0)}),
]


def by_hand(lm, row: Row, beta: float, alpha: float) -> float:
    """DPO + alpha NLL of one row, from a plain forward per token."""
    said = []
    for response in row.completions.responses:
        logits = [plain_forward(lm, [[*row.completions.prompt, *response[:t]]])[0][0] for t in range(len(response))]
        said.append([float(at[token] - np.logaddexp.reduce(at)) for at, token in zip(logits, response, strict=True)])
    (first, second), (a, b), (ref_1, ref_2) = said, row.numbers["label"], row.numbers["reference"]
    s = beta * (sum(first) - ref_1 - sum(second) + ref_2) - row.numbers["margin"][0]
    preference = -a * math.log(expit(s)) - b * math.log(expit(-s))
    return preference - alpha * (a * sum(first) / len(first) + b * sum(second) / len(second))


@pytest.mark.parametrize("shared", [False, True])
def test_realignment_on_unequal_lengths_is_the_hand_value_whatever_the_padding(tiny_lm, shared):
    loss, collate = make_loss(0.3, nll=0.7), collator(shared=shared)
    expected = [by_hand(tiny_lm, row, 0.3, 0.7) for row in REALIGNED]
    batch = collate(REALIGNED)
    assert float(loss(tiny_lm.model, batch).loss) == pytest.approx(np.mean(expected), abs=1e-5)
    for row, value in zip(REALIGNED, expected, strict=True):
        assert float(loss(tiny_lm.model, collate([row])).loss) == pytest.approx(value, abs=1e-5), "alone"
    wider = {**batch, **{name: torch.nn.functional.pad(batch[name], (0, 3)) for name in ("predictor", "target", "real")}}
    assert float(loss(tiny_lm.model, wider).loss) == pytest.approx(np.mean(expected), abs=1e-5), "more padding"


def test_the_optimum_on_all_pairs_is_the_tilted_reference(tmp_path):
    """Both labels of every pair, weighed by their probability under r: pi = pi_ref exp(r / beta) / Z (Rafailov et al., eq. 4)."""
    reward_PS = np.random.default_rng(0).normal(0, 0.5, size=(2, len(RESPONSES)))
    model = train_on_all_pairs(reward_PS, 0.5, tmp_path)
    assert far(model, optimum(reward_PS, 0.5)) < 0.02
    assert far(model, optimum(np.zeros_like(reward_PS), 0.5)) > 0.15, "it has left the reference"


def test_losses_are_those_of_trl(tmp_path, monkeypatch):
    """The same tokens and models through TRL's trainer. Its ipo takes means over tokens: z is divided by the length both have."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="pip install 'equipoise[trl]'")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = build_tokenizer(FOLDER_WORDS)
    policy, reference = (build_llama(len(FOLDER_WORDS), layers=2, max_position=64, seed=seed) for seed in (1, 2))
    rows = [("how do you make bread", "good bread", "bad water"), ("why", "yes you can", "no we are"), ("what is time", "money", "day")]
    data = Dataset.from_list([{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in rows])
    quiet = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    args = DPOConfig(output_dir=str(tmp_path), beta=0.1, per_device_train_batch_size=3, max_length=64, **quiet)
    trainer = DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["completion_mask"].bool()
    ids = [row[seen.bool()].tolist() for row, seen in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    prompts = [int(seen.sum() - said.sum()) for seen, said in zip(batch["attention_mask"], mask, strict=True)]
    split = [(tuple(row[:n]), tuple(row[n:])) for row, n in zip(ids, prompts, strict=True)]
    ours = [Completions(split[i][0], (split[i][1], split[i + 3][1])) for i in range(3)]
    assert all(len(set(map(len, row.responses))) == 1 for row in ours)
    plain = [build_llama(len(FOLDER_WORDS), layers=2, max_position=64, seed=seed) for seed in (1, 2)]

    def value(kind: str, alpha: float = 0.0) -> float:
        from equipoise.models.logprobs import completion_sums

        found = []
        for row in ours:
            length = len(row.responses[0]) if kind == "ipo" else 1
            numbers = {"label": (1.0, 0.0), "margin": (0.0,), "reference": completion_sums(plain[1], [row], shared=False)[0]}
            if kind == "ipo":
                z = np.diff(completion_sums(plain[0], [row], shared=False)[0][::-1] - numbers["reference"][::-1]) / length
                found.append(float(preference_losses(torch.tensor(0.1 * z), "ipo", 0.1)))
            else:
                found.append(float(make_loss(0.1, kind, alpha)(plain[0], collator(shared=False)([Row(row, numbers)])).loss))
        return float(np.mean(found))

    for kind in ("sigmoid", "hinge", "ipo"):
        trainer.loss_types, trainer.loss_weights = [kind], [1.0]
        assert value(kind) == pytest.approx(float(trainer.compute_loss(trainer.model, batch)), abs=1e-4), kind
    # TRL's sft is a mean over the batch's tokens, ours one per row: the same on one row
    one = {name: x[[0, 3]] for name, x in batch.items()}
    trainer.loss_types, trainer.loss_weights, ours = ["sigmoid", "sft"], [1.0, 0.5], ours[:1]
    assert value("sigmoid", 0.5) == pytest.approx(float(trainer.compute_loss(trainer.model, one)), abs=1e-4)


# --- trained policies


@pytest.fixture(scope="module")
def first(tiny_folder, tmp_path_factory) -> Path:
    """A run on pairs whose chosen response has a good word and whose rejected one a bad one."""
    out = tmp_path_factory.mktemp("dpo") / "first"
    trained(out, tiny_folder, pairs_of(80))
    return out


def test_training_finds_the_word_and_starts_at_the_reference(first):
    card, history = read_json(first / "card.json"), read_json(first / "history.json")
    assert history[0]["loss"] == pytest.approx(LOG2, abs=1e-5)
    assert np.mean([entry["loss"] for entry in history[-5:]]) < 0.55
    found = card["held_out"]["kind"]
    assert found["test_accuracy"] > 0.8
    assert card["train_pairs"] + found["test_pairs"] == 80
    margins = read_json(first / "held_out.json")
    assert np.mean([m > 0 for m in margins.values()]) == found["test_accuracy"]
    assert np.mean(list(margins.values())) == pytest.approx(found["mean_margin"])
    assert not (first / "checkpoints").exists()


def test_the_adapter_is_read_as_a_reward_and_by_decoding(first, tiny_folder):
    """The reward by name says what the card's margins say, and the adapter routed by row says what peft says."""
    pairs, margins = {p.id: p for p in pairs_of(80)}, read_json(first / "held_out.json")
    (reward,) = load_rewards([f"kind=dpo:{first / 'adapter'}#0.1"], None)
    asked = [pairs[id].prompt for id in margins]
    chosen, rejected = (reward(asked, [getattr(pairs[id], side) for id in margins]) for side in ("chosen", "rejected"))
    np.testing.assert_allclose(chosen - rejected, list(margins.values()), atol=1e-4)
    policy, base = load_model(str(first / "adapter")), load_model(str(tiny_folder))
    routed = route_adapters(base, {"kind": first / "adapter"})
    ids = torch.tensor([[5, 9, 30, 12, 7]])
    with torch.inference_mode():
        expected = policy.model(ids).logits
        routed.model.row_weights.now_RK = torch.tensor([[1.0]])
        torch.testing.assert_close(routed.model(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert (base.model(ids).logits - expected).abs().max() > 0.01


def test_a_second_phase_on_an_adapter_is_one_adapter_that_is_their_stack(first, tiny_folder, tmp_path):
    """peft runs both phases side by side on the base; the saved adapter alone gives the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained(tmp_path, first / "adapter", pairs_of(40, seed=3), lora=Lora(rank=3, dropout=0.0), nll=0.1, beta=0.2)
    assert read_json(tmp_path / "history.json")[0]["margin"] == pytest.approx(0, abs=1e-5), "the reference is the first phase"
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    stack = PeftModel.from_pretrained(base, first / "adapter", adapter_name="one")
    stack.load_adapter(tmp_path / "increment", adapter_name="two")
    stack.base_model.set_adapter(["one", "two"])
    ids = torch.tensor([[5, 9, 30, 12, 7], [3, 3, 8, 40, 2]])
    with torch.inference_mode():
        both = stack.eval()(ids).logits
        stack.base_model.set_adapter(["one"])
        torch.testing.assert_close(load_model(str(tmp_path / "adapter")).model(ids).logits, both, atol=1e-5, rtol=0)
        assert (stack(ids).logits - both).abs().max() > 0.01, "the second phase changes something"
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert (config["r"], config["base_model_name_or_path"]) == (7, str(tiny_folder))


def test_all_weights_and_the_models_own_dropout_is_off(tmp_path):
    folder = tmp_path / "drops"
    build_llama(len(FOLDER_WORDS), layers=2, max_position=256, seed=1, attention_dropout=0.5).save_pretrained(folder)
    build_tokenizer(FOLDER_WORDS).save_pretrained(folder)
    card = trained(tmp_path / "run", folder, pairs_of(40), lora=Lora(rank=0), fit=FitConfig(learning_rate=0.001, max_steps=3))
    assert read_json(tmp_path / "run" / "history.json")[0]["loss"] == pytest.approx(LOG2, abs=1e-5)
    assert card["trained_parameters"] == sum(p.numel() for p in load_model(str(folder)).model.parameters())
    assert load_model(str(tmp_path / "run" / "model")).model.config.attention_dropout == 0.5, "what is saved has it as before"


def test_the_pairs_own_margins_and_smoothed_labels(tiny_folder, tmp_path):
    ahead = [Pair(id=p.id, prompt=p.prompt, chosen=p.chosen, rejected=p.rejected, objective="kind", margin=2.0) for p in pairs_of(40)]
    card = trained(tmp_path, tiny_folder, ahead, fit=FitConfig(learning_rate=0.0001, max_steps=1), label_smoothing=0.25)
    expected = 0.75 * math.log(1 + math.exp(2)) + 0.25 * math.log(1 + math.exp(-2))
    assert read_json(tmp_path / "history.json")[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert card["held_out"]["kind"]["beyond_the_margin"]["test_accuracy"] == 0.0


# --- the stage, killed runs and bad input


def several(path: Path, count: int = 60) -> Path:
    """Pairs labelled on two objectives: all by the good word, and every second by length too, ties among them."""
    labels = itertools.cycle((1.0, -1.0, 0.0, math.nan))
    pairs = [
        LabelledPair(id=p.id, prompt=p.prompt, responses=(p.chosen, p.rejected), objectives=("kind", "long"), label_K=(1.0, next(labels)))
        for p in pairs_of(count)
    ]
    write_labelled(path, pairs)
    return path


QUICKLY = ("--dpo.fit.max_steps", "2", "--dpo.lora.rank", "2", "--dpo.max_length", "64", "--dpo.fit.batch_size", "64")


def test_two_label_sets_from_the_command_line(tiny_folder, tmp_path):
    source = f"labelled:{several(tmp_path / 'pairs.jsonl')}"
    words = ["train", "dpo", "--pairs", f"[{source}]", "--model", str(tiny_folder), "--out", str(tmp_path / "run"), *QUICKLY]
    assert main([*words, "--dpo.objectives", "[kind,long]", "--dpo.weights", "kind=0.75,long=0.25"]) == 0
    card, history = read_json(tmp_path / "run" / "card.json"), read_json(tmp_path / "run" / "history.json")
    assert card["weights"] == [0.75, 0.25]
    assert set(card["held_out"]) == {"kind", "long"}
    assert card["held_out"]["long"]["test_pairs"] < card["held_out"]["kind"]["test_pairs"]
    # in the first step s = 0 and every term of weight w is w log 2: all pairs have 0.75, and half of them 0.25 more
    assert history[0]["loss"] == pytest.approx(LOG2 * 0.875, abs=0.02)
    assert main([*words, "--dpo.objectives", "[kind,long]", "--dpo.weights", "kind=0.75,long=0.25"]) == 0, "a finished run returns"


def _child(out: str, model: str, dies_at: int) -> None:
    """Train; die in the `dies_at`-th loss (0: live)."""
    from equipoise.training import dpo

    torch.set_num_threads(1)
    dpo.labelled_losses = dying(dpo.labelled_losses, dies_at)
    trained(Path(out), model, pairs_of(40), lora=Lora(rank=2, dropout=0.2))
    os._exit(0)


def test_a_killed_run_ends_with_the_same_files(tiny_folder, tmp_path):
    run = child_runner(_child, tiny_folder)
    assert run(tmp_path / "whole", 0) == 0
    assert run(tmp_path / "killed", 6) == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()) == ["checkpoint-4"]
    assert run(tmp_path / "killed", 0) == 0
    digests = [read_json(tmp_path / name / "manifest.json")["outputs"] for name in ("whole", "killed")]
    assert {"adapter/adapter_model.safetensors", "history.json"} <= set(digests[0])
    assert digests[0] == digests[1]


def test_what_is_left_out_or_cut_is_counted_and_said(tiny_folder, tmp_path, capsys):
    plain = pairs_of(40)
    odd = [
        Pair(id="same", prompt=prompt("same", "why"), chosen="good bread", rejected="good  bread", objective="kind"),
        Pair(id="long", prompt=prompt("long", "what is time " * 30), chosen="good", rejected="bad", objective="kind"),
    ]
    found, _ = labelled([*plain, *odd])
    tie = LabelledPair(id="tie", prompt=prompt("tie", "how"), responses=("yes", "no"), objectives=("kind",), label_K=(0.0,))
    config = Config(**SETTINGS | {"fit": FitConfig(max_steps=1)})
    with stage(tmp_path, "train dpo", {}) as run:
        train([*found, tie], str(tiny_folder), config, run)
    assert read_json(tmp_path / "card.json")["counts"] == {"unordered": 1, "equal": 1, "cut": 1, "like_held_out": 0}
    said = capsys.readouterr().err
    for line in ("1 pairs that no objective orders", "1 pairs that have two equal responses", "1 of 41 pairs were longer than 64 tokens"):
        assert line in said


def test_a_prompt_that_begins_as_a_held_out_one_is_not_trained_on(tiny_folder, tmp_path):
    pairs = pairs_of(40)
    held = trained(tmp_path / "one", tiny_folder, pairs, fit=FitConfig(max_steps=1))
    away = next(p for p in pairs if p.id in read_json(tmp_path / "one" / "held_out.json"))
    turns = (*away.prompt.messages, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then"})
    longer = Pair(id="z", prompt=type(away.prompt)(id="z", messages=turns), chosen="good", rejected="bad", objective="kind")
    config = Config(**SETTINGS | {"fit": FitConfig(max_steps=1), "seed": 0})
    with stage(tmp_path / "two", "train dpo", {}) as run:
        train(labelled([*pairs, longer])[0], str(tiny_folder), config, run)
    card = read_json(tmp_path / "two" / "card.json")
    in_test = set(read_json(tmp_path / "two" / "held_out.json"))
    assert held["counts"]["like_held_out"] == 0
    assert card["train_pairs"] + len(in_test) + card["counts"]["like_held_out"] == 41
    assert not {p.prompt.text for p in pairs if p.id in in_test} & {p.prompt.text for p in pairs if p.id not in in_test}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": -1.0}, "beta must be positive"),
        ({"loss": "kto"}, "unknown loss 'kto'; known: sigmoid, hinge, ipo"),
        ({"objectives": ()}, "one or more names"),
        ({"objectives": ("a", "a")}, "one or more names"),
        ({"weights": "kind=0.5"}, "sum to 0.5, not 1"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"nll": -0.1}, "nll"),
        ({"test_share": 0.6}, "test_share"),
        ({"max_length": 3}, "max_length must be at least 16"),
    ],
)
def test_settings_are_checked(bad, says, unchecked):
    with pytest.raises(UserError, match=says):
        Config(**SETTINGS | bad)


def test_pairs_that_leave_nothing_to_train_on(tiny_folder, tmp_path, capsys):
    same = [Pair(id=str(n), prompt=prompt(str(n), "why"), chosen="yes", rejected="yes", objective="kind") for n in range(3)]
    with pytest.raises(UserError, match="none of 3 pairs has two responses that differ"):
        trained(tmp_path / "a", tiny_folder, same)
    with pytest.raises(UserError, match=r"1 pairs are too few to hold 0\.2 of their prompts out"):
        trained(tmp_path / "b", tiny_folder, pairs_of(1))
    with pytest.raises(UserError, match="no pair is ordered by the objective 'safe'; the pairs' objectives: kind"):
        trained(tmp_path / "c", tiny_folder, pairs_of(4), objectives=("safe",))
    path = several(tmp_path / "pairs.jsonl", 8)
    words = ["train", "dpo", "--pairs", f"[labelled:{path}]", "--model", str(tiny_folder), "--out", str(tmp_path / "d"), *QUICKLY]
    assert main([*words, "--dpo.objectives", "[kind]", "--dpo.loss", "kto"]) == 2
    assert "kto" in capsys.readouterr().err
    assert main([*words, "--dpo.objectives", "[kind]", "--dpo.beta", "0"]) == 2
    assert "beta must be positive, got 0" in capsys.readouterr().err


def test_an_adapter_that_is_no_start(first, tiny_folder, tmp_path):
    """Of no base, of a base that has changed, of another model."""
    import shutil

    def changed(name: str, **config) -> Path:
        folder = shutil.copytree(first / "adapter", tmp_path / name)
        text = json.loads((folder / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(text))
        (folder / "base.json").unlink()
        return folder

    with pytest.raises(UserError, match="names no base model"):
        trained(tmp_path / "a", changed("nameless", base_model_name_or_path=None), pairs_of(8))
    other = tmp_path / "other"
    build_llama(len(FOLDER_WORDS), layers=1, max_position=256, seed=4).save_pretrained(other)
    build_tokenizer(FOLDER_WORDS).save_pretrained(other)
    with pytest.raises(UserError, match=r"is for another model: its layer 'model\.layers\.1"):
        trained(tmp_path / "b", changed("shallow", base_model_name_or_path=str(other)), pairs_of(8))
    rebased = changed("rebased", base_model_name_or_path=str(other))
    shutil.copy(first / "adapter" / "base.json", rebased)
    with pytest.raises(UserError, match="was trained on other weights"):
        trained(tmp_path / "c", rebased, pairs_of(8))
