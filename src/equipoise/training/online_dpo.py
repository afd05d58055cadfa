"""Online DPO for several objectives: preferences between the policy's own responses, by their rewards at the prompt's weights.

    L = mean_(i, j) P_ij l(beta z_ij) + P_ji l(-beta z_ij),      z_ij = Delta(y_i) - Delta(y_j),  Delta(y) = log pi(y|x) - log pi_ref(y|x)
    P_ij = sigmoid(s_i - s_j)        soft labels: Bradley and Terry's law of the scalarised rewards s(r, w), in sd of the reference's
         = 1 if s_i > s_j, else 0    hard labels: the better one is preferred, by however little

over a prompt's G responses, all pairs or the best against the worst. With soft labels and the sigmoid the minimum has
beta z_ij = s_i - s_j for all pairs that are ever drawn: pi proportional to pi_ref exp(s / beta), at every w where the policy reads the
weights. Hard labels have no finite minimum and only order responses: beta and the number of steps say how far that goes.

Paper: MO-ODPO (2503.00295). Departures: a vector of weights per prompt, where the released port draws one per step; soft labels by
default; standardised rewards; the reference reads the plain prompt; one function writes the prompt in training and in serving, where the
port trains "helpful, safe, funny" and serves "help, harm, humor".
Reads: prompts, rewards, frozen statistics. Writes: adapter/ or model/, card.json, and what `on_policy` writes.
The weights enter: the rewards, and the prompt or the parameters of the policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from equipoise.training import dpo, on_policy
from equipoise.training.completion_rows import Row, row_logprobs
from equipoise.training.learner import Learner
from equipoise.types import LossOutput, UserError

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which pairs are made of a prompt's responses, and what is learnt from them."""

    pairs: Literal["all", "extremes"] = "all"
    """All pairs of a prompt's responses, or its best against its worst."""
    labels: Literal["soft", "hard"] = "soft"
    """How much the better one is preferred: by Bradley and Terry's law of the rewards, or wholly."""
    loss: dpo.Loss = "sigmoid"
    """Of beta z, as in `training/dpo.py`."""

    def __post_init__(self) -> None:
        if self.pairs not in ("all", "extremes") or self.labels not in ("soft", "hard"):
            raise UserError(f"pairs are all or extremes and labels soft or hard, got {self.pairs!r} and {self.labels!r}")
        if self.loss not in get_args(dpo.Loss):
            raise UserError(f"unknown loss {self.loss!r}; known: {', '.join(get_args(dpo.Loss))}")


# --- the maths


def pairs_of(count: int) -> list[tuple[int, int]]:
    """All pairs of so many responses, in order.

    >>> pairs_of(3)
    [(0, 1), (0, 2), (1, 2)]
    """
    return list(itertools.combinations(range(count), 2))


def pair_labels(scalar_G: Float[np.ndarray, " G"], labels: str, pairs: str) -> Float[np.ndarray, "Q 2"]:
    """(P_ij, P_ji) of `pairs_of` the responses, times Q over how many are used, so that a mean over Q is one over these.

    (0, 0) for a pair that isn't used: one with an unscored response, a tie under hard labels, or one that is not of the extremes.
    """
    from scipy.special import expit

    at_Q2 = np.array(pairs_of(len(scalar_G)))
    gap_Q = scalar_G[at_Q2[:, 0]] - scalar_G[at_Q2[:, 1]]
    first_Q = expit(gap_Q) if labels == "soft" else (gap_Q > 0).astype(float)
    used_Q = np.isfinite(gap_Q) & ((labels == "soft") | (gap_Q != 0))
    if pairs == "extremes" and used_Q.any():
        best, worst = int(np.nanargmax(scalar_G)), int(np.nanargmin(scalar_G))
        used_Q &= (at_Q2 == sorted((best, worst))).all(axis=1)
    share = len(used_Q) / max(int(used_Q.sum()), 1)
    return np.where(used_Q[:, None], np.stack([first_Q, 1 - first_Q], axis=1) * share, 0.0)


def pair_losses(
    delta_BG: Float[Tensor, "B G"], label_BQ2: Float[Tensor, "B Q 2"], loss: str, beta: float
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B Q"]]:
    """(each row's mean loss over its pairs, z of every pair). Differentiable."""
    first, second = (list(side) for side in zip(*pairs_of(delta_BG.shape[1]), strict=True))
    z_BQ = delta_BG[:, first] - delta_BG[:, second]
    each_N = dpo.labelled_losses(beta * z_BQ.flatten(), label_BQ2.flatten(0, 1), loss, beta)
    return each_N.view(z_BQ.shape).mean(dim=1), z_BQ


# --- the method


@dataclass(frozen=True)
class OnlineDPO:
    """What online DPO adds to the rounds (`on_policy.Method`)."""

    config: Config
    loop: on_policy.Config
    title: str = "online DPO"

    def prepared(self, learner: Learner) -> Learner:
        """As it is."""
        return learner

    def settings(self, records: Sequence[on_policy.Record]) -> dict[str, float]:
        """beta, which stays."""
        return {"beta": self.loop.beta}

    def rows(
        self, learner: Learner, rows: Sequence[Row], scored: on_policy.Round, settings: dict[str, float], *, shared: bool
    ) -> list[Row]:
        """Rows with the labels of their pairs; prompts without one are left out."""
        found = []
        for row, scalar_G in zip(rows, scored.scalar_PG, strict=True):
            label_Q2 = pair_labels(scalar_G, self.config.labels, self.config.pairs)
            if label_Q2.any():
                reference = [float(np.sum(told)) for told in row.per_token["reference"]]
                numbers = {**row.numbers, "label": label_Q2.flatten().tolist(), "reference": reference}
                found.append(replace(row, numbers=numbers, per_token={}))
        return found

    def loss(self, settings: dict[str, float]) -> Callable[[Any, dict[str, Any]], LossOutput]:
        """The mean over the rows' pairs."""
        beta, kind = settings["beta"], self.config.loss

        def loss(model: Any, batch: dict[str, Any]) -> LossOutput:
            delta_BG = row_logprobs(model, batch).sum(-1) - batch["reference"]
            label_BQ2 = batch["label"].unflatten(1, (-1, 2))
            loss_B, z_BQ = pair_losses(delta_BG, label_BQ2, kind, beta)
            wanted_BQ = label_BQ2[..., 0] - label_BQ2[..., 1]
            told = (wanted_BQ != 0).sum().clamp_min(1)
            agrees = ((z_BQ * wanted_BQ) > 0).sum() / told
            return LossOutput(loss=loss_B.mean(), logged={"agreement": agrees, "logratio": delta_BG.mean()})

        return loss
