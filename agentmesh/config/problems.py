"""What is wrong in a file, and where: problems are collected and leave as one ConfigError, like a compiler's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agentmesh.config.nodes import Document, KeyPath, excerpt
from agentmesh.errors import ConfigError, did_you_mean

EXCERPTS = 5
MAX_LINES = 50
SHOWN = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: keys from the top of the file to the value.
        message: what was found, what was expected, what to do next.
        at_key: whether the key is wrong, not its value.
    """

    path: KeyPath
    message: str
    at_key: bool = False


@dataclass(frozen=True, slots=True)
class Override:
    """A value given by ``--set``."""

    path: KeyPath
    text: str

    def __str__(self) -> str:
        return f"--set {self.text}"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's values come from: a file, or none, and what was set over it."""

    document: Document | None = None
    overrides: tuple[Override, ...] = ()

    def override_of(self, path: KeyPath) -> Override | None:
        """The override that wrote the value at ``path`` (the last one, if several did), or None."""
        for override in reversed(self.overrides):
            size = len(override.path)
            if path[:size] == override.path:
                return override
            created = self.document is None or self.document.node(path) is None
            if path and created and override.path[: len(path)] == path:
                return override
        return None

    def place(self, path: KeyPath, *, at_key: bool = False) -> str:
        """``file:line:column`` or ``--set path=value`` of a value; empty without a file."""
        override = self.override_of(path)
        if override is not None:
            return str(override)
        if self.document is None:
            return ""
        line, column = self.document.locate(path, at_key=at_key)
        return f"{self.document.name}:{line}:{column}"

    def error(self, problems: Iterable[Problem]) -> ConfigError:
        """All problems in file order, one line each, the first few with their source line."""
        ordered = sorted(problems, key=self._order)
        lines: list[str] = []
        for index, problem in enumerate(ordered[:MAX_LINES]):
            place = self.place(problem.path, at_key=problem.at_key)
            lines.append(": ".join(filter(None, [place, dotted(problem.path), problem.message])) + self._added(problem))
            if index < EXCERPTS and self.document is not None and self.override_of(problem.path) is None:
                lines.append(excerpt(self.document.text, *self.document.locate(problem.path, at_key=problem.at_key)))
        if len(ordered) > MAX_LINES:
            lines.append(f"… and {len(ordered) - MAX_LINES} more")
        return ConfigError("\n".join(lines))

    def _added(self, problem: Problem) -> str:
        """What an override put where the file has nothing, beside what the file has there: often a name's typo."""
        override = self.override_of(problem.path)
        if override is None or self.document is None or "Did you mean" in problem.message:
            return ""
        node = self.document.root
        for size, part in enumerate(override.path[: len(problem.path)], 1):
            if part not in node.children:
                names = [str(name) for name in node.children]
                hint = did_you_mean(str(part), names)
                return f" (the file has no {dotted(override.path[:size])}.{hint})" if hint else ""
            node = node.children[part]
        return ""

    def _order(self, problem: Problem) -> tuple[bool, tuple[int, int]]:
        override = self.override_of(problem.path)
        place = (0, 0) if self.document is None else self.document.locate(problem.path, at_key=problem.at_key)
        return override is not None, place


def dotted(path: KeyPath) -> str:
    """The path as ``agents.solver.role.0``."""
    return ".".join(str(part) if str(part).isprintable() else ascii(part) for part in path)


def shown(value: Any) -> str:
    """A found value in few words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
