"""Which objective pushed each token: a guide that says, beside its shift, what each objective adds to it.

    push_k(a) = lambda_k (q_k(s, a) - sum_b pi_ref(b | s) q_k(s, b))       nats, b among the candidates

so that sum_k push_k(a) = log pi(a | s) - log pi_ref(a | s) up to a constant of the step: by how much each objective raised the token
against the average candidate. Guides whose shift is a sum over the objectives have `parts`; others aren't explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from equipoise.models.generation import Guide, Start, Step

if TYPE_CHECKING:
    import torch

    from equipoise.models.rows import Follower


@runtime_checkable
class Additive(Protocol):
    """A guide whose shift is a sum over the objectives."""

    def parts(self, step: Step) -> torch.Tensor:
        """lambda_k q_k(s, a), [R, C, K]."""
        ...


class Explained:
    """A guide, and what its objectives gave to the candidates of requests that want to know."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide
        self.objectives, self.layers = guide.objectives, guide.layers
        self._last: dict[str, tuple[list[int], list[list[float]]]] = {}

    @property
    def forwards_per_step(self) -> int:
        """The guide's."""
        return self._guide.forwards_per_step

    def follow(self, start: Start) -> Sequence[Follower]:
        """The guide's."""
        return self._guide.follow(start)

    def advance(self, step: Step, choice_R: torch.Tensor) -> dict[int, torch.Tensor] | None:
        """The guide's."""
        return self._guide.advance(step, choice_R)

    def shift(self, step: Step) -> torch.Tensor:
        """The guide's; the parts of those who asked are kept until the next step."""
        shift_RC = self._guide.shift(step)
        rows = [row for row, request in enumerate(step.requests) if request.explained]
        self._last = {}
        if rows and isinstance(self._guide, Additive):
            parts_RCK = self._guide.parts(step)[rows]
            mean_R1K = (step.ref_logprobs_RC[rows].exp()[:, :, None] * parts_RCK).sum(dim=1, keepdim=True)
            for row, own_CK in zip(rows, (parts_RCK - mean_R1K).tolist(), strict=True):
                self._last[step.requests[row].id] = (step.candidates_RC[row].tolist(), own_CK)
        return shift_RC

    def push(self, request_id: str, token: int) -> tuple[float, ...]:
        """Nats by objective of a candidate at the last step; none where nothing is known of it."""
        candidates, parts_CK = self._last.get(request_id, ([], []))
        return tuple(parts_CK[candidates.index(token)]) if token in candidates else ()
