"""Supervised fine-tuning: a model learns responses, and nothing of the prompts before them.

    min  sum_i sum_t -log pi(y_it | x_i, y_i<t) / sum_i T_i

T_i: learnt tokens of row i, the one that ends a turn among them. Every learnt token weighs the same in the whole run, however
many rows share its batch: a batch of B rows is divided by B mean(T) and not by its own number of tokens, and `fit` weighs batches by
their rows, so that batches that are accumulated have the gradient of one large batch. (Dividing each batch by its own tokens, as
TRL's trainer does on one device, gives tokens of short rows more weight; dividing each row by its own, as a batch of one does, more
still.)

Formats: `assistant` is the tokenizer's chat template, over as many turns as there are; of several assistant turns either the
last one or every one is learnt. `summary` is the TL;DR template of `models/chat.py`, which goes with the tokenizer that is saved.

Papers: Ouyang et al. 2022, section 3.5; formats: RiC (arXiv 2402.10207), MAVIS (2508.13415). Departures: chat templates in place of
"\\n\\nHuman:"; rows that are too long lose the beginning of their prompt and are counted, where the papers leave them out.
Reads: demonstrations. Writes: adapter/ (PEFT) or model/, card.json (held-out perplexity before and after, with intervals by
prompt), held_out.json (nats per held-out response), history.json. The weights enter: nowhere.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from equipoise.data.demonstrations import Demonstration
from equipoise.data.splits import opening
from equipoise.models.chat import prompt_ids, summary_template
from equipoise.models.completions import Completions, completion_batch, completions_of
from equipoise.models.logprobs import completion_logprobs, completion_sums
from equipoise.models.lora import Lora
from equipoise.progress import bar, say
from equipoise.runs import Manifest, write_atomic
from equipoise.training.fit import FitConfig, fit
from equipoise.training.held_out import held_out_perplexity, held_out_rows
from equipoise.training.policy import Start, conclude, load_start, save_policy, trainable
from equipoise.types import LossOutput, Prompt, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from equipoise.models.loading import LanguageModel
else:
    Tensor = Any  # importing torch here would slow every --help down; under jaxtyping's hook the axes are checked, not the class

Format = Literal["assistant", "summary"]
Turns = Literal["last", "every"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one fine-tuning."""

    format: Format = "assistant"
    """How prompts are written: the tokenizer's chat template, or a post with the request to sum it up."""
    turns: Turns = "last"
    """Which assistant turns of a conversation are learnt."""
    max_length: int = 512
    """Tokens of a conversation; longer ones lose the beginning of their prompt, then the end of the response."""
    eight_bit: bool = False
    """Keep the weights under the adapter in 8 bits; needs bitsandbytes, and is of use on a GPU."""
    lora: Lora = field(default_factory=Lora)
    """Which weights are trained; rank 0 trains all of them."""
    test_share: float = 0.1
    """Share of the prompts held out for the stated perplexity."""
    licence: str = "unstated"
    """Licence of the data, for the card."""
    seed: int = 0
    """Of the split by prompt and the bootstrap; `fit.seed` is that of the training."""
    fit: FitConfig = field(default_factory=FitConfig)
    """How it is trained; a row of a batch is a conversation."""

    def __post_init__(self) -> None:
        if self.format == "summary" and self.turns == "every":
            raise UserError("a summary has one turn: leave turns at last")
        if self.max_length < 16:
            raise UserError(f"max_length must be at least 16 tokens, got {self.max_length}")
        if not 0 < self.test_share <= 0.5:
            raise UserError(f"test_share must be positive and at most a half, got {self.test_share}")
        if self.eight_bit and not self.lora.rank:
            raise UserError("weights in 8 bits can't be trained themselves: set lora.rank to 1 or more")


@dataclass(frozen=True)
class Row:
    """A conversation from the first learnt turn's prompt on, and which tokens after it are learnt."""

    completions: Completions
    learnt: tuple[bool, ...]


def rows_of(tokenizer: Any, example: Demonstration, limit: int, turns: Turns = "last") -> list[Row]:
    """The conversation as one row, or with every turn learnt as few rows as show each turn behind what sampling would show.

    A template may write an answer differently once the conversation goes on, or the whole may be longer than `limit`; a turn that
    isn't found in the whole conversation as it would be sampled is a row of its own.
    """
    whole = completions_of(tokenizer, example.prompt, (example.response,), limit, finished=(example.finished,))
    ids, begin = whole.prompt + whole.responses[0], len(whole.prompt)
    learnt = [at >= begin for at in range(len(ids))]
    rows: list[Row] = []
    for at, message in enumerate(example.prompt.messages if turns == "every" else ()):
        if message["role"] != "assistant" or at == 0 or not message["content"].strip():
            continue
        before = Prompt(id=example.prompt.id, messages=example.prompt.messages[:at])
        turn = completions_of(tokenizer, before, (message["content"].strip(),), limit)
        first, last = len(turn.prompt), len(turn.prompt) + len(turn.responses[0])
        if whole.cut or ids[:last] != turn.prompt + turn.responses[0]:
            rows.append(Row(turn, (True,) * len(turn.responses[0])))
            continue
        learnt[first:last] = [True] * (last - first)
        begin = min(begin, first)
    return [*rows, Row(Completions(ids[:begin], (ids[begin:],), whole.cut), tuple(learnt[begin:]))]


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """A `completion_batch` in which only learnt tokens are real."""
    import torch

    batch = completion_batch([row.completions for row in rows], shared=False)
    for at, row in enumerate(rows):
        batch["real"][at, 0, : len(row.learnt)] *= torch.tensor(row.learnt)
    return batch


def mean_nll(logprob_BT: Float[Tensor, "B T"], tokens: float) -> Float[Tensor, ""]:
    """-sum of the log-probabilities (0 where nothing is learnt) / (B tokens), nats; `tokens`: learnt ones of a row, on average."""
    return -logprob_BT.sum() / (len(logprob_BT) * tokens)


def make_loss(tokens: float) -> Callable[[Any, dict[str, Any]], LossOutput]:
    """The loss as `fit` wants it."""

    def loss(model: Any, batch: dict[str, Any]) -> LossOutput:
        logprob_BT = completion_logprobs(model, batch)[:, 0]
        return LossOutput(loss=mean_nll(logprob_BT, tokens), logged={"tokens": batch["real"].sum() / len(logprob_BT)})

    return loss


@dataclass(frozen=True)
class Prepared:
    """Demonstrations as they are trained on and held out."""

    rows: list[Row]
    held: list[Completions]
    """Of held-out conversations the last response, whichever turns are learnt."""
    held_ids: list[str]
    held_prompts: np.ndarray
    counts: dict[str, int]
    """cut: rows that were longer than the limit; full: conversations whose prompt alone fills it."""


def prepare(examples: Sequence[Demonstration], tokenizer: Any, limit: int, config: Config) -> Prepared:
    """Token ids and the split by how a conversation begins. Raises `UserError` for examples that are too few."""
    prompt_N = np.array([example.group or opening(example.prompt) for example in examples])
    held_N = held_out_rows(prompt_N, config.test_share, config.seed)
    if held_N.all() or not held_N.any():
        raise UserError(f"{len(examples)} examples are too few to hold {config.test_share:g} of their prompts out: give more")
    known, away = ([example for example, held in zip(examples, held_N, strict=True) if held == side] for side in (False, True))
    rows = [row for example in known for row in rows_of(tokenizer, example, limit, config.turns)]
    held = [completions_of(tokenizer, example.prompt, (example.response,), limit, finished=(example.finished,)) for example in away]
    cut = sum(row.completions.cut for row in rows) + sum(row.cut for row in held)
    full = sum(len(prompt_ids(tokenizer, example.prompt)) >= limit for example in examples) if cut else 0
    if cut:
        say(f"{cut} of {len(rows) + len(held)} rows are longer than {limit} tokens and are cut (the prompt alone fills them: {full})")
    return Prepared(rows, held, [example.id for example in away], prompt_N[held_N], {"cut": cut, "full": full})


def train(examples: Sequence[Demonstration], source: str, config: Config, run: Manifest, start: Start | None = None) -> Path:
    """Train on most prompts, save, and say how likely the held-out responses are before and after; returns the folder.

    `start` is the source where it is loaded already. Raises `UserError` for examples that are too few, posts of several turns, and 8
    bits without bitsandbytes.
    """
    start = start or load_start(source, eight_bit=config.eight_bit)
    if config.format == "summary":
        examples = [_summary(example) for example in examples]
        start.lm.tokenizer.chat_template = summary_template(start.lm.tokenizer)
    data = prepare(examples, start.lm.tokenizer, min(config.max_length, start.lm.context_length), config)
    nats_N = {"untrained": nats(start.lm, data.held, "the untrained model on the held-out responses")}
    folders, model, facts = learn(start, data.rows, config, run.folder)
    nats_N["trained"] = nats(replace(start.lm, model=model), data.held, "the trained model on the held-out responses")
    tokens_N = np.array([len(row.responses[0]) for row in data.held])
    history = facts.pop("history")
    card = {
        **{"model": source, "format": config.format, "turns": config.turns, "eight_bit": config.eight_bit, "licence": config.licence},
        **{"test_responses": len(data.held), "test_tokens": int(tokens_N.sum()), "counts": data.counts, **facts},
        "held_out": {name: held_out_perplexity(said_N, tokens_N, data.held_prompts, config.seed) for name, said_N in nats_N.items()},
    }
    gain_N = nats_N["trained"] - nats_N["untrained"]
    card["held_out"]["ratio"] = held_out_perplexity(gain_N, tokens_N, data.held_prompts, config.seed)
    each = {id: {name: float(said_N[n]) for name, said_N in nats_N.items()} for n, id in enumerate(data.held_ids)}
    return conclude(run, folders, {"card": card, "held_out": each, "history": history})


def learn(start: Start, rows: Sequence[Row], config: Config, out: Path) -> tuple[list[Path], Any, dict[str, Any]]:
    """Train and save: (folders, the trained model, what the card says of it and the history)."""
    import torch

    torch.manual_seed(config.fit.seed)  # new adapters
    model = trainable(start, config.lora)
    tokens = sum(sum(row.learnt) for row in rows)
    facts: dict[str, Any] = {"rows": len(rows), "learnt_tokens": tokens}
    facts["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fitted = fit(
        model,
        rows,
        collate,
        make_loss(tokens / len(rows)),
        config.fit,
        out / "checkpoints",
        lengths=[row.completions.tokens(shared=False) for row in rows],
        title=f"training on {len(rows)} conversations",
    )
    folders = save_policy(out, start, fitted.model, config.lora)
    if config.format == "summary":
        save_tokenizer(folders[0], start.lm.tokenizer)
    return folders, fitted.model.eval(), facts | {"history": fitted.history}


def nats(lm: LanguageModel, rows: Sequence[Completions], title: str) -> Float[np.ndarray, " N"]:
    """-log pi(y | x) of each row's response."""
    with bar(title, len(rows)) as advance:
        return -np.concatenate(completion_sums(lm.model, rows, shared=False, progress=advance))


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer's files into an adapter's or a model's folder, each whole or not at all."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            write_atomic(folder / path.name, functools.partial(shutil.copyfile, path))


def _summary(example: Demonstration) -> Demonstration:
    """With the summary on one line, as the template writes the post."""
    if [message["role"] for message in example.prompt.messages] != ["user"]:
        raise UserError(
            f"example {example.id!r} has {len(example.prompt.messages)} turns before its answer; a post to sum up is one user turn"
        )
    return replace(example, response=" ".join(example.response.split("\n")).strip())
