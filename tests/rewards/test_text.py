"""Text rewards against numbers worked by hand, their limits, and the refusal phrases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.rewards import text
from equipoise.types import Message, Prompt, UserError

NAMES = ["positive", "brief", "long", "readable", "diverse", "unrepetitive"]


def prompt(content: str = "How are you?") -> Prompt:
    return Prompt(id="p", messages=(Message(role="user", content=content),))


def score(name: str, *responses: str) -> np.ndarray:
    return text.load(name)([prompt()] * len(responses), responses)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("", 0),
        (" \n ... -- !", 0),
        ("It's 3.14 -- roughly.", 3),
        ("**Well-known** fact\u2014really?", 3),
        ("a\tb\nc", 3),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e", 2),
    ],
)
def test_word_count(sentence, expected):
    assert text.word_count(sentence) == expected


def test_words_lose_case_and_outer_punctuation():
    assert text.words('"Don\'t," she said (twice).') == ["don't", "she", "said", "twice"]


def test_brief_is_minus_log_of_words_plus_one():
    np.testing.assert_allclose(score("brief", "", "one", "one two three"), [0.0, -math.log(2), -math.log(4)])


def test_long_is_the_log_of_words_or_tokens_plus_one(tiny_folder):
    np.testing.assert_allclose(score("long", "", "one", "one two three"), [0.0, math.log(2), math.log(4)])
    # its tokenizer has words and punctuation marks as tokens; special tokens aren't counted
    np.testing.assert_allclose(score(f"long:{tiny_folder}", "", "help me, please!"), [0.0, math.log(6)])
    with pytest.raises(UserError, match="no model folder at /nowhere"):
        text.load("long:/nowhere")


def test_readable_by_hand():
    # 18 letters, 6 words, 2 sentences
    assert score("readable", "The cat sat. The dog ran.")[0] == pytest.approx(5.8)
    # 14 letters and digits in 3 words, one sentence although a point stands within the number
    assert score("readable", "Pi equals 3.14159")[0] == pytest.approx(-2.05)


def test_readable_counts_lines_and_unfinished_sentences():
    listed, spoken = score("readable", "- red apples\n- green pears", "Red apples. Green pears")
    assert listed == spoken == pytest.approx(-(4.71 * 19 / 4 + 0.5 * 2 - 21.43))


def test_readable_prefers_short_words():
    easy, hard = score("readable", "We go to bed now.", "Notwithstanding considerations necessitate adjournment forthwith.")
    assert easy > hard


def test_diverse_by_hand():
    # a b a b a: 2-grams ab ba ab ba -> 2/4, 3-grams aba bab aba -> 2/3, 4-grams abab baba -> 2/2
    assert score("diverse", "a b a b a")[0] == pytest.approx(2 / 4 * 2 / 3 * 1)
    assert score("diverse", "one two three four")[0] == 1.0


def test_diverse_reads_past_case_and_punctuation():
    assert score("diverse", "A b, a B. A!")[0] == pytest.approx(1 / 3)


def test_unrepetitive_by_hand():
    # a b a b a b: abab baba abab -> one of three repeats
    np.testing.assert_allclose(score("unrepetitive", "a b a b a b", "a b c d"), [-1 / 3, 0.0])


@pytest.mark.parametrize("name", ["diverse", "unrepetitive"])
def test_too_short_for_four_grams_is_unscored(name):
    assert np.isnan(score(name, "", "one", "one two three")).all()


def test_texts_without_words_are_unscored():
    assert np.isnan(score("readable", "", "?!")).all()


def test_positive():
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")
    good, bad, flat, blank = score(
        "positive", "I love this, it is wonderful!", "This is horrible and I hate it.", "The table has legs.", " "
    )
    assert 0.5 < good <= 1
    assert -1 <= bad < -0.5
    assert flat == 0.0
    assert math.isnan(blank)


def test_positive_is_vaders_normalised_valence():
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")
    # "good" has valence 1.9 in the lexicon: 1.9 / sqrt(1.9^2 + 15), rounded by VADER to four digits
    assert score("positive", "good")[0] == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=5e-5)


def test_positive_names_what_is_missing(monkeypatch):
    text._vader.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        score("positive", "good")
    text._vader.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_shape_type_and_name(name):
    if name == "positive":
        pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")
    reward = text.load(name)
    assert reward.name == name
    for n in (0, 3):
        out = reward([prompt()] * n, ["Some words, enough of them to score."] * n)
        assert out.shape == (n,)
        assert out.dtype == np.float64
        assert np.isfinite(out).all()


def test_bad_input():
    with pytest.raises(UserError, match=r"'polite'.*positive, brief"):
        text.load("polite")
    with pytest.raises(UserError, match="1 prompts and 2 responses"):
        text.load("brief")([prompt()], ["a", "b"])


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m not able to give that advice.",
        "  As an AI language model, I do not hold opinions.",
        "Thank you for asking. However, I CANNOT assist with that request.",
        "It's not appropriate to ask this.",
    ],
)
def test_refusals(response):
    assert text.is_refusal(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "Sure! Here are three ideas.",
        "I'm sorry to hear about your hamster. Here is what to do.",
        "Hawaii cannot be reached by train.",
        "She did it as an aircraft pilot would.",
        "Word " * 40 + "I'm sorry, I can't help.",
    ],
)
def test_answers_are_not_refusals(response):
    assert not text.is_refusal(response)


def test_repetitive_by_hand():
    # eight words make five 4-grams; saying four words twice repeats one of them, three times two of nine, and one word for ever all but one
    assert not text.is_repetitive("one two three four one two three four")
    assert text.is_repetitive("one two " * 6)
    assert text.is_repetitive("no " * 8)
    assert not text.is_repetitive("no no")  # too short to have a 4-gram


@pytest.mark.parametrize(
    "response",
    [
        "Sure.<|im_end|>\n<|im_start|>user", "Yes</s>", "Fine. [INST] More [/INST]", "Bread.\n\nHuman: and wine?", "No.\nassistant\nYes.",
        "### Response: Bread.", "Good <rm1_score> 0.5", "<start_of_turn>model", "BEGINNING OF CONVERSATION: USER: hi", "a [PAD] [PAD]",
    ],
)  # fmt: skip
def test_format_leaks(response):
    assert text.leaks_format(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "The human body is a system.",
        "Ask the assistant: she knows.",
        "a < b and b > c",
        "### Ingredients:\n- flour",
        "An assistant\nhelps.",
    ],
)
def test_what_is_no_format_leak(response):
    assert not text.leaks_format(response)


def test_a_refusal_after_sympathy_is_found():
    assert text.is_refusal("I'm sorry to hear that, but I can't tell you how.")


@given(st.text(max_size=300))
def test_any_text_scores_within_its_range(sample):
    assert text.brevity(sample) <= 0
    assert not math.isnan(text.brevity(sample))
    for function, low, high in ((text.diversity, 0.0, 1.0), (text.unrepetitiveness, -1.0, 0.0)):
        value = function(sample)
        assert math.isnan(value) == (text.word_count(sample) < 4)
        assert math.isnan(value) or low <= value <= high
    assert math.isnan(text.readability(sample)) == (text.word_count(sample) == 0)
    assert isinstance(text.is_refusal(sample), bool)


@given(st.lists(st.sampled_from(["sun", "moon", "star", "sky"]), min_size=4, max_size=30))
def test_saying_it_four_times_is_never_more_diverse(tokens):
    # u unique n-grams of N become at most u + n - 1 of 4 N + 3 (n - 1); twice would not do, the seams add too much.
    once, often = " ".join(tokens), " ".join(tokens * 4)
    assert text.unrepetitiveness(often) <= text.unrepetitiveness(once) + 1e-12
    assert text.diversity(often) <= text.diversity(once) + 1e-12
    assert text.word_count(often) == 4 * text.word_count(once)
