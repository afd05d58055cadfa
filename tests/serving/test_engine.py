"""The engine: who is there changes nothing for the others, clients take turns, and nothing that fails takes others with it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from conftest import prompt
from equipoise.models.generation import Loop, Sampling
from equipoise.serving.engine import BusyError, Done, Engine, Failed, FairQueue, Piece, Work
from equipoise.serving.errors import failure
from equipoise.serving.offers import Ask
from equipoise.types import Request
from serving.conftest import asked, serving

TEXTS = ("how do i make bread ?", "why", "what is good for people , yes or no ?")


@pytest.fixture
def service(make_service):
    made = make_service()
    made.engine.start()
    yield made
    made.engine.close(10)


class Box:
    """Collects what a work is told."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.end: Done | Failed | None = None
        self.over = threading.Event()

    def __call__(self, event: object) -> None:
        if isinstance(event, Piece):
            self.pieces.append(event)
        else:
            assert self.end is None
            self.end = event
            self.over.set()


def work_of(service, number: int, tell, *, method: str = "", client: str = "c", **ask) -> Work:
    method = method or ("reference", "values")[number % 2]
    asked = prompt(f"p{number}", TEXTS[number % 3])
    defaults = {"n": 1 + number % 2, "seed": number, "max_tokens": 3 + number % 7}
    if method != "reference":
        defaults |= {"weights": [number % 5 / 4, 1 - number % 5 / 4], "beta": 0.5 + number % 3}
    made = Ask(id=f"a{number}", prompt=asked, ids=service.encode(asked), **(defaults | ask))
    return service.work(made, service.offers[method], tell, client=client, streams=True)


def texts(box: Box) -> list[str]:
    assert box.over.wait(20)
    assert isinstance(box.end, Done), box.end
    return [one.reply.text for one in box.end.result.replies]


@given(
    order=st.permutations(range(9)),
    cancelled=st.sets(st.integers(0, 8), max_size=3),
    pauses=st.lists(st.sampled_from([0, 0, 0.003]), min_size=9),
)
@settings(max_examples=8, deadline=None)
def test_everybody_gets_what_they_would_get_alone(make_service, order, cancelled, pauses):
    service = make_service()
    service.engine.start()
    alone = {}
    for number in range(9):
        box = Box()
        service.engine.submit(work_of(service, number, box))
        alone[number] = texts(box)
        assert ["".join(p.text for p in box.pieces if p.index == i) for i in range(len(alone[number]))] == alone[number]
    boxes = {number: Box() for number in order}
    for number, pause in zip(order, pauses, strict=False):
        work = work_of(service, number, boxes[number], client=f"c{number % 3}")
        service.engine.submit(work)
        time.sleep(pause)
        if number in cancelled:
            service.engine.cancel(work)
    assert {n: texts(box) for n, box in boxes.items() if n not in cancelled} == {n: t for n, t in alone.items() if n not in cancelled}
    service.engine.close(10)
    assert (service.engine.running, service.engine.waiting) == (0, 0)


def test_clients_take_turns():
    queue = FairQueue()
    for client, item in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)):
        queue.put(client, item)
    queue.drop(lambda item: item == 2)
    assert [queue.pop() for _ in range(len(queue))] == [1, 4, 5, 3, 6]
    with pytest.raises(StopIteration):
        queue.pop()


def test_rows_of_other_weights_and_strengths_share_a_batch(service):
    boxes = [Box() for _ in range(4)]
    works = [work_of(service, 2 * i + 1, box, n=1, max_tokens=40, method="values") for i, box in enumerate(boxes)]
    assert len({work.key for work in works}) == 1
    for work in works:
        service.engine.submit(work)
    assert all(box.over.wait(20) for box in boxes)
    longest = max(len(box.end.result.replies[0].reply.rollout.tokens) for box in boxes)
    assert service.engine.counts.turns < 2 * longest + 8  # one after the other it would be their sum


def test_too_many_are_told_when_to_come_back(make_service):
    service = make_service(queue=4)
    with serving(service, {}) as address:
        held = Box()
        service.engine.submit(work_of(service, 0, held, n=4, max_tokens=48))
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**asked(n=8))
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "busy"
        assert texts(held)
        assert client.chat.completions.create(**asked(n=2)).choices  # later there is room


def test_a_client_that_goes_frees_its_rows(served, client):
    stream = client.chat.completions.create(**asked(max_tokens=48, n=8, temperature=2), stream=True)
    next(iter(stream))
    stream.response.close()
    deadline = time.monotonic() + 10
    while served.engine.running + served.engine.waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    assert served.engine.running + served.engine.waiting == 0


def test_a_client_that_goes_before_its_answer_frees_them_too(served, address, monkeypatch):
    """It isn't streamed, and the connection is closed once the first tokens were drawn; a token takes as long as a real model's."""
    turn = Loop.turn
    monkeypatch.setattr(Loop, "turn", lambda loop: time.sleep(0.01) or turn(loop))
    before = served.engine.counts.responses
    body = json.dumps(asked(max_tokens=48, n=8, temperature=2)).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        gone.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while not served.engine.running:
            time.sleep(0.001)
    deadline = time.monotonic() + 10
    while served.engine.running + served.engine.waiting and time.monotonic() < deadline:
        time.sleep(0.002)
    assert served.engine.running + served.engine.waiting == 0
    assert served.engine.counts.responses < before + 8


def test_what_breaks_takes_nothing_else_with_it(service, capsys):
    """A loop that raises fails its own work; the engine and other loops go on, and the message holds no client's text."""

    class Broken(Loop):
        def turn(self) -> bool:
            raise RuntimeError("how do i make bread")

    bad, good = Box(), Box()
    work = work_of(service, 2, bad)
    work.key, work.open = "broken", lambda: Broken(service.lm, Sampling(max_new_tokens=8))
    service.engine.submit(work)
    service.engine.submit(work_of(service, 4, good))
    assert bad.over.wait(10)
    assert isinstance(bad.end, Failed)
    assert texts(good)
    assert service.engine.running == 0
    told = failure(bad.end.error)
    assert (told.status, str(told)) == (500, "the server failed (RuntimeError)")
    assert "bread" not in capsys.readouterr().err


def test_a_result_that_fails_is_found_among_the_others(tiny_lm):
    """Finished together, concluded together; the one to blame fails alone."""

    def conclude(works):
        if any(work.about == "bad" for work in works):
            raise ValueError("bad")
        return [work.about for work in works]

    engine = Engine(conclude, places=4, queue=10)
    config = Sampling(max_new_tokens=2, batch_size=4)
    boxes = {about: Box() for about in ("good", "bad", "fine")}
    for about, box in boxes.items():
        request = Request(id=about, prompt=prompt("p", "a"), seed=0)
        work = Work(client="c", key="k", open=lambda: Loop(tiny_lm, config), requests=[request], ids=[3, 4], tell=box, about=about)
        engine._queue.put("c", (work, 0))
    engine.start()
    assert all(box.over.wait(10) for box in boxes.values())
    assert [type(box.end) for box in boxes.values()] == [Done, Failed, Done]
    engine.close(10)


def test_closing_finishes_what_is_there_and_takes_no_more(make_service):
    service = make_service()
    service.engine.start()
    boxes = [Box() for _ in range(6)]
    for number, box in enumerate(boxes):
        service.engine.submit(work_of(service, number, box, max_tokens=20))
    service.engine.close(20)
    assert all(isinstance(box.end, Done) for box in boxes)
    assert not service.engine.alive
    with pytest.raises(BusyError, match="going down"):
        service.engine.submit(work_of(service, 0, Box()))


def test_many_clients_at_once_over_http(address, client):
    """Sixteen streams of different weights at once: each says what it says alone."""

    def request(i: int) -> dict:
        return asked(TEXTS[i % 3], seed=i, max_tokens=6 + i % 5, extra_body={"weights": [i / 15, 1 - i / 15]})

    alone = [client.chat.completions.create(**request(i)).choices[0].message.content for i in range(16)]

    async def one(many: openai.AsyncOpenAI, i: int) -> str:
        stream = await many.chat.completions.create(**request(i), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as many:
            return await asyncio.gather(*(one(many, i) for i in range(16)))

    assert asyncio.run(together()) == alone
