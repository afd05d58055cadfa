"""The one optimisation loop: AdamW on a pure `loss(model, batch)`, through transformers' Trainer.

    theta <- AdamW(theta, grad of sum_b n_b loss_b / mean n)    b: batches of n_b rows of similar length

`accelerate launch`, FSDP, DeepSpeed and trackers come with the Trainer. An algorithm brings rows, a collator and a loss.
Batches are planned before the first step, for all epochs, from the seed and the rows' lengths alone; a batch counts by its
rows, so that every row weighs the same however many share its batch.

Reads and writes: folder/checkpoint-STEP, the Trainer's own (its optimiser and random state are files of torch.save, which it
loads with weights_only). A checkpoint counts once `sealed.json` holds the digest of every file in it; a killed run
continues from the last sealed one, with the losses and weights of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from equipoise.models.batching import by_length
from equipoise.progress import bar, say
from equipoise.runs import digest_of, file_digest, read_json, write_json
from equipoise.types import LossOutput, UserError

if TYPE_CHECKING:
    from torch import nn

_SEAL = "sealed.json"
_POOL = 50  # batches whose rows are sorted by length together


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a loss is minimised."""

    learning_rate: float = 1e-4
    """Peak of the schedule."""
    epochs: float = 1.0
    """Passes over the rows; the last one may be a part."""
    max_steps: int = 0
    """Steps of the optimiser, whatever the epochs; 0 for what the epochs take."""
    batch_size: int = 16
    """Most rows of a batch, per device."""
    batch_tokens: int = 0
    """Most tokens of a batch, padding included, per device; a longer row goes alone. 0 for no limit."""
    accumulate: int = 1
    """Batches per step of the optimiser."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """What follows: constant, or down to 0 in a line or a cosine."""
    weight_decay: float = 0.0
    """Decoupled, on matrices."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    seed: int = 0
    """Of the batches, and of dropout."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0 for none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products in forward and backward; weights and optimiser keep theirs."""
    trackers: tuple[str, ...] = ()
    """Where to report, by the names that transformers knows: tensorboard, wandb, trackio, mlflow."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        if not self.epochs > 0 or self.max_steps < 0:
            raise UserError(f"epochs must be positive and max_steps not negative, got {self.epochs} and {self.max_steps}")
        if self.batch_size < 1 or self.accumulate < 1:
            raise UserError(f"batch_size and accumulate must be at least 1, got {self.batch_size} and {self.accumulate}")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is a share of the steps, 0 to less than 1, got {self.warmup}")
        if min(self.batch_tokens, self.checkpoint_every, self.weight_decay) < 0 or not self.clip > 0:
            raise UserError(
                "batch_tokens, checkpoint_every and weight_decay must not be negative and clip must be positive, got "
                f"{self.batch_tokens}, {self.checkpoint_every}, {self.weight_decay} and {self.clip}"
            )


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Some steps of a longer run whose rows come while it goes on: parameters, optimiser, schedule and history continue."""

    begin: int
    """Steps that the run has taken."""
    total: int
    """Steps of the whole run: what the schedule of the learning rate is over."""
    checkpoint: Path | None
    """Where the run was after `begin` steps, as `last_sealed` found it; None at its start."""
    identity: str
    """Of the run: what its checkpoints are sealed with."""


class DivergedError(UserError):
    """The loss or its gradient is not a finite number."""


@dataclass(frozen=True)
class Fitted:
    """The trained model, and one entry per step: step, loss (mean over the step's rows), what the loss logged, learning_rate."""

    model: nn.Module
    history: list[dict[str, float]]


def plan_batches(lengths: Sequence[int], config: FitConfig, batches: int = 0) -> list[list[int]]:
    """Row numbers of every batch of the run, in order; `batches` is how many are wanted whatever the epochs say.

    Each epoch has every row once. Rows are shuffled, sorted by length within pools of some fifty batches, cut, and the
    batches shuffled, so that rows of a batch have similar lengths and batches come in random order.
    """
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < batches if batches else epoch < config.epochs:
        rng = np.random.default_rng([config.seed, epoch])
        order, size, budget = rng.permutation(len(lengths)), _POOL * config.batch_size, config.batch_tokens or math.inf
        cut: list[list[int]] = []
        for start in range(0, len(order), size):
            pool = order[start : start + size].tolist()
            batches_of = by_length([lengths[row] for row in pool], budget, config.batch_size, math.inf)
            cut += [[pool[i] for i in batch] for batch in batches_of]
        cut = [cut[i] for i in rng.permutation(len(cut))]
        share = 1.0 if batches else min(1.0, config.epochs - epoch)
        plan += cut[: max(1, round(share * len(cut)))]
        epoch += 1
    return plan[:batches] if batches else plan


def fit(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    loss: Callable[[nn.Module, dict[str, Any]], LossOutput],
    config: FitConfig,
    folder: Path,
    *,
    lengths: Sequence[int] | None = None,
    renew: Callable[[Any, int, int], Any] | None = None,
    stretch: Stretch | None = None,
    title: str = "training",
) -> Fitted:
    """Minimise the mean of `loss` over the rows, in place, and continue from the last sealed checkpoint in `folder`.

    `collate` makes a batch of tensors from some of the rows; `loss` gives its mean over them. `lengths` are the rows'
    tokens, as the collator pads them; without them batches are not sorted. Parameters that don't require gradients stay.
    `renew` makes of a row, its number and the pass over the rows (0, 1, ..) what this pass collates, and has to be a function
    of these three, so that a run that continues sees what an undisturbed one would have seen.
    A `stretch` takes `config.max_steps` steps of a longer run on these rows and seals a checkpoint after the last of them; what is
    in `folder` isn't looked for then, and the history is that of these steps.
    Of several processes (`accelerate launch`) the first one returns, and the others end here with exit code 0.

    Raises `DivergedError` where the loss or its gradient is not finite, and `UserError` where the folder's checkpoints are of other
    settings or rows.
    """
    from equipoise.training.trainer import Watch, make_arguments, make_trainer

    if not rows:
        raise UserError("there are no rows to train on")
    if stretch:
        config = replace(config, checkpoint_every=config.max_steps)
    arguments = make_arguments(config, folder)
    lengths = lengths or [1] * len(rows)
    per_step = config.accumulate * arguments.world_size
    drawn = replace(config, seed=config.seed + stretch.begin) if stretch else config
    plan = plan_batches(lengths, drawn, config.max_steps * per_step)
    steps = -(-len(plan) // per_step)
    if stretch:
        identity, begun, checkpoint, total = stretch.identity, stretch.begin, stretch.checkpoint, stretch.total
        steps += begun
        arguments.max_steps, arguments.ignore_data_skip = total, True
    else:
        identity, total = digest_of({"config": asdict(config), "lengths": list(lengths)}), steps
        begun, checkpoint = last_sealed(folder, identity)
    arguments.warmup_steps = round(config.warmup * total)
    first = arguments.process_index == 0
    shown = first and steps > begun and not stretch
    with bar(title, steps - begun) if shown else contextlib.nullcontext(lambda _count: None) as advance:
        watch = Watch(lambda path: seal(path, identity), advance, config.learning_rate, steps)
        trainer = make_trainer(model, rows, plan, renew, collate, loss, arguments, watch)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()
    if not first:
        raise SystemExit(0)
    history = entries_of(trainer.state.log_history, stretch.begin if stretch else 0, steps)
    return Fitted(trainer.accelerator.unwrap_model(trainer.model), history)


def entries_of(log: Sequence[Mapping[str, float]], since: int, until: int) -> list[dict[str, float]]:
    """The history of the steps after `since` up to `until`, of a Trainer's log."""
    found = [entry for entry in log if "loss" in entry and since < entry["step"] <= until]
    return [{key: entry[key] for key in sorted(entry) if key != "epoch"} for entry in found]  # a checkpoint's come back sorted


def seal(checkpoint: Path, identity: str) -> None:
    """Write down the digest of every file of a finished checkpoint."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != _SEAL)
    write_json(checkpoint / _SEAL, {"identity": identity, "files": {str(p.relative_to(checkpoint)): file_digest(p) for p in files}})


def last_sealed(folder: Path, identity: str) -> tuple[int, Path | None]:
    """(step, folder) of the last checkpoint whose files are those that were sealed; (0, None) where there is none.

    One that is half-written or damaged is passed over. Raises `UserError` where a checkpoint belongs to other settings or rows.
    """
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    for step, path in sorted(found, reverse=True):
        try:
            record = read_json(path / _SEAL)
            whole = all(file_digest(path / name) == digest for name, digest in record["files"].items())
        except (UserError, KeyError, TypeError, AttributeError, OSError):
            whole = False
        if not whole:
            say(f"{path} was not finished or is damaged: it is passed over")
        elif record["identity"] != identity:
            raise UserError(f"{path} was made with other settings or rows; choose another folder or delete it")
        else:
            say(f"continuing from step {step}")
            return step, path
    return 0, None


def discard_checkpoints(folder: Path) -> None:
    """Delete the checkpoints, once what was trained is saved elsewhere."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
