"""A persistent store: entries in files, an index over them, one byte budget for the folder, and a time to live.

Whatever is damaged, foreign, gone or cannot be read is a miss; whatever cannot be written is counted and left out. So
nothing here raises because of what a disk, another process or a crash has done. Several processes may work on one
folder; each has a ``DiskStore`` of its own, and so has each thread.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from agentmesh.config.base import Choice
from agentmesh.errors import InputError
from agentmesh.sharing.tier.counts import Counts
from agentmesh.sharing.tier.folder import DamagedError, Folder, Stored, digest_of
from agentmesh.sharing.tier.index import Entry, Index, Total
from agentmesh.sharing.tier.records import HEAD, LENGTH, Record, entry_of, header_bytes

SLACK = 512 * 2**10
"""Bytes that the index may grow by until somebody looks."""

CANDIDATES = 4
SETTLED_S = 60.0
"""After so long a reserved entry without a file is nobody's work any more."""


class Put(Choice):
    """What became of an entry that was to be kept."""

    STORED = "stored"
    THERE = "there"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True)
class Checked:
    """What a walk over all files found: how many were whole, and how many were set aside."""

    whole: int
    damaged: int


@final
class DiskStore:
    """One thread's way into a folder.

    Args:
        path: the folder.
        budget: bytes that it may take up, index and quarantine included.
        ttl: seconds after which an entry that nobody used is removed; ``None`` for never.
        counts: counted in; its own where not given.
        clock: seconds since 1970.
        twin: whether another one has put the folder in order already.

    Raises:
        InputError: something that is no folder lies there, or none can be made. One that is there and cannot be
            written is used as far as it can be.
    """

    def __init__(
        self,
        path: Path,
        budget: int,
        ttl: float | None = None,
        counts: Counts | None = None,
        clock: Callable[[], float] = time.time,
        *,
        twin: bool = False,
    ) -> None:
        if path.exists() and not path.is_dir():
            raise InputError(f"store {path}: found a file, expected a folder; name another place for it")
        self.folder = Folder(path)
        if not path.exists():
            try:
                self.folder.prepare()
            except OSError as error:
                why = error.strerror or error
                raise InputError(f"store {path}: cannot make the folder ({why}); name another place for it") from error
        self.budget = budget
        self.ttl = ttl
        self.counts = counts or Counts()
        self.limits: str = ""
        self._clock = clock
        self._index = self._open()
        self._ignored: set[tuple[str, str]] = set()
        if not twin or self.limits:
            self._reconcile()

    def twin(self) -> DiskStore:
        """Another thread's way into the same folder, with the same counts."""
        return DiskStore(self.folder.root, self.budget, self.ttl, self.counts, self._clock, twin=True)

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def find(self, kind: str, tenant: str, fingerprint: str, key: str, most: int = CANDIDATES) -> list[Entry]:
        """Entries of a key, the best first, as the index has them."""
        try:
            found = self._index.find(kind, tenant, fingerprint, key, most)
        except sqlite3.Error as error:
            self._failed(error)
            return []
        now = self._clock()
        return [e for e in found if not self._expired(e, now) and (e.tenant, e.digest) not in self._ignored]

    def get(self, entry: Entry) -> Record | None:
        """The content of an entry, checked; ``None`` where it is gone, damaged, or not what the index says."""
        pair = (entry.tenant, entry.digest)
        try:
            record = Record.decode(self.folder.read(*pair, entry.nbytes))
        except DamagedError:
            self.reject(entry)
            return None
        except OSError:
            self._forget([pair])
            return None
        if (record.kind, record.tenant, record.fingerprint) != (entry.kind, entry.tenant, entry.fingerprint):
            self.reject(entry)
            return None
        self.counts.read_bytes += entry.nbytes
        return record

    def reject(self, entry: Entry) -> None:
        """Set an entry aside: it is damaged, or no content that this version can use."""
        self.counts.damaged += 1
        self._ignored.add((entry.tenant, entry.digest))
        with suppress(OSError):
            self.folder.set_aside(self.folder.path(entry.tenant, entry.digest))
        self._forget([(entry.tenant, entry.digest)])

    def put(self, record: Record, *, replaces: bool = False) -> Put:
        """Keep a record.

        Args:
            record: what to keep.
            replaces: whether it takes the place of what is kept under its first key. It does so only in the same or
                a later generation, and there only with a higher rank or another content of the same rank.
        """
        done = self._put(record, replaces=replaces)
        setattr(self.counts, done.value, getattr(self.counts, done.value) + 1)
        return done

    def touch(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Note that entries, by tenant and digest, were used."""
        with suppress(sqlite3.Error):
            self._index.touch(list(pairs), self._clock())

    def totals(self) -> list[Total]:
        """Sums by tenant and kind."""
        try:
            return self._index.totals()
        except sqlite3.Error:
            return []

    def used(self) -> int:
        """Bytes of the folder now."""
        try:
            return self.folder.overhead() + sum(entry.nbytes for entry in self._entries())
        except OSError:
            return 0

    def verify(self, tick: Callable[[int, int], None] = lambda _done, _total: None) -> Checked:
        """Read every file; what is damaged is set aside."""
        entries = self._entries()
        whole = 0
        before = self.counts.damaged
        for number, entry in enumerate(entries, 1):
            whole += self.get(entry) is not None
            tick(number, len(entries))
        return Checked(whole, self.counts.damaged - before)

    def collect(self) -> int:
        """Remove what is too old, beyond the budget, set aside or left over; how many bytes that freed."""
        before = self.used()
        with suppress(OSError):
            self.folder.empty_quarantine()
        self._reconcile()
        with suppress(sqlite3.Error):
            self._index.compact()
        return max(before - self.used(), 0)

    def clear(self, tenant: str | None = None) -> int:
        """Remove all entries, or one tenant's; how many."""
        found = [entry for entry in self._entries() if tenant is None or entry.tenant == tenant]
        self._forget([(entry.tenant, entry.digest) for entry in found])
        self._unlink(found)
        return len(found)

    def _open(self) -> Index:
        """The folder's index; a new one where that is damaged; one in memory where nothing can be written."""
        try:
            self.folder.prepare()
            try:
                return Index(self.folder.index)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                self.counts.damaged += 1
                for end in ("-shm", "-wal", ""):
                    with suppress(FileNotFoundError):
                        self.folder.set_aside(self.folder.index.with_name(self.folder.index.name + end))
                return Index(self.folder.index)
        except (OSError, sqlite3.Error) as error:
            self.limits = self.counts.trouble = f"nothing can be written to {self.folder.root} ({error})"
            return Index(None)

    def _reconcile(self) -> None:
        """Make index and files agree, remove left-overs, keep the budget."""
        now = self._clock()
        with suppress(OSError):
            if not self.limits:
                self.folder.sweep()
        try:  # the index first: what it calls ready had its file before
            known = {(entry.tenant, entry.digest): (entry, ready) for entry, ready in self._index.all()}
            files = {(file.tenant, file.digest): file for file in self.folder.entries()}
            lost = [
                pair for pair, (entry, ready) in known.items()
                if pair not in files and (ready or entry.created < now - SETTLED_S)
            ]  # fmt: skip
            self._index.drop(lost)
            for pair, file in files.items():
                entry, ready = known.get(pair, (None, False))
                if entry is None:
                    self._adopt(file)
                elif not ready or entry.nbytes != file.nbytes:
                    self._index.put(replace(entry, nbytes=file.nbytes))
            if not self.limits:
                self._trim(now)
        except (OSError, sqlite3.Error) as error:
            self._failed(error)

    def _entries(self) -> list[Entry]:
        """All entries."""
        try:
            return [entry for entry, _ in self._index.all()]
        except sqlite3.Error as error:
            self._failed(error)
            return []

    def _failed(self, error: Exception) -> None:
        self.counts.failed += 1
        self.counts.trouble = str(error)

    def _adopt(self, file: Stored) -> None:
        """Enter a file that the index does not know."""
        tenant, digest = file.tenant, file.digest
        try:
            head = self.folder.head(tenant, digest, HEAD)
            size = LENGTH + header_bytes(head)
            if size > HEAD:
                head = self.folder.head(tenant, digest, size)
            entry = entry_of(head, digest, file.nbytes, file.written)
        except FileNotFoundError:
            return
        except DamagedError:
            entry = None
        if entry is not None and entry.tenant == tenant:
            self._index.put(entry)
            return
        self.counts.damaged += 1
        self._ignored.add((tenant, digest))
        with suppress(OSError):
            self.folder.set_aside(self.folder.path(tenant, digest))

    def _put(self, record: Record, *, replaces: bool) -> Put:
        if self.limits:
            return Put.FAILED
        now = self._clock()
        try:
            data = record.encode()
            entry = entry_of(data, digest_of(data), len(data), now)
            others = self._index.find(record.kind, record.tenant, record.fingerprint, record.keys[0], CANDIDATES)
            if any(other.digest == entry.digest for other in others):
                return Put.THERE
            if replaces and any((o.generation, o.rank) > (entry.generation, entry.rank) for o in others):
                return Put.REFUSED
            room, gone = self._index.reserve(entry, self._limit(), self._oldest(now))
            self._unlink(gone)
            self.counts.evicted += len(gone)
            if not room:
                return Put.REFUSED
            return self._write(entry, data, others if replaces else [])
        except (OSError, sqlite3.Error, MemoryError) as error:
            self.counts.trouble = str(error) or "out of memory"
            return Put.FAILED

    def _write(self, entry: Entry, data: bytes, replaced: list[Entry]) -> Put:
        pair = (entry.tenant, entry.digest)
        try:
            self.folder.write(*pair, data)
        except OSError:
            self._forget([pair])
            raise
        self._index.put(entry)
        self.counts.written_bytes += entry.nbytes
        self._ignored.discard(pair)
        self._forget([(old.tenant, old.digest) for old in replaced])
        self._unlink(replaced)
        return Put.STORED

    def _trim(self, now: float) -> None:
        gone = self._index.trim(self._limit(), self._oldest(now))
        self._unlink(gone)
        self.counts.evicted += len(gone)

    def _limit(self) -> int:
        """Bytes that entries may have; what was set aside goes first where it takes more than a tenth."""
        if self.folder.overhead() > self.budget // 10 + SLACK:
            self.folder.empty_quarantine()
        return self.budget - self.folder.overhead() - SLACK

    def _oldest(self, now: float) -> float:
        return 0.0 if self.ttl is None else now - self.ttl

    def _expired(self, entry: Entry, now: float) -> bool:
        return entry.used < self._oldest(now)

    def _forget(self, pairs: list[tuple[str, str]]) -> None:
        with suppress(sqlite3.Error):
            self._index.drop(pairs)

    def _unlink(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            with suppress(OSError):
                self.folder.remove(entry.tenant, entry.digest)
