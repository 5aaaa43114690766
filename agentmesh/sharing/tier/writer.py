"""What a process keeps in a store, written by a thread of its own: nobody waits for a disk.

The queue is bounded in bytes and counts in the memory budget. What finds no room in it is dropped and counted: it was
worth keeping, but is no loss that anybody has to know of.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from agentmesh.sharing.budget import Worth
from agentmesh.sharing.tier.disk import DiskStore
from agentmesh.sharing.tier.index import Entry


@dataclass(frozen=True)
class Job:
    """Something to do with the store, and the bytes of the tensors that wait for it."""

    work: Callable[[DiskStore], object]
    nbytes: int


@final
class Writer:
    """Owns the thread.

    Args:
        store: the writer's own way into the folder; closed with it.
        limit: bytes that may wait.
    """

    def __init__(self, store: DiskStore, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._working = 0
        self._idle = True
        self._waiting = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="agentmesh-store", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes that wait, and those of what is being written."""
        return self._waiting + self._working

    def evict(self, wanted: int, worth: Worth) -> int:
        """Give up what waits longest; see ``budget.Store``."""
        freed = 0
        with self._changed:
            while worth is Worth.IDLE and freed < wanted and any(job.nbytes for job in self._jobs):
                victim = next(job for job in self._jobs if job.nbytes)
                self._jobs.remove(victim)
                self._waiting -= victim.nbytes
                freed += victim.nbytes
                self._store.counts.dropped += 1
        return freed

    def takes(self, nbytes: int) -> bool:
        """Whether a job of that size would be taken now; counted as dropped where not."""
        room = self.nbytes + nbytes <= self._limit and not self._closing
        if not room:
            self._store.counts.dropped += 1
        return room

    def submit(self, work: Callable[[DiskStore], object], nbytes: int = 0) -> None:
        """Do something after what waits already; asked ``takes`` before, where it holds tensors."""
        with self._changed:
            self._jobs.append(Job(work, nbytes))
            self._waiting += nbytes
            self._changed.notify_all()

    def hit(self, entry: Entry) -> None:
        """Count that an entry was found and used, and note it in the folder."""
        self._store.counts.hits += 1
        self.touch(entry)

    def touch(self, entry: Entry) -> None:
        """Note in the folder that an entry is of use."""
        self.submit(lambda store: store.touch([(entry.tenant, entry.digest)]))

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until all is written; False where that takes longer than ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and self._idle, timeout)

    def close(self, timeout: float) -> None:
        """Write what waits, for so many seconds at most, and stop."""
        done = self.drain(timeout)
        with self._changed:
            self._closing = True
            if not done:
                self._store.counts.dropped += sum(bool(job.nbytes) for job in self._jobs)
                self._jobs.clear()
                self._waiting = 0
            self._changed.notify_all()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    break
                job = self._jobs.popleft()
                self._waiting -= job.nbytes
                self._working, self._idle = job.nbytes, False
            try:
                job.work(self._store)
            except (RuntimeError, MemoryError) as error:  # torch's word for memory that is not to be had
                self._store.counts.failed += 1
                self._store.counts.trouble = str(error) or "out of memory"
            finally:
                with self._changed:
                    self._working, self._idle = 0, True
                    self._changed.notify_all()
        self._store.close()
