"""Bodies of requests, as OpenAI's API has them, with fields of our own: weights, targets, method, kl_budget, beta, explain, scores.

Fields that would change the answer and that we don't serve are refused by name; those that change nothing are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, model_validator

_IGNORED = (
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "logprobs": (False, None),
    "top_logprobs": (None,),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": (None, ""),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
}
"""Fields of OpenAI's with the values that ask for nothing."""


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Part(BaseModel):
    """A part of a message; text alone is read."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text


class Turn(BaseModel):
    """A message."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = None

    @property
    def text(self) -> str:
        """What it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What else a stream brings."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class Asked(BaseModel):
    """What both kinds of completions share."""

    model_config = ConfigDict(extra="forbid")

    model: Text = ""
    """A base model's name, or BASE:METHOD."""
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    user: Text | None = None
    """Whose turn it is: clients share the server fairly."""
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    method: Text | None = None
    """A method's name, where `model` doesn't say it."""
    weights: dict[Text, Weight] | list[Weight] | None = None
    """By objective, or in the order of the method's objectives; they sum to 1."""
    targets: Text | list[Text] | dict[Text, Text] | None = None
    """Outcomes in place of weights: "helpful>=q70 harmless>=keep", a list of such terms, or {"helpful": ">=q70"}."""
    kl_budget: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    """Nats per response that the steering may spend."""
    beta: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """Divides the values, in place of a budget."""
    explain: StrictBool = False
    """Say which objective pushed each token."""
    scores: StrictBool = True
    """Score the responses on every objective."""

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        """Take out what asks for nothing; what is left over is refused as unknown, or as not served."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in _IGNORED:
                continue
            if name in _NEUTRAL:
                if value not in _NEUTRAL[name]:
                    raise ValueError(f"{name} isn't served: leave it away")
                continue
            kept[name] = value
        return kept

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a response."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def ask(self) -> str | None:
        """The targets as one text."""
        if isinstance(self.targets, dict):
            return " ".join(f"{name}{wish}" for name, wish in self.targets.items())
        return " ".join(self.targets) if isinstance(self.targets, list) else self.targets


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(Asked):
    """The body of /v1/completions."""

    prompt: Text
    """A text to be continued as it is, without a chat template."""
