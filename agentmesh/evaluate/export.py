"""An evaluation for other programs: flat tables for pandas and the like, programs for evalplus."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from agentmesh.errors import InputError
from agentmesh.evaluate.folder import read_settings, samples_for
from agentmesh.evaluate.journal import Row, by_preset, read_rows
from agentmesh.events import CallRecord
from agentmesh.record import disk, write_whole
from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.programs import complete, written
from agentmesh.suites.task import Kind

EVALPLUS = {"humaneval": "HumanEval", "mbpp": "Mbpp"}
"""Data sets that evalplus tests, and how it begins their ids."""

NUMBERED = re.compile(r"(?P<name>[A-Za-z]+)/(?P<number>[0-9]+)")
CALL_FIELDS = (
    "node",
    "round",
    "prompt_tokens",
    "placed_exact",
    "placed_realigned",
    "computed",
    "slot_tokens",
    "placed_slots",
    "output_tokens",
    "queue_ms",
    "ttft_ms",
    "decode_ms",
    "learn_ms",
    "finish",
    "parts_ms",
)

Record = Mapping[str, Any]


def write_tables(path: Path, target: Path, kind: Literal["csv", "jsonl"]) -> list[Path]:
    """Write an evaluation as two tables, of samples and of model calls.

    Args:
        path: its folder.
        target: the folder to write to; made if it is not there.
        kind: how.

    Returns:
        The files.

    Raises:
        RecordError: it is no folder of an evaluation, or the files cannot be written.
    """
    rows = list(read_rows(path).values())
    write = _csv if kind == "csv" else _jsonl
    return _write(target, {f"samples.{kind}": write(sample_table(rows)), f"calls.{kind}": write(call_table(rows))})


def write_programs(path: Path, target: Path, data: Path | None = None) -> list[Path]:
    """Write an evaluation's programs as evalplus reads them, one file for each preset.

    Args:
        path: its folder.
        target: the folder to write to; made if it is not there.
        data: where its samples are now, if they were moved.

    Returns:
        The files.

    Raises:
        RecordError: it is no folder of an evaluation, or the files cannot be written.
        UsageError: its task is not about code, or the samples are not there any more.
    """
    rows = list(read_rows(path).values())
    task, samples = samples_for(read_settings(path), rows, data)
    if task.spec.kind is not Kind.CODE:
        raise InputError(
            f"evalplus reads programs, but task {task.name} is about {task.spec.kind}; export csv or jsonl"
        )
    texts = {name: _jsonl(solutions(found, samples, task.name)) for name, found in by_preset(rows).items()}
    return _write(target, {f"evalplus-{name}.jsonl": text for name, text in texts.items()})


def sample_table(rows: Iterable[Row]) -> list[Record]:
    """One record for each sample, preset and epoch."""
    return [_sample(row) for row in rows]


def call_table(rows: Iterable[Row]) -> list[Record]:
    """One record for each model call."""
    return [_call(row, call) for row in rows for call in row.calls]


def solutions(rows: Iterable[Row], samples: Mapping[str, Sample], task: str) -> list[dict[str, str]]:
    """Programs as evalplus reads them: ``task_id`` as in its data sets, ``solution`` with all that it needs.

    Args:
        rows: of one preset; a row with an error has no answer and no program.
        samples: by id.
        task: its name.
    """
    found = []
    for row in rows:
        if not row.error:
            block = written(row.answer, samples[row.sample])
            program = complete(block, samples[row.sample]) or block or row.answer
            found.append({"task_id": evalplus_id(row.sample, task), "solution": program})
    return found


def evalplus_id(sample: str, task: str) -> str:
    """A sample's id as evalplus has it, such as ``HumanEval/0`` or ``Mbpp/2``; an id of another kind stays as it is."""
    match = NUMBERED.fullmatch(sample)
    name, number = (match["name"].lower(), match["number"]) if match else (task, sample)
    return f"{EVALPLUS[name]}/{number}" if name in EVALPLUS and number.isdecimal() else sample


def _write(target: Path, texts: Mapping[str, str]) -> list[Path]:
    with disk(target):
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(target / name, text)
    return [target / name for name in texts]


def _sample(row: Row) -> Record:
    calls = row.calls
    return {
        "preset": row.preset,
        "sample": row.sample,
        "epoch": row.epoch,
        "seed": row.seed,
        **row.scores,
        "answer": row.answer,
        "extracted": next(iter(row.extracted.values()), ""),
        "note": next(iter(row.notes.values()), ""),
        "error": row.error,
        "calls": len(calls),
        "prompt_tokens": sum(call.prompt_tokens for call in calls),
        "placed": sum(call.placed_exact + call.placed_realigned for call in calls),
        "computed": sum(call.computed for call in calls),
        "output_tokens": sum(call.output_tokens for call in calls),
        "ttft_ms": sum(call.ttft_ms for call in calls),
        "wall_s": row.ended - row.begun,
        "chosen": row.chosen,
        "chosen_shuffled": row.chosen_shuffled,
    }


def _call(row: Row, call: CallRecord) -> Record:
    about = {"preset": row.preset, "sample": row.sample, "epoch": row.epoch}
    kl, flip = (None, None) if call.audit is None else (call.audit.kl, call.audit.flip)
    audit = {"audit_kl": kl, "audit_flip": flip}
    cached = {"endpoint_cached": None if call.endpoint is None else call.endpoint.cached_tokens}
    return {**about, **{name: getattr(call, name) for name in CALL_FIELDS}, **audit, **cached}


def _jsonl(table: Iterable[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in table)


def _csv(table: Sequence[Record]) -> str:
    """CSV with a header; columns of every record, and JSON for what is no plain value."""
    columns = list(dict.fromkeys(name for record in table for name in record))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns)
    writer.writeheader()
    for record in table:
        writer.writerow({name: _cell(value) for name, value in record.items()})
    return stream.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value) if value else ""
    return value
