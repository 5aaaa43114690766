"""The engine: owns a model and its thread, and serves any number of event loops.

Prefills and decoding steps run one at a time on the thread (``engine/core.py``). The engine knows token ids and KV. It
knows no agents, templates or stores: a ``Source`` says what to place and sees the arena when the prompt is in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar, final

from agentmesh.config.mesh import ModelSpec
from agentmesh.engine.core import EngineCore
from agentmesh.engine.embedded import Progress
from agentmesh.engine.generation import FirstTokenReport, Generation
from agentmesh.engine.loading import LoadedModel, fetch, load
from agentmesh.engine.operations import cost_of_noting
from agentmesh.engine.probe import Support, probe
from agentmesh.engine.request import Request, Source
from agentmesh.engine.sampling import Sampling
from agentmesh.engine.slices import Slices
from agentmesh.engine.spans import Limits, Part, Recorded, Spans
from agentmesh.engine.thread import ModelThread
from agentmesh.engine.tokenizer import HubTokenizer
from agentmesh.errors import RequestTooLongError

Result = TypeVar("Result")

BATCH = 32


def at_once(*, deterministic: bool) -> int:
    """How many sequences may decode in one forward: each alone where none may depend on its neighbours."""
    return 1 if deterministic else BATCH


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
        batch: as given.
        core: what its thread does.
    """

    def __init__(
        self, loaded: LoadedModel, support: Support, batch: int = BATCH, thread: ModelThread | None = None
    ) -> None:
        self.loaded = loaded
        self.support = support
        self.batch = batch
        self.tokenizer = HubTokenizer(loaded.tokenizer)
        self.thread = ModelThread() if thread is None else thread
        self.core = EngineCore(loaded, support, self.tokenizer, batch, self.thread)
        self._users = 0

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

    def join(self) -> None:
        """One more backend works with it."""
        self._users += 1

    def leave(self) -> None:
        """One backend less; with the last one it closes."""
        self._users -= 1
        if not self._users:
            self.close()

    def close(self) -> None:
        """Stop the thread; waits for the forward that is running. What has begun and what waits then is cancelled."""
        self.core.close()

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
                self.core.outbox.add(loop, partial(pieces.put_nowait, piece))

        def wake(turn: asyncio.Event) -> None:
            self.core.outbox.add(loop, turn.set)

        capacity = min(prompt_tokens + sampling.max_tokens, self.loaded.max_context)
        request = Request(source, prompt_tokens, capacity, sampling, tell, wake, arrived)
        try:
            while not await self._on_thread(lambda: self.core.start(request)):
                await request.turn.wait()
                request.turn.clear()
                if self.core.closing:
                    raise asyncio.CancelledError
            first = await asyncio.wrap_future(request.first)
            sequence = request.begun
            report = FirstTokenReport(queue_ms=request.waited * 1e3, ttft_ms=(first - arrived) * 1e3)
            on_first(report)
            while (piece := await pieces.get()) is not None and on_text is not None:
                on_text(piece)
            await asyncio.wrap_future(sequence.done)
            while not await self._on_thread(lambda: self.core.finish(request)):
                pass
        finally:
            self.core.leave(request)
        text, tokens = self.tokenizer.decode(sequence.tokens), tuple(sequence.tokens)
        decode_ms = (sequence.ended - first) * 1e3
        learn_ms = request.learn_s * 1e3
        return Generation(tokens, text, sequence.finish, report.queue_ms, report.ttft_ms, decode_ms, learn_ms)

    async def do(self, work: Callable[[], Result]) -> Result:
        """Run something on the engine's thread, between its forwards; it runs even if nobody waits for it any more."""

        def noted() -> Result:
            with self.spans.part(Part.RUNS):
                return work()

        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self.thread.executor, noted))

    async def in_slices(self, work: Slices[Result]) -> Result:
        """Run long work on the engine's thread, which others have between two slices; it ends where nobody waits."""
        try:
            while not (result := await self.do(partial(self.core.advance, work))):
                pass
            return result[0]
        finally:
            with suppress(RuntimeError):  # a closed thread runs nothing any more
                self.thread.submit(partial(self.core.end, work))

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        """Do something when its turn comes; cancelled where the engine was closed before that."""
        try:
            result = asyncio.get_running_loop().run_in_executor(self.thread.executor, work)
        except RuntimeError as error:
            if self.core.closing:
                raise asyncio.CancelledError from error
            raise
        return await result


def _loaded(model: ModelSpec, progress: Progress | None, *, trials: bool) -> tuple[LoadedModel, Support]:
    """A model, and what it supports."""
    loaded = load(model, progress, trials=trials)
    return loaded, probe(loaded.model, loaded.step)
