"""Early rejection by segments, and the best of several blocks: parts of a response are judged before the rest is sampled.

A segment of tokens g is proposed after the prefix s, by any law of the token loop, and stays with probability

    A(s + g) = min(1, exp((r(s + g) - tau_t) / beta)),      r = sum_k w_k z_k of the text so far

else the row goes back to s and proposes again. Where segments end is a function of the tokens alone: after `longest` tokens,
or from `shortest` on before a token whose entropy under the reference (over the candidates) is at least `entropy` nats, and
with the response. So with any number of tries the law is exact,

    pi(y) = prod_j q(g_j | s_j) A(s_j + g_j) / Z(s_j),      Z(s) = sum_g q(g | s) A(s + g):

for one segment, and a tau that no reward passes, pi_ref exp(r / beta) / Z; for several, each segment's own tilt. After
`tries` proposals the best of them is taken; with tau = infinity always, so that equal lengths are controlled decoding by
blocks (the best of n blocks), and one whole response is best-of-n.

tau_t = tau_0 + (tau - tau_0) t / cap, t: tokens up to the segment's end, cap: the most that the request may have,
tau_0 = (1 - initial) r(empty) + initial tau.

What the choice costs in nats: for a segment that stays after m refusals, log A + sum_{i=1..m} 1/i, whose mean is
KL(q A / Z || q), since a geometric m with mean (1 - Z) / Z has E sum_{i<=m} 1/i = -log Z (exact without a limit on tries); for
one that was taken as the best of n, the bound log n - (n - 1)/n of best-of-n.

Papers: CARDS (arXiv 2406.16306); block-wise controlled decoding (arXiv 2310.17022). Departures: any law as proposal,
rewards of several objectives with weights per row; the refused tokens' keys stay in the cache, unseen, so that going back
and taking an earlier proposal run nothing again.
Reads: rewards. Writes: nothing. The weights enter: the choice among segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from equipoise.decoding.choosing import WeightedRewards
from equipoise.decoding.resampling import best_of_n_kl
from equipoise.models.generation import Guide, Sampling, generate, stream
from equipoise.models.hypotheses import Place, Row, Running, Stream
from equipoise.models.loading import LanguageModel
from equipoise.rollouts import request_seed
from equipoise.types import Request, Rollout, UserError


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Where segments end and which of them stay."""

    threshold: float
    """tau, in units of the score; infinity takes the best of all tries."""
    beta: float = 0.7
    """Divides how far a score stays below tau."""
    initial: float = 1.0
    """Share of tau that the first segment has to reach; CARDS takes 0.5."""
    entropy: float = 3.0
    """Nats from which on the next token begins a new segment."""
    shortest: int = 4
    """Fewest tokens of a segment, unless the response ends."""
    longest: int = 64
    """Most tokens of a segment."""
    tries: int = 20
    """Proposals of a segment, after which the best is taken."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"beta must be positive, got {self.beta:g}")
        if math.isnan(self.threshold) or not 0 <= self.initial <= 1:
            raise UserError(f"threshold must be a number and initial between 0 and 1, got {self.threshold:g} and {self.initial:g}")
        if self.initial < 1 and math.isinf(self.threshold):
            raise UserError(f"initial={self.initial:g} is a share of a finite threshold; set it to 1")
        if not 1 <= self.shortest <= self.longest:
            raise UserError(f"segments need 1 <= shortest <= longest, got {self.shortest} and {self.longest}")
        if self.tries < 1:
            raise UserError(f"tries must be at least 1, got {self.tries}")

    @classmethod
    def blocks(cls, length: int, n: int) -> Segments:
        """Controlled decoding by blocks: the best of n blocks of `length` tokens each."""
        return cls(threshold=math.inf, entropy=math.inf, shortest=length, longest=length, tries=n)

    def log_acceptance(self, score: float, tokens: int, cap: int, empty: float) -> float:
        """log A of a prefix of `tokens` tokens; -inf where it is unscored."""
        if math.isnan(score):
            return -math.inf
        begin = (1 - self.initial) * empty + self.initial * self.threshold if self.initial < 1 else self.threshold
        tau = begin + (self.threshold - begin) * tokens / cap if self.initial < 1 else self.threshold
        return min(0.0, (score - tau) / self.beta)


@dataclass
class _Trial:
    """A request's segment in the making."""

    start: Place
    uniforms: Stream
    weights: Sequence[float] | None
    empty: float = 0.0
    judged: int = 0
    tries: int = 0
    harmonic: float = 0.0
    """Sum of 1/i over the refusals of this segment."""
    best: tuple[float, Place] | None = None


@dataclass(frozen=True)
class _Text:
    """A response so far, as rewards read it."""

    id: str
    prompt_id: str
    text: str


class SegmentGate:
    """The gate of the token loop that proposes segments again until one stays; rows without weights are let through."""

    def __init__(self, segments: Segments, rewards: WeightedRewards, weights: dict[str, Sequence[float] | None]) -> None:
        self._segments, self._rewards, self._weights = segments, rewards, weights

    def review(self, loop: Running) -> bool:
        """Judge the rows whose segment has ended."""
        self._begin(loop, [at for at, row in enumerate(loop.rows) if row.job.notes is None])
        due = [at for at, ends in enumerate(self._ends(loop)) if ends]
        if not due:
            return False
        loop.count_followers()
        for at, score in zip(due, self._score(loop, due), strict=True):
            self._judge(loop, at, score)
        return True

    def _begin(self, loop: Running, rows: list[int]) -> None:
        for at in rows:
            job = loop.rows[at].job
            accepts = stream(request_seed(job.request.seed, "accept"))
            job.notes = _Trial(start=loop.place(at), uniforms=accepts, weights=self._weights[job.request.id])
        weighted = [at for at in rows if loop.rows[at].job.notes.weights is not None]
        if self._segments.initial < 1 and weighted:
            for at, score in zip(weighted, self._score(loop, weighted), strict=True):
                if math.isnan(score):
                    raise UserError("the rewards can't score an empty response, of which the first threshold is a share: set initial to 1")
                loop.rows[at].job.notes.empty = score

    def _ends(self, loop: Running) -> list[bool]:
        said = [len(row.tokens) - len(row.job.notes.start.row.tokens) for row in loop.rows]
        low, high = self._segments.shortest, self._segments.longest
        entropy_R = [0.0] * len(said)
        if math.isfinite(self._segments.entropy) and any(low <= count < high for count in said):
            ref_RC = loop.law[0].ref_logprobs_RC
            entropy_R = (-ref_RC.exp() * ref_RC.masked_fill(ref_RC.isneginf(), 0.0)).sum(dim=1).tolist()
        ends = [count >= high or (count >= low and h >= self._segments.entropy) for count, h in zip(said, entropy_R, strict=True)]
        free = [row.job.notes.weights is None for row in loop.rows]
        return [row.ended or (end and not plain) for row, end, plain in zip(loop.rows, ends, free, strict=True)]

    def _score(self, loop: Running, rows: list[int]) -> list[float]:
        asked = [at for at in rows if loop.rows[at].job.notes.weights is not None]
        found = dict.fromkeys(rows, math.nan)
        jobs = [loop.rows[at].job for at in asked]
        texts = [self._text(loop, loop.rows[at]) for at in asked]
        scores = self._rewards([job.request.prompt for job in jobs], texts, [job.notes.weights for job in jobs])
        for at, job, score in zip(asked, jobs, scores.tolist(), strict=True):
            found[at] = score
            job.reward_calls += self._rewards.calls(job.notes.weights)
        return [found[at] for at in rows]

    @staticmethod
    def _text(loop: Running, row: Row) -> _Text:
        request = row.job.request
        return _Text(request.id, request.prompt.id, row.text(loop.lm, loop.config.whole_sentences)[0])

    def _judge(self, loop: Running, at: int, score: float) -> None:
        row, segments = loop.rows[at], self._segments
        job, trial = row.job, row.job.notes
        if trial.weights is None:
            return loop.end(job, row)
        log_a = segments.log_acceptance(score, len(row.tokens), job.most, trial.empty)
        trial.tries, trial.judged = trial.tries + 1, trial.judged + 1
        stays = trial.uniforms[trial.judged - 1] < math.exp(log_a)
        if stays:
            job.choice_kl += log_a + trial.harmonic
        else:
            trial.harmonic += 1 / trial.tries
            # An unscored proposal is the best only where no other is scored.
            if trial.best is None or math.isnan(trial.best[0]) or score > trial.best[0]:
                trial.best = (score, loop.place(at))
            if trial.tries < segments.tries:
                return loop.restore(at, trial.start)
            loop.restore(at, trial.best[1])
            job.choice_kl += best_of_n_kl(segments.tries)
        trial.start, trial.tries, trial.harmonic, trial.best = loop.place(at), 0, 0.0, None
        if loop.rows[at].ended:
            loop.end(job, loop.rows[at])
        return None


@dataclass(frozen=True, kw_only=True)
class SegmentSampler:
    """A Sampler that judges segments of what the policy, guided or not, proposes."""

    lm: LanguageModel
    sampling: Sampling
    segments: Segments
    rewards: WeightedRewards
    guide: Guide | None = None
    progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if self.sampling.greedy and self.segments.tries > 1:
            raise UserError("greedy proposals of a segment are all the same: set greedy to false, or tries to 1")

    @property
    def objectives(self) -> tuple[str, ...]:
        """Of the rewards."""
        return self.rewards.objectives

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request; its forwards and reward calls are those of all proposals, its `kl` adds the choice's."""
        continued = next((r.id for r in requests if r.given), None)
        if continued is not None:  # the first threshold is a share of what an empty response scores
            raise UserError(f"request {continued!r} goes on with a given response, which segments can't judge: sample it in another way")
        steered = self.guide.objectives if self.guide else ()
        weighted = [r for r in requests if r.weights is not None]
        self.rewards.inner_requests(weighted, steered)
        asked = [r if self.guide else replace(r, weights=None) for r in requests]
        gate = SegmentGate(self.segments, self.rewards, {r.id: r.weights for r in requests})
        found = generate(self.lm, asked, self.sampling, self.guide, gate=gate, progress=self.progress)
        return [replace(rollout, weights=request.weights, kl_steps=()) for rollout, request in zip(found, requests, strict=True)]
