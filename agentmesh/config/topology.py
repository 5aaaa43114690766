"""The topology file: groups of nodes, patterns of edges between them, rounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agentmesh.config.base import GROUP_NAME, NODE_NAME, PYTHON_REF, REFERENCE, Choice, Frozen, Integer, Number

Parameter = int | float | str | bool
Reference = Annotated[str, Field(pattern=REFERENCE, description="$name of a parameter")]
Name = Annotated[str, Field(pattern=NODE_NAME)]


class Pattern(Choice):
    """How the members of one group are linked to the members of another (or the same)."""

    CHAIN = "chain"
    COMPLETE = "complete"
    ALL = "all"
    STAR = "star"
    RING = "ring"
    LAYERED = "layered"
    TREE = "tree"
    RANDOM = "random"


class When(Choice):
    """Which round's message an edge carries, and in which rounds."""

    SAME_ROUND = "same-round"
    PREVIOUS_ROUND = "previous-round"
    LAST_ROUND = "last-round"


class Deliver(Choice):
    """How an edge's message reaches its reader: planned, always as text, or failing where KV cannot be shared."""

    AUTO = "auto"
    TEXT = "text"
    KV = "kv"


class PythonRef(Frozen):
    """``{python: package.module:Name}``, an object imported when the mesh is built."""

    python: Annotated[str, Field(pattern=PYTHON_REF)]


class NodeGroup(Frozen):
    """A group of like nodes; ``count`` of 1 keeps the group's name, more become ``name.1``, ``name.2``, …."""

    count: Annotated[Integer, Field(ge=0)] | Reference = 1


class EdgeSpec(Frozen):
    """Edges from one group or node to another, as a pattern."""

    source: Name = Field(alias="from")
    target: Name = Field(alias="to")
    pattern: Pattern | None = None
    p: Annotated[Number, Field(ge=0, le=1)] | Reference = 0.5
    seed: Integer | Reference = 0
    layers: Annotated[Integer, Field(ge=1)] | Reference = 2
    branching: Annotated[Integer, Field(ge=1)] | Reference = 2
    when: When = When.SAME_ROUND
    condition: str | PythonRef | None = Field(default=None, alias="if")
    deliver: Deliver = Deliver.AUTO
    max_visits: Annotated[Integer, Field(ge=1)] | Reference | None = None


class TopologySpec(Frozen):
    """A topology file, or the same keys inline in a mesh."""

    about: str = ""
    params: dict[str, Parameter] = Field(default_factory=dict)
    nodes: dict[Annotated[str, Field(pattern=GROUP_NAME)], NodeGroup] = Field(min_length=1)
    rounds: Annotated[Integer, Field(ge=1)] | Reference = 1
    edges: tuple[EdgeSpec, ...] = ()
    output: Name
