"""Beam search under any law of the token loop: the likeliest responses of many prompts, in the loop's own batches.

For each prompt up to `beams` prefixes are kept. A step ranks every candidate of every one of them by

    logprob   score(s) = sum_t log pi(a_t | s_t)                              the steered law, the reference's without a guide
    value     score(s) = log pi_ref(s) + shift(s),  shift = (1/beta) sum_k w_k v_k(s)      MAVIS: the value of the prefix itself

where pi_ref is restricted to its candidates. Of the best `beams` the finished ones leave for the pool, and the best `beams`
unfinished go on. A finished response of n tokens counts score / n^length_power: 0 takes the likeliest response itself, 1 the
mean per token. The search ends when the pool's best can't be beaten: scores of `logprob` only fall, so that no continuation
exceeds score / cap^length_power, the cap being the request's own. With beams for the whole tree and length_power = 0 the argmax
is exact; one beam is greedy. Given tokens are continued; they count neither in the score nor in n.

`value` needs a guide whose shifts are values of prefixes, comparable between rows and lengths: `ScorerGuide`, and
`ValueModelGuide` where no step is skipped; value heads know differences at one step alone. The sum of logprob would count every
step's normaliser log Z(s_t) against a prefix. It runs to the cap or until nothing goes on.

The response is one point, whose KL from the reference is -log pi_ref(y): that is its `kl` and `kl_floor`, as for greedy
decoding; `logprobs` are the steered law's, so that MAVIS's estimate is sum(logprobs) - sum(ref_logprobs).

Paper: MAVIS (arXiv 2508.13415), whose first code searched with beams. Departures: every candidate of a beam is ranked, where it drew one
per beam; the value form keeps log pi_ref beside the value, which alone forgets how unlikely a prefix is; the policy runs once a
step, not twice, and beams of all prompts share a batch.
Reads: models. Writes: nothing. The weights enter: the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from equipoise.models.generation import Guide, Sampling, Step, generate
from equipoise.models.hypotheses import Job, Row, by_job
from equipoise.models.loading import LanguageModel
from equipoise.types import Request, Rollout, UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Beams:
    """How wide the search is, and what counts."""

    beams: int = 4
    """Prefixes that are kept for each prompt."""
    score: Literal["logprob", "value"] = "logprob"
    """The steered law's log-probability, or the reference's and the prefix's value."""
    length_power: float = 0.0
    """A finished score is divided by its tokens to this power."""

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise UserError(f"beams must be at least 1, got {self.beams}")
        if self.score not in ("logprob", "value"):
            raise UserError(f"beams are ranked by logprob or value, not by {self.score!r}")
        if not self.length_power >= 0:
            raise UserError(f"length_power must be at least 0, got {self.length_power:g}")


class BeamSearch:
    """The search of the token loop (`models/hypotheses.py`)."""

    def __init__(self, beams: Beams, eos_ids: frozenset[int]) -> None:
        self.width, self._beams, self._eos = beams.beams, beams, eos_ids

    def extend(self, rows: Sequence[Row], law_RC: torch.Tensor, step: Step) -> tuple[list[int], torch.Tensor, list[float]]:
        """The best continuations of each request: finished ones among its best `beams`, and as many unfinished ones."""
        import torch

        origin: list[int] = []
        choice: list[int] = []
        scores: list[float] = []
        begin = 0
        for job, own in by_job(rows):
            at = slice(begin, begin + len(own))
            score_RC = self._scores(own, law_RC[at], step, at)
            ends_RC = torch.isin(step.candidates_RC[at], torch.tensor(sorted(self._eos), device=law_RC.device))
            if len(own[0].tokens) + 1 == job.most:
                ends_RC = torch.ones_like(ends_RC)
            count = min(score_RC.numel(), self.width + int(ends_RC.sum()))
            best, flat = score_RC.flatten().topk(count)
            going = 0
            for rank, (score, index) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
                row, candidate = divmod(index, score_RC.shape[1])
                ends = bool(ends_RC[row, candidate])
                if score == float("-inf") or (rank >= self.width if ends else going == self.width):
                    continue
                going += not ends
                origin.append(begin + row)
                choice.append(candidate)
                scores.append(score)
            begin += len(own)
        return origin, torch.tensor(choice, device=law_RC.device), scores

    def _scores(self, own: Sequence[Row], law_RC: torch.Tensor, step: Step, at: slice) -> torch.Tensor:
        if self._beams.score == "logprob":
            past_R1 = law_RC.new_tensor([[sum(row.logprobs)] for row in own]).double()
            return past_R1 + law_RC
        past_R1 = law_RC.new_tensor([[sum(row.ref_logprobs) + row.kl_floor] for row in own]).double()
        shift = 0.0 if step.shift_RC is None else step.shift_RC[at]
        return past_R1 + step.ref_logprobs_RC[at] + shift

    def _counts(self, row: Row) -> float:
        return row.score / len(row.tokens) ** self._beams.length_power

    def over(self, job: Job, going: Sequence[Row]) -> bool:
        """Whether no continuation can count more than the best finished response; scores of values may rise, so that it never is."""
        if self._beams.score == "value" or not job.pool:
            return False
        return max(row.score for row in going) / job.most**self._beams.length_power <= max(map(self._counts, job.pool))

    def best(self, job: Job) -> Row:
        """The finished response that counts most."""
        return max(job.pool, key=self._counts)


@dataclass(frozen=True, kw_only=True)
class BeamSampler:
    """A Sampler that returns what the search finds: one response per request, whatever its seed."""

    lm: LanguageModel
    sampling: Sampling
    beams: Beams
    guide: Guide | None = None
    progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if self.sampling.greedy:
            raise UserError("greedy leaves a law of one token, in which there is nothing to search: set it to false, beams=1 is greedy")
        if self.beams.score == "value" and not getattr(self.guide, "of_prefixes", False):
            raise UserError(
                "ranking beams by value needs values of prefixes, as of scorers and of value models never skipped: use score=logprob"
            )

    @property
    def objectives(self) -> tuple[str, ...]:
        """The guide's."""
        return self.guide.objectives if self.guide else ()

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request; its forwards are those of all beams."""
        search = BeamSearch(self.beams, self.lm.eos_ids)
        found = generate(self.lm, requests, self.sampling, self.guide, search=search, progress=self.progress)
        return [replace(r, kl=-sum(r.ref_logprobs) - r.kl_floor, kl_steps=()) for r in found]
