"""Bradley-Terry training: the loss by hand, splits that leak nothing, and tiny models trained, saved, killed and read again."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conftest import FOLDER_WORDS, prompt
from equipoise.cli import main
from equipoise.models.lora import Lora
from equipoise.rewards import load_rewards
from equipoise.runs import read_json, stage
from equipoise.training.bradley_terry import Config, length_slope, make_rows, pair_losses, split, train
from equipoise.training.fit import FitConfig
from equipoise.types import Pair, UserError
from training.children import child_runner, dying

WORDS = [word for word in FOLDER_WORDS[3:] if word.isalpha() and word not in ("good", "bad")]
QUICK = FitConfig(learning_rate=0.01, epochs=4, batch_size=8, checkpoint_every=4)
SETTINGS = {"objective": "kind", "max_length": 64, "fit": QUICK}


def pairs_of(count: int, seed: int = 0, objective: str = "kind") -> list[Pair]:
    """Answers of random words, of which the chosen one has a good one in it and the rejected one a bad one."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        body, at = rng.choices(WORDS, k=rng.randint(3, 7)), rng.randint(0, 3)
        chosen, rejected = (" ".join([*body[:at], word, *body[at:]]) for word in ("good", "bad"))
        asked = prompt(f"{objective}-{i // 2:03d}", " ".join(rng.choices(WORDS, k=5)) if i % 2 == 0 else found[-1].prompt.text)
        found.append(Pair(id=f"{objective}-{i:03d}", prompt=asked, chosen=chosen, rejected=rejected, objective=objective))
    return found


def trained(out: Path, model: Path, pairs: list[Pair], **settings) -> dict:
    """The card of a run."""
    config = Config(**SETTINGS | settings)
    with stage(out, "train bradley_terry", {}) as run:
        train(pairs, (), str(model), config, run)
    return read_json(out / "card.json")


# --- the arithmetic


def test_losses_by_hand():
    chosen_B, rejected_B = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    plain = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.e)]
    assert pair_losses(chosen_B, rejected_B).tolist() == pytest.approx(plain)
    ahead = pair_losses(chosen_B, rejected_B, torch.tensor([1.0, 0.0, -1.0])).tolist()
    assert ahead == pytest.approx([math.log(2)] * 3), "margins that take the differences away"
    centred = pair_losses(chosen_B, rejected_B, centre=0.1).tolist()
    assert centred == pytest.approx([plain[0] + 0.1, plain[1], plain[2] + 2.5])


def test_the_loss_sees_only_differences_unless_it_is_centred():
    chosen_B, rejected_B = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pair_losses(chosen_B + 3, rejected_B + 3), pair_losses(chosen_B, rejected_B))
    assert (pair_losses(chosen_B + 9, rejected_B + 9, centre=0.1) > pair_losses(chosen_B, rejected_B, centre=0.1)).all()


def test_the_slope_of_length_by_hand():
    """Three in four times the longer one, by one unit of log words, is preferred: b = log 3."""
    assert length_slope(np.array([1.0, 1.0, 1.0, -1.0])) == pytest.approx(math.log(3), abs=1e-3)


def test_margins_come_from_the_pair_then_from_the_config_and_length_is_taken_off(tiny_tokenizer):
    asked = prompt("p", "a b")
    pairs = [
        Pair(id="0", prompt=asked, chosen="a b c", rejected="a", objective="kind"),
        Pair(id="1", prompt=asked, chosen="a", rejected="b", objective="kind", margin=0.7),
        Pair(id="2", prompt=asked, chosen="a", rejected="b", objective="kind", margin=0.0),
    ]
    rows, cut = make_rows(pairs, tiny_tokenizer, 64, margin=0.2, slope=0.5)
    assert [row.margin for row in rows] == pytest.approx([0.2 - 0.5 * math.log(4 / 2), 0.7, 0.0])
    assert cut == 0
    long = Pair(id="0", prompt=prompt("p", "a " * 30), chosen="b " * 9, rejected="c", objective="kind")
    rows, cut = make_rows([long, pairs[1]], tiny_tokenizer, 32)
    assert cut == 2
    assert [len(side) for side in rows[0].tokens] == [32, 32]


# --- what is held out


def test_held_out_prompts_are_nowhere_in_training():
    pairs = pairs_of(100)
    leak = Pair(id="x", prompt=pairs[0].prompt, chosen="yes", rejected="no", objective="kind")
    extra = [*pairs_of(20, seed=9, objective="more"), *(p for p in pairs)]
    train_pairs, test_pairs = split(pairs, extra, Config(objective="kind"))
    texts = [{p.prompt.text for p in part} for part in (train_pairs, test_pairs)]
    assert not texts[0] & texts[1]
    assert {p.id for p in train_pairs} | {p.id for p in test_pairs} >= {p.id for p in pairs}
    assert len([p for p in train_pairs if p.objective == "more"]) == 20
    assert len(test_pairs) == 20
    kept, _ = split(pairs, [leak], Config(objective="kind"))
    assert (leak in kept) == (pairs[0].prompt.text not in texts[1])


def test_validation_leaves_the_test_prompts_out_of_everything():
    pairs = pairs_of(100)
    _, test_pairs = split(pairs, (), Config(objective="kind"))
    train_pairs, validation_pairs = split(pairs, pairs, Config(objective="kind", held_out="validation"))
    ids = [{p.id for p in part} for part in (train_pairs, validation_pairs, test_pairs)]
    assert len(ids[0]) + len(ids[1]) + len(ids[2]) == 100
    assert len(ids[0] | ids[1] | ids[2]) == 100
    assert len(validation_pairs) == 16


def test_the_split_is_the_linear_heads(tmp_path):
    """The same pairs are held out by both, so that their accuracies can be compared pair by pair."""
    from equipoise.rewards.features import SurfaceFeatures
    from equipoise.training import reward_head

    pairs = pairs_of(80)
    config = reward_head.Config(objective="kind", features="surface", folds=3)
    pairs[0] = Pair(id=pairs[0].id, prompt=pairs[0].prompt, chosen="one more word than it", rejected="one", objective="kind")
    with stage(tmp_path, "train reward_head", {}) as run:
        reward_head.train(pairs, SurfaceFeatures(), config, run)
    _, test_pairs = split(pairs, (), Config(objective="kind"))
    assert sorted(read_json(tmp_path / "held_out.json")) == sorted(p.id for p in test_pairs)


# --- trained models


def test_training_finds_the_word_and_the_folder_says_the_same_as_the_card(tiny_folder, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pairs = pairs_of(80)
    card = trained(tmp_path / "run", tiny_folder, pairs, start="random", lora=Lora(rank=4, dropout=0.0))
    history = read_json(tmp_path / "run" / "history.json")
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=0.35)
    assert np.mean([entry["loss"] for entry in history[-5:]]) < 0.15
    assert card["test_accuracy"] > 0.9
    assert card["train_pairs"] + card["test_pairs"] == 80
    margins = read_json(tmp_path / "run" / "held_out.json")
    assert len(margins) == card["test_pairs"]
    assert np.mean([m > 0 for m in margins.values()]) == pytest.approx(card["test_accuracy"])

    # what any user of transformers would do
    folder = tmp_path / "run" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "kind"}
    by_id = {p.id: p for p in pairs}
    for name in list(margins)[:6]:
        scores = []
        for response in (by_id[name].chosen, by_id[name].rejected):
            turns = [*by_id[name].prompt.messages, {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            with torch.inference_mode():
                scores.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0].item())
        assert scores[0] - scores[1] == pytest.approx(margins[name], abs=1e-4)
    (reward,) = load_rewards([f"kind=reward_model:{folder}"], None)
    assert np.diff(reward([pairs[0].prompt] * 2, ["it is bad", "it is good"])) > 0
    assert f"{card['test_accuracy']:.3f}" in (folder / "README.md").read_text()


def test_the_linear_start_is_the_exact_solution_on_the_states(tiny_folder, tmp_path):
    """A learning rate of nothing leaves the start; its margins are those of an own solution of the same problem."""
    from transformers import AutoModel

    from equipoise.models.chat import conversation_ids
    from equipoise.models.scalar_heads import load_scalar

    pairs = pairs_of(80)
    fit = FitConfig(learning_rate=1e-12, max_steps=1, checkpoint_every=0)
    card = trained(tmp_path / "run", tiny_folder, pairs, lora=Lora(rank=2), fit=fit, start_l2=0.3)
    assert card["linear"]["test_accuracy"] > 0.6
    _, tokenizer = load_scalar(str(tiny_folder))
    backbone = AutoModel.from_pretrained(tiny_folder).eval()

    def state(pair: Pair, text: str) -> np.ndarray:
        ids, _ = conversation_ids(tokenizer, pair.prompt, text)
        with torch.inference_mode():
            return backbone(torch.tensor([ids])).last_hidden_state[0, -1].double().numpy()

    train_pairs, test_pairs = split(pairs, (), Config(objective="kind"))
    chosen, rejected = (np.stack([state(p, getattr(p, side)) for p in train_pairs]) for side in ("chosen", "rejected"))
    w = load_file(tmp_path / "run" / "start.safetensors")
    scale = np.concatenate([chosen, rejected]).std(axis=0)
    x, found = (chosen - rejected) / scale, w["weight"] * scale
    slope = (-x / (1 + np.exp(x @ found))[:, None]).mean(axis=0) + 0.3 * found
    np.testing.assert_allclose(slope, 0, atol=2e-5)  # the gradient of mean log(1 + exp(-x w)) + l2 / 2 |w|^2
    expected = [(state(p, p.chosen) - state(p, p.rejected)) @ w["weight"] for p in test_pairs]
    margins = read_json(tmp_path / "run" / "held_out.json")
    np.testing.assert_allclose([margins[p.id] for p in test_pairs], expected, rtol=1e-3, atol=1e-4)


def test_full_training_in_bfloat16(tiny_folder, tmp_path):
    fit = FitConfig(learning_rate=0.003, epochs=3, batch_tokens=160, precision="bfloat16", checkpoint_every=0)
    card = trained(tmp_path, tiny_folder, pairs_of(60), start="random", layers=1, lora=Lora(rank=0), fit=fit)
    assert card["test_accuracy"] > 0.8
    saved = read_json(tmp_path / "model" / "config.json")
    assert (saved["num_hidden_layers"], saved["dtype"]) == (1, "float32")


def test_an_encoder_is_trained_too_and_centring_draws_its_mean_to_zero(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    from conftest import build_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 1}
    sizes |= {"initializer_range": 0.3, "hidden_dropout_prob": 0.0}  # pooled states that differ, and stay so
    model = BertForSequenceClassification(BertConfig(vocab_size=len(FOLDER_WORDS), **sizes))
    torch.nn.init.constant_(model.classifier.bias, 1.0)  # which no difference of rewards sees
    model.save_pretrained(tmp_path / "bert")
    build_tokenizer(FOLDER_WORDS).save_pretrained(tmp_path / "bert")
    fit, pairs = FitConfig(learning_rate=0.02, epochs=6, batch_size=8, checkpoint_every=0), pairs_of(80)
    cards = [
        trained(tmp_path / str(centre), tmp_path / "bert", pairs, start="random", lora=Lora(rank=4, dropout=0.0), centre=centre, fit=fit)
        for centre in (0.0, 0.3)
    ]
    assert min(card["test_accuracy"] for card in cards) > 0.8
    assert abs(cards[0]["reward_mean"]) > 0.6
    assert abs(cards[1]["reward_mean"]) < 0.3
    started = trained(tmp_path / "start", tmp_path / "bert", pairs, fit=FitConfig(learning_rate=1e-12, max_steps=1, checkpoint_every=0))
    assert abs(started["reward_mean"]) < 0.5 * started["reward_sd"], "the linear start has mean 0 on its pairs where there is a bias"
    assert "BertForSequenceClassification" in (tmp_path / "0.3" / "model" / "config.json").read_text()


def test_length_control_takes_length_out_of_the_reward(tiny_folder, tmp_path):
    """Of two answers of one repeated word the longer is preferred nine times in ten: all that there is to learn is length."""
    rng = random.Random(0)
    pairs = []
    for i in range(120):
        long, short = " ".join(["day"] * rng.randint(5, 8)), " ".join(["day"] * rng.randint(1, 4))
        chosen, rejected = (short, long) if i % 10 == 0 else (long, short)
        asked = prompt(f"p{i:03d}", rng.choice(WORDS) + " " + rng.choice(WORDS))
        pairs.append(Pair(id=f"{i:03d}", prompt=asked, chosen=chosen, rejected=rejected, objective="kind"))
    fit = FitConfig(learning_rate=0.01, epochs=3, batch_size=8, checkpoint_every=0)
    cards = [
        trained(tmp_path / str(on), tiny_folder, pairs, start="random", length_control=on, lora=Lora(rank=4, dropout=0.0), fit=fit)
        for on in (False, True)
    ]
    assert cards[0]["length_slope"] == 0
    assert cards[1]["length_slope"] > 1
    assert cards[0]["test_accuracy"] > 0.8
    spans = [card["reward_sd"] for card in cards]
    assert spans[1] < 0.5 * spans[0], "what length explains is left to length"


def test_a_baseline_is_compared_pair_by_pair(tiny_folder, tmp_path):
    pairs = pairs_of(60)
    weak = trained(tmp_path / "weak", tiny_folder, pairs, start="random", fit=FitConfig(learning_rate=1e-12, max_steps=1))
    config = Config(**SETTINGS, lora=Lora(rank=4, dropout=0.0))
    with stage(tmp_path / "strong", "train bradley_terry", {}) as run:
        train(pairs, (), str(tiny_folder), config, run, tmp_path / "weak")
    card = read_json(tmp_path / "strong" / "card.json")
    assert card["baseline"]["test_accuracy"] == weak["test_accuracy"]
    for name in ("baseline", "linear"):
        assert card[name]["difference"] == pytest.approx(card["test_accuracy"] - card[name]["test_accuracy"])
    (tmp_path / "weak" / "held_out.json").write_text(json.dumps({"other": 1.0}))
    with pytest.raises(UserError, match="weak was held out on other pairs"), stage(tmp_path / "third", "train bradley_terry", {}) as run:
        train(pairs, (), str(tiny_folder), config, run, tmp_path / "weak")


def test_the_command_line(tiny_folder, tmp_path, capsys):
    rows = [{"prompt": p.prompt.text, "chosen": p.chosen, "rejected": p.rejected} for p in pairs_of(40)]
    for name, some in (("pairs", rows[:30]), ("more", rows[30:] + rows[:30])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    words = f"train bradley_terry --out {tmp_path / 'run'} --model {tiny_folder} --pairs [preference:{tmp_path / 'pairs.jsonl'}]".split()
    words += [f"--extra=[preference:{tmp_path / 'more.jsonl'}]", "--reward.objective", "kind", "--reward.lora.rank", "2"]
    assert main([*words, "--reward.fit.max_steps", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "run" / "model")
    assert "kind: held-out accuracy" in printed.err
    card = read_json(tmp_path / "run" / "card.json")
    assert card["test_pairs"] == 6
    assert card["train_pairs"] == 2 * 24 + 10, "the held-out six are left out of the extra pairs too"
    assert len(read_json(tmp_path / "run" / "history.json")) == 2
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    assert main([*words, "--reward.fit.max_steps", "2"]) == 0
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    assert main([*words, "--reward.fit.max_steps", "3"]) == 2
    assert "holds a run with another config.reward.fit.max_steps (2, now 3)" in capsys.readouterr().err


# --- killed runs and bad input


def _child(out: str, model: str, dies_at: int) -> None:
    """Train; die in the `dies_at`-th loss (0: live)."""
    from equipoise.training import bradley_terry

    torch.set_num_threads(1)
    bradley_terry.pair_losses = dying(bradley_terry.pair_losses, dies_at)
    trained(Path(out), Path(model), pairs_of(40), lora=Lora(rank=2, dropout=0.2))
    os._exit(0)


def test_a_killed_run_ends_with_the_same_files(tiny_folder, tmp_path):
    run = child_runner(_child, tiny_folder)
    assert run(tmp_path / "whole", 0) == 0
    assert run(tmp_path / "killed", 7) == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()) == ["checkpoint-4"]
    assert run(tmp_path / "killed", 6) == -signal.SIGKILL
    assert run(tmp_path / "killed", 0) == 0
    digests = [read_json(tmp_path / name / "manifest.json")["outputs"] for name in ("whole", "killed")]
    assert "model/model.safetensors" in digests[0]
    assert digests[0] == digests[1]
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_too_few_pairs(tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"1 pairs are too few to hold 0\.2 of their prompts out"):
        trained(tmp_path, tiny_folder, pairs_of(1))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"test_share": 0.0}, "test_share"),
        ({"max_length": 3}, "max_length must be at least 16"),
        ({"layers": -1}, "layers"),
        ({"centre": -0.1}, "centre"),
        ({"start_l2": 0.0}, "start_l2"),
    ],
)
def test_settings_are_checked(bad, says):
    with pytest.raises(UserError, match=says):
        Config(objective="x", **bad)
