"""``llm``: writes its message with the mesh's model, from its role's template."""

from __future__ import annotations

from typing import final

from agentmesh.agents.base import Agent, Answer, Turn
from agentmesh.config.mesh import LlmAgentSpec, Memory
from agentmesh.prompt import RoleTemplate


@final
class LlmAgent(Agent):
    """An agent with a role, as a mesh file describes it."""

    def __init__(self, spec: LlmAgentSpec) -> None:
        self._spec = spec
        self._template = RoleTemplate(spec.system, spec.prompt)

    async def act(self, turn: Turn) -> Answer:
        """Render the role's template and generate."""
        history = turn.history if self._spec.memory is Memory.CONVERSATION else None
        return await turn.complete(self._template, self._spec.generate, history)
