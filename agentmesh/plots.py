"""PNG plots of benchmark figures."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from agentmesh.bench.figures import Fidelity, Scaling, Times
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


def plot_scaling(figures: Scaling, path: Path) -> None:
    """TTFT against the length of the prompt, measured and fitted, and what placing costs as a share of dense.

    Raises:
        InputError: the file cannot be written.
    """
    figure = Figure(figsize=(SIZE[0] * 1.5, SIZE[1]), layout="constrained")
    times, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = mpl.colormaps["tab10"]
    for number, share in enumerate(sorted({point.share for point in figures.points})):
        points = [point for point in figures.points if point.share == share]
        lengths, colour = [point.prompt_tokens for point in points], colours(number)
        label = f"{share:.0%} placed" if share else "dense"
        times.plot(lengths, [point.ttft_ms for point in points], "o", color=colour, label=label)
        times.plot(lengths, [point.fitted_ms for point in points], "--", color=colour)
        if share:
            shares.plot(lengths, [100 * point.realigning_share for point in points], "o-", color=colour)
            shares.plot(lengths, [100 * point.matching_share for point in points], "x:", color=colour)
    times.set(xlabel="tokens of the prompt", ylabel="time to first token, ms", ylim=(0, None))
    times.set_title(
        f"{figures.model}, {figures.dtype}; dashed: computed tokens + bytes placed, R² {figures.fit.r2:.4f}"
    )
    times.legend()
    shares.set(xlabel="tokens of the prompt", ylabel="% of dense", ylim=(0, None))
    shares.set_title("realigning and placing (●), matching (×)")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: cannot be written ({error}); expected a file that ends with .png") from error
