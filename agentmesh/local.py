"""The model of this process: an engine and a communicator behind the backend interface."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import final

import psutil
import torch

from agentmesh.backend import Completion, Listener
from agentmesh.communicator import Preset, make
from agentmesh.communicator.learner import Learner
from agentmesh.communicator.linkstate import Taught
from agentmesh.communicator.persistence import Persistence
from agentmesh.communicator.saved import Made, save
from agentmesh.communicator.saved import load as load_states
from agentmesh.communicator.scope import Scope
from agentmesh.communicator.slots import Slots
from agentmesh.config.mesh import GenerateSpec, ModelSpec
from agentmesh.config.presets import CommunicatorSpec, StoreSpec
from agentmesh.engine.embedded import Progress
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.generation import FirstTokenReport
from agentmesh.engine.identity import identity
from agentmesh.engine.loop import BATCH, Engine, at_once
from agentmesh.engine.sampling import Sampling
from agentmesh.engine.tokenizer import HubTokenizer
from agentmesh.errors import UsageError
from agentmesh.planned import LiveKV, PlannedPrompt
from agentmesh.prompt import Content, Prompt, Reader, neutral_header
from agentmesh.sharing.tier.disk import DiskStore

RUNS_A_CORE = 8
"""Runs at once that a core serves: on two cores sixteen sequences are one full group of rows (docs/figures.md)."""

SHORT_TOKENS = 512
"""Tokens of a prompt for which the budget has room in each run at once; where they are longer, runs wait."""

WAITING = 4
"""This part of the memory budget may wait to be written to a store."""


@final
class LocalBackend:
    """Runs a model on this machine.

    Args:
        engine: the model at work; backends with different communicators may share it.
        communicator: how its KV is reused.

    Raises:
        NotFoundError: no such preset.
    """

    def __init__(self, engine: Engine, communicator: CommunicatorSpec) -> None:
        self.engine = engine
        self.communicator: Preset = make(communicator, engine.support, engine.loaded)
        self.communicator.budget.join(LiveKV(engine.core.admission), first=True)
        self.used_bytes = self.peak_bytes = 0
        self._spec = communicator
        self._preset = communicator.preset
        self._kept: Persistence | None = None
        self._begun: dict[str, float] = {}
        self._open = True
        engine.join()

    @classmethod
    def open(
        cls,
        model: ModelSpec,
        communicator: CommunicatorSpec,
        progress: Progress | None = None,
        *,
        deterministic: bool = False,
    ) -> LocalBackend:
        """Load a model and begin to run it.

        Args:
            model: which one.
            communicator: how its KV is reused.
            progress: told how far fetching and converting are.
            deterministic: whether sequences decode one by one, so that none depends on its neighbours; see ``Engine``.

        Raises:
            NotFoundError: no such model or preset.
            ModelError: the weights cannot be fetched or read.
        """
        return cls(Engine.open(model, progress, batch=at_once(deterministic=deterministic)), communicator)

    def note_bytes(self) -> None:
        """Note how much KV there is now, in live sequences and in stores; called on the engine's thread."""
        self.used_bytes = self.communicator.budget.used
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.loaded.name

    @property
    def preset(self) -> str:
        """The preset's name."""
        return self._preset

    @property
    def width(self) -> int:
        """As many runs as may decode in one forward, if half of the free memory holds their longest prompts.

        On a CPU no more than its cores can serve; nor more than the budget holds short prompts.
        """
        loaded, runner = self.engine.loaded, self.engine.support.runner
        affordable = max(1, self._spec.budget // max(runner.size(SHORT_TOKENS), 1))
        if not isinstance(runner, ArenaRunner) or not runner.batches:
            return min(os.cpu_count() or 1, affordable)
        if runner.shape.device.type == "cuda":
            most, free = BATCH, torch.cuda.mem_get_info(runner.shape.device)[0]
        else:
            most, free = min(BATCH, RUNS_A_CORE * torch.get_num_threads()), int(psutil.virtual_memory().available)
        return max(1, min(most, free // 2 // runner.size(loaded.max_context), affordable))

    @property
    def tokenizer(self) -> HubTokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def describe(self) -> dict[str, str]:
        """Name, source, fingerprint, dtype, device and supported reuse."""
        loaded, support = self.engine.loaded, self.engine.support
        return {
            "name": loaded.name,
            "source": loaded.source,
            "fingerprint": loaded.fingerprint,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "decode": loaded.decode.value,
            "device": str(loaded.model.device),
            "reuse": support.level.value,
            "reuse_limit": support.reason,
            "steps": support.decoding(loaded.unrecorded),
        }

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        """Plan, prefill and decode one prompt on the engine's thread.

        Raises:
            RequestTooLongError: the prompt does not fit the model's context, or can never fit the budget.
        """
        runner = self.engine.support.runner
        a_token = runner.shape.bytes_per_token if isinstance(runner, ArenaRunner) else 0
        source = PlannedPrompt(self.communicator, prompt, a_token, self.since(prompt.reader.run), self.note_bytes)
        sampling = Sampling(
            generate.max_tokens, generate.temperature, generate.top_p, generate.top_k, generate.stop, seed
        )

        def on_first(report: FirstTokenReport) -> None:
            listener.first(report.ttft_ms, source.decided.rows)

        on_text = listener.text if listener.streams else None
        done = await self.engine.generate(source, len(prompt.tokens), sampling, on_first, on_text)
        plan = source.decided
        return Completion(
            done.tokens,
            done.text,
            done.finish,
            done.queue_ms,
            done.ttft_ms,
            done.decode_ms,
            plan.rows,
            self._preset,
            slot_tokens=plan.slot_tokens,
            placed_slots=plan.placed_slots,
            parts_ms=asdict(plan.parts),
            learn_ms=done.learn_ms,
            audit=source.audit,
        )

    def since(self, run: str) -> float | None:
        """When a run that goes on began, by ``time.perf_counter``."""
        return self._begun.get(run)

    def observe_only(self, *, on: bool, checked: bool = False) -> None:
        """While on, every call is computed and observed; see ``Preset.observe_only``."""
        self.communicator.observe_only(on=on, checked=checked)

    @property
    def adds_up(self) -> bool:
        """Whether what runs teach can be collected in one place and learned in another."""
        return isinstance(self.communicator, Slots) and self.communicator.learns

    def collect(self) -> list[Taught]:
        """See ``Learner.collect``.

        Raises:
            UsageError: what the preset learns does not add up.
        """
        return self._learner("collected").collect()

    def learn(self, taught: Iterable[Taught]) -> None:
        """See ``Learner.learn``.

        Raises:
            UsageError: what the preset learns does not add up.
        """
        self._learner("taught").learn(taught)

    @property
    def knows_links(self) -> bool:
        """Whether anything was learned that ``save_realigners`` can write."""
        return isinstance(self.communicator, Slots) and bool(self.communicator.learner.ledger.states)

    def save_realigners(self, path: Path, consumers: Mapping[str, str]) -> list[str]:
        """Write what was learned; one line about each link.

        Args:
            path: the file.
            consumers: agent → digest of its texts.

        Raises:
            UsageError: the preset learns nothing that can be saved, or has learned nothing yet.
            RecordError: the file cannot be written.
        """
        states = self._learner("saved").ledger.states
        if not states:
            raise UsageError("nothing was learned: no agent of this mesh reads what another one read or wrote")
        save(path, states, Made.of(self.engine.loaded.fingerprint, consumers, self._spec))
        return [f"{name}: {state.told()}" for name, state in sorted(states.items())]

    def load_realigners(self, path: Path, consumers: Mapping[str, str]) -> None:
        """Begin with what ``save_realigners`` wrote.

        Raises:
            UsageError: the preset has nothing to load, or the file was made for another model or other texts.
        """
        learner = self._learner("loaded")
        here = Made.of(self.engine.loaded.fingerprint, consumers, self._spec)
        states = load_states(path, learner.fresh, here)
        learner.begin_with(states, str(path))

    def _learner(self, what: str) -> Learner:
        if not isinstance(self.communicator, Slots):
            raise UsageError(f"preset {self._preset!r} has no realigners that could be {what}; use `linear`")
        return self.communicator.learner

    async def ingest(self, contents: Sequence[Content], tenant: str = "") -> int:
        """Keep passages for a tenant, each behind a neutral header; the engine serves others between two forwards."""
        header, kept = neutral_header(self.tokenizer), 0
        for content in contents:
            ids = self.tokenizer.encode(content.text, control=False) if content.tokens is None else content.tokens
            passage = replace(content, tokens=tuple(ids))
            if len(header) + len(ids) <= self.engine.loaded.max_context:
                kept += await self.engine.in_slices(self.communicator.ingest((passage,), header, tenant))
        return kept

    async def begin(self, reader: Reader) -> None:
        """Fix what a run sees of what was learned.

        Raises:
            UsageError: a deterministic run, and sequences decode together here, so that each depends on the others.
        """
        if reader.sees is not None and self.engine.batch > 1 and self.engine.support.runner.batches:
            raise UsageError(
                "the mesh is deterministic, and its backend decodes several sequences in one forward, which changes "
                "their last bits: open it with LocalBackend.open(…, deterministic=True), or let the mesh load its model"
            )
        self._begun[reader.run] = time.perf_counter()
        await self.engine.do(lambda: self.communicator.begin(reader))

    async def release(self, run: str) -> None:
        """Free what was kept for a run, and commit what it taught."""
        self._begun.pop(run, None)

        def free() -> None:
            self.communicator.release(run)
            self.note_bytes()
            self.engine.core.admission.wake()

        await self.engine.do(free)

    def keep_in(self, folder: Path, store: StoreSpec, consumers: Mapping[str, str], *, reads: bool) -> None:
        """Keep KV and what links learn in a folder, and use what is there; a model without arenas has nothing to keep.

        Args:
            folder: where.
            store: budget and time to live.
            consumers: agent → digest of its texts.
            reads: whether what is there is used, too; not in deterministic runs.

        Raises:
            InputError: no folder, but a file, or none can be made.
        """
        runner = self.engine.support.runner
        if not isinstance(runner, ArenaRunner):
            return
        scope = Scope.of(identity(self.engine.loaded), runner.shape, consumers, self._spec)
        disk = DiskStore(folder, store.budget, store.ttl)
        self._kept = Persistence(disk, scope, self._spec.budget // WAITING, reads=reads)
        self.engine.thread.do(partial(self.communicator.attach, self._kept))

    @property
    def kept(self) -> Persistence | None:
        """What outlives this process, if anything does."""
        return self._kept

    def close(self) -> None:
        """Write what is to outlive the process, and stop the engine if no other backend uses it."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self.engine.thread.do(self.communicator.settle)
            kept.close()
        if self._open:
            self._open = False
            self.engine.leave()
