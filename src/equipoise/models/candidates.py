"""Another model's states after each candidate of each step, for the rows of a batch that need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from equipoise.models.companions import check_room
from equipoise.models.generation import Start
from equipoise.models.loading import LanguageModel
from equipoise.models.own_rows import OwnRows
from equipoise.models.rows import Batch

if TYPE_CHECKING:
    import torch


class CandidateReader(OwnRows):
    """A follower (`models/rows.py`) whose rows read all candidates in one forward and keep the chosen one's keys.

    A step may go unread: what was drawn there is run before the candidates of the next step that is read.
    """

    forwards_R: torch.Tensor

    def __init__(self, lm: LanguageModel, start: Start, needed_R: torch.Tensor) -> None:
        import torch

        rows = needed_R.nonzero()[:, 0].tolist()
        prompts = [start.prompts[row] for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            check_room(lm, start.requests[row].prompt.id, len(prompt), start.batch.room)
        stems = [len(prompt) - len(start.requests[row].given) for row, prompt in zip(rows, prompts, strict=True)]
        super().__init__(lm, Batch(lm, prompts, (), start.batch.room + start.candidates, stems=stems) if rows else None, needed_R[:, None])
        self.forwards_R = torch.zeros(len(needed_R), dtype=torch.long)
        self.forwards_R[rows] = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long)
        # Each row's tokens that are to be run, the last one in the last column, behind -1s.
        self._unread_RT = needed_R.new_zeros((len(needed_R), 0), dtype=torch.long)
        self._branched = False

    @property
    def rows(self) -> torch.Tensor:
        """Rows of the batch that are read here, in order."""
        return (self.place_RG[:, 0] >= 0).nonzero()[:, 0]

    def read(self, ids_RC: torch.Tensor) -> torch.Tensor:
        """States [rows, C, D] after each candidate of `rows`, which may not be empty."""
        assert self.run is not None
        device, rows = self.lm.device, self.rows
        there_NT = self._unread_RT[rows] >= 0
        if there_NT.any():
            self.run.feed(self._unread_RT[rows].clamp(min=0).to(device), there_NT.to(device))
        states = self.run.branch(ids_RC[rows].to(device))[self.lm.num_layers]
        self.forwards_R = self.forwards_R.index_add(0, rows.cpu(), there_NT.sum(dim=1).cpu() + ids_RC.shape[1])
        self._unread_RT, self._branched = self._unread_RT[:, :0], True
        return states

    def advance(self, tokens_R: torch.Tensor, choice_R: torch.Tensor) -> None:
        """Note what was drawn: keep it where it was read, else run it later."""
        import torch

        if self.run is None:
            return
        if self._branched:
            self.run.keep(choice_R[self.rows].to(self.lm.device))
        else:
            self._unread_RT = torch.cat([self._unread_RT, tokens_R[:, None]], dim=1)
        self._branched = False

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows."""
        super().select(rows)
        self.forwards_R, self._unread_RT = self.forwards_R[rows.cpu()], self._unread_RT[rows]

    def take(self, slots: torch.Tensor, other: CandidateReader, rows: torch.Tensor) -> None:
        """Put another reader's rows in place of these."""
        super().take(slots, other, rows)
        self.forwards_R = self.forwards_R.index_copy(0, slots.cpu(), other.forwards_R[rows.cpu()])
        width = max(self._unread_RT.shape[1], other._unread_RT.shape[1])
        unread_RT = _widened(self._unread_RT, width).index_copy(0, slots, _widened(other._unread_RT[rows], width))
        self._unread_RT = unread_RT[:, (unread_RT[self.rows] >= 0).any(dim=0)]

    def mark(self, row: int) -> tuple[torch.Tensor, Any]:
        """Where the row is, and what it has yet to run."""
        return self._unread_RT[row : row + 1].clone(), super().mark(row)

    def restore(self, row: int, mark: tuple[torch.Tensor, Any]) -> None:
        """Bring the row back; what it ran since stays counted."""
        unread_1T, own = mark
        super().restore(row, own)
        width = max(self._unread_RT.shape[1], unread_1T.shape[1])
        self._unread_RT = _widened(self._unread_RT, width).clone()
        self._unread_RT[row] = _widened(unread_1T, width)[0]


def _widened(unread_RT: torch.Tensor, width: int) -> torch.Tensor:
    import torch

    return torch.nn.functional.pad(unread_RT, (width - unread_RT.shape[1], 0), value=-1)
