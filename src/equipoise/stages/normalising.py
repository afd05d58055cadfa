"""The stage `normalise`: statistics of a scored run, as the reference that other runs' scores are measured by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipoise.progress import say
from equipoise.stages import common


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Freeze the statistics of a scored run's rewards."""

    run: Path
    """A folder that was scored: the reference set."""
    out: Path
    """JSON file to write."""


def normalise(config: Normalise) -> Path:
    """Write the statistics and return the file's path."""
    from equipoise.rewards.normalisation import Statistics

    run = common.scored_run(config.run)
    found = Statistics.fit(run.rewards, run.scorers)
    found.write(config.out)
    for k, name in enumerate(found.objectives):
        low, *_, high = found.quantile_KQ[k]
        scored = f"{found.n_K[k]} scored, {found.n_unscored_K[k]} not"
        say(f"{name}: mean {found.mean_K[k]:.4g}, sd {found.sd_K[k]:.4g}, 1 % to 99 % {low:.4g} to {high:.4g}; {scored}")
    return config.out
