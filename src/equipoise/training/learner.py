"""A policy that is sampled while it is trained, beside the frozen model it started as; it may read the weights of a request.

    pi_theta(y | x)             one policy: plain LoRA, or all weights
    pi_theta(y | x with w)      one that is told the weights in its prompt (models/conditions.py)
    pi_theta(w)(y | x)          parameters that depend on the weights (models/weighted_lora.py), a vector per row

The reference and the policy share the frozen weights, so that the two take little more memory than one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from equipoise.models.chat import prompt_ids
from equipoise.models.conditions import weights_in_prompt
from equipoise.models.loading import LanguageModel
from equipoise.models.lora import Lora, WeightedLora, no_dropout
from equipoise.training.policy import Start, save_policy, trainable
from equipoise.types import Prompt, Request, UserError

Reads = Literal["nothing", "prompt", "parameters"]
"""Where a policy reads the weights."""


@dataclass(frozen=True)
class Learner:
    """What is trained, and how it is run."""

    start: Start
    """The reference, as it stays."""
    policy: LanguageModel
    """As sampling runs it; its parameters are those that are trained."""
    model: Any
    """The policy as training runs it."""
    objectives: tuple[str, ...]
    reads: Reads
    lora: Lora
    around: Any = None
    """A module that is trained in place of `model`, which it holds: a policy with values."""

    @property
    def trained(self) -> Any:
        """What is trained."""
        return self.model if self.around is None else self.around

    @property
    def reference(self) -> LanguageModel:
        """The frozen model."""
        return self.start.lm

    def prompt(self, request: Request) -> tuple[int, ...]:
        """Token ids that the policy goes on from."""
        return tuple(prompt_ids(self.policy.tokenizer, self.asked(request) if self.asked else request.prompt))

    @property
    def asked(self) -> Callable[[Request], Prompt] | None:
        """What the policy is asked in place of the request's own prompt; the reference is asked that."""
        return weights_in_prompt(self.policy.tokenizer, self.objectives) if self.reads == "prompt" else None

    def save(self, out: Path) -> list[Path]:
        """Write the policy so that `sample --policy` reads it, and return its folders, the policy's own first."""
        if self.reads != "parameters":
            return save_policy(out, self.start, self.model, self.lora)
        from equipoise.models.weighted_lora import save_weighted

        save_weighted(self.policy, out / "adapter")
        return [out / "adapter"]


def make_learner(start: Start, objectives: Sequence[str], reads: Reads, lora: Lora, weighted: WeightedLora, seed: int) -> Learner:
    """A policy that is its reference yet. Raises `UserError` for parameters that read weights on an adapter."""
    import torch

    from equipoise.models.weighted_lora import add_weighted_lora, shared_copy

    torch.manual_seed(seed)  # new adapters
    own = copy.deepcopy(start.lm.model) if reads != "parameters" and lora.rank == 0 else shared_copy(start.lm.model)
    lm = replace(start.lm, model=own)
    if reads != "parameters":
        model = trainable(replace(start, lm=lm), lora)
        policy = replace(lm, model=model.get_base_model() if lora.rank else model)
    else:
        if start.adapter:
            raise UserError(
                f"adapters that read weights lie on a plain model, not on the adapter {start.adapter}: `equipoise merge` it first"
            )
        no_dropout(own)
        policy = add_weighted_lora(lm, weighted, objectives, seed)
        model = policy.model
    return Learner(start, policy, model, tuple(objectives), reads, lora)
