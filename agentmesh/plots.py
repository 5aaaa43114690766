"""PNG plots of benchmark figures."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from agentmesh.bench.figures import Fidelity, Times
from agentmesh.errors import InputError

PARTS = ("plan", "match", "realign", "compose", "forward")
SIZE, DPI = (8.0, 5.0), 120


def plot_fidelity(figures: Fidelity, path: Path) -> None:
    """KL against the share of shareable tokens that are placed, one point a preset.

    Raises:
        InputError: the file cannot be written.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for name, one in figures.presets.items():
        if one.calls_shared:
            share = one.placed_tokens / one.slot_tokens
            low, high = one.kl_mean - one.ci95[0], one.ci95[1] - one.kl_mean
            axes.errorbar([share], [one.kl_mean], yerr=[[max(low, 0.0)], [max(high, 0.0)]], fmt="o", label=name)
    axes.set(xlabel="share of shareable tokens placed", ylabel="KL(dense ‖ preset), nats a token", yscale="log")
    axes.set_title(f"{figures.model}, {figures.dtype}, {figures.n} questions")
    axes.legend()
    _save(figure, path)


def plot_ttft(figures: Times, path: Path) -> None:
    """TTFT of each agent and preset, in its parts.

    Raises:
        InputError: the file cannot be written.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    colours = mpl.colormaps["tab10"]
    width = 0.8 / len(figures.presets)
    for column, (name, times) in enumerate(figures.presets.items()):
        for agent, parts in enumerate(times.parts_by_agent_ms):
            bottom = 0.0
            for colour, part in enumerate(PARTS):
                label = part if not column and not agent else None
                place = agent + column * width
                axes.bar([place], [parts[part]], width * 0.9, bottom=bottom, color=colours(colour), label=label)
                bottom += parts[part]
            axes.text(agent + column * width, bottom, f" {name}", rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set(xlabel="agent", ylabel="time to first token, ms")
    agents = range(len(times.by_agent_ms))
    axes.set_xticks([agent + 0.4 for agent in agents], [str(agent + 1) for agent in agents])
    axes.set_title(f"{figures.model}, {figures.dtype}")
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: cannot be written ({error}); expected a file that ends with .png") from error
