"""Words that stand in two texts, of which a sender and its reader have not seen the same ones.

The KV of a word says whether it stood further ahead already, and no learned offset changes that. So where the two
contexts do not agree about it, what the sender made is a poor base (docs/figures.md):

- *Copies.* An agent that hands on what it was handed writes the same words again; its reader sees them for the first
  time. The rows of an agent that *read* those words are the nearer base: it, too, saw them for the first time then.
  What it wrote between such words, it wrote with a view to that text: short gaps are computed.
- *Echoes.* Two agents that did not see each other's messages wrote the same words. For a reader of both, those of the
  second one are a repetition; nobody has such rows, so they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch

from agentmesh.prompt.segments import Prompt
from agentmesh.sharing.matching import Match, Relation
from agentmesh.sharing.segments import Reading, SegmentStore

AHEAD = 16
"""Tokens that must agree ahead of a token before its rows are taken from another place."""

SHORTEST = 8
"""Fewer tokens are not worth a piece of their own."""

GAP = 2 * AHEAD
"""Most tokens of a gap between copied words, those that agree ahead of the next ones included."""

WEIGHTS = torch.tensor([pow(1_000_003, power, 2**61 - 1) for power in range(AHEAD)])


@dataclass(frozen=True)
class _Found:
    """Rows of a reading that could be taken, from token ``at`` on; the first ``AHEAD`` of ``length`` only agree."""

    number: int
    reading: Reading
    at: int
    length: int

    @property
    def depth(self) -> int:
        """Of the rows that would be taken."""
        return self.reading.depth(self.at + AHEAD, self.at + self.length)


@dataclass(frozen=True)
class _Source:
    """A reading that may hold words of a match in contents which the prompt lacks.

    Args:
        number, reading: which.
        places: for every run of ``AHEAD`` tokens of the match where these contents have it first; -1 where they do not.
        ends: where the KV of these contents ends, by place of its beginning, ascending.
    """

    number: int
    reading: Reading
    places: Sequence[int]
    ends: Sequence[tuple[int, int]]

    @staticmethod
    def of(number: int, reading: Reading, hidden: AbstractSet[str], runs: torch.Tensor) -> _Source:
        """Look for ``runs`` of a match, as ``prints`` gives them, in what a reading's agent has read."""
        read = [span for span in reading.spans if span.origin in hidden and not span.written]
        ends = [(span.start, min(span.stop, reading.reach(span.start))) for span in read]
        places = torch.tensor([at for low, high in ends for at in range(low, high - AHEAD + 1)], dtype=torch.long)
        if not len(places):
            return _Source(number, reading, [-1] * len(runs), ends)
        held = prints(reading.tokens)[places]
        order = held.argsort(stable=True)
        near = torch.searchsorted(held[order], runs).clamp(max=len(held) - 1)
        first = places[order][near]
        return _Source(number, reading, torch.where(held[order][near] == runs, first, -1).tolist(), ends)

    def longest(self, tokens: Sequence[int], number: int, max_depth: int) -> _Found | None:
        """What it holds of ``tokens``, which begin with run ``number`` of the match, up to KV that is too deep."""
        at = self.places[number]
        stop = next((high for low, high in self.ends if low <= at < high), at)
        most = min(len(tokens), stop - at)
        ends = (
            count
            for count in range(most)
            if tokens[count] != self.reading.tokens[at + count]
            or (count >= AHEAD and self.reading.depths[at + count] > max_depth)
        )
        found = _Found(self.number, self.reading, at, next(ends, most))
        return found if found.length >= AHEAD + SHORTEST else None


def prints(tokens: Sequence[int]) -> torch.Tensor:
    """A number for every run of ``AHEAD`` tokens, int64 ``[T - AHEAD + 1]``: equal runs have equal numbers."""
    if len(tokens) < AHEAD:
        return torch.empty(0, dtype=torch.long)
    return (torch.tensor(tokens, dtype=torch.long).unfold(0, AHEAD, 1) * WEIGHTS).sum(dim=1)


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
    low = max(begin - AHEAD, match.start)
    runs = prints(prompt.tokens[low : match.stop])
    own = _Source.of(match.number, match.reading, hidden, runs)
    copied = [number for number, place in enumerate(own.places) if place >= 0]
    others = [_Source.of(*one, hidden, runs) for one in store.readings(prompt.reader.run) if copied]
    at = 0
    for number in copied:
        tokens = prompt.tokens[low + number : match.stop] if number >= at else ()
        found = (source.longest(tokens, number, max_depth) for source in others if tokens)
        usable = [one for one in found if one is not None]
        if not usable:
            continue
        best = max(usable, key=lambda one: (-one.depth, one.length, one.number == match.number))
        yield replace(
            match,
            start=low + number + AHEAD,
            stop=low + number + best.length,
            number=best.number,
            reading=best.reading,
            at=best.at + AHEAD,
            relation=Relation.COPIED,
            depth=best.depth,
        )
        at = number + best.length - AHEAD


def gaps(match: Match, copied: Sequence[Match]) -> Iterator[range]:
    """Short stretches of a match in front of, between and behind its copied parts, ascending."""
    edges = [match.start, *(edge for part in copied for edge in (part.start, part.stop)), match.stop]
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if copied and 0 < stop - start <= GAP:
            yield range(start, stop)


def echoes(prompt: Prompt, match: Match) -> Iterator[range]:
    """Tokens of a match, ascending, that repeat an earlier content of the prompt which the match's agent had not seen.

    Args:
        prompt: whose match it is.
        match: a slot's own base.
    """
    if match.relation not in (Relation.READ, Relation.WROTE):
        return
    known = {span.origin for span in match.reading.spans if span.start < match.at}
    strange = [
        prints(segment.tokens)
        for segment in prompt.segments[: match.first]
        if segment.content is not None and segment.content.origin not in known
    ]
    if not strange:
        return
    runs = prints(prompt.tokens[match.start : match.stop])
    start = stop = match.start
    for number in torch.isin(runs, torch.cat(strange)).nonzero().flatten().tolist():
        if match.start + number > stop:
            if stop > start:
                yield range(start, stop)
            start = match.start + number
        stop = match.start + number + AHEAD
    if stop > start:
        yield range(start, stop)
