"""What sharing presets keep of a call: exact beginnings as prefixes, and readings for the run's later visits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from typing_extensions import Self

from agentmesh.communicator.base import Plan
from agentmesh.communicator.beginnings import Beginnings
from agentmesh.communicator.persistence import ANYBODY, PASSAGES, Persistence
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.composition import Placement
from agentmesh.kv.arena import Arena
from agentmesh.kv.rope import Rope
from agentmesh.prompt.segments import Content, ContentKind, Prompt
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.matching import known
from agentmesh.sharing.prefix import PrefixStore
from agentmesh.sharing.segments import Reading, Rows, SegmentStore, Span

LOW_WATERMARK = 0.9
LAST = 1 << 20
"""Visits until what is read when the run is over: more than any run has, so that visits go first."""

OUTLIVING = (ContentKind.INPUT, ContentKind.DOCUMENT)
"""What later runs may read again; messages and results are made anew by each run."""

PlanT = TypeVar("PlanT", bound="KeptPlan")


@dataclass(frozen=True)
class KeptPlan(Plan):
    """A plan, with what keeping its KV needs to know.

    Args:
        depths: one for each prompt token; 0 where its KV is exact.
        exact_until: first token that is not an exact prefix or computed behind nothing else.
        teaches: whether its call may be learned from.
        pinned: readings that the call uses, by number.
        kept: the number of the call's own reading, once it has one.
    """

    depths: bytes = b""
    exact_until: int = 0
    teaches: bool = True
    pinned: tuple[int, ...] = ()
    kept: list[int] = field(default_factory=list)

    @property
    def approximate(self) -> bool:
        """Whether anything in the prompt's KV is not exact."""
        return any(self.depths)

    def as_dense(self) -> Self:
        """The plan of a call whose arena holds a dense prefill instead of what was planned."""
        return replace(self, depths=bytes(len(self.depths)), exact_until=0)


class Keeper:
    """Owns a preset's prefixes and segments, under one budget.

    Args:
        spec: the budget, and what is too short to keep.
        fingerprint: of the model.
        rope: the model's rotation.
    """

    def __init__(self, spec: CommunicatorSpec, fingerprint: str, rope: Rope) -> None:
        self._min_tokens = spec.min_tokens
        self.rope = rope
        self.budget = Budget(spec.budget, LOW_WATERMARK)
        self.segments = SegmentStore(self.budget, fingerprint.encode())
        self.beginnings = Beginnings(PrefixStore(self.budget), fingerprint)
        self._kept: Persistence | None = None
        self._made: dict[str, set[tuple[int, ...]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of prefixes and segments."""
        return self.segments.nbytes + self.beginnings.store.nbytes

    def lead(self, prompt: Prompt) -> tuple[list[Placement], bool]:
        """The longest exact prefix of a prompt, piece by piece, and whether a longer one of its run found no room.

        A prefix decides what is placed exactly and what is realigned. So deterministic runs, beyond fixed text, take
        those alone that they have made themselves: what other runs have left depends on when they ran.
        """
        placed: list[Placement] = []
        for kv in self.beginnings.match(prompt):
            placed.append(Placement(placed[-1].stop if placed else 0, kv))
        if prompt.reader.sees is None:
            return placed, False
        made = self._made.get(prompt.reader.run, set())
        own = max((point for point in prompt.points if prompt.tokens[:point] in made), default=0)
        until = max(own, prompt.first_content)
        kept = [piece for piece in placed if piece.stop <= until]
        return kept, own > (kept[-1].stop if kept else 0)

    def release(self, run: str) -> None:
        """Free what a finished run needed."""
        self.segments.release(run)
        self._made.pop(run, None)

    def pin(self, plan: KeptPlan) -> None:
        """Hold what a plan places until ``let_go``."""
        for number in plan.pinned:
            self.segments.pin(number)

    def let_go(self, plan: KeptPlan) -> None:
        """Unpin what a call read and wrote."""
        for number in (*plan.pinned, *plan.kept):
            self.segments.unpin(number)

    def keep_prompt(self, prompt: Prompt, plan: KeptPlan, arena: Arena) -> None:
        """Keep the prompt's exact beginning, and a reading of its contents where a later visit reads one of them."""
        self._keep_prefix(prompt, plan, arena)
        if prompt.reader.run:
            self._keep_exact(prompt, plan, arena)
            self._keep_reading(prompt, plan, arena)

    @staticmethod
    def awaited_tokens(prompt: Prompt) -> int:
        """Tokens of a prompt that a reading of it would hold, without its message."""
        reader, contents = prompt.reader, [segment.content for segment in prompt.segments]
        read = any(content is not None and content.origin in reader.awaited for content in contents)
        return len(prompt.tokens) if reader.run and (read or prompt.continues) else 0

    def _keep_reading(self, prompt: Prompt, plan: KeptPlan, arena: Arena) -> None:
        reader = prompt.reader
        wanted = {**dict.fromkeys(reader.held, LAST), **reader.awaited}
        self.segments.pass_on(reader.run, wanted)
        spans = tuple(
            Span(self.segments.key(tokens, reader.tenant), segment.content.origin, start, start + len(tokens))
            for segment, start in zip(prompt.segments, prompt.starts, strict=True)
            if segment.content is not None and (tokens := segment.tokens)
        )
        read = bool(spans) and (prompt.continues or any(span.origin in reader.awaited for span in spans))
        if not read and reader.writes not in reader.awaited:
            return
        rows: tuple[Rows, ...] = ()
        if read:
            stop = len(prompt.tokens) if prompt.continues else spans[-1].stop
            rows = (Rows(spans[0].start, arena.read_free(spans[0].start, stop, self.rope)),)
        found = spans if read else ()
        reading = Reading(reader.run, reader.consumer, prompt.tokens, found, rows, plan.depths, reader.tenant)
        number = self.segments.add(reading, wanted)
        if number is not None:
            self.segments.pin(number)
            plan.kept.append(number)

    def keep_message(self, prompt: Prompt, plan: KeptPlan, arena: Arena, message: tuple[int, ...]) -> None:
        """Keep the KV that the message got while it was decoded, where a later visit reads it."""
        reader, begin = prompt.reader, len(prompt.tokens)
        wanted = reader.writes in reader.awaited or prompt.continues
        if message and not plan.kept and reader.writes in reader.awaited:
            self.segments.note_lost(message, reader.run, reader.tenant)
        if not message or not plan.kept or not wanted:
            return
        stop = min(arena.length, begin + len(message))
        rows = Rows(begin, arena.read_free(begin, stop, self.rope)) if stop > begin else None
        span = Span(self.segments.key(message, reader.tenant), reader.writes, begin, begin + len(message), written=True)
        self.segments.extend(plan.kept[0], span, message, rows, int(plan.approximate), reader.awaited)

    def knows(self, tokens: tuple[int, ...], tenant: str) -> bool:
        """Whether a passage of a corpus is kept for a tenant."""
        return any(not reading.reader for _, reading, _ in self.segments.find(tokens, "", tenant))

    def attach(self, kept: Persistence, *, readings: bool) -> None:
        """Keep prefixes beyond this process, and readings where the preset can use them again."""
        self.beginnings.kept = kept
        self._kept = kept if readings else None
        self.budget.join(kept.writer)

    def recall(self, prompt: Prompt, begin: int) -> None:
        """Bring back into memory what earlier runs have read of a prompt from token ``begin`` on."""
        reader = prompt.reader
        if self._kept is None or not reader.run or reader.exact:
            return
        for segment, start in zip(prompt.segments, prompt.starts, strict=True):
            content, tokens, stop = segment.content, segment.tokens, start + len(segment.tokens)
            if content is None or content.kind not in OUTLIVING or content.deliver == "text":
                continue
            if start < begin or len(tokens) < self._min_tokens:
                continue
            if next(known(self.segments, prompt, start, stop), None) is None:
                read = prompt.tokens[prompt.first_content : stop]
                wanted = ((reader.consumer, read), (PASSAGES, tokens), (ANYBODY, read))
                self._kept.recall(self.segments, reader.tenant, wanted)

    def recall_passage(self, tokens: tuple[int, ...], tenant: str) -> bool:
        """Bring a passage of a corpus back into memory."""
        if self._kept is None:
            return False
        self._kept.next_prompt()
        return self._kept.recall(self.segments, tenant, ((PASSAGES, tokens),))

    def passage(self, content: Content, begin: int, arena: Arena, weights: torch.Tensor | None, tenant: str) -> Reading:
        """The reading of a passage whose KV stands at row ``begin`` of an arena, behind a neutral header."""
        tokens = content.tokens or ()
        rows = Rows(0, arena.read_free(begin, begin + len(tokens), self.rope))
        span = Span(self.segments.key(tokens, tenant), content.origin, 0, len(tokens))
        return Reading("", "", tokens, (span,), (rows,), bytes(len(tokens)), tenant, weights)

    def keep_passage(self, reading: Reading) -> bool:
        """Keep a passage; False without room."""
        if self._kept is not None and self._kept.wants(reading):
            self._kept.keep_reading(reading)
        return self.segments.add(reading, {}) is not None

    def _keep_exact(self, prompt: Prompt, plan: KeptPlan, arena: Arena) -> None:
        """Keep what is exact of the inputs and documents that are read for the first time, beyond this process."""
        reading = exact_reading(prompt, plan.depths, self.segments)
        if self._kept is None or reading is None:
            return
        found = [next(known(self.segments, prompt, span.start, span.stop), None) for span in reading.spans]
        longest = max(span.stop - span.start for span in reading.spans)
        if None in found and longest >= self._min_tokens and self._kept.wants(reading):
            start, stop = reading.spans[0].start, len(reading.tokens)
            self._kept.keep_reading(replace(reading, rows=(Rows(start, arena.read_free(start, stop, self.rope)),)))

    def _keep_prefix(self, prompt: Prompt, plan: KeptPlan, arena: Arena) -> None:
        points, end = tuple(point for point in prompt.points if point <= plan.exact_until), len(prompt.tokens)
        whole = prompt.continues and plan.exact_until == end
        if whole and end - (points[-1] if points else 0) >= self._min_tokens:
            points = (*points, end)
        if prompt.reader.sees is not None and prompt.reader.run:
            begin, made = prompt.first_content, self._made.setdefault(prompt.reader.run, set())
            made.update(prompt.tokens[:point] for point in points if point > begin)
        self.beginnings.keep(prompt, points, arena)


def exact_reading(prompt: Prompt, depths: bytes, segments: SegmentStore) -> Reading | None:
    """The prompt up to the last of its first inputs and documents that are exact, without KV; ``None`` without any.

    Args:
        prompt: the prompt.
        depths: one for each token.
        segments: gives contents their names.
    """
    spans: list[Span] = []
    reader = prompt.reader
    for segment, start in zip(prompt.segments, prompt.starts, strict=True):
        content, stop = segment.content, start + len(segment.tokens)
        if content is None and not spans:
            continue
        if any(depths[start:stop]) or (content is not None and content.kind not in OUTLIVING):
            break
        if content is not None and segment.tokens:
            spans.append(Span(segments.key(segment.tokens, reader.tenant), content.origin, start, stop))
    if not spans:
        return None
    end = spans[-1].stop
    return Reading(reader.run, reader.consumer, prompt.tokens[:end], tuple(spans), (), bytes(end), reader.tenant)
