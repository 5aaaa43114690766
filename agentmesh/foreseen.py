"""Where a prompt's slots will find KV: the rules of ``sharing.matching`` with names of contents instead of tokens.

Everything that can be placed is taken to be placed. So depths are those of a warm run whose gates let everything pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentmesh.prompt import Content
from agentmesh.reasons import Reason

Piece = str | Content
ANY_DEPTH = 255


@dataclass(frozen=True)
class Read:
    """What an earlier visit read and wrote.

    Args:
        node: whose visit it was.
        pieces: its prompt, and what it wrote.
        depths: of each piece's KV, as in ``sharing.segments``.
        exact: how many pieces have KV that may be an exact prefix: all up to what was placed from elsewhere or decoded.
    """

    node: str
    pieces: tuple[Piece, ...]
    depths: tuple[int, ...]
    exact: int

    @property
    def prompt(self) -> tuple[Piece, ...]:
        """What it read."""
        return self.pieces[:-1]


@dataclass(frozen=True)
class Base:
    """Stored KV for a slot, and for ``size`` pieces from it on, with the depth of each; without ``source`` none."""

    source: str
    reason: Reason
    size: int = 1
    depths: tuple[int, ...] = ()

    def placed(self) -> tuple[int, ...]:
        """Depths once it was placed: one more, except behind the same history."""
        return tuple(
            depth + (self.reason is Reason.READ_BEFORE or self.reason is Reason.WRITTEN_BEFORE) for depth in self.depths
        )


def beginning(pieces: Sequence[Piece], earlier: Sequence[Read]) -> Base:
    """The longest beginning that an earlier visit has read exactly, up to a slot's end; of equals the latest."""
    best = Base("", Reason.FIRST_READER, 0)
    for read in earlier:
        size = 0
        for count, (mine, theirs) in enumerate(zip(pieces, read.pieces[: read.exact], strict=False), 1):
            if not _same(mine, theirs):
                break
            size = count if isinstance(mine, Content) else size
        if size and size >= best.size:
            best = Base(read.node, Reason.IDENTICAL_PREFIX, size, (0,) * size)
    return best


def resumed(pieces: Sequence[Piece], earlier: Sequence[Read], node: str) -> Base:
    """The whole of the longest prompt of a node's own that this one goes on from, where it was read exactly."""
    own = [read for read in earlier if read.node == node and read.exact >= len(read.prompt)]
    return beginning(pieces, [read for read in own if _begins(pieces, read.prompt)])


def base(
    pieces: Sequence[Piece], index: int, earlier: Sequence[Read], *, blocks: bool, deepest: int, oldest: bool = False
) -> Base:
    """What a slot behind the exact beginning is placed from, or why it is from nothing.

    Args:
        pieces: the prompt.
        index: the slot.
        earlier: visits so far, in order.
        blocks: whether several slots may be placed together.
        deepest: depth beyond which KV is not placed at a new place.
        oldest: whether a content's first reading is taken, whatever carries further.
    """
    slot = pieces[index]
    assert isinstance(slot, Content), "asked of slots only"
    if slot.deliver == "text":
        return Base("", Reason.DELIVERED_AS_TEXT)
    found: list[Base] = []
    deep = False
    for read in earlier:
        places = [at for at, piece in enumerate(read.pieces) if isinstance(piece, Content) and _same(slot, piece)]
        bases = [_follow(pieces, index, read, at, blocks=blocks, deepest=deepest) for at in places]
        deep = deep or None in bases
        found += [one for one in bases if one is not None]
    if not found:
        return Base("", Reason.TOO_DEEP if deep else Reason.FIRST_READER)
    if oldest:
        return found[0]
    ranks = [
        (one.reason is Reason.SAME_HISTORY, one.size, -max(one.depths), one.reason is Reason.WRITTEN_BEFORE, place)
        for place, one in enumerate(found)
    ]
    return found[max(ranks)[-1]]


def _follow(pieces: Sequence[Piece], index: int, read: Read, at: int, *, blocks: bool, deepest: int) -> Base | None:
    """How far a reading goes on as the prompt does; ``None`` where its slot is too deep."""
    history = index == at and all(map(_same, pieces[:index], read.pieces))
    limit = ANY_DEPTH if history else deepest
    size = 0
    for count, (mine, theirs, depth) in enumerate(
        zip(pieces[index:], read.pieces[at:], read.depths[at:], strict=False), 1
    ):
        text = isinstance(mine, Content) and mine.deliver == "text"
        if depth > limit or text or not _same(mine, theirs):
            break
        size = count if isinstance(mine, Content) else size
        if not blocks:
            break
    written = at == len(read.prompt)
    reason = Reason.SAME_HISTORY if history else Reason.WRITTEN_BEFORE if written else Reason.READ_BEFORE
    return Base(read.node, reason, size, read.depths[at : at + size]) if size else None


def _begins(pieces: Sequence[Piece], lead: Sequence[Piece]) -> bool:
    """Whether a prompt goes on from another one."""
    return len(pieces) > len(lead) and all(map(_same, pieces, lead))


def _same(one: Piece, other: Piece) -> bool:
    """Whether two pieces are the same text."""
    if isinstance(one, Content) and isinstance(other, Content):
        return one.origin == other.origin
    return one == other
