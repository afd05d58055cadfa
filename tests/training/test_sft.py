"""Supervised fine-tuning: which tokens are learnt, the loss against transformers' own, formats, files, killed runs, bad input."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import FOLDER_WORDS, SPECIAL, TINY_WORDS, build_llama, build_tokenizer, prompt
from equipoise.cli import main
from equipoise.data.demonstrations import Demonstration, from_pairs, load_demonstrations
from equipoise.models.chat import conversation_turns, prompt_ids, response_ids, summary_template
from equipoise.models.completions import Completions
from equipoise.models.loading import load_model
from equipoise.models.lora import Lora
from equipoise.rollouts import read_rollouts
from equipoise.runs import read_json, stage
from equipoise.training import sft
from equipoise.training.fit import FitConfig, fit
from equipoise.training.held_out import held_out_perplexity
from equipoise.training.policy import load_start
from equipoise.training.sft import Config, Row, collate, make_loss, mean_nll, rows_of, train
from equipoise.types import Message, Pair, Prompt, UserError
from training.children import child_runner, dying

KEEPS = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}{{ ' </s> ' if m['role'] == 'assistant' else ' . ' }}{% endfor %}"
    "{{ 'assistant :' if add_generation_prompt else '' }}"
)
FORGETS = KEEPS.replace("m['content'] }}", "(m['content'] if loop.last or m['role'] == 'user' else 'no') }}")
"""Writes only the last answer, as templates that drop earlier thoughts do."""


def said(*turns: str) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=turn) for role, turn in zip(itertools.cycle(("user", "assistant")), turns, strict=False))


def example(*turns: str, id: str = "e") -> Demonstration:
    return Demonstration(id=id, prompt=Prompt(id=f"p-{id}", messages=said(*turns[:-1])), response=turns[-1])


@pytest.fixture
def words():
    made = build_tokenizer((*SPECIAL, "user", "assistant", ":", ".", "no", "a", "b", "c", "d", "e", "f"))
    made.chat_template = KEEPS
    return made


def texts(tokenizer, rows: list[Row]) -> list[tuple[str, str]]:
    """(all tokens, the learnt ones) of each row."""
    found = []
    for row in rows:
        (answer,) = row.completions.responses
        assert len(row.learnt) == len(answer)
        kept = [token for token, learnt in zip(answer, row.learnt, strict=True) if learnt]
        found.append((tokenizer.decode([*row.completions.prompt, *answer]), tokenizer.decode(kept)))
    return found


# --- which tokens are learnt

TALK = ("a", "b c", "d", "e f e")
WHOLE = "user : a . assistant : b c </s> user : d . assistant : e f e </s>"


def test_the_last_turn_or_every_one(words):
    assert texts(words, rows_of(words, example(*TALK), 64)) == [(WHOLE, "e f e </s>")]
    assert texts(words, rows_of(words, example(*TALK), 64, "every")) == [(WHOLE, "b c </s> e f e </s>")]
    alone = example("a", "b c")
    assert rows_of(words, alone, 64, "every") == rows_of(words, alone, 64)


def test_a_turn_that_the_whole_conversation_writes_otherwise_is_a_row_of_its_own(words):
    words.chat_template = FORGETS
    rows = texts(words, rows_of(words, example(*TALK), 64, "every"))
    assert rows == [
        ("user : a . assistant : b c </s>", "b c </s>"),
        ("user : a . assistant : no </s> user : d . assistant : e f e </s>", "e f e </s>"),
    ]


def test_without_a_template_every_turn_is_learnt_as_it_is_sampled(words):
    """The plain lines end earlier answers with a line break alone, a sampled one with the token that ends a turn."""
    words.chat_template = None
    rows = texts(words, rows_of(words, example(*TALK), 64, "every"))
    assert [learnt for _, learnt in rows] == ["b c </s>", "e f e </s>"]


def test_a_conversation_that_is_too_long_loses_its_beginning_and_still_teaches_every_turn(words):
    rows = rows_of(words, example(*TALK), 13, "every")
    assert texts(words, rows) == [
        ("user : a . assistant : b c </s>", "b c </s>"),
        ("b c </s> user : d . assistant : e f e </s>", "e f e </s>"),
    ]
    assert [row.completions.cut for row in rows] == [False, True]


def test_an_answer_without_a_question_is_not_learnt(words):
    opened = Prompt(id="p", messages=(Message(role="assistant", content="b"), *said("a")))
    rows = rows_of(words, Demonstration(id="e", prompt=opened, response="c"), 64, "every")
    assert texts(words, rows) == [("assistant : b </s> user : a . assistant : c </s>", "c </s>")]


# --- the loss


def test_the_loss_by_hand():
    """Three tokens of -log p = 1, 2, 3 and padding, in two rows: 6 / (2 * 1.5)."""
    assert mean_nll(torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), 1.5).item() == pytest.approx(2.0)


ROWS = [
    Row(Completions((3, 4, 5), ((6, 2, 4, 4, 2),)), (True, True, False, True, True)),
    Row(Completions((5,), ((3, 3, 2),)), (True,) * 3),
    Row(Completions((6, 6, 3, 4), ((4, 2),)), (True,) * 2),
    Row(Completions((4, 7), ((5, 5, 5, 3, 3, 2),)), (False, False, True, True, True, True)),
]
TOKENS = sum(sum(row.learnt) for row in ROWS) / len(ROWS)


def trained_copy():
    return build_llama(len(TINY_WORDS), layers=2, max_position=64, seed=4).requires_grad_(True)


def gradient_norm(model) -> float:
    return math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))


def test_the_loss_is_transformers_own_over_the_learnt_tokens():
    """One batch of all rows: the mean over tokens that `labels` with -100 gives, padded on the other side."""
    model, width = trained_copy(), max(len(r.completions.prompt) + len(r.learnt) for r in ROWS)
    ids, labels, mask = (torch.full((len(ROWS), width), fill) for fill in (0, -100, 0))
    for at, row in enumerate(ROWS):
        tokens = torch.tensor([*row.completions.prompt, *row.completions.responses[0]])
        ids[at, -len(tokens) :], mask[at, -len(tokens) :] = tokens, 1
        known = torch.tensor([*[False] * len(row.completions.prompt), *row.learnt])
        labels[at, -len(tokens) :] = torch.where(known, tokens, -100)
    theirs = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), labels=labels).loss
    theirs.backward()
    norm = gradient_norm(model)
    model.zero_grad()
    ours = make_loss(TOKENS)(model, collate(ROWS))
    ours.loss.backward()
    assert ours.loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ours.logged["tokens"].item() == pytest.approx(TOKENS)
    assert gradient_norm(model) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(("size", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_accumulated_batches_have_the_gradient_of_one(tmp_path, size, accumulate):
    """Rows of 2 to 4 learnt tokens, whatever shares their batch: a mean over each batch's own tokens would not pass."""
    model = trained_copy()
    make_loss(TOKENS)(model, collate(ROWS)).loss.backward()
    config = FitConfig(learning_rate=1e-6, batch_size=size, accumulate=accumulate, max_steps=1, clip=1e9, checkpoint_every=0, warmup=0)
    found = fit(trained_copy(), ROWS, collate, make_loss(TOKENS), config, tmp_path).history[0]
    assert found["grad_norm"] == pytest.approx(gradient_norm(model), rel=1e-4)
    assert found["loss"] == pytest.approx(make_loss(TOKENS)(model, collate(ROWS)).loss.item(), rel=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(len(ROWS))), st.integers(1, len(ROWS)))
def test_a_rows_loss_depends_on_no_other_row(order, count):
    model = _SHARED
    part = [ROWS[i] for i in order[:count]]
    with torch.no_grad():
        together = make_loss(1.0)(model, collate(part)).loss.item() * count
        alone = sum(make_loss(1.0)(model, collate([row])).loss.item() for row in part)
    assert together == pytest.approx(alone, rel=1e-4)


_SHARED = build_llama(len(TINY_WORDS), layers=2, max_position=64, seed=4)


def test_the_optimum_is_the_share_of_each_answer(tmp_path):
    """After one prompt a in three of four rows and b c in one, after the other always d: the model's probabilities become these."""
    answers = [((3, 5), (4, 2)), ((3, 5), (4, 2)), ((3, 5), (4, 2)), ((3, 5), (5, 6, 2)), ((7,), (6, 2))]
    rows = [Row(Completions(x, (y,)), (True,) * len(y)) for x, y in answers]
    config = FitConfig(learning_rate=0.01, max_steps=150, batch_size=5, checkpoint_every=0)
    model = fit(trained_copy(), rows, collate, make_loss(2.2), config, tmp_path).model.eval()
    probability = {}
    for x, y in set(answers):
        with torch.no_grad():
            probability[x, y] = math.exp(-make_loss(1.0)(model, collate([Row(Completions(x, (y,)), (True,) * len(y))])).loss.item())
    assert probability[(3, 5), (4, 2)] == pytest.approx(0.75, abs=0.02)
    assert probability[(3, 5), (5, 6, 2)] == pytest.approx(0.25, abs=0.02)
    assert probability[(7,), (6, 2)] > 0.98


def test_perplexity_by_hand():
    """Two prompts of 3 and 1 nats per token: exp((6 + 4) / 6); drawn again they give e^3, e^1 or this."""
    found = held_out_perplexity(np.array([2.0, 4.0, 4.0]), np.array([1, 1, 4]), np.array(["p", "p", "q"]), 0)
    assert found["perplexity"] == pytest.approx(math.exp(10 / 6))
    assert found["interval"] == pytest.approx([math.e, math.exp(3)])


# --- formats and files


def test_the_summary_template_is_the_papers():
    tokenizer = build_tokenizer((*SPECIAL, "post", "one"))
    tokenizer.chat_template = summary_template(tokenizer)
    asked = Prompt(id="p", messages=said("my cat\nsat  on\n\nme"))
    text = tokenizer.apply_chat_template(list(asked.messages), tokenize=False, add_generation_prompt=True)
    assert text == "### Instruction: Generate a one-sentence summary of this post. ### Input: my cat sat  on  me ### Response: "
    context, answer, _ = conversation_turns(tokenizer, asked, "one")
    assert (context, answer) == (prompt_ids(tokenizer, asked), response_ids(tokenizer, "one")), "scoring reads what sampling shows"
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert "<s>" not in summary_template(tokenizer)
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.chat_template = summary_template(tokenizer)
    assert prompt_ids(tokenizer, asked)[0] == tokenizer.bos_token_id


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns(tmp_path):
    talk = [dict(m) for m in said(*TALK)]
    rows = [
        {"prompt": "a", "completion": " b "},
        {"prompt": talk[:3], "completion": [talk[3]]},
        {"messages": talk},
        {"prompt": "a", "completion": "  "},
        {"prompt": "a", "completion": "c"},
    ]
    dropped = Counter[str]()
    found = load_demonstrations([str(write(tmp_path / "rows.jsonl", rows))], dropped)
    assert [(e.id, e.prompt.id, e.response) for e in found] == [
        ("00000", "00000", "b"),
        ("00001", "00001", "e f e"),
        ("00002", "00001", "e f e"),
        ("00004", "00000", "c"),
    ]
    assert found[1].prompt.messages == said(*TALK[:3])
    assert dropped == {"blank response": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"prompt": "a"},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]},
        {"prompt": "a", "completion": 3},
    ],
)
def test_rows_that_are_no_demonstrations_are_named(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(UserError, match=r"rows.jsonl: row 2 is no demonstration .*: it needs a prompt and a completion, or messages"):
        load_demonstrations([str(path)], Counter())


def test_pairs_give_their_chosen_or_both_responses():
    pair = Pair(id="0", prompt=prompt("p", "a"), chosen="good", rejected="bad", objective="o")
    assert [(e.id, e.response) for e in from_pairs([pair], both=False)] == [("0-chosen", "good")]
    assert [(e.id, e.response) for e in from_pairs([pair], both=True)] == [("0-chosen", "good"), ("0-rejected", "bad")]


WORDS = [word for word in FOLDER_WORDS[3:] if word.isalpha()]


def talks(count: int) -> list[dict]:
    """Answers that say their question's first word twice."""
    rng = random.Random(1)
    asked = [rng.choices(WORDS[:8], k=2) for _ in range(count)]
    return [{"prompt": f"{a} {b} {WORDS[i]}", "completion": f"{a} {a}"} for i, (a, b) in enumerate(asked)]


@pytest.mark.parametrize("rank", [4, 0])
def test_from_a_file_to_a_model_that_answers(tiny_folder, tmp_path, capsys, rank):
    path = write(tmp_path / "rows.jsonl", talks(40))
    command = ["train", "sft", "--out", f"{tmp_path}/run", "--model", str(tiny_folder), "--data", f"[{path}]", "--sft.lora.rank", str(rank)]
    command += ["--sft.fit.learning_rate", "0.01", "--sft.fit.epochs", "6", "--sft.fit.batch_size", "8", "--sft.test_share", "0.2"]
    assert main(command) == 0
    printed = capsys.readouterr()
    folder = printed.out.strip()
    assert folder == f"{tmp_path}/run/{'adapter' if rank else 'model'}"
    card, held = read_json(tmp_path / "run" / "card.json"), read_json(tmp_path / "run" / "held_out.json")
    assert (card["rows"], card["test_responses"], card["learnt_tokens"], card["test_tokens"]) == (32, 8, 96, 24)
    figures = card["held_out"]
    assert figures["trained"]["interval"][1] < figures["untrained"]["interval"][0]
    assert figures["ratio"]["perplexity"] == pytest.approx(figures["trained"]["perplexity"] / figures["untrained"]["perplexity"], rel=1e-4)
    assert figures["ratio"]["interval"][1] < 0.3
    assert f"trained: held-out perplexity {figures['trained']['perplexity']:.3g}" in printed.err
    lm = load_model(folder)
    for id, nats in held.items():
        row = talks(40)[int(id)]
        ids = prompt_ids(lm.tokenizer, prompt("p", row["prompt"])), response_ids(lm.tokenizer, row["completion"])
        with torch.no_grad():
            logprob_TV = lm.model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
        at = range(len(ids[0]) - 1, len(ids[0]) + len(ids[1]) - 1)
        assert nats["trained"] == pytest.approx(-sum(float(logprob_TV[t, ids[1][t - len(ids[0]) + 1]]) for t in at), abs=1e-3)
    assert read_json(tmp_path / "run" / "manifest.json")["facts"] == {"left_out": {}}


def test_prompts_that_fill_the_context_are_counted_and_said(tiny_folder, tmp_path, capsys):
    rows = [*talks(20), {"prompt": "a " * 40, "completion": "a b"}, {"prompt": "b " * 18, "completion": "a b c d e f g h"}]
    command = [
        "train",
        "sft",
        "--out",
        f"{tmp_path}/run",
        "--model",
        str(tiny_folder),
        "--data",
        f"[{write(tmp_path / 'rows.jsonl', rows)}]",
    ]
    assert main([*command, "--sft.max_length", "24", "--sft.fit.max_steps", "1"]) == 0
    assert "2 of 22 rows are longer than 24 tokens and are cut (the prompt alone fills them: 1)" in capsys.readouterr().err
    assert read_json(tmp_path / "run" / "card.json")["counts"] == {"cut": 2, "full": 1}


def test_summaries_are_sampled_in_the_format_that_was_trained(tiny_folder, tmp_path, capsys):
    rows = [{"prompt": f"{row['prompt']}\nplease", "completion": "the good\nday"} for row in talks(30)]
    command = [
        "train",
        "sft",
        "--out",
        f"{tmp_path}/run",
        "--model",
        str(tiny_folder),
        "--data",
        f"[{write(tmp_path / 'rows.jsonl', rows)}]",
    ]
    command += ["--sft.format", "summary", "--sft.fit.learning_rate", "0.01", "--sft.fit.epochs", "6", "--sft.fit.batch_size", "8"]
    assert main(command) == 0
    folder = f"{tmp_path}/run/adapter"
    for lm in (load_model(folder), load_start(folder).lm):  # as a policy, and as what further training starts from
        text = lm.tokenizer.apply_chat_template([dict(m) for m in said("my cat\nsat")], tokenize=False, add_generation_prompt=True)
        assert text.endswith("summary of this post. ### Input: my cat sat ### Response: ")
    asked = [
        "sample",
        "--out",
        f"{tmp_path}/drawn",
        "--model",
        folder,
        "--prompts",
        f"{tmp_path}/rows.jsonl",
        "--split",
        "",
        "--limit",
        "6",
    ]
    assert main([*asked, "--sampling.max_new_tokens", "5", "--sampling.temperature", "0.2", "--samples", "1"]) == 0
    drawn = [rollout.text for rollout in read_rollouts(tmp_path / "drawn" / "rollouts")]
    assert drawn == ["the good day"] * 6
    capsys.readouterr()
    talk = write(tmp_path / "talk.jsonl", [{"messages": [dict(m) for m in said(*TALK)]}] * 4)
    assert (
        main(["train", "sft", "--out", f"{tmp_path}/x", "--model", str(tiny_folder), "--data", f"[{talk}]", "--sft.format", "summary"]) == 2
    )
    assert "example '00000' has 3 turns before its answer; a post to sum up is one user turn" in capsys.readouterr().err


def test_pairs_through_the_command_line(tiny_folder, tmp_path, capsys):
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no no no"} for row in talks(20)]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    command = ["train", "sft", "--model", str(tiny_folder), "--pairs", f"[preference:{pairs}]", "--sft.fit.max_steps", "1"]
    assert main([*command, "--out", f"{tmp_path}/chosen"]) == 0
    assert main([*command, "--out", f"{tmp_path}/both", "--both"]) == 0
    assert [read_json(tmp_path / name / "card.json")["rows"] for name in ("chosen", "both")] == [18, 36]


# --- killed runs and bad input


def _child(out: str, model: str, dies_at: int) -> None:
    """Train; die in the `dies_at`-th loss (0: live)."""
    torch.set_num_threads(1)
    sft.mean_nll = dying(sft.mean_nll, dies_at)
    examples = [example(row["prompt"], row["completion"], id=str(i)) for i, row in enumerate(talks(24))]
    config = Config(lora=Lora(rank=2, dropout=0.2), fit=FitConfig(learning_rate=0.01, epochs=3, batch_size=4, checkpoint_every=4))
    with stage(Path(out), "train sft", {}) as run:
        train(examples, model, config, run)
    os._exit(0)


def test_a_killed_run_ends_with_the_same_files(tiny_folder, tmp_path):
    run = child_runner(_child, tiny_folder)
    assert run(tmp_path / "whole", 0) == 0
    assert run(tmp_path / "killed", 8) == -signal.SIGKILL
    assert run(tmp_path / "killed", 0) == 0
    digests = [read_json(tmp_path / name / "manifest.json")["outputs"] for name in ("whole", "killed")]
    assert {"adapter/adapter_model.safetensors", "history.json", "card.json"} <= digests[0].keys()
    assert digests[0] == digests[1]


def test_eight_bits_are_refused_where_they_are_not_to_be_had(tiny_folder, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "rows.jsonl", talks(20))
    command = ["train", "sft", "--out", f"{tmp_path}/run", "--model", str(tiny_folder), "--data", f"[{path}]", "--sft.eight_bit", "true"]
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest))
    assert main(command) == 2
    assert "weights in 8 bits need bitsandbytes: pip install 'equipoise[int8]'" in capsys.readouterr().err
    assert main([*command, "--sft.lora.rank", "0"]) == 2
    assert "weights in 8 bits can't be trained themselves" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'equipoise[int8]'")
def test_an_adapter_is_trained_on_weights_in_8_bits(tiny_folder, tmp_path):
    """It learns, and its folder is an adapter on the plain model."""
    path = write(tmp_path / "rows.jsonl", talks(40))
    command = ["train", "sft", "--out", f"{tmp_path}/run", "--model", str(tiny_folder), "--data", f"[{path}]", "--sft.eight_bit", "true"]
    assert main([*command, "--sft.fit.learning_rate", "0.01", "--sft.fit.epochs", "6", "--sft.fit.batch_size", "8"]) == 0
    assert read_json(tmp_path / "run" / "card.json")["held_out"]["ratio"]["interval"][1] < 0.3
    assert load_model(f"{tmp_path}/run/adapter").model.dtype == torch.float32


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"format": "summary", "turns": "every"}, "a summary has one turn"),
        ({"max_length": 4}, "max_length must be at least 16 tokens, got 4"),
        ({"test_share": 0.0}, "test_share must be positive"),
    ],
)
def test_settings_are_checked(bad, says):
    with pytest.raises(UserError, match=says):
        Config(**bad)


def test_too_little_to_learn_from(tiny_folder, tmp_path, capsys):
    assert main(["train", "sft", "--out", f"{tmp_path}/run"]) == 2
    assert "there is nothing to learn: give data=[FILE]" in capsys.readouterr().err
    path = write(tmp_path / "rows.jsonl", talks(1))
    assert main(["train", "sft", "--out", f"{tmp_path}/run", "--model", str(tiny_folder), "--data", f"[{path}]"]) == 2
    assert "1 examples are too few to hold 0.1 of their prompts out" in capsys.readouterr().err
