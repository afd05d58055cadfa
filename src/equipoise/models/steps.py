"""One step of the token loop: what a guide sees of it, its candidates, and the law that is drawn from.

At each step t the policy's logits over the full vocabulary at temperature T give log pi_ref(. | s_t); the k most likely
tokens are the candidates C_t, and a guide may add `shift_RC` (nats) to their log-probabilities:

    pi(a | s_t) = pi_ref(a | s_t) exp(shift(a)) / sum_{b in C_t} pi_ref(b | s_t) exp(shift(b)),   a in C_t.

Then KL(pi || pi_ref) = KL(pi || pi_ref restricted to C_t) + (-log pi_ref(C_t)) holds exactly at every step; the two parts
are summed apart, as `kl` (the price of the tilt) and `kl_floor` (the price of top-k, which every method pays).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from equipoise.models.rows import Batch, Follower
from equipoise.types import Request, UserError

if TYPE_CHECKING:
    import torch

    from equipoise.models.hypotheses import Row
    from equipoise.models.loading import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the same for every method that is compared."""

    max_new_tokens: int = 40
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Divides the reference's logits; the tilted policy's reference is the tempered one."""
    top_k: int = 40
    """Candidates per step, 0 for the whole vocabulary."""
    greedy: bool = False
    """Whether the likeliest candidate is taken instead of a draw; the law whose KL is stated is then all on that one."""
    allow_eos_first: bool = False
    """Whether a response may be empty."""
    whole_sentences: bool = True
    """Whether a response that ran into the cap is scored and shown up to its last whole sentence only."""
    batch_size: int = 32
    """Rows decoded together."""

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise UserError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise UserError(f"temperature must be positive, got {self.temperature}")


@dataclass
class Step:
    """What a guide sees of one step: R rows still running, C candidates each."""

    candidates_RC: torch.Tensor
    """Token ids, most likely first."""
    ref_logprobs_RC: torch.Tensor
    """log pi_ref restricted to the candidates (sums to 1 over C)."""
    states: dict[int, torch.Tensor]
    """Layer -> hidden state [R, D] of s_t, for the layers the guide asked for."""
    weights_RK: torch.Tensor
    """Each row's weights; rows without weights are NaN and are not shifted."""
    length_R: torch.Tensor
    """Response tokens of each row so far, given ones included."""
    batch: Batch
    """The running batch, for guides that run candidates through the policy, or whose own state follows its rows."""
    requests: Sequence[Request]
    """What each row answers."""
    prompts: Sequence[Sequence[int]]
    """Token ids of each row's prompt, the response tokens that its request gave among them."""
    responses: Sequence[Sequence[int]]
    """Token ids that were drawn for each row so far."""
    logits_RV: torch.Tensor
    """The policy's own logits, before temperature and bans; -inf where the tokenizer has no token."""
    temperature: float
    """By which the reference of `ref_logprobs_RC` is tempered."""
    shift_RC: torch.Tensor | None = None
    """What the guide added, once it was asked."""

    def select(self, rows: torch.Tensor) -> Step:
        """The step of these rows, in this order and as often as they are named."""
        listed = rows.tolist()
        kept: dict[str, Any] = {name: getattr(self, name)[rows] for name in _TENSORS}
        kept |= {name: [getattr(self, name)[row] for row in listed] for name in ("requests", "prompts", "responses")}
        return replace(self, states={layer: states[rows] for layer, states in self.states.items()}, shift_RC=None, **kept)


_TENSORS = ("candidates_RC", "ref_logprobs_RC", "weights_RK", "length_R", "logits_RV")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a guide sees of requests whose prompts were just run, all of which will be rows of one batch."""

    batch: Batch
    requests: Sequence[Request]
    prompts: Sequence[Sequence[int]]
    """As in `Step`."""
    weights_RK: torch.Tensor
    """As in `Step`."""
    candidates: int
    """How many each step will have."""


class Guide(Protocol):
    """Adds nats to the candidates' log-probabilities.

    A guide with states per row returns them from `follow` and finds them in `step.batch.followers`; rows leave them, come back
    and are taken over with those of the batch, and their forwards are counted.
    """

    objectives: tuple[str, ...]
    layers: tuple[int, ...]
    """Hidden states that `shift` reads."""

    def follow(self, start: Start) -> Sequence[Follower]:
        """The guide's own states of new rows, none where it has none."""
        ...

    def shift(self, step: Step) -> torch.Tensor:
        """Nats to add to each candidate's log-probability, [R, C]."""
        ...

    def advance(self, step: Step, choice_R: torch.Tensor) -> dict[int, torch.Tensor] | None:
        """States after the chosen candidates where the guide already has them, else None; only rows that keep their places are left."""
        ...

    @property
    def forwards_per_step(self) -> int:
        """Backbone tokens per row and step that the guide itself runs."""
        ...


def branches(lm: LanguageModel, config: Sampling) -> int:
    """Candidates of a step."""
    rows = int(lm.head.weight.shape[0])
    return min(config.top_k or rows, rows)


def known_tokens(tokenizer: Any) -> int:
    """Ids below this may be tokens; rows of a vocabulary matrix from here on are padding that is never drawn."""
    return max(tokenizer.get_vocab().values()) + 1


def candidates(batch: Batch, weights_RK: torch.Tensor, rows: Sequence[Row], known: int, config: Sampling) -> tuple[Step, torch.Tensor]:
    """The step's candidates, and -log of their mass under the reference."""
    import torch

    raw_RV = batch.lm.head(batch.states[batch.lm.num_layers]).float()
    raw_RV[:, known:] = float("-inf")
    logits_RV = raw_RV / config.temperature if config.temperature != 1.0 else raw_RV
    lengths = [len(row.job.request.given) + len(row.tokens) for row in rows]
    length_R = torch.tensor(lengths, device=logits_RV.device)
    if not config.allow_eos_first and 0 in lengths:
        ends_V = torch.zeros(logits_RV.shape[1], dtype=torch.bool, device=logits_RV.device)
        ends_V[sorted(batch.lm.eos_ids)] = True
        logits_RV = logits_RV.masked_fill((length_R == 0)[:, None] & ends_V, float("-inf"))
    top_RC, candidates_RC = torch.topk(logits_RV, branches(batch.lm, config), dim=-1)
    mass_R = torch.logsumexp(top_RC, dim=-1)
    floor_R = torch.logsumexp(logits_RV, dim=-1) - mass_R
    step = Step(
        candidates_RC=candidates_RC,
        ref_logprobs_RC=top_RC - mass_R[:, None],
        states=batch.states,
        weights_RK=weights_RK,
        length_R=length_R,
        batch=batch,
        requests=[row.job.request for row in rows],
        prompts=[row.job.prompt for row in rows],
        responses=[tuple(row.tokens) for row in rows],
        logits_RV=raw_RV,
        temperature=config.temperature,
    )
    return step, floor_R


def law_of(guide: Guide | None, step: Step, greedy: bool) -> torch.Tensor:
    """log pi of the candidates, [R, C]. Raises `UserError` for a guide that returns NaN or infinity."""
    import torch

    law_RC = step.ref_logprobs_RC
    if guide is not None:
        # What the reference can't say stays unsaid, whatever is added; rows without weights are the reference's.
        plain_R1 = torch.tensor([[request.weights is None] for request in step.requests], device=law_RC.device)
        aside_RC = plain_R1 | law_RC.isneginf()
        shift_RC = guide.shift(step).masked_fill(aside_RC, 0.0)
        bad = ~torch.isfinite(shift_RC).all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise UserError(
                f"{type(guide).__name__} on {', '.join(guide.objectives)} returned NaN or infinity for prompt "
                f"{step.requests[row].prompt.id!r} (request {step.requests[row].id!r}) at token {int(step.length_R[row])}: "
                "check its heads or models"
            )
        step.shift_RC = shift_RC
        law_RC = torch.log_softmax(law_RC + shift_RC, dim=-1)
    if greedy:
        best_R1 = law_RC.argmax(dim=-1, keepdim=True)
        law_RC = torch.full_like(law_RC, float("-inf")).scatter(1, best_R1, 0.0)
    return law_RC


def invert_cdf(logprobs_RC: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """The first candidate whose cumulative probability exceeds the row's uniform."""
    import torch

    cdf_RC = logprobs_RC.double().exp().cumsum(dim=-1)
    u_R = torch.as_tensor(np.asarray(uniforms), dtype=torch.float64, device=logprobs_RC.device)
    # Scaled by the last entry, so that rounding of the sum can't push a draw past the end.
    choice_R = (cdf_RC <= (u_R * cdf_RC[:, -1])[:, None]).sum(dim=-1)
    return choice_R.clamp(max=logprobs_RC.shape[-1] - 1)
