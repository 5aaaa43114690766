"""Finding what a prompt can be placed from: blocks that one earlier agent has read as they stand, then single pieces.

A match begins at a slot and goes on for as long as the reading it was found in continues with the prompt's own tokens,
fixed text included (docs/method.md, 5). Of several readings the one that carries furthest is taken; among equals, one
that holds this very content before one that holds the same text from elsewhere (a small model that repeats its
colleague).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from agentmesh.config.base import Choice
from agentmesh.kv.values import KV
from agentmesh.prompt.segments import ContentKind, Prompt, Segment
from agentmesh.reasons import Reason
from agentmesh.sharing.segments import Reading, SegmentStore, Span


class Relation(Choice):
    """What the reading's agent had to do with the matched text; offsets are learned for each relation."""

    HISTORY = "history"
    """It read it after the same tokens from the beginning on: no offset at all."""

    READ = "read"
    WROTE = "wrote"
    CORPUS = "corpus"

    COPIED = "copied"
    """It wrote these words after reading them in a text that is not in the prompt; placed from there (``repeats``)."""


GIVEN = (ContentKind.INPUT, ContentKind.DOCUMENT)
"""Kinds of contents that no agent of the run has written."""

REASONS = {
    Relation.HISTORY: Reason.SAME_HISTORY,
    Relation.READ: Reason.READ_BEFORE,
    Relation.WROTE: Reason.WRITTEN_BEFORE,
    Relation.CORPUS: Reason.FROM_CORPUS,
    Relation.COPIED: Reason.COPIED,
}


@dataclass(frozen=True)
class Match:
    """A run of a prompt's tokens that a reading holds.

    Args:
        start: first token in the prompt.
        stop: token after the last one with KV.
        first, last: the first and the last segment that it covers, wholly or up to a last token without KV.
        number, reading: where it was found.
        at: token of the reading that ``start`` corresponds to.
        relation: what the reading's agent had to do with it.
        depth: of its KV.
        kind: what its first content is.
        own: whether it was found in that very content, and not in another one with the same text.
    """

    start: int
    stop: int
    first: int
    last: int
    number: int
    reading: Reading
    at: int
    relation: Relation
    depth: int
    kind: ContentKind
    own: bool

    @property
    def tokens(self) -> int:
        """How many tokens it places at most."""
        return self.stop - self.start

    def cut(self, low: int, high: int) -> KV:
        """Stored KV of the prompt's tokens ``low`` to ``high``."""
        return self.reading.cut(low - self.start + self.at, high - self.start + self.at)

    def depths(self, low: int, high: int) -> bytes:
        """Depths of the stored KV of the prompt's tokens ``low`` to ``high``."""
        return self.reading.depths[low - self.start + self.at : high - self.start + self.at]

    def behind(self, prompt: Prompt, messages: int) -> Match | None:
        """What is left of it in a prompt behind its first so many messages; ``None`` where that is not two or more."""
        contents = [(at, prompt.segments[at].content) for at in range(self.first, self.last + 1)]
        said = [(at, one.kind) for at, one in contents if one is not None and one.kind not in GIVEN]
        if len(said) < messages + 2:
            return None
        first, kind = said[messages]
        start = prompt.starts[first]
        at = self.at + start - self.start
        depth = self.reading.depth(at, self.at + self.tokens)
        return replace(self, start=start, first=first, at=at, depth=depth, kind=kind)

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return self.reading.reader or "corpus"


@dataclass(frozen=True)
class Found:
    """Matches of a prompt in order, and why its other slots have none (by segment).

    ``lost``: whether there was KV for which the budget had no room, of the run or of a passage that the prompt reads;
    passages are looked for in deterministic runs only.
    """

    matches: tuple[Match, ...]
    missing: dict[int, Reason]
    lost: bool


@dataclass(frozen=True)
class Matcher:
    """Finds matches in a store.

    Args:
        store: the segment store.
        blocks: whether a match may go on over several segments.
        max_depth: deepest KV that is taken.
        oldest: whether a content's first reading in the run is taken, whatever carries further: for offsets that
            belong to the one base that they were measured from.
    """

    store: SegmentStore
    blocks: bool
    max_depth: int
    oldest: bool = False

    def match(self, prompt: Prompt, begin: int) -> Found:
        """All matches of a prompt from token ``begin`` on, left to right, the longest first at each slot."""
        matches: list[Match] = []
        missing: dict[int, Reason] = {}
        index, segments = 0, prompt.segments
        exact, lost = prompt.reader.sees is not None, self.store.has_lost(prompt.reader.run)
        while index < len(segments):
            segment = segments[index]
            if segment.content is None or prompt.starts[index] < begin or not segment.tokens:
                index += 1
                continue
            lost = lost or (exact and self._lost(prompt, index))
            found, reason = self._best(prompt, index)
            if found is None:
                missing[index] = reason
                index += 1
                continue
            matches.append(found)
            index = found.last + 1
        return Found(tuple(matches), missing, lost)

    def _lost(self, prompt: Prompt, index: int) -> bool:
        """Whether there was KV of what a slot holds for which the budget had no room."""
        segment, reader = prompt.segments[index], prompt.reader
        assert segment.content is not None, "asked of slots"
        return segment.content.deliver != "text" and self.store.was_evicted(segment.tokens, reader.run, reader.tenant)

    def _best(self, prompt: Prompt, index: int) -> tuple[Match | None, Reason]:
        """The match that begins at a slot and carries furthest, or why there is none."""
        content = prompt.segments[index].content
        assert content is not None
        if content.deliver == "text":
            return None, Reason.DELIVERED_AS_TEXT
        tokens, run, tenant = prompt.segments[index].tokens, prompt.reader.run, prompt.reader.tenant
        start = prompt.starts[index]
        found = known(self.store, prompt, start, start + len(tokens))
        candidates = [self._follow(prompt, index, *one) for one in found]
        if not candidates:
            evicted = self.store.was_evicted(tokens, run, tenant)
            return None, Reason.EVICTED if evicted else Reason.FIRST_READER
        usable = [match for match in candidates if isinstance(match, Match)]
        if not usable:
            return None, Reason.TOO_DEEP if Reason.TOO_DEEP in candidates else Reason.NO_KV
        return max(usable, key=self._rank), Reason.FIRST_READER

    def _rank(self, match: Match) -> tuple[int, ...]:
        """By what the best of several matches of a slot is told.

        Where all is exact, what its sender wrote is as shallow as what somebody read since; in a warm run it is
        shallower. Taking it in both teaches the links that warm runs ask.
        """
        if self.oldest:
            return match.own, -match.number
        history = match.relation is Relation.HISTORY
        written = match.relation is Relation.WROTE
        return history, match.last, match.own, -match.depth, written, match.stop, match.number

    def _follow(self, prompt: Prompt, index: int, number: int, reading: Reading, span: Span) -> Match | Reason:
        """How far a reading carries from a slot on, or whether its KV there is too deep or missing."""
        start, at = prompt.starts[index], span.start
        same = start == at and reading.tokens[:at] == prompt.tokens[:start]
        relation = Relation.CORPUS if not reading.reader else Relation.WROTE if span.written else Relation.READ
        last, stop, deep = index, 0, False
        reach = reading.reach(at)
        for step, segment in enumerate(prompt.segments[index:], index):
            low = prompt.starts[step] - start + at
            high = low + len(segment.tokens)
            limit = 255 if same else self.max_depth
            deep = reading.depth(low, min(high, reach)) > limit
            if deep or low >= reach or not _continues(reading, segment, low):
                break
            if segment.content is not None and segment.content.deliver == "text":
                break
            if same or segment.content is not None:
                last, stop = step, min(high, reach) - at + start
            if not self.blocks or high > reach:
                break
        stop = min(stop, len(prompt.tokens) - 1)
        if stop <= start:
            return Reason.TOO_DEEP if deep else Reason.NO_KV
        depth = reading.depth(at, stop - start + at)
        found = Relation.HISTORY if same else relation
        content = prompt.segments[index].content
        assert content is not None, "a match begins at a slot"
        own = span.origin == content.origin
        return Match(start, stop, index, last, number, reading, at, found, depth, content.kind, own)


def known(store: SegmentStore, prompt: Prompt, start: int, stop: int) -> Iterator[tuple[int, Reading, Span]]:
    """Readings from which a prompt's content at ``start`` to ``stop`` may be placed, as in ``SegmentStore.find``.

    An agent of an earlier process must have read the same tokens ahead of it, from the prompt's first content on: what
    a passage was to an agent that had read another question is no base that links know. What contexts of the same run
    do to it is what they learn.
    """
    reader, tokens, first = prompt.reader, prompt.tokens, prompt.first_content
    for number, reading, span in store.find(tokens[start:stop], reader.run, reader.tenant):
        begun = reading.spans[0].start
        if reading.run or not reading.reader or reading.tokens[begun : span.stop] == tokens[first:stop]:
            yield number, reading, span


def _continues(reading: Reading, segment: Segment, at: int) -> bool:
    """Whether a reading holds a segment's tokens at a place."""
    return reading.tokens[at : at + len(segment.tokens)] == segment.tokens
