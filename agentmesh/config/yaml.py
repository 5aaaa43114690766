"""Reads YAML 1.2 files. Knows no models: plain data with positions, or an error that says where and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import Event

from agentmesh.config.nodes import Document, Node
from agentmesh.config.tree import Tree
from agentmesh.errors import ConfigError

MAX_BYTES = 2**20

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ADVICE = (
    ("'\\t'", "indent with spaces, not tabs"),
    ("mapping values are not allowed", "put text that contains ': ' in quotes, and check the indentation"),
    ("cannot start any token", "put text that starts with this character in quotes"),
    ("unexpected end of stream", "close the quote"),
    ("expected ',' or", "close the bracket, and separate entries with commas"),
    ("stream end", "close the bracket"),
)


def read(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file cannot be read or is no such YAML; the message starts with ``file:line:column``.
    """
    name = str(path)
    try:
        if path.is_dir():
            raise ConfigError(f"{name}: found a folder; expected a YAML file")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{name}: found a device or pipe; expected a YAML file")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file; expected a YAML file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name}: cannot be read ({reason}); expected a YAML file") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES} bytes; keep long documents in files of their own")
    document = parse(_decoded(data, name), name)
    root = document.root
    if not isinstance(root.value, dict):
        found = "an empty file" if root.value is None else "a list" if isinstance(root.value, list) else "one value"
        raise ConfigError(f"{name}:{root.line}:{root.column}: found {found}; expected a mapping of keys to values")
    return document


def parse(text: str, name: str) -> Document:
    """Parse YAML text; any one value may be the top level, and empty text is null.

    Raises:
        ConfigError: the text is no YAML 1.2, or goes beyond a limit.
    """
    tree = Tree(name, text)
    bad = _UNPRINTABLE.search(text)
    if bad:
        tree.fail(*_place(text, bad.start()), f"found the character {bad[0]!r}; expected printable text: remove it")
    try:
        for event in _events(text):
            tree.take(event)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else tree.last
        tree.fail(line, column, _problem(error))
    except (YAMLError, ValueError, OverflowError) as error:  # the two last: escapes beyond Unicode
        tree.fail(*tree.last, f"not valid YAML near here: {error}")
    return Document(name, text, tree.root or Node(None, 1, 1))


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _place(data[: error.start].decode("utf-8", "replace"), error.start)
        found = f"found the byte 0x{data[error.start]:02x}, which is no UTF-8"
        raise ConfigError(f"{name}:{line}:{column}: {found}; save the file as UTF-8") from error


def _place(text: str, index: int) -> tuple[int, int]:
    lines = (text[:index] + "^").splitlines()
    return len(lines), len(lines[-1])


def _problem(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context)
    advice = next((words for sign, words in _ADVICE if sign in problem), "check the indentation and the quotes")
    where = ""
    if error.context and error.context_mark:
        where = f" {error.context} that begins on line {error.context_mark.line + 1}"
    return f"not valid YAML: {problem}{where}; {advice}"


def _events(text: str) -> Iterator[Event]:
    events: Iterator[Event] = YAML(typ="safe", pure=True).parse(text)
    return events
