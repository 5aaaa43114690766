"""``dense``: nothing is placed, every prompt is one uncut forward. The baseline of every comparison."""

from __future__ import annotations

from typing import final

from agentmesh.communicator.base import Plan, Preset, demand_kv, rows
from agentmesh.engine.composition import Composition
from agentmesh.kv.arena import Arena
from agentmesh.prompt.segments import Prompt
from agentmesh.reasons import Reason
from agentmesh.sharing.budget import Budget


@final
class Dense(Preset):
    """Computes everything.

    Args:
        budget: where live sequences count.
        reason: why; another than the preset itself where a model supports no reuse.
    """

    def __init__(self, budget: Budget, reason: Reason = Reason.PRESET_DENSE) -> None:
        self.budget = budget
        self._reason = reason

    def plan(self, prompt: Prompt) -> Plan:
        """Compute the whole prompt in one forward."""
        demand_kv(prompt, self._reason)
        return Plan(Composition(prompt.tokens), rows(prompt, 0, "", self._reason))

    def prefilled(self, prompt: Prompt, plan: Plan, arena: Arena) -> None:
        """Keep nothing."""

    @property
    def nbytes(self) -> int:
        """Always 0."""
        return 0
