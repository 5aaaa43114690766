"""Views of a topology: mermaid, dot, ascii and json, as declared and unrolled."""

from __future__ import annotations

import json
from typing import Any

import networkx as nx
import pytest

from agentmesh.config.load import load_topology
from agentmesh.config.topology import PythonRef
from agentmesh.errors import NotFoundError
from agentmesh.graphview import FORMATS, render
from agentmesh.topology import Topology


def debate() -> Topology:
    spec, name = load_topology("debate")
    return Topology.from_spec(spec, {"debaters": 2}, name)


def two(**attributes: Any) -> Topology:
    return Topology.from_graph(nx.DiGraph([("a", "b", attributes)]), rounds=2, name="two")


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("unrolled", [False, True])
def test_every_view_names_every_node(format_: str, unrolled: bool) -> None:
    text = render(debate(), format_, unrolled=unrolled)

    assert all(name in text for name in ("debater.1", "debater.2", "judge"))


def test_mermaid_dashes_what_crosses_rounds() -> None:
    assert render(debate(), "mermaid").splitlines() == [
        "flowchart LR",
        '  n0["debater.1"]',
        '  n1["debater.2"]',
        '  n2(["judge"])',
        '  n0 -.->|"next round"| n1',
        '  n1 -.->|"next round"| n0',
        '  n0 -->|"last round"| n2',
        '  n1 -->|"last round"| n2',
    ]


def test_mermaid_escapes_what_would_end_a_label() -> None:
    text = render(two(condition='contains("<#1;>")'), "mermaid")

    assert 'n0 -->|"if contains(#quot;#lt;#35;1;#gt;#quot;)"| n1' in text


def test_a_node_may_have_any_name() -> None:
    topology = Topology.from_graph(nx.DiGraph([('say "é"', "b")]))

    assert 'n0["say #quot;é#quot;"]' in render(topology, "mermaid")
    assert r'"say \"é\"" -> "b";' in render(topology, "dot")


def test_dot_quotes_conditions() -> None:
    text = render(two(condition='contains("x")', deliver="text", max_visits=1), "dot")

    assert r'"a" -> "b" [label="if contains(\"x\"), as text, at most 1×"];' in text


def test_a_condition_of_several_lines_stays_on_one() -> None:
    topology = two(condition='(contains("x")\n  or round > 1)')

    assert 'if (contains("x") or round > 1)' in render(topology, "ascii")


def test_ascii_lists_nodes_in_the_order_they_run() -> None:
    graph = nx.DiGraph([("c", "b"), ("b", "a"), ("c", "a")])

    assert render(Topology.from_graph(graph, name="small"), "ascii").splitlines() == [
        "small: 3 nodes, 1 round, answer from a",
        "  c",
        "  b  ← c",
        "  a  ← c, b",
    ]


def test_unrolled_views_show_one_node_a_visit() -> None:
    assert render(debate(), "ascii", unrolled=True).splitlines()[1:] == [
        "  debater.1@0",
        "  debater.2@0",
        "  debater.1@1  ← debater.2@0",
        "  debater.2@1  ← debater.1@0",
        "  judge@1      ← debater.1@1, debater.2@1",
    ]
    assert '  n4(["judge@1"])' in render(debate(), "mermaid", unrolled=True)
    assert '"debater.1@0" -> "debater.2@1" [style=dashed];' in render(debate(), "dot", unrolled=True)


def test_json_carries_edges_and_visits() -> None:
    data = json.loads(render(debate(), "json", unrolled=True))

    assert (data["rounds"], data["output"]) == (2, "judge")
    assert {"from": "debater.1", "to": "judge", "when": "last-round"}.items() <= data["edges"][2].items()
    assert data["visits"][2]["inbox"] == [{"from": "debater.2", "round": 0}]
    assert "visits" not in json.loads(render(debate(), "json"))


def test_a_condition_in_python_shows_its_reference() -> None:
    topology = two(condition=PythonRef(python="my.rules:wanted"))

    assert json.loads(render(topology, "json"))["edges"][0]["if"] == "my.rules:wanted"
    assert "if my.rules:wanted" in render(topology, "mermaid")


def test_an_unknown_format_lists_the_formats() -> None:
    with pytest.raises(NotFoundError, match=r"ascii, dot, json, mermaid\. Did you mean 'mermaid'"):
        render(two(), "mermaids")
