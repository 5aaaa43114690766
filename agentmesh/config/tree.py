"""Builds the tree of one YAML 1.2 document from the parser's events.

The stack is explicit, so hostile nesting and aliases meet a limit instead of the recursion limit or the memory's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ruamel.yaml.error import StreamMark
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)

from agentmesh.config.nodes import Node, excerpt
from agentmesh.errors import ConfigError

MAX_EXPANDED = 4 * 2**20  # characters and nodes after aliases are followed
MAX_DEPTH = 64
MAX_DIGITS = 300  # a longer whole number fits no float either

_CORE = "tag:yaml.org,2002:"
_UNENCODABLE = re.compile("[\x00\ud800-\udfff]")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def resolve(text: str) -> Any:
    """The value of a plain (unquoted) scalar under the YAML 1.2 core schema: ``yes`` and dates are text.

    Raises:
        ValueError: a whole number too long to be meant.
    """
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"found a number of {len(text)} digits; expected at most {MAX_DIGITS}")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _SPECIAL_FLOAT.fullmatch(text) else text


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not come yet."""

    event: NodeEvent
    value: dict[str, Any] | list[Any]
    children: dict[str | int, Node] = field(default_factory=dict)
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)
    key: str | None = None
    weight: int = 1


class Tree:
    """Builds the node tree of one document from its events."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.root: Node | None = None
        self.last = (1, 1)
        self._open: list[_Open] = []
        self._anchors: dict[str, Node | None] = {}  # None while the anchored value is still open
        self._documents = 0

    def fail(self, line: int, column: int, message: str) -> NoReturn:
        """Raise a ConfigError at a position, with the source line."""
        raise ConfigError(f"{self.name}:{line}:{column}: {message}\n{excerpt(self.text, line, column)}")

    def take(self, event: Event) -> None:
        """Take the parser's next event."""
        line, column = self.last = _start(event.start_mark)
        if isinstance(event, DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self.fail(line, column, "found a second document; expected one: remove everything from '---' on")
        elif isinstance(event, ScalarEvent):
            self._scalar(event)
        elif isinstance(event, AliasEvent):
            self._alias(event)
        elif isinstance(event, MappingStartEvent | SequenceStartEvent):
            self._begin(event)
        elif isinstance(event, CollectionEndEvent):
            self._end()

    def _scalar(self, event: ScalarEvent) -> None:
        line, column = self.last
        parent = self._open[-1] if self._open else None
        if not event.value and event.style is None and parent is not None and parent.key is not None:
            line, column = parent.keys[parent.key]  # the parser puts a missing value at whatever comes next
        value = self._value(event)
        style = event.style if event.style in ("'", '"', "|", ">") else None
        self._add(Node(value, line, column, style, weight=1 + len(event.value)), event)

    def _value(self, event: ScalarEvent) -> Any:
        text: str = event.value
        if _UNENCODABLE.search(text):
            self.fail(*self.last, "found an escape for NUL or for half a character; expected printable text")
        tag = str(event.tag or "")
        if tag in ("!", f"{_CORE}str") or (not tag and event.style):
            return text
        if tag and tag.removeprefix(_CORE) not in ("null", "bool", "int", "float"):
            self._unknown_tag(tag)
        try:
            return resolve(text)
        except ValueError as error:
            self.fail(*self.last, str(error))

    def _unknown_tag(self, tag: str) -> NoReturn:
        self.fail(*self.last, f"found the tag {tag.replace(_CORE, '!!')}; expected plain values: remove the tag")

    def _alias(self, event: AliasEvent) -> None:
        line, column = self.last
        if event.anchor not in self._anchors:
            self.fail(line, column, f"found the alias *{event.anchor}; expected '&{event.anchor}' before it")
        node = self._anchors[event.anchor]
        if node is None:
            self.fail(line, column, f"the alias *{event.anchor} stands inside the value it names; write the value out")
        self._add(node, event)

    def _begin(self, event: MappingStartEvent | SequenceStartEvent) -> None:
        line, column = self.last
        if len(self._open) >= MAX_DEPTH:
            self.fail(line, column, f"found more than {MAX_DEPTH} levels; expected fewer")
        if self._open and isinstance(self._open[-1].value, dict) and self._open[-1].key is None:
            self.fail(line, column, "found a mapping or list as a key; expected text: put a template in quotes")
        kind = "map" if isinstance(event, MappingStartEvent) else "seq"
        if event.tag and str(event.tag) not in ("!", _CORE + kind):
            self._unknown_tag(str(event.tag))
        if event.anchor:
            self._anchors[event.anchor] = None
        self._open.append(_Open(event, {} if kind == "map" else []))

    def _end(self) -> None:
        ended = self._open.pop()
        line, column = _start(ended.event.start_mark)
        node = Node(ended.value, line, column, None, ended.keys, ended.children, ended.weight)
        self._add(node, ended.event)

    def _add(self, node: Node, event: NodeEvent) -> None:
        if event.anchor and not isinstance(event, AliasEvent):
            self._anchors[event.anchor] = node
        if not self._open:
            self.root = node
            return
        parent = self._open[-1]
        parent.weight += node.weight
        if parent.weight > MAX_EXPANDED:
            self.fail(*self.last, f"the aliases unfold to more than {MAX_EXPANDED} characters; write less")
        if isinstance(parent.value, list):
            parent.children[len(parent.value)] = node
            parent.value.append(node.value)
        elif parent.key is None:
            parent.key = self._key(node, parent)
        else:
            parent.children[parent.key] = node
            parent.value[parent.key] = node.value
            parent.key = None

    def _key(self, node: Node, parent: _Open) -> str:
        line, column = self.last
        key = node.value
        if not isinstance(key, str):
            self.fail(line, column, f"found the key {key!r}; expected text: put it in quotes")
        if key == "<<":
            self.fail(line, column, "found the merge key <<, which YAML 1.2 does not have; write the keys out")
        if key in parent.keys:
            self.fail(
                line, column, f"found {key!r} again; expected each key once (first on line {parent.keys[key][0]})"
            )
        parent.keys[key] = (line, column)
        return key


def _start(mark: StreamMark) -> tuple[int, int]:
    return mark.line + 1, mark.column + 1
