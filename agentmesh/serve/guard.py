"""What every request passes before it is read: keys, sizes, times; and what every answer carries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import final

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentmesh.serve.keys import METRICS, Keys, is_loopback
from agentmesh.serve.limits import Limits
from agentmesh.serve.problems import RefusedError

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PRIVATE = ("/v1/", "/api/", "/metrics")


class _StalledError(Exception):
    """A client has read nothing for too long."""


def tenant_of(request: Request) -> str:
    """Whose request it is; the guard has found that out."""
    tenant: str = request.state.tenant
    return tenant


def response(refused: RefusedError) -> JSONResponse:
    """An error as the client gets it."""
    return JSONResponse(refused.body, refused.status, refused.headers)


@final
class Guard:
    """ASGI middleware around everything else.

    Args:
        app: everything else.
        keys: whose requests are answered.
        limits: of bodies, and of a client's slowness.
        responded: told the status of every answer.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, responded: Callable[[int], None]) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._responded = responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def patiently(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                self._responded(message["status"])
            try:
                await asyncio.wait_for(send(message), self._limits.stall_s)
            except asyncio.TimeoutError:
                raise _StalledError from None

        try:
            scope.setdefault("state", {})["tenant"] = self._let_in(scope["method"], scope["path"], Headers(scope=scope))
            body = await self._body(receive)
        except RefusedError as refused:
            answer = response(refused)
            answer.headers["Connection"] = "close"  # what is left of the body is not read
            await answer(scope, receive, patiently)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Message:
            return first.pop() if first else await receive()

        with suppress(_StalledError):  # the connection is closed, because its answer is not complete
            await self._app(scope, read, patiently)

    def _let_in(self, method: str, path: str, headers: Headers) -> str:
        """Whose request it is.

        Raises:
            RefusedError: nobody's who may do this, or one that another site's page could make a browser send.
        """
        if method == "POST" and not headers.get("content-type", "").startswith("application/json"):
            raise RefusedError(415, "expected a JSON body, with the header Content-Type: application/json")
        if not self._keys:
            host = headers.get("host", "")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if not is_loopback(name.strip("[]")):
                raise RefusedError(
                    421, f"host {host[:80]!r}: without API keys only this machine's names are answered to"
                )
            return ""
        if not path.startswith(PRIVATE):
            return ""
        tenant = self._keys.tenant(headers.get("authorization", ""))
        if tenant is None or (tenant == METRICS) is not path.startswith("/metrics"):
            message = "no API key that may do this; send one as `Authorization: Bearer KEY`"
            raise RefusedError(401, message, kind="authentication_error", code="invalid_api_key")
        return tenant

    async def _body(self, receive: Receive) -> bytes:
        """A request's whole body.

        Raises:
            RefusedError: it is too long, takes too long, or ends early.
        """
        try:
            return await asyncio.wait_for(self._read(receive), self._limits.body_s)
        except asyncio.TimeoutError:
            raise RefusedError(408, f"the body took longer than {self._limits.body_s:g} s to arrive") from None

    async def _read(self, receive: Receive) -> bytes:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "the body ended early")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limits.body_bytes:
                raise RefusedError(413, f"the body is longer than {self._limits.body_bytes:,} bytes, which is the most")
        return body
