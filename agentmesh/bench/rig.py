"""Model calls outside a run: the same prompts and messages under several presets, teacher-forced.

A bench needs every preset to see identical token ids. So prompts and messages come from one dense run, and each preset
then prefills these prompts and is made to say these messages.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import final

import torch

from agentmesh.backend import Completion, Listener
from agentmesh.communicator import Preset
from agentmesh.communicator.base import Plan
from agentmesh.communicator.keeper import KeptPlan
from agentmesh.communicator.kvcomm import KVComm
from agentmesh.config.mesh import GenerateSpec
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.operations import settle
from agentmesh.engine.slices import at_once
from agentmesh.kv.arena import Arena
from agentmesh.local import LocalBackend
from agentmesh.prompt import Content, Prompt, Reader

DENSE = CommunicatorSpec(preset="dense")
"""What benches open a model with; presets under measurement come later."""


@dataclass(frozen=True)
class Call:
    """One model call of a dense run: its prompt, and the message it gave."""

    prompt: Prompt
    message: tuple[int, ...]

    @property
    def node(self) -> str:
        """The agent."""
        return self.prompt.reader.consumer


@dataclass(frozen=True)
class Said:
    """A call made to say its message: logits ``[T, V]`` over it, and the cache of prompt and message."""

    logits: torch.Tensor
    cache: ArenaCache

    @property
    def arena(self) -> Arena:
        """KV of prompt and message."""
        return self.cache.arena


@dataclass(frozen=True)
class Timed:
    """What a timed call took: milliseconds to the first token, and afterwards to keep and learn."""

    plan: Plan
    ttft_ms: float
    learn_ms: float


@dataclass(frozen=True)
class Rig:
    """Runs calls over arenas.

    Args:
        runner: runs the model.
    """

    runner: ArenaRunner

    def dense(self, call: Call) -> Said:
        """A call under ``dense``."""
        cache = self._open(call)
        logits = self.runner.prefill(cache, Composition(call.prompt.tokens))
        return self._say(call, cache, logits)

    def composed(self, call: Call, composition: Composition) -> Said:
        """A call whose prompt is composed as somebody planned it."""
        cache = self._open(call)
        return self._say(call, cache, self.runner.prefill(cache, composition))

    def own(self, preset: Preset, call: Call) -> tuple[Plan, Said]:
        """A call as in use: the preset keeps what it made itself, learns, and may check it in its cache."""
        plan = preset.plan(call.prompt)
        said = self.composed(call, plan.composition)
        keep(preset, call, plan, said, check=True)
        return plan, said

    def timed(self, preset: Preset, call: Call) -> Timed:
        """A call whose parts are timed; the message is prefilled after the first token instead of decoded."""
        begun = time.perf_counter()
        plan = preset.plan(call.prompt)
        cache = self._open(call)
        logits = self.runner.prefill(cache, plan.composition, plan.parts)
        first = int(logits.argmax())
        done = time.perf_counter()
        assert first >= 0, "picking the token is part of the time to it"
        preset.placed(plan)
        preset.prefilled(call.prompt, plan, cache.arena)
        settle(cache.arena.shape.device)
        kept = time.perf_counter()
        said = self._say(call, cache, logits)
        settle(cache.arena.shape.device)
        again = time.perf_counter()
        preset.finished(call.prompt, plan, said.arena, call.message)
        at_once(preset.checked(call.prompt, plan, cache, logits))
        preset.closed(plan)
        self.runner.close(cache)
        settle(cache.arena.shape.device)
        learn = (kept - done) + (time.perf_counter() - again)
        return Timed(plan, (done - begun) * 1e3, learn * 1e3)

    def released(self, preset: Preset, run: str) -> float:
        """Let a preset free what a run needed, and commit what it taught; the milliseconds that took."""
        begun = time.perf_counter()
        preset.release(run)
        settle(self.runner.shape.device)
        return (time.perf_counter() - begun) * 1e3

    def _open(self, call: Call) -> ArenaCache:
        return self.runner.open(len(call.prompt.tokens) + len(call.message))

    def _say(self, call: Call, cache: ArenaCache, logits: torch.Tensor) -> Said:
        """Prefill the message behind its prompt; its last token stays without KV, as after decoding."""
        begin, spoken = len(call.prompt.tokens), call.message[:-1]
        if not spoken:
            return Said(logits[None], cache)
        rest = self.runner.run(cache, spoken, range(begin, begin + len(spoken)), keep=len(spoken))
        return Said(torch.cat([logits[None], rest]), cache)


def median_parts(timed: Sequence[Timed]) -> dict[str, float]:
    """Medians of the parts of the time to first token, in milliseconds."""
    parts = [asdict(one.plan.parts) for one in timed]
    return {name: statistics.median(one[name] for one in parts) for name in parts[0]}


def keep(preset: Preset, call: Call, plan: Plan, said: Said, *, check: bool = False) -> None:
    """Give a preset what a call made; with ``check`` it may use the call's cache for a check of it."""
    preset.placed(plan)
    preset.prefilled(call.prompt, plan, said.arena)
    preset.finished(call.prompt, plan, said.arena, call.message)
    if check:
        at_once(preset.checked(call.prompt, plan, said.cache, said.logits[0]))
    preset.closed(plan)


def anchors_held(preset: Preset) -> int:
    """Anchors in the pools of ``kvcomm``; other presets have none."""
    return preset.pools.held if isinstance(preset, KVComm) else 0


def observe(preset: Preset, call: Call, dense: Said) -> None:
    """Give a preset a call that ran dense, to keep and to learn from."""
    plan = preset.plan(call.prompt)
    keep(preset, call, plan.as_dense() if isinstance(plan, KeptPlan) else plan, dense)


def give_heap_back() -> None:
    """Let the system have what calls have freed.

    Logits over a whole vocabulary come and go between KV that stays. glibc keeps the holes, and a bench of many
    questions would take several times what it holds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@final
class Recording:
    """A backend that notes the calls it answers.

    Args:
        inner: who answers them.
    """

    def __init__(self, inner: LocalBackend) -> None:
        self._inner = inner
        self.calls: list[Call] = []
        self.name = inner.name
        self.preset = inner.preset
        self.tokenizer = inner.tokenizer
        self.width = inner.width

    def describe(self) -> dict[str, str]:
        """As the backend that answers."""
        return self._inner.describe()

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        """Answer and note a call."""
        done = await self._inner.complete(prompt, generate, seed, listener)
        self.calls.append(Call(prompt, done.tokens))
        return done

    async def ingest(self, contents: Sequence[Content], tenant: str = "") -> int:
        """As the backend that answers."""
        return await self._inner.ingest(contents, tenant)

    async def begin(self, reader: Reader) -> None:
        """As the backend that answers."""
        await self._inner.begin(reader)

    async def release(self, run: str) -> None:
        """As the backend that answers."""
        await self._inner.release(run)

    def take(self) -> list[list[Call]]:
        """The calls since the last time: for each run, in the order they ended."""
        runs: dict[int, list[Call]] = {}
        for call in self.calls:
            runs.setdefault(call.prompt.reader.order, []).append(call)
        self.calls = []
        return [runs[order] for order in sorted(runs)]

    def close(self) -> None:
        """Close the backend that answers."""
        self._inner.close()
