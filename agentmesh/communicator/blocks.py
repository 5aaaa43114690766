"""What of a prompt's matches is placed and what is computed all the same, painted on labels and read off them.

It decides nothing about whether a match may be placed at all; that is said of each in its ``Decision``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from agentmesh.communicator.labels import Label, Labels, computed
from agentmesh.communicator.learner import Verdict
from agentmesh.communicator.linkstate import shares
from agentmesh.config.presets import PresetSpec, Recompute
from agentmesh.engine.composition import Composition, Placement
from agentmesh.kv.values import KVSource
from agentmesh.prompt.segments import Prompt
from agentmesh.reasons import Reason, Treatment
from agentmesh.sharing.matching import REASONS, Match, Relation
from agentmesh.sharing.repeats import echoes, gaps


@dataclass(frozen=True)
class Decision:
    """A match, and whether it may be placed."""

    match: Match
    verdict: Verdict

    @property
    def placed(self) -> bool:
        """Whether it is placed."""
        return self.verdict.reason is None

    @property
    def shared(self) -> bool:
        """Whether it is placed from what somebody else read or wrote, or wrote elsewhere: no history of its agent."""
        return self.placed and shares(self.match.relation)

    def source(self, low: int, high: int) -> KVSource:
        """The rows of the prompt's tokens ``low`` to ``high``, which it places."""
        assert self.verdict.realigner is not None, "a placed match has a realigner"
        numbers = range(low - self.match.start, high - self.match.start)
        return self.verdict.realigner.realign(self.match.cut(low, high), numbers)


@dataclass(frozen=True)
class Poor:
    """Tokens of a decision's match that have no good base, and why."""

    number: int
    tokens: range
    reason: Reason


def head(recompute: Recompute, match: Match) -> int:
    """How many tokens at the beginning of a match are computed."""
    return recompute.head(match.tokens, corpus=match.relation is Relation.CORPUS)


def without_base(prompt: Prompt, decisions: Sequence[Decision]) -> Iterator[Poor]:
    """Parts of matches that have no good base, because sender and reader have not seen the same words before."""
    copied = [decision.match for decision in decisions if decision.match.relation is Relation.COPIED]
    for number, decision in enumerate(decisions):
        match = decision.match
        if shares(match.relation):
            inside = [part for part in copied if match.start <= part.start < match.stop]
            yield from (Poor(number, run, Reason.BESIDE_COPY) for run in gaps(match, inside))
            yield from (Poor(number, run, Reason.ECHO) for run in echoes(prompt, match))


def apart(decisions: Iterable[Decision], poor: Iterable[Poor]) -> frozenset[int]:
    """Positions inside matches that are not placed from them, and teach nothing of them."""
    copied = (decision.match for decision in decisions if decision.match.relation is Relation.COPIED)
    runs = [*(range(match.start, match.stop) for match in copied), *(one.tokens for one in poor)]
    return frozenset(position for run in runs for position in run)


@dataclass(frozen=True)
class Brush:
    """Paints decisions on labels.

    Args:
        choice: the preset's choices.
        line_breaks: token ids whose text holds a line break.
    """

    choice: PresetSpec
    line_breaks: frozenset[int]

    def paint(self, labels: Labels, decisions: Sequence[Decision], poor: Sequence[Poor]) -> None:
        """Label the tokens of all matches: computed, or placed but for their heads, last line breaks and poor parts."""
        for number, decision in enumerate(decisions):
            match, reason = decision.match, decision.verdict.reason
            if reason is not None:
                labels.paint(match.start, match.stop, computed(reason, number))
                continue
            kind = (
                Treatment.PLACED_REALIGNED
            )  # a history, too: its keys were turned back and forth, and some were decoded
            labels.paint(match.start, match.stop, Label(kind, REASONS[match.relation], match.source, number))
            if shares(match.relation):
                self._anchor(labels, number, match)
        for one in poor:
            if decisions[one.number].placed:
                labels.paint(one.tokens.start, one.tokens.stop, computed(one.reason, one.number))

    def _anchor(self, labels: Labels, number: int, match: Match) -> None:
        """Compute a block's head and its last tokens with a line break."""
        recompute, tokens = self.choice.recompute, labels.prompt.tokens
        begin = match.start + head(recompute, match)
        labels.paint(match.start, begin, computed(Reason.BLOCK_HEAD, number))
        found = [position for position in range(begin, match.stop) if tokens[position] in self.line_breaks]
        for position in found[max(len(found) - recompute.line_breaks(match.tokens), 0) :]:
            labels.paint(position, position + 1, computed(Reason.LINE_BREAK, number))


def paint_best(labels: Labels, numbers: Sequence[int], count: Callable[[int, int], int], scores: torch.Tensor) -> None:
    """Label the placed tokens of some matches with the highest scores as computed.

    Args:
        labels: of the prompt.
        numbers: of the matches.
        count: placed tokens, matches → how many of them.
        scores: of every position.
    """
    placed = [
        position
        for low, high, label in labels.runs()
        if label.match in numbers and label.kind is not Treatment.COMPUTED
        for position in range(low, high)
    ]
    wanted = count(len(placed), len(numbers))
    if wanted:
        index = torch.tensor(placed, device=scores.device)
        for position in index[scores[index].topk(wanted).indices].tolist():
            labels.paint(position, position + 1, computed(Reason.PICKED, labels[position].match))


def compose(labels: Labels, lead: Sequence[Placement], decisions: Sequence[Decision]) -> Composition:
    """What the engine runs, read off the labels."""
    placed, recomputed = [], []
    for number, runs in groupby(labels.runs(), key=lambda run: run[2].match):
        kept = [(low, high) for low, high, label in runs if label.kind is not Treatment.COMPUTED]
        if number >= 0 and kept:
            placed.append(Placement(kept[0][0], decisions[number].source(kept[0][0], kept[-1][1])))
            recomputed += [p for (_, low), (high, _) in pairwise(kept) for p in range(low, high)]
    return Composition(labels.prompt.tokens, (*lead, *placed), labels.prompt.points, frozenset(recomputed))


def compose_whole(labels: Labels, lead: Sequence[Placement], decisions: Sequence[Decision]) -> Composition:
    """What a look at the cache wants to see: whole matches, also where their tokens are computed."""
    placed = []
    for number, runs in groupby(labels.runs(), key=lambda run: run[2].match):
        spans = list(runs)
        if number >= 0 and decisions[number].placed:
            placed.append(Placement(spans[0][0], decisions[number].source(spans[0][0], spans[-1][1])))
    return Composition(labels.prompt.tokens, (*lead, *placed))
