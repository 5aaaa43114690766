"""What outlives a process: exact prefixes, exact readings of inputs and documents, passages, and what links learned.

A later run may use only what a cold one would have computed itself, or learned: KV of depth 0, and a link's statistics
with its audits and its breaker, for the same texts of all agents. So a miss costs time and never changes what is right.

Everything is keyed by tenant and by the identity of model and machine. What a link has learned, and what an agent read,
is keyed by the texts of the mesh's agents and the preset's choices, too. Keys are hashes; what they stand for is
compared after loading. Called on the engine's thread only, which reads at most ``READ_BYTES`` for a prompt, and for
``READ_SECONDS``; what is to be kept goes to a writer's thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import final

import torch

from agentmesh.communicator.links import KeptLinks
from agentmesh.communicator.scope import Scope, key_of
from agentmesh.kv.values import KV, Frame
from agentmesh.sharing.segments import Reading, Rows, SegmentStore, Span
from agentmesh.sharing.tier.disk import DiskStore
from agentmesh.sharing.tier.index import Entry
from agentmesh.sharing.tier.records import Record
from agentmesh.sharing.tier.writer import Writer

READ_BYTES = 256 * 2**20
READ_SECONDS = 0.5
TOUCH_SECONDS = 600.0
DRAIN_SECONDS = 60.0
KNOWN = 100_000
ANYBODY, PASSAGES = "*", ""
"""Names that stand for every agent, and for passages of a corpus, which no agent has read."""


class _Allowance:
    """What may still be read for one prompt."""

    def __init__(self) -> None:
        self._bytes = READ_BYTES
        self._until = time.monotonic() + READ_SECONDS

    def takes(self, entry: Entry) -> bool:
        """Whether an entry may be read; counted if so."""
        allowed = entry.nbytes <= self._bytes and time.monotonic() < self._until
        self._bytes -= entry.nbytes * allowed
        return allowed


@final
class Persistence:
    """A preset's way to a persistent store.

    Args:
        store: the engine's thread's own way into the folder; closed with this.
        scope: whose it is.
        memory: bytes that may wait to be written.
        reads: whether anything is read; deterministic runs write only, so that what is shared depends on no folder.

    ``links`` keeps what links have learned.
    """

    def __init__(self, store: DiskStore, scope: Scope, memory: int, *, reads: bool) -> None:
        self.store = store
        self.writer = Writer(store.twin(), memory)
        self._scope = scope
        self._reads = reads
        self.links = KeptLinks(store, self.writer, scope, reads=reads)
        self._allowance = _Allowance()
        self._seen: dict[tuple[str, str], float] = {}

    def next_prompt(self) -> None:
        """A prompt is about to be planned: as much may be read for it as for every other one."""
        self._allowance = _Allowance()

    def piece(self, tenant: str, tokens: Sequence[int], cuts: Sequence[int]) -> KV | None:
        """The KV of a prefix's last piece, in the absolute frame.

        Args:
            tenant: for whom.
            tokens: the prefix.
            cuts: its reuse points; the last one is its end.
        """
        if not self._reads:
            return None
        start = cuts[-2] if len(cuts) > 1 else 0
        for entry, record in self._records("prefix", tenant, self._piece_key(tokens, cuts)):
            if _ints(record, "tokens") != tuple(tokens) or record.about.get("cuts") != list(cuts):
                continue
            kv = self._kv(record, Frame.ABSOLUTE, len(tokens) - start)
            if kv is not None:
                self.writer.hit(entry)
                return kv
            self.store.reject(entry)
        self.store.counts.misses += 1
        return None

    def keep_piece(self, tenant: str, tokens: Sequence[int], cuts: tuple[int, ...], kv: KV) -> None:
        """Keep the last piece of a prefix."""
        key = self._piece_key(tokens, cuts)
        if self._new("prefix", tenant, key) and self.writer.takes(kv.nbytes):
            tensors = {"tokens": torch.tensor(tokens), "keys": kv.keys, "values": kv.values}
            self._write(Record("prefix", tenant, self._scope.identity, (key,), tensors, {"cuts": cuts}, kv.tokens))

    def recall(self, segments: SegmentStore, tenant: str, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> bool:
        """Bring a reading of a content back into memory; whether one was found.

        Args:
            segments: the memory.
            tenant: for whom.
            wanted: whose readings will do (an agent, ``PASSAGES`` or ``ANYBODY``), and their tokens from their first
                content to the end of this one; the best first.
        """
        if not self._reads:
            return False
        for whose, tokens in wanted:
            for entry, record in self._records("reading", tenant, self._content_key(whose, tokens)):
                reading = self._reading(record, segments)
                if reading is None:
                    self.store.reject(entry)
                elif self._holds(reading, tokens, whose, record) and segments.add(reading, {}) is not None:
                    self.writer.hit(entry)
                    return True
        self.store.counts.misses += 1
        return False

    def wants(self, reading: Reading) -> bool:
        """Whether a reading would be new to the store, and has room in the queue; its KV need not be there yet."""
        spans, shape = reading.spans, self._scope.shape
        if reading.reader and reading.reader not in self._scope.consumers:
            return False
        key = self._content_key(reading.reader, reading.tokens[spans[0].start :])
        nbytes = shape.bytes_per_token * (spans[-1].stop - spans[0].start)
        return self._new("reading", reading.tenant, key) and self.writer.takes(nbytes)

    def keep_reading(self, reading: Reading) -> None:
        """Keep an exact reading: its KV in one piece from its first content to its last."""
        assert not any(reading.depths), "only exact KV outlives its run"
        (rows,) = reading.rows
        begun = [reading.tokens[rows.start : span.stop] for span in reading.spans]
        names = (reading.reader, ANYBODY) if reading.reader else (PASSAGES,)
        about = {
            "reader": reading.reader,
            "mesh": self._scope.mesh if reading.reader else "",
            "start": rows.start,
            "spans": [[span.start, span.stop, span.origin] for span in reading.spans],
        }
        tensors = {
            "tokens": torch.tensor(reading.tokens),
            "depths": torch.tensor(list(reading.depths), dtype=torch.uint8),
            "keys": rows.kv.keys,
            "values": rows.kv.values,
        }
        if not reading.reader:
            tensors["weights"] = torch.zeros(0) if reading.weights is None else reading.weights
        keys = tuple(self._content_key(name, tokens) for name in names for tokens in begun)
        self._write(
            Record("reading", reading.tenant, self._scope.identity, keys, tensors, about, tokens=rows.kv.tokens)
        )

    def close(self) -> None:
        """Write what waits, and let go of the folder."""
        self.writer.close(DRAIN_SECONDS)
        self.store.close()

    def _records(self, kind: str, tenant: str, key: str) -> Iterator[tuple[Entry, Record]]:
        """Files of a key that may still be read for this prompt."""
        for entry in self.store.find(kind, tenant, self._scope.identity, key):
            if self._allowance.takes(entry) and (record := self.store.get(entry)) is not None:
                yield entry, record

    def _kv(self, record: Record, frame: Frame, tokens: int) -> KV | None:
        """A record's KV, where it has the model's own shape."""
        shape, wanted = self._scope.shape, ("keys", "values")
        size = (shape.layers, shape.heads, tokens, shape.head_dim)
        found = [record.tensors[name] for name in wanted if name in record.tensors]
        if len(found) < 2 or any(tensor.shape != size or tensor.dtype != shape.dtype for tensor in found):
            return None
        return KV(found[0].to(shape.device), found[1].to(shape.device), frame)

    def _reading(self, record: Record, segments: SegmentStore) -> Reading | None:
        """A record as a reading of nobody's run; ``None`` where it is not one of exact KV, or lacks weights."""
        tokens, depths, about = _ints(record, "tokens"), _ints(record, "depths"), record.about
        try:
            start, reader = int(about["start"]), str(about["reader"])
            spans = tuple(
                Span(segments.key(tokens[low:high], record.tenant), str(origin), int(low), int(high))
                for low, high, origin in about["spans"]
            )
        except (KeyError, TypeError, ValueError):
            return None
        ordered = all(start <= span.start < span.stop <= len(tokens) for span in spans)
        kv = self._kv(record, Frame.FREE, len(tokens) - start)
        if not spans or not ordered or kv is None or any(depths) or len(depths) != len(tokens):
            return None
        rows, weights = (Rows(start, kv),), record.tensors.get("weights")
        if reader:
            return Reading("", reader, tokens, spans, rows, bytes(len(tokens)), record.tenant)
        if weights is None or len(weights) not in (0, len(tokens)):
            return None
        known = weights if len(weights) else None
        return Reading("", "", tokens, spans, rows, bytes(len(tokens)), record.tenant, known)

    def _holds(self, reading: Reading, tokens: tuple[int, ...], whose: str, record: Record) -> bool:
        """Whether a reading is what its key promised."""
        right = record.about.get("mesh") == self._scope.mesh if reading.reader else not whose
        whole = whose in (ANYBODY, reading.reader)
        begun = (reading.tokens[reading.spans[0].start : span.stop] for span in reading.spans)
        return right and whole and tokens in begun

    def _piece_key(self, tokens: Sequence[int], cuts: Sequence[int]) -> str:
        return key_of("prefix", json.dumps(list(cuts)), tokens=tokens)

    def _content_key(self, reader: str, tokens: Sequence[int]) -> str:
        return key_of("content", self._scope.mesh if reader else "", reader, tokens=tokens)

    def _new(self, kind: str, tenant: str, key: str) -> bool:
        """Whether nothing is kept under a key; what is, is noted as used from time to time."""
        now, known = time.monotonic(), (tenant, key)
        if now - self._seen.get(known, -TOUCH_SECONDS) < TOUCH_SECONDS:
            return False
        if len(self._seen) >= KNOWN:
            self._seen.clear()
        there = self.store.find(kind, tenant, self._scope.identity, key)
        if there:
            self._seen[known] = now
            self.writer.touch(there[0])
        return not there

    def _write(self, record: Record) -> None:
        nbytes = record.tensors["keys"].nbytes + record.tensors["values"].nbytes
        now = time.monotonic()
        self._seen.update({(record.tenant, key): now for key in record.keys})
        self.writer.submit(lambda store: store.put(record), nbytes)


def _ints(record: Record, name: str) -> tuple[int, ...]:
    return tuple(record.tensors[name].tolist()) if name in record.tensors else ()
