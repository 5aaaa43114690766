"""Samples: one question with its answer and what else its kind needs, from JSON Lines or the Hub.

Everything is read and checked before anything is generated; an error names the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from agentmesh.config.base import Frozen
from agentmesh.errors import InputError, UsageError
from agentmesh.jsonl import read_objects
from agentmesh.suites.task import NEEDED, Fields, HubSource, Kind, Task

EXPECTED = '{"question": …, "answer": …}'
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Passage(Frozen):
    """One passage of a sample's context."""

    title: str = ""
    text: str


class Sample(Frozen):
    """One question.

    ``answers`` are all that count as right, ``answer`` first; ``gold`` names the passages that hold it as the
    data does: by their titles, or by their places in ``context``, from 0.
    ``tests`` is code that must run through after the answer's code, ``visible`` the part of it that agents may see.
    """

    id: str
    question: str
    answer: str = ""
    answers: tuple[str, ...] = ()
    context: tuple[Passage, ...] = ()
    gold: tuple[int | str, ...] = ()
    choices: tuple[str, ...] = ()
    entry_point: str = ""
    tests: str = ""
    visible: str = ""

    def named(self, gold: int | str) -> tuple[Passage, ...]:
        """The passages that an entry of ``gold`` names: one by its place, all of that title by a title."""
        if isinstance(gold, int):
            return (self.context[gold],)
        return tuple(passage for passage in self.context if passage.title == gold)

    @property
    def passages(self) -> str:
        """The context as JSON Lines, as a retriever reads it."""
        return "\n".join(passage.model_dump_json() for passage in self.context)


def read_samples(task: Task, data: Path | None = None) -> list[Sample]:
    """All samples of a task, checked.

    Args:
        task: the task.
        data: a JSONL file instead of the task's own source.

    Raises:
        InputError: no source, an unreadable file, a line that is no sample, two samples with one id, or none at all.
        UsageError: the Hub is asked for, and ``datasets`` is not installed or cannot fetch it.
    """
    spec = task.spec
    if data is None and spec.hub is not None:
        rows, fields = _hub_rows(spec.hub), spec.hub.fields
    elif data is not None or spec.file is not None:
        file = data if data is not None else task.folder / str(spec.file)
        rows, fields = read_objects(file, EXPECTED), spec.fields
    else:
        raise InputError(f"task {task.name} ships no samples; give a JSONL file with --data")
    found: dict[str, Sample] = {}
    for place, row in rows:
        sample = _sample(row, fields, spec.kind, place)
        if sample.id in found:
            raise InputError(f"{place}: the id {sample.id!r} is there already; every sample needs an id of its own")
        found[sample.id] = sample
    if not found:
        raise InputError(f"task {task.name}: {data or spec.file or spec.hub} holds no samples; expected lines of JSON")
    return list(found.values())


def _hub_rows(source: HubSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from datasets import load_dataset  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise UsageError(
            f"{source.path} is on the Hugging Face Hub: install agentmesh-kv[datasets], or give --data FILE.jsonl"
        ) from error
    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(
            source.path, source.name, split=source.split, revision=source.revision
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{source.path} cannot be fetched ({error}); give --data FILE.jsonl instead") from error
    for number, row in enumerate(rows, 1):
        yield f"{source.path} row {number}", {"id": f"{source.path}/{number}", **row}


def _sample(row: Mapping[str, Any], fields: Fields, kind: Kind, place: str) -> Sample:
    """A row as a sample; what its kind needs must be there."""
    found = {name: _at(row, path) for name, path in fields.model_dump().items()}
    for name in NEEDED[kind]:
        if found[name] in (None, "", []):
            path = getattr(fields, name)
            have = ", ".join(list(row)[:12])
            raise InputError(f"{place}: no {name} at {path!r}; found the fields {have} (see `fields` in task.yaml)")
    context = _context(found["context"], place)
    choices = tuple(str(choice) for choice in found["choices"] or ())
    answer = _answer(found["answer"], choices)
    others = tuple(str(each) for each in found["answers"] or ())
    return Sample(
        id=str(found["id"]) if found["id"] is not None else place,
        question=str(found["question"]),
        answer=answer,
        answers=tuple(dict.fromkeys((answer, *others))),
        context=context,
        gold=tuple(_gold(each, context, place) for each in found["gold"] or ()),
        choices=choices,
        entry_point=str(found["entry_point"] or ""),
        tests=_code(found["tests"]),
        visible=_code(found["visible"]),
    )


def _at(row: Any, path: str) -> Any:
    """What stands at a path; ``None`` where nothing does."""
    for part in path.split("."):
        if isinstance(row, Mapping) and part in row:
            row = row[part]
        elif isinstance(row, Sequence) and not isinstance(row, str) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return None
    return row


def _answer(found: Any, choices: Sequence[str]) -> str:
    """The answer's text; the number of a choice as its letter."""
    if choices and isinstance(found, int) and 0 <= found < min(len(choices), len(LETTERS)):
        return LETTERS[found]
    return "" if found is None else str(found)


def _code(found: Any) -> str:
    """Code that stands as text, or as a list of statements."""
    return "\n".join(str(each) for each in found) if isinstance(found, list | tuple) else str(found or "")


def _context(found: Any, place: str) -> tuple[Passage, ...]:
    """Passages from a list of texts or of objects with ``title`` and ``text``, or from one object of lists."""
    if not found:
        return ()
    try:
        if isinstance(found, Mapping):
            pairs = zip(found["title"], found["sentences"], strict=True)
            return tuple(Passage(title=title, text="".join(sentences)) for title, sentences in pairs)
        return tuple(
            Passage(text=each) if isinstance(each, str) else Passage(title=each.get("title", ""), text=each["text"])
            for each in found
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f'{place}: context: expected a list of {{"title": …, "text": …}}') from error


def _gold(found: Any, context: Sequence[Passage], place: str) -> int | str:
    """The place or the title of a passage."""
    if not isinstance(found, int):
        return str(found)
    if not 0 <= found < len(context):
        raise InputError(f"{place}: gold: there is no passage number {found}; there are {len(context)}")
    return found


def part(samples: Sequence[Sample], warmup: int, limit: str | None) -> tuple[list[Sample], list[Sample]]:
    """Samples to warm up with, and those to measure.

    Args:
        samples: all of them; the first ones warm up.
        warmup: how many.
        limit: how many of the rest (``50``), or which of all samples (``10-20``, from 1 on); all of them if ``None``.

    Raises:
        InputError: no such limit, or fewer samples than are asked for.
    """
    if warmup >= len(samples):
        raise InputError(f"--warmup {warmup} leaves nothing to measure of {len(samples)} samples")
    first, last = _range(limit, warmup, len(samples))
    if not warmup <= first < last <= len(samples):
        raise InputError(
            f"--limit {limit}: there are {len(samples)} samples, of which the first {warmup} warm up; "
            "ask for fewer, or for a later range"
        )
    return list(islice(samples, warmup)), list(samples[first:last])


def _range(limit: str | None, warmup: int, count: int) -> tuple[int, int]:
    if limit is None:
        return warmup, count
    low, dash, high = limit.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise InputError(f"--limit {limit!r}: expected a number such as 50, or a range such as 10-20")
    return (int(low) - 1, int(high)) if dash else (warmup, warmup + int(low))
