"""Topologies: patterns, rounds, conditions, refusals and any networkx graph."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmesh.config.load import load_topology
from agentmesh.config.topology import TopologySpec, When
from agentmesh.errors import TopologyError
from agentmesh.topology import Edge, Node, Topology, conditions


def build(nodes: dict[str, int], edges: list[dict[str, Any]], output: str, rounds: int = 1, **params: Any) -> Topology:
    spec = TopologySpec.model_validate(
        {
            "nodes": {name: {"count": count} for name, count in nodes.items()},
            "edges": edges,
            "output": output,
            "rounds": rounds,
        }
    )
    return Topology.from_spec(spec, params)


def shipped(name: str, **params: Any) -> Topology:
    spec, found = load_topology(name)
    return Topology.from_spec(spec, params, found)


def pairs(topology: Topology) -> list[tuple[str, str]]:
    return [(edge.source, edge.target) for edge in topology.edges]


def test_fully_connected_links_every_earlier_agent_to_every_later_one() -> None:
    assert pairs(shipped("fully-connected", agents=3)) == [
        ("agent.1", "agent.2"),
        ("agent.1", "agent.3"),
        ("agent.2", "agent.3"),
    ]


@pytest.mark.parametrize(
    ("pattern", "when", "wanted"),
    [
        ("chain", "same-round", "12 23 34"),
        ("star", "same-round", "12 13 14"),
        ("ring", "previous-round", "12 23 34 41"),
        ("tree", "same-round", "21 31 42"),
        ("layered", "same-round", "13 14 23 24"),
        ("complete", "previous-round", "12 13 14 21 23 24 31 32 34 41 42 43"),
    ],
)
def test_patterns_within_a_group(pattern: str, when: str, wanted: str) -> None:
    edges = [{"from": "a", "to": "a", "pattern": pattern, "when": when}]
    topology = build({"a": 4}, edges, "a.1", rounds=2)

    assert " ".join(a[-1] + b[-1] for a, b in pairs(topology)) == wanted


def test_a_debate_runs_its_judge_in_the_last_round_only() -> None:
    visits = shipped("debate", debaters=2, rounds=3).unroll()

    assert [(v.node, v.round) for v in visits if v.node == "judge"] == [("judge", 2)]
    second = next(v for v in visits if (v.node, v.round) == ("debater.1", 1))
    assert [(d.source, d.source_round) for d in second.inbox] == [("debater.2", 0)]
    assert next(v for v in visits if (v.node, v.round) == ("debater.1", 0)).inbox == ()


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize(
    "name", ["single", "chain", "fully-connected", "debate", "star", "layered", "tree", "ring", "random"]
)
def test_every_shipped_topology_delivers_each_active_edge_once(name: str, rounds: int) -> None:
    spec, _ = load_topology(name)
    params = {"rounds": rounds} if "rounds" in spec.params else {}
    topology = shipped(name, **params)
    visits = topology.unroll()
    seen = {(visit.node, visit.round): index for index, visit in enumerate(visits)}
    delivered = [(d.order, visit.round) for visit in visits for d in visit.inbox]

    assert len(delivered) == len(set(delivered))
    wanted = set()
    for edge in topology.edges:
        for round_ in range(topology.rounds):
            source_round = round_ - (edge.when is When.PREVIOUS_ROUND)
            active = edge.when is not When.LAST_ROUND or round_ == topology.rounds - 1
            if active and (edge.source, source_round) in seen and (edge.target, round_) in seen:
                wanted.add((edge.order, round_))
    assert set(delivered) == wanted
    for index, visit in enumerate(visits):
        assert all(seen[d.source, d.source_round] < index for d in visit.inbox)
    assert topology.output in {visit.node for visit in visits}


graphs = st.integers(2, 6).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.sets(
            st.tuples(st.integers(0, size - 1), st.integers(0, size - 1), st.sampled_from(list(When))), max_size=14
        ),
    )
)


@given(graphs, st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_any_graph_is_walked_in_order_or_refused_with_the_reason(graph: Any, rounds: int) -> None:
    size, edges = graph
    drawn = nx.MultiDiGraph()
    drawn.add_nodes_from(f"n{i}" for i in range(size))
    for a, b, when in sorted(edges):
        drawn.add_edge(f"n{a}", f"n{b}", when=when.value)
    now = nx.DiGraph([(a, b) for a, b, when in edges if when is not When.PREVIOUS_ROUND])
    try:
        topology = Topology.from_graph(drawn, rounds=rounds, output="n0")
    except TopologyError as error:
        refusal = str(error)
        cyclic = not nx.is_directed_acyclic_graph(now)
        assert ("→" if cyclic else "can never run") in refusal  # either outcome may be right
        return
    assert nx.is_directed_acyclic_graph(now)
    position = {(visit.node, visit.round): index for index, visit in enumerate(topology.unroll())}
    for visit in topology.unroll():
        for delivery in visit.inbox:
            assert position[delivery.source, delivery.source_round] < position[visit.node, visit.round]
    again = Topology.from_graph(topology.graph, rounds=rounds, output="n0")
    assert again.edges == topology.edges


@given(graphs)
@settings(max_examples=50, deadline=None)
def test_an_acyclic_networkx_graph_comes_back_as_it_was(graph: Any) -> None:
    size, edges = graph
    drawn = nx.DiGraph([(a, b) for a, b, _ in sorted(edges) if a < b])
    drawn.add_nodes_from(range(size))
    topology = Topology.from_graph(drawn, output=size - 1)

    assert nx.is_isomorphic(nx.DiGraph(topology.graph), drawn)
    assert set(pairs(topology)) == {(str(a), str(b)) for a, b in drawn.edges}
    assert [(visit.node, len(visit.inbox)) for visit in topology.unroll()] == [
        (name, drawn.in_degree(int(name))) for name in (visit.node for visit in topology.unroll())
    ]
    assert Topology.from_graph(topology.graph, output=topology.output) == topology


@given(st.integers(0, 50), st.floats(0, 1), st.integers(0, 8))
@settings(max_examples=30, deadline=None)
def test_the_same_seed_gives_the_same_random_graph(seed: int, p: float, agents: int) -> None:
    first, second = (shipped("random", seed=seed, p=p, agents=agents) for _ in range(2))

    assert first == second


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        ({"a": 2}, [{"from": "a", "to": "a", "pattern": "ring"}], r"a\.1 → a\.2 → a\.1.*previous-round"),
        ({"a": 1}, [{"from": "a", "to": "a"}], "a → a"),
        ({"a": 2}, [{"from": "a", "to": "a"}], "name one of"),
        ({"a": 1, "b": 2}, [{"from": "a", "to": "b", "pattern": "tree"}], "between two groups"),
        ({"a": 1, "b": 1}, [{"from": "a", "to": "bb"}], "'bb' is no group or node.*Did you mean 'b'"),
        ({"a": 1, "b": 1}, [{"from": "a", "to": "b"}, {"from": "a", "to": "b"}], "declared twice"),
        ({"a": 1, "b": 1}, [{"from": "a", "to": "b", "if": "text.upper()"}], "attribute"),
        ({"a": 1, "b": 1}, [{"from": "a", "to": "b", "if": "contians('x')"}], "Did you mean 'contains'"),
        ({"a": 1, "b": 1}, [{"from": "a", "to": "b", "when": "last-round"}, {"from": "b", "to": "a"}], "a → b → a"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(nodes: dict[str, int], edges: list[Any], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        build(nodes, edges, "a")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"debater": 3}, "Did you mean 'debaters'"),
        ({"debaters": -1}, "at least 0"),
        ({"debaters": "two"}, "whole number"),
        ({"rounds": 0}, "at least 1"),
        ({"debaters": True}, "whole number"),
        ({"debaters": 2.5}, "whole number"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        shipped("debate", **params)


def test_an_undirected_graph_and_an_unclear_output_are_refused() -> None:
    with pytest.raises(TopologyError, match="undirected"):
        Topology.from_graph(nx.path_graph(3))
    with pytest.raises(TopologyError, match="sinks"):
        Topology.from_graph(nx.DiGraph([("a", "b"), ("a", "c")]))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"when": "last-rounds"}, "expected one of last-round, previous-round, same-round.*Did you mean 'last-round'"),
        ({"deliver": "fax"}, "deliver: found 'fax'"),
        ({"condition": 5}, "condition: found 5"),
        ({"max_visits": 0}, "max_visits: found 0; expected a whole number, at least 1"),
    ],
)
def test_a_bad_edge_attribute_is_named(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology.from_graph(nx.DiGraph([("a", "b", attributes)]))


def test_foreign_attributes_of_a_networkx_graph_are_ignored() -> None:
    graph = nx.DiGraph([("a", "b", {"weight": 2, "order": "first"}), ("a", "c"), ("c", "b")])
    nx.set_node_attributes(graph, "x", "index")
    topology = Topology.from_graph(graph)

    assert topology.output == "b"
    assert [edge.order for edge in topology.edges] == [0, 1, 2]
    assert topology.nodes[0] == Node("a", "a", 0)


@pytest.mark.parametrize(
    ("edges", "output", "rounds", "message"),
    [
        ([(1, "x"), ("1", "x")], "x", 1, "two nodes are called 1"),
        ([("solver", "judge")], "juge", 1, "Did you mean 'judge'"),
        ([("a", "b")], "b", 0, "rounds: found 0; expected at least 1"),
    ],
)
def test_a_networkx_graph_that_cannot_run_is_refused(edges: list[Any], output: str, rounds: int, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology.from_graph(nx.DiGraph(edges), output=output, rounds=rounds)


def test_an_edge_to_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(TopologyError, match="edge a → b: no node 'b'"):
        Topology("", (Node("a", "a", 0),), (Edge("a", "b"),), 1, "a")


def test_a_node_that_no_message_can_reach_is_named() -> None:
    """The judge speaks too late for the scribe to speak in the last round, where alone the reader listens."""
    edges = [
        {"from": "solver", "to": "judge", "when": "last-round"},
        {"from": "judge", "to": "scribe", "when": "previous-round"},
        {"from": "scribe", "to": "reader", "when": "last-round"},
    ]
    nodes = dict.fromkeys(("solver", "judge", "scribe", "reader"), 1)

    with pytest.raises(TopologyError, match=r"^reader can never run in 2 round\(s\)"):
        build(nodes, edges, "judge", rounds=2)


def test_more_layers_than_members_leave_no_layer_empty() -> None:
    edges = [{"from": "a", "to": "a", "pattern": "layered", "layers": 4}]

    assert pairs(build({"a": 2}, edges, "a")) == [("a.1", "a.2")]


def test_a_lone_member_answers_to_both_spellings() -> None:
    edges = [{"from": "a.1", "to": "b"}]
    topology = build({"a": 1, "b": 1}, edges, "b.1")

    assert pairs(topology) == [("a", "b")]
    assert topology.output == "b"


@pytest.mark.parametrize("p", [float("nan"), 1.5, "half"])
def test_a_probability_outside_its_range_is_refused(p: object) -> None:
    with pytest.raises(TopologyError, match=r"edges\[0\].*\.p \(\$p\): found .*; expected"):
        shipped("random", p=p)


@pytest.mark.parametrize(
    ("name", "params", "nodes", "edges"),
    [
        ("single", {}, 1, 0),
        ("chain", {"agents": 1}, 1, 0),
        ("chain", {"agents": 5}, 5, 4),
        ("fully-connected", {"agents": 5}, 5, 10),
        ("debate", {"debaters": 1}, 2, 1),
        ("star", {"workers": 5, "rounds": 2}, 6, 10),
        ("layered", {"agents": 1}, 2, 1),
        ("layered", {"agents": 6, "layers": 3}, 7, 8 + 6),
        ("tree", {"agents": 1}, 1, 0),
        ("tree", {"agents": 13, "branching": 3}, 13, 12),
        ("ring", {"agents": 5}, 6, 10),
        ("random", {"agents": 5, "p": 0.0}, 6, 5),
        ("random", {"agents": 5, "p": 1}, 6, 15),
    ],
)
def test_shipped_topologies_grow_with_their_parameters(name: str, params: Any, nodes: int, edges: int) -> None:
    topology = shipped(name, **params)

    assert (len(topology.nodes), len(topology.edges)) == (nodes, edges)


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ('contains("REVISE")', True),
        ('contains("x") or round < 2', True),
        (r'matches("answer is \\d+")', True),
        ('startswith("REVISE") and tokens > 100', False),
        ('node == "judge" and role != "Judge"', False),
        ("tokens % 2 == 1 and tokens / round > 6", True),
        ('"12" in text if round else False', True),
    ],
)
def test_conditions_read_the_message(expression: str, wanted: bool) -> None:  # a table's column
    conditions.check(expression)

    found = conditions.holds(
        expression, text="REVISE: the answer is 12", role="Judge", node="judge", round_=1, tokens=7
    )
    assert found is wanted


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "().__class__",
        "[x for x in text]",
        "9**9**9",
        "open('x')",
        "round and 9**9**9",
        "tokens and 1 << 9999 << 9999",
        "'%999999999d' % round",
        "contains",
        "contains('a', 'b')",
        "round and 'a'('b')",
        "contains(part='a')",
        "matches('(')",
        "f'{text}'",
        "round = 1",
        "not " * 5000 + "True",
        "",
    ],
)
def test_conditions_cannot_reach_python(expression: str) -> None:
    with pytest.raises(TopologyError):
        conditions.check(expression)
