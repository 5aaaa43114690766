"""Few rows recorded as CUDA graphs: each stretch of a forward between two attentions is launched at once.

On a CUDA device a decoding step, or the few tokens that are computed between what is placed, wait for kernels to be
launched, not for what they compute. What lies between one attention and the next depends on tensors of fixed sizes
alone, so it is recorded when a model is loaded, for some numbers of rows, and replayed. Writing KV and attending, whose
sizes change with every token, stay as they are.

A recording reads and writes the same memory each time: tokens, positions and what an attention saw are copied in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, final

import torch

from agentmesh.engine.batch import NextRows
from agentmesh.engine.copies import COPIES
from agentmesh.engine.operations import Mark
from agentmesh.engine.recognise import TOLERANCE, Own, error_of, own, relative, trial_text
from agentmesh.engine.scattered import ScatteredRows
from agentmesh.engine.spans import Spans
from agentmesh.engine.step import Layer, Step, Stream, Turn, spread
from agentmesh.kv.arena import Arena

STEPS = (1, 2, 4, 8, 16, 32)
"""Numbers of rows that are tried as decoding steps of as many sequences before they are used."""

ROWS = (*STEPS, 64, 128, 256, 384, 512, 768, 1024)
"""Numbers of rows that are recorded; what has fewer is filled up to the next one, and more are not replayed."""

AS_OWN = 3.0
"""How many times as far as a model's own logits move what is replayed may be from them."""

AnyRows = NextRows | ScatteredRows
Tensors = tuple[torch.Tensor, ...]
Work = Callable[[], Tensors]


@dataclass(frozen=True)
class Recording:
    """Operations that can run again.

    Args:
        results: the tensors that they write, the same ones each time.
        replay: runs them again over what their inputs hold by then.
    """

    results: Tensors
    replay: Callable[[], None]


class Recorder(Protocol):
    """Records operations. Recordings are replayed in the order in which they were made, one at a time."""

    def record(self, work: Work) -> Recording:
        """Record what ``work`` does. It may do so several times, so it must not depend on what it did before.

        Raises:
            RuntimeError: some of its operations cannot be recorded.
        """


@final
class CUDAGraphs:
    """Records on a CUDA device. What recordings need meanwhile is memory that they share.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch types it not
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Recording:
        """As in ``Recorder``; no other thread may wait for the device meanwhile."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()  # what libraries set up when they are first called cannot be recorded
            graph.capture_begin(self._memory, capture_error_mode="thread_local")
            try:
                results = work()
            finally:
                graph.capture_end()
        here.wait_stream(self._stream)
        return Recording(results, graph.replay)


@final
class Tape:
    """The stretches of a forward of so many rows, in order: to the first attention, between two, and to the last norm.

    Args:
        step: what is recorded.
        rows: of the step; filled up where its products want more.
        recorder: records it.

    Attributes:
        rows: how many there are.
        tokens, positions: ``[R]``, read by the first stretch.
        seen: ``[R, Hq D]``, read by the others.
    """

    def __init__(self, step: Step, rows: int, recorder: Recorder) -> None:
        self._step, self._way = step, step.tuning.way(rows)
        self.rows = step.head.full(rows, self._way)
        shape = step.shape
        self.tokens, self.positions = torch.zeros(2, self.rows, dtype=torch.long, device=shape.device)
        self.seen = torch.zeros(self.rows, step.queries * shape.head_dim, dtype=shape.dtype, device=shape.device)
        self._heads = self.seen.new_zeros(self.rows, step.queries + 2 * shape.heads, shape.head_dim)
        first = recorder.record(self._first)
        whole, cosines, sines, _ = first.results
        stream, turn = Stream(whole), (cosines, sines)
        pairs = zip(step.layers, step.layers[1:], strict=False)
        between = [recorder.record(partial(self._between, stream, turn, *pair)) for pair in pairs]
        self._stretches = [first, *between, recorder.record(partial(self._last, stream))]

    def play(self, number: int) -> torch.Tensor:
        """Replay one stretch: all heads ``[R, Hq + 2 H, D]`` of the layer ``number``, or behind them normed rows."""
        stretch = self._stretches[number]
        stretch.replay()
        return stretch.results[-1]

    def _first(self) -> Tensors:
        stream, turn = self._step.begin(self.tokens, self.positions)
        return stream.whole, *turn, self._enter(self._step.layers[0], stream, turn)

    def _between(self, stream: Stream, turn: Turn, before: Layer, after: Layer) -> Tensors:
        self._step.leave(before, stream, self.seen, self._way)
        return (self._enter(after, stream, turn),)

    def _enter(self, layer: Layer, stream: Stream, turn: Turn) -> torch.Tensor:
        """All heads of a layer, in the memory that every layer uses: what an attention has seen is not needed again."""
        return self._heads.copy_(self._step.enter(layer, stream, turn, self._way))

    def _last(self, stream: Stream) -> Tensors:
        self._step.leave(self._step.layers[-1], stream, self.seen, self._way)
        return (stream.normed(self._step.last),)


@final
class RecordedStep:
    """Few rows, replayed from a tape of at least so many: the next token of some sequences, as ``Step``, or a prompt's.

    Args:
        step: what is recorded.
        recorder: records it.
        sizes: numbers of rows to record, ascending.

    Attributes:
        sizes: numbers of rows that are recorded, ascending.
        most: how many tokens ``compute`` takes: none where a step multiplies with copies of the weights, which prompts
            do not.

    Raises:
        RuntimeError: it cannot be recorded.
    """

    @torch.inference_mode()
    def __init__(self, step: Step, recorder: Recorder, sizes: Sequence[int] = ROWS) -> None:
        self.step = step
        self.shape = step.shape
        self.sizes = tuple(sizes)
        self.most = 0 if step.tuning.decode in COPIES else sizes[-1]
        self._tapes = {rows: Tape(step, rows, recorder) for rows in sizes}

    @torch.inference_mode()
    def run(
        self, arenas: Sequence[Arena], tokens: Sequence[int], positions: Sequence[int], spans: Spans
    ) -> torch.Tensor:
        """As ``Step.run``."""
        tape = self._tape(len(tokens))
        if tape is None:
            return self.step.run(arenas, tokens, positions, spans)
        cached = NextRows(arenas, spans, tape.rows - len(tokens))
        with spans.mark(Mark.MODEL):
            return self.step.end(self._play(tape, tokens, positions, cached))

    @torch.inference_mode()
    def compute(
        self, arena: Arena, tokens: Sequence[int], positions: Sequence[int], spans: Spans, keep: int
    ) -> torch.Tensor:
        """Compute tokens of one prompt, each over what the arena holds up to its position, and write their KV.

        Args:
            arena: aimed at their rows.
            tokens: at most ``most``.
            positions: where they stand, ascending.
            spans: notes where the time goes.
            keep: of how many of the last ones logits are wanted.

        Returns:
            Logits ``[keep, V]``.
        """
        tape = self._tape(len(tokens))
        assert tape is not None, f"{len(tokens)} tokens, at most {self.most} are replayed"
        cached = ScatteredRows(arena, positions, self.step.queries // self.shape.heads, spans)
        with spans.mark(Mark.MODEL):
            return self.step.end(self._play(tape, tokens, positions, cached)[-keep:])

    def _tape(self, count: int) -> Tape | None:
        """The smallest one of at least so many rows."""
        return next((tape for rows, tape in self._tapes.items() if rows >= count), None)

    def _play(self, tape: Tape, tokens: Sequence[int], positions: Sequence[int], cached: AnyRows) -> torch.Tensor:
        """Replay a whole forward, to the normed rows ``[T, N]`` of its tokens."""
        tape.tokens.copy_(spread(tokens, cached.rows, tape.rows))
        tape.positions.copy_(spread(positions, cached.rows, tape.rows))
        for number, layer in enumerate(self.step.layers):
            heads = tape.play(number)
            cached.write(number, heads)
            seen = cached.attend(number, self.step.queries_of(heads), layer.window, layer.scale)
            tape.seen[: len(seen)].copy_(seen.reshape(len(seen), -1))
        return tape.play(len(self.step.layers))[cached.rows]


AnyStep = Step | RecordedStep


def recorded(model: Any, step: Step, recorder: Recorder, sizes: Sequence[int] = ROWS) -> tuple[AnyStep, str]:
    """A step that is replayed, if it can be recorded and computes what the model computes.

    Args:
        model: the model that the step was read off.
        step: the step.
        recorder: records it.
        sizes: numbers of rows to record, ascending.

    Returns:
        The step to use, and why it is not a recorded one; empty where it is.
    """
    try:
        replayed = RecordedStep(step, recorder, sizes)
        errors = [(rows, error_of(model, replayed, rows)) for rows in sizes if rows <= STEPS[-1]]
        errors += [(rows, prompt_error(model, replayed, rows)) for rows in sizes if 1 < rows <= replayed.most]
    except RuntimeError as problem:
        said = str(problem.__context__ or problem)  # what broke a recording off, not that it was broken off
        return step, f"it cannot be recorded: {said.splitlines()[0]}"
    for rows, error in errors:
        if not error <= TOLERANCE[step.shape.dtype]:
            return step, f"replayed for {rows} rows it differs from the model by {error:.1e}"
    return replayed, ""


@torch.inference_mode()
def prompt_error(model: Any, replayed: RecordedStep, rows: int) -> float:
    """Largest relative error to a model's own logits and KV behind, and between, placed tokens of a prompt.

    In half precision a deep model's own logits move by more than ``TOLERANCE`` when it computes the same prompt in two
    forwards instead of one. Where they do, that is the measure.

    Args:
        model: the model.
        replayed: computes the other tokens.
        rows: how many these are.

    Returns:
        Not a number where some logits or KV are none.
    """
    shape, text = replayed.shape, trial_text(model, 2 * rows - 1)
    wanted, again = own(model, shape, text), own(model, shape, text, cut=rows)
    moved = torch.tensor([relative(again.logits, wanted.logits), relative(again.kv, wanted.kv)])
    behind, between = range(rows - 1, 2 * rows - 1), range(0, 2 * rows - 1, 2)
    found = torch.tensor([_errors(replayed, text, positions, wanted) for positions in (behind, between)])
    return float((found / (AS_OWN * moved / TOLERANCE[shape.dtype]).clamp_min(1.0)).max())


def _errors(replayed: RecordedStep, text: Sequence[int], positions: range, wanted: Own) -> tuple[float, float]:
    """Relative errors of logits and KV where a text is replayed at some positions, and placed at the others."""
    arena = Arena(replayed.shape, len(text))
    arena.both.copy_(wanted.kv)
    rows = torch.tensor(positions, device=arena.shape.device)
    arena.both.index_fill_(3, rows, 0.0)
    arena.aim(rows, len(text))
    logits = replayed.compute(arena, [text[position] for position in positions], positions, Spans(), keep=1)
    return relative(logits[-1], wanted.logits), relative(arena.both, wanted.kv)
