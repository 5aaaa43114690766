"""What the engine's thread tells event loops: gathered, while it decodes a step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import final

Call = Callable[[], object]


@final
class Outbox:
    """Calls that event loops are asked to make, in order. Used on the engine's thread.

    Each call wakes a loop's thread, which then wants a core and Python's lock while the next tokens are computed. So
    the calls of all sequences of one step go together.
    """

    def __init__(self) -> None:
        self._gathered: dict[asyncio.AbstractEventLoop, list[Call]] | None = None

    def add(self, loop: asyncio.AbstractEventLoop, call: Call) -> None:
        """Ask a loop for a call: now, or with the others if they are being gathered; a closed loop hears nothing."""
        if self._gathered is None:
            _send(loop, [call])
        else:
            self._gathered.setdefault(loop, []).append(call)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """What is added inside is sent at the end."""
        self._gathered = {}
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            for loop, calls in gathered.items():
                _send(loop, calls)


def _send(loop: asyncio.AbstractEventLoop, calls: list[Call]) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_make, calls)


def _make(calls: list[Call]) -> None:
    for call in calls:
        call()
