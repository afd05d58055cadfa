"""Steer a policy with reward or value models that score every candidate token's prefix (ARGS, VAS, controlled decoding).

    pi(a | s) = pi_ref(a | s) exp( (1/beta) sum_k w_k v_k(s + a) ) / Z(s)          a among the top k of pi_ref

v_k: a scalar head on a causal backbone, read at the prefix's last token, in standard deviations where they are given; pi_ref: at
the sampling temperature, as for the value guides. The rule is one; what differs is where v comes from: ARGS (arXiv 2402.01694), a
reward model of whole responses, read on prefixes; VAS (arXiv 2405.06639), a value head trained by TD; controlled decoding (arXiv
2310.17022), one trained on final rewards.
Departures: all candidates are one forward by tree attention, and the chosen one's keys are kept; weights per row; any number of
scorers; tokens outside the top k are dropped as in ARGS (VAS lets them keep their logits, unscored). Constants per step, such as
VAS's mean over the candidates, cancel.
Reads: models. Writes: nothing. The weights enter: the logits.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch

from equipoise.models.cache import attends_fully
from equipoise.models.companions import check_room, same_tokens
from equipoise.models.generation import Start, Step, known_tokens
from equipoise.models.loading import LanguageModel
from equipoise.models.rows import Batch, Mark
from equipoise.models.scalar_heads import head_of
from equipoise.objectives import Normaliser
from equipoise.types import Request, UserError


class ScorerGuide:
    """One scalar model per objective, each with the batch's rows in a cache of its own."""

    layers: tuple[int, ...] = ()
    of_prefixes = True
    """Whether shifts are values of prefixes, comparable between rows."""
    forwards_per_step = 0  # the policy runs none of the candidates; the scorers' tokens are in forwards_R

    def __init__(self, lm: LanguageModel, scorers: Mapping[str, LanguageModel], beta: float, normaliser: Normaliser | None = None) -> None:
        """`scorers` hold models with one logit, as `scalar_heads.load_scalar` gives, under the policy's tokenizer.

        Raises `UserError` for beta <= 0, no scorer, another tokenizer, a backbone with a limited view, or other objectives in the
        normaliser.
        """
        if not beta > 0:
            raise UserError(f"beta must be positive, got {beta:g}")
        if not scorers:
            raise UserError("steering by scorers needs at least one")
        if normaliser is not None and normaliser.objectives != tuple(scorers):
            raise UserError(f"the rewards' scale is for {', '.join(normaliser.objectives)}, the scorers for {', '.join(scorers)}")
        for scorer in scorers.values():
            same_tokens(lm, scorer)
            if not attends_fully(scorer.model.config):
                raise UserError(f"not all layers of {scorer.name!r} attend to the full past, as candidates in one forward need")
        self.objectives, self._scorers = tuple(scorers), tuple(scorers.values())
        self._known = known_tokens(lm.tokenizer)
        self._heads = [head_of(scorer.model) for scorer in self._scorers]
        self._scale_K = [1 / (beta * sd) for sd in (normaliser.sd_K if normaliser else (1.0,) * len(scorers))]
        self._running = tuple(range(len(scorers)))

    def narrowed(self, requests: Sequence[Request]) -> ScorerGuide:
        """The guide for these requests and no others: scorers that have no weight in any of them don't run."""
        found = copy.copy(self)
        found._running = tuple(k for k in self._running if any(r.weights is not None and r.weights[k] != 0 for r in requests))
        return found

    def follow(self, start: Start) -> Sequence[ScorerRuns]:
        """The scorers, at the prompts. Raises `UserError` for a prompt that leaves one no room."""
        scorers = [self._scorers[k] for k in self._running]
        for scorer, (request, prompt) in itertools.product(scorers, zip(start.requests, start.prompts, strict=True)):
            check_room(scorer, request.prompt.id, len(prompt), start.batch.room)
        room = start.batch.room + start.candidates
        asked = [sum(w != 0 for w in request.weights or ()) for request in start.requests]
        return [ScorerRuns([Batch(scorer, start.prompts, (), room) for scorer in scorers], asked, list(map(len, start.prompts)))]

    def shift(self, step: Step) -> torch.Tensor:
        """(1/beta) sum_k w_k v_k(s + a), [R, C]."""
        ids_RC = step.candidates_RC.clamp(max=self._known - 1)
        runs = _runs(step)
        shift_RC = torch.zeros_like(step.ref_logprobs_RC)
        for k, run in zip(self._running, runs.runs, strict=True):
            value_RC = self._heads[k](run.branch(ids_RC.to(run.lm.device))[run.lm.num_layers])[..., 0].float().to(shift_RC.device)
            weight_R1 = step.weights_RK[:, k : k + 1]
            shift_RC += torch.where(weight_R1 == 0, 0.0, weight_R1 * self._scale_K[k] * value_RC)
        runs.forwards_R = runs.forwards_R + runs.asked_R * ids_RC.shape[1]
        return shift_RC

    def advance(self, step: Step, choice_R: torch.Tensor) -> None:
        """Keep what the scorers computed for the chosen candidates; the policy runs them itself."""
        for run in _runs(step).runs:
            run.keep(choice_R.to(run.lm.device))


class ScorerRuns:
    """The scorers of one running batch: a follower of it (`models/rows.py`). A row is charged for those that have weight in it."""

    def __init__(self, runs: list[Batch], asked: list[int], prompt_tokens: list[int]) -> None:
        self.runs, self.asked_R = runs, torch.tensor(asked)
        self.forwards_R = self.asked_R * torch.tensor(prompt_tokens)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows."""
        for run in self.runs:
            run.select(rows.to(run.lm.device))
        self.forwards_R, self.asked_R = self.forwards_R[rows.cpu()], self.asked_R[rows.cpu()]

    @property
    def mergeable(self) -> bool:
        """Always: their layers attend to the full past."""
        return True

    def take(self, slots: torch.Tensor, other: ScorerRuns, rows: torch.Tensor) -> None:
        """Put the scorers' rows of another batch in place of these."""
        for mine, theirs in zip(self.runs, other.runs, strict=True):
            mine.take(slots.to(mine.lm.device), theirs, rows.to(mine.lm.device))
        self.forwards_R = self.forwards_R.index_copy(0, slots.cpu(), other.forwards_R[rows.cpu()])
        self.asked_R = self.asked_R.index_copy(0, slots.cpu(), other.asked_R[rows.cpu()])

    def mark(self, row: int) -> list[Mark]:
        """Where the scorers are in the row."""
        return [run.mark(row) for run in self.runs]

    def restore(self, row: int, marks: list[Mark]) -> None:
        """Bring the scorers back in the row; what they ran since stays counted."""
        for run, mark in zip(self.runs, marks, strict=True):
            run.restore(row, mark)


def _runs(step: Step) -> ScorerRuns:
    [runs] = step.batch.followers
    assert isinstance(runs, ScorerRuns)
    return runs
