"""transformers' Trainer with a given loss, planned batches and our progress; `fit.py` is what algorithms call."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from equipoise.training.fit import DivergedError, FitConfig
from equipoise.types import LossOutput, UserError


class _Batches(Dataset):
    """The planned batches as items, so that the Trainer's sampler, shards over processes and skipping need no change."""

    def __init__(self, rows: Sequence[Any], plan: Sequence[Sequence[int]], renew: Callable[[Any, int, int], Any] | None) -> None:
        self.rows, self.plan, self.renew = rows, plan, renew
        shown: Counter[int] = Counter()
        self.passes = []  # of each batch: how often its rows were shown before
        for batch in plan:
            self.passes.append(shown[batch[0]])
            shown.update(batch)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[Any]:
        rows = [self.rows[i] for i in self.plan[index]]
        if self.renew is None:
            return rows
        return [self.renew(row, i, self.passes[index]) for row, i in zip(rows, self.plan[index], strict=True)]


class Watch(TrainerCallback):
    """Shows progress, stops at a loss that isn't a number and after the last step, seals checkpoints."""

    def __init__(self, seal: Callable[[Path], None], advance: Callable[[int], None], learning_rate: float, last: int) -> None:
        self.seal, self.advance, self.learning_rate, self.last = seal, advance, learning_rate, last

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        """Runs before the step's checkpoint is written, so that no broken weights are kept."""
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name.replace('grad_norm', 'the norm of the gradient').replace('loss', 'the loss')} is {value} at step "
                    f"{state.global_step}: lower learning_rate (it is {self.learning_rate:g}), or look for rows that are out of range"
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One more step is done."""
        self.advance(1)
        control.should_training_stop |= state.global_step >= self.last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every process has written its part when this has waited for all."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            self.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _Trainer(Trainer):
    """The Trainer with a loss that is a function of the model and the batch."""

    def __init__(self, loss: Callable[[nn.Module, dict[str, Any]], LossOutput], mean_rows: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._loss, self._mean_rows = loss, mean_rows
        self._sums: dict[str, torch.Tensor] = {}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The batch's mean loss, times its rows over the mean number of rows."""
        found, rows = self._loss(model, inputs["batch"]), inputs["rows"]
        for name, value in {"rows": 1.0, "loss": found.loss, **found.logged}.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=found.loss.device).detach() * rows
            self._sums[name] = self._sums.get(name, 0.0) + value
        return found.loss * (rows / self._mean_rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the rows of all processes since the last entry, in place of the loss as it was weighted."""
        if "loss" in logs and self._sums:
            sums = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
            means = dict(zip(self._sums, (sums / sums[0]).tolist(), strict=True))
            logs |= {name: value for name, value in means.items() if name != "rows"}
            self._sums = {}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Without the parameters that aren't trained: a run that continues starts with them anyway. peft does so by itself."""
        whole = self.accelerator.unwrap_model(self.model)
        plain = isinstance(whole, PreTrainedModel) and all(p.requires_grad for p in whole.parameters())
        if state_dict is None and not hasattr(whole, "peft_config") and not plain:
            trained = {name for name, p in whole.named_parameters() if p.requires_grad}  # tied ones once, as safetensors wants them
            everything = whole.state_dict(keep_vars=True)
            state_dict = {name: t for name, t in everything.items() if name in trained or not isinstance(t, nn.Parameter)}
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """What a checkpoint lacks are the parameters that `_save` left out."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """One line that names the folder, whatever torch or safetensors raise on a full disk."""
        from safetensors import SafetensorError

        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"could not write a checkpoint into {self.args.output_dir} ({reason}); make room and run again: the last whole one is kept"
            ) from None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the Trainer looks for its own names in the batch."""
        return 0


def make_arguments(config: FitConfig, folder: Path) -> TrainingArguments:
    """The Trainer's settings; making them finds the devices and joins the processes of `accelerate launch`."""
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)  # that it sorts checkpoints by their numbers
    if config.precision == "bfloat16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("this GPU has no bfloat16: set precision to float32")
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=1,  # of the plan's batches
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        optim="adamw_torch",
        seed=config.seed,
        bf16=config.precision == "bfloat16",  # the default of some subclasses is True, on a CPU too
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 500,
        save_total_limit=2,  # the one before stays until the new one is sealed
        logging_steps=1,  # so that no sum of losses is lost between a checkpoint and a kill
        logging_nan_inf_filter=False,
        report_to=list(config.trackers) or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )


def make_trainer(
    model: nn.Module,
    rows: Sequence[Any],
    plan: Sequence[Sequence[int]],
    renew: Callable[[Any, int, int], Any] | None,
    collate: Callable[[list[Any]], dict[str, Any]],
    loss: Callable[[nn.Module, dict[str, Any]], LossOutput],
    arguments: TrainingArguments,
    watch: Watch,
) -> Trainer:
    """A Trainer that goes through the plan once."""

    def join(items: list[list[Any]]) -> dict[str, Any]:
        together = [row for item in items for row in item]
        return {"batch": collate(together), "rows": len(together)}

    mean_rows = sum(map(len, plan)) / len(plan)
    data = {"train_dataset": _Batches(rows, plan, renew), "data_collator": join}
    try:
        trainer = _Trainer(loss, mean_rows, model=model, args=arguments, callbacks=[watch], **data)
    except (ImportError, RuntimeError, ValueError) as error:
        if not arguments.report_to:
            raise
        raise UserError(f"can't report to {', '.join(arguments.report_to)} ({error}): install it, or leave trackers out") from None
    trainer.remove_callback(PrinterCallback)
    return trainer


def restore(model: nn.Module, config: FitConfig, checkpoint: Path) -> None:
    """Give the model the parameters of a checkpoint, before more of its run is trained."""
    arguments = make_arguments(config, checkpoint.parent)
    _Trainer(_no_loss, 1.0, model=model, args=arguments)._load_from_checkpoint(str(checkpoint))


def _no_loss(model: nn.Module, batch: dict[str, Any]) -> LossOutput:
    raise AssertionError("nothing is trained here")
