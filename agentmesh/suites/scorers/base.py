"""The interface of a scorer: it looks at what a mesh said to one sample, and gives each of its metrics a value.

To add one, write a module with one subclass and enter it in ``suites.scorers.SCORERS`` and ``suites.task.SCORERS``. One
that reads answers off texts implements ``answer``, too, by which a judge's choice is told.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from agentmesh.config.base import Frozen
from agentmesh.events import MessageRecord
from agentmesh.suites.samples import Sample


@dataclass(frozen=True)
class Output:
    """What a mesh gave for one sample: its answer, and what each visit said on the way."""

    answer: str
    messages: Sequence[MessageRecord] = ()


class Scored(Frozen):
    """One output under one scorer.

    Args:
        values: metric → value between 0 and 1.
        extracted: the answer as the scorer found it in the text; empty where it found none.
        note: why a value is low, where that is not plain (a failed test's message).
    """

    values: dict[str, float]
    extracted: str = ""
    note: str = ""


class Scorer(ABC):
    """Scores outputs; holds no state between them."""

    metrics: tuple[str, ...]
    """Names of its metrics, the primary one first."""

    runs_code = False
    """Whether it runs code that a model wrote."""

    @abstractmethod
    async def score(self, sample: Sample, output: Output) -> Scored:
        """Values of all metrics for one output."""

    async def answer(self, sample: Sample, text: str) -> str:  # noqa: ARG002  # not every scorer reads answers
        """The answer that one text gives, in a form that ``same`` compares; empty where the scorer finds none in it."""
        return ""

    async def same(self, one: str, other: str) -> bool:
        """Whether two answers, as ``answer`` gives them, are the same."""
        return one == other

    def close(self) -> None:  # noqa: B027  # most scorers hold nothing
        """Free what it holds, such as a process."""
