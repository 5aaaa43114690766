"""The interface of a preset: decide what a prompt gets placed, look at what was computed, keep what others may use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from typing_extensions import Self

from agentmesh.communicator.persistence import Persistence
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.slices import Slices
from agentmesh.errors import SharingError
from agentmesh.kv.arena import Arena
from agentmesh.metering import Audit
from agentmesh.prompt.segments import Content, Prompt, Reader
from agentmesh.reasons import PlanRow, Reason, Treatment
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.ledger import Ledger


@dataclass(frozen=True)
class Plan:
    """What was decided for one prompt: what the engine runs, and why, row by row.

    Args:
        composition: what the engine runs.
        rows: every token of the prompt, with its treatment and the reason.
        slot_tokens: shareable slot tokens: an earlier agent read or wrote them, or the store holds them.
        placed_slots: how many of them are placed.
        parts: where the time went; the engine adds its own.
    """

    composition: Composition
    rows: tuple[PlanRow, ...]
    slot_tokens: int = 0
    placed_slots: int = 0
    parts: Parts = field(default_factory=Parts)

    def without_kv(self) -> Self:
        """The plan of a call whose cache holds what was placed: stores may evict that KV while the call goes on."""
        return replace(self, composition=self.composition.without_kv())

    def told(self) -> Plan:
        """What is left to say of the plan of a call that is over, whose readings nobody holds any more."""
        return Plan(self.composition.without_kv(), self.rows, self.slot_tokens, self.placed_slots, self.parts)

    def count(self, treatment: Treatment) -> int:
        """Prompt tokens with one treatment."""
        return sum(row.tokens for row in self.rows if row.kind is treatment)


class Preset(ABC):
    """One strategy of reuse. Called on the engine's thread only, which makes it the owner of what it keeps.

    Everything that it keeps counts in ``budget``, and so do live sequences.

    ``begin`` is called when a run begins (its first call begins it, too) and ``release`` when it ends. For each call
    ``plan``, ``placed``, ``prefilled``, ``finished`` and ``checked`` are called in this order, and ``closed`` at last,
    whatever happened. A call that is no part of its run (``Reader.aside``) is planned and closed only: it is shared as
    any other, and leaves no trace.
    """

    budget: Budget

    def begin(self, reader: Reader) -> None:  # noqa: B027  # most presets keep nothing for a run
        """A run begins: fix what it sees of what was learned."""

    @abstractmethod
    def plan(self, prompt: Prompt) -> Plan:
        """Decide for one prompt, right before it is prefilled. Reads stores, changes no KV in them.

        Raises:
            SharingError: something that must be shared cannot be.
        """

    def placed(self, plan: Plan) -> None:  # noqa: B027  # most presets make nothing for a plan alone
        """What a plan places has been copied to where it is used; later methods get the plan ``without_kv``."""

    @abstractmethod
    def prefilled(self, prompt: Prompt, plan: Plan, arena: Arena) -> None:
        """See a prompt's KV when its first token is out; keep what later prompts may use."""

    def finished(  # noqa: B027  # most presets keep nothing more
        self, prompt: Prompt, plan: Plan, arena: Arena, message: tuple[int, ...]
    ) -> None:
        """See the KV of the message, too: keep it, and learn.

        Args:
            prompt: the prompt.
            plan: what was decided for it.
            arena: its KV and the message's; the last token's is missing where nothing was decoded after it.
            message: the generated tokens.
        """

    def checked(self, prompt: Prompt, plan: Plan, cache: ArenaCache, logits: torch.Tensor) -> Slices[Audit | None]:  # noqa: ARG002  # most presets check nothing
        """Check a call, in slices between which others have the thread; ``None`` where it was not checked.

        Args:
            prompt: the prompt.
            plan: what was decided for it.
            cache: its cache, whose rows nobody needs any more.
            logits: ``[V]``, of the first token.
        """
        yield from ()
        return None

    def keeps(self, prompt: Prompt) -> int:  # noqa: ARG002  # most presets keep nothing for a run
        """Tokens of a prompt whose KV is kept until its run has read them, at most."""
        return 0

    def starved(self, reader: Reader) -> None:  # noqa: B027  # most presets learn nothing
        """A call of a run was refused, because there was no room for its KV."""

    def closed(self, plan: Plan) -> None:  # noqa: B027  # most presets hold nothing for a call
        """Let go of what the call held; it may have been cancelled at any point."""

    def release(self, run: str) -> None:  # noqa: B027  # most presets keep nothing for a run
        """Free what a finished run needed, and commit what it taught."""

    def ingest(self, contents: Sequence[Content], header: tuple[int, ...], tenant: str = "") -> Slices[int]:  # noqa: ARG002  # few presets can
        """Keep passages of a corpus for a tenant, each behind a neutral header; how many were new and kept."""
        yield from ()
        return 0

    def observe_only(self, *, on: bool, checked: bool = False) -> None:  # noqa: B027  # most presets learn nothing
        """While on, every call is computed and observed, however much is known already.

        Args:
            on: whether it is.
            checked: whether what sharing would have made of each call is measured, too (``agentmesh calibrate``).
        """

    def freeze(self) -> None:  # noqa: B027  # most presets have nothing to learn
        """Learn nothing from now on: what a run gives depends on no run before it (``agentmesh eval``)."""

    def adopt(self, other: Preset) -> None:  # noqa: B027  # most presets have nothing to learn
        """Begin with what another preset of the same kind has learned."""

    def attach(self, kept: Persistence) -> None:  # noqa: B027  # a preset that places nothing keeps nothing
        """Keep what later processes may use in a persistent store, and use what is there."""

    def settle(self) -> None:  # noqa: B027  # most presets have nothing to learn
        """No run will come any more: keep what was learned beyond this process."""

    @property
    def learns(self) -> bool:
        """Whether it must see calls before it shares what it can share."""
        return False

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the preset keeps now."""


def demand_memory(reader: Reader, ledger: Ledger[Any, Any], *, lost: bool) -> None:
    """Let a deterministic run fail where memory would decide what it shares, and so what it says.

    Runs that see what a failed one has taught fail, too: it would have taught more.

    Args:
        reader: whose prompt is planned.
        ledger: what runs have taught.
        lost: whether there was no room for KV that the run has made, or for a passage that the prompt reads.

    Raises:
        SharingError: a deterministic run that shares, and it lost KV, or an earlier run did, or taught in vain.
    """
    if reader.sees is None or reader.exact:
        return
    if lost:
        ledger.missed(reader.order)
    elif not ledger.is_spoilt(reader.sees):
        return
    found = "there was no room for KV that this run reads" if lost else "memory was too short for earlier runs"
    raise SharingError(
        f"{found}, so what is shared would depend on how full memory was, which `deterministic` rules out. Raise "
        "communicator.budget, or lower run.concurrency, or run without `deterministic`"
    )


def root_of(fingerprint: str, tenant: str) -> bytes:
    """What KV depends on besides tokens; stores compare it on every hit, so it is the text itself and no digest."""
    return f"{fingerprint}\n{tenant}".encode()


def demand_kv(prompt: Prompt, reason: Reason) -> None:
    """Refuse to compute a message that must come as KV, where a model cannot share it.

    Raises:
        SharingError: an edge says ``deliver: kv``, and the reason is the model.
    """
    for segment in prompt.segments if reason is Reason.MODEL_UNSUPPORTED else ():
        if segment.comes_as_kv:
            raise SharingError(
                f"{prompt.reader.consumer or 'this prompt'} cannot share {segment.label}: {reason}, and its edge says "
                "`deliver: kv`. Take another model, or `deliver: auto`"
            )


def rows(prompt: Prompt, placed: int, source: str, reason: Reason) -> tuple[PlanRow, ...]:
    """Plan rows of a prompt whose first ``placed`` tokens are placed exactly.

    Args:
        prompt: the prompt.
        placed: length of the placed prefix.
        source: where the prefix came from.
        reason: why the rest is computed.
    """
    found = []
    for segment, start in zip(prompt.segments, prompt.starts, strict=True):
        exact = min(max(placed - start, 0), len(segment.tokens))
        rest = len(segment.tokens) - exact
        if exact:
            kind, why = Treatment.PLACED_EXACT, Reason.IDENTICAL_PREFIX
            found.append(PlanRow(segment=segment.label, kind=kind, tokens=exact, source=source, reason=why))
        if rest or not segment.tokens:
            kind = Treatment.COMPUTED
            found.append(PlanRow(segment=segment.label, kind=kind, tokens=rest, reason=reason))
    return tuple(found)
