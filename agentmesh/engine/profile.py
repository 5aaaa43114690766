"""A profile for people: where the engine's thread spent its time as figures, and as a trace for a viewer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from agentmesh.engine.loop import Engine
from agentmesh.engine.operations import OWN, Span
from agentmesh.engine.spans import Forwards, Part, Recorded, Taken
from agentmesh.results import Looked, PartTime, Profile

PYTHON = "Python between them"
STEPS = (Part.STEP, Part.DECODE, Part.SAMPLE)
THREAD, DEVICE = 1, 2


def figures(seen: Recorded) -> Profile:
    """The figures of a profile."""
    parts = [row for part in Part for row in _rows(seen, part)]
    return Profile(
        wall_s=seen.wall_s,
        waited_s=seen.waited_s,
        waited=seen.waited,
        parts=tuple(parts),
        prefills=_looked(seen.forwards[Part.PREFILL]),
        steps=_looked(seen.forwards[Part.DECODE]),
        outside=_outside(seen),
        left_out=seen.left_out,
    )


@final
class Profiles:
    """Profiles by name: their figures, and one trace of them all in the Chrome trace format, a process each.

    Attributes:
        taken: the figures.
    """

    def __init__(self) -> None:
        self.taken: dict[str, Profile] = {}
        self._events: list[dict[str, Any]] = []

    @contextmanager
    def of(self, engine: Engine, name: str) -> Iterator[None]:
        """Take a profile of what an engine does meanwhile; not on the engine's own thread."""
        engine.begin_profile()
        try:
            yield
        finally:
            seen = engine.end_profile()
        self.add(name, seen)

    def add(self, name: str, seen: Recorded) -> None:
        """Add what was noted."""
        self.taken[name] = figures(seen)
        pid = len(self.taken)
        self._events.append(_named("process_name", name, pid, THREAD))
        self._events.append(_named("thread_name", "engine", pid, THREAD))
        self._events += [_event(span, "part", pid) for span in seen.spans]
        operations = [span for forwards in seen.forwards.values() for span in forwards.operations]
        if any(span.device for span in operations):
            self._events.append(_named("thread_name", "device", pid, DEVICE))
        self._events += [_event(span, "operation", pid) for span in operations]

    def trace(self) -> str:
        """The trace as JSON."""
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": self._events})


def _rows(seen: Recorded, part: Part) -> list[PartTime]:
    """A part, and the kinds of work in it."""
    if part is Part.STEP:
        seconds = sum(_taken(seen, one).seconds for one in STEPS)
        kinds = {**_kinds(seen, Part.DECODE), Part.SAMPLE.value: _taken(seen, Part.SAMPLE).seconds}
    elif part is Part.PREFILL:
        seconds, kinds = _taken(seen, part).seconds, _kinds(seen, part)
    elif part in STEPS:
        return []
    else:
        seconds, kinds = _taken(seen, part).seconds, {}
    if part not in seen.parts:
        return []
    if kinds:
        kinds[PYTHON] = seconds - sum(kinds.values())
    calls = _taken(seen, part).calls
    return [
        PartTime(name=part.value, seconds=seconds, share=seconds / seen.wall_s, calls=calls),
        *(PartTime(name=name, of=part.value, seconds=s, share=s / seen.wall_s) for name, s in kinds.items()),
    ]


def _kinds(seen: Recorded, part: Part) -> dict[str, float]:
    """Seconds in each kind of work of all forwards of a part, as in those that were looked at; empty where none was."""
    seconds = _taken(seen, part).seconds
    return {work.value: seconds * share for work, share in seen.forwards[part].shares(seen.noting).items()}


def _outside(seen: Recorded) -> float | None:
    """The share of decoding steps outside the model's own kernels."""
    kinds = _kinds(seen, Part.DECODE)
    if not kinds:
        return None
    own = sum(kinds[work.value] for work in OWN)
    return 1 - own / sum(_taken(seen, one).seconds for one in STEPS)


def _taken(seen: Recorded, part: Part) -> Taken:
    return seen.parts.get(part, Taken())


def _looked(forwards: Forwards) -> Looked:
    mean = forwards.rows / forwards.count if forwards.count else 0.0
    return Looked(count=forwards.count, mean_rows=mean, looked_at=forwards.looks)


def _named(what: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _event(span: Span, category: str, pid: int) -> dict[str, Any]:
    """A complete event, in microseconds."""
    tid = DEVICE if span.device else THREAD
    times = {"ts": round(span.begin * 1e6, 3), "dur": round(span.took * 1e6, 3)}
    return {"name": span.name, "cat": category, "ph": "X", **times, "pid": pid, "tid": tid}
