"""What an evaluation has done so far: one synced line for each sample under each preset, so that it can go on.

A line is there whole or not at all: what a killed process left unfinished at the end is cut off when the journal is
opened again, and that sample runs once more. A sample that failed has a line, too, and is tried again; the last line
about a sample counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import final

from pydantic import Field, ValidationError

from agentmesh.config.base import Frozen
from agentmesh.errors import RecordError
from agentmesh.events import CallRecord, MessageRecord
from agentmesh.metering import CheckRecord
from agentmesh.record import disk

Key = tuple[str, str, int]
"""Preset, sample, epoch."""


class Row(Frozen):
    """One sample under one preset.

    ``expected`` is the right answer, or the tests that an answer's code must pass; empty where the task has none.
    ``scores`` are values of metrics, ``extracted`` answers and ``notes`` remarks by scorer; ``begun`` and ``ended``
    are Unix times in seconds. ``checks`` are judges asked once more, ``chosen`` and ``chosen_shuffled`` the candidates
    that each judge chose, in the run and in its check. A row with an ``error`` has no answer.
    """

    preset: str
    sample: str
    epoch: int = 0
    seed: int = 0
    expected: str = ""
    begun: float = 0.0
    ended: float = 0.0
    answer: str = ""
    scores: dict[str, float] = Field(default_factory=dict)
    extracted: dict[str, str] = Field(default_factory=dict)
    notes: dict[str, str] = Field(default_factory=dict)
    messages: tuple[MessageRecord, ...] = ()
    calls: tuple[CallRecord, ...] = ()
    checks: tuple[CheckRecord, ...] = ()
    chosen: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    chosen_shuffled: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    error: str = ""

    @property
    def key(self) -> Key:
        """What it is about."""
        return self.preset, self.sample, self.epoch


@final
class Journal:
    """The rows of one evaluation. Use as a context manager; owned by one process at a time.

    Args:
        path: the file; made if it is not there.

    Raises:
        RecordError: the file cannot be read or written, or a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk(path):
            text = path.read_bytes() if path.is_file() else b""
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                os.truncate(path, len(whole))
            self._stream = path.open("ab")
        self._rows = _parsed(whole, path)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stream.close()

    @property
    def rows(self) -> Mapping[Key, Row]:
        """The last row of each sample under each preset."""
        return self._rows

    def done(self, key: Key) -> bool:
        """Whether a sample has run without an error."""
        return key in self._rows and not self._rows[key].error

    def append(self, row: Row) -> None:
        """Add a row, and wait until it is on the disk.

        Raises:
            RecordError: the disk is full or the folder is gone.
        """
        with disk(self.path):
            self._stream.write(row.model_dump_json().encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._rows[row.key] = row


def by_preset(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Preset → its rows, in the order in which they come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.preset, []).append(row)
    return found


def read_rows(path: Path) -> Mapping[Key, Row]:
    """The rows of an evaluation's folder; the file is left as it is.

    Raises:
        RecordError: there is no journal, or a line of it is damaged.
    """
    file = path / "samples.jsonl"
    if not file.is_file():
        raise RecordError(f"{path} holds no samples.jsonl; expected the folder of an `agentmesh eval`")
    text = file.read_bytes()
    return _parsed(text[: text.rfind(b"\n") + 1], file)


def _parsed(text: bytes, path: Path) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            raise RecordError(
                f"{path}:{number}: no row of an evaluation ({line[:60].decode(errors='replace')!r}); remove the line, "
                "and its sample runs again"
            ) from error
        found[row.key] = row
    return found
