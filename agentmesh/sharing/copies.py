"""Words that a source copied from a text its reader does not see.

An agent that hands on what it was handed writes the same words again. The KV that they got while it wrote them says
that they stood further ahead already; for a reader who sees them for the first time that is wrong, and no learned
offset restores what is missing. The rows of an agent that *read* those words are the nearer base: it, too, saw them for
the first time then (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from agentmesh.prompt.segments import Prompt
from agentmesh.sharing.matching import Match, Relation
from agentmesh.sharing.segments import AHEAD, Place, Reading, SegmentStore

SHORTEST = 8
"""Fewer tokens are not worth a piece of their own."""


@dataclass(frozen=True)
class _Found:
    """Where a reading holds the same tokens as a prompt does from some token on, and for how many tokens."""

    number: int
    reading: Reading
    at: int
    length: int

    @property
    def depth(self) -> int:
        """Of the rows that would be taken."""
        return self.reading.depth(self.at + AHEAD, self.at + self.length)


def copies(store: SegmentStore, prompt: Prompt, match: Match, begin: int, max_depth: int) -> Iterator[Match]:
    """Parts of a match, ascending, that were copied from a content which the prompt lacks, where others read it.

    Args:
        store: holds what the run's agents have read.
        prompt: whose match it is.
        match: a slot's own base.
        begin: first token of the prompt that may be taken from elsewhere.
        max_depth: deepest KV that is taken.
    """
    seen = {segment.content.origin for segment in prompt.segments if segment.content is not None}
    hidden = {span.origin for span in match.reading.spans if span.start < match.at} - seen
    if match.relation not in (Relation.READ, Relation.WROTE) or not hidden:
        return
    own = (match.number, match.reading)
    others = [one for one in store.readings(prompt.reader.run) if one[0] != match.number]
    at = max(begin - AHEAD, match.start)
    while at + AHEAD + SHORTEST <= match.stop:
        usable = []
        if prompt.tokens[at : at + AHEAD] in match.reading.windows:
            tokens = prompt.tokens[at : match.stop]
            found = (_longest(tokens, *one, hidden, max_depth) for one in (*others, own))
            usable = [one for one in found if one is not None]
        if not usable:
            at += 1
            continue
        best = max(usable, key=lambda one: (-one.depth, one.length, one.number == match.number))
        yield replace(
            match,
            start=at + AHEAD,
            stop=at + best.length,
            number=best.number,
            reading=best.reading,
            at=best.at + AHEAD,
            relation=Relation.COPIED,
            depth=best.depth,
        )
        at += best.length - AHEAD


def _longest(
    tokens: Sequence[int], number: int, reading: Reading, hidden: AbstractSet[str], max_depth: int
) -> _Found | None:
    """The longest run that begins as ``tokens`` do and that a reading's hidden contents hold, not too deep."""
    found = [
        _Found(number, reading, place.at, _agreeing(tokens, reading, place, max_depth))
        for place in reading.windows.get(tuple(tokens[:AHEAD]), ())
        if place.origin in hidden
    ]
    best = max(found, key=lambda one: one.length, default=None)
    return best if best is not None and best.length >= AHEAD + SHORTEST else None


def _agreeing(tokens: Sequence[int], reading: Reading, place: Place, max_depth: int) -> int:
    """For how many tokens a reading goes on as ``tokens`` do, without KV that is too deep behind the first ones."""
    most = min(len(tokens), place.stop - place.at)
    ends = (
        count
        for count in range(AHEAD, most)
        if tokens[count] != reading.tokens[place.at + count] or reading.depths[place.at + count] > max_depth
    )
    return next(ends, most)
