"""Words that stand in two texts, of which a sender and its reader have not seen the same ones.

The KV of a word says whether it stood further ahead already, and no learned offset changes that. So where the two
contexts do not agree about it, what the sender made is a poor base (docs/method.md):

- *Copies.* An agent that hands on what it was handed writes the same words again; its reader sees them for the first
  time. The rows of an agent that *read* those words are the nearer base: it, too, saw them for the first time then.
- *Echoes.* Two agents that did not see each other's messages wrote the same words. For a reader of both, those of the
  second one are a repetition; nobody has such rows, so they are computed.
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


def echoes(prompt: Prompt, match: Match) -> Iterator[range]:
    """Tokens of a match, ascending, that repeat an earlier content of the prompt which the match's agent had not seen.

    Args:
        prompt: whose match it is.
        match: a slot's own base.
    """
    if match.relation not in (Relation.READ, Relation.WROTE):
        return
    known = {span.origin for span in match.reading.spans if span.start < match.at}
    ahead = (segment for segment in prompt.segments[: match.first] if segment.content is not None)
    strange = [segment.tokens for segment in ahead if segment.content and segment.content.origin not in known]
    runs = {tokens[at : at + AHEAD] for tokens in strange for at in range(len(tokens) - AHEAD + 1)}
    start = match.start
    while runs and start + AHEAD <= match.stop:
        if prompt.tokens[start : start + AHEAD] not in runs:
            start += 1
            continue
        stop = start + AHEAD
        while stop < match.stop and prompt.tokens[stop - AHEAD + 1 : stop + 1] in runs:
            stop += 1
        yield range(start, stop)
        start = stop
