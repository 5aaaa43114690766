"""What a report shows beside an evaluation's figures: what was reused where, where time went, where texts part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any, TypeVar

from agentmesh.config.base import Frozen
from agentmesh.evaluate.journal import Row, by_preset
from agentmesh.evaluate.results import both, words_before
from agentmesh.events import CallRecord
from agentmesh.prompt import ContentKind
from agentmesh.reasons import PlanRow, Reason, Treatment

T = TypeVar("T")
QUEUE = "queue"
DOCUMENTS = "documents"
KINDS = tuple(Treatment)


class Part(Frozen):
    """Prompt tokens with one treatment for one reason."""

    kind: Treatment
    reason: Reason
    tokens: int


class Reuse(Frozen):
    """Prompt tokens of all samples by treatment and reason, in the order of ``Treatment``, the most first."""

    tokens: int
    parts: tuple[Part, ...]

    def of(self, kind: Treatment) -> int:
        """Tokens with one treatment."""
        return sum(part.tokens for part in self.parts if part.kind is kind)

    @property
    def placed(self) -> float:
        """The share that was placed."""
        return 1 - self.of(Treatment.COMPUTED) / self.tokens if self.tokens else 0.0


class Wait(Frozen):
    """One agent's time to first token in milliseconds: the median, and the median of each of its parts."""

    ttft_ms: float
    parts_ms: dict[str, float]


class Parting(Frozen):
    """Where two presets' texts first part.

    ``words``: how many words two answers have in common before they differ, for each sample where they do. ``same`` of
    ``n`` answers are the same text. ``agents``: in how many samples an agent was the first one whose message differed;
    empty where the presets ran different agents.
    """

    n: int
    same: int
    words: tuple[int, ...]
    agents: dict[str, int]


class Breakdown(Frozen):
    """By preset, then by agent or by text (``fixed``, ``documents``, a slot); ``parting`` by pair as in ``Results``."""

    by_agent: dict[str, dict[str, Reuse]]
    by_text: dict[str, dict[str, Reuse]]
    waits: dict[str, dict[str, Wait]]
    parting: dict[str, Parting]

    def total(self, preset: str) -> Reuse:
        """Of all prompts under a preset."""
        counts: Counter[tuple[Treatment, Reason]] = Counter()
        for one in self.by_agent[preset].values():
            counts.update({(part.kind, part.reason): part.tokens for part in one.parts})
        return _ordered(counts)

    def placed(self, preset: str) -> float | None:
        """The share of a preset's prompt tokens that was placed; ``None`` where it made no call."""
        total = self.total(preset)
        return total.placed if total.tokens else None


def break_down(rows: Iterable[Row]) -> Breakdown:
    """Of an evaluation's rows, the first preset's first; what failed is left out."""
    ours = by_preset(rows)
    calls = {name: [call for row in found if not row.error for call in row.calls] for name, found in ours.items()}
    pairs = [(a, b) for b, a in combinations(ours, 2)]
    return Breakdown(
        by_agent={name: _in_order(_reuse(found, lambda call, _: call.node)) for name, found in calls.items()},
        by_text={name: _reuse(found, lambda _, row: _kind_of(row.segment)) for name, found in calls.items()},
        waits={name: _waits(found) for name, found in calls.items()},
        parting={f"{a} vs {b}": _parting(ours[a], ours[b]) for a, b in pairs},
    )


def _reuse(calls: Sequence[CallRecord], name_of: Callable[[CallRecord, PlanRow], str]) -> dict[str, Reuse]:
    found: dict[str, Counter[tuple[Treatment, Reason]]] = {}
    for call in calls:
        for row in call.plan:
            if row.tokens:
                found.setdefault(name_of(call, row), Counter())[row.kind, row.reason] += row.tokens
    return {name: _ordered(counts) for name, counts in found.items()}


def _kind_of(segment: str) -> str:
    """A text by its name; documents, of which every sample has others, are one."""
    return DOCUMENTS if segment.startswith(f"{ContentKind.DOCUMENT} ") else segment


def _ordered(counts: Mapping[tuple[Treatment, Reason], int]) -> Reuse:
    parts = [Part(kind=kind, reason=reason, tokens=tokens) for (kind, reason), tokens in counts.items()]
    parts.sort(key=lambda part: (KINDS.index(part.kind), -part.tokens))
    return Reuse(tokens=sum(counts.values()), parts=tuple(parts))


def _waits(calls: Sequence[CallRecord]) -> dict[str, Wait]:
    by_node: dict[str, list[CallRecord]] = {}
    for call in calls:
        by_node.setdefault(call.node, []).append(call)
    return _in_order({node: _wait(found) for node, found in by_node.items()})


def _wait(calls: Sequence[CallRecord]) -> Wait:
    names = dict.fromkeys(name for call in calls for name in call.parts_ms)
    parts = {name: median(call.parts_ms.get(name, 0.0) for call in calls) for name in names}
    queue = median(call.queue_ms for call in calls)
    return Wait(ttft_ms=median(call.ttft_ms for call in calls), parts_ms={QUEUE: queue, **parts})


def _in_order(found: Mapping[str, T]) -> dict[str, T]:
    return {name: found[name] for name in sorted(found, key=natural)}


def natural(name: str) -> list[Any]:
    """What names are sorted by, so that ``agent.2`` comes before ``agent.10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _parting(ours: Sequence[Row], theirs: Sequence[Row]) -> Parting:
    pairs = both(ours, theirs)
    differing = [(one.answer, other.answer) for one, other in pairs if one.answer != other.answer]
    firsts = Counter(first_differing(one, other) for one, other in pairs)
    del firsts[""]
    return Parting(
        n=len(pairs),
        same=len(pairs) - len(differing),
        words=tuple(sorted(words_before(one, other) for one, other in differing)),
        agents=dict(firsts.most_common()),
    )


def first_differing(one: Row, other: Row) -> str:
    """The first node that said something else; empty where there is none, or where other nodes spoke."""
    if [(said.node, said.round) for said in one.messages] != [(said.node, said.round) for said in other.messages]:
        return ""
    return next((a.node for a, b in zip(one.messages, other.messages, strict=True) if a.text != b.text), "")
