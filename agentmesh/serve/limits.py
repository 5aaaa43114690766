"""How much a server takes on: its limits, and the gate that runs pass."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import final

from agentmesh.serve.problems import busy

LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Limits:
    """What one server takes on; times in seconds.

    Args:
        runs: how many may be at work at once.
        queue: how many more may wait for their turn.
        tenant_runs: how many one tenant may have at work and waiting together.
        wait_s: how long one waits for its turn before it is refused.
        run_s: how long one may take, waiting included.
        body_bytes: of a request.
        body_s: how long a request's body may take to arrive.
        input_tokens: of all inputs of a run together.
        history: finished runs that are kept for each tenant.
        history_bytes: of their events, for each tenant.
        beat_s: between two signs of life on a silent event stream.
        stall_s: how long a client may read nothing of what is sent to it.
        drain_s: how long runs may go on when the server is asked to stop.
    """

    runs: int = 16
    queue: int = 64
    tenant_runs: int = 64
    wait_s: float = 60.0
    run_s: float = 600.0
    body_bytes: int = 2**20
    body_s: float = 30.0
    input_tokens: int = 32_768
    history: int = 100
    history_bytes: int = 32 * 2**20
    beat_s: float = 10.0
    stall_s: float = 60.0
    drain_s: float = 30.0


@dataclass(eq=False)
class Ticket:
    """One run's place at the gate: waiting, then at work."""

    tenant: str
    at_work: bool = False
    go: asyncio.Event = field(default_factory=asyncio.Event)


@final
class Gate:
    """Owns who is at work and who waits. The tenant with the fewest runs at work is next, then the first to come."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: list[Ticket] = []
        self._at_work: Counter[str] = Counter()
        self._typical_s = 1.0

    @property
    def at_work(self) -> int:
        """How many runs are at work."""
        return self._at_work.total()

    @property
    def waiting(self) -> int:
        """How many runs wait for their turn."""
        return len(self._waiting)

    def claim(self, tenant: str) -> Ticket:
        """A place for one more run; ``close`` gives it back.

        Raises:
            RefusedError: there is none.
        """
        own = self._at_work[tenant] + sum(ticket.tenant == tenant for ticket in self._waiting)
        if self.waiting + self.at_work >= self._limits.runs + self._limits.queue:
            raise busy(
                f"{self.at_work} runs are at work and {self.waiting} wait, which is all this server takes on; "
                "try again later",
                self.retry_after,
            )
        if own >= self._limits.tenant_runs:
            raise busy(f"{own} runs of yours are at work or wait, which is all a key may have", self.retry_after)
        ticket = Ticket(tenant)
        self._waiting.append(ticket)
        self._next()
        return ticket

    async def turn(self, ticket: Ticket) -> None:
        """Wait until a run may begin.

        Raises:
            RefusedError: that took too long.
        """
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ticket.go.wait(), self._limits.wait_s)
        if not ticket.at_work:
            waited = f"{self._limits.wait_s:g} s"
            raise busy(f"the run waited {waited} for its turn and none came; try again later", self.retry_after)

    def close(self, ticket: Ticket, took_s: float | None) -> None:
        """A run has ended ``took_s`` seconds after its beginning; ``None`` for one that will never begin."""
        if ticket.at_work:
            self._at_work[ticket.tenant] -= 1
            self._typical_s += 0.0 if took_s is None else (took_s - self._typical_s) / 8
        else:
            self._waiting.remove(ticket)
        self._next()

    @property
    def retry_after(self) -> int:
        """Seconds until there may be room: what the waiting runs are likely to take."""
        return max(1, min(LONGEST_RETRY_S, math.ceil(self._typical_s * (1 + self.waiting / self._limits.runs))))

    def _next(self) -> None:
        while self._waiting and self.at_work < self._limits.runs:
            ticket = min(self._waiting, key=lambda one: self._at_work[one.tenant])
            self._waiting.remove(ticket)
            self._at_work[ticket.tenant] += 1
            ticket.at_work = True
            ticket.go.set()
