"""Judges asked once more: does the choice depend on the order in which the candidates were shown?

A check runs when all messages of the run are there and its KV is still kept, so it is planned and shared as any call of
that judge. It is no part of the run: it changes no memory, nothing is kept of it, and nothing is learned from it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from agentmesh.agents.base import Answer, Generates, Turn, contents_of
from agentmesh.events import CallRecord, Event, ModelFinished
from agentmesh.metering import CheckRecord
from agentmesh.prompt import ContentKind, said

Item = TypeVar("Item")


@dataclass
class Checks:
    """The judges of one run that are asked again. Owned by the run.

    Args:
        model: makes what generates for a check, given who hears its events.
        seed: what orders are drawn from; with the same seed a judge gets the same order.
    """

    model: Callable[[Callable[[Event], None]], Generates]
    seed: str
    _turns: dict[str, Turn] = field(default_factory=dict)

    def note(self, turn: Turn) -> None:
        """Remember a judge's turn, before it acts; the last one is asked again, if it reads several messages."""
        self._turns.pop(turn.node, None)
        if len(turn.inbox) > 1:
            self._turns[turn.node] = replace(turn, history=list(turn.history))

    @property
    def held(self) -> frozenset[str]:
        """Origins of what the checks will read."""
        inputs = (content for turn in self._turns.values() for content in turn.inputs.values())
        inboxes = (message for turn in self._turns.values() for message in turn.inbox)
        return frozenset(content.origin for content in (*inputs, *(c for m in inboxes for c in m.contents)))

    def turns(self) -> Iterator[Turn]:
        """The turns to ask again, in the order in which the judges acted."""
        yield from self._turns.values()

    async def ask(
        self, turn: Turn, act: Callable[[Turn], Awaitable[tuple[Answer, BaseException | None]]]
    ) -> CheckRecord:
        """Let a judge answer once more.

        Args:
            turn: its turn.
            act: lets it act: its answer, or the error that ended it.
        """
        order = another_order(len(turn.inbox), f"{self.seed}\0{turn.node}")
        calls: list[CallRecord] = []

        def hear(event: Event) -> None:
            if isinstance(event, ModelFinished):
                calls.append(event.call)

        begun = time.perf_counter()
        answer, error = await act(turn.aside(shown(turn.inbox, order), self.model(hear)))
        origin = said(ContentKind.MESSAGE, turn.node, turn.round)
        texts = [content.text for content in contents_of(answer, ContentKind.MESSAGE, origin)]
        return CheckRecord(
            node=turn.node,
            round=turn.round,
            order=order,
            text="\n\n".join(texts),
            placed=sum(call.placed_exact + call.placed_realigned for call in calls),
            computed=sum(call.computed for call in calls),
            ms=round((time.perf_counter() - begun) * 1e3, 3),
            error="" if error is None else f"{type(error).__name__}: {error}",
        )


def another_order(count: int, seed: str) -> tuple[int, ...]:
    """A permutation of ``count`` things, at least two, that is not the identity."""
    assert count > 1, "one thing has one order"
    draw, same = random.Random(seed), tuple(range(count))  # noqa: S311  # an order, no secret
    while (order := tuple(draw.sample(same, count))) == same:
        pass
    return order


def shown(items: Sequence[Item], order: Sequence[int]) -> tuple[Item, ...]:
    """Items in an order."""
    return tuple(items[place] for place in order)
