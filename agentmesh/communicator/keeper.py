"""What sharing presets keep of a call: exact beginnings as prefixes, and readings for the run's later visits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from typing_extensions import Self

from agentmesh.communicator.base import Plan, root_of
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.composition import Placement
from agentmesh.kv.arena import Arena
from agentmesh.kv.rope import Rope
from agentmesh.prompt.segments import Content, Prompt
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.prefix import PrefixStore
from agentmesh.sharing.segments import Reading, Rows, SegmentStore, Span

LOW_WATERMARK = 0.9
LAST = 1 << 20
"""Visits until what is read when the run is over: more than any run has, so that visits go first."""

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
        self._fingerprint = fingerprint
        self.rope = rope
        self.budget = Budget(spec.budget, LOW_WATERMARK)
        self.segments = SegmentStore(self.budget, fingerprint.encode())
        self.prefixes = PrefixStore(self.budget)

    @property
    def nbytes(self) -> int:
        """Bytes of prefixes and segments."""
        return self.segments.nbytes + self.prefixes.nbytes

    def lead(self, prompt: Prompt) -> list[Placement]:
        """The longest exact prefix of a prompt, piece by piece."""
        placed: list[Placement] = []
        for kv in self.prefixes.match(self._root(prompt), prompt.tokens, prompt.points):
            placed.append(Placement(placed[-1].stop if placed else 0, kv))
        return placed

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
        reader = prompt.reader
        if not reader.run:
            return
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
        if not message or not plan.kept or not wanted:
            return
        stop = min(arena.length, begin + len(message))
        rows = Rows(begin, arena.read_free(begin, stop, self.rope)) if stop > begin else None
        span = Span(self.segments.key(message, reader.tenant), reader.writes, begin, begin + len(message), written=True)
        self.segments.extend(plan.kept[0], span, message, rows, int(plan.approximate), reader.awaited)

    def knows(self, tokens: tuple[int, ...], tenant: str) -> bool:
        """Whether a passage of a corpus is kept for a tenant."""
        return next(self.segments.find(tokens, "", tenant), None) is not None

    def keep_passage(self, content: Content, begin: int, arena: Arena, tenant: str) -> bool:
        """Keep a passage whose KV stands at row ``begin`` of an arena, behind a neutral header; False without room."""
        tokens = content.tokens or ()
        rows = Rows(0, arena.read_free(begin, begin + len(tokens), self.rope))
        span = Span(self.segments.key(tokens, tenant), content.origin, 0, len(tokens))
        reading = Reading("", "", tokens, (span,), (rows,), bytes(len(tokens)), tenant)
        return self.segments.add(reading, {}) is not None

    def _root(self, prompt: Prompt) -> bytes:
        return root_of(self._fingerprint, prompt.reader.tenant)

    def _keep_prefix(self, prompt: Prompt, plan: KeptPlan, arena: Arena) -> None:
        points, end = tuple(point for point in prompt.points if point <= plan.exact_until), len(prompt.tokens)
        whole = prompt.continues and plan.exact_until == end
        if whole and end - (points[-1] if points else 0) >= self._min_tokens:
            points = (*points, end)
        self.prefixes.insert(self._root(prompt), prompt.tokens, points, arena.read)
