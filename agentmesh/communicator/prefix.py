"""``prefix``: the longest beginning with identical tokens and history is placed, bit for bit; the rest is computed.

Prefill is cut at the prompt's declared reuse points on hit and miss alike, so a hit equals a cold prefill in every bit.
"""

from __future__ import annotations

from typing import final

from agentmesh.communicator.base import Plan, Preset, demand_kv, rows
from agentmesh.communicator.beginnings import Beginnings
from agentmesh.communicator.persistence import Persistence
from agentmesh.engine.composition import Composition, Placement
from agentmesh.kv.arena import Arena
from agentmesh.prompt.segments import FIXED, Prompt
from agentmesh.reasons import Reason, Treatment
from agentmesh.sharing.prefix import PrefixStore


@final
class Prefix(Preset):
    """Exact prefix reuse over agents and samples.

    Args:
        store: where prefixes are kept.
        fingerprint: of the model.
        limit: why what lies behind a prefix is computed; another where the model supports no more than prefixes.
        min_tokens: shorter pieces are not worth keeping; the renderer declares no reuse points closer than this.
    """

    def __init__(
        self, store: PrefixStore, fingerprint: str, min_tokens: int = 1, limit: Reason = Reason.BEHIND_PREFIX
    ) -> None:
        self.store = store
        self.budget = store.budget
        self._beginnings = Beginnings(store, fingerprint)
        self._min_tokens = min_tokens
        self._limit = limit

    def plan(self, prompt: Prompt) -> Plan:
        """Place the longest stored prefix that ends at a reuse point; what it holds of slots counts as shareable."""
        demand_kv(prompt, self._limit)
        placed, at = [], 0
        for kv in self._beginnings.match(prompt):
            placed.append(Placement(at, kv))
            at += kv.tokens
        limited = self._limit is not Reason.BEHIND_PREFIX
        reason = self._limit if at or limited else Reason.NOT_SEEN
        composition = Composition(prompt.tokens, tuple(placed), prompt.points)
        found = rows(prompt, at, "prefix store", reason)
        slots = sum(row.tokens for row in found if row.kind is Treatment.PLACED_EXACT and row.segment != FIXED)
        return Plan(composition, found, slots, slots)

    def prefilled(self, prompt: Prompt, plan: Plan, arena: Arena) -> None:  # noqa: ARG002  # all of it is exact
        """Keep the prompt's pieces up to its last reuse point, or all of it where a conversation goes on from it."""
        points, end = prompt.points, len(prompt.tokens)
        if prompt.continues and end - (points[-1] if points else 0) >= self._min_tokens:
            points = (*points, end)
        self._beginnings.keep(prompt, points, arena)

    def attach(self, kept: Persistence) -> None:
        """Keep prefixes beyond this process."""
        self._beginnings.kept = kept
        self.budget.join(kept.writer)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored prefixes."""
        return self.store.nbytes
