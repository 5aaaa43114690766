"""The engine: owns the model, runs prefills and decoding steps, one at a time, on a thread of its own.

The thread serves what comes in turn. A step decodes one token of every live sequence, in one pass over the weights, and
queues behind the prompts that came meanwhile, up to ``TURN_TOKENS`` of them; the others wait for the step, and so does
the rest of a long one. Requests that are over are let go before anything else. It knows token ids and KV. It knows no
agents, templates or stores: a ``Source`` says what to place and gets to see the arena when the prompt is in it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar, final

import torch
from transformers.cache_utils import Cache

from agentmesh.config.mesh import ModelSpec
from agentmesh.engine.admission import Admission, arena_of
from agentmesh.engine.embedded import Progress
from agentmesh.engine.forward import Prefill
from agentmesh.engine.generation import FirstTokenReport, Generation, Spent
from agentmesh.engine.loading import LoadedModel, fetch, load
from agentmesh.engine.operations import cost_of_noting
from agentmesh.engine.outbox import Outbox
from agentmesh.engine.probe import Support, probe
from agentmesh.engine.request import Request, Source
from agentmesh.engine.sampling import Sampler, Sampling
from agentmesh.engine.sequence import Sequence
from agentmesh.engine.spans import Limits, Part, Recorded, Spans
from agentmesh.engine.thread import ModelThread
from agentmesh.engine.tokenizer import HubTokenizer
from agentmesh.errors import RequestTooLongError

Result = TypeVar("Result")

BATCH = 32

TURN_TOKENS = 2048
"""Prompt tokens that may be computed before sequences that are live get their next token."""


@final
class Engine:
    """A loaded model at work. Use as a context manager, or call ``close``.

    Args:
        loaded: the model.
        support: what the probe found of it.
        batch: how many sequences may decode in one forward. The size of a batch decides the order of a matrix
            product's sums, so only with 1 a sequence's tokens do not depend on its neighbours in the last bit.
        thread: the one that loaded the model; see ``Engine.open``.

    Attributes:
        admission: who may begin, and what is live.
    """

    def __init__(
        self, loaded: LoadedModel, support: Support, batch: int = BATCH, thread: ModelThread | None = None
    ) -> None:
        self.loaded = loaded
        self.support = support
        self.tokenizer = HubTokenizer(loaded.tokenizer)
        suppressed = sorted(loaded.special_token_ids - loaded.stop_token_ids)
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=loaded.model.device)
        self._batch = batch
        self._live: list[Sequence] = []
        self.admission = Admission(support.runner)
        self._outbox = Outbox()
        self._leaving: deque[Request] = deque()
        self._computed = 0
        self._stepping = False
        self._paused: Request | None = None
        self._paused_at = 0.0
        self._closing = False
        self.spent = Spent()
        self.thread = ModelThread() if thread is None else thread

    @classmethod
    def open(cls, model: ModelSpec, progress: Progress | None = None, *, batch: int = BATCH) -> Engine:
        """Load a model on the thread that will run it.

        Args:
            model: which one.
            progress: told how far fetching and converting are.
            batch: how many sequences may decode in one forward.

        Raises:
            NotFoundError: no such model.
            ModelError: the weights cannot be fetched or read.
        """
        fetch(model, progress)
        thread = ModelThread()
        with ExitStack() as undo:
            undo.callback(thread.close, wait=False)
            loaded, support = thread.do(lambda: _loaded(model, progress, trials=batch > 1))
            undo.pop_all()
        return cls(loaded, support, batch, thread)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; waits for the forward that is running. What has begun and what waits then is cancelled."""
        self._closing = True
        self.thread.close()
        if self._paused is not None:
            self._paused.first.set_exception(CancelledError())
        for request in self.admission.waiting:
            request.wake()

    @property
    def spans(self) -> Spans:
        """Where its thread spends its time; notes nothing unless a profile is on."""
        return self.support.runner.spans

    def begin_profile(self, limits: Limits | None = None) -> None:
        """Note from now on where the thread spends its time; called on another thread."""
        device = self.loaded.model.device
        noting = cost_of_noting(device)  # here: torch's profiler wants to be used first where the program began
        self.thread.do(lambda: self.spans.begin(device, noting, limits or Limits()))

    def end_profile(self) -> Recorded:
        """What was noted since ``begin_profile``; called on another thread."""
        return self.thread.do(self.spans.end)

    def check(self, prompt_tokens: int) -> None:
        """Refuse a prompt that can never run.

        Raises:
            RequestTooLongError: it leaves no room for one generated token.
        """
        context = self.loaded.max_context
        if prompt_tokens + 1 > context:
            raise RequestTooLongError(
                f"the prompt has {prompt_tokens:,} tokens, but {self.loaded.name} reads at most {context - 1:,} and "
                "writes at least one. Shorten the inputs, the roles' texts or the messages (generate.max_tokens)"
            )

    async def generate(
        self,
        source: Source,
        prompt_tokens: int,
        sampling: Sampling,
        on_first: Callable[[FirstTokenReport], None],
        on_text: Callable[[str], None] | None,
    ) -> Generation:
        """Prefill a prompt and decode until it stops. Cancelling frees the sequence at once.

        Where memory is short it waits for others to end, in the order of arrival.

        Args:
            source: composes the prompt.
            prompt_tokens: its length.
            sampling: how to decode.
            on_first: called when the first token is out.
            on_text: called with every piece of text; ``None`` where nobody wants them.

        Raises:
            RequestTooLongError: the prompt does not fit the model's context, or can never fit the budget.
        """
        self.check(prompt_tokens)
        arrived = time.perf_counter()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: str | None) -> None:
            if piece is None or on_text is not None:
                self._outbox.add(loop, partial(pieces.put_nowait, piece))

        def wake(turn: asyncio.Event) -> None:
            self._outbox.add(loop, turn.set)

        capacity = min(prompt_tokens + sampling.max_tokens, self.loaded.max_context)
        request = Request(source, prompt_tokens, capacity, sampling, tell, wake, arrived)
        try:
            while not await self._on_thread(lambda: self._start(request)):
                await request.turn.wait()
                request.turn.clear()
                if self._closing:
                    raise asyncio.CancelledError
            first = await asyncio.wrap_future(request.first)
            sequence = request.begun
            report = FirstTokenReport(queue_ms=request.waited * 1e3, ttft_ms=(first - arrived) * 1e3)
            on_first(report)
            while (piece := await pieces.get()) is not None and on_text is not None:
                on_text(piece)
            await asyncio.wrap_future(sequence.done)
            learn_ms = await self._on_thread(lambda: self._finish(source, sequence))
        finally:
            self._leaving.append(request)
            with suppress(RuntimeError):  # a closed engine holds nothing any more
                self.thread.submit(self._sweep)
        text, tokens = self.tokenizer.decode(sequence.tokens), tuple(sequence.tokens)
        decode_ms = (sequence.ended - first) * 1e3
        return Generation(tokens, text, sequence.finish, report.queue_ms, report.ttft_ms, decode_ms, learn_ms)

    async def do(self, work: Callable[[], Result]) -> Result:
        """Run something on the engine's thread, between its forwards; it runs even if nobody waits for it any more."""

        def noted() -> Result:
            with self.spans.part(Part.RUNS):
                return work()

        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self.thread.executor, noted))

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.thread.executor, work)

    def _start(self, request: Request) -> bool:
        """Begin a request, unless it has to wait until it is told that it is its turn.

        The prompt's KV is kept before any other request can begin: siblings that read the same new text wait for
        one prefill of it, not for its message.
        """
        self._sweep()
        if request.gone:
            return False
        with self.spans.part(Part.ADMIT):
            if self._paused is not None or self._others_first:
                self.admission.postpone(request)
                return False
            if not self.admission.admit(request):
                return False
            request.waited = time.perf_counter() - request.arrived
            self.spans.waited(request.waited)
            begun, cache = time.perf_counter(), self.admission.open(request)
            with self.spans.part(Part.PLAN):
                composition, parts = request.source.compose()
            request.prefill = self.support.runner.begin(cache, composition, parts)
            request.source.placed()
            self.spent.prefill_s += time.perf_counter() - begun
            self._go_on_with(request, request.prefill)
            return True

    @property
    def _others_first(self) -> bool:
        """Whether live sequences get their next token before more of any prompt is computed."""
        return bool(self._live) and self._computed >= TURN_TOKENS

    def _go_on_with(self, request: Request, prefill: Prefill) -> None:
        """Compute a prompt, to its first token or until a step is due; then it goes on behind the step."""
        begun = time.perf_counter()
        self._computed += prefill.go_on()
        while not prefill.done:
            if self._others_first or self._closing or request in self._leaving:
                self._paused, self._paused_at = request, time.perf_counter()
                self.spent.prefill_s += self._paused_at - begun
                return
            self._computed += prefill.go_on()
        self._begin(request, prefill)
        first = time.perf_counter()
        self.spent.prefill_s += first - begun
        self._keep(request.source, prefill.cache)
        if not request.begun.finish:
            self._live.append(request.begun)
            self._go_on()
        request.first.set_result(first)

    def _resume(self, request: Request) -> None:
        """Go on with the prompt that has made way for a step; who came meanwhile goes behind it."""
        self._sweep()
        if self._paused is not request or request.prefill is None:
            return
        self._paused = None
        request.waited += time.perf_counter() - self._paused_at
        with self.spans.part(Part.ADMIT):
            try:
                self._go_on_with(request, request.prefill)
            finally:
                if self._paused is None:
                    self.admission.wake()

    def _begin(self, request: Request, prefill: Prefill) -> None:
        """Begin a request's sequence with its first token."""
        with self.spans.part(Part.FIRST):
            sampling, logits = request.sampling, prefill.logits
            sampler, text = Sampler(sampling, self._suppressed), self.tokenizer.stream()
            sequence = Sequence(prefill.cache, request.tokens, logits, sampler, text, sampling, request.tell)
            sequence.done.add_done_callback(request.over)
            request.sequence = sequence
            sequence.accept(logits, self.loaded.stop_token_ids, self.loaded.max_context)

    def _keep(self, source: Source, cache: Cache) -> None:
        """Let the source look at the prompt's KV."""
        arena, begun = arena_of(cache), time.perf_counter()
        if arena is not None:
            with self.spans.part(Part.KEEP):
                source.prefilled(arena)
            self.spent.keep_s += time.perf_counter() - begun

    def _go_on(self) -> None:
        """See to it that the live sequences get their next token, after whatever has begun to wait for the thread."""
        if self._live and not self._stepping:
            self._stepping = True
            self.thread.submit(self._step).add_done_callback(self._stepped)

    def _step(self) -> None:
        """The next token of every live sequence, as many at once as may be."""
        self._sweep()
        begun = time.perf_counter()
        self.spent.decoded += len(self._live)
        with self.spans.part(Part.STEP), self._outbox.gathering():
            order = self.support.runner.side_by_side([sequence.cache for sequence in self._live])
            self._live = [self._live[index] for index in order]
            for low in range(0, len(self._live), self._batch):
                self._next(self._live[low : low + self._batch])
            self._live = [sequence for sequence in self._live if not sequence.finish]
        self.spent.decode_s += time.perf_counter() - begun
        postponed, self._computed = self._computed >= TURN_TOKENS, 0
        if postponed and self._paused is None:
            self.admission.wake()

    def _next(self, group: list[Sequence]) -> None:
        """The next token of some sequences, in one forward."""
        with self.spans.forward(Part.DECODE, len(group)), self.spans.part(Part.DECODE):
            logits = self.support.runner.decode(
                [sequence.cache for sequence in group],
                [sequence.tokens[-1] for sequence in group],
                [sequence.length for sequence in group],
            )
        with self.spans.part(Part.SAMPLE):
            for sequence, row in zip(group, logits, strict=True):
                sequence.length += 1
                sequence.accept(row, self.loaded.stop_token_ids, self.loaded.max_context)

    def _stepped(self, step: Future[None]) -> None:
        """Go on after a step; if it failed, so did every sequence that was in it."""
        self._stepping = False
        paused = self._paused
        if paused is not None and not self._closing:
            self.thread.submit(partial(self._resume, paused)).add_done_callback(partial(_pass_on, paused))
        error = CancelledError() if self._closing or step.cancelled() else step.exception()
        if error is not None:
            failed, self._live = self._live, []
            for sequence in failed:
                if not sequence.done.done():
                    sequence.done.set_exception(error)
        self._go_on()

    def _sweep(self) -> None:
        """Let go of requests that are over, before anything else is done: sources, sequences, arenas."""
        while self._leaving:
            with self.spans.part(Part.KEEP):
                request = self._leaving.popleft()
                request.source.closed()
                if self._paused is request:
                    self._paused = None
                self._live = [sequence for sequence in self._live if sequence is not request.sequence]
                self.admission.close(request)

    def _finish(self, source: Source, sequence: Sequence) -> float:
        """Let the source look at the whole sequence; the milliseconds that takes."""
        begun = time.perf_counter()
        arena = arena_of(sequence.cache)
        if arena is not None:
            with self.spans.part(Part.KEEP):
                source.finished(arena, tuple(sequence.tokens), sequence.first_logits)
        took = time.perf_counter() - begun
        self.spent.keep_s += took
        return took * 1e3


def _pass_on(request: Request, work: Future[None]) -> None:
    """If going on with a prompt failed, so did its request."""
    error = None if work.cancelled() else work.exception()
    if error is not None:
        request.first.set_exception(error)


def _loaded(model: ModelSpec, progress: Progress | None, *, trials: bool) -> tuple[LoadedModel, Support]:
    """A model, and what it supports."""
    loaded = load(model, progress, trials=trials)
    return loaded, probe(loaded.model, loaded.step)
