"""Agents on a communication graph that hand each other KV caches instead of text to read again.

    from agentmesh import Mesh

    with Mesh.from_yaml("demo.yaml") as mesh:
        print(mesh.run(question="Tom has 3 apples and buys 4 more. How many?").answer)

Importing the package loads no torch; the first run of a mesh does.
"""

from agentmesh.agents.base import Agent, Turn, agent
from agentmesh.errors import AgentmeshError, ConfigError, RunError, UsageError
from agentmesh.mesh import Mesh
from agentmesh.results import RunResult, Usage
from agentmesh.topology import Topology

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "AgentmeshError",
    "ConfigError",
    "Mesh",
    "RunError",
    "RunResult",
    "Topology",
    "Turn",
    "Usage",
    "UsageError",
    "agent",
]
