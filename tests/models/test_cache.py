"""The growing cache against transformers' own: prefill, steps, dropped rows, kept branches, growth."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig
from transformers.cache_utils import DynamicCache

from conftest import build_llama
from equipoise.models.cache import GrowingLayer, keep_branch, new_cache, select_rows
from equipoise.types import UserError

WIDTH = 6
PADDING = (0, 3, 1)
"""Left padding of the three rows."""


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BT, mask_BT) of three left-padded prompts."""
    ids = torch.randint(1, 8, (len(PADDING), WIDTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def feed(model, cache, ids, mask) -> torch.Tensor:
    """Logits [B, new, V] of the new tokens, which are the mask's last."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits


def longer(mask: torch.Tensor, count: int = 1) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones((len(mask), count))], dim=1)


@pytest.mark.parametrize("capacity", [1, WIDTH, WIDTH + 2, 64])
def test_same_logits_as_dynamic_cache_through_steps_and_dropped_rows(tiny_lm, rows, capacity):
    model, (ids, mask) = tiny_lm.model, rows
    ours, theirs = new_cache(model.config, capacity), DynamicCache(config=model.config)
    got, want = feed(model, ours, ids, mask), feed(model, theirs, ids, mask)
    torch.testing.assert_close(got[:, -1], want[:, -1], atol=1e-5, rtol=1e-5)
    for step in range(7):
        if step == 3:
            kept = torch.tensor([2, 0])
            select_rows(ours, kept)
            theirs.batch_select_indices(kept)
            mask, got = mask[kept], got[kept]
        token, mask = got[:, -1].argmax(-1, keepdim=True), longer(mask)
        got, want = feed(model, ours, token, mask), feed(model, theirs, token, mask)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert ours.get_seq_length() == theirs.get_seq_length() == WIDTH + step + 1


def test_cached_logits_equal_an_uncached_forward(tiny_lm, rows):
    model, (ids, mask) = tiny_lm.model, rows
    cache = new_cache(model.config, WIDTH)
    feed(model, cache, ids[:, :4], mask[:, :4])
    feed(model, cache, ids[:, 4:5], mask[:, :5])
    got = feed(model, cache, ids[:, 5:], mask)
    for row, padding in enumerate(PADDING):
        with torch.no_grad():
            want = model(input_ids=ids[row : row + 1, padding:], use_cache=False).logits[0, -1]
        torch.testing.assert_close(got[row, -1], want, atol=1e-5, rtol=1e-5)


def test_buffers_double_when_full_and_keep_what_they_hold():
    layer = GrowingLayer(capacity=4)
    keys, values = torch.randn(2, 2, 2, 11, 3, generator=torch.Generator().manual_seed(0))
    capacities = []
    for slot in range(11):
        got_keys, got_values = layer.update(keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1])
        capacities.append(layer.capacity)
        assert torch.equal(got_keys, keys[:, :, : slot + 1])
        assert torch.equal(got_values, values[:, :, : slot + 1])
    assert capacities == [4] * 4 + [8] * 4 + [16] * 3
    assert layer.get_seq_length() == 11
    assert layer.get_mask_sizes(2) == (13, 0)


def test_a_leap_past_twice_the_capacity():
    layer = GrowingLayer(capacity=2)
    keys = torch.arange(24.0).reshape(1, 1, 12, 2)
    layer.update(keys[:, :, :1], keys[:, :, :1])
    got, _ = layer.update(keys[:, :, 1:], -keys[:, :, 1:])
    assert torch.equal(got, keys)
    assert layer.capacity == 12


@pytest.mark.parametrize("capacity", [WIDTH, 32])
def test_keep_branch_equals_having_fed_only_that_candidate(tiny_lm, rows, capacity):
    """Candidates in one forward that don't see each other; then one of each row stays and decoding goes on."""
    model, (ids, mask) = tiny_lm.model, rows
    candidates = torch.tensor([[3, 4, 5, 7], [7, 1, 2, 6], [6, 3, 0, 4]])
    choice = torch.tensor([2, 0, 3])
    ours, theirs = new_cache(model.config, capacity), DynamicCache(config=model.config)
    feed(model, ours, ids, mask)
    feed(model, theirs, ids, mask)
    count, chosen = candidates.shape[1], candidates.gather(1, choice[:, None])
    sees = torch.cat([mask[:, None, None, :].bool().expand(-1, 1, count, -1), torch.eye(count).bool().expand(len(ids), 1, -1, -1)], dim=-1)
    with torch.no_grad():
        positions = mask.sum(1, keepdim=True).expand(-1, count)
        branch = model(input_ids=candidates, attention_mask=sees, position_ids=positions, past_key_values=ours, use_cache=True).logits
    keep_branch(ours, WIDTH, choice)
    mask = longer(mask)
    want = feed(model, theirs, chosen, mask)
    torch.testing.assert_close(branch[torch.arange(len(ids)), choice], want[:, 0], atol=1e-5, rtol=1e-5)
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for row, padding in enumerate(PADDING):
            torch.testing.assert_close(mine.keys[row, :, padding:], other.keys[row, :, padding:], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mine.values[row, :, padding:], other.values[row, :, padding:], atol=1e-5, rtol=1e-5)
    for token in (4, 6):
        mask, following = longer(mask), torch.full((len(ids), 1), token)
        torch.testing.assert_close(feed(model, ours, following, mask), feed(model, theirs, following, mask), atol=1e-5, rtol=1e-5)


def test_keep_branch_after_dropping_rows(tiny_lm, rows):
    model, (ids, mask) = tiny_lm.model, rows
    cache, alone = new_cache(model.config, 32), new_cache(model.config, 32)
    feed(model, cache, ids, mask)
    kept = torch.tensor([1])
    select_rows(cache, kept)
    feed(model, alone, ids[kept], mask[kept])
    sees = torch.cat([mask[kept][:, None, None, :].bool().expand(-1, 1, 2, -1), torch.eye(2).bool()[None, None]], dim=-1)
    with torch.no_grad():
        positions = mask[kept].sum(1, keepdim=True).expand(-1, 2)
        model(input_ids=torch.tensor([[4, 5]]), attention_mask=sees, position_ids=positions, past_key_values=cache, use_cache=True)
    keep_branch(cache, WIDTH, torch.tensor([1]))
    feed(model, alone, torch.tensor([[5]]), longer(mask[kept]))
    following, mask = torch.tensor([[6]]), longer(mask[kept], 2)
    torch.testing.assert_close(feed(model, cache, following, mask), feed(model, alone, following, mask), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def sliding():
    return build_llama(8, layers=2, max_position=64, seed=5, config_class=MistralConfig, sliding_window=4)


def test_sliding_windows_fall_back_to_dynamic_cache(tiny_lm, sliding):
    cache = new_cache(sliding.config, 16)
    assert isinstance(cache, DynamicCache)
    assert not isinstance(new_cache(tiny_lm.model.config, 16), DynamicCache)
    ids = torch.randint(1, 8, (2, 10), generator=torch.Generator().manual_seed(9))
    feed(sliding, cache, ids[:, :7], torch.ones((2, 7), dtype=torch.long))
    select_rows(cache, torch.tensor([1]))
    got = [feed(sliding, cache, ids[1:, t : t + 1], torch.ones((1, t + 1), dtype=torch.long))[0, -1] for t in (7, 8, 9)]
    with torch.no_grad():
        want = sliding(input_ids=ids[1:], use_cache=False).logits[0, 7:]
    torch.testing.assert_close(torch.stack(got), want, atol=1e-5, rtol=1e-5)


def test_sliding_windows_keep_no_branches(sliding):
    cache = new_cache(sliding.config, 16)
    feed(sliding, cache, torch.tensor([[3, 4]]), torch.ones((1, 2), dtype=torch.long))
    with pytest.raises(UserError, match="attend to the full past"):
        keep_branch(cache, 1, torch.tensor([0]))
