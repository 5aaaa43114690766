"""The exact prefix store: KV of prompts' beginnings, reused bit for bit.

An entry is the KV of the tokens between two reuse points, after a history that its key chains to: ``key = sha256(key of
the history, token ids)``. So a hit has the same tokens after the same history, computed in the same cuts. Model,
tenant, history and token ids are compared on every hit: a hash collision costs a miss, never a wrong token. Nothing
approximate is ever stored here.

One owner (a communicator) uses a store from one thread.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from agentmesh.kv.values import KV
from agentmesh.sharing.budget import Budget, Worth


@dataclass
class Entry:
    """KV of one piece of a prefix; ``children`` counts the entries that continue it."""

    root: bytes
    parent: bytes | None
    tokens: tuple[int, ...]
    kv: KV
    children: int = 0

    def holds(self, root: bytes, parent: bytes | None, tokens: tuple[int, ...]) -> bool:
        """Whether it is of this model and tenant, and holds these tokens behind this history."""
        return (self.root, self.parent, self.tokens) == (root, parent, tokens)


@dataclass
class PrefixStore:
    """Prefix KV under a hard byte budget, least recently used entries evicted first, ends of chains before beginnings.

    Args:
        budget: the limit that its entries share with other stores.
    """

    budget: Budget
    nbytes: int = 0
    _entries: OrderedDict[bytes, Entry] = field(default_factory=OrderedDict)
    _growing: bytes | None = None

    def __post_init__(self) -> None:
        self.budget.join(self)

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, root: bytes, tokens: Sequence[int], points: Sequence[int]) -> list[KV]:
        """The stored pieces of the longest prefix that ends at a reuse point, in order.

        Args:
            root: what the KV depends on besides tokens: model fingerprint and tenant.
            tokens: the prompt.
            points: its reuse points, ascending.
        """
        found: list[KV] = []
        for key, parent, piece in _chain(root, tokens, points):
            entry = self._entries.get(key)
            if entry is None or not entry.holds(root, parent, piece):
                break
            self._entries.move_to_end(key)
            found.append(entry.kv)
        return found

    def insert(self, root: bytes, tokens: Sequence[int], points: Sequence[int], read: Callable[[int, int], KV]) -> None:
        """Keep the pieces of a prompt that are not stored yet, as far as the budget allows.

        Args:
            root: as in ``match``.
            tokens: the prompt.
            points: its reuse points, ascending.
            read: gives the KV between two positions; it is copied.
        """
        for key, parent, piece in _chain(root, tokens, points):
            there = self._entries.get(key)
            if there is not None:
                if not there.holds(root, parent, piece):
                    break
                self._entries.move_to_end(key)
                continue
            start = 0 if parent is None else self._reach(parent)
            kv = read(start, start + len(piece))
            self._growing = parent
            if not self.budget.room(kv.nbytes, most=Worth.LATER):
                break
            if parent is not None:
                self._entries[parent].children += 1
            self._entries[key] = Entry(root, parent, piece, kv.owned())
            self.nbytes += kv.nbytes
        self._growing = None

    def _reach(self, key: bytes | None) -> int:
        """Position at which the chain that ends with ``key`` ends."""
        reach = 0
        while key is not None:
            entry = self._entries[key]
            reach += len(entry.tokens)
            key = entry.parent
        return reach

    def evict(self, wanted: int, worth: Worth) -> int:
        """Drop least recently used ends of chains, never the chain that is growing now; see ``budget.Store``."""
        freed = 0
        while worth is Worth.LATER and freed < wanted:
            ends = (key for key, entry in self._entries.items() if not entry.children and key != self._growing)
            victim = next(ends, None)
            if victim is None:
                break
            freed += self._entries[victim].kv.nbytes
            self._drop(victim)
        return freed

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.nbytes -= entry.kv.nbytes
        if entry.parent is not None:
            self._entries[entry.parent].children -= 1


def _chain(
    root: bytes, tokens: Sequence[int], points: Sequence[int]
) -> Iterator[tuple[bytes, bytes | None, tuple[int, ...]]]:
    """Key, parent's key and tokens of every piece of a prompt, from its beginning."""
    parent: bytes | None = None
    for start, stop in pairwise((0, *points)):
        piece = tuple(tokens[start:stop])
        key = hashlib.sha256((parent or root) + array("q", piece).tobytes()).digest()
        yield key, parent, piece
        parent = key
