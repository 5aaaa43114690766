"""A topology as text: mermaid, dot, ascii or json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx

from agentmesh.config.topology import Deliver, PythonRef, When
from agentmesh.errors import NotFoundError, did_you_mean, listing
from agentmesh.topology import Edge, Topology

WHEN_LABELS = {When.SAME_ROUND: "", When.PREVIOUS_ROUND: "next round", When.LAST_ROUND: "last round"}
MERMAID_CODES = {"#": "#35;", "&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;"}


@dataclass(frozen=True)
class Arrow:
    """One drawn edge; ``dashed`` where it crosses rounds."""

    source: str
    target: str
    label: str
    dashed: bool


def render(topology: Topology, format_: str, *, unrolled: bool = False) -> str:
    """The graph, or its visits over all rounds (``node@round``), in one of ``FORMATS``.

    Raises:
        NotFoundError: no such format.
    """
    if format_ not in FORMATS:
        raise NotFoundError(f"no format {format_!r}; there are {listing(FORMATS)}.{did_you_mean(format_, FORMATS)}")
    return FORMATS[format_](topology, unrolled)


def _drawing(topology: Topology, unrolled: bool) -> tuple[list[str], list[Arrow]]:
    """Nodes and arrows of either view, in order."""
    if not unrolled:
        nodes = [node.name for node in topology.nodes]
        crossing = When.PREVIOUS_ROUND
        return nodes, [Arrow(e.source, e.target, _label(e), e.when is crossing) for e in topology.edges]
    visits = topology.unroll()
    arrows = [
        Arrow(f"{d.source}@{d.source_round}", f"{v.node}@{v.round}", "", d.source_round != v.round)
        for v in visits
        for d in v.inbox
    ]
    return [f"{visit.node}@{visit.round}" for visit in visits], arrows


def _label(edge: Edge) -> str:
    condition = " ".join((_condition(edge) or "").split())
    parts = [
        WHEN_LABELS[edge.when],
        f"if {condition}" if condition else "",
        "" if edge.deliver is Deliver.AUTO else f"as {edge.deliver}",
        f"at most {edge.max_visits}×" if edge.max_visits else "",
    ]
    return ", ".join(part for part in parts if part)


def _condition(edge: Edge) -> str | None:
    return edge.condition.python if isinstance(edge.condition, PythonRef) else edge.condition


def _answer(topology: Topology, unrolled: bool) -> str:
    """The drawn node that gives the answer: the output's last visit."""
    if not unrolled:
        return topology.output
    return f"{topology.output}@{max(v.round for v in topology.unroll() if v.node == topology.output)}"


def _mermaid(topology: Topology, unrolled: bool) -> str:
    nodes, arrows = _drawing(topology, unrolled)
    ids = {name: f"n{index}" for index, name in enumerate(nodes)}
    answer = _answer(topology, unrolled)
    lines = ["flowchart LR"]
    for name in nodes:
        left, right = ("([", "])") if name == answer else ("[", "]")
        lines.append(f'  {ids[name]}{left}"{_escaped(name)}"{right}')
    for arrow in arrows:
        label = f'|"{_escaped(arrow.label)}"|' if arrow.label else ""
        lines.append(f"  {ids[arrow.source]} {'-.->' if arrow.dashed else '-->'}{label} {ids[arrow.target]}")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return "".join(MERMAID_CODES.get(letter, letter) for letter in text)


def _dot(topology: Topology, unrolled: bool) -> str:
    nodes, arrows = _drawing(topology, unrolled)
    answer = _answer(topology, unrolled)
    lines = ["digraph mesh {", "  rankdir=LR;", "  node [shape=box];"]
    lines += [f"  {_quoted(name)}{' [peripheries=2]' if name == answer else ''};" for name in nodes]
    for arrow in arrows:
        options = [f"label={_quoted(arrow.label)}"] if arrow.label else []
        options += ["style=dashed"] if arrow.dashed else []
        suffix = f" [{', '.join(options)}]" if options else ""
        lines.append(f"  {_quoted(arrow.source)} -> {_quoted(arrow.target)}{suffix};")
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _ascii(topology: Topology, unrolled: bool) -> str:
    """One line a node, in the order they run, with what it reads."""
    nodes, arrows = _drawing(topology, unrolled)
    if not unrolled:
        now = nx.DiGraph()
        now.add_nodes_from(nodes)
        now.add_edges_from((arrow.source, arrow.target) for arrow in arrows if not arrow.dashed)
        nodes = list(nx.lexicographical_topological_sort(now, key=nodes.index))
    rounds = f"{topology.rounds} round{'s' if topology.rounds > 1 else ''}"
    lines = [f"{topology.name or 'topology'}: {len(topology.nodes)} nodes, {rounds}, answer from {topology.output}"]
    width = max(len(name) for name in nodes)
    for name in nodes:
        reads = [f"{a.source}{f' ({a.label})' if a.label else ''}" for a in arrows if a.target == name]
        lines.append(f"  {name.ljust(width)}  {'← ' + ', '.join(reads) if reads else ''}".rstrip())
    return "\n".join(lines)


def _json(topology: Topology, unrolled: bool) -> str:
    data = {
        "name": topology.name,
        "rounds": topology.rounds,
        "output": topology.output,
        "nodes": [{"name": node.name, "group": node.group, "index": node.index} for node in topology.nodes],
        "edges": [
            {
                "from": edge.source,
                "to": edge.target,
                "when": edge.when,
                "if": _condition(edge),
                "deliver": edge.deliver,
                "max_visits": edge.max_visits,
            }
            for edge in topology.edges
        ],
    }
    if unrolled:
        data["visits"] = [
            {
                "node": visit.node,
                "round": visit.round,
                "inbox": [{"from": d.source, "round": d.source_round} for d in visit.inbox],
            }
            for visit in topology.unroll()
        ]
    return json.dumps(data, indent=2, ensure_ascii=False)


FORMATS: dict[str, Callable[[Topology, bool], str]] = {
    "ascii": _ascii,
    "dot": _dot,
    "json": _json,
    "mermaid": _mermaid,
}
