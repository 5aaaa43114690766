"""Where things stand in the page's plots. All places and lengths are percentages of a plot's width or height."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from agentmesh.evaluate.breakdown import QUEUE, Parting, Reuse, Wait
from agentmesh.evaluate.results import Paired, PresetResult

ROOM = 1.15
"""How much longer an axis is than what is drawn along it."""

LABEL = 8.0
"""The least distance between two labels, in percent of a plot's height."""

BARS = 12


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """One preset: its place, its interval from ``low`` up to ``high``, and the height of its label."""

    name: str
    x: float
    y: float
    low: float
    high: float
    label_y: float
    text: str


@dataclass(frozen=True)
class Scatter:
    """A metric against wall time."""

    points: tuple[Point, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


@dataclass(frozen=True)
class Span:
    """An interval on an axis through zero, which stands at 50 %."""

    low: float
    high: float
    at: float


@dataclass(frozen=True)
class Bar:
    """How many things fell into a range."""

    text: str
    count: int
    height: float


@dataclass(frozen=True)
class Piece:
    """One part of a stacked bar."""

    name: str
    value: float
    start: float
    width: float


def scatter(presets: Mapping[str, PresetResult], metric: str) -> Scatter:
    """A metric (0 to 1) of each preset against the wall time in seconds that its samples took."""
    scored = {name: one for name, one in presets.items() if metric in one.metrics}
    longest = max((one.wall_s for one in scored.values()), default=0.0) * ROOM or 1.0
    points, last = [], -LABEL
    for name, one in sorted(scored.items(), key=lambda item: -item[1].metrics[metric].value):
        found = one.metrics[metric]
        y = 100 * (1 - found.value)
        last = max(y, last + LABEL)
        low, high = (100 * (1 - bound) for bound in found.ci95)
        text = f"{name}: {found.value:.3f} [{found.ci95[0]:.3f}, {found.ci95[1]:.3f}] in {one.wall_s:,.0f} s"
        points.append(Point(name, 100 * one.wall_s / longest, y, low, high, last, text))
    seconds = [float(tick) for tick in MaxNLocator(4).tick_values(0, longest) if 0 <= tick <= longest]
    return Scatter(
        points=tuple(points),
        across=tuple(Tick(100 * tick / longest, f"{tick:g} s") for tick in seconds),
        up=tuple(Tick(100 * (1 - share), f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
    )


def spans(pairs: Mapping[str, Paired]) -> tuple[float, dict[str, Span]]:
    """How far the axis of differences goes to either side, and each pair's interval on it."""
    reach = max((abs(bound) for one in pairs.values() for bound in one.ci95), default=0.0) * ROOM or 1.0

    def place(value: float) -> float:
        return 50 + 50 * value / reach

    return reach, {name: Span(place(one.ci95[0]), place(one.ci95[1]), place(one.delta)) for name, one in pairs.items()}


def histogram(parting: Parting) -> tuple[Bar, ...]:
    """How many answers part after how many words, in at most ``BARS`` ranges of one width."""
    if not parting.words:
        return ()
    width = max(parting.words) // BARS + 1
    counts = [0] * (max(parting.words) // width + 1)
    for words in parting.words:
        counts[words // width] += 1
    names = [str(n * width) if width == 1 else f"{n * width}-{(n + 1) * width - 1}" for n in range(len(counts))]
    return tuple(Bar(name, count, 100 * count / max(counts)) for name, count in zip(names, counts, strict=True))


def stack(values: Sequence[tuple[str, float]], total: float) -> tuple[Piece, ...]:
    """Values one behind the other along a bar whose whole length is ``total``."""
    found, at = [], 0.0
    for name, value in values:
        width = 100 * value / total if total else 0.0
        found.append(Piece(name, value, at, width))
        at += width
    return tuple(found)


def pieces(wait: Wait, longest: float, *, queue: bool) -> tuple[Piece, ...]:
    """A time to first token in its parts, with or without waiting, along a bar of ``longest`` milliseconds."""
    return stack([(name, ms) for name, ms in wait.parts_ms.items() if queue or name != QUEUE], longest)


def longest_wait(waits: Mapping[str, Mapping[str, Wait]], *, queue: bool) -> float:
    """The longest of all bars of ``pieces``, in milliseconds."""
    found = [one for agents in waits.values() for one in agents.values()]
    return max((sum(ms for name, ms in one.parts_ms.items() if queue or name != QUEUE) for one in found), default=0.0)


def most_tokens(by_preset: Mapping[str, Mapping[str, Reuse]]) -> int:
    """The most tokens of one agent or text under one preset."""
    return max((one.tokens for found in by_preset.values() for one in found.values()), default=0)


def names(by_preset: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The agents, texts or metrics of all presets, each once."""
    return list(dict.fromkeys(name for found in by_preset.values() for name in found))
