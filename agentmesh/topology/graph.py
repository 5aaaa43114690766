"""The topology: a checked networkx multigraph of agent nodes with rounds and an output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import networkx as nx

from agentmesh.config.base import Choice
from agentmesh.config.topology import Deliver, EdgeSpec, Parameter, PythonRef, TopologySpec, When
from agentmesh.errors import TopologyError, did_you_mean, listing
from agentmesh.topology import conditions
from agentmesh.topology.patterns import Shape, between, within
from agentmesh.topology.rounds import Visit, unroll

NOW = (When.SAME_ROUND, When.LAST_ROUND)
ChoiceT = TypeVar("ChoiceT", bound=Choice)


@dataclass(frozen=True)
class Node:
    """One agent node; ``index`` counts its group's members from 0."""

    name: str
    group: str
    index: int


@dataclass(frozen=True)
class Edge:
    """One concrete edge; ``order`` is its place in the declaration."""

    source: str
    target: str
    when: When = When.SAME_ROUND
    condition: str | PythonRef | None = None
    deliver: Deliver = Deliver.AUTO
    max_visits: int | None = None
    order: int = 0


@dataclass(frozen=True)
class Topology:
    """Agents on a communication graph. Built by ``from_spec`` or ``from_graph``, which check it.

    Args:
        name: for people.
        nodes: in order of declaration.
        edges: in order of declaration.
        rounds: how often the graph is walked.
        output: the node whose last message is the answer.
    """

    name: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    rounds: int
    output: str

    def __post_init__(self) -> None:
        self._refuse_strangers()
        self._refuse_doubles()
        self._refuse_cycles()
        for condition in {edge.condition for edge in self.edges if isinstance(edge.condition, str)}:
            conditions.check(condition)
        running = {visit.node for visit in self.unroll()}
        idle = [node.name for node in self.nodes if node.name not in running]
        if idle:
            raise TopologyError(
                f"{listing(idle)} can never run in {self.rounds} round(s): no message can reach it. "
                "Add an edge from a node that runs, or more rounds"
            )

    @classmethod
    def from_spec(cls, spec: TopologySpec, params: Mapping[str, Parameter] | None = None, name: str = "") -> Topology:
        """Expand groups and patterns, with values for the file's parameters.

        Raises:
            TopologyError: an unknown parameter, node or pattern, a bad value, or a graph that cannot be walked.
        """
        return _Expansion(spec, dict(params or {})).topology(name)

    @classmethod
    def from_graph(
        cls, graph: nx.Graph, *, rounds: int = 1, output: Hashable | None = None, name: str = ""
    ) -> Topology:
        """Any directed networkx graph; its nodes become text, and without ``output`` its only sink answers.

        Node attribute ``group`` and edge attributes ``when``, ``condition``, ``deliver``, ``max_visits`` and ``order``
        count, others are ignored.

        Raises:
            TopologyError: the graph is undirected, has no single output, or cannot be walked.
        """
        if not graph.is_directed():
            raise TopologyError("found an undirected graph; messages need a direction: use nx.DiGraph or MultiDiGraph")
        size: Counter[str] = Counter()
        nodes = []
        for node, data in graph.nodes(data=True):
            group = str(data.get("group", node))
            nodes.append(Node(str(node), group, size[group]))
            size[group] += 1
        listed = list(graph.edges(data=True))
        if all(isinstance(data.get("order"), int) for _, _, data in listed):
            listed.sort(key=lambda edge: edge[2]["order"])
        edges = tuple(_graph_edge(str(a), str(b), data, order) for order, (a, b, data) in enumerate(listed))
        sinks = [str(node) for node in graph.nodes if graph.out_degree(node) == 0]
        if output is None and len(sinks) != 1:
            raise TopologyError(f"say which node gives the answer (output=…): the graph's sinks are {listing(sinks)}")
        return cls(name, tuple(nodes), edges, rounds, sinks[0] if output is None else str(output))

    @property
    def graph(self) -> nx.MultiDiGraph:
        """A fresh plain networkx graph with all attributes on nodes and edges."""
        graph = nx.MultiDiGraph(name=self.name, rounds=self.rounds, output=self.output)
        for node in self.nodes:
            graph.add_node(node.name, group=node.group, index=node.index)
        for edge in self.edges:
            attributes = {key: value for key, value in vars(edge).items() if key not in ("source", "target")}
            graph.add_edge(edge.source, edge.target, **attributes)
        return graph

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group → its nodes' names in order."""
        found: dict[str, tuple[str, ...]] = {}
        for node in self.nodes:
            found[node.group] = (*found.get(node.group, ()), node.name)
        return found

    def unroll(self) -> tuple[Visit, ...]:
        """Every visit that can run, in an order in which each comes after what it depends on."""
        rank = {node.name: index for index, node in enumerate(self.nodes)}
        order = list(nx.lexicographical_topological_sort(self._now(), key=rank.__getitem__))
        return unroll(order, self.edges, self.rounds)

    def _now(self) -> nx.DiGraph:
        """The nodes with the edges that can be active within one round."""
        graph = nx.DiGraph()
        graph.add_nodes_from(node.name for node in self.nodes)
        graph.add_edges_from((edge.source, edge.target) for edge in self.edges if edge.when in NOW)
        return graph

    def _refuse_strangers(self) -> None:
        """Nodes that share a name, and names that no node has."""
        names = [node.name for node in self.nodes]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise TopologyError(f"two nodes are called {listing(twice)}; every node needs a name of its own")
        known = set(names)
        ends = [(f"edge {e.source} → {e.target}", end) for e in self.edges for end in (e.source, e.target)]
        for what, name in [*ends, ("output", self.output)]:
            if name not in known:
                raise TopologyError(f"{what}: no node {name!r}; nodes are {listing(names)}.{did_you_mean(name, names)}")
        if self.rounds < 1:
            raise TopologyError(f"rounds: found {self.rounds}; expected at least 1")
        assert [edge.order for edge in self.edges] == list(range(len(self.edges))), "an edge's order is its place"

    def _refuse_doubles(self) -> None:
        seen: dict[tuple[str, str, When], int] = {}
        for edge in self.edges:
            key = (edge.source, edge.target, edge.when)
            if key in seen:
                raise TopologyError(
                    f"edge {edge.source} → {edge.target} ({edge.when}) is declared twice, as number {seen[key] + 1} "
                    f"and {edge.order + 1}; remove one, or give one of them another `when`"
                )
            seen[key] = edge.order

    def _refuse_cycles(self) -> None:
        graph = self._now()
        if nx.is_directed_acyclic_graph(graph):
            return
        around = [a for a, _ in nx.find_cycle(graph)]
        raise TopologyError(
            f"the graph has a cycle within one round: {' → '.join([*around, around[0]])}. "
            "Let one of these edges carry the message of the round before (when: previous-round), or remove it"
        )


def _graph_edge(source: str, target: str, data: Mapping[str, Any], order: int) -> Edge:
    what = f"edge {source} → {target}"
    when = _choice(When, data.get("when", When.SAME_ROUND), f"{what}: when")
    deliver = _choice(Deliver, data.get("deliver", Deliver.AUTO), f"{what}: deliver")
    condition, visits = data.get("condition"), data.get("max_visits")
    if not isinstance(condition, str | PythonRef | None):
        raise TopologyError(f"{what}: condition: found {condition!r}; expected an expression or a PythonRef")
    if visits is not None and (isinstance(visits, bool) or not isinstance(visits, int) or visits < 1):
        raise TopologyError(f"{what}: max_visits: found {visits!r}; expected a whole number, at least 1")
    return Edge(source, target, when, condition, deliver, visits, order)


def _choice(kind: type[ChoiceT], found: Any, what: str) -> ChoiceT:
    try:
        return kind(found)
    except ValueError as error:
        known = [choice.value for choice in kind]
        hint = did_you_mean(str(found), known)
        raise TopologyError(f"{what}: found {found!r}; expected one of {listing(known)}.{hint}") from error


class _Expansion:
    """A topology file with its parameters, on the way to nodes and edges."""

    def __init__(self, spec: TopologySpec, params: dict[str, Parameter]) -> None:
        for key in params:
            if key not in spec.params:
                hint = did_you_mean(key, spec.params)
                raise TopologyError(f"no parameter {key!r}; this topology has {listing(spec.params)}.{hint}")
        self._spec = spec
        self._params = {**spec.params, **params}
        self._members: dict[str, list[str]] = {}

    def topology(self, name: str) -> Topology:
        nodes = []
        for group, members in self._spec.nodes.items():
            count = int(self._number(members.count, f"nodes.{group}.count", 0))
            self._members[group] = [group] if count == 1 else [f"{group}.{i + 1}" for i in range(count)]
            nodes += [Node(member, group, index) for index, member in enumerate(self._members[group])]
        edges: list[Edge] = []
        for number, entry in enumerate(self._spec.edges):
            edges += self._edges(entry, number, len(edges))
        outputs = self._resolve(self._spec.output, "output")
        if not outputs:
            names = listing(node.name for node in nodes)
            raise TopologyError(f"output: group {self._spec.output!r} has no members; nodes are {names}")
        rounds = int(self._number(self._spec.rounds, "rounds", 1))
        return Topology(name, tuple(nodes), tuple(edges), rounds, outputs[-1])

    def _edges(self, entry: EdgeSpec, number: int, order: int) -> list[Edge]:
        what = f"edges[{number}] ({entry.source} → {entry.target})"
        sources, targets = self._resolve(entry.source, what), self._resolve(entry.target, what)
        shape = Shape(
            entry.when,
            self._number(entry.p, f"{what}.p", 0, 1),
            int(self._number(entry.seed, f"{what}.seed", None)),
            int(self._number(entry.layers, f"{what}.layers", 1)),
            int(self._number(entry.branching, f"{what}.branching", 1)),
        )
        visits = None if entry.max_visits is None else int(self._number(entry.max_visits, f"{what}.max_visits", 1))
        if sources == targets and len(sources) != 1:
            pairs = within(entry.pattern, len(sources), shape, what)
        elif sources == targets and entry.pattern not in (None, "all"):
            pairs = within(entry.pattern, 1, shape, what)
        else:
            pairs = between(entry.pattern, (len(sources), len(targets)), shape, what)
        return [
            Edge(sources[i], targets[j], entry.when, entry.condition, entry.deliver, visits, order + place)
            for place, (i, j) in enumerate(pairs)
        ]

    def _resolve(self, name: str, what: str) -> list[str]:
        """The nodes that a group's or node's name stands for."""
        if name in self._members:
            return self._members[name]
        group, _, index = name.rpartition(".")
        members = self._members.get(group, [])
        if name in members:
            return [name]
        if index == "1" and len(members) == 1:
            return members
        known = [*self._members, *(member for each in self._members.values() for member in each)]
        choices = listing(dict.fromkeys(known))
        raise TopologyError(f"{what}: {name!r} is no group or node; there are {choices}.{did_you_mean(name, known)}")

    def _number(self, value: float | str, what: str, low: float | None, high: float | None = None) -> float:
        """A number, or the parameter that stands for it, within its range."""
        if isinstance(value, str):
            key = value.removeprefix("$")
            if key not in self._params:
                hint = did_you_mean(key, self._params)
                raise TopologyError(f"{what}: {value} is no parameter; declared are {listing(self._params)}.{hint}")
            what = f"{what} ({value})"
            found: Parameter = self._params[key]
        else:
            found = value
        whole = high is None
        if isinstance(found, bool) or not isinstance(found, int if whole else int | float):
            raise TopologyError(f"{what}: found {found!r}; expected a {'whole ' if whole else ''}number")
        if (low is not None and not found >= low) or (high is not None and not found <= high):  # nan is refused too
            limits = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise TopologyError(f"{what}: found {found!r}; expected {limits}")
        return found
