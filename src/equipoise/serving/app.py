"""The endpoint: OpenAI's paths over the service, its errors in OpenAI's shape, and the page.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/equipoise   GET /health   GET /metrics   GET /

Of a reply, `equipoise` holds what OpenAI has no field for: by choice the rewards, the exact KL and what pushed each token; of the
whole the weights, multipliers and beta, what was promised for targets, and what it has cost. No text of a request is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from equipoise.runs import plain
from equipoise.serving.door import Gatekeeper
from equipoise.serving.engine import Done, Event, Failed, Piece, Work
from equipoise.serving.errors import RefusedError, failure, handle_errors
from equipoise.serving.measures import Measures
from equipoise.serving.offers import Ask, Offer
from equipoise.serving.schema import Asked, ChatRequest, CompletionRequest
from equipoise.serving.service import Service
from equipoise.serving.writing import Writer, line_of
from equipoise.types import Message as ChatMessage
from equipoise.types import Prompt, UserError

STATIC = Path(__file__).parent / "static"
_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # parts of two versions don't fit
}


def make_app(service: Service, about: Mapping[str, Any], key: str | None = None) -> FastAPI:
    """The application; `about` is what the page is told of fronts, `key` the one that requests must bring, if any."""
    measures = Measures(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.close)

    app = FastAPI(title="equipoise", lifespan=lifespan, docs_url=None, redoc_url=None)
    handle_errors(app, measures.refused)
    desk = Desk(service, measures)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await desk.answer(body, request, chat=True)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await desk.answer(body, request, chat=False)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base model under each method."""
        return {"object": "list", "data": [_model(service, offer) for offer in service.offers.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _model(service, desk.offer(name, None, None, None))

    @app.get("/v1/equipoise")
    async def equipoise() -> JSONResponse:
        """What the page has to know: objectives, methods, limits and fronts."""
        return JSONResponse(plain(_about(service) | dict(about)))

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests would be served."""
        up = service.engine.alive
        said = {"status": "ok" if up else "down", "running": service.engine.running, "waiting": service.engine.waiting}
        return JSONResponse(said, 200 if up else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(measures.text(), media_type=measures.media_type)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        """The page."""
        return FileResponse(STATIC / "index.html", headers=_SECURITY)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> FileResponse:
        """The page's parts."""
        if name not in {path.name for path in STATIC.iterdir()}:
            raise RefusedError(404, f"there is no {name!r} here", "not_found")
        return FileResponse(STATIC / name, headers=_SECURITY)

    app.add_middleware(Gatekeeper, limits=service.limits, key=key)
    return app


class Desk:
    """Turns bodies into work, waits for it, and writes what came of it."""

    def __init__(self, service: Service, measures: Measures) -> None:
        self._service, self._measures, self._numbers = service, measures, itertools.count()

    def offer(self, model: str, method: str | None, weights: object, targets: object) -> Offer:
        """The offer that a request names. Raises `RefusedError` for an unknown model or method."""
        offers, base = self._service.offers, self._service.lm.name
        of_model = model.removeprefix(base).removeprefix(":") if model == base or model.startswith(f"{base}:") else model
        if of_model and of_model not in offers:
            known = ", ".join(f"{base}:{name}" for name in offers)
            raise RefusedError(404, f"there is no model {model!r}; there are {known}", "model_not_found", "model")
        if method is not None and method not in offers:
            raise RefusedError(400, f"there is no method {method!r}; there are {', '.join(offers)}", "unknown_method", "method")
        if of_model and method is not None and method != of_model:
            raise RefusedError(400, f"the model {model!r} and the method {method!r} contradict each other", "contradiction", "method")
        name = of_model or method
        if name is None:
            reads = "targets" if targets is not None else "weights" if weights is not None else None
            name = next((o.name for o in offers.values() if reads in o.reads), None) if reads else "reference"
            if name is None:
                raise RefusedError(400, f"no method here reads {reads}; there are {', '.join(offers)}", "unknown_method", reads)
        return offers[name]

    def ask(self, body: Asked, number: str) -> Ask:
        """The body as an ask. Raises `RefusedError` and `UserError` for what is too large or doesn't fit."""
        limits, chat = self._service.limits, isinstance(body, ChatRequest)
        if body.n > limits.responses:
            raise RefusedError(400, f"n is {body.n}, of at most {limits.responses}: lower it", "too_large", "n")
        most = (body.max_completion_tokens if isinstance(body, ChatRequest) else None) or body.max_tokens
        if most is not None and most > limits.max_tokens:
            raise RefusedError(400, f"max_tokens is {most}, of at most {limits.max_tokens}: lower it", "too_large", "max_tokens")
        if isinstance(body, ChatRequest):
            roles = {"developer": "system"}
            turns = tuple(ChatMessage(role=roles.get(turn.role, turn.role), content=turn.text) for turn in body.messages)
        else:
            assert isinstance(body, CompletionRequest)
            turns = (ChatMessage(role="user", content=body.prompt),)
        prompt = Prompt(id=number, messages=turns)
        try:
            ids = self._service.encode(prompt, completes=not chat)
        except UserError as error:
            long = "tokens, of at most" in str(error)
            code = "context_length_exceeded" if long else "invalid_prompt"
            raise RefusedError(400, str(error), code, "messages" if chat else "prompt") from None
        room = self._service.lm.context_length - len(ids)
        return Ask(
            id=number,
            prompt=prompt,
            ids=ids,
            n=body.n,
            seed=random.getrandbits(53) if body.seed is None else body.seed,
            max_tokens=most or max(1, min(limits.max_tokens, 64, room)),
            temperature=1.0 if body.temperature is None else body.temperature,
            weights=body.weights,
            targets=body.ask,
            kl_budget=body.kl_budget,
            beta=body.beta,
            completes=not chat,
        )

    async def answer(self, body: Asked, request: Request, *, chat: bool) -> Response:
        """The response to a body, whole or as a stream."""
        begun, number = time.monotonic(), f"{'chatcmpl' if chat else 'cmpl'}-{next(self._numbers)}-{random.getrandbits(48):012x}"
        offer = self.offer(body.model, body.method, body.weights, body.ask)
        events: asyncio.Queue[Event] = asyncio.Queue()
        running = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server has gone
                running.call_soon_threadsafe(events.put_nowait, event)

        client = f"{request.client.host if request.client else ''}/{body.user or ''}"

        def prepare() -> tuple[Ask, Work]:
            ask = self.ask(body, number)
            options: dict[str, Any] = {"stop": body.stops, "streams": body.stream, "explains": body.explain, "scores": body.scores}
            return ask, self._service.work(ask, offer, tell, client=client, **options)

        ask, work = await run_in_threadpool(prepare)
        self._service.engine.submit(work)
        writer = Writer(self._service, offer, ask, chat=chat)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            lines = self._stream(writer, work, events, usage, begun)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        event = await self._wait(work, events, request)
        if isinstance(event, Failed):
            raise failure(event.error)
        self._measures.answered(offer.name, event.result, time.monotonic() - begun)
        return JSONResponse(plain(writer.whole(event.result)))

    async def _wait(self, work: Work, events: asyncio.Queue[Event], request: Request) -> Done | Failed:
        """The end of the work, which is cancelled where the client has gone."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            while True:
                coming = asyncio.ensure_future(events.get())
                await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    raise RefusedError(499, "the client has gone", "cancelled")
                event = coming.result()
                if not isinstance(event, Piece):
                    return event
        except BaseException:
            self._service.engine.cancel(work)
            raise
        finally:
            gone.cancel()

    async def _stream(self, writer: Writer, work: Work, events: asyncio.Queue[Event], usage: bool, begun: float) -> AsyncIterator[str]:
        """Server-sent events: the pieces as they come, then the ends, the usage where it is wanted, and [DONE]."""
        try:
            for line in writer.openings():
                yield line
            while True:
                event = await events.get()
                if isinstance(event, Piece):
                    yield writer.piece(event)
                elif isinstance(event, Failed):
                    yield line_of(failure(event.error).body)
                    return
                else:
                    for line in writer.closings(event.result, usage):
                        yield line
                    self._measures.answered(writer.offer.name, event.result, time.monotonic() - begun)
                    yield "data: [DONE]\n\n"
                    return
        finally:
            self._service.engine.cancel(work)


def _model(service: Service, offer: Offer) -> dict[str, Any]:
    said = {"method": offer.name, "about": offer.about, "reads": offer.reads, "objectives": offer.objectives, "explains": offer.explains}
    said |= {"weights": dict(zip(offer.objectives, offer.fixed, strict=True))} if offer.fixed else {}
    said |= {"strength": dict(offer.strength)} if offer.strength else {}
    name = f"{service.lm.name}:{offer.name}"
    return {"id": name, "object": "model", "created": service.started, "owned_by": "equipoise", "equipoise": said}


def _about(service: Service) -> dict[str, Any]:
    limits = {name: getattr(service.limits, name) for name in ("prompt_tokens", "max_tokens", "responses", "candidates")}
    return {
        "model": service.lm.name,
        "objectives": service.names,
        "scaled": service.scale is not None,
        "limits": limits,
        "methods": [_model(service, offer)["equipoise"] for offer in service.offers.values()],
    }


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":  # the body is there already: nothing else comes
        pass
