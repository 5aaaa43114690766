"""Patterns: which members of one group are linked to which members of another. Pure functions over positions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agentmesh.config.topology import Pattern, When
from agentmesh.errors import TopologyError, listing

Pair = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """What a pattern may depend on; each pattern uses some of it."""

    when: When
    p: float
    seed: int
    layers: int
    branching: int


def _chain(size: int, _shape: Shape) -> Iterator[Pair]:
    return ((i, i + 1) for i in range(size - 1))


def _complete(size: int, shape: Shape) -> Iterator[Pair]:
    over_rounds = shape.when is When.PREVIOUS_ROUND
    return ((i, j) for i in range(size) for j in range(size) if (i != j if over_rounds else i < j))


def _star(size: int, _shape: Shape) -> Iterator[Pair]:
    return ((0, j) for j in range(1, size))


def _ring(size: int, _shape: Shape) -> Iterator[Pair]:
    return ((i, (i + 1) % size) for i in range(size))


def _layered(size: int, shape: Shape) -> Iterator[Pair]:
    layers = min(shape.layers, size)  # an empty layer would cut the graph in two
    layer = [i * layers // size for i in range(size)]
    return ((i, j) for i in range(size) for j in range(size) if layer[j] == layer[i] + 1)


def _tree(size: int, shape: Shape) -> Iterator[Pair]:
    return ((i, (i - 1) // shape.branching) for i in range(1, size))


def _random(size: int, shape: Shape) -> Iterator[Pair]:
    draw = random.Random(shape.seed)  # noqa: S311  # a graph, not a secret
    return (pair for pair in _complete(size, shape) if draw.random() < shape.p)


WITHIN: dict[Pattern, Callable[[int, Shape], Iterator[Pair]]] = {
    Pattern.CHAIN: _chain,
    Pattern.COMPLETE: _complete,
    Pattern.STAR: _star,
    Pattern.RING: _ring,
    Pattern.LAYERED: _layered,
    Pattern.TREE: _tree,
    Pattern.RANDOM: _random,
}
"""Links within one group of ``size`` members, by position."""

BETWEEN = (Pattern.ALL, Pattern.CHAIN, Pattern.RANDOM)


def within(pattern: Pattern | None, size: int, shape: Shape, what: str) -> list[Pair]:
    """Links among the members of one group.

    Raises:
        TopologyError: no pattern named, or one that needs two groups.
    """
    if pattern is None or pattern not in WITHIN:
        found = "no pattern" if pattern is None else f"pattern {pattern}"
        raise TopologyError(f"{what}: found {found} within one group; name one of {listing(WITHIN)}")
    return list(WITHIN[pattern](size, shape)) if size else []


def between(pattern: Pattern | None, sizes: Pair, shape: Shape, what: str) -> list[Pair]:
    """Links from the members of one group to those of another: ``all`` unless told otherwise.

    Raises:
        TopologyError: a pattern that has no meaning between two groups.
    """
    everyone = [(i, j) for i in range(sizes[0]) for j in range(sizes[1])]
    if pattern in (None, Pattern.ALL):
        return everyone
    if pattern is Pattern.CHAIN:
        return [(sizes[0] - 1, 0)] if everyone else []
    if pattern is Pattern.RANDOM:
        draw = random.Random(shape.seed)  # noqa: S311  # a graph, not a secret
        return [pair for pair in everyone if draw.random() < shape.p]
    raise TopologyError(f"{what}: pattern {pattern} has no meaning between two groups; use {listing(BETWEEN)}")
