"""The record of a run: a folder that is readable whatever happens to the run.

manifest.json   versions, model, seeds, platform, git state
mesh.yaml       the mesh as it was resolved
events.jsonl    every event but streamed text, as it happened
samples.jsonl   one line a finished sample, synced to disk
results.json    the answer and the calls
summary.md      the same for people
profile.json    where the time went, if that was asked for
trace.json      the same for a trace viewer
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

from agentmesh.errors import NotFoundError, RecordError, did_you_mean
from agentmesh.events import CallRecord, Event, RunCancelled, RunFailed, RunFinished, TokenText, parse_event
from agentmesh.results import RunResult, audits_line

PACKAGES = ("agentmesh-kv", "torch", "transformers", "tokenizers", "networkx", "pydantic")
ELSEWHERE = (
    " Another thread count, processor, dtype or version may round differently and change tokens; sampling also depends "
    "on the seed."
)
DETERMINISTIC = (
    "The same seed, inputs and order of runs give the same tokens on the same machine and versions, whatever runs "
    "beside them. That leaves out remote models, attempts that a timeout ended, and agents that make several calls at "
    "once."
    f"{ELSEWHERE}"
)
MAY_DIFFER = (
    "The same run may give other tokens again: sequences that decode beside it decide how sums are rounded, other runs "
    "what has been learned and is still kept when it begins, and measured time what is shared (cost_gate). "
    f"--deterministic (run.deterministic: true) rules these out.{ELSEWHERE}"
)


@final
class Recorder:
    """Writes one run's folder; give ``write`` to the run as a sink. Owned by one run.

    Args:
        root: folder of all runs.
        name: the mesh's name.
        mesh_yaml: the resolved mesh.
        facts: seeds and the model's description, for the manifest.
        deterministic: whether it says that the same run gives the same tokens again, or what may differ.

    Raises:
        RecordError: the folder cannot be written.
    """

    def __init__(
        self, root: Path, name: str, mesh_yaml: str, facts: dict[str, Any], *, deterministic: bool = False
    ) -> None:
        self.path = new_folder(root, name or "mesh", mesh_yaml, facts, deterministic=deterministic)
        with disk(self.path):
            self._events = (self.path / "events.jsonl").open("a", encoding="utf-8")

    def write(self, event: Event) -> None:
        """Append an event; the end of a run is synced to disk.

        Raises:
            RecordError: the disk is full or the folder is gone.
        """
        if isinstance(event, TokenText):
            return
        with disk(self.path):
            self._events.write(event.model_dump_json() + "\n")
            self._events.flush()
            if isinstance(event, RunFinished | RunFailed | RunCancelled):
                os.fsync(self._events.fileno())

    def finish(self, result: RunResult, sample: str = "0") -> None:
        """Append the finished sample and write the results.

        Raises:
            RecordError: the disk is full or the folder is gone.
        """
        data = result.model_dump(mode="json")
        with disk(self.path):
            with (self.path / "samples.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"id": sample, **data}, ensure_ascii=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            write_whole(self.path / "results.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
            write_whole(self.path / "summary.md", summary(result))

    def attach(self, name: str, text: str) -> None:
        """Write one more file into the folder.

        Raises:
            RecordError: the disk is full or the folder is gone.
        """
        with disk(self.path):
            write_whole(self.path / name, text)

    def close(self) -> None:
        """Close the files.

        Raises:
            RecordError: what was still to be written does not fit the disk.
        """
        with disk(self.path):
            self._events.close()


def new_folder(root: Path, name: str, mesh_yaml: str, facts: dict[str, Any], *, deterministic: bool) -> Path:
    """A record's new folder, with its manifest and the mesh.

    Raises:
        RecordError: it cannot be written.
    """
    now = datetime.now(timezone.utc)
    digest = _digest(f"{now.isoformat()}{os.getpid()}{mesh_yaml}")[:8]
    path = root / f"{now:%Y%m%dT%H%M%S}-{name}-{digest}"
    manifest = {
        "created": now.isoformat(),
        **facts,
        **environment(),
        "determinism": DETERMINISTIC if deterministic else MAY_DIFFER,
        "mesh_sha256": _digest(mesh_yaml),
    }
    with disk(path):
        path.mkdir(parents=True)
        write_whole(path / "mesh.yaml", mesh_yaml)
        write_whole(path / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Versions, platform, command line and git state, as a manifest holds them."""
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "argv": sys.argv[1:],
        "git": _git(),
    }


def summary(result: RunResult) -> str:
    """A finished run as Markdown."""
    lines = ["# Answer", "", result.answer, "", "# Calls", ""]
    lines += ["| node | round | prompt | placed | computed | output | TTFT ms |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {c.node} | {c.round} | {c.prompt_tokens} | {c.placed_exact + c.placed_realigned} | {_computed(c)} "
        f"| {c.output_tokens} | {c.ttft_ms:.0f} |"
        for c in result.calls
    ]
    audits = audits_line(result.calls)
    lines += ["", audits] if audits else []
    lines += ["", "# Messages"]
    for message in result.messages:
        lines += ["", f"## {message.node} ({message.role}), round {message.round}", "", message.text]
    return "\n".join(lines) + "\n"


def _computed(call: CallRecord) -> str:
    note = "" if call.endpoint is None else call.endpoint.note
    return f"{call.computed} ({note})" if note else str(call.computed)


def runs(root: Path) -> list[Path]:
    """Run folders, oldest first."""
    return sorted(path.parent for path in root.glob("*/manifest.json"))


def find_run(root: Path, name: str) -> Path:
    """A run by its folder's name, the end of it, a path, or ``last``.

    Raises:
        NotFoundError: no such run.
    """
    known = runs(root)
    if name == "last" and known:
        return known[-1]
    if (Path(name) / "manifest.json").is_file():
        return Path(name)
    found = [path for path in known if path.name == name or path.name.endswith(name)]
    if len(found) == 1:
        return found[0]
    names = [path.name for path in known]
    what = f"{len(found)} runs end with" if found else "no run named"
    recent = ", ".join(names[-5:]) or "(none)"
    raise NotFoundError(f"{what} {name!r} in {root}; the newest are {recent}.{did_you_mean(name, names)}")


def read_events(path: Path) -> Iterator[Event]:
    """The events of a run folder; a last line that a killed process left unfinished is skipped.

    Raises:
        RecordError: a damaged line elsewhere.
    """
    file = path / "events.jsonl"
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
    for number, line in enumerate(lines, 1):
        event = _event(line)
        if event is not None:
            yield event
        elif number < len(lines):
            raise RecordError(f"{file}:{number}: not an event: {line[:60]!r}")


def _event(line: str) -> Event | None:
    try:
        return parse_event(line)
    except ValueError:
        return None


def has_events(path: Path) -> bool:
    """Whether a folder is the record of one run; that of an evaluation has samples instead of events."""
    return (path / "events.jsonl").exists()


def outcome(path: Path) -> str:
    """How a run or evaluation ended: ``finished``, ``failed``, ``cancelled``, or ``cut off`` for a killed process."""
    if not has_events(path) and (path / "results.json").is_file():
        return "finished"
    last = next(reversed(list(read_events(path))), None)
    if isinstance(last, RunFinished):
        return "finished"
    if isinstance(last, RunFailed):
        return "failed"
    return "cancelled" if isinstance(last, RunCancelled) else "cut off"


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what goes wrong in writing a record into a ``RecordError``."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"cannot write the run's record in {path}: {error.strerror or error}. Free some space, or give another "
            "folder with --runs-dir; what was written before is kept"
        ) from error


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git() -> dict[str, str]:
    """Commit and state of the working folder; empty where it is no git checkout."""
    try:
        commit = _git_output("rev-parse", "HEAD")
        changed = _git_output("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "state": "changed" if changed else "clean"}


def _git_output(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)  # noqa: S603  # fixed words
    return done.stdout.strip()
