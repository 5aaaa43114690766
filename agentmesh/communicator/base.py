"""The interface of a preset: decide what a prompt gets placed, and look at what was computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from agentmesh.engine.composition import Composition
from agentmesh.events import PlanRow, Reason, Treatment
from agentmesh.kv.arena import Arena
from agentmesh.prompt.segments import Prompt


@dataclass(frozen=True)
class Plan:
    """What was decided for one prompt: what the engine runs, and why, row by row."""

    composition: Composition
    rows: tuple[PlanRow, ...]

    def count(self, treatment: Treatment) -> int:
        """Prompt tokens with one treatment."""
        return sum(row.tokens for row in self.rows if row.kind is treatment)


class Preset(ABC):
    """One strategy of reuse. Called on the engine's thread only, which makes it the owner of what it keeps.

    Args of every implementation: none; what it needs is given by ``communicator.make``.
    """

    @abstractmethod
    def plan(self, prompt: Prompt) -> Plan:
        """Decide for one prompt, right before it is prefilled. Reads stores, changes no KV in them."""

    @abstractmethod
    def observe(self, prompt: Prompt, arena: Arena) -> None:
        """See a prompt's KV after its prefill; keep what later prompts may use."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the preset keeps now."""


def rows(prompt: Prompt, placed: int, source: str, reason: Reason) -> tuple[PlanRow, ...]:
    """Plan rows of a prompt whose first ``placed`` tokens are placed exactly.

    Args:
        prompt: the prompt.
        placed: length of the placed prefix.
        source: where the prefix came from.
        reason: why the rest is computed.
    """
    found = []
    for segment, start in zip(prompt.segments, prompt.starts, strict=True):
        exact = min(max(placed - start, 0), len(segment.tokens))
        rest = len(segment.tokens) - exact
        if exact:
            kind, why = Treatment.PLACED_EXACT, Reason.IDENTICAL_PREFIX
            found.append(PlanRow(segment=segment.label, kind=kind, tokens=exact, source=source, reason=why))
        if rest or not segment.tokens:
            kind = Treatment.COMPUTED
            found.append(PlanRow(segment=segment.label, kind=kind, tokens=rest, reason=reason))
    return tuple(found)
