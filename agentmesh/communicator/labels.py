"""A plan in the making: one label a token, painted step by step, from which everything else is read off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

from agentmesh.errors import SharingError
from agentmesh.prompt.segments import Prompt
from agentmesh.reasons import FALLBACKS, SHAREABLE, PlanRow, Reason, Treatment


@dataclass(frozen=True)
class Label:
    """What happens to a token, why, where its KV comes from, and as part of which match (-1: none)."""

    kind: Treatment
    reason: Reason
    source: str = ""
    match: int = -1


def computed(reason: Reason, match: int = -1) -> Label:
    """A label of a computed token."""
    return Label(Treatment.COMPUTED, reason, match=match)


class Labels:
    """The labels of a prompt's tokens: an exact prefix, and behind it, at first, all computed for its segment's reason.

    Args:
        prompt: the prompt.
        missing: why a slot is shared by nobody, by segment.
        lead: length of the exact prefix that is placed.
    """

    def __init__(self, prompt: Prompt, missing: dict[int, Reason], lead: int) -> None:
        self.prompt = prompt
        self._labels: list[Label] = []
        for index, segment in enumerate(prompt.segments):
            fixed = Reason.FIXED_TEXT if index else Reason.NOT_SEEN
            reason = fixed if segment.content is None else missing.get(index, Reason.NO_KV)
            self._labels += [computed(reason)] * len(segment.tokens)
        self.paint(0, lead, Label(Treatment.PLACED_EXACT, Reason.IDENTICAL_PREFIX, "prefix store"))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, position: int) -> Label:
        return self._labels[position]

    def paint(self, start: int, stop: int, label: Label) -> None:
        """Label tokens ``start`` to ``stop``."""
        self._labels[start:stop] = [label] * (stop - start)

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, Label]]:
        """Neighbouring tokens with one label: start, stop, label."""
        at = start
        for label, group in groupby(self._labels[start:stop]):
            size = sum(1 for _ in group)
            yield at, at + size, label
            at += size

    def rows(self) -> tuple[PlanRow, ...]:
        """The plan's rows, segment by segment; an empty segment has one row of no tokens."""
        found = []
        for segment, start in zip(self.prompt.segments, self.prompt.starts, strict=True):
            for low, high, label in self.runs(start, start + len(segment.tokens)):
                found.append(_row(segment.label, high - low, label))
            if not segment.tokens:
                found.append(_row(segment.label, 0, computed(Reason.TOO_SHORT)))
        return tuple(found)

    def slot_tokens(self) -> tuple[int, int]:
        """Shareable slot tokens, and how many of them are placed (docs/method.md, 6.4)."""
        shareable = placed = 0
        for segment, start in zip(self.prompt.segments, self.prompt.starts, strict=True):
            for low, high, label in self.runs(start, start + len(segment.tokens)):
                if segment.content is not None and label.reason in SHAREABLE:
                    shareable += high - low
                    placed += (high - low) * (label.kind is not Treatment.COMPUTED)
        return shareable, placed

    def depths(self, of_match: Callable[[int, int, int], bytes]) -> bytes:
        """How deep each token's KV will be: computed tokens are exact only behind nothing but exact KV.

        Args:
            of_match: match, start, stop → depths of its stored KV.
        """
        found = bytearray()
        for low, high, label in self.runs():
            if label.kind is Treatment.COMPUTED or label.match < 0:
                depth = 1 if label.kind is Treatment.COMPUTED and any(found) else 0
                found += bytes([depth] * (high - low))
            else:
                deeper = label.kind is Treatment.PLACED_REALIGNED and label.reason is not Reason.SAME_HISTORY
                found += bytes(min(depth + deeper, 255) for depth in of_match(label.match, low, high))
        return bytes(found)

    def check(self, *, strict: bool) -> None:
        """Refuse to compute what must be shared.

        Raises:
            SharingError: a slot falls back although the mesh is strict or its edge says ``deliver: kv``.
        """
        for segment, start in zip(self.prompt.segments, self.prompt.starts, strict=True):
            must = segment.comes_as_kv
            for _, _, label in self.runs(start, start + len(segment.tokens)):
                refused = label.reason in FALLBACKS if strict and not must else must and _is_lost(label)
                if segment.content is not None and refused:
                    why = "`strict` is set" if not must else "its edge says `deliver: kv`"
                    raise SharingError(
                        f"{self.prompt.reader.consumer or 'this prompt'} cannot share {segment.label}: {label.reason}, "
                        f"and {why}. Prepare the mesh with `agentmesh calibrate`, or allow computing it"
                    )


PARTS = frozenset({Reason.BLOCK_HEAD, Reason.LINE_BREAK, Reason.BESIDE_COPY, Reason.ECHO, Reason.PICKED, Reason.NO_KV})
"""Reasons for computing parts of what is placed."""


def _is_lost(label: Label) -> bool:
    return label.kind is Treatment.COMPUTED and label.reason not in PARTS


def _row(segment: str, tokens: int, label: Label) -> PlanRow:
    return PlanRow(segment=segment, kind=label.kind, tokens=tokens, source=label.source, reason=label.reason)
