"""The door: no request goes further without the key, or before its body is there, in time and not too long."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from equipoise.serving.errors import RefusedError, send_error
from equipoise.serving.service import Limits


class Gatekeeper:
    """Checks the key, and reads a body whole, in time and up to its longest, before anything else sees the request."""

    def __init__(self, app: ASGIApp, limits: Limits, key: str | None) -> None:
        self._app, self._limits = app, limits
        self._key = hashlib.sha256(key.encode()).digest() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, headers = scope["path"], {name.lower(): value for name, value in scope["headers"]}
        if self._key and (path.startswith("/v1/") or path == "/metrics"):
            given = headers.get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            # Digests are of one length, so that the time tells nothing of the key.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(hashlib.sha256(token.strip()).digest(), self._key):
                return await send_error(send, 401, "the key is wrong or missing: send it as `Authorization: Bearer KEY`", "invalid_api_key")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self._app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(receive), self._limits.body_s)
        except TimeoutError:
            return await send_error(send, 408, f"the body wasn't there after {self._limits.body_s:g} s", "timeout", close=True)
        except RefusedError as error:
            return await send_error(send, error.status, str(error), error.code, close=True)
        except ConnectionResetError:
            return None
        return await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.body_bytes:
                raise RefusedError(413, f"the body is longer than {self._limits.body_bytes} bytes: shorten it", "too_large")
            if not message.get("more_body", False):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The body once, then what else comes: that the client has gone."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
