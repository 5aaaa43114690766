"""The process: a socket, signals, and an end that lets runs finish."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

import uvicorn

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
