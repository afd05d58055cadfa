"""What is served: methods by name, what of a request each of them reads, and the requests and replies that they make of it.

lambda = w / beta        a method that tilts by values or guides: its guide is made with beta 1, so that every row brings its own
                         strength, beta given or solved for the row's KL budget, and all of them share a batch
lambda = w               a policy, a soup or a mixture of models, which reads the weights themselves
lambda of the palette    targets: the grouped dual on the bank (palette/), which chooses among n candidates of the reference
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.decoding.choosing import candidate_requests, served
from equipoise.decoding.palette import choose, tilt
from equipoise.decoding.resampling import best_of_n, best_of_n_kl, resample, resampling_kl
from equipoise.models.steps import Guide, Sampling
from equipoise.objectives import linear, parse_weights
from equipoise.palette.banks import Bank
from equipoise.palette.quote import Quote, as_json, quote
from equipoise.rollouts import request_seed
from equipoise.serving.engine import Reply
from equipoise.stages.choosing import Choice
from equipoise.stages.ways import READ_BY, Way
from equipoise.types import Prompt, Request, UserError

if TYPE_CHECKING:
    from equipoise.objectives import Normaliser

Weights = Mapping[str, float] | Sequence[float]
Chooser = Callable[[Sequence[int], np.ndarray, np.ndarray], tuple[list[int], list[float], int]]
"""(seeds [R], rewards [R, N, K], the same standardised) of N candidates for each of R responses to
(candidates [R], nats that the choice costs [R], rewards that read each candidate)."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a client wants, of any method."""

    id: str
    prompt: Prompt
    ids: tuple[int, ...]
    """Tokens of the prompt."""
    n: int = 1
    seed: int = 0
    max_tokens: int = 64
    temperature: float = 1.0
    """0 takes the likeliest token."""
    weights: Weights | None = None
    targets: str | None = None
    """As `palette` reads them: helpful>=q70 harmless>=keep."""
    kl_budget: float | None = None
    beta: float | None = None
    completes: bool = False
    """Whether the prompt is continued as it is, without a chat template."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An ask as an offer serves it."""

    requests: tuple[Request, ...]
    """Those of one response together: its candidates."""
    candidates: int = 1
    """For each response."""
    choose: Chooser | None = None
    """Which candidates are served; without it, what is drawn."""
    objectives: tuple[str, ...] = ()
    """Of the rewards that choose, in their order."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the reply says of it: weights, multipliers, beta."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One method."""

    name: str
    about: str
    """A line for people."""
    objectives: tuple[str, ...] = ()
    """Of the weights; none where there is nothing to weigh."""
    key: Hashable = "reference"
    """Offers of equal keys draw their tokens by one guide."""
    guide: Guide | None = None
    scales: bool = False
    """Whether beta is read."""
    budgets: bool = False
    """Whether kl_budget is read."""
    strength: Mapping[str, float] = field(default_factory=dict)
    """kl_budget or beta of a request that gives neither."""
    fixed: tuple[float, ...] | None = None
    """The weights that a policy was trained at."""
    choice: Choice | None = None
    bank: Bank | None = None
    """Of a palette."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of a request that it reads."""
        weighed = bool(self.objectives) and self.fixed is None and self.bank is None
        found = {"weights": weighed, "targets": self.bank is not None, "kl_budget": self.budgets, "beta": self.scales}
        return tuple(name for name, there in found.items() if there)

    @property
    def explains(self) -> bool:
        """Whether it says what pushed each token."""
        from equipoise.serving.explaining import Additive

        return isinstance(self.guide, Additive) and self.choice is None

    def sampling(self, ask: Ask, top_k: int, places: int, most: int) -> Sampling:
        """How the ask's tokens are drawn."""
        greedy = ask.temperature == 0
        return Sampling(max_new_tokens=most, temperature=1.0 if greedy else ask.temperature, top_k=top_k, greedy=greedy, batch_size=places)

    def plan(self, ask: Ask, most_candidates: int) -> Plan:
        """The requests that the ask takes. Raises `UserError` for what the method doesn't read, and weights or targets that it can't."""
        self._check(ask)
        if self.bank is not None:
            return _palette(ask, quoted(self.bank, ask.targets or "", most_candidates), most_candidates)
        weights, row, facts = self._weights(ask)
        requests = responses_of(ask, row)
        if self.choice is None:
            return Plan(requests=tuple(requests), facts=facts)
        if ask.temperature == 0:
            raise UserError("temperature 0 leaves nothing to choose from: all candidates are alike")
        count = self.choice.n
        check_candidates(ask, count, most_candidates)
        assert weights is not None, "a choice has weights"
        return Plan(
            requests=tuple(candidate_requests(requests, count)),
            candidates=count,
            choose=_chooser(self.choice, weights),
            objectives=self.objectives,
            facts=facts | {"candidates": count},
        )

    def _check(self, ask: Ask) -> None:
        for name in ("weights", "targets", "kl_budget", "beta"):
            if getattr(ask, name) is not None and name not in self.reads:
                raise UserError(f"the method {self.name!r} doesn't read {name}; it reads {', '.join(self.reads) or 'nothing'}")
        if ask.kl_budget is not None and ask.beta is not None:
            raise UserError("kl_budget and beta both say how far to go: give one of them")
        if self.bank is not None and not (ask.targets or "").strip():
            raise UserError("targets are missing: write them as helpful>=q70 harmless>=keep")
        if ask.completes and _writes_prompts(self.guide):
            raise UserError(f"the method {self.name!r} writes into the conversation: ask it at /v1/chat/completions")

    def _weights(self, ask: Ask) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, dict[str, Any]]:
        """(weights, what the rows carry, what the reply says of it)."""
        if not self.objectives:
            return None, None, {}
        given = ask.weights if ask.weights is not None else [1 / len(self.objectives)] * len(self.objectives)
        weights = parse_weights(given, self.objectives) if self.fixed is None else self.fixed
        facts: dict[str, Any] = {"weights": dict(zip(self.objectives, weights, strict=True))}
        if self.guide is None:
            return weights, None, facts
        if not self.scales:
            return weights, weights, facts
        beta, budget = ask.beta, ask.kl_budget
        if beta is None and budget is None:
            beta, budget = self.strength.get("beta"), self.strength.get("kl_budget")
        if beta is None:
            assert budget is not None
            beta = self.guide.tilt.beta_for(tuple(round(w, 9) for w in weights), budget)  # type: ignore[attr-defined]
        row = tuple(w / beta for w in weights)
        if not all(math.isfinite(w) for w in row):
            raise UserError(f"beta={beta:g} is too small: the weights divided by it are infinite")
        facts |= {"beta": beta, "kl_budget": budget, "multipliers": dict(zip(self.objectives, row, strict=True))}
        return weights, row, facts


def responses_of(ask: Ask, weights: tuple[float, ...] | None = None) -> list[Request]:
    """A request for each of the ask's responses; the first has the ask's own seed."""
    seeds = [ask.seed if i == 0 else request_seed(ask.seed, f"response {i}") for i in range(ask.n)]
    return [
        Request(id=f"{ask.id}/{i}", prompt=ask.prompt, seed=seed, weights=weights, most_tokens=ask.max_tokens)
        for i, seed in enumerate(seeds)
    ]


def check_candidates(ask: Ask, each: int, most: int) -> None:
    """Check that a request isn't too large. Raises `UserError` that says by how much."""
    if ask.n * each > most:
        raise UserError(f"{ask.n} responses from {each} candidates each are {ask.n * each}, of at most {most}: lower n")


def offer_of(name: str, way: Way | None, settings: Mapping[str, Any], choice: Choice | None, guide: Guide | None) -> Offer:
    """The offer of a way to steer, made with kl_budget null and beta 1; `settings` are those of whoever offers it."""
    if choice is not None and choice.how not in ("best_of", "resampling"):
        raise UserError(f"method {name!r}: {choice.how} isn't served, as best_of and resampling are; use `sample` for it")
    kinds = [kind for kind in READ_BY["beta"] if settings.get(kind)]
    budgets = kinds == ["values"] and _calibrated(guide)
    strength: dict[str, float] = {}
    if kinds:
        budget = settings.get("kl_budget")
        strength = {"kl_budget": budget} if budgets and budget is not None else {"beta": settings.get("beta", 1.0)}
    objectives = way.objectives if way else ()
    return Offer(
        name=name,
        about=_describe(settings, choice),
        objectives=objectives,
        key=name if guide is not None else "reference",
        guide=guide,
        scales=bool(kinds),
        budgets=budgets,
        strength=strength,
        fixed=way.fixed if way and way.fixed else None,
        choice=choice,
    )


def _calibrated(guide: Guide | None) -> bool:
    tilt = getattr(guide, "tilt", None)
    return bool(tilt and tilt.calibrated)


def _describe(settings: Mapping[str, Any], choice: Choice | None) -> str:
    """A line for people; no path of the server's is in it."""
    steered = next((text for name, text in _STEERED.items() if settings.get(name)), "")
    chosen = f"{choice.how.replace('_', ' ')} {choice.n}" if choice else ""
    return ", then ".join(part for part in (steered, chosen) if part)


_STEERED = {
    "values": "steered by values of the next token (MAVIS)",
    "mixing": "tuned models, mixed by their logits (MOD)",
    "guides": "rewards that read along, token by token (GenARM, PARM)",
    "scorers": "reward models that read every candidate (ARGS, VAS)",
    "messages": "a contrast of system messages",
    "soup": "a weighted sum of adapters (rewarded soup)",
    "policy": "a tuned policy",
    "in_context": "a policy that is asked for scores (rewards-in-context)",
}


def _writes_prompts(guide: Guide | None) -> bool:
    return any(voice.asked or voice.system for voice in getattr(guide, "voices", ()))


def _chooser(choice: Choice, weights: tuple[float, ...]) -> Chooser:
    used = sum(weight != 0 for weight in weights)

    def pick(seeds: Sequence[int], reward_RNK: np.ndarray, z_RNK: np.ndarray) -> tuple[list[int], list[float], int]:
        score_RN = linear(z_RNK, weights)
        if choice.how == "best_of":
            return best_of_n(score_RN).tolist(), [best_of_n_kl(choice.n)] * len(seeds), used
        chosen = resample(score_RN, choice.beta, seeds)
        return chosen.tolist(), [resampling_kl(one[None], choice.beta) for one in score_RN], used

    return pick


# --- palettes


def quoted(bank: Bank, text: str, most: int) -> tuple[Quote, dict[str, Any]]:
    """The quote of targets, with as many candidates as the bank's prompts have samples, at most so many.

    Raises `UserError` for targets that can't be read or had, naming the nearest that can.
    """
    found = quote(bank, text, n=min(bank.common_size, most), n_boot=0)
    said = as_json(found, bank)
    if found.solution is None:
        near = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v[0]:.3g} to {v[1]:.3g}" for k, v in said["nearest"].items())
        raise UserError(f"these targets can't be had together (by {-found.certificate.margin_sd:.2f} sd); the nearest levels are {near}")
    return found, said


def _palette(ask: Ask, found: tuple[Quote, dict[str, Any]], most: int) -> Plan:
    priced, said = found
    assert priced.solution is not None
    assert priced.n is not None
    names, multiplier_K, count = priced.targets.objectives, priced.solution.multiplier_K, priced.n
    check_candidates(ask, count, most)

    def pick(seeds: Sequence[int], reward_RNK: np.ndarray, z_RNK: np.ndarray) -> tuple[list[int], list[float], int]:
        chosen = choose(reward_RNK, multiplier_K, seeds)
        score_RN = tilt(reward_RNK, multiplier_K)
        return chosen.tolist(), [resampling_kl(one[None], 1.0) for one in score_RN], len(names)

    facts = {
        "targets": priced.ask,
        "multipliers": dict(zip(names, multiplier_K.tolist(), strict=True)),
        "levels": {name: said["levels"][name] for name in names},
        "asked": said["targets"],
        "sd": said["sd"],
        "base": said["base"],
        "candidates": count,
        "warnings": said["warnings"],
    }
    requests = tuple(candidate_requests(responses_of(ask), count))
    return Plan(requests=requests, candidates=count, choose=pick, objectives=names, facts=facts)


def replied(ask: Ask, plan: Plan, replies: Sequence[Reply], reward_NK: np.ndarray, z_NK: np.ndarray) -> list[tuple[Reply, int]]:
    """What is served: a reply for each response, and which of the candidates it is; the rewards are those of the plan's objectives."""
    if plan.choose is None:
        return [(reply, at) for at, reply in enumerate(replies)]
    requests, n = responses_of(ask), plan.candidates
    shape = (ask.n, n, len(plan.objectives))
    chosen, nats, calls = plan.choose([r.seed for r in requests], reward_NK.reshape(shape), z_NK.reshape(shape))
    found = []
    for i, (request, at, kl) in enumerate(zip(requests, chosen, nats, strict=True)):
        own, drawn = replies[i * n : (i + 1) * n], plan.requests[i * n].weights
        rollout = served(replace(request, weights=drawn), [one.rollout for one in own], at, kl, n * calls)
        found.append((replace(own[at], rollout=rollout), i * n + at))
    return found


def standardised(reward_NK: np.ndarray, scale: Normaliser | None) -> np.ndarray:
    """Rewards in standard deviations of the reference's; as they are where no statistics are known."""
    return reward_NK if scale is None else scale(reward_NK)
