"""What a model's thread does in turn: prompts, steps, and letting go of requests that are over.

A step decodes one token of every live sequence, in one pass over the weights, and queues behind the prompts that came
meanwhile, for ``TURN_TOKENS`` or ``TURN_S`` and the forward that reaches them; the others wait for the step, and so
does the rest of a long one. Calls are checked a forward at a time. Requests that are over are let go before anything
else.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from transformers.cache_utils import Cache

from agentmesh.engine.admission import Admission, arena_of
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.generation import Spent
from agentmesh.engine.loading import LoadedModel
from agentmesh.engine.outbox import Outbox
from agentmesh.engine.prefill import Prefill
from agentmesh.engine.probe import Support
from agentmesh.engine.request import Request, Source
from agentmesh.engine.sampling import Sampler
from agentmesh.engine.sequence import Sequence
from agentmesh.engine.slices import Result, Slices, advance
from agentmesh.engine.spans import Part
from agentmesh.engine.thread import ModelThread
from agentmesh.engine.tokenizer import HubTokenizer
from agentmesh.errors import ModelError

TURN_TOKENS, TURN_S = 2048, 2.0
"""Prompt tokens that may be computed, and seconds of work, before sequences that are live get their next token."""


@dataclass
class SinceStep:
    """What the thread has done since the last step: computed tokens of prompts, and seconds of all work."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def enough(self) -> bool:
        """Whether others have waited enough; deep in a long prompt a forward takes several times as long as ahead."""
        return self.tokens >= TURN_TOKENS or self.seconds >= TURN_S


@final
class EngineCore:
    """Who computes next on a model's thread. Used on that thread, but for ``leave`` and ``close``.

    Args:
        loaded: the model.
        support: what the probe found of it.
        tokenizer: the model's.
        batch: how many sequences may decode in one forward.
        thread: the model's.

    Attributes:
        admission: who may begin, and what holds memory.
        live: sequences that get their next token in each step.
        outbox: what event loops are told.
        spent: where the time went.
        closing: whether nothing more will be done.
    """

    def __init__(
        self, loaded: LoadedModel, support: Support, tokenizer: HubTokenizer, batch: int, thread: ModelThread
    ) -> None:
        self.admission = Admission(support.runner)
        self.live: list[Sequence] = []
        self.outbox = Outbox()
        self.spent = Spent()
        self.closing = False
        self._loaded = loaded
        self._runner = support.runner
        self._spans = support.runner.spans
        self._tokenizer = tokenizer
        suppressed = sorted(loaded.special_token_ids - loaded.stop_token_ids)
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=loaded.model.device)
        self._batch = batch
        self._thread = thread
        self._leaving: deque[Request] = deque()
        self._since = SinceStep()
        self._stepping = False
        self._paused: Request | None = None
        self._paused_at = 0.0

    def close(self) -> None:
        """Stop the thread; waits for the forward that is running. What has begun and what waits then is cancelled."""
        self.closing = True
        self._thread.close()
        if self._paused is not None:
            self._paused.first.set_exception(CancelledError())
        for request in self.admission.waiting:
            request.wake()

    def leave(self, request: Request) -> None:
        """A request is over, whatever happened: let go of it before anything else is done. Called on any thread."""
        self._leaving.append(request)
        with suppress(RuntimeError):  # a closed thread holds nothing any more
            self._thread.submit(self._sweep)

    def start(self, request: Request) -> bool:
        """Begin a request, unless it has to wait until it is told that it is its turn.

        The prompt's KV is kept before any other request can begin: siblings that read the same new text wait for
        one prefill of it, not for its message.
        """
        self._sweep()
        if request.gone:
            return False
        with self._spans.part(Part.ADMIT):
            if self._paused is not None or self._others_first:
                self.admission.postpone(request)
                return False
            if not self.admission.admit(request):
                return False
            request.waited = time.perf_counter() - request.arrived
            self._spans.waited(request.waited)
            begun = time.perf_counter()
            request.prefill = self._placed(request.source, self.admission.open(request))
            took = time.perf_counter() - begun
            self.spent.prefill_s += took
            self._since.seconds += took
            self._go_on_with(request, request.prefill)
            return True

    def _placed(self, source: Source, cache: Cache) -> Prefill:
        """Plan a prompt and copy what is placed into its cache; behind this nothing here holds the KV it came from."""
        with self._spans.part(Part.PLAN):
            composition, parts = source.compose()
        prefill = self._runner.begin(cache, composition, parts)
        source.placed()
        return prefill

    @property
    def _others_first(self) -> bool:
        """Whether live sequences get their next token before more of any prompt is computed."""
        return bool(self.live) and self._since.enough

    def _go_on_with(self, request: Request, prefill: Prefill) -> None:
        """Compute a prompt, to its first token or until a step is due; then it goes on behind the step."""
        begun = time.perf_counter()
        self._compute(prefill)
        while not prefill.done:
            if self._others_first or self.closing or request in self._leaving:
                self._paused, self._paused_at = request, time.perf_counter()
                self.spent.prefill_s += self._paused_at - begun
                return
            self._compute(prefill)
        self._begin(request, prefill)
        first = time.perf_counter()
        self.spent.prefill_s += first - begun
        self._keep(request.source, prefill.cache)
        if not request.begun.finish:
            self.live.append(request.begun)
            self._go_on()
        request.first.set_result(first)

    def _compute(self, prefill: Prefill) -> None:
        """Run the next forward of a prompt."""
        begun = time.perf_counter()
        self._since.tokens += prefill.go_on()
        self._since.seconds += time.perf_counter() - begun

    def _resume(self, request: Request) -> None:
        """Go on with the prompt that has made way for a step; who came meanwhile goes behind it."""
        self._sweep()
        if self._paused is not request or request.prefill is None:
            return
        self._paused = None
        request.waited += time.perf_counter() - self._paused_at
        with self._spans.part(Part.ADMIT):
            try:
                self._go_on_with(request, request.prefill)
            finally:
                if self._paused is None:
                    self.admission.wake()

    def _begin(self, request: Request, prefill: Prefill) -> None:
        """Begin a request's sequence with its first token."""
        with self._spans.part(Part.FIRST):
            sampling, logits = request.sampling, prefill.logits
            sampler, text = Sampler(sampling, self._suppressed), self._tokenizer.stream()
            sequence = Sequence(prefill.cache, request.tokens, logits, sampler, text, sampling, request.tell)
            sequence.done.add_done_callback(request.over)
            request.sequence = sequence
            sequence.accept(logits, self._loaded.stop_token_ids, self._loaded.max_context)

    def _keep(self, source: Source, cache: Cache) -> None:
        """Let the source look at the prompt's KV."""
        arena, begun = arena_of(cache), time.perf_counter()
        if arena is not None:
            with self._spans.part(Part.KEEP):
                source.prefilled(arena)
            took = time.perf_counter() - begun
            self.spent.keep_s += took
            self._since.seconds += took

    def _go_on(self) -> None:
        """See to it that the live sequences get their next token, after whatever has begun to wait for the thread."""
        if self.live and not self._stepping:
            self._stepping = True
            step: Future[None] = Future()
            try:
                step = self._thread.submit(self._step)
            except RuntimeError:  # the thread was closed while it computed the prompt
                step.cancel()
            step.add_done_callback(self._stepped)

    def _step(self) -> None:
        """The next token of every live sequence, as many at once as may be."""
        self._sweep()
        begun = time.perf_counter()
        self.spent.decoded += len(self.live)
        with self._spans.part(Part.STEP), self.outbox.gathering():
            order = self._runner.side_by_side([sequence.cache for sequence in self.live])
            self.live = [self.live[index] for index in order]
            for low in range(0, len(self.live), self._batch):
                self._next(self.live[low : low + self._batch])
            self.live = [sequence for sequence in self.live if not sequence.finish]
        self.spent.decode_s += time.perf_counter() - begun
        postponed, self._since = self._since.enough, SinceStep()
        if postponed and self._paused is None:
            self.admission.wake()

    def _next(self, group: list[Sequence]) -> None:
        """The next token of some sequences, in one forward."""
        with self._spans.forward(Part.DECODE, len(group)), self._spans.part(Part.DECODE):
            logits = self._runner.decode(
                [sequence.cache for sequence in group],
                [sequence.tokens[-1] for sequence in group],
                [sequence.length for sequence in group],
            )
        with self._spans.part(Part.SAMPLE):
            for sequence, row in zip(group, logits, strict=True):
                sequence.length += 1
                try:
                    sequence.accept(row, self._loaded.stop_token_ids, self._loaded.max_context)
                except ModelError as error:
                    sequence.fail(error)

    def _stepped(self, step: Future[None]) -> None:
        """Go on after a step; if it failed, so did every sequence that was in it."""
        self._stepping = False
        paused = self._paused
        if paused is not None and not self.closing:
            with suppress(RuntimeError):  # the thread was closed meanwhile, and cancels what waits
                self._thread.submit(partial(self._resume, paused)).add_done_callback(partial(_pass_on, paused))
        error = CancelledError() if self.closing or step.cancelled() else step.exception()
        if error is not None:
            failed, self.live = self.live, []
            for sequence in failed:
                if not sequence.done.done():
                    sequence.done.set_exception(error)
        self._go_on()

    def _sweep(self) -> None:
        """Let go of requests that are over, before anything else is done: sources, sequences, arenas."""
        while self._leaving:
            with self._spans.part(Part.KEEP):
                request = self._leaving.popleft()
                if request.checking is not None:
                    request.checking.close()
                request.source.closed()
                if self._paused is request:
                    self._paused = None
                self.live = [sequence for sequence in self.live if sequence is not request.sequence]
                self.admission.close(request)

    def advance(self, work: Slices[Result]) -> tuple[Result, ...]:
        """The next slice of long work beside requests; as long as that is under way none of them counts as alone."""
        self.admission.beside.add(work)
        if self._others_first:
            return ()
        begun = time.perf_counter()
        given = advance(work)
        self._since.seconds += time.perf_counter() - begun
        if given:
            self.end(work)
        return given

    def end(self, work: Slices[Any]) -> None:
        """Long work is over, or nobody waits for it any more."""
        work.close()
        if work in self.admission.beside:
            self.admission.beside.remove(work)
            self.admission.wake()

    def finish(self, request: Request) -> bool:
        """Let the source look at the whole sequence, and check the call until others get their turn; whether it has."""
        cache, begun = request.cache, time.perf_counter()
        if not isinstance(cache, ArenaCache):
            return True
        if request.checking is not None and self._others_first:
            return False
        with self._spans.part(Part.KEEP):
            if request.checking is None:
                sequence = request.begun
                request.source.finished(cache.arena, tuple(sequence.tokens))
                request.checking = request.source.checked(cache, sequence.first_logits)
            over = bool(advance(request.checking))
        took = time.perf_counter() - begun
        request.learn_s += took
        self.spent.keep_s += took
        self._since.seconds += took
        return over


def _pass_on(request: Request, work: Future[None]) -> None:
    """If going on with a prompt failed, so did its request."""
    error = None if work.cancelled() else work.exception()
    if error is not None:
        request.first.set_exception(error)
