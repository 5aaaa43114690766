"""Where the engine's thread spends its time: named parts, and a look at the operations of some forwards.

Off, which it is until somebody begins a profile, a span costs one comparison and nothing is kept. A part's time is its
own: what runs in parts inside it counts there. Of everything that could grow without end only a limited number is kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import final

import torch

from agentmesh.config.base import Choice
from agentmesh.engine.operations import Look, Mark, Span, Watch, Work, marked, settle

NOTHING: AbstractContextManager[None] = nullcontext()


class Part(Choice):
    """What the engine's thread does, in the order in which a request meets it."""

    ADMIT = "admit"
    PLAN = "plan"
    MATCH = "match"
    REALIGN = "realign"
    COMPOSE = "compose"
    PREFILL = "prefill"
    FIRST = "first token"
    STEP = "decoding steps"
    DECODE = "decode"
    SAMPLE = "sampling and text"
    KEEP = "keep"
    LEARN = "learn"
    AUDIT = "audit"
    INGEST = "ingest"
    RUNS = "begin and end runs"
    PROFILE = "profiling"
    IDLE = "idle"


ENOUGH = 5
"""Steps from which what noting costs is told by those that were looked at and those just before them."""

FORWARDS = (Part.PREFILL, Part.DECODE)
"""Parts that are forwards of the model, some of which are looked at."""


@dataclass(frozen=True)
class Limits:
    """How much is looked at and kept.

    Args:
        prefills: how many of the first prefills are looked at.
        first: how many of the first decoding steps are.
        every: which of the others: every so many.
        steps: how many decoding steps in all.
        spans: parts that are kept for the trace.
        operations: operations that are kept for the trace, of prefills and of decoding steps each.
    """

    prefills: int = 16
    first: int = 5
    every: int = 20
    steps: int = 40
    spans: int = 100_000
    operations: int = 50_000


@dataclass
class Taken:
    """Seconds in a part, and how often it was begun."""

    seconds: float = 0.0
    calls: int = 0


@dataclass
class Forwards:
    """Forwards of one kind.

    Args:
        count: how many there were.
        rows: tokens (prefills) or sequences (decoding steps) in them.
        looks: how many were looked at.
        looked_s: seconds that these took, noting their operations included.
        seconds: of that, in each kind of work.
        noted: operations that were noted.
        inside: of these, while others ran, by kind of work.
        before: rows and seconds of the last one that was not looked at.
        dearer: by how many seconds an operation that was noted took longer than in the same forward just before.
        operations: kept for the trace.
    """

    count: int = 0
    rows: int = 0
    looks: int = 0
    looked_s: float = 0.0
    seconds: dict[Work, float] = field(default_factory=lambda: dict.fromkeys(Work, 0.0))
    noted: int = 0
    inside: dict[Work, int] = field(default_factory=lambda: dict.fromkeys(Work, 0))
    before: tuple[int, float] = (0, 0.0)
    dearer: list[float] = field(default_factory=list)
    operations: list[Span] = field(default_factory=list)

    def shares(self, noting: float) -> dict[Work, float]:
        """The share of each kind of work in the time of forwards, if noting an operation takes so many seconds."""
        seconds = {work: max(self.seconds[work] - noting * self.inside[work], 0.0) for work in Work}
        whole = max(self.looked_s - noting * self.noted, sum(seconds.values()))
        return {work: one / whole for work, one in seconds.items()} if whole else {}


@dataclass
class Recorded:
    """What a profile has seen; the parts' seconds and ``idle`` add up to ``wall_s``.

    ``noting``: seconds that noting one operation of a forward took.
    """

    limits: Limits
    begun: float
    noting: float = 0.0
    wall_s: float = 0.0
    waited_s: float = 0.0
    waited: int = 0
    parts: dict[Part, Taken] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    forwards: dict[Part, Forwards] = field(default_factory=lambda: {part: Forwards() for part in FORWARDS})
    left_out: int = 0


@final
class Spans:
    """Notes what the engine's thread does, while a profile is on. Used on that thread only."""

    def __init__(self) -> None:
        self._log: _Log | None = None

    def begin(self, device: torch.device, noting: float, limits: Limits) -> None:
        """Begin a profile of a model on ``device``; one that is on is dropped.

        Args:
            device: of the model.
            noting: seconds that noting one operation takes, as long as nothing better is known (``cost_of_noting``).
            limits: how much is looked at and kept.
        """
        self._log = _Log(device, Recorded(limits, time.perf_counter(), noting))

    def end(self) -> Recorded:
        """What was seen since ``begin``; nothing is noted any more."""
        assert self._log is not None, "a profile that ends has begun"
        log, self._log = self._log, None
        return log.close()

    def part(self, part: Part, *, whole: bool = False, again: bool = False) -> AbstractContextManager[None]:
        """A stretch of work, or with ``again`` more of the last one. With ``whole``, parts inside it count in it."""
        return NOTHING if self._log is None else self._log.part(part, whole=whole, again=again)

    def forward(self, part: Part, rows: int) -> AbstractContextManager[None]:
        """A forward of so many rows, to be opened around its part; it may be looked at."""
        return NOTHING if self._log is None else self._log.forward(part, rows)

    def mark(self, mark: Mark) -> AbstractContextManager[object]:
        """A stretch inside a forward."""
        return marked(mark) if self._log is not None and self._log.looking else NOTHING

    def waited(self, seconds: float) -> None:
        """A request has waited so long for the engine."""
        if self._log is not None:
            self._log.seen.waited_s += seconds
            self._log.seen.waited += 1


@dataclass
class _Log:
    """A profile that is on: what was seen, and the parts that are open."""

    device: torch.device
    seen: Recorded
    inner: list[float] = field(default_factory=list)
    whole: bool = False
    looking: bool = False

    def close(self) -> Recorded:
        """Everything that was seen; what no part explains is idle."""
        seen = self.seen
        dearer = seen.forwards[Part.DECODE].dearer
        if len(dearer) >= ENOUGH:
            seen.noting = max(statistics.median(dearer), 0.0)
        seen.wall_s = time.perf_counter() - seen.begun
        seen.parts[Part.IDLE] = Taken(seen.wall_s - sum(taken.seconds for taken in seen.parts.values()))
        return seen

    @contextmanager
    def part(self, part: Part, *, whole: bool = False, again: bool = False) -> Iterator[None]:
        """See ``Spans.part``; ``inner`` holds, for every open part, the seconds in parts inside it."""
        if self.whole:
            yield
            return
        self.whole = whole
        self.inner.append(0.0)
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.whole = False
            settle(self.device)
            took = time.perf_counter() - begun
            taken = self.seen.parts.setdefault(part, Taken())
            taken.seconds += took - self.inner.pop()
            taken.calls += not again
            if self.inner:
                self.inner[-1] += took
            self._keep(self.seen.spans, Span(part, begun - self.seen.begun, took), self.seen.limits.spans)

    @contextmanager
    def forward(self, part: Part, rows: int) -> Iterator[None]:
        """See ``Spans.forward``."""
        if self.whole:
            yield
            return
        forwards = self.seen.forwards[part]
        forwards.count += 1
        forwards.rows += rows
        if not self._wanted(part, forwards):
            begun = time.perf_counter()
            yield
            forwards.before = rows, time.perf_counter() - begun
            return
        with self.part(Part.PROFILE):
            watch = Watch(self.device)
            watch.begin()
        self.looking, begun = True, time.perf_counter()
        try:
            yield
        finally:
            settle(self.device)
            took, self.looking = time.perf_counter() - begun, False
            with self.part(Part.PROFILE):
                watch.end()
                self._add(forwards, watch.look(took), begun - self.seen.begun, rows)

    def _wanted(self, part: Part, forwards: Forwards) -> bool:
        limits = self.seen.limits
        if part is Part.PREFILL:
            return forwards.looks < limits.prefills
        late = forwards.count - limits.first
        return forwards.looks < limits.steps and (late <= 0 or late % limits.every == 0)

    def _add(self, forwards: Forwards, look: Look, begun: float, rows: int) -> None:
        forwards.looks += 1
        forwards.looked_s += look.took
        forwards.noted += look.noted
        for work in Work:
            forwards.seconds[work] += look.seconds[work]
            forwards.inside[work] += look.inside[work]
        if forwards.before[0] == rows and look.noted:
            forwards.dearer.append((look.took - forwards.before[1]) / look.noted)
        for one in look.operations:
            self._keep(forwards.operations, replace(one, begin=begun + one.begin), self.seen.limits.operations)

    def _keep(self, kept: list[Span], span: Span, limit: int) -> None:
        if len(kept) < limit:
            kept.append(span)
        else:
            self.seen.left_out += 1
