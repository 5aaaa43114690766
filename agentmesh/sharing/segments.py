"""The segment store: position-free KV of what agents of a run have read and written, and of corpus passages.

It keeps *readings*: the tokens of one call's prompt and message with the KV of the part that others may read. A content
(a question, a message, a passage) is found in it by its token ids, which are compared on every hit. Because neighbours
stay together, a run of segments that one agent has read in the same order can be placed as one block
(docs/method.md, 5).

Every token carries its depth: 0 where a model computed it after nothing but exact KV, 1 where it was computed after
realigned KV, and one more for every time it was placed since. Exact and approximate contents are indexed apart, so a
reader that asks for exact KV never sees the others.

Exact here means exact to rounding. KV that a message got while it was decoded (``Span.written``), and all that was
turned to another position and back, differ from a prefill of the same tokens in the last bits. They have depth 0 as
well, and may stand before the truth of an observation; bit for bit the same is what the prefix store holds alone, and
nothing that was decoded or placed from here ever enters it.

One owner (a communicator) uses a store from one thread.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from agentmesh.kv.values import KV, join
from agentmesh.sharing.budget import Budget, Worth

NEVER = 1 << 30


@dataclass(frozen=True)
class Span:
    """Where a content lies in a reading: tokens ``start`` to ``stop``; ``written`` where its agent wrote it."""

    key: bytes
    origin: str
    start: int
    stop: int
    written: bool = False


@dataclass(frozen=True)
class Rows:
    """KV of a reading's tokens from ``start`` on."""

    start: int
    kv: KV

    @property
    def stop(self) -> int:
        """The token after the last one."""
        return self.start + self.kv.tokens


@dataclass(frozen=True)
class Reading:
    """What one call read and wrote.

    Args:
        run: the run it belongs to; empty for passages of a corpus.
        reader: the agent, by name; empty for passages of a corpus.
        tokens: prompt and message.
        spans: the contents in it.
        rows: position-free KV of parts of it, ascending.
        depths: one for each token.
        tenant: for whom it was read; nobody else is given it.
        weights: of a passage, what its later text takes from each token, fp32 ``[T]``; ``None`` where nobody knows.
    """

    run: str
    reader: str
    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    rows: tuple[Rows, ...]
    depths: bytes
    tenant: str = ""
    weights: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its KV, and of its weights."""
        return sum(rows.kv.nbytes for rows in self.rows) + (0 if self.weights is None else self.weights.nbytes)

    def reach(self, start: int) -> int:
        """The token up to which there is KV without a gap from ``start`` on."""
        at = start
        for rows in self.rows:
            if rows.start <= at < rows.stop:
                at = rows.stop
        return at

    def cut(self, start: int, stop: int) -> KV:
        """KV of tokens ``start`` to ``stop``: a view where one piece holds them."""
        pieces = [
            rows.kv.cut(max(start, rows.start) - rows.start, min(stop, rows.stop) - rows.start)
            for rows in self.rows
            if rows.start < stop and start < rows.stop
        ]
        found = pieces[0] if len(pieces) == 1 else join(pieces)
        assert found.tokens == stop - start, f"no KV for all of {start}:{stop}"
        return found

    def depth(self, start: int, stop: int) -> int:
        """The largest depth of tokens ``start`` to ``stop``."""
        return max(self.depths[start:stop], default=0)


@dataclass
class _Kept:
    """A reading in the store, and when it is wanted."""

    reading: Reading
    born: int
    awaited: dict[str, int]
    pins: int = 0

    @property
    def next_use(self) -> int:
        """Visits of its run until somebody reads a part of it."""
        return min(self.awaited.values(), default=NEVER)

    @property
    def saves(self) -> float:
        """Content tokens that need not be computed, by byte: each costs about the same time."""
        return sum(span.stop - span.start for span in self.reading.spans) / max(self.reading.nbytes, 1)


@dataclass
class SegmentStore:
    """Readings under a shared byte budget.

    Evicted first is what no run awaits; then what is read furthest in the future of its run; among equals what saves
    least by byte, then the oldest. Pinned readings stay.

    Args:
        budget: the limit that it shares with other stores.
        root: what KV depends on besides tokens and tenant: the model's fingerprint.
    """

    budget: Budget
    root: bytes
    nbytes: int = 0
    _kept: dict[int, _Kept] = field(default_factory=dict)
    _exact: dict[bytes, set[int]] = field(default_factory=dict)
    _approximate: dict[bytes, set[int]] = field(default_factory=dict)
    _lost: dict[str, set[bytes]] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self.budget.join(self)

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, tokens: Sequence[int], tenant: str = "") -> bytes:
        """The name of a tenant's content."""
        return hashlib.sha256(self.root + tenant.encode() + b"\0" + array("q", tokens).tobytes()).digest()

    def add(self, reading: Reading, awaited: Mapping[str, int]) -> int | None:
        """Keep a reading.

        Args:
            reading: what to keep; its tensors must be owned by nobody else.
            awaited: visits of the run until each content, by origin, is read again.

        Returns:
            Its number, or ``None`` where the budget has no room for it.
        """
        origins = {span.origin for span in reading.spans}
        most = Worth.LATER if origins.isdisjoint(awaited) else Worth.AWAITED
        if not self.budget.room(reading.nbytes, most):
            self._note_lost(reading)
            return None
        number, self._count = self._count, self._count + 1
        self._kept[number] = _Kept(reading, number, {o: awaited[o] for o in origins if o in awaited})
        self._index(number, reading)
        self.nbytes += reading.nbytes
        if not reading.run:
            self._lost.get("", set()).difference_update(span.key for span in reading.spans)
        return number

    def extend(
        self,
        number: int,
        message: Span,
        tokens: Sequence[int],
        rows: Rows | None,
        depth: int,
        awaited: Mapping[str, int],
    ) -> None:
        """Add the message that a call wrote to the reading of its prompt; without effect where that was evicted."""
        kept = self._kept.get(number)
        if kept is None:
            return
        old = kept.reading
        if rows is not None and not self._room_beside(kept, rows.kv.nbytes):
            self._lost.setdefault(old.run, set()).add(message.key)
            return
        kept.reading = replace(
            old,
            tokens=(*old.tokens, *tokens),
            spans=(*old.spans, message),
            rows=old.rows if rows is None else (*old.rows, rows),
            depths=old.depths + bytes([depth] * len(tokens)),
        )
        if message.origin in awaited:
            kept.awaited[message.origin] = awaited[message.origin]
        self._index(number, kept.reading)
        self.nbytes += kept.reading.nbytes - old.nbytes

    def find(
        self, tokens: Sequence[int], run: str, tenant: str = "", *, exact: bool = False
    ) -> Iterator[tuple[int, Reading, Span]]:
        """Readings of a run, and passages, that hold a content, the newest first.

        Args:
            tokens: the content.
            run: whose readings.
            tenant: for whom the run is; a hash collision with another tenant's content is a miss.
            exact: whether only exact KV will do.
        """
        key = self.key(tokens, tenant)
        numbers = self._exact.get(key, set()) | (set() if exact else self._approximate.get(key, set()))
        for number in sorted(numbers, reverse=True):
            reading = self._kept[number].reading
            if reading.run not in (run, "") or reading.tenant != tenant:
                continue
            for span in reading.spans:
                if span.key == key and reading.tokens[span.start : span.stop] == tuple(tokens):
                    yield number, reading, span

    def readings(self, run: str) -> Iterator[tuple[int, Reading]]:
        """What a run's agents have read and written, by number, the oldest first."""
        return ((number, kept.reading) for number, kept in self._kept.items() if kept.reading.run == run)

    def was_evicted(self, tokens: Sequence[int], run: str, tenant: str = "") -> bool:
        """Whether a run read this content, or a corpus held it, and the budget had no room for it."""
        key = self.key(tokens, tenant)
        return key in self._lost.get(run, ()) or key in self._lost.get("", ())

    def note_lost(self, tokens: Sequence[int], run: str, tenant: str) -> None:
        """Note that there was no room for the KV of a content that a run's agent wrote."""
        self._lost.setdefault(run, set()).add(self.key(tokens, tenant))

    def has_lost(self, run: str) -> bool:
        """Whether the budget had no room for any KV that a run has made."""
        return bool(self._lost.get(run))

    def pin(self, number: int) -> None:
        """Keep a reading until ``unpin``, whatever the budget says; pins count."""
        self._kept[number].pins += 1

    def unpin(self, number: int) -> None:
        """Take one pin back."""
        if number in self._kept:
            self._kept[number].pins -= 1

    def pass_on(self, run: str, awaited: Mapping[str, int]) -> None:
        """Note what a run's later visits still read."""
        for kept in self._kept.values():
            if kept.reading.run == run:
                origins = {span.origin for span in kept.reading.spans}
                kept.awaited = {origin: awaited[origin] for origin in origins if origin in awaited}

    def release(self, run: str) -> None:
        """Free everything that a finished run kept."""
        for number in [number for number, kept in self._kept.items() if kept.reading.run == run]:
            self._drop(number)
        self._lost.pop(run, None)

    def evict(self, wanted: int, worth: Worth) -> int:
        """Drop readings nobody awaits (``IDLE``), then awaited ones, furthest first; see ``budget.Store``."""
        if worth is Worth.LATER:
            return 0
        idle = worth is Worth.IDLE
        candidates = [
            (number, kept) for number, kept in self._kept.items() if not kept.pins and (kept.next_use == NEVER) is idle
        ]
        candidates.sort(key=lambda item: (-item[1].next_use, item[1].saves, item[1].born))
        freed = 0
        for number, kept in candidates:
            if freed >= wanted:
                break
            freed += kept.reading.nbytes
            self._note_lost(kept.reading)
            self._drop(number)
        return freed

    def _note_lost(self, reading: Reading) -> None:
        if reading.run or not reading.reader:  # of a store's readings nothing is lost: they can be read again
            self._lost.setdefault(reading.run, set()).update(span.key for span in reading.spans)

    def _room_beside(self, kept: _Kept, need: int) -> bool:
        kept.pins += 1
        room = self.budget.room(need)
        kept.pins -= 1
        return room

    def _index(self, number: int, reading: Reading) -> None:
        for span in reading.spans:
            exact = reading.depth(span.start, span.stop) == 0
            (self._exact if exact else self._approximate).setdefault(span.key, set()).add(number)

    def _drop(self, number: int) -> None:
        kept = self._kept.pop(number)
        self.nbytes -= kept.reading.nbytes
        for span in kept.reading.spans:
            for index in (self._exact, self._approximate):
                numbers = index.get(span.key, set())
                numbers.discard(number)
                if not numbers:
                    index.pop(span.key, None)
