"""Records that every layer shares, and the protocols between layers.

Axes: B batch, T tokens, V vocabulary, D hidden, K objectives, N responses, P prompts, C candidates.
Objectives are always maximised; unscored is NaN. `beta` always means pi proportional to pi_ref * exp(r / beta).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch


class UserError(ValueError):
    """Bad input or a broken environment: one line that names the value and the remedy; the CLI exits with 2."""


class Message(TypedDict):
    """One turn of a conversation: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that waits for an assistant's turn."""

    id: str
    messages: tuple[Message, ...]
    split: str = ""
    """The split that the data's author gave it ("train", "test"), or "" where there is none."""

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"] if self.messages else ""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two responses to one prompt, of which `chosen` is better on `objective`."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    objective: str
    margin: float | None = None
    """By how much, where the data says so; in the units of the reward that learns from it."""


@dataclass(frozen=True, kw_only=True)
class LabelledPair:
    """Two responses to one prompt, with which of them is better on each of K objectives.

    `label_K` is 1 where the first response is better, -1 where the second is, 0 where they tie, NaN where nobody said.
    Raises `UserError` for other labels, or another number of them than objectives.
    """

    id: str
    """Of the two responses: the same for every objective."""
    prompt: Prompt
    responses: tuple[str, str]
    objectives: tuple[str, ...]
    label_K: tuple[float, ...]
    finished: tuple[bool, bool] = (True, True)
    """Whether each response ended by itself; one that was cut at a cap is trained on without the token that ends a turn."""

    def __post_init__(self) -> None:
        if len(self.label_K) != len(self.objectives) or len(set(self.objectives)) != len(self.objectives):
            raise UserError(
                f"pair {self.id}: {len(self.label_K)} labels for the objectives {self.objectives}; give one each, all named once"
            )
        for name, label in zip(self.objectives, self.label_K, strict=True):
            if label not in (-1, 0, 1) and label == label:
                raise UserError(f"pair {self.id}: {name} is labelled {label!r}; labels are 1, -1, 0 (a tie) and NaN (unlabelled)")
        if len(self.responses) != 2:
            raise UserError(f"pair {self.id} has {len(self.responses)} responses; it needs two")

    def pair(self, objective: str) -> Pair | None:
        """The pair as this objective orders it; None on a tie and where it is unlabelled. Raises `UserError` for an unknown one."""
        if objective not in self.objectives:
            raise UserError(f"pair {self.id} has no objective {objective!r}; it is labelled on {', '.join(self.objectives)}")
        label, (first, second) = self.label_K[self.objectives.index(objective)], self.responses
        if label not in (-1, 1):
            return None
        chosen, rejected = (first, second) if label == 1 else (second, first)
        return Pair(id=self.id, prompt=self.prompt, chosen=chosen, rejected=rejected, objective=objective)

    @property
    def conflict(self) -> bool:
        """Whether its labels are not unanimous; ties and unlabelled objectives have no say."""
        return {1, -1} <= set(self.label_K)


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """What was rated and on which scale; larger is more of it."""

    name: str
    low: float
    high: float
    levels: bool = True
    """Whether the scale has whole steps (1, 2, .., 5), whose unit values are the centres of equal bins as in ArmoRM's data;
    without, low is 0 and high is 1."""

    def to_unit(self, rating: np.ndarray) -> np.ndarray:
        """The rating in [0, 1]: (x - low + 1/2) / (high - low + 1) for steps, (x - low) / (high - low) else."""
        half = 0.5 if self.levels else 0.0
        return (rating - self.low + half) / (self.high - self.low + 2 * half)

    def from_unit(self, unit: np.ndarray) -> np.ndarray:
        """The inverse of `to_unit`; a prediction outside [0, 1] lands outside the scale."""
        half = 0.5 if self.levels else 0.0
        return unit * (self.high - self.low + 2 * half) + self.low - half


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to be sampled: what a `Sampler` is given, a row at a time."""

    id: str
    """Unique within a run; becomes the rollout's id."""
    prompt: Prompt
    seed: int
    """Fixes the row's random numbers, whatever batch it lands in."""
    weights: tuple[float, ...] | None = None
    """The point of the simplex in the order of the sampler's objectives; None samples the reference."""
    given: tuple[int, ...] = ()
    """Response tokens that are there already and are to be continued."""
    most_tokens: int | None = None
    """Most tokens to draw, where that is less than the sampler's cap leaves."""
    explained: bool = False
    """Whether somebody wants to know what pushed each token; changes nothing that is drawn."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response with what is needed to price it."""

    id: str
    prompt_id: str
    tokens: tuple[int, ...]
    """Response tokens that were drawn, the end-of-turn token included; those that the request gave are not among them.
    None where a server drew the response (`decoding/upstream.py`), which says neither tokens nor their log-probabilities."""
    text: str
    """What is scored and shown, given tokens included; of a response that ran into the length cap, up to its last whole sentence."""
    text_tokens: int
    """How many tokens, given ones included, make up `text`; of a server's response, how many it says that it drew, 0 if it doesn't."""
    logprobs: tuple[float, ...]
    """log pi(token) under the distribution that was sampled from, nats."""
    ref_logprobs: tuple[float, ...]
    """log pi_ref(token) over the full vocabulary at the sampling temperature, nats."""
    kl: float
    """sum_t KL(pi(.|s_t) || pi_ref restricted to the same candidates), exact, nats: the price of the tilt."""
    kl_floor: float
    """sum_t -log(mass of the candidates under pi_ref), nats: the price of truncating to the top k, paid by every method."""
    finish_reason: Literal["stop", "length"]
    weights: tuple[float, ...] | None
    seed: int
    base_forwards: int
    """Tokens through the policy's backbone for this response; the prompt counts in each, though samples may share its run.
    0 where a server drew it and doesn't count them."""
    guide_forwards: int = 0
    """Tokens that went through a backbone only to score candidates."""
    reward_calls: int = 0
    """Texts that rewards scored to choose this response, once for each reward."""
    prompt_tokens: int = 0
    """How many of `base_forwards` read the prompt, which a choice among candidates for it reads once; 0 where nobody said."""
    parent_id: str | None = None
    kl_steps: tuple[float, ...] = field(default=(), compare=False, metadata={"stored": False})
    """The terms of `kl`, a token each; none where it also prices a choice among responses or parts of them. Not kept in shards."""

    @property
    def log_ratio(self) -> float:
        """log pi(y) - log pi_ref(y) - kl_floor, nats: `kl` is its mean under pi, but not under a choice among pi's responses."""
        return sum(self.logprobs) - sum(self.ref_logprobs) - self.kl_floor

    @property
    def length(self) -> int:
        """How many tokens were drawn, as far as that is known."""
        return len(self.tokens) or self.text_tokens


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Scores of N responses on K objectives; NaN where a scorer could not say."""

    reward_NK: np.ndarray
    objectives: tuple[str, ...]
    rollout_ids: tuple[str, ...]
    digest: str
    """SHA-256 over the rollouts that were scored, so that scores are never paired with other texts."""


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """What one method delivers at one weight vector, averaged over prompts."""

    method: str
    weights: tuple[float, ...] | None
    objectives: tuple[str, ...]
    reward_mean_K: tuple[float, ...]
    """In standard deviations of the reference's reward, 0 = the reference's mean."""
    stderr_K: tuple[float, ...]
    """Over prompts (cluster means), not over responses."""
    kl: float
    kl_floor: float
    cost: float
    """Backbone tokens per prompt, relative to one plain response of the same sampler settings."""
    n: int
    n_unscored: int


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What a loss says of a batch."""

    loss: torch.Tensor
    """A scalar: the mean over the batch's rows."""
    logged: Mapping[str, torch.Tensor | float] = field(default_factory=dict)
    """Scalars for the log, means over the rows too."""


class Response(Protocol):
    """What scoring reads of a response: a `Rollout`, or a text that wasn't sampled here."""

    @property
    def id(self) -> str:
        """Unique among what is scored together."""
        ...

    @property
    def prompt_id(self) -> str:
        """Of the prompt that it answers."""
        ...

    @property
    def text(self) -> str:
        """What is scored."""
        ...


class Sampler(Protocol):
    """Prompts and weights to rollouts, one rollout per request, in the order of the requests."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """In the order of the requests' weights."""
        ...

    def __call__(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order."""
        ...


class Reward(Protocol):
    """Scores responses: `reward(prompts, responses)` gives N numbers, larger is better, NaN for unscored."""

    name: str

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """Scores of the N responses, [N]."""
        ...
