"""Prompts with several responses: log-probabilities against plain forwards, shared and apart; what is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import build_llama, prompt
from decoding.rows import plain_forward
from equipoise.models.completions import Completions, completion_batch, completions_of
from equipoise.models.logprobs import can_share, completion_logprobs, completion_sums
from equipoise.types import UserError

ids = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple)
ROWS = [Completions((3, 4, 5), ((6, 2), (6, 7, 3, 2))), Completions((4,), ((5, 5, 2), (2,)))]


def by_hand(lm, row: Completions) -> list[list[float]]:
    """One uncached, unpadded forward per token."""
    found = []
    for response in row.responses:
        logits = [plain_forward(lm, [[*row.prompt, *response[:t]]])[0][0] for t in range(len(response))]
        found.append([float(row[token] - np.logaddexp.reduce(row)) for row, token in zip(logits, response, strict=True)])
    return found


@pytest.mark.parametrize("shared", [False, True])
@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.tuples(ids, st.tuples(ids, ids, ids)), min_size=1, max_size=2))
def test_three_responses_of_two_prompts_are_what_single_forwards_say(tiny_lm, shared, rows):
    rows = [Completions(*row) for row in rows]
    batch = completion_batch(rows, shared=shared)
    with torch.inference_mode():
        found_BMT = completion_logprobs(tiny_lm.model, batch).numpy()
    for row, found_MT, real_MT in zip(rows, found_BMT, batch["real"].numpy(), strict=True):
        for expected, found_T, real_T in zip(by_hand(tiny_lm, row), found_MT, real_MT, strict=True):
            assert real_T.sum() == len(expected)
            np.testing.assert_allclose(found_T[: len(expected)], expected, atol=2e-5)
            assert not found_T[len(expected) :].any()


def test_a_shared_prompt_is_encoded_once():
    assert completion_batch(ROWS[:1], shared=True)["input_ids"].shape == (1, 3 + 2 + 4)
    assert completion_batch(ROWS[:1], shared=False)["input_ids"].shape == (2, 3 + 4)
    assert (ROWS[0].tokens(shared=True), ROWS[0].tokens(shared=False)) == (9, 14)


def test_sharing_changes_neither_sums_nor_gradients_nor_does_the_batch():
    model = build_llama(8, layers=2, max_position=16, seed=3).requires_grad_(True)
    grads = []
    for shared in (False, True):
        for rows in (ROWS, ROWS[:1]):
            model.zero_grad()
            completion_logprobs(model, completion_batch(rows, shared=shared))[0].sum().backward()
            grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=1e-5, rtol=1e-4)
    sums = [completion_sums(model, ROWS, shared=shared, batch_tokens=budget) for shared in (False, True) for budget in (1, 99)]
    for other in sums[1:]:
        np.testing.assert_allclose(np.stack(other), np.stack(sums[0]), atol=1e-5)
    assert can_share(model, ROWS)


def test_the_projection_is_the_models_own_again_afterwards(tiny_lm):
    before = plain_forward(tiny_lm, [[3, 4]])[0]
    completion_sums(tiny_lm.model, ROWS, shared=True)
    np.testing.assert_array_equal(plain_forward(tiny_lm, [[3, 4]])[0], before)


def test_a_limit_cuts_the_prompts_beginning_alike_for_all_and_is_marked(tiny_tokenizer):
    asked = prompt("p", "a b c d")
    whole = completions_of(tiny_tokenizer, asked, ("a b", "c"))
    short = completions_of(tiny_tokenizer, asked, ("a b", "c"), limit=len(whole.prompt) + 3 - 2)
    assert (whole.cut, short.cut) == (False, True)
    assert short.responses == whole.responses == ((3, 4, 2), (5, 2))
    assert len(short.prompt) == len(whole.prompt) - 2
    cut = completions_of(tiny_tokenizer, asked, ("a b", "c d e f a b c d e f a b c d e f a b c d"), limit=12)
    assert cut.responses[0][-1] == tiny_tokenizer.eos_token_id != cut.responses[1][-1]  # nobody is taught to end where the limit is
    open_end = completions_of(tiny_tokenizer, asked, ("a b", "c"), finished=(False, True))
    assert open_end.responses == ((3, 4), (5, 2))
    with pytest.raises(UserError, match="no room for a response"):
        completions_of(tiny_tokenizer, asked, ("a", "b"), limit=1)
