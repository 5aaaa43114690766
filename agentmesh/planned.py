"""Between engine and communicator: a prompt that is planned when the engine begins it, and live KV in the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch

from agentmesh.communicator import Plan, Preset
from agentmesh.engine.admission import Admission
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.slices import Slices
from agentmesh.kv.arena import Arena
from agentmesh.metering import Audit
from agentmesh.prompt import Prompt
from agentmesh.sharing.budget import Worth


@dataclass(frozen=True)
class LiveKV:
    """Live sequences as a store of the budget: they are never evicted, arenas that wait to be used again are."""

    admission: Admission

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas."""
        return self.admission.live_bytes

    def evict(self, wanted: int, worth: Worth) -> int:  # noqa: ARG002  # all that wait, or none
        """Free the arenas that wait; see ``budget.Store``."""
        return self.admission.drop_spare() if worth is Worth.IDLE else 0


@final
class PlannedPrompt:
    """A prompt as the engine's source: its plan is made when the engine begins it.

    Args:
        preset: plans it, and keeps what is to be kept of it.
        prompt: the prompt.
        token_bytes: bytes of a token's KV.
        since: when its run began, by ``time.perf_counter``.
        noted: called when something was kept.

    Attributes:
        audit: how the call was checked, if it was.
    """

    def __init__(
        self, preset: Preset, prompt: Prompt, token_bytes: int, since: float | None, noted: Callable[[], None]
    ) -> None:
        self._preset = preset
        self._prompt = prompt
        self._token_bytes = token_bytes
        self._noted = noted
        self._plan: Plan | None = None
        self.since = since
        self.audit: Audit | None = None

    @property
    def decided(self) -> Plan:
        """The plan; made by now."""
        assert self._plan is not None, "the engine composes a prompt before it reports on it"
        return self._plan

    @property
    def limit(self) -> int:
        """The whole budget."""
        return self._preset.budget.limit

    @property
    def used(self) -> int:
        """What all that shares the budget holds."""
        return self._preset.budget.used

    def room(self, need: int, *, alone: bool) -> bool:
        """Make room in the budget; what agents wait for or have taught is given up only where nothing else is live.

        What will be kept of the prompt for later visits counts, too: else it would push out what others wait for.
        """
        if alone:
            found = self._preset.budget.room(need, Worth.TAUGHT)
            if not found:
                self._preset.starved(self._prompt.reader)
            return found
        return self._preset.budget.room(need + self._token_bytes * self._preset.keeps(self._prompt), Worth.LATER)

    def compose(self) -> tuple[Composition, Parts]:
        """Plan the prompt now."""
        self._plan = self._preset.plan(self._prompt)
        return self._plan.composition, self._plan.parts

    def placed(self) -> None:
        """Let the preset give back what it made for the plan alone, and hold nothing that its stores may evict."""
        self._preset.placed(self.decided)
        self._plan = self.decided.without_kv()
        self._settle()
        self._noted()

    def prefilled(self, arena: Arena) -> None:
        """Let the preset keep what later prompts may use."""
        if self._prompt.reader.aside:
            return
        self._preset.prefilled(self._prompt, self.decided, arena)
        self._settle()
        self._noted()

    def finished(self, arena: Arena, tokens: tuple[int, ...]) -> None:
        """Let the preset keep the message, and learn."""
        if self._prompt.reader.aside:
            return
        self._preset.finished(self._prompt, self.decided, arena, tokens)
        self._settle()
        self._noted()

    def checked(self, cache: ArenaCache, logits: torch.Tensor) -> Slices[None]:
        """Let the preset check the call."""
        if self._prompt.reader.aside:
            return
        self.audit = yield from self._preset.checked(self._prompt, self.decided, cache, logits)
        if self.audit is not None:
            self._settle()
            self._noted()

    def closed(self) -> None:
        """Let the preset let go of the call, where it was begun at all."""
        if self._plan is not None:
            self._preset.closed(self._plan)
            self._plan = self._plan.told()
            self._settle()

    def _settle(self) -> None:
        """Give up arenas that looks used and that go beyond the budget."""
        self._preset.budget.room(0, Worth.IDLE)
