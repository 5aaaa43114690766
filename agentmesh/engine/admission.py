"""Who may begin: requests in the order of their runs, as long as memory lasts for their caches."""

from __future__ import annotations

from typing import Any, final

from transformers.cache_utils import Cache

from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.forward import Runner
from agentmesh.engine.request import Request
from agentmesh.engine.slices import Slices
from agentmesh.errors import RequestTooLongError
from agentmesh.kv.arena import Arena

AHEAD = 128
"""Tokens behind a prompt for which memory is claimed when its cache is opened. Most messages are no longer."""


@final
class Admission:
    """The caches of requests that have begun, and the requests that wait for their turn. Used on the engine's thread.

    Args:
        runner: opens caches.

    Attributes:
        held: caches of requests that have begun and are not over.
        waiting: requests that have not begun.
        beside: long work that is under way beside requests, and may hold memory until it is done.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.held: list[Cache] = []
        self.waiting: list[Request] = []
        self.beside: set[Slices[Any]] = set()

    @property
    def live_bytes(self) -> int:
        """Bytes of KV of all requests that are not over yet, of looks and passages, and of arenas that wait for use."""
        return self._runner.nbytes

    def drop_spare(self) -> int:
        """Free the arenas that wait to be used again; their bytes."""
        return self._runner.pool.clear()

    def admit(self, request: Request) -> bool:
        """Whether a request may begin now, or has to wait for its turn.

        Raises:
            RequestTooLongError: it would not fit even if it were alone.
        """
        whole, alone = self._runner.size(request.capacity), not self.held and not self.beside
        if whole > request.source.limit:
            raise _never_fits(request, whole, "is smaller than that")
        first = all(request.rank <= other.rank for other in self.waiting)
        if first and self._has_room(request, alone=alone):
            if request in self.waiting:
                self.waiting.remove(request)
            self.wake()
            return True
        if first and alone:
            raise _never_fits(request, whole, f"holds {request.source.used / 2**20:.1f} MiB that cannot be given up")
        self.postpone(request)
        return False

    def _has_room(self, request: Request, *, alone: bool) -> bool:
        """Make room for a request's cache. Making it may free the very arena that would have been used again."""
        need = self._runner.need(request.capacity)
        while request.source.room(need, alone=alone):
            if self._runner.need(request.capacity) <= need:
                return True
            need = self._runner.size(request.capacity)
        return False

    def postpone(self, request: Request) -> None:
        """Let a request wait until ``wake``."""
        if request not in self.waiting:
            self.waiting.append(request)

    def open(self, request: Request) -> Cache:
        """The cache of a request that was admitted; at once, since a look at the store could take its room."""
        cache = request.cache = self._runner.open(request.capacity)
        self.held.append(cache)
        arena = arena_of(cache)
        if arena is not None:
            arena.claim(slice(request.tokens, request.tokens + AHEAD))
        return cache

    def close(self, request: Request) -> None:
        """Give up a request's cache or its place among those that wait, and let the next one try.

        It holds nothing any more: what still knows of it, such as callbacks, keeps no memory.
        """
        request.gone = True
        if request in self.waiting:
            self.waiting.remove(request)
        if request.cache is not None:
            self.held = [cache for cache in self.held if cache is not request.cache]
            self._runner.close(request.cache)
        request.cache = request.prefill = request.sequence = None
        self.wake()

    def wake(self) -> None:
        """Let the request that comes first try again, when memory may be free or it was postponed."""
        if self.waiting:
            min(self.waiting, key=lambda request: request.rank).wake()


def _never_fits(request: Request, need: int, why: str) -> RequestTooLongError:
    return RequestTooLongError(
        f"the prompt and its message may take {request.capacity:,} tokens, {need / 2**20:.1f} MiB of KV, and the "
        f"budget of {request.source.limit / 2**20:.1f} MiB {why}. Raise communicator.budget, or shorten the prompt or "
        "generate.max_tokens"
    )


def arena_of(cache: Cache) -> Arena | None:
    """The arena behind a cache; ``None`` where it is transformers' own."""
    return cache.arena if isinstance(cache, ArenaCache) else None
