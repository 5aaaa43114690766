"""Topologies: groups, patterns and rounds of agents on a networkx graph."""

from agentmesh.topology.graph import Edge, Node, Topology
from agentmesh.topology.rounds import Delivery, Visit

__all__ = ["Delivery", "Edge", "Node", "Topology", "Visit"]
