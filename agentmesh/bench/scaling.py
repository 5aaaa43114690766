"""Time to first token against the length of the prompt, and against how much of it is placed.

Two agents read the same text, each behind fixed text of its own. The first one computes it; for the second one it is
one realigned block, and the rest of its prompt is computed. Prompts of the same lengths without a block are computed
whole. A fit over all of them says what a computed token, an attended pair and a placed byte cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from agentmesh.bench.figures import Fit, Scaling, ScalingPoint
from agentmesh.bench.rig import Call, Rig, Timed, median_parts
from agentmesh.bench.text import english_tokens
from agentmesh.communicator import Preset, make
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.forward import ArenaRunner
from agentmesh.errors import InputError
from agentmesh.local import LocalBackend
from agentmesh.prompt import FIXED, ChatTokenizer, Content, ContentKind, Prompt, Reader, Segment

OWN = 32
"""Tokens of fixed text that each agent's prompt begins with."""

LEAST = 48
"""Tokens of the shortest block, and of the shortest text that is not in it."""

WARMUP, WARMUP_TOKENS = 5, 256
MATCHING, REALIGNING = ("plan", "match"), ("realign", "compose")


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Args:
        lengths: tokens of prompts.
        shares: how much of a prompt is one block; 0, which is always measured, for none.
        repeat: rounds whose medians are reported.

    Raises:
        InputError: too few points for a fit, or a block or the text around it would be too short.
    """

    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    repeat: int

    def __post_init__(self) -> None:
        coefficients = len(Fit.model_fields) - 2
        if len(self.lengths) < 2 or len(self.cells) <= coefficients:
            raise InputError(
                f"{len(self.lengths)} lengths and {len(self.shares)} shares make {len(self.cells)} points, too few for "
                f"a fit of {coefficients} coefficients; give more --lengths (at least two) or more of --placed"
            )
        for length, share in self.cells:
            block = round(share * length)
            if share and not LEAST <= block <= length - LEAST:
                raise InputError(
                    f"--placed {share:g} of --lengths {length} is a block of {block} tokens; it and the text around it "
                    f"need {LEAST} tokens each"
                )

    @property
    def cells(self) -> list[tuple[int, float]]:
        """Every length with every share, and with none."""
        shares = sorted({0.0, *self.shares})
        return [(length, share) for length in self.lengths for share in shares]

    @property
    def ticks(self) -> int:
        """How many measurements there are, warm-up included."""
        return WARMUP + self.repeat * len(self.cells)


def measure(backend: LocalBackend, base: CommunicatorSpec, grid: Grid, tick: Callable[[], None]) -> Scaling:
    """Time prompts of every length and share.

    Args:
        backend: the model.
        base: settings of the preset that places, such as the budget.
        grid: what is measured.
        tick: called after each measurement.
    """
    support, loaded = backend.engine.support, backend.engine.loaded
    assert isinstance(support.runner, ArenaRunner), "checked by the caller"
    rig, tokenizer = Rig(support.runner), backend.tokenizer
    sharing = make(base, support, loaded)
    dense = make(base.model_copy(update={"preset": "dense"}), support, loaded)
    for number in range(WARMUP):
        _shared(rig, sharing, tokenizer, f"warm-up {number}", number, (WARMUP_TOKENS, 0.5))
        tick()
    timed: dict[tuple[int, float], list[Timed]] = {cell: [] for cell in grid.cells}
    for number in range(grid.repeat):
        for order, cell in enumerate(grid.cells, WARMUP + number * len(grid.cells)):
            name = f"round {number}, {cell}"
            if cell[1]:
                timed[cell].append(_shared(rig, sharing, tokenizer, name, order, cell))
            else:
                timed[cell].append(rig.timed(dense, _call(tokenizer, name, order, cell, agent=2)))
            tick()
    token = support.runner.shape.bytes_per_token
    points = [_point(cell, column, timed[cell[0], 0.0], token) for cell, column in timed.items()]
    fit, fitted = fit_of(points)
    described = {"lengths": grid.lengths, "placed": grid.shares, "repeat": grid.repeat, "preset": base.preset}
    return Scaling(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        settings={**described, "threads": torch.get_num_threads()},
        points=tuple(p.model_copy(update={"fitted_ms": ms}) for p, ms in zip(points, fitted, strict=True)),
        fit=fit,
    )


def fit_of(points: Sequence[ScalingPoint]) -> tuple[Fit, list[float]]:
    """Least squares over some points: the fit, and the milliseconds that it gives each of them."""
    terms = [[1.0, p.computed, p.attended / 1e6, p.bytes_placed / 2**20] for p in points]
    matrix = torch.tensor(terms, dtype=torch.float64)
    times = torch.tensor([p.ttft_ms for p in points], dtype=torch.float64)
    scale = matrix.amax(dim=0).clamp(min=1e-12)
    found = torch.linalg.lstsq(matrix / scale, times[:, None], driver="gelsd").solution[:, 0] / scale
    fitted = matrix @ found
    off, spread = times - fitted, float((times - times.mean()).square().sum())
    base, token, pairs, mib = found.tolist()
    fit = Fit(
        base_ms=base,
        ms_per_token=token,
        ms_per_million_pairs=pairs,
        ms_per_mib=mib,
        r2=1 - float(off.square().sum()) / spread if spread else 1.0,
        worst=float((off.abs() / times).max()),
    )
    return fit, fitted.tolist()


def _shared(rig: Rig, preset: Preset, tokenizer: ChatTokenizer, run: str, order: int, cell: tuple[int, float]) -> Timed:
    """The second agent's call, behind the first one's, in a run of their own."""
    rig.timed(preset, _call(tokenizer, run, order, cell, agent=1))
    timed = rig.timed(preset, _call(tokenizer, run, order, cell, agent=2))
    preset.release(run)
    return timed


def _call(tokenizer: ChatTokenizer, run: str, order: int, cell: tuple[int, float], *, agent: int) -> Call:
    """A call of so many tokens, of which a share is text that both agents read; the first one reads nothing else."""
    length, share = cell
    block = round(share * length)
    content = Content("", ContentKind.INPUT, "text", english_tokens(tokenizer, run, block))
    rest = length - block - OWN if agent == 2 else LEAST - OWN
    segments = [Segment(FIXED, "", english_tokens(tokenizer, f"agent {agent}", OWN))]
    if block:
        segments.append(Segment("text", "", content.tokens or (), content))
    segments.append(Segment(FIXED, "", english_tokens(tokenizer, f"{run}, behind it", rest)))
    awaited = {content.origin: 1} if agent == 1 else {}
    # What a run sees is fixed, as in deterministic runs: so the block is placed whether or not that pays.
    reader = Reader(run, order, order - 1, f"agent.{agent}", awaited=awaited, seed=order)
    return Call(Prompt(tuple(segments), (), reader=reader), ())


def _point(cell: tuple[int, float], column: Sequence[Timed], dense: Sequence[Timed], token_bytes: int) -> ScalingPoint:
    composition, parts = column[-1].plan.composition, median_parts(column)
    ttft, whole = (statistics.median(one.ttft_ms for one in timed) for timed in (column, dense))
    computed = composition.computed
    return ScalingPoint(
        prompt_tokens=cell[0],
        share=cell[1],
        placed=composition.placed_tokens,
        computed=len(computed),
        attended=sum(position + 1 for position in computed),
        bytes_placed=composition.placed_tokens * token_bytes,
        ttft_ms=ttft,
        parts_ms=parts,
        speedup=whole / ttft,
        matching_share=sum(parts[name] for name in MATCHING) / whole,
        realigning_share=sum(parts[name] for name in REALIGNING) / whole,
        fitted_ms=0.0,
    )
