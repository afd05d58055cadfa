"""What a policy that reads scores in its prompt was taught: on which scale, in which words, and which scores it saw.

The file `in_context.json` lies in the run folder of `train ric`, beside the adapter. The scale is frozen with the first training:
later rounds and samplers read it here, and scores of another scale or other scorers are refused by its digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from equipoise.models.conditions import Wording, encode
from equipoise.objectives import Normaliser
from equipoise.runs import digest_of, read_json, write_json
from equipoise.types import Prompt, UserError

RECORD = "in_context.json"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How rewards become the numbers of a prompt."""

    normaliser: Normaliser
    scorers: Mapping[str, str]
    """What identifies each objective's scorer, weights included."""

    @property
    def digest(self) -> str:
        """Of all that decides what a number means."""
        return digest_of([asdict(self.normaliser), [self.scorers[name] for name in self.normaliser.objectives]])

    def check(self, other: Scale, what: str) -> None:
        """Refuse another scale, naming `what` it belongs to and what differs."""
        mine, theirs = self.normaliser, other.normaliser
        if mine.objectives != theirs.objectives:
            raise UserError(f"{what} is of {', '.join(theirs.objectives)}, the policy of {', '.join(mine.objectives)}, in this order")
        if self.digest != other.digest:
            units = [f"{n} {a:.4g} (sd {s:.4g})" for n, a, s in zip(mine.objectives, mine.mean_K, mine.sd_K, strict=True)]
            raise UserError(
                f"{what} has another scale ({other.digest[:12]}) than the policy ({self.digest[:12]}: {', '.join(units)}): a number in a "
                "prompt would mean something else; leave it away, or train from the start"
            )

    def check_scorers(self, scorers: Mapping[str, str], what: str) -> None:
        """Refuse scores of other scorers, or other weights of them."""
        for name in self.normaliser.objectives:
            if scorers.get(name) != self.scorers[name]:
                found = "isn't scored" if name not in scorers else "was scored by another scorer, or other weights,"
                raise UserError(f"in {what} {name!r} {found} than the scale is of: score it with the same")


@dataclass(frozen=True, kw_only=True)
class InContext:
    """The record of a policy that reads scores."""

    scale: Scale
    names: tuple[str, ...]
    """By which the prompts call the objectives."""
    wording: Wording
    rows_NK: np.ndarray
    """Scores that were seen, in units of the scale: what targets are taken from."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """In the order of weights and numbers."""
        return self.scale.normaliser.objectives

    def asked(self, prompt: Prompt, scores_K: Sequence[float]) -> Prompt:
        """The prompt with these scores in it."""
        return encode(prompt, dict(zip(self.names, scores_K, strict=True)), self.wording)

    def write(self, folder: Path) -> Path:
        """Write the record and return its path."""
        scale = {**asdict(self.scale.normaliser), "scorers": dict(self.scale.scorers), "digest": self.scale.digest}
        write_json(folder / RECORD, {"scale": scale, "names": self.names, "wording": asdict(self.wording), "seen": self.rows_NK.round(4)})
        return folder / RECORD

    @classmethod
    def read(cls, folder: Path) -> InContext:
        """From a run folder. Raises `UserError` where there is none, or its scale was changed since."""
        path = folder / RECORD
        if not path.is_file():
            raise UserError(f"{folder} has no {RECORD}: name the folder that `train ric` wrote")
        found = read_json(path)
        try:
            units, words, names = found["scale"], found["wording"], tuple(found["names"])
            mean_K, sd_K, objectives = (tuple(units[name]) for name in ("mean_K", "sd_K", "objectives"))
            scale = Scale(normaliser=Normaliser(objectives=objectives, mean_K=mean_K, sd_K=sd_K), scorers=units["scorers"])
            wording = Wording(**{**words, "specials": tuple(words["specials"])})
            rows_NK, digest = np.array(found["seen"], dtype=np.float64).reshape(-1, len(objectives)), units["digest"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is no record of a policy that reads scores; run `train ric` again") from None
        if scale.digest != digest:
            raise UserError(f"{path} was changed after it was made (its scale's digest doesn't fit); run `train ric` again")
        return cls(scale=scale, names=names, wording=wording, rows_NK=rows_NK)
