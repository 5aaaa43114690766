"""What a mesh's slots can share, before any weights are loaded: the schedule, slot by slot, with reasons.

Prompts are rendered with named slots instead of texts. What depends on the texts (their length, what is warm, predicted
errors) is left to the run; what depends on graph, templates and settings is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from agentmesh.blueprint import Blueprint, Member
from agentmesh.config.base import Frozen
from agentmesh.config.mesh import LlmAgentSpec, RetrieverAgentSpec
from agentmesh.config.presets import Share, choices
from agentmesh.errors import TemplateError
from agentmesh.events import Reason
from agentmesh.prompt import Content, ContentKind, Message, RoleTemplate, Scope, said
from agentmesh.topology import Visit

Piece = str | Content


class SlotForecast(Frozen):
    """One slot of one visit: who gives its KV (``source``; empty where it is computed), and why."""

    slot: str
    shared: bool
    source: str = ""
    reason: Reason
    block: int = 0


class VisitForecast(Frozen):
    """One visit of an agent with a model: its slots in order; ``block`` numbers slots that are placed together.

    ``endpoint`` is where its model is, if it is a remote one: then it is sent text, and ``note`` says what the
    endpoint's own prefix cache can give.
    """

    node: str
    round: int
    slots: tuple[SlotForecast, ...]
    note: str = ""
    endpoint: str = ""


class Forecast(Frozen):
    """The whole schedule, and advice about the order of texts."""

    preset: str
    visits: tuple[VisitForecast, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class _Read:
    """What an earlier visit read, its own message, which slots it got realigned, and where its model is."""

    node: str
    pieces: tuple[Piece, ...]
    message: str
    moved: frozenset[str]


@dataclass
class _Walk:
    """The visits so far. ``read`` has what each model has read: models share nothing with each other."""

    blueprint: Blueprint
    read: dict[str, list[_Read]] = field(default_factory=dict)
    advice: dict[str, str] = field(default_factory=dict)

    def visit(self, visit: Visit) -> VisitForecast | None:
        """One visit; ``None`` for an agent whose prompts are not known ahead."""
        member = self.blueprint.members[visit.node]
        if not isinstance(member.spec, LlmAgentSpec):
            return None
        try:
            pieces = self._pieces(visit, member, member.spec)
        except TemplateError as error:
            return VisitForecast(node=visit.node, round=visit.round, slots=(), note=f"not known ahead: {error}")
        remote = self.blueprint.remote_of(visit.node)
        where = "" if remote is None else f"{remote.name} at {remote.remote}"
        earlier = self.read.setdefault(where, [])
        if remote is None:
            note, slots = "", tuple(self._slots(pieces, earlier, exactly=member.reads_exactly))
        else:
            note, slots = f"text to {where}{_begins_as(pieces, earlier)}", _as_text(pieces)
        if remote is not None or choices(self.blueprint.communicator).share is not Share.NOTHING:
            self._advise(visit.node, pieces, earlier)
        moved = frozenset(one.slot for one in slots if one.shared and one.reason is not Reason.IDENTICAL_PREFIX)
        earlier.append(_Read(visit.node, pieces, said(ContentKind.MESSAGE, visit.node, visit.round), moved))
        endpoint = "" if remote is None else remote.remote
        return VisitForecast(node=visit.node, round=visit.round, slots=slots, note=note, endpoint=endpoint)

    def _pieces(self, visit: Visit, member: Member, spec: LlmAgentSpec) -> tuple[Piece, ...]:
        inputs = {name: Content("", ContentKind.INPUT, name) for name in self.blueprint.inputs}
        inbox = [self._message(delivery.source, delivery.source_round, delivery.order) for delivery in visit.inbox]
        rounds = self.blueprint.topology.rounds
        scope = Scope(inputs, inbox, role=member.role, node=member.node, round=visit.round, rounds=rounds)
        system, user = RoleTemplate(spec.system, spec.prompt).render(scope)
        return tuple(scope.split(f"{system}\n{user}"))

    def _message(self, node: str, round_: int, order: int) -> Message:
        member = self.blueprint.members[node]
        kind = ContentKind.DOCUMENT if isinstance(member.spec, RetrieverAgentSpec) else ContentKind.MESSAGE
        deliver = self.blueprint.topology.edges[order].deliver.value
        return Message(node, member.role, round_, (Content("", kind, said(kind, node, round_), deliver=deliver),))

    def _slots(self, pieces: Sequence[Piece], earlier: Sequence[_Read], *, exactly: bool) -> list[SlotForecast]:
        share = choices(self.blueprint.communicator).share
        found: list[SlotForecast] = []
        index, block = 0, 0
        while index < len(pieces):
            piece = pieces[index]
            if isinstance(piece, str):
                index += 1
                continue
            source, reason, size = _source(pieces, index, earlier)
            if share is Share.NOTHING:
                source, reason, size = "", Reason.PRESET_DENSE, 1
            elif reason is not Reason.IDENTICAL_PREFIX and share is Share.PREFIX:
                source, reason, size = "", Reason.BEHIND_PREFIX, 1
            elif exactly and source and reason is not Reason.IDENTICAL_PREFIX:
                source, reason, size = "", Reason.READS_EXACTLY, 1
            block += 1
            found += [
                SlotForecast(slot=covered.origin, shared=bool(source), source=source, reason=reason, block=block)
                for covered in pieces[index : index + size]
                if isinstance(covered, Content)
            ]
            index += size
        return found

    def _advise(self, node: str, pieces: Sequence[Piece], earlier: Sequence[_Read]) -> None:
        """Say what the role-last layout would make exact, where an earlier agent reads the same behind another lead."""
        slots = [index for index, piece in enumerate(pieces) if isinstance(piece, Content)]
        if not slots or node in self.advice:
            return
        first = slots[0]
        for read in earlier:
            theirs = [at for at, piece in enumerate(read.pieces) if isinstance(piece, Content)]
            if theirs and read.pieces[: theirs[0]] != tuple(pieces[:first]) and read.node != node:
                size = _common(pieces[first:], read.pieces[theirs[0] :])
                names = [piece.origin for piece in pieces[first : first + size] if isinstance(piece, Content)]
                if names:
                    self.advice[node] = (
                        f"{node}: with its own text behind the shared text, after a beginning that all agents have in "
                        f"common, {', '.join(names)} would be an exact prefix after {read.node}"
                    )


def forecast(blueprint: Blueprint) -> Forecast:
    """What every slot of a mesh can share.

    Args:
        blueprint: the mesh; no model is needed.
    """
    walk = _Walk(blueprint)
    visits = [found for visit in blueprint.topology.unroll() if (found := walk.visit(visit)) is not None]
    return Forecast(preset=blueprint.communicator.preset, visits=tuple(visits), advice=tuple(walk.advice.values()))


def _source(pieces: Sequence[Piece], index: int, earlier: Sequence[_Read]) -> tuple[str, Reason, int]:
    """Who gives a slot, why, and how many pieces go with it."""
    slot = pieces[index]
    assert isinstance(slot, Content), "asked of slots only"
    if slot.deliver == "text":
        return "", Reason.DELIVERED_AS_TEXT, 1
    best: tuple[int, str, Reason] = (0, "", Reason.FIRST_READER)
    for read in earlier:
        for at, piece in enumerate(read.pieces):
            if isinstance(piece, Content) and piece.origin == slot.origin:
                same = index == at and read.pieces[:at] == tuple(pieces[:index])
                size = _common(pieces[index:], read.pieces[at:])
                if same and slot.origin not in read.moved:
                    size = _until_moved(pieces[index : index + size], read.moved)
                if size >= best[0]:
                    best = (size, read.node, _why(slot, read.moved, same=same))
        if read.message == slot.origin and not best[0]:
            best = (1, read.node, Reason.WRITTEN_BEFORE)
    size, source, reason = best
    return source, reason, max(size, 1)


def _as_text(pieces: Sequence[Piece]) -> tuple[SlotForecast, ...]:
    """The slots of a prompt that an endpoint gets."""
    slots = (piece for piece in pieces if isinstance(piece, Content))
    return tuple(SlotForecast(slot=slot.origin, shared=False, reason=Reason.REMOTE_TEXT) for slot in slots)


def _begins_as(pieces: Sequence[Piece], earlier: Sequence[_Read]) -> str:
    """Which slots an endpoint's prefix cache can hold, because an earlier prompt begins with them, too."""
    most, node = max(((_common(pieces, read.pieces), read.node) for read in earlier), default=(0, ""))
    names = [piece.origin for piece in pieces[:most] if isinstance(piece, Content)]
    return f", which has read {', '.join(names)} as the beginning of {node}" if names else ""


def _why(slot: Content, moved: frozenset[str], *, same: bool) -> Reason:
    if not same:
        return Reason.READ_BEFORE
    return Reason.SAME_HISTORY if slot.origin in moved else Reason.IDENTICAL_PREFIX


def _until_moved(pieces: Sequence[Piece], moved: frozenset[str]) -> int:
    """How many pieces come before the first slot that the source itself got realigned."""
    for count, piece in enumerate(pieces):
        if isinstance(piece, Content) and piece.origin in moved:
            return count
    return len(pieces)


def _common(mine: Sequence[Piece], theirs: Sequence[Piece]) -> int:
    """How many pieces two lists begin with in common, up to the last slot among them."""
    size = 0
    for count, (one, other) in enumerate(zip(mine, theirs, strict=False), 1):
        if isinstance(one, str) or isinstance(other, str):
            if one != other:
                break
        elif one.origin != other.origin or one.deliver == "text":
            break
        else:
            size = count
    return size
