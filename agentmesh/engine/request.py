"""What the engine is asked for: one prompt's request, and where its prompt comes from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers.cache_utils import Cache

from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.prefill import Prefill
from agentmesh.engine.sampling import Sampling
from agentmesh.engine.sequence import Sequence
from agentmesh.engine.slices import Slices
from agentmesh.kv.arena import Arena


class Source(Protocol):
    """Where one request's prompt comes from. All methods are called on the engine's thread, in this order."""

    @property
    def since(self) -> float | None:
        """When the run that it belongs to began, by ``time.perf_counter``; ``None`` where it belongs to none."""

    @property
    def limit(self) -> int:
        """Bytes of KV that there is ever room for."""

    @property
    def used(self) -> int:
        """Bytes of it that are in use now."""

    def room(self, need: int, *, alone: bool) -> bool:
        """Make room for ``need`` bytes of KV beside what is live; False where that must wait, or can never be.

        Args:
            need: bytes.
            alone: whether nothing else is live, so that waiting would not help.
        """

    def compose(self) -> tuple[Composition, Parts]:
        """Decide what to place, right before the prefill, and say how long that took."""

    def placed(self) -> None:
        """What is placed has been copied; what was made for it alone is needed no more."""

    def prefilled(self, arena: Arena) -> None:
        """Look at the arena when the first token is out; what is kept now, the next prompt can use."""

    def finished(self, arena: Arena, tokens: tuple[int, ...]) -> None:
        """Look at the arena with the whole message in it."""

    def checked(self, cache: ArenaCache, logits: torch.Tensor) -> Slices[None]:
        """Check the call in its own cache, whose rows nobody needs any more; ``logits [V]`` are its first token's.

        In slices: others have the thread between two of them, and the call may be cancelled there.
        """

    def closed(self) -> None:
        """The request is over, whatever happened."""


@dataclass(eq=False)
class Request:
    """One call of ``Engine.generate``, which arrived at a second.

    Its event loop hears of pieces of text, and at last of ``None``, through ``tell``, and of its turn through ``call``.
    It has a cache and a prefill from the second at which it began, and a sequence from its first token, whose time (or
    the error that came before it) is what ``first`` resolves to. When its message is out it is ``checking``, and the
    source has looked at it for ``learn_s``. Once ``gone``, nobody wants it any more.
    """

    source: Source
    tokens: int
    capacity: int
    sampling: Sampling
    tell: Callable[[str | None], None]
    call: Callable[[asyncio.Event], None]
    arrived: float
    waited: float = 0.0
    gone: bool = False
    cache: Cache | None = None
    prefill: Prefill | None = None
    sequence: Sequence | None = None
    checking: Slices[None] | None = None
    learn_s: float = 0.0
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    first: Future[float] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.first.set_running_or_notify_cancel()  # who awaits it may go, the engine resolves it all the same

    @property
    def rank(self) -> tuple[float, float]:
        """Where memory is short, runs that began earlier go first: what they hold is freed when they end."""
        since = self.source.since
        return self.arrived if since is None else since, self.arrived

    def wake(self) -> None:
        """Tell the event loop that it is this one's turn."""
        self.call(self.turn)

    @property
    def begun(self) -> Sequence:
        """Its sequence; there by now."""
        assert self.sequence is not None, "the prefill has been awaited"
        return self.sequence

    def over(self, _done: Future[None]) -> None:
        """Tell that no text will come any more."""
        self.tell(None)
