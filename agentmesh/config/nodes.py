"""What a YAML file says and where: plain data with the line and column of every key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a file to one value."""

EXCERPT_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Node:
    """One value of the file: its data, where it stands, and the nodes below it.

    Attributes:
        value: plain data: dict, list, str, int, float, bool or None.
        line: 1-based line of the value.
        column: 1-based column of the value.
        style: how a scalar is written: None for plain, a quote, ``|`` or ``>``.
        keys: position of each key of a mapping.
        children: the nodes below, by key or index.
        weight: characters and nodes below, counted again at every alias.
    """

    value: Any
    line: int
    column: int
    style: str | None = None
    keys: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    children: Mapping[str | int, Node] = field(default_factory=dict)
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML file that was read: its name, its text and its tree."""

    name: str
    text: str
    root: Node

    def locate(self, path: KeyPath, *, at_key: bool = False) -> tuple[int, int]:
        """Line and column of the value at ``path``, or of its key; of the deepest part that exists, if none does."""
        node, place = self.root, (self.root.line, self.root.column)
        for index, part in enumerate(path):
            if part not in node.children:
                break
            key = node.keys.get(part) if isinstance(part, str) else None
            node = node.children[part]
            whole = index == len(path) - 1
            place = (node.line, node.column) if key is None or (whole and not at_key) else key
        return place

    def node(self, path: KeyPath) -> Node | None:
        """The node at ``path``, or None."""
        node: Node | None = self.root
        for part in path:
            node = None if node is None else node.children.get(part)
        return node


def excerpt(text: str, line: int, column: int) -> str:
    """Line ``line`` of the text with a caret under the column, cut to a readable width."""
    lines = text.splitlines()
    source = lines[line - 1] if line <= len(lines) else ""
    start = max(0, column - 1 - EXCERPT_WIDTH // 2)
    shown = source[start : start + EXCERPT_WIDTH]
    margin = "".join("\t" if character == "\t" else " " for character in source[start : column - 1])
    safe = "".join(character if character.isprintable() or character == "\t" else "\ufffd" for character in shown)
    return f"  {safe}\n  {margin}^"
