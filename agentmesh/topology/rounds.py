"""Rounds unrolled: which node runs when, and whose messages it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentmesh.config.topology import When


class EdgeLike(Protocol):
    """What unrolling needs of an edge."""

    @property
    def source(self) -> str:
        """Where it begins."""

    @property
    def target(self) -> str:
        """Where it ends."""

    @property
    def when(self) -> When:
        """In which rounds it is active."""

    @property
    def order(self) -> int:
        """Its place in the declaration."""


@dataclass(frozen=True)
class Delivery:
    """One message on its way: edge number ``order`` carries what its source said in ``source_round``."""

    source: str
    source_round: int
    order: int


@dataclass(frozen=True)
class Visit:
    """One run of a node in a round.

    It comes after every delivery's source and after the same node's visit in the round before. The inbox is ordered
    by round, then by declaration.
    """

    node: str
    round: int
    inbox: tuple[Delivery, ...]


def unroll(order: Sequence[str], edges: Sequence[EdgeLike], rounds: int) -> tuple[Visit, ...]:
    """The visits that can run, given the nodes in an order that respects edges within a round.

    A node without in-edges runs in every round. Another runs where at least one in-edge can deliver. In the first
    round edges from the round before do not count: a node that has only such edges runs without an inbox.
    """
    into: dict[str, list[EdgeLike]] = {node: [] for node in order}
    for edge in edges:
        into[edge.target].append(edge)
    visits: dict[tuple[str, int], Visit] = {}
    for round_ in range(rounds):
        for node in order:
            counted = [edge for edge in into[node] if round_ or edge.when is not When.PREVIOUS_ROUND]
            inbox = [_delivery(edge, round_, rounds) for edge in counted]
            arriving = [d for d in inbox if d is not None and (d.source, d.source_round) in visits]
            if arriving or not counted:
                arriving.sort(key=lambda delivery: (delivery.source_round, delivery.order))
                visits[node, round_] = Visit(node, round_, tuple(arriving))
    return tuple(visits.values())


def _delivery(edge: EdgeLike, round_: int, rounds: int) -> Delivery | None:
    """What an edge carries in a round, if it is active in it."""
    if edge.when is When.PREVIOUS_ROUND:
        return Delivery(edge.source, round_ - 1, edge.order)
    if edge.when is When.LAST_ROUND and round_ < rounds - 1:
        return None
    return Delivery(edge.source, round_, edge.order)
