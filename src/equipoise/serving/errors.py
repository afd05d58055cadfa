"""Errors as OpenAI's clients read them, of whatever went wrong."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Send

from equipoise.progress import say
from equipoise.serving.engine import BusyError
from equipoise.types import UserError


class RefusedError(Exception):
    """A request that gets an error of this status and code."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return error_body(self.status, str(self), self.code, self.param)


def failure(error: Exception) -> RefusedError:
    """What a client is told where the engine failed, which is logged with its place: the error's own text may hold a client's."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    say(f"the engine failed: {type(error).__name__} at {place}")
    return RefusedError(500, f"the server failed ({type(error).__name__})", "server_error")


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: Exception) -> tuple[int, str]:
    """(status, message) of an error; of a bug the message is its kind alone: its text may hold a client's."""
    if isinstance(error, RefusedError):
        return error.status, str(error)
    if isinstance(error, BusyError):
        return 429, str(error)
    if isinstance(error, UserError):
        return 400, str(error)
    return 500, f"the server failed ({type(error).__name__})"


def handle_errors(app: FastAPI, count: Callable[[int], None]) -> None:
    """Answer every error in OpenAI's shape, and count it."""

    async def refused(request: Request, error: Exception) -> Response:
        status, said = status_of(error)
        count(status)
        headers = {"Retry-After": str(round(error.retry_after))} if isinstance(error, BusyError) else {}
        code, param = getattr(error, "code", None), getattr(error, "param", None)
        if isinstance(error, BusyError):
            code = "busy"
        return JSONResponse(error_body(status, said, code, param), status, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        said = first["msg"].removeprefix("Value error, ")
        count(400)
        return JSONResponse(error_body(400, f"{where}: {said}" if where else said, "invalid_request", where or None), 400)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        count(error.status_code)
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, unknown)
    for kind in (RefusedError, UserError, BusyError, Exception):
        app.add_exception_handler(kind, refused)


async def send_error(send: Send, status: int, message: str, code: str | None, *, close: bool = False) -> None:
    """Answer a request before any application has seen it."""
    body = json.dumps(error_body(status, message, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if close else []
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
