"""The event stream of one run: numbers and stamps events, and hands each to every sink in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from agentmesh.events import Event

Sink = Callable[[Event], None]


class EventStream:
    """Owned by one run. A sink that raises fails the run: a record is never lost in silence."""

    def __init__(self, sinks: Sequence[Sink], sample: str = "") -> None:
        self._sinks = tuple(sinks)
        self.sample = sample
        self._next = 0

    def emit(self, event: Event) -> None:
        """Number, stamp and deliver an event."""
        stamped = event.model_copy(update={"seq": self._next, "ts": time.time(), "sample": self.sample})
        self._next += 1
        for sink in self._sinks:
            sink(stamped)
