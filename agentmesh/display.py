"""What a person sees of a run: a live picture on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from agentmesh.config.base import Choice
from agentmesh.events import (
    CallRecord,
    Event,
    FirstToken,
    ModelFinished,
    NodeFailed,
    NodeFinished,
    NodeRetrying,
    NodeSkipped,
    NodeStarted,
    RunStarted,
    TokenText,
)
from agentmesh.reasons import Treatment
from agentmesh.stream import Sink

COLOURS = {"waiting": "dim", "reading": "yellow", "writing": "cyan", "done": "green", "failed": "red", "skipped": "dim"}
TAIL = 100


class Display(Choice):
    """How a run is shown while it goes on."""

    AUTO = "auto"
    RICH = "rich"
    PLAIN = "plain"
    NONE = "none"


@dataclass
class NodeView:
    """What is known of one node by now."""

    state: str = "waiting"
    round: int = 0
    role: str = ""
    text: str = ""
    first: FirstToken | None = None
    pieces: int = 0
    begun: float = 0.0
    rate: float = 0.0


@dataclass
class RunView:
    """The state of a run as its events tell it; draws itself."""

    nodes: dict[str, NodeView] = field(default_factory=dict)
    title: str = ""

    def take(self, event: Event) -> None:
        """Follow one event."""
        if isinstance(event, RunStarted):
            self.title = f"{event.mesh}: {event.preset} on {event.model}"
            self.nodes = {node: NodeView() for node in event.nodes}
        elif isinstance(event, NodeStarted):
            self.nodes[event.node] = NodeView("reading", event.round, event.role)
        elif isinstance(event, FirstToken):
            view = self.nodes[event.node]
            view.state, view.first, view.begun = "writing", event, time.perf_counter()
        elif isinstance(event, TokenText):
            self._text(self.nodes[event.node], event.text)
        elif isinstance(event, ModelFinished):
            if event.call.decode_ms:
                self.nodes[event.call.node].rate = 1e3 * event.call.output_tokens / event.call.decode_ms
        elif isinstance(event, NodeFinished):
            view = self.nodes[event.message.node]
            view.state, view.text = "done", event.message.text
        elif isinstance(event, NodeFailed):
            self.nodes[event.node].state = "failed"
        elif isinstance(event, NodeSkipped):
            self.nodes[event.node].state = "skipped"

    def _text(self, view: NodeView, piece: str) -> None:
        view.text += piece
        view.pieces += 1
        elapsed = time.perf_counter() - view.begun
        view.rate = view.pieces / elapsed if elapsed > 0.2 else 0.0

    def __rich__(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("node", "state", "round", "placed", "computed", "TTFT", "tok/s", "text"):
            table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1 if name == "text" else None)
        for name, view in self.nodes.items():
            first = view.first
            placed = str(first.placed_exact + first.placed_realigned) if first else ""
            table.add_row(
                name,
                Text(view.state, style=COLOURS[view.state]),
                str(view.round),
                placed,
                str(first.computed) if first else "",
                f"{first.ttft_ms:.0f} ms" if first else "",
                f"{view.rate:.1f}" if view.rate else "",
                Text(" ".join(view.text.split())[-TAIL:], style="dim"),
            )
        return Group(Text(self.title, style="bold"), table)


def plain_lines(write: Callable[[str], None]) -> Sink:
    """A sink that writes one line for each thing worth a line."""

    def take(event: Event) -> None:
        line = _line(event)
        if line:
            write(line)

    return take


def _line(event: Event) -> str:
    if isinstance(event, RunStarted):
        return f"{event.mesh}: {len(event.nodes)} nodes, {event.rounds} round(s), {event.preset} on {event.model}"
    if isinstance(event, FirstToken):
        placed = event.placed_exact + event.placed_realigned
        return f"{event.node}: {placed} tokens placed, {event.computed} computed, first token {event.ttft_ms:.0f} ms"
    if isinstance(event, NodeFinished):
        return f"{event.message.node}: wrote {event.message.tokens} tokens"
    if isinstance(event, NodeRetrying):
        return f"{event.node}: retry {event.attempt}: {event.error}"
    if isinstance(event, NodeSkipped):
        return f"{event.node}: skipped in round {event.round}: {event.reason}"
    return f"{event.node}: failed: {event.error}" if isinstance(event, NodeFailed) else ""


@contextmanager
def showing(mode: Display, console: Console) -> Iterator[Sequence[Sink]]:
    """Sinks that show a run on a console while the context lasts."""
    if mode is Display.AUTO:
        mode = Display.RICH if console.is_terminal else Display.PLAIN
    if mode is Display.RICH:
        view = RunView()
        with Live(view, console=console, refresh_per_second=8):
            yield (view.take,)
    elif mode is Display.PLAIN:
        yield (plain_lines(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)),)
    else:
        yield ()


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A tick for each part of long work: a bar on a terminal, in a log a line for every tenth of it.

    Args:
        console: where it is shown.
        what: is being done.
        total: how many ticks there will be.
    """
    if not console.is_terminal:
        yield _in_lines(console, what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)


def _in_lines(console: Console, what: str, total: int) -> Callable[[], None]:
    """A tick that prints a line for every tenth of long work, with the time it took so far."""
    done, begun = count(1), time.monotonic()

    def tick() -> None:
        number = next(done)
        if number * 10 // total > (number - 1) * 10 // total:
            passed = timedelta(seconds=round(time.monotonic() - begun))
            console.print(f"{what}: {number} of {total} after {passed}", highlight=False, soft_wrap=True)

    return tick


@contextmanager
def fetching(console: Console, *, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback for fetching and converting a model, shown as bars where something is to be done.

    Until then, and while the weights are read, a terminal shows that something goes on.
    """
    loading = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    loading.add_task("loading the model", total=None)
    bars = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(f"{stage} the model", total=total)
        bars.update(tasks[stage], completed=done, total=total)

    with nullcontext() if quiet else Live(Group(loading, bars), console=console, transient=True):
        yield report


def calls_table(calls: Sequence[CallRecord]) -> Table:
    """The table of model calls that a run ends with; prompt = exact + realigned + computed."""
    table = Table(title="model calls", box=SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for name in ("round", "prompt", "exact", "realign", "comp.", "out", "TTFT", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("because", no_wrap=True)
    for call in calls:
        reasons = {str(row.reason): None for row in call.plan if row.kind is Treatment.COMPUTED and row.tokens}
        if call.endpoint is not None and call.endpoint.note:
            reasons[call.endpoint.note] = None
        rate = 1e3 * call.output_tokens / call.decode_ms if call.decode_ms else 0.0
        counts = (call.prompt_tokens, call.placed_exact, call.placed_realigned, call.computed, call.output_tokens)
        numbers = [str(call.round), *map(str, counts), f"{call.ttft_ms:.0f}ms", f"{rate:.1f}"]
        table.add_row(call.node, *numbers, ", ".join(reasons))
    return table
