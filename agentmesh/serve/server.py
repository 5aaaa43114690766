"""The process: a socket, signals, and an end that lets runs finish."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from agentmesh.errors import UsageError
from agentmesh.serve.app import Service, make_app
from agentmesh.serve.runs import Runs

CONNECTIONS = 1024
KEEP_ALIVE_S = 15


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything is loaded; it is closed as a context manager.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}; try another --port") from error
    return made


def run(service: Service, listen: socket.socket, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, let runs end, and return.

    Args:
        service: what is served.
        listen: where.
        say: told what a person wants to know.

    Raises:
        KeyboardInterrupt: SIGINT ended it.
    """
    app = make_app(service)
    config = uvicorn.Config(
        app,
        http=Punctual,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(service.limits.drain_s) + 5,
        server_header=False,
    )
    host, port = listen.getsockname()[:2]
    listen.listen(CONNECTIONS)  # who reads the line below may connect at once
    say(f"serving {', '.join(service.meshes)} at http://{f'[{host}]' if ':' in host else host}:{port}")
    server = _Server(config, app.state.runs, say)
    asyncio.run(server.serve(sockets=[listen]))
    if server.interrupted:
        raise KeyboardInterrupt


@final
class Punctual(H11Protocol):
    """Uvicorn's HTTP, closing connections on which no whole head of a request comes within ``timeout_keep_alive``.

    Left to itself it waits for the first one for ever, and nobody needs a key to take up all connections with that.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn's own
        """A client is there, and silent so far."""
        super().connection_made(transport)
        self._expect(silent=True)

    def data_received(self, data: bytes) -> None:
        """Something came: a head, or a part of one, or of a body."""
        super().data_received(data)
        self._expect(silent=self.conn.their_state is h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._expect(silent=False)
        super().connection_lost(exc)

    def _expect(self, *, silent: bool) -> None:
        """Wait for a head from the first moment on in which one is missing."""
        if silent and self._late is None:
            self._late = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        elif not silent and self._late is not None:
            self._late.cancel()
            self._late = None


@final
class _Server(uvicorn.Server):
    """Uvicorn, with an orderly end: the first signal lets runs end, the second cancels them."""

    def __init__(self, config: uvicorn.Config, runs: Runs, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._runs = runs
        self._say = say
        self.interrupted = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Heed both signals while serving, and raise none of them again."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is idle, and let runs end meanwhile."""
        draining = asyncio.ensure_future(self._runs.drain())
        await super().shutdown(sockets)
        await draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # uvicorn's signature
        """Begin to stop, or stop at once."""
        self.interrupted |= sig == signal.SIGINT
        if self.should_exit:
            self._runs.cancel_all()
        else:
            self._say("stopping: no new runs; those at work may end (once more to cancel them)")
            self._runs.closing = True
            self.should_exit = True
