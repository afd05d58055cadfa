"""Rows that are decoded together: their cache, mask and positions, kept in step. All end in one column, with padding anywhere before it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from equipoise.models.loading import LanguageModel


class Follower(Protocol):
    """What else keeps a state per row of a batch, such as other models that read along."""

    forwards_R: torch.Tensor
    """Backbone tokens that it has run for each row."""

    @property
    def mergeable(self) -> bool:
        """Whether rows of another one can be taken over."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows."""
        ...

    def take(self, slots: torch.Tensor, other: Any, rows: torch.Tensor) -> None:
        """Put rows of another one of its kind in place of these."""
        ...

    def mark(self, row: int) -> Any:
        """All that is needed to bring a row back to where it is now."""
        ...

    def restore(self, row: int, mark: Any) -> None:
        """Bring a row back to one of its marks."""
        ...


@dataclass(frozen=True)
class Mark:
    """Where a row was: which columns of the cache it sees, and its states."""

    mask_T: torch.Tensor
    trimmed: int
    """Columns that its batch had given up by then."""
    length: torch.Tensor
    states: dict[int, torch.Tensor]
    followers: list[Any]


_WORTH_SHARING = 64
"""Tokens of prompts that a forward more, which reads all weights once more, has to save."""


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; the last one of each, whose states are read, isn't counted."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


class Batch:
    """Rows of one model: prompts of any length, `room` tokens after them, hidden states of `layers` (the final one always).

    `conditions_RK` are the weights that a model with weighted adapters (`models/weighted_lora.py`) reads, one row each. `stems`
    says how many tokens of each prompt are a stem that other rows may begin with: rows with equal stems are then encoded as
    one tree, each of their shared prefixes once.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        layers: Sequence[int],
        room: int,
        conditions_RK: torch.Tensor | None = None,
        stems: Sequence[int] | None = None,
    ) -> None:
        import torch

        from equipoise.models.cache import attends_fully, new_cache

        self.lm, self.layers, self.room = lm, tuple(layers), room
        self.followers: list[Follower] = []
        self._start = self._trimmed = 0
        self._branched: dict[int, torch.Tensor] = {}
        # Samples of one prompt share its prefill; its keys are then copied to each of their rows.
        read = [()] * len(prompts) if conditions_RK is None else [tuple(row) for row in conditions_RK.tolist()]
        asked = [(tuple(p), c) for p, c in zip(prompts, read, strict=True)]
        unique = {key: row for row, key in enumerate(dict.fromkeys(asked))}
        width = max(len(p) for p, _ in unique)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in unique])
        self.conditions_RK = None if conditions_RK is None else conditions_RK.new_tensor([c for _, c in unique]).to(lm.device)
        self.cache = new_cache(lm.model.config, width + room)
        self.mask_RT = mask.to(lm.device)
        self.lengths_R = self.mask_RT.sum(dim=1)
        stem_of = {} if stems is None or conditions_RK is not None else {p: p[:n] for (p, _), n in zip(asked, stems, strict=True)}
        if len(set(stem_of.values())) < len(stem_of) and attends_fully(lm.model.config):
            self.states = self._run_trees(list(stem_of), list(stem_of.values()), width)
        else:
            self.states = self._run_prompts([prompt for prompt, _ in unique])
        if len(unique) < len(prompts):
            self.select(torch.tensor([unique[key] for key in asked], device=lm.device))

    def _run_prompts(self, prompts: Sequence[tuple[int, ...]]) -> dict[int, torch.Tensor]:
        """Fill the cache with these rows; the tokens that all of them begin with are run once, where that saves enough.

        Padding then is between those and the rest of a row.
        """
        import torch

        from equipoise.models.cache import attends_fully, select_rows

        rows, width, device = len(prompts), self.mask_RT.shape[1], self.lm.device
        shared = _shared(prompts)
        if (rows - 1) * shared < _WORTH_SHARING or self.conditions_RK is not None or not attends_fully(self.lm.model.config):
            shared = 0
        if shared:
            ids = torch.tensor([prompts[0][:shared]], device=device)
            self.run(ids, torch.ones_like(ids), torch.arange(shared, device=device)[None])
            select_rows(self.cache, torch.zeros(rows, dtype=torch.long, device=device))
        gaps = [width - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * gap + list(prompt[shared:]) for gap, prompt in zip(gaps, prompts, strict=True)], device=device)
        self.mask_RT = self.mask_RT.new_tensor([[1] * shared + [0] * gap + [1] * (width - shared - gap) for gap in gaps])
        positions = (self.mask_RT.cumsum(dim=1) - 1).clamp(min=0)
        return self.run(ids, self.mask_RT, positions[:, shared:])

    def _run_trees(self, prompts: Sequence[tuple[int, ...]], stems: Sequence[tuple[int, ...]], width: int) -> dict[int, torch.Tensor]:
        """Fill the cache with these rows from one tree per stem; returns the states of each row's last token."""
        import torch

        from equipoise.models.cache import gather_rows
        from equipoise.models.trees import TokenTree, tree_batch

        names = {stem: index for index, stem in enumerate(dict.fromkeys(stems))}
        trees = [TokenTree() for _ in names]
        known: list[dict[tuple[int, int], int]] = [{} for _ in names]
        rows = torch.tensor([names[stem] for stem in stems])
        slots = torch.zeros((len(prompts), width), dtype=torch.long)  # padding takes any slot: the mask hides it
        for row, prompt in enumerate(prompts):
            tree, children, node, path = trees[rows[row]], known[rows[row]], -1, []
            for token in prompt:
                if (node, token) not in children:
                    children[node, token] = tree.chain(node, [token])[0]
                node = children[node, token]
                path.append(node)
            slots[row, width - len(path) :] = torch.tensor(path)
        ids, sees, positions = (t.to(self.lm.device) for t in tree_batch(trees))
        states = self.forward(ids, sees, positions)
        rows, slots = rows.to(self.lm.device), slots.to(self.lm.device)
        gather_rows(self.cache, rows, slots, width + self.room)
        return {layer: found[rows, slots[:, -1]] for layer, found in states.items()}

    def run(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> dict[int, torch.Tensor]:
        """One forward over new tokens; returns the states of each row's last token (`layers` and the final one)."""
        result = self.forward(ids, mask, positions)
        return {layer: states[:, -1] for layer, states in result.items()}

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> dict[int, torch.Tensor]:
        """States [R, new tokens, D] by layer, the final one always among them; the new tokens enter the cache."""
        from equipoise.models.weighted_lora import conditioned

        inner = [layer for layer in self.layers if layer != self.lm.num_layers]
        with conditioned(self.lm.model, self.conditions_RK):
            result = self.lm.backbone(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                output_hidden_states=bool(inner),
            )
        states = {layer: result.hidden_states[layer] for layer in inner}
        states[self.lm.num_layers] = result.last_hidden_state
        return states

    def branch(self, ids_RC: torch.Tensor) -> dict[int, torch.Tensor]:
        """States [R, C, D] by layer after each of the candidates, every one as if it alone came next; `keep` has to follow.

        All candidates of all rows are one forward, in which a candidate sees its row and itself.
        """
        import torch

        rows, count = ids_RC.shape
        self._start = self.mask_RT.shape[1]
        sees = torch.zeros((rows, 1, count, self._start + count), dtype=torch.bool, device=ids_RC.device)
        sees[:, 0, :, : self._start] = self.mask_RT[:, None, :].bool()
        sees[:, 0, :, self._start :] = torch.eye(count, dtype=torch.bool, device=ids_RC.device)
        self._branched = self.forward(ids_RC, sees, self.lengths_R[:, None].expand(rows, count))
        return self._branched

    def keep(self, choice_R: torch.Tensor) -> None:
        """Of the candidates that were branched to, keep each row's chosen one, which is never run again."""
        import torch

        from equipoise.models.cache import keep_branch

        keep_branch(self.cache, self._start, choice_R)
        rows = torch.arange(len(choice_R), device=choice_R.device)
        self.states = {layer: states[rows, choice_R] for layer, states in self._branched.items()}
        self._branched = {}
        self.extend()

    def extend(self, there_RT: torch.Tensor | None = None) -> None:
        """Make room in mask and lengths for more tokens per row: those that are there, one for each row by itself."""
        import torch

        new_RT = self.mask_RT.new_ones((self.mask_RT.shape[0], 1)) if there_RT is None else there_RT.to(self.mask_RT.dtype)
        self.mask_RT = torch.cat([self.mask_RT, new_RT], dim=1)
        self.lengths_R = self.lengths_R + new_RT.sum(dim=1)

    def append(self, tokens_R: torch.Tensor) -> None:
        """Feed one token per row."""
        self.feed(tokens_R[:, None])

    def feed(self, tokens_RT: torch.Tensor, there_RT: torch.Tensor | None = None) -> None:
        """Feed some tokens per row: all, or those that are there, which end in the last column; a row that is fed none loses its states."""
        import torch

        self.extend(torch.ones_like(tokens_RT) if there_RT is None else there_RT)
        positions = self.lengths_R[:, None] - torch.arange(tokens_RT.shape[1], 0, -1, device=tokens_RT.device)
        self.states = self.run(tokens_RT, self.mask_RT, positions.clamp(min=0))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order and as often as they are named, here and in all that follows."""
        from equipoise.models.cache import select_rows

        self.mask_RT, self.lengths_R = self.mask_RT[rows], self.lengths_R[rows]
        self.states = {layer: states[rows] for layer, states in self.states.items()}
        self._branched = {layer: states[rows] for layer, states in self._branched.items()}
        select_rows(self.cache, rows)
        if self.conditions_RK is not None:
            self.conditions_RK = self.conditions_RK[rows]
        for follower in self.followers:
            follower.select(rows)

    def copy(self, rows: torch.Tensor) -> Batch:
        """These rows in a batch of their own, without what follows them."""
        from equipoise.models.cache import shared_copy

        made = copy.copy(self)
        made.cache, made.followers = shared_copy(self.cache), []
        made.select(rows)
        return made

    @property
    def mergeable(self) -> bool:
        """Whether rows of another batch can be taken over, and rows go back to their marks."""
        from equipoise.models.cache import attends_fully

        return attends_fully(self.lm.model.config) and all(follower.mergeable for follower in self.followers)

    def take(self, slots: torch.Tensor, other: Batch, rows: torch.Tensor) -> None:
        """Put rows of another batch of the same model in place of these, here and in all that follows.

        Columns are shared by all rows: what is new ends where the others end now, and a row doesn't see the columns before
        it. Columns that no row sees any more are given up.
        """
        import torch

        from equipoise.models.cache import take_rows

        take_rows(self.cache, slots, other.cache, rows)
        wider = max(other.mask_RT.shape[1] - self.mask_RT.shape[1], 0)
        self.mask_RT = torch.nn.functional.pad(self.mask_RT, (0, wider))
        self.mask_RT[slots] = torch.nn.functional.pad(other.mask_RT[rows], (self.mask_RT.shape[1] - other.mask_RT.shape[1], 0))
        self.lengths_R = self.lengths_R.index_copy(0, slots, other.lengths_R[rows])
        self.states = {layer: states.index_copy(0, slots, other.states[layer][rows]) for layer, states in self.states.items()}
        if self.conditions_RK is not None and other.conditions_RK is not None:
            self.conditions_RK = self.conditions_RK.index_copy(0, slots, other.conditions_RK[rows])
        for mine, theirs in zip(self.followers, other.followers, strict=True):
            mine.take(slots, theirs, rows)
        self._trim()

    def _trim(self) -> None:
        unseen = int(self.mask_RT.any(dim=0).to(self.mask_RT.dtype).argmax())
        for layer in self.cache.layers if unseen else ():
            layer.trim(unseen)
        self.mask_RT, self._trimmed = self.mask_RT[:, unseen:], self._trimmed + unseen

    def mark(self, row: int) -> Mark:
        """All that is needed to bring a row, and what follows it, back to where it is now."""
        states = {layer: states[row].clone() for layer, states in self.states.items()}
        followers = [follower.mark(row) for follower in self.followers]
        return Mark(self.mask_RT[row].clone(), self._trimmed, self.lengths_R[row].clone(), states, followers)

    def restore(self, row: int, mark: Mark) -> None:
        """Bring a row back to one of its marks: its later tokens stay in the cache, unseen, and an earlier mark's are seen again."""
        seen_T = mark.mask_T[self._trimmed - mark.trimmed :]  # a row's first token is never given up while it runs
        self.mask_RT = self.mask_RT.clone()
        self.mask_RT[row] = 0
        self.mask_RT[row, : len(seen_T)] = seen_T
        self.lengths_R = self.lengths_R.clone()
        self.lengths_R[row] = mark.length
        self.states = {layer: states.clone() for layer, states in self.states.items()}
        for layer, state in mark.states.items():
            self.states[layer][row] = state
        for follower, theirs in zip(self.followers, mark.followers, strict=True):
            follower.restore(row, theirs)
