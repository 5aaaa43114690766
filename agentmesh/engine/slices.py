"""Long work on the engine's thread, cut into slices: wherever it yields, others may get the thread."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

from agentmesh.engine.spans import Part, Spans

Result = TypeVar("Result")
Slices = Generator[None, None, Result]


def advance(work: Slices[Result]) -> tuple[Result, ...]:
    """The next slice; what the work gives if that was the last one, else nothing."""
    try:
        next(work)
    except StopIteration as over:
        return (over.value,)
    return ()


def at_once(work: Slices[Result]) -> Result:
    """All slices, one after the other; what they give."""
    while not (given := advance(work)):
        pass
    return given[0]


def noted(spans: Spans, part: Part, work: Slices[Result]) -> Slices[Result]:
    """The same slices, noted in a profile as one part, whole."""
    again = False
    with closing(work):
        while True:
            with spans.part(part, whole=True, again=again):
                given = advance(work)
            if given:
                return given[0]
            again = True
            yield
