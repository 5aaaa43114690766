"""The exact prefixes of a preset: in memory, and behind it in a persistent store where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from agentmesh.communicator.base import root_of
from agentmesh.communicator.persistence import Persistence
from agentmesh.kv.arena import Arena
from agentmesh.kv.values import KV
from agentmesh.prompt.segments import Prompt
from agentmesh.sharing.prefix import PrefixStore


@final
class Beginnings:
    """Finds and keeps beginnings of prompts, bit for bit.

    Args:
        store: those in memory.
        fingerprint: of the model.
    """

    def __init__(self, store: PrefixStore, fingerprint: str) -> None:
        self.store = store
        self.kept: Persistence | None = None
        self._fingerprint = fingerprint

    def match(self, prompt: Prompt) -> list[KV]:
        """The pieces of the longest known prefix, in order; what memory lacks is read from the persistent store."""
        root, tenant = self._root(prompt), prompt.reader.tenant
        found = self.store.match(root, prompt.tokens, prompt.points)
        if self.kept is not None:
            self.kept.next_prompt()
        while self.kept is not None and len(found) < len(prompt.points):
            points = prompt.points[: len(found) + 1]
            piece = self.kept.piece(tenant, prompt.tokens[: points[-1]], points)
            if piece is None:
                break
            self.store.insert(root, prompt.tokens, points, lambda _start, _stop, kv=piece: kv)  # type: ignore[misc]
            if len(self.store.match(root, prompt.tokens, points)) < len(points):
                break  # the memory budget has no room for it
            found.append(piece)
        return found

    def keep(self, prompt: Prompt, points: Sequence[int], arena: Arena) -> None:
        """Keep the pieces of a prompt up to its reuse points."""
        root, tenant = self._root(prompt), prompt.reader.tenant
        self.store.insert(root, prompt.tokens, points, arena.read)
        if self.kept is not None:
            for number, kv in enumerate(self.store.match(root, prompt.tokens, points), 1):
                self.kept.keep_piece(tenant, prompt.tokens[: points[number - 1]], tuple(points[:number]), kv)

    def _root(self, prompt: Prompt) -> bytes:
        return root_of(self._fingerprint, prompt.reader.tenant)
