"""Rows that another model runs along with those of a batch, for those of them that need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from equipoise.models.loading import LanguageModel
    from equipoise.models.rows import Batch


class OwnRows:
    """A batch of the model's own with a row per (row of the followed batch, column) that is needed, in that order; None where none is."""

    def __init__(self, lm: LanguageModel, run: Batch | None, needed_RG: torch.Tensor) -> None:
        self.lm, self.run, self.place_RG = lm, run, _numbered(needed_RG)

    @property
    def mergeable(self) -> bool:
        """Whether the model attends to the full past."""
        from equipoise.models.cache import attends_fully

        return attends_fully(self.lm.model.config)

    def select(self, rows: torch.Tensor) -> None:
        """Keep what belongs to these rows."""
        place_RG = self.place_RG[rows]
        self._keep(place_RG[place_RG >= 0])
        self.place_RG = _numbered(place_RG >= 0)

    def _keep(self, places: torch.Tensor) -> None:
        if self.run is None or not len(places):
            self.run = None
        elif places.tolist() != list(range(len(self.run.lengths_R))):
            self.run.select(places.to(self.lm.device))

    def take(self, slots: torch.Tensor, other: Any, rows: torch.Tensor) -> None:
        """Put what belongs to another batch's rows in place of what belongs to these, which may need other columns."""
        import torch

        place_RG = self.place_RG.index_copy(0, slots, torch.full_like(self.place_RG[slots], -1))
        theirs_RG = torch.full_like(place_RG, -1).index_copy(0, slots, other.place_RG[rows])
        there_RG = (place_RG >= 0) | (theirs_RG >= 0)
        self.place_RG = _numbered(there_RG)
        mine_N, theirs_N = place_RG[there_RG], theirs_RG[there_RG]
        if self.run is None:
            if other.run is not None and len(theirs_N):
                self.run = other.run.copy(theirs_N.to(self.lm.device))
            return
        # What is new is written over rows that end, or over copies where there are more of them.
        spare_N = torch.arange(len(mine_N), device=mine_N.device).clamp(max=len(self.run.lengths_R) - 1)
        self._keep(torch.where(mine_N >= 0, mine_N, spare_N))
        new_N = theirs_N >= 0
        if self.run is not None and other.run is not None and bool(new_N.any()):
            device = self.lm.device
            self.run.take(new_N.nonzero(as_tuple=True)[0].to(device), other.run, theirs_N[new_N].to(device))

    def mark(self, row: int) -> Any:
        """Where what belongs to the row is."""
        return [self.run.mark(place) for place in self.place_RG[row].tolist() if place >= 0] if self.run is not None else []

    def restore(self, row: int, mark: Any) -> None:
        """Bring what belongs to the row back."""
        for place, own in zip((p for p in self.place_RG[row].tolist() if p >= 0), mark, strict=True):
            assert self.run is not None
            self.run.restore(place, own)


def _numbered(there_RG: torch.Tensor) -> torch.Tensor:
    """0, 1, .. row by row where it is true, -1 elsewhere."""
    import torch

    order_RG = there_RG.flatten().long().cumsum(0).view(there_RG.shape) - 1
    return torch.where(there_RG, order_RG, torch.full_like(order_RG, -1))
