"""Tables of benchmark figures for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from agentmesh.bench.figures import Fidelity, Scaling, Throughput, Times
from agentmesh.results import Profile


def fidelity_table(figures: Fidelity) -> Group:
    """Presets by their distance from dense."""
    table = _table(
        f"KL(dense ‖ preset), nats a token: {figures.model}, {figures.dtype}, {figures.n} questions",
        ("exact", "95 %", "chained", "first", "p99", "top-1", "placed", "calls", "chained"),
    )
    for name, one in figures.presets.items():
        placed = one.placed_tokens / one.slot_tokens if one.slot_tokens else 0.0
        table.add_row(
            name,
            f"{one.kl_mean:.4f}",
            f"{one.ci95[0]:.3f}-{one.ci95[1]:.3f}",
            f"{one.kl_chained:.4f}",
            f"{one.kl_first:.4f}",
            f"{one.kl_p99:.3f}",
            f"{one.top1:.3f}",
            f"{placed:.0%}",
            f"{one.calls_shared}/{one.calls_shareable}",
            f"{one.chained.calls_shared}/{one.chained.calls_shareable}",
        )
    paired = {name: one.calls for name, one in figures.controls_minus_linear.items()}
    controls = [
        f"{name} shares nothing" if kl is None else f"{name} {kl:.4f} ({paired.get(name, 0)} calls)"
        for name, kl in figures.controls.items()
    ]
    pairs = [
        f"{name} {one.kl_mean:+.4f} [{one.ci95[0]:+.4f}, {one.ci95[1]:+.4f}]"
        for name, one in figures.minus_linear.items()
    ]
    budget = next(iter(figures.settings.values()))["budget"]
    kept = f"{budget / 2**20:,.0f} MiB"
    said = {"minus linear, where both share": pairs, "controls": controls, "kept at most, each": [kept]}
    return Group(table, *(Text(f"{name}: {', '.join(parts)}") for name, parts in said.items() if parts))


def ttft_table(figures: Times) -> Group:
    """Presets by their time to first token."""
    agents = len(next(iter(figures.presets.values())).by_agent_ms)
    table = _table(
        f"time to first token, ms (and times faster than dense): {figures.model}, {figures.dtype}",
        (*(f"agent {number}" for number in range(1, agents + 1)), "sum"),
    )
    parts = _table("parts of the sum, ms", ("plan", "match", "realign", "compose", "forward", "learn (warm-up)"))
    for name, times in figures.presets.items():
        speedup = figures.speedup.get(name)
        ratios = (*speedup.by_agent, speedup.sum) if speedup else ()
        shown = [f"{ms:.0f}" for ms in (*times.by_agent_ms, times.sum_ms)]
        table.add_row(name, *(f"{ms} ({r:.1f}×)" for ms, r in zip(shown, ratios, strict=True)) if ratios else shown)
        parts.add_row(name, *(f"{ms:.0f}" for ms in times.parts_ms.values()), f"{times.learn_ms:.0f}")
    computed = [
        f"{name}, agent {agent}: {_listed(reasons)}"
        for name, times in figures.presets.items()
        for agent, reasons in enumerate(times.reasons, 1)
        if reasons
    ]
    held = [f"{name} {times.anchors_held}" for name, times in figures.presets.items() if times.anchors_held]
    anchors = [Text(f"anchors held: {', '.join(held)}")] if held else []
    return Group(
        table, parts, *anchors, *_computed("shareable tokens that were computed, in all measured rounds:", computed)
    )


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{tokens} {reason}" for reason, tokens in reasons.items())


def _computed(title: str, lines: Sequence[str]) -> list[Text]:
    """Why tokens were not placed, line by line under a title; nothing where there is nothing to be said."""
    return [Text(line) for line in (title, *lines)] if lines else []


def _table(title: str, columns: tuple[str, ...], leading: tuple[str, ...] = ("preset",)) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    for name in leading:
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def throughput_table(figures: Throughput) -> Group:
    """Presets and concurrencies by their speed, where the time went, and why shareable tokens were computed."""
    runs = ("preset", "at once")
    speed = _table(
        f"throughput: {figures.model}, {figures.dtype}",
        ("tokens/s", "decoding", "samples/min", "TTFT p50, ms"),
        leading=runs,
    )
    use = _table(
        "shares of the time, and what was placed",
        ("prefill", "decode", "keep", "placed", "shared", "MiB"),
        leading=runs,
    )
    base = figures.baseline
    if base is not None:
        rates = (f"{base.tokens_per_s:.1f}", f"{base.decode_tokens_per_s:.1f}", f"{base.samples_per_min:.2f}")
        speed.add_row("generate", "1", *rates)
    lines = []
    for run in figures.runs:
        ratios = (run.tokens_per_s / base.tokens_per_s, run.samples_per_min / base.samples_per_min) if base else ()
        width = str(run.concurrency) if run.at_once == run.concurrency else f"{run.concurrency} (at most {run.at_once})"
        speed.add_row(
            run.preset,
            width,
            f"{run.tokens_per_s:.1f}" + (f" ({ratios[0]:.1f}×)" if ratios else ""),
            f"{run.decode_tokens_per_s:.1f}",
            f"{run.samples_per_min:.2f}" + (f" ({ratios[1]:.1f}×)" if ratios else ""),
            f"{run.ttft_ms.p50:.0f}",
        )
        shares = (run.prefill_share, run.decode_share, run.keep_share, run.placed_share)
        shared = f"{run.calls_shared}/{run.calls_shareable}"
        use.add_row(run.preset, width, *(f"{share:.0%}" for share in shares), shared, f"{run.peak_bytes / 2**20:.0f}")
        if run.reasons:
            lines.append(f"{run.preset}, {width}: {_listed(run.reasons)}")
    return Group(speed, use, *_computed("shareable tokens that were computed:", lines))


def scaling_table(figures: Scaling) -> Group:
    """Lengths of prompts and shares that are placed, by their time to first token."""
    table = _table(
        f"time to first token, ms: {figures.model}, {figures.dtype}",
        ("placed", "computed", "TTFT", "fitted", "forward", "matching", "realigning"),
        leading=("tokens",),
    )
    for point in figures.points:
        faster = f" ({point.speedup:.1f}×)" if point.share else ""
        table.add_row(
            str(point.prompt_tokens),
            str(point.placed),
            str(point.computed),
            f"{point.ttft_ms:.0f}{faster}",
            f"{point.fitted_ms:.0f}",
            f"{point.parts_ms['forward']:.0f}",
            *(f"{share:.2%}" if point.share else "" for share in (point.matching_share, point.realigning_share)),
        )
    fit = figures.fit
    return Group(
        table,
        Text(
            "matching, realigning (and placing): shares of dense at the same length.\n"
            f"fit: {fit.base_ms:.1f} ms + {fit.ms_per_token:.4f} a computed token + {fit.ms_per_million_pairs:.2f} a "
            f"million attended pairs + {fit.ms_per_mib:.3f} a MiB placed; R² {fit.r2:.4f}, worst {fit.worst:.0%} off"
        ),
    )


def profile_table(profile: Profile, title: str) -> Group:
    """Where the engine's thread spent its time."""
    table = _table(f"where the time went: {title}", ("s", "share", "calls"), leading=("part",))
    for part in profile.parts:
        name = f"  {part.name}" if part.of else part.name
        table.add_row(name, f"{part.seconds:.3f}", f"{part.share:.1%}", str(part.calls) if part.calls else "")
    table.add_row("in all", f"{profile.wall_s:.3f}", "100.0%", "")
    steps, prefills = profile.steps, profile.prefills
    notes = (
        f"{profile.waited} requests waited {profile.waited_s:.1f} s for the engine, side by side. Kinds of work as in "
        f"{prefills.looked_at} of {prefills.count} prefills and {steps.looked_at} of {steps.count} decoding steps."
    )
    if profile.outside is not None:
        notes += (
            "\nOutside the model's own kernels (matrix products, attention, norms, activations): "
            f"{profile.outside:.1%} of decoding steps at a mean batch of {steps.mean_rows:.1f}."
        )
    if profile.left_out:
        notes += f"\nThe trace leaves out {profile.left_out:,} later spans and operations; the table does not."
    return Group(table, Text(notes))
