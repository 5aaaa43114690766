"""What a forward did: the operations that torch noted of it, sorted by what they were for.

The model's own kernels are the operations that its own code calls; what our cache does while the model runs (writing
rows, cutting views) is not among them. On a CUDA device an operation's time is that of the kernels it launched.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

from agentmesh.config.base import Choice

PREFIX = "agentmesh: "
FORWARD = f"{PREFIX}forward"
PRODUCTS = frozenset(
    {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "conv1d", "_grouped_mm"}
    | {"_mkl_linear", "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"}
)
ATTENTION = "scaled_dot_product_attention"
CALLS, ROUNDS = 200, 5
MARKED = frozenset({"user_annotation", "cpu_op"})
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


def settle(device: torch.device) -> None:
    """Wait until a CUDA device has computed what it was given, so that a clock counts that, too."""
    if device.type == "cuda":  # its own stream alone: another thread may be recording graphs on the device
        torch.cuda.current_stream(device).synchronize()


class Mark(Choice):
    """A stretch of a forward that is marked while it is looked at: the model's own code, and ours inside it."""

    MODEL = "model"
    CACHE = "cache"
    ATTENTION = "attention"


class Work(Choice):
    """What an operation was for; the last two are not the model's own."""

    PRODUCTS = "matrix products"
    ATTENTION = "attention"
    OTHER = "norms, activations, views"
    CACHE = "KV writes"
    OUTSIDE = "masks, views, inputs"


OWN = (Work.PRODUCTS, Work.ATTENTION, Work.OTHER)
"""The model's own kernels."""


@dataclass(frozen=True)
class Span:
    """Something in time: when it began and how long it took, in seconds, on the engine's thread or on the device."""

    name: str
    begin: float
    took: float
    device: bool = False


@dataclass(frozen=True)
class Look:
    """What was seen of one forward; the noting of its operations takes time that is still in here.

    Args:
        took: seconds that it took, until the device was done with it.
        seconds: of each kind of work.
        noted: operations in all.
        inside: operations that were noted while others ran, by the kind of work that they are part of.
        operations: those that no other one called, and the marked stretches, since the forward's begin.
    """

    took: float
    seconds: Mapping[Work, float]
    noted: int
    inside: Mapping[Work, int]
    operations: tuple[Span, ...]


@final
class Watch:
    """Notes the operations of one forward; begun and ended on the thread that runs it.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._profiler = _profiler(device)
        self._open = ExitStack()

    def begin(self) -> None:
        """Begin to note operations."""
        self._open.enter_context(self._profiler)
        self._open.enter_context(record_function(FORWARD))

    def end(self) -> None:
        """Note no more."""
        self._open.close()

    def look(self, took: float) -> Look:
        """What was noted of the forward, which took so many seconds."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "forward.json"
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        return sort(events, took, cuda=self._cuda)


def cost_of_noting(device: torch.device) -> float:
    """Seconds that noting one operation takes, measured on a tiny product in a loop; among others it takes longer.

    Also makes the profiler ready for use.
    """
    rows, weights = torch.zeros(1, 8), torch.zeros(8, 8)

    def seconds() -> float:
        begun = time.perf_counter()
        for _ in range(CALLS):
            functional.linear(rows, weights)
        return time.perf_counter() - begun

    plain, noted, operations = [], [], 1
    with torch.inference_mode():
        for _ in range(ROUNDS):
            plain.append(seconds())
            with _profiler(device) as profiler:
                noted.append(seconds())
            operations = max(len(profiler.events() or ()), 1)
    return max(min(noted) - min(plain), 0.0) / operations


def _profiler(device: torch.device) -> profile:
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])])


def marked(mark: Mark) -> AbstractContextManager[object]:
    """Marks a stretch of a forward that is being noted, for a ninth of what ``record_function`` costs."""
    stretch: AbstractContextManager[object] = torch._C._profiler._RecordFunctionFast(PREFIX + mark.value)  # noqa: SLF001
    return stretch


def sort(events: Iterable[Mapping[str, Any]], took: float, *, cuda: bool = False) -> Look:
    """Sort the events of a torch trace of one forward by what they were for.

    Args:
        events: complete events (``ph`` is ``X``) with ``name``, ``cat``, ``ts`` and ``dur`` in microseconds; others are
            left out.
        took: seconds that the forward took.
        cuda: whether work counts where the device does it.
    """
    whole = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: (float(e["ts"]), -float(e["dur"])))
    begin = next((float(event["ts"]) for event in whole if event["name"] == FORWARD), 0.0)
    sorter = _Sorter(begin, cuda=cuda)
    for event in whole:
        sorter.take(event)
    for event in whole:
        sorter.take_device(event)
    return Look(took, sorter.seconds, sorter.noted, sorter.inside, tuple(sorter.operations))


@dataclass
class _Sorter:
    """Walks events in the order they began, with what is open around each: a marked stretch, or counted work."""

    begin: float
    cuda: bool
    noted: int = 0
    seconds: dict[Work, float] = field(default_factory=lambda: dict.fromkeys(Work, 0.0))
    inside: dict[Work, int] = field(default_factory=lambda: dict.fromkeys(Work, 0))
    operations: list[Span] = field(default_factory=list)
    around: list[tuple[float, Mark | Work | None]] = field(default_factory=list)
    launched: dict[int, Work] = field(default_factory=dict)

    def take(self, event: Mapping[str, Any]) -> None:
        """An operation, a marked stretch or a launch on the thread that ran the forward."""
        start, kind = float(event["ts"]), event.get("cat")
        while self.around and start >= self.around[-1][0]:
            self.around.pop()
        inside = self.around[-1][1] if self.around else None
        if event["name"].startswith(PREFIX) and kind in MARKED:
            self._open(event, self._stretch(event, inside), event["name"].removeprefix(PREFIX))
        elif kind == "cpu_op":
            name = event["name"].rpartition("::")[2]
            work = _work(inside, name)
            self.noted += 1
            if isinstance(inside, Work):
                self.inside[work] += not self.cuda
            else:
                self._count(work, float(event["dur"]) * 1e-6)
                self._open(event, work, name)
        elif kind in LAUNCHES:
            self.launched[int(event["args"].get("correlation", -1))] = _work(inside, "")

    def take_device(self, event: Mapping[str, Any]) -> None:
        """What the device did for an operation."""
        if event.get("cat") in ON_DEVICE:
            work = self.launched.get(int(event["args"].get("correlation", -1)), Work.OUTSIDE)
            self.seconds[work] += float(event["dur"]) * 1e-6
            self._keep(event, event["name"], device=True)

    def _stretch(self, event: Mapping[str, Any], inside: Mark | Work | None) -> Mark | Work | None:
        """What a marked stretch is; all of one in which our cache works counts, Python included."""
        mark = next((mark for mark in Mark if event["name"] == PREFIX + mark.value), None)
        if mark is Mark.CACHE and not isinstance(inside, Work):
            self._count(Work.CACHE, float(event["dur"]) * 1e-6)
            return Work.CACHE
        return inside if mark is None or isinstance(inside, Work) else mark

    def _open(self, event: Mapping[str, Any], inside: Mark | Work | None, name: str) -> None:
        self.around.append((float(event["ts"]) + float(event["dur"]), inside))
        self._keep(event, name)

    def _count(self, work: Work, seconds: float) -> None:
        if not self.cuda:
            self.seconds[work] += seconds

    def _keep(self, event: Mapping[str, Any], name: str, *, device: bool = False) -> None:
        begin = (float(event["ts"]) - self.begin) * 1e-6
        self.operations.append(Span(name, begin, float(event["dur"]) * 1e-6, device))


def _work(inside: Mark | Work | None, name: str) -> Work:
    """What an operation is for, by its name and by what is open around it."""
    if isinstance(inside, Work):
        return inside
    if inside is None:
        return Work.OUTSIDE
    if inside is Mark.ATTENTION or name == ATTENTION:
        return Work.ATTENTION
    return Work.PRODUCTS if name in PRODUCTS else Work.OTHER
