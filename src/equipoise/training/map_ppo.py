"""MAP by training: PPO on v . z, and an outer loop that corrects the multipliers v until the policy delivers its targets.

    minimise KL(pi || pi_ref)  subject to  floor_k <= E z_k <= ceiling_k          optimum: pi_v proportional to pi_ref exp(v . z)

    rounds    maximise E[v . z(x, y)] - KL(pi || pi_ref): PPO at beta 1, v in nats per sd of the reference's reward z, not on the simplex
    every M   v <- [ v + step H^-1 (target - level) ]        level = E_pi z,    H = E_x Cov_pi(z | x),    of the rounds' own responses
              v_k >= 0 where a floor binds, <= 0 where a ceiling does, exactly 0 where neither does

Where the policy is pi_v, target - level is the gradient of the dual in v and -H its Hessian (palette/dual.py), so that this is a share
`step` of a projected Newton step. A plain step eta (target - level) has the same fixed points, but is stable only for eta below 2 over the
largest eigenvalue of H, which changes as the policy narrows; H^-1 gives it its unit. The share is below 1 as the policy lags: if
it goes a share a of its way to pi_v after each measurement, errors of v shrink by sqrt(1 - a (1 - step)) each time, past the optimum and
back where step > a / 4, and not at all at step = 1. The correction starts from v and not from where the policy is, so that it ends only
where the targets are met, also by a policy that can't become pi_v.

v starts as the palette's dual has it on a bank of the reference's responses. The rounds end early once `patience` measurements in a row
have every level at its target within 1.96 standard errors (over prompts), neither short of it nor, where it costs KL, past it.

Paper: MAP (2410.19198), sections 2 and 3. Departures: the outer loop (there v is the bank's, whatever the policy then does; CAID,
2505.19387, has it for DPO); rewards are standardised; ceilings; PPO's KL is exact, and at its full weight throughout.
Reads: prompts, rewards, frozen statistics, targets. Writes: adapter/ or model/, card.json, and what `on_policy` writes: each round's
record has its multipliers as `weights`, and after a measurement the gaps. The weights enter: the rewards; the policy reads none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from equipoise.objectives import Normaliser, unscaled
from equipoise.training import ppo
from equipoise.training.completion_rows import Row
from equipoise.training.learner import Learner
from equipoise.training.scored_round import Record, Round
from equipoise.types import LossOutput, UserError

_NORMAL = 1.96
_RIDGE = 1e-6  # of a covariance in squared sd: a reward that the policy has made constant moves no multiplier to infinity


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the multipliers are corrected."""

    every: int = 4
    """Rounds between two corrections; the later half of them is measured, as the policy is still on its way in the first."""
    step: float = 0.5
    """Share of a Newton step that a correction takes."""
    longest: float = 1.0
    """How far a correction moves a multiplier at most, in nats per standard deviation."""
    patience: int = 2
    """Measurements in a row that have every target met before the rounds end early; 0 for all rounds whatever they say."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 0 or not 0 < self.step < 1 or not self.longest > 0:
            raise UserError(
                "every must be at least 1, patience not negative, step between 0 and 1 and longest positive, got "
                f"{self.every}, {self.patience}, {self.step} and {self.longest}"
            )


# --- the maths


def gaps(
    level_K: Float[np.ndarray, " K"],
    multiplier_K: Float[np.ndarray, " K"],
    floor_K: Float[np.ndarray, " K"],
    ceiling_K: Float[np.ndarray, " K"],
) -> Float[np.ndarray, " K"]:
    """target - level, the target being the bound that a multiplier stands for: the floor if positive, the ceiling if negative.

    Of a multiplier of 0 it is what the level lacks to its nearest bound, 0 between them: a bound that holds for nothing costs nothing.
    """
    below_K, above_K = floor_K - level_K, ceiling_K - level_K
    return np.where(multiplier_K > 0, below_K, np.where(multiplier_K < 0, above_K, np.clip(0.0, below_K, above_K)))


def corrected(
    multiplier_K: Float[np.ndarray, " K"],
    gap_K: Float[np.ndarray, " K"],
    covariance_KK: Float[np.ndarray, "K K"],
    step: float,
    longest: float,
) -> Float[np.ndarray, " K"]:
    """[ v + step H^-1 gap ], none moved by more than `longest`; one that would change its sign is 0, and one at 0 without a gap stays."""
    free = np.flatnonzero((multiplier_K != 0) | (gap_K != 0))
    move_K = np.zeros(len(multiplier_K))
    block = covariance_KK[np.ix_(free, free)] + _RIDGE * np.eye(len(free))
    move_K[free] = np.clip(step * np.linalg.solve(block, gap_K[free]), -longest, longest)
    # The sign of a multiplier at 0 is that of its gap: a floor's or a ceiling's.
    sign_K = np.sign(np.where(multiplier_K != 0, multiplier_K, gap_K))
    return sign_K * np.maximum(0.0, sign_K * (multiplier_K + move_K))


# --- the method


@dataclass(frozen=True)
class MAP:
    """What MAP adds to the rounds (`on_policy.Method`): PPO's rows and loss at multipliers that it makes itself."""

    config: Config
    ppo: ppo.PPO
    objectives: tuple[str, ...]
    floor_K: tuple[float, ...]
    """In standard deviations above the reference's mean, -inf where nothing is asked."""
    ceiling_K: tuple[float, ...]
    start_K: tuple[float, ...]
    """The first multipliers, nats per standard deviation."""
    title: str = "MAP"

    def __post_init__(self) -> None:
        loop, how = self.ppo.loop, self.ppo.config
        if loop.beta != 1 or loop.scalarisation != "linear" or how.kl_target:
            raise UserError(
                "the multipliers are nats, and say how far to go: MAP needs loop.beta 1, loop.scalarisation linear and ppo.kl_target 0, "
                f"got {loop.beta:g}, {loop.scalarisation} and {how.kl_target:g}"
            )
        if how.advantage not in ("rloo", "gae"):
            raise UserError(f"MAP needs an advantage in nats, rloo or gae: {how.advantage} divides it by its spread")
        if loop.rounds < self.config.every:
            raise UserError(f"{loop.rounds} rounds end before the multipliers are corrected once, after map.every {self.config.every}")

    def prepared(self, learner: Learner) -> Learner:
        """As PPO has it."""
        return self.ppo.prepared(learner)

    def settings(self, records: Sequence[Record]) -> Record | None:
        """The multipliers of the next round, corrected after every so many; None once the targets are met."""
        multiplier_K, gap_K = np.array(self.start_K), None
        if records:
            multiplier_K = self._multipliers(records)
            if len(records) % self.config.every == 0:
                ends = [len(records) - i * self.config.every for i in range(self.config.patience)]
                if ends and ends[-1] > 0 and all(self._measured(records[:end])[-1].all() for end in ends):
                    return None
                _, _, gap_K, covariance_KK, _ = self._measured(records)
                multiplier_K = corrected(multiplier_K, gap_K, covariance_KK, self.config.step, self.config.longest)
        found: Record = {"beta": 1.0, "weights": self._named(multiplier_K)}
        return found if gap_K is None else found | {"gap": self._named(gap_K)}

    def outcome(self, records: Sequence[Record], scale: Normaliser) -> Record:
        """The last measurement by asked objective, in the rewards' own units: bounds, level, standard error, multiplier, if it is met."""
        level_K, stderr_K, _, _, met_K = self._measured(records)
        bounds = {"floor": np.array(self.floor_K), "ceiling": np.array(self.ceiling_K), "level": level_K}
        columns = {key: unscaled(value_K, scale.mean_K, scale.sd_K) for key, value_K in bounds.items()}
        sd_K = np.array(scale.sd_K)
        columns |= {"stderr": stderr_K * sd_K, "multiplier": self._multipliers(records) / sd_K, "met": met_K}
        asked = np.flatnonzero(self._asked_K)
        return {self.objectives[k]: {key: value_K[k].item() for key, value_K in columns.items()} for k in asked}

    @property
    def _asked_K(self) -> np.ndarray:
        return np.isfinite(self.floor_K) | np.isfinite(self.ceiling_K)

    def _measured(self, records: Sequence[Record]) -> tuple[np.ndarray, ...]:
        """(level, standard error, gap, covariance, whether each target is met) of the later half of the last `every` rounds.

        Raises `UserError` where no prompt has two responses that are scored on all objectives.
        """
        last = records[-((self.config.every + 1) // 2) :]

        def each(key: str) -> np.ndarray:
            return np.array([[record[key][name] for name in self.objectives] for record in last], dtype=np.float64)

        level_K, stderr_K = each("reward").mean(axis=0), np.sqrt((each("stderr") ** 2).sum(axis=0)) / len(last)
        gap_K = gaps(level_K, self._multipliers(records), np.array(self.floor_K), np.array(self.ceiling_K))
        covariance_KK = np.array([record["covariance"] for record in last], dtype=np.float64).mean(axis=0)
        if not np.isfinite(covariance_KK).all():
            raise UserError(
                f"round {last[-1]['round'] + 1} or one before it has no prompt with two responses that are scored on all of "
                f"{', '.join(self.objectives)}, by which the multipliers are corrected: raise loop.samples, or leave a reward away"
            )
        return level_K, stderr_K, gap_K, covariance_KK, (np.abs(gap_K) <= _NORMAL * stderr_K) | ~self._asked_K

    def _multipliers(self, records: Sequence[Record]) -> np.ndarray:
        return np.array([records[-1]["weights"][name] for name in self.objectives])

    def _named(self, value_K: np.ndarray) -> dict[str, float]:
        return dict(zip(self.objectives, value_K.tolist(), strict=True))

    def rows(self, learner: Learner, rows: Sequence[Row], scored: Round, settings: Record, *, shared: bool) -> list[Row]:
        """PPO's."""
        return self.ppo.rows(learner, rows, scored, settings, shared=shared)

    def loss(self, settings: Record) -> Callable[[Any, dict[str, Any]], LossOutput]:
        """PPO's."""
        return self.ppo.loss(settings)
