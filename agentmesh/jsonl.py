"""JSON Lines: one object a line, one line in memory at a time; every mistake is named with its line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentmesh.errors import InputError

LINE_LIMIT = 16 * 2**20
"""Bytes of a line that are still read; a longer one is no line of data."""

SHOWN = 60

Row = dict[str, Any]


def read_objects(path: Path, expected: str) -> Iterator[tuple[str, Row]]:
    """Place (``file:line``) and content of each line that is not empty.

    Args:
        path: the file, in UTF-8.
        expected: what an object looks like, for messages.

    Raises:
        InputError: the file cannot be read, or a line is too long, no UTF-8, no JSON or no object.
    """
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LINE_LIMIT + 1), b""), 1):
                place = f"{path}:{number}"
                if len(line) > LINE_LIMIT:
                    limit = LINE_LIMIT // 2**20
                    raise InputError(f"{place}: the line is longer than {limit} MiB; expected {expected} on a line")
                text = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, place)
                if text.strip():
                    yield place, parsed(text, place, expected)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a JSONL file in UTF-8") from error


def parse_objects(text: str, place: str, expected: str) -> Iterator[tuple[str, Row]]:
    """The same of a text; ``place`` names it.

    Raises:
        InputError: a line is no JSON or no object.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{place}:{number}", parsed(line, f"{place}:{number}", expected)


def parsed(line: str, place: str, expected: str) -> Row:
    """One line.

    Raises:
        InputError: it is no JSON or no object.
    """
    try:
        found = json.loads(line)
        if "\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: half a character (a lone surrogate such as \\ud83d) in the text") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: no JSON ({error}), found {line[:SHOWN].strip()!r}; expected {expected} on a line"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{place}: found {type(found).__name__}, expected an object such as {expected}")
    return found


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from error
