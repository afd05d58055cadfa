"""Statistics of a frozen reference set, kept in a file, by which other scores of the same scorers are put on one scale.

    z:      (r - mean_k) / sd_k                    0 is the reference's mean, 1 its standard deviation (ddof 1)
    range:  (r - q01_k) / (q99_k - q01_k)          0 and 1 are the reference's 1 % and 99 % quantiles; nothing is clipped

per objective k, over the reference's scored responses; quantiles by linear interpolation. Both are undone by
r = offset + scale value. Statistics belong to scorers and not to names: scores of other weights under the same name are refused.

The range form follows the usual normalisation before a hypervolume; standardising by frozen statistics is RiC's
(2402.10207), which divides by the population's sd (ddof 0) and rounds rewards to 0.1 first; here neither is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from equipoise.objectives import Normaliser, scaled, unscaled
from equipoise.runs import digest_of, manifest_of, read_json, write_json
from equipoise.types import Rewards, UserError

Form = Literal["z", "range"]
LEVELS = (0.01, 0.05, 0.5, 0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is remembered of K objectives' scores on the reference set."""

    objectives: tuple[str, ...]
    scorers: tuple[str, ...]
    """What identifies each objective's scorer, weights included."""
    mean_K: tuple[float, ...]
    sd_K: tuple[float, ...]
    quantile_KQ: tuple[tuple[float, ...], ...]
    """At the `LEVELS`."""
    n_K: tuple[int, ...]
    """Scored responses."""
    n_unscored_K: tuple[int, ...]
    rollouts: str
    """Digest of the reference's responses."""

    @classmethod
    def fit(cls, rewards: Rewards, scorers: Mapping[str, str]) -> Statistics:
        """Statistics of these scores. Raises `UserError` for an objective that is constant or hardly scored."""
        normaliser = Normaliser.fit(rewards.objectives, rewards.reward_NK)
        columns = [column[np.isfinite(column)] for column in rewards.reward_NK.T]
        return cls(
            objectives=rewards.objectives,
            scorers=tuple(scorers[name] for name in rewards.objectives),
            mean_K=normaliser.mean_K,
            sd_K=normaliser.sd_K,
            quantile_KQ=tuple(tuple(np.quantile(column, LEVELS).tolist()) for column in columns),
            n_K=tuple(len(column) for column in columns),
            n_unscored_K=tuple(len(rewards.reward_NK) - len(column) for column in columns),
            rollouts=rewards.digest,
        )

    def apply(self, rewards: Rewards, scorers: Mapping[str, str], form: Form = "z") -> np.ndarray:
        """The scores in units of the reference, float64 [N, K] in the order of `rewards`; NaN stays NaN.

        Raises `UserError` for an objective that the reference lacks or that another scorer has scored.
        """
        return scaled(rewards.reward_NK, *self._affine(rewards.objectives, scorers, form))

    def undo(self, value_NK: np.ndarray, rewards: Rewards, scorers: Mapping[str, str], form: Form = "z") -> np.ndarray:
        """Values of `apply`, in the scorers' own units again; `rewards` names the columns."""
        return unscaled(value_NK, *self._affine(rewards.objectives, scorers, form))

    def normaliser(self, objectives: Sequence[str], scorers: Mapping[str, str]) -> Normaliser:
        """What standardises single rewards of these objectives. Raises `UserError` as `apply` does."""
        mean, sd = self._affine(tuple(objectives), scorers, "z")
        return Normaliser(objectives=tuple(objectives), mean_K=tuple(mean), sd_K=tuple(sd))

    def _affine(self, objectives: tuple[str, ...], scorers: Mapping[str, str], form: Form) -> tuple[list[float], list[float]]:
        """(offset, scale) of these objectives."""
        if form not in get_args(Form):
            raise UserError(f"no normalisation {form!r}: choose {' or '.join(get_args(Form))}")
        offsets, scales = [], []
        for name in objectives:
            if name not in self.objectives:
                raise UserError(
                    f"the reference has no statistics of {name!r}, only of {', '.join(self.objectives)}; normalise a run that has"
                )
            k = self.objectives.index(name)
            if scorers.get(name) != self.scorers[k]:
                raise UserError(f"{name!r} was scored by another scorer, or other weights, than the reference: score both with the same")
            low, high = self.quantile_KQ[k][0], self.quantile_KQ[k][-1]
            if form == "range" and not high > low:
                raise UserError(f"the reference's 1 % and 99 % quantiles of {name!r} are both {low:g}: use the form z")
            offsets.append(self.mean_K[k] if form == "z" else low)
            scales.append(self.sd_K[k] if form == "z" else high - low)
        return offsets, scales

    def write(self, path: Path) -> None:
        """Write the file, with the digest of its content. Raises `UserError` where it holds other statistics: they are frozen."""
        if path.exists() and self.read(path) != self:
            raise UserError(f"{path} holds the statistics of another reference set, which stay as they are; choose another file")
        write_json(path, {**asdict(self), "levels": LEVELS, "digest": digest_of(asdict(self))})

    @classmethod
    def read(cls, path: Path) -> Statistics:
        """Statistics from their file. Raises `UserError` where they were changed since, or are none."""
        found = read_json(path)
        try:
            statistics = cls(**{f.name: _tuples(found[f.name]) for f in fields(cls)})
            digest = found["digest"]
        except (KeyError, TypeError):
            raise UserError(f"{path} holds no statistics of a reference set; `equipoise normalise` makes them") from None
        if digest != digest_of(asdict(statistics)):
            raise UserError(f"{path} was changed after it was made (its digest doesn't fit); make it again with `equipoise normalise`")
        return statistics


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def scorers_of(folder: Path) -> dict[str, str]:
    """Objective to scorer of a folder that `score` wrote. Raises `UserError` where it isn't on record."""
    facts = manifest_of(folder, "score")["facts"]
    if "scorers" not in facts:
        raise UserError(f"{folder} doesn't say which scorers it is of; delete it and run `score` again")
    return dict(facts["scorers"])
