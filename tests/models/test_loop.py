"""The token loop while it is open: requests that come and go between turns change nothing for the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import prompt
from equipoise.models.generation import Loop, Sampling, generate
from equipoise.types import Request, UserError

SAMPLING = Sampling(max_new_tokens=5, top_k=0, batch_size=3)
TEXTS = ("a", "b c d a", "c .", "d d d d d d d", "a b")


def requests(count: int) -> list[Request]:
    return [Request(id=f"r{i}", prompt=prompt(f"p{i}", TEXTS[i % len(TEXTS)]), seed=i, most_tokens=2 + i % 4) for i in range(count)]


@given(
    arrivals=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    cancelled=st.dictionaries(st.integers(0, 4), st.integers(0, 8), max_size=3),
)
@settings(max_examples=30, deadline=None)
def test_who_comes_and_goes_between_turns_changes_nothing_for_the_others(tiny_lm, arrivals, cancelled):
    asked = requests(5)
    alone = [generate(tiny_lm, [request], SAMPLING)[0] for request in asked]
    loop = Loop(tiny_lm, SAMPLING)
    jobs = [loop.job(request) for request in asked]
    gone = set()
    with torch.inference_mode():
        for turn in range(100):
            loop.submit([job for job, at in zip(jobs, arrivals, strict=True) if at == turn])
            for i, at in cancelled.items():
                if at == turn and arrivals[i] <= turn and jobs[i].result is None:
                    loop.cancel(jobs[i])
                    gone.add(i)
            if not loop.turn() and turn > max(arrivals):
                break
    assert not loop.turn()
    for i, job in enumerate(jobs):
        if i in gone:
            assert job.result is None
        else:
            found = loop.rollout(job)
            assert (found.tokens, found.text, found.finish_reason) == (alone[i].tokens, alone[i].text, alone[i].finish_reason)
            assert found.base_forwards == alone[i].base_forwards


def test_a_request_that_comes_late_joins_the_rows_that_run(tiny_lm):
    long = [r for r in requests(30) if len(generate(tiny_lm, [r], SAMPLING)[0].tokens) > 2]
    loop = Loop(tiny_lm, SAMPLING)
    first, second = long[:2]
    loop.submit([loop.job(first)])
    with torch.inference_mode():
        loop.turn()
        loop.submit([loop.job(second)])
        loop.turn()
    assert [row.job.request.id for row in loop.rows] == [first.id, second.id]


def test_its_own_tokens_in_place_of_the_template(tiny_lm):
    loop = Loop(tiny_lm, SAMPLING)
    assert loop.job(requests(1)[0], ids=[3, 4]).prompt == [3, 4]
    with pytest.raises(UserError, match="70 tokens"):
        loop.job(requests(1)[0], ids=[3] * 70)
