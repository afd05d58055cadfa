"""Rows of a batch that others replace, and rows that go back to where they were, against uncached forwards of each row alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig

from conftest import build_llama
from decoding.rows import plain_forward
from equipoise.models.loading import LanguageModel
from equipoise.models.rows import Batch

tokens = st.lists(st.integers(3, 7), min_size=1, max_size=9)


def agrees(lm, batch: Batch, said: list[list[int]]) -> None:
    """Every row's states are those of its tokens alone, and its mask counts them."""
    assert batch.lengths_R.tolist() == [len(ids) for ids in said] == batch.mask_RT.sum(dim=1).tolist()
    for row, ids in enumerate(said):
        states = plain_forward(lm, [ids])[1]
        for layer in (1, lm.num_layers):
            np.testing.assert_allclose(batch.states[layer][row], states[layer][0], atol=2e-5)


def feed(batch: Batch, said: list[list[int]], generator) -> None:
    drawn = torch.randint(3, 8, (len(said),), generator=generator)
    batch.append(drawn)
    for ids, token in zip(said, drawn.tolist(), strict=True):
        ids.append(token)


@settings(max_examples=12, deadline=None)
@given(
    first=st.lists(tokens, min_size=3, max_size=3),
    second=st.lists(tokens, min_size=2, max_size=2),
    before=st.integers(0, 6),
    data=st.data(),
)
def test_taken_rows_go_on_as_if_alone(tiny_lm, first, second, before, data):
    generator = torch.Generator().manual_seed(before)
    with torch.inference_mode():
        mine, theirs = (Batch(tiny_lm, prompts, (1,), 2) for prompts in (first, second))
        said, waiting = [list(p) for p in first], [list(p) for p in second]
        for _ in range(before):
            feed(mine, said, generator)
        for turn in range(3):  # a place may be taken several times, and the other batch goes on in between
            slots = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True))
            rows = data.draw(st.lists(st.integers(0, 1), min_size=len(slots), max_size=len(slots)))
            mine.take(torch.tensor(slots), theirs, torch.tensor(rows))
            for slot, row in zip(slots, rows, strict=True):
                said[slot] = list(waiting[row])
            agrees(tiny_lm, mine, said)
            feed(mine, said, generator)
            agrees(tiny_lm, mine, said)
            if turn == 0:
                feed(theirs, waiting, generator)
        agrees(tiny_lm, theirs, waiting)
        # No column is kept that no row sees.
        assert mine.mask_RT[:, 0].any() or mine.mask_RT.shape[1] == max(map(len, said))


def test_columns_that_no_row_sees_are_given_up(tiny_lm):
    """Three hundred tokens through two places: the batch is never wider than the rows in it and what lies between them."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        batch, said = Batch(tiny_lm, [[3, 4], [5]], (1,), 4), [[3, 4], [5]]
        for turn in range(75):
            for _ in range(2):
                feed(batch, said, generator)
            batch.take(torch.tensor([turn % 2]), Batch(tiny_lm, [[6, 7, 3]], (1,), 4), torch.tensor([0]))
            said[turn % 2] = [6, 7, 3]
            assert batch.mask_RT.shape[1] <= max(map(len, said)) + 3
        agrees(tiny_lm, batch, said)
        assert batch.cache.layers[0].capacity <= 32


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), min_size=3, max_size=5), take=st.booleans())
def test_restored_rows_go_on_as_if_nothing_had_been_said(tiny_lm, lengths, take):
    """Back to the start, on, and back to what had been said before, whatever the other rows did meanwhile."""
    generator = torch.Generator().manual_seed(len(lengths))
    with torch.inference_mode():
        batch, said = Batch(tiny_lm, [[3, 4, 5], [6], [7, 7]], (1,), 2), [[3, 4, 5], [6], [7, 7]]
        start, begun, kept = batch.mark(1), list(said[1]), None
        for turn, length in enumerate(lengths):
            for _ in range(length):
                feed(batch, said, generator)
            if turn == 1:
                kept = (batch.mark(1), list(said[1]))
            if turn == 2 and take:
                batch.take(torch.tensor([0]), Batch(tiny_lm, [[5, 3]], (1,), 2), torch.tensor([0]))
                said[0] = [5, 3]
            batch.restore(1, start)
            said[1] = list(begun)
            agrees(tiny_lm, batch, said)
        assert kept is not None
        batch.restore(1, kept[0])
        said[1] = list(kept[1])
        agrees(tiny_lm, batch, said)
        feed(batch, said, generator)
        agrees(tiny_lm, batch, said)


def test_a_chosen_branch_survives_being_copied(tiny_lm):
    """Rows may be copied between the branching and the choice, as a beam search does."""
    with torch.inference_mode():
        batch = Batch(tiny_lm, [[3, 4, 5], [6]], (1,), 8)
        batch.branch(torch.tensor([[3, 4, 7], [5, 6, 7]]))
        batch.select(torch.tensor([1, 0, 1]))
        batch.keep(torch.tensor([2, 0, 1]))
        agrees(tiny_lm, batch, [[6, 7], [3, 4, 5, 3], [6, 6]])


@settings(max_examples=10, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any))
def test_rows_may_be_fed_unequal_counts(tiny_lm, counts):
    """What isn't there is never seen: rows that were fed something have their states, and all of them after the next token."""
    generator, said, width = torch.Generator().manual_seed(sum(counts)), [[3, 4, 5], [6], [7, 7]], max(counts)
    with torch.inference_mode():
        batch = Batch(tiny_lm, said, (1,), 4)
        there = torch.tensor([[column >= width - count for column in range(width)] for count in counts])
        fed = torch.randint(3, 8, there.shape, generator=generator)
        batch.feed(fed, there)
        said = [[*ids, *fed[row, width - counts[row] :].tolist()] for row, ids in enumerate(said)]
        for row, ids in enumerate(said):
            if counts[row]:
                np.testing.assert_allclose(batch.states[1][row], plain_forward(tiny_lm, [ids])[1][1][0], atol=2e-5)
        feed(batch, said, generator)
        agrees(tiny_lm, batch, said)


def test_limited_views_take_no_rows(tiny_lm):
    sliding = build_llama(8, layers=2, max_position=64, seed=5, config_class=MistralConfig, sliding_window=4)
    lm = LanguageModel(sliding, tiny_lm.tokenizer, "sliding", "", tiny_lm.eos_ids)
    with torch.inference_mode():
        assert not Batch(lm, [[3, 4]], (), 2).mergeable
        assert Batch(tiny_lm, [[3, 4]], (), 2).mergeable


@pytest.mark.parametrize("count", [1, 3])
def test_a_copy_is_independent(tiny_lm, count):
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        batch, said = Batch(tiny_lm, [[3, 4], [5], [6, 7, 3]], (1,), 4), [[3, 4], [5], [6, 7, 3]]
        other, theirs = batch.copy(torch.arange(count)), [list(p) for p in said[:count]]
        for _ in range(3):
            feed(batch, said, generator)
            feed(other, theirs, generator)
        agrees(tiny_lm, batch, said)
        agrees(tiny_lm, other, theirs)


@pytest.mark.parametrize(
    ("tails", "run"),
    [
        ([[3], [4, 5, 6, 7], [4, 4]], 34 + 3 * 4),  # 2 * 34 tokens saved, tails padded to the longest
        ([[], [3], [4, 4, 5]], 33 + 3 * 4),  # the last token of the first row is its own
        ([[3], [4, 5, 6, 7]], 2 * 38),  # 34 saved are too few
    ],
)
def test_what_all_prompts_begin_with_is_run_once(tiny_lm, tails, run):
    generator = torch.Generator().manual_seed(5)
    stem = torch.randint(3, 8, (34,), generator=generator).tolist()
    said, seen = [stem + tail for tail in tails], []
    hook = tiny_lm.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    with torch.inference_mode():
        batch = Batch(tiny_lm, said, (1,), 2)
        hook.remove()
        assert sum(seen) == run
        agrees(tiny_lm, batch, said)
        mark, then = batch.mark(1), list(said[1])
        for _ in range(2):
            feed(batch, said, generator)
        agrees(tiny_lm, batch, said)
        batch.restore(1, mark)
        said[1] = then
        agrees(tiny_lm, batch, said)
        # A row of another batch, with padding elsewhere, takes a place beside them.
        batch.take(torch.tensor([0]), Batch(tiny_lm, [[*stem[:9], 3, 4, 5], [7]], (1,), 2), torch.tensor([0]))
        said[0] = [*stem[:9], 3, 4, 5]
        feed(batch, said, generator)
        agrees(tiny_lm, batch, said)
