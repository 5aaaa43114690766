"""A decoding step recorded as CUDA graphs: each stretch between two attentions is launched at once.

On a CUDA device a step of few sequences waits for kernels to be launched, not for what they compute. What lies between
one attention and the next depends on tensors of fixed sizes alone, so it is recorded when a model is loaded, for some
numbers of rows, and replayed. Writing KV and attending, whose sizes change with every token, stay as they are.

A recording reads and writes the same memory each time: tokens, positions and what an attention saw are copied in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, final

import torch

from agentmesh.engine.batch import NextRows
from agentmesh.engine.operations import Mark
from agentmesh.engine.recognise import TOLERANCE, error_of
from agentmesh.engine.spans import Spans
from agentmesh.engine.step import Layer, Step, Stream, Turn, spread
from agentmesh.kv.arena import Arena

ROWS = (1, 2, 4, 8, 16, 32)
"""Numbers of rows that are recorded; steps are filled up to the next one, and larger ones are not replayed."""

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
    """The stretches of a step of so many rows, in order: to the first attention, between two, and to the logits.

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
        first = recorder.record(self._first)
        whole, cosines, sines, _ = first.results
        stream, turn = Stream(whole), (cosines, sines)
        pairs = zip(step.layers, step.layers[1:], strict=False)
        between = [recorder.record(partial(self._between, stream, turn, *pair)) for pair in pairs]
        self._stretches = [first, *between, recorder.record(partial(self._last, stream))]

    def play(self, number: int) -> torch.Tensor:
        """Replay one stretch: all heads ``[R, Hq + 2 H, D]`` of the layer ``number``, or logits ``[R, V]``."""
        stretch = self._stretches[number]
        stretch.replay()
        return stretch.results[-1]

    def _first(self) -> Tensors:
        stream, turn = self._step.begin(self.tokens, self.positions)
        return stream.whole, *turn, self._step.enter(self._step.layers[0], stream, turn, self._way)

    def _between(self, stream: Stream, turn: Turn, before: Layer, after: Layer) -> Tensors:
        self._step.leave(before, stream, self.seen, self._way)
        return (self._step.enter(after, stream, turn, self._way),)

    def _last(self, stream: Stream) -> Tensors:
        self._step.leave(self._step.layers[-1], stream, self.seen, self._way)
        return (self._step.end(stream.normed(self._step.last), self._way),)


@final
class RecordedStep:
    """The next token of some sequences, as ``Step``, replayed from a tape of at least so many rows.

    Args:
        step: what is recorded.
        recorder: records it.

    Raises:
        RuntimeError: it cannot be recorded.
    """

    @torch.inference_mode()
    def __init__(self, step: Step, recorder: Recorder) -> None:
        self.step = step
        self.shape = step.shape
        self._tapes = {rows: Tape(step, rows, recorder) for rows in ROWS}

    @torch.inference_mode()
    def run(
        self, arenas: Sequence[Arena], tokens: Sequence[int], positions: Sequence[int], spans: Spans
    ) -> torch.Tensor:
        """As ``Step.run``."""
        rows = next((rows for rows in ROWS if rows >= len(tokens)), None)
        if rows is None:
            return self.step.run(arenas, tokens, positions, spans)
        tape = self._tapes[rows]
        cached = NextRows(arenas, spans, tape.rows - len(tokens))
        with spans.mark(Mark.MODEL):
            tape.tokens.copy_(spread(tokens, cached.rows, tape.rows))
            tape.positions.copy_(spread(positions, cached.rows, tape.rows))
            for number, layer in enumerate(self.step.layers):
                heads = tape.play(number)
                cached.write(number, heads)
                seen = cached.attend(number, self.step.queries_of(heads), layer.window, layer.scale)
                tape.seen.copy_(seen.reshape(tape.seen.shape))
            return tape.play(len(self.step.layers))[cached.rows]


AnyStep = Step | RecordedStep


def recorded(model: Any, step: Step, recorder: Recorder) -> tuple[AnyStep, str]:
    """A step that is replayed, if it can be recorded and computes what the model computes.

    Args:
        model: the model that the step was read off.
        step: the step.
        recorder: records it.

    Returns:
        The step to use, and why it is not a recorded one; empty where it is.
    """
    try:
        replayed = RecordedStep(step, recorder)
        errors = {rows: error_of(model, replayed, rows) for rows in ROWS}
    except RuntimeError as problem:
        cause = problem.__context__ or problem  # what broke a recording off, not that it was broken off
        return step, f"it cannot be recorded: {str(cause).splitlines()[0]}"
    for rows, error in errors.items():
        if not error <= TOLERANCE[step.shape.dtype]:
            return step, f"replayed for {rows} sequences it differs from the model by {error:.1e}"
    return replayed, ""
