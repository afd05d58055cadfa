"""Other models, or the same model under other prompts, that read along with a batch and speak through a rule.

A voice is a causal model: another one, the policy itself under a system message, or a model whose adapters read weights.
Voices of one model run together, a row per (row of the batch, voice), so that m adapters or m prompts cost one forward of
m times the rows. A voice that a row doesn't need, because its weight there is 0, isn't run for that row.

Every log-probability here is of temperature 1 and normalised over the policy's tokens. A voice's further tokens and padding
rows are left out; a token that a voice doesn't know, or knows under another id, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jinja2 import TemplateError  # transformers renders chat templates with it

from equipoise.models.chat import prompt_ids
from equipoise.models.generation import Start, Step, known_tokens
from equipoise.models.loading import LanguageModel
from equipoise.models.own_rows import OwnRows
from equipoise.models.rows import Batch
from equipoise.models.weighted_lora import objectives_of
from equipoise.types import Message, Prompt, Request, UserError


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A causal model that reads along."""

    lm: LanguageModel
    system: str = ""
    """A system message that it alone is given, in place of the prompt's own."""
    asked: Callable[[Request], Prompt] | None = None
    """The prompt that it alone is given, in place of the request's own: one that says the weights, perhaps."""
    condition: tuple[float, ...] | Literal["weights"] | None = None
    """What its weighted adapters read: these numbers, or each row's own weights."""

    def __post_init__(self) -> None:
        objectives = objectives_of(self.lm.model)
        if (objectives is None) != (self.condition is None):
            raise UserError(
                f"{self.lm.name!r} {'has no adapters that read weights' if objectives is None else 'reads weights: give its condition'}"
            )
        if objectives is not None and self.condition != "weights" and len(self.condition or ()) != len(objectives):
            raise UserError(f"{self.lm.name!r} reads weights on {', '.join(objectives)}, got {self.condition}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a rule sees of one step: R rows, C candidates, M voices; float64, nats."""

    ref_RC: torch.Tensor
    """log pi_ref of each candidate."""
    voice_RMC: torch.Tensor
    """log pi_m of each candidate; 0 where the row doesn't need the voice."""
    past_ref_R: torch.Tensor
    """log pi_ref of the response so far."""
    past_voice_RM: torch.Tensor
    """log pi_m of the response so far."""
    weights_RK: torch.Tensor
    """Each row's weights; 0 for rows without."""
    allowed_RC: torch.Tensor
    """Which candidates may be drawn."""


class Companions:
    """The voices of one running batch: a follower of it (`models/rows.py`)."""

    def __init__(self, voices: Sequence[Voice], start: Start, needed_RM: torch.Tensor) -> None:
        models = {id(voice.lm): voice.lm for voice in voices}
        members = [[m for m, voice in enumerate(voices) if id(voice.lm) == key] for key in models]
        self._groups = [_Group(lm, own, voices, start, needed_RM) for lm, own in zip(models.values(), members, strict=True)]
        self.forwards_R = torch.zeros(len(needed_RM), dtype=torch.long)
        for group in self._groups:
            self.forwards_R += group.prompt_tokens_R
        self.past_voice_RM = torch.zeros(needed_RM.shape, dtype=torch.float64, device=needed_RM.device)
        self.past_ref_R = self.past_voice_RM.new_zeros(len(needed_RM))
        self._last_ref_RC = self._last_voice_RMC = self.past_voice_RM.new_zeros(0)

    def read(self, step: Step, known: int) -> Reading:
        """All log-probabilities of the step's candidates."""
        ids_RC = step.candidates_RC.clamp(max=known - 1)
        logits_RV = step.logits_RV[:, :known].float()
        ref_RC = logits_RV.gather(1, ids_RC).double() - logits_RV.logsumexp(dim=1, keepdim=True).double()
        voice_RMC = torch.zeros((*self.past_voice_RM.shape, ids_RC.shape[1]), dtype=torch.float64, device=ids_RC.device)
        for group in self._groups:
            group.read(ids_RC, known, voice_RMC)
        self._last_ref_RC, self._last_voice_RMC = ref_RC, voice_RMC
        return Reading(
            ref_RC=ref_RC,
            voice_RMC=voice_RMC,
            past_ref_R=self.past_ref_R,
            past_voice_RM=self.past_voice_RM,
            weights_RK=step.weights_RK.double().nan_to_num(),
            allowed_RC=~step.ref_logprobs_RC.isneginf(),
        )

    def append(self, tokens_R: torch.Tensor, choice_R: torch.Tensor) -> None:
        """Feed each row's chosen candidate."""
        rows = torch.arange(len(choice_R), device=choice_R.device)
        self.past_voice_RM = self.past_voice_RM + self._last_voice_RMC[rows, :, choice_R]
        self.past_ref_R = self.past_ref_R + self._last_ref_RC[rows, choice_R]
        for group in self._groups:
            self.forwards_R += group.append(tokens_R)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows."""
        for group in self._groups:
            group.select(rows)
        self.forwards_R = self.forwards_R[rows.cpu()]
        self.past_voice_RM, self.past_ref_R = self.past_voice_RM[rows], self.past_ref_R[rows]
        if len(self._last_ref_RC):
            self._last_ref_RC, self._last_voice_RMC = self._last_ref_RC[rows], self._last_voice_RMC[rows]

    @property
    def mergeable(self) -> bool:
        """Whether all voices attend to the full past."""
        return all(group.mergeable for group in self._groups)

    def take(self, slots: torch.Tensor, other: Companions, rows: torch.Tensor) -> None:
        """Put the voices of another batch's rows in place of those of these."""
        for mine, theirs in zip(self._groups, other._groups, strict=True):
            mine.take(slots, theirs, rows)
        self.forwards_R = self.forwards_R.index_copy(0, slots.cpu(), other.forwards_R[rows.cpu()])
        self.past_voice_RM = self.past_voice_RM.index_copy(0, slots, other.past_voice_RM[rows])
        self.past_ref_R = self.past_ref_R.index_copy(0, slots, other.past_ref_R[rows])
        self._last_ref_RC = self._last_voice_RMC = self.past_ref_R.new_zeros(0)

    def mark(self, row: int) -> tuple[Any, ...]:
        """Where the row's voices are."""
        return (self.past_voice_RM[row].clone(), self.past_ref_R[row].clone(), *(group.mark(row) for group in self._groups))

    def restore(self, row: int, mark: tuple[Any, ...]) -> None:
        """Bring the row's voices back; what they ran since stays counted."""
        self.past_voice_RM, self.past_ref_R = self.past_voice_RM.clone(), self.past_ref_R.clone()
        self.past_voice_RM[row], self.past_ref_R[row] = mark[:2]
        for group, theirs in zip(self._groups, mark[2:], strict=True):
            group.restore(row, theirs)


class _Group(OwnRows):
    """The voices of one model: a batch of its own, a row per (row, voice) that is needed; none where none is."""

    def __init__(self, lm: LanguageModel, columns: list[int], voices: Sequence[Voice], start: Start, needed_RM: torch.Tensor) -> None:
        self.columns = columns
        needed_RG = needed_RM[:, columns]
        pairs = [(row, voices[columns[at]]) for row, at in needed_RG.nonzero().tolist()]
        prompts = [_asked(start, row, voice) for row, voice in pairs]
        self.prompt_tokens_R = torch.zeros(len(needed_RG), dtype=torch.long)
        for (row, _), prompt in zip(pairs, prompts, strict=True):
            self.prompt_tokens_R[row] += len(prompt)
        conditions = [start.weights_RK[row].tolist() if voice.condition == "weights" else voice.condition for row, voice in pairs]
        read_NK = None if not pairs or conditions[0] is None else torch.tensor(conditions, dtype=torch.float32, device=lm.device)
        super().__init__(lm, Batch(lm, prompts, (), start.batch.room, read_NK) if pairs else None, needed_RG)

    def read(self, ids_RC: torch.Tensor, known: int, into_RMC: torch.Tensor) -> None:
        """Write log pi_m of the candidates where the voices are needed."""
        if self.run is None:
            return
        rows, at = (self.place_RG >= 0).nonzero(as_tuple=True)
        logits_NV = self.lm.head(self.run.states[self.lm.num_layers])[:, :known].float()
        picked_NC = logits_NV.gather(1, ids_RC[rows].to(logits_NV.device)).double()
        logprobs_NC = picked_NC - logits_NV.logsumexp(dim=1, keepdim=True).double()
        into_RMC[rows, at.new_tensor(self.columns)[at]] = logprobs_NC.to(into_RMC.device)

    def append(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """Feed each row's token to all of its voices; returns how many that were, [R]."""
        there_RG = self.place_RG >= 0
        if self.run is not None:
            self.run.append(tokens_R[there_RG.nonzero(as_tuple=True)[0]].to(self.lm.device))
        return there_RG.sum(dim=1).cpu()


def _asked(start: Start, row: int, voice: Voice) -> Sequence[int]:
    """The prompt's tokens: the voice's own prompt, or the row's under its own system message, where it has one."""
    prompt, ids = start.requests[row].prompt, start.prompts[row]
    if voice.asked is not None:
        prompt = voice.asked(start.requests[row])
        ids = prompt_ids(start.batch.lm.tokenizer, prompt)
    if voice.system:
        rest = tuple(m for m in prompt.messages if m["role"] != "system")
        changed = replace(prompt, messages=(Message(role="system", content=voice.system), *rest))
        try:
            ids = prompt_ids(start.batch.lm.tokenizer, changed)
        except TemplateError as error:
            raise UserError(
                f"the chat template of {start.batch.lm.name!r} takes no system message ({error}): steer it in another way"
            ) from None
    check_room(voice.lm, prompt.id, len(ids), start.batch.room)
    return ids


def check_room(lm: LanguageModel, prompt_id: str, length: int, room: int) -> None:
    """Check that a prompt of `length` tokens and `room` more fit into a model's context. Raises `UserError` that names both."""
    if length + room > lm.context_length:
        raise UserError(
            f"prompt {prompt_id!r} has {length} tokens for {lm.name!r}; with {room} to come that exceeds its context of "
            f"{lm.context_length}: shorten the prompt or max_new_tokens"
        )


class CompanionGuide:
    """A guide (`models/generation.py`) whose law is a rule of the voices' log-probabilities.

    `rule` gives log pi(a) - log pi_ref(a), [R, C], up to a constant per row, at temperature 1; the sampling temperature T is
    applied to the law that it makes: pi_T proportional to pi^(1/T). `needed` says which voices [R, M] a row's
    weights [R, K] call for; those of rows without are NaN.
    """

    layers: tuple[int, ...] = ()
    forwards_per_step = 0

    def __init__(
        self,
        lm: LanguageModel,
        objectives: Sequence[str],
        voices: Sequence[Voice],
        needed: Callable[[torch.Tensor], torch.Tensor],
        rule: Callable[[Reading], torch.Tensor],
    ) -> None:
        if not voices:
            raise UserError("steering by other models needs at least one")
        self.objectives, self.voices, self._needed, self._rule = tuple(objectives), tuple(voices), needed, rule
        self._known = known_tokens(lm.tokenizer)
        for other in {id(voice.lm): voice.lm for voice in voices}.values():
            same_tokens(lm, other)

    def follow(self, start: Start) -> Sequence[Companions]:
        """The voices, at the prompts. Raises `UserError` for a request that goes on with a given response."""
        continued = next((request.id for request in start.requests if request.given), None)
        if continued is not None:  # the rules may read log-probabilities of the whole response
            raise UserError(f"request {continued!r} goes on with a given response, which other models can't steer: use values")
        needed_RM = self._needed(start.weights_RK.double())
        weighted_R1 = torch.tensor([[request.weights is not None] for request in start.requests], device=needed_RM.device)
        return [Companions(self.voices, start, needed_RM & weighted_R1)]

    def shift(self, step: Step) -> torch.Tensor:
        """(log pi - log pi_ref) / T of the candidates, [R, C]."""
        reading = _companions(step).read(step, self._known)
        shift_RC = self._rule(reading) / step.temperature
        # Constants per row change nothing, so the sizes of whole prefixes are taken out before float32.
        top_R1 = shift_RC.masked_fill(~reading.allowed_RC, float("-inf")).amax(dim=1, keepdim=True)
        return (shift_RC - top_R1).float()

    def advance(self, step: Step, choice_R: torch.Tensor) -> None:
        """Run the voices on what was drawn; the policy runs it itself."""
        _companions(step).append(step.candidates_RC.gather(1, choice_R[:, None])[:, 0], choice_R)


def _companions(step: Step) -> Companions:
    [companions] = step.batch.followers
    assert isinstance(companions, Companions)
    return companions


def same_tokens(lm: LanguageModel, other: LanguageModel) -> None:
    """Check that `other` knows every token of `lm` under the same id. Raises `UserError` that names the first it doesn't."""
    if other.tokenizer is not lm.tokenizer:
        theirs = other.tokenizer.get_vocab()
        for token, index in sorted(lm.tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if theirs.get(token) != index:
                found = f"there it is {theirs[token]}" if token in theirs else "which that one doesn't have"
                raise UserError(f"{other.name!r} has another tokenizer than {lm.name!r}: token {index} is {token!r} here, {found}")
    table = other.head if other.head is not None else other.model.get_input_embeddings()
    rows = int(table.weight.shape[0])
    if rows < known_tokens(lm.tokenizer):
        raise UserError(f"{other.name!r} has {rows} vocabulary rows for the {known_tokens(lm.tokenizer)} tokens of {lm.name!r}")
