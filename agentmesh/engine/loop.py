"""The engine: owns the model, runs prefills and decoding steps, one at a time, on a thread of its own.

Every live sequence asks for one step after another; the thread serves them in turn, so sequences that decode and
prompts that wait advance side by side. It knows token ids and KV. It knows no agents, templates or stores: a ``Source``
says what to place and gets to see the arena when the prompt is in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar, final

import torch
from transformers.cache_utils import Cache

from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.loading import LoadedModel
from agentmesh.engine.probe import Support
from agentmesh.engine.sampling import Sampler, Sampling
from agentmesh.engine.tokenizer import HubTokenizer, TextStream
from agentmesh.errors import RequestTooLongError
from agentmesh.kv.arena import Arena

Result = TypeVar("Result")


class Source(Protocol):
    """Where one request's prompt comes from. All methods are called on the engine's thread, in this order."""

    def compose(self) -> tuple[Composition, Parts]:
        """Decide what to place, right before the prefill, and say how long that took."""

    def prefilled(self, arena: Arena) -> None:
        """Look at the arena when the first token is out; what is kept now, the next prompt can use."""

    def finished(self, arena: Arena, tokens: tuple[int, ...], logits: torch.Tensor) -> None:
        """Look at the arena with the whole message in it; ``logits [V]`` are the first token's."""

    def closed(self) -> None:
        """The request is over, whatever happened."""


@dataclass(frozen=True)
class FirstTokenReport:
    """The prompt is in: milliseconds since the request, of which ``queue_ms`` waiting for the engine."""

    queue_ms: float
    ttft_ms: float


@dataclass(frozen=True)
class Generation:
    """What one request produced.

    Args:
        tokens: generated ids without the stop token.
        text: their text.
        finish: ``stop``, ``length`` (the asked maximum) or ``context`` (the model's context is full).
        queue_ms: waiting for the engine before the prefill.
        ttft_ms: from the request to the first token, waiting included.
        decode_ms: from the first token to the last.
        learn_ms: keeping KV, learning and checking after the message.
    """

    tokens: tuple[int, ...]
    text: str
    finish: str
    queue_ms: float
    ttft_ms: float
    decode_ms: float
    learn_ms: float


class Sequence:
    """One live sequence: its cache and what it has generated. Owned by the request that started it."""

    def __init__(
        self, cache: Cache, length: int, logits: torch.Tensor, sampler: Sampler, text: TextStream, sampling: Sampling
    ) -> None:
        self.cache = cache
        self.first_logits = logits
        self.length = length
        self.sampling = sampling
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.finish = ""
        self._sampler = sampler
        self._text = text

    def accept(self, logits: torch.Tensor, stops: frozenset[int], context: int) -> None:
        """Pick the next token and decide whether the message ends with it."""
        token = self._sampler.pick(logits)
        if token in stops:
            self.finish = "stop"
            return
        self.tokens.append(token)
        self.pieces.append(self._text.push(token))
        if self._completes_stop():
            self.finish = "stop"
        elif len(self.tokens) >= self.sampling.max_tokens:
            self.finish = "length"
        elif self.length + 1 >= context:
            self.finish = "context"

    def _completes_stop(self) -> bool:
        if not self.sampling.stop or not self.pieces[-1]:
            return False
        reach = max(len(stop) for stop in self.sampling.stop) + len(self.pieces[-1])
        tail = "".join(self.pieces[-reach:])[-reach:]
        return any(stop in tail for stop in self.sampling.stop)


@final
class Engine:
    """A loaded model at work. Use as a context manager, or call ``close``."""

    def __init__(self, loaded: LoadedModel, support: Support) -> None:
        self.loaded = loaded
        self.support = support
        self.tokenizer = HubTokenizer(loaded.tokenizer)
        suppressed = sorted(loaded.special_token_ids - loaded.stop_token_ids)
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=loaded.model.device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="agentmesh-engine")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; waits for the forward that is running."""
        self._thread.shutdown(wait=True, cancel_futures=True)

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
        on_text: Callable[[str], None],
    ) -> Generation:
        """Prefill a prompt and decode until it stops. Cancelling frees the sequence at once.

        Args:
            source: composes the prompt.
            prompt_tokens: its length.
            sampling: how to decode.
            on_first: called when the first token is out.
            on_text: called with every piece of text.

        Raises:
            RequestTooLongError: the prompt does not fit the model's context.
        """
        self.check(prompt_tokens)
        arrived = time.perf_counter()
        cache: Cache | None = None
        try:
            sequence, begun, first = await self._on_thread(lambda: self._start(source, prompt_tokens, sampling))
            cache = sequence.cache
            report = FirstTokenReport(queue_ms=(begun - arrived) * 1e3, ttft_ms=(first - arrived) * 1e3)
            on_first(report)
            shown = 0
            while True:
                if len(sequence.pieces) > shown and sequence.pieces[shown]:
                    on_text(sequence.pieces[shown])
                shown = len(sequence.pieces)
                if sequence.finish:
                    break
                await self._on_thread(lambda: self._step(sequence))
            decode_ms = (time.perf_counter() - first) * 1e3
            learn_ms = await self._on_thread(lambda: self._finish(source, sequence))
        finally:
            self._thread.submit(self._close, source, cache)
        text, tokens = self.tokenizer.decode(sequence.tokens), tuple(sequence.tokens)
        return Generation(tokens, text, sequence.finish, report.queue_ms, report.ttft_ms, decode_ms, learn_ms)

    async def do(self, work: Callable[[], Result]) -> Result:
        """Run something on the engine's thread, between its forwards."""
        return await self._on_thread(work)

    async def _on_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _start(self, source: Source, prompt_tokens: int, sampling: Sampling) -> tuple[Sequence, float, float]:
        """Plan, prefill, pick the first token: the sequence, when it began, when the token was out.

        The prompt's KV is kept before any other request can begin: siblings that read the same new text wait for
        one prefill of it, not for its message.
        """
        begun = time.perf_counter()
        composition, parts = source.compose()
        runner = self.support.runner
        room = min(prompt_tokens + sampling.max_tokens, self.loaded.max_context)
        cache = runner.open(room)
        logits = runner.prefill(cache, composition, parts)
        sampler = Sampler(sampling, self._suppressed)
        sequence = Sequence(cache, prompt_tokens, logits, sampler, self.tokenizer.stream(), sampling)
        sequence.accept(logits, self.loaded.stop_token_ids, self.loaded.max_context)
        first = time.perf_counter()
        arena = _arena(cache)
        if arena is not None:
            source.prefilled(arena)
        return sequence, begun, first

    def _step(self, sequence: Sequence) -> None:
        position = sequence.length
        logits = self.support.runner.forward(sequence.cache, sequence.tokens[-1:], (position,))
        sequence.length += 1
        sequence.accept(logits, self.loaded.stop_token_ids, self.loaded.max_context)

    def _close(self, source: Source, cache: Cache | None) -> None:
        """Let the source go, and give the arena back."""
        source.closed()
        if cache is not None:
            self.support.runner.close(cache)

    def _finish(self, source: Source, sequence: Sequence) -> float:
        """Let the source look at the whole sequence; the milliseconds that takes."""
        begun = time.perf_counter()
        arena = _arena(sequence.cache)
        if arena is not None:
            source.finished(arena, tuple(sequence.tokens), sequence.first_logits)
        return (time.perf_counter() - begun) * 1e3


def _arena(cache: Cache) -> Arena | None:
    return cache.arena if isinstance(cache, ArenaCache) else None
