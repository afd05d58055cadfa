"""A key-value cache that grows in place, drops and replaces rows, and keeps one branch of a step's candidates.

`DynamicCache` of transformers concatenates, that is copies, the whole cache at every token; this one writes into
buffers that double when full. It serves models whose layers all attend to the full past; others get `DynamicCache`
and can't be used with candidate branches.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from equipoise.types import UserError

if TYPE_CHECKING:
    import torch


class GrowingLayer(CacheLayerMixin):
    """Keys and values [B, heads, T, d] of one layer, as views of buffers with spare room behind them."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.start = 0
        """First slot of the buffers that is in use."""
        self.length = 0
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for `capacity` tokens, in the shape and type of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = (self._room(key_states, self.capacity), self._room(value_states, self.capacity))
        self.is_initialized = True

    @staticmethod
    def _room(like: torch.Tensor, capacity: int) -> torch.Tensor:
        batch, heads, _, size = like.shape
        return like.new_empty((batch, heads, capacity, size))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' keys and values and return all; the buffers double where the room runs out."""
        if self._buffers is None:
            self.capacity = max(self.capacity, key_states.shape[-2])
            self.lazy_initialization(key_states, value_states)
        assert self._buffers is not None
        self._append(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        new = key_states.shape[-2]
        if self.start + self.length + new > self.capacity:
            self._move(self.length + new)
        assert self._buffers is not None
        at = self.start + self.length
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, at : at + new] = states
        self._resize(self.length + new)

    def _move(self, needed: int) -> None:
        """Bring what is in use to the front of new buffers, of twice the size where it would soon fill them again."""
        assert self._buffers is not None
        if 4 * needed > 3 * self.capacity:
            self.capacity = max(needed, 2 * self.capacity)
        moved = tuple(self._room(b, self.capacity) for b in self._buffers)
        for new, old in zip(moved, self._buffers, strict=True):
            new[:, :, : self.length] = old[:, :, self.start : self.start + self.length]
        self.start, self._buffers = 0, (moved[0], moved[1])

    def _resize(self, length: int) -> None:
        assert self._buffers is not None
        self.length = length
        self.keys, self.values = (b[:, :, self.start : self.start + length] for b in self._buffers)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        assert self._buffers is not None
        self._buffers = (self._buffers[0][rows], self._buffers[1][rows])
        self._resize(self.length)

    def gather(self, rows_B: torch.Tensor, slots_BT: torch.Tensor, capacity: int) -> None:
        """New rows: row b holds, in order, the slots slots_BT[b] of row rows_B[b]; room for `capacity` tokens."""
        assert self.keys is not None
        assert self.values is not None
        picked = [held[rows_B[:, None], :, slots_BT].transpose(1, 2) for held in (self.keys, self.values)]
        self.start, self.length, self.capacity = 0, 0, max(capacity, slots_BT.shape[1])
        self._buffers = (self._room(picked[0], self.capacity), self._room(picked[1], self.capacity))
        self._append(picked[0], picked[1])

    def take(self, slots: torch.Tensor, other: GrowingLayer, rows: torch.Tensor) -> None:
        """Write rows of another layer over these ones, last token below last token; where they are longer, all get zeros behind."""
        assert self.keys is not None
        assert self.values is not None
        assert other.keys is not None
        assert other.values is not None
        if other.length > self.length:
            batch, heads, _, size = self.keys.shape
            gap = self.keys.new_zeros((batch, heads, other.length - self.length, size))
            self._append(gap, gap)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[slots, :, self.length - other.length :] = theirs[rows]

    def trim(self, count: int) -> None:
        """Give up the first `count` tokens of every row."""
        self.start += count
        self._resize(self.length - count)

    def keep_branch(self, start: int, choice_B: torch.Tensor) -> None:
        """Of the candidates written from token `start` on, keep candidate choice_B[b] of each row b, at `start`."""
        assert self.keys is not None
        assert self.values is not None
        import torch

        rows = torch.arange(choice_B.shape[0], device=choice_B.device)
        for held in (self.keys, self.values):
            held[:, :, start] = held[rows, :, start + choice_B]
        self._resize(start + 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns of the mask, offset of the first one) for `query_length` new tokens."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """No limit, which transformers writes as -1."""
        return -1


def attends_fully(config: Any) -> bool:
    """Whether every layer attends to the full past."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(text, "sliding_window", None)


def new_cache(config: Any, capacity: int) -> Cache:
    """A cache for one batch: growing buffers where every layer attends to the full past, else `DynamicCache`."""
    if not attends_fully(config):
        return DynamicCache(config=config)
    return Cache(layers=[GrowingLayer(capacity) for _ in range(config.get_text_config().num_hidden_layers)])


def shared_copy(cache: Cache) -> Cache:
    """A cache that holds the same tensors: `select_rows` then gives it its own."""
    return Cache(layers=[copy.copy(layer) for layer in cache.layers])


def select_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Keep these rows of the batch in every layer."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.select_rows(rows)
        else:
            layer.batch_select_indices(rows)


def gather_rows(cache: Cache, rows_B: torch.Tensor, slots_BT: torch.Tensor, capacity: int) -> None:
    """Make new rows of slots of the present ones, in every layer of a cache that `new_cache` made for full attention."""
    for layer in cache.layers:
        assert isinstance(layer, GrowingLayer)
        layer.gather(rows_B, slots_BT, capacity)


def take_rows(cache: Cache, slots: torch.Tensor, other: Cache, rows: torch.Tensor) -> None:
    """Write rows of another cache over these ones in every layer."""
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert isinstance(mine, GrowingLayer)
        assert isinstance(theirs, GrowingLayer)
        mine.take(slots, theirs, rows)


def keep_branch(cache: Cache, start: int, choice_B: torch.Tensor) -> None:
    """Keep one candidate per row in every layer; raises `ValueError` for caches that can't."""
    for layer in cache.layers:
        if not isinstance(layer, GrowingLayer):
            raise UserError("candidate branches need a model whose layers all attend to the full past")
        layer.keep_branch(start, choice_B)
