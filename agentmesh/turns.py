"""The order of a mesh's runs, and how many of them overlap."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, final

from agentmesh.config.base import PATTERN_WORDS, TENANT
from agentmesh.errors import InputError, UsageError
from agentmesh.prompt import Reader

Result = TypeVar("Result")

LAG = 8
"""A deterministic run uses what was learned up to so many runs before it: no more may overlap."""


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Await everything at once, results in order; the first failure, or being cancelled, cancels the others.

    None of them runs any more when it returns or raises, so what they use may be closed then.
    """
    runs = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*runs)
    finally:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)


def refuse_inside_loop(instead: str) -> None:
    """Refuse to begin an event loop where one is running already, as in a notebook.

    Raises:
        UsageError: one is; says what to write instead.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UsageError(f"an event loop is running here already; use {instead}")


def tenant_name(named: str) -> str:
    """A text that can name a tenant, as it is.

    Raises:
        InputError: it cannot.
    """
    if not re.fullmatch(TENANT, named):
        raise InputError(f"tenant {named!r}: expected {PATTERN_WORDS[TENANT]}")
    return named


@final
class Turns:
    """Numbers runs in the order they are asked for, and lets as many run at once as the mesh is wide.

    Args:
        width: how many runs may overlap; asked when the first one begins.
        deterministic: whether what a run sees of earlier ones depends on its number alone; then no wider than ``LAG``.
        tenant: of runs that name none.
    """

    def __init__(self, width: Callable[[], int], *, deterministic: bool, tenant: str = "") -> None:
        self._width = width
        self._deterministic = deterministic
        self._tenant = tenant
        self._numbers = itertools.count()
        self._ends: dict[int, asyncio.Event] = {}
        self._room: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    def tenant(self, named: str) -> str:
        """The tenant that is named, else the usual one.

        Raises:
            InputError: that is no name for a tenant.
        """
        return tenant_name(named) or self._tenant

    @asynccontextmanager
    async def turn(self, tenant: str = "") -> AsyncIterator[Reader]:
        """Wait for room, and give a tenant's run its number and what it sees; see ``tenant``."""
        tenant, number = self.tenant(tenant), next(self._numbers)
        sees = number - LAG if self._deterministic else None
        self._ends[number] = asyncio.Event()
        try:
            async with self._semaphore():
                if sees is not None:
                    await self._wait_for(sees)
                yield Reader(run=f"run {number}", order=number, sees=sees, tenant=tenant)
        finally:
            self._ends.pop(number).set()

    async def _wait_for(self, last: int) -> None:
        """Wait until every run up to a number has ended."""
        while pending := [event for number, event in self._ends.items() if number <= last]:
            await pending[0].wait()

    def _semaphore(self) -> asyncio.Semaphore:
        """The room for runs; one an event loop."""
        loop = asyncio.get_running_loop()
        if self._room is None or self._room[0] is not loop:
            self._room = loop, asyncio.Semaphore(self._width())
        return self._room[1]
