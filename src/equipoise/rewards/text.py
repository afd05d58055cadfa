"""Rewards computed from the response's text alone, and the text measures that a report counts.

A word is what stands between white space or dashes, contains a letter or digit, and is stripped of the punctuation around
it: "**Well-known** fact: 3.14!" has three words. The measures are meant for scripts that put spaces between words.

| name | equation | range | where it is NaN |
|---|---|---|---|
| positive | VADER compound score | -1 to 1 | blank text |
| brief | -log(1 + words) | <= 0, nats | never |
| long | log(1 + words) | >= 0, nats | never |
| long:MODEL | log(1 + tokens), in MODEL's tokenizer and without special tokens | >= 0, nats | never |
| readable | -automated readability index | about -30 to 20, US school grades | no words |
| diverse | product over n = 2, 3, 4 of unique n-grams / n-grams | 0 to 1 | fewer than 4 words |
| unrepetitive | -(repeated 4-grams / 4-grams) | -1 to 0 | fewer than 4 words |
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from equipoise.types import Prompt, UserError

REFUSAL_PHRASES = (
    "i'm sorry", "i am sorry", "sorry, but", "i apologize", "i apologise", "my apologies",
    "i can't", "i cannot", "i can not", "i'm unable", "i am unable", "i'm not able to", "i am not able to",
    "i won't", "i will not", "i'm not comfortable", "i am not comfortable",
    "i don't feel comfortable", "i must decline", "i have to decline", "i must refuse", "i refuse to",
    "as an ai", "as a language model", "as a responsible ai", "i'm just an ai", "i am just an ai", "i'm an ai", "i am an ai",
    "it's not appropriate", "it is not appropriate", "it's never appropriate", "it would not be appropriate",
    "it's not ethical", "it is not ethical", "against my programming", "can't assist with", "cannot assist with",
    "can't help with", "cannot help with",
)  # fmt: skip
REFUSAL_WINDOW = 200
"""Characters at the start of a response in which a refusal is looked for."""

_REFUSAL = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, REFUSAL_PHRASES))})(?!\w)(?! to hear| for your| about)")
REPETITIVE = 0.3
"""A text is repetitive where more than this share of its word 4-grams occurred before in it."""

# What a chat template writes and an answer shouldn't: special tokens of the common families, and role names that open a line. A
# decoder that drops special tokens leaves ChatML's role name alone on its line.
_FORMAT = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:pad|unk|bos|eos)>|\[PAD\]|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|<rm\d+_score>"
    r"|BEGINNING OF CONVERSATION:|^[ \t]*#{2,3} ?(?:Instruction|Input|Response):|^[ \t]*(?:Human|User|Assistant|System)[ \t]*:"
    r"|^(?:user|assistant|system)[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u2018\u2019\u201c\u201d\u2026\u2022\u00ab\u00bb\u00bf\u00a1"
_BETWEEN_WORDS = re.compile(r"[\s\u2013\u2014]+")
_BETWEEN_SENTENCES = re.compile(r"[.!?\u2026]+[\"'\u2019\u201d)\]*]*(?:\s+|$)|\n+")


@dataclass
class TextReward:
    """A reward that applies one function of the text to each response."""

    name: str
    score: Callable[[str], float]
    """One response to one number, larger is better, NaN where the text has too little to score."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """Scores of the N responses, float64 of shape [N]; the prompts are not read."""
        check_paired(prompts, responses)
        return np.array([self.score(response) for response in responses], dtype=np.float64)


def load(name: str) -> TextReward:
    """The reward called `name`: long:MODEL, or one of positive, brief, long, readable, diverse and unrepetitive."""
    kind, _, model = name.partition(":")
    if kind == "long" and model:
        from equipoise.models.loading import load_tokenizer

        tokenizer = load_tokenizer(model)
        return TextReward(name, lambda text: math.log1p(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])))
    if name not in _SCORES:
        raise UserError(f"no text reward {name!r}: choose one of {', '.join(_SCORES)}, or long:MODEL")
    return TextReward(name, _SCORES[name])


def check_paired(prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
    """Raise `UserError` unless there is one prompt per response."""
    if len(prompts) != len(responses):
        raise UserError(f"got {len(prompts)} prompts and {len(responses)} responses: give one prompt per response")


def words(text: str) -> list[str]:
    """The text's words in lower case, without the punctuation around them."""
    pieces = _BETWEEN_WORDS.split(text.lower())
    return [piece.strip(_PUNCTUATION) for piece in pieces if any(c.isalnum() for c in piece)]


def word_count(text: str) -> int:
    """Number of words in the text; "It's 3.14 -- roughly." has three."""
    return len(words(text))


def is_refusal(text: str) -> bool:
    """Whether one of `REFUSAL_PHRASES` stands within the first `REFUSAL_WINDOW` characters, in any case, with any apostrophe.

    Sympathy ("I'm sorry to hear", "for your", "about") is no refusal. A phrase list still misses refusals that lecture
    instead of apologising, and flags answers that regret before they help.
    """
    plain = text.strip().lower().replace("\u2019", "'").replace("\u2018", "'").replace("\u02bc", "'")
    return _REFUSAL.search(plain[:REFUSAL_WINDOW]) is not None


def is_repetitive(text: str) -> bool:
    """Whether more than `REPETITIVE` of the text's word 4-grams occurred before in it; never of fewer than four words."""
    return -unrepetitiveness(text) > REPETITIVE


def leaks_format(text: str) -> bool:
    """Whether the text holds what belongs to a chat template: a special token, an instruction header, a role that opens a line.

    It can't tell a leak from an answer about templates, and a model's own special tokens may be of no family that it knows.
    """
    return _FORMAT.search(text) is not None


def positivity(text: str) -> float:
    """How positive the text sounds: VADER's compound score x / sqrt(x^2 + 15) of the rule-adjusted sum x of word valences.

    Range -1 to 1, 0 where no word is in the lexicon; NaN for blank text. Hutto & Gilbert 2014; English.
    """
    return float(_vader().polarity_scores(text)["compound"]) if text.strip() else math.nan


def brevity(text: str) -> float:
    """How short the text is: -log(1 + words).

    In nats, at most 0; doubling a long text costs 0.69. An empty text scores 0, the best: pair it with another objective.
    """
    return -math.log1p(word_count(text))


def length(text: str) -> float:
    """How long the text is: log(1 + words), minus `brevity`. As a judge beside other rewards it shows what they pay for length."""
    return -brevity(text)


def readability(text: str) -> float:
    """How easy the text reads: -(4.71 characters / words + 0.5 words / sentences - 21.43).

    Minus the automated readability index, in US school grades; characters are letters and digits; a sentence ends at . ! ?
    or a line break. NaN for a text without words. Smith & Senter 1967 (AMRL-TR-66-220); English.
    """
    found = words(text)
    if not found:
        return math.nan
    characters = sum(c.isalnum() for word in found for c in word)
    sentences = sum(any(c.isalnum() for c in piece) for piece in _BETWEEN_SENTENCES.split(text))
    return -(4.71 * characters / len(found) + 0.5 * len(found) / max(sentences, 1) - 21.43)


def diversity(text: str) -> float:
    """How varied the wording is: product over n = 2, 3, 4 of unique n-grams / n-grams of words.

    Range 0 to 1, 1 where no pair of neighbouring words occurs twice. MAP (arXiv 2410.19198). Departures: MAP's code
    divides by n-grams + 1, so that short texts lose without repeating anything and one with fewer than four words gets 0;
    here the ratio is plain (n words make one n-gram, ratio 1) and a text with fewer than four words, which has no 4-gram,
    is NaN. MAP also takes punctuation marks as tokens and keeps the case.
    """
    found = words(text)
    return math.prod(_unique_share(found, n) for n in (2, 3, 4))


def unrepetitiveness(text: str) -> float:
    """How little the text repeats itself: -(1 - unique 4-grams / 4-grams) of words.

    Range -1 to 0, 0 where every 4-gram occurs once; NaN for fewer than four words. The seq-rep-4 of Welleck et al. 2020, negated.
    """
    return _unique_share(words(text), 4) - 1.0


def _unique_share(found: list[str], n: int) -> float:
    """Unique n-grams / n-grams; NaN where there is none."""
    grams = list(zip(*(found[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else math.nan


@lru_cache(maxsize=1)
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("the reward 'positive' needs VADER: pip install vaderSentiment==3.3.2") from None
    return SentimentIntensityAnalyzer()


_SCORES: dict[str, Callable[[str], float]] = {
    "positive": positivity,
    "brief": brevity,
    "long": length,
    "readable": readability,
    "diverse": diversity,
    "unrepetitive": unrepetitiveness,
}
