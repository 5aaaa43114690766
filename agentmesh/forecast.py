"""What a mesh's slots can share, before any weights are loaded: the schedule, slot by slot, with reasons.

Prompts are rendered with named slots instead of texts. What depends on the texts (their length, what is warm, predicted
errors) is left to the run; what depends on graph, templates and settings is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from agentmesh.blueprint import Blueprint
from agentmesh.config.base import Frozen
from agentmesh.config.mesh import LlmAgentSpec
from agentmesh.config.presets import PresetSpec, RealignerKind, Share, choices
from agentmesh.errors import TemplateError
from agentmesh.foreseen import ANY_DEPTH, Base, Piece, Read, base, beginning, resumed
from agentmesh.named import NamedPrompts, reply
from agentmesh.prompt import Content
from agentmesh.reasons import Reason
from agentmesh.topology import Visit

COMMON, BEHIND_INBOX = "\ue000", "\ue001"
"""How prompts begin in the role-last layout: with a text that is known without an inbox, or is known with it only."""

LAYOUT = "with its own text behind the shared text, after a beginning that all agents have in common"
PROMISES = {
    Reason.IDENTICAL_PREFIX: "be an exact prefix after {}",
    Reason.SAME_HISTORY: "have the same history as in {}: placed as it is, not exact",
}

Bases = Mapping[int, Base]
"""What a prompt's slots are placed from, by the number of the piece that a block begins with."""


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
    endpoint's own prefix cache can give. Elsewhere ``note`` says what is not known ahead.
    """

    node: str
    round: int
    slots: tuple[SlotForecast, ...]
    note: str = ""
    endpoint: str = ""


class Forecast(Frozen):
    """The whole schedule, what it takes for granted (``given``), and advice about the order of texts."""

    preset: str
    visits: tuple[VisitForecast, ...]
    given: tuple[str, ...]
    advice: tuple[str, ...]


@dataclass
class _Walk:
    """The visits so far, in one layout.

    Args:
        blueprint: the mesh.
        leads: what the prompts of agents with the mesh's own model begin with, as far as it is known without an inbox.
        read: what each model has read: models share nothing with each other.
    """

    blueprint: Blueprint
    leads: tuple[str, ...]
    read: dict[str, list[Read]] = field(default_factory=dict)

    @property
    def choice(self) -> PresetSpec:
        """The preset's choices."""
        return choices(self.blueprint.communicator)

    def visit(self, visit: Visit, pieces: tuple[Piece, ...]) -> tuple[VisitForecast, Bases]:
        """One visit that reads ``pieces``."""
        remote = self.blueprint.remote_of(visit.node)
        where = "" if remote is None else f"{remote.name} at {remote.remote}"
        earlier = self.read.setdefault(where, [])
        if remote is None:
            bases = self._bases(visit.node, pieces, earlier)
            slots, note, endpoint = _slots(pieces, bases), self._doubt(pieces, bases, earlier), ""
        else:
            exact = beginning(pieces, earlier)
            bases = {0: exact} if exact.size else {}
            slots, note, endpoint = _as_text(pieces), f"text to {where}{_begins_as(pieces, exact)}", remote.remote
        earlier.append(_read(visit, pieces, bases, as_text=remote is not None))
        return VisitForecast(node=visit.node, round=visit.round, slots=slots, note=note, endpoint=endpoint), bases

    def _bases(self, node: str, pieces: Sequence[Piece], earlier: Sequence[Read]) -> dict[int, Base]:
        """The exact beginning, then blocks; a preset with anchors places all slots behind the beginning, or none."""
        share, found = self.choice.share, dict[int, Base]()
        exactly, exact = self.blueprint.members[node].reads_exactly, Base("", Reason.NOT_SEEN, 0)
        if share is not Share.NOTHING:
            declared = self.leads.count(str(pieces[0])) > 1
            exact = beginning(pieces, earlier) if declared else resumed(pieces, earlier, node)
        at = exact.size
        while at < len(pieces):
            if isinstance(pieces[at], Content):
                one = self._base(pieces, at, earlier)
                found[at] = Base("", Reason.READS_EXACTLY) if exactly and one.source else one
            at += found[at].size if at in found else 1
        if self.choice.realigner is RealignerKind.ANCHORS and not all(one.source for one in found.values()):
            found = {index: Base("", Reason.ALL_OR_NONE) if one.source else one for index, one in found.items()}
        return {0: exact, **found} if exact.size else found

    def _base(self, pieces: Sequence[Piece], index: int, earlier: Sequence[Read], *, limited: bool = True) -> Base:
        """What a slot behind the exact beginning is placed from; ``limited``: whether ``max_depth`` is heeded."""
        choice = self.choice
        if choice.share is not Share.SLOTS:
            return Base("", Reason.PRESET_DENSE if choice.share is Share.NOTHING else Reason.BEHIND_PREFIX)
        anchored = choice.realigner is RealignerKind.ANCHORS
        deepest = self.blueprint.communicator.max_depth if limited and not anchored else ANY_DEPTH
        found = base(pieces, index, earlier, blocks=choice.blocks, deepest=deepest, oldest=anchored)
        moved = anchored and found.reason is Reason.SAME_HISTORY  # anchors move it like any other
        return replace(found, reason=Reason.READ_BEFORE) if moved else found

    def _doubt(self, pieces: Sequence[Piece], bases: Bases, earlier: Sequence[Read]) -> str:
        """What is said of a visit whose slots would be placed from elsewhere if nothing was too deep."""
        chosen = (Reason.READ_BEFORE, Reason.WRITTEN_BEFORE, Reason.TOO_DEEP)
        behind = {index: one for index, one in bases.items() if one.reason in chosen}
        if all(self._base(pieces, index, earlier, limited=False) == one for index, one in behind.items()):
            return ""
        limit = self.blueprint.communicator.max_depth
        return (
            f"`max_depth: {limit}` decides, if all is placed as shown; what a run computes or copies has another depth"
        )


def forecast(blueprint: Blueprint) -> Forecast:
    """What every slot of a mesh can share, and what the role-last layout would change.

    Args:
        blueprint: the mesh; no model is needed.
    """
    prompts = NamedPrompts(blueprint)
    known = prompts.leads()
    own = tuple(lead for node, lead in known.items() if blueprint.remote_of(node) is None)
    written, moved = _Walk(blueprint, own), _Walk(blueprint, (COMMON,) * len(own))
    visits: list[VisitForecast] = []
    advice: dict[str, str] = {}
    for visit in blueprint.topology.unroll():
        member = blueprint.members[visit.node]
        if not isinstance(member.spec, LlmAgentSpec):
            continue
        try:
            pieces = prompts.next(visit, member, member.spec)
        except TemplateError as error:
            visits.append(VisitForecast(node=visit.node, round=visit.round, slots=(), note=f"not known ahead: {error}"))
            continue
        found, bases = written.visit(visit, pieces)
        visits.append(found)
        lead = COMMON if pieces[0] == known.get(visit.node) else BEHIND_INBOX
        _, others = moved.visit(visit, (lead, *pieces[1:], pieces[0]))
        gains = _gains(pieces, bases, others)
        if gains and visit.node not in advice:
            advice[visit.node] = f"{visit.node}: {LAYOUT}, {gains}"
    return Forecast(
        preset=blueprint.communicator.preset,
        visits=tuple(visits),
        given=tuple(_given(blueprint)),
        advice=tuple(advice.values()),
    )


def _read(visit: Visit, pieces: tuple[Piece, ...], bases: Bases, *, as_text: bool) -> Read:
    """What later visits find of this one; an endpoint that was sent text may hold all of it, its reply included."""
    depths = _depths(pieces, bases)
    placed = [at for at, one in bases.items() if one.source and one.reason is not Reason.IDENTICAL_PREFIX]
    exact = len(pieces) + 1 if as_text else min(placed, default=len(pieces))
    return Read(visit.node, (*pieces, reply(visit)), (*depths, int(any(depths))), exact)


def _given(blueprint: Blueprint) -> Iterator[str]:
    """What must be so in a run for it to share as the forecast says."""
    spec, choice = blueprint.communicator, choices(blueprint.communicator)
    if choice.share is not Share.SLOTS:
        return
    yield f"slots of {spec.min_tokens} tokens or more, and memory for their KV (communicator.budget)"
    if choice.realigner.learns:
        ready = (
            "as those in the mesh's realigners" if blueprint.realigners else "`agentmesh calibrate` sees to it ahead"
        )
        yield f"slots that were observed {spec.warmup} times: {ready}"
    elif choice.realigner is RealignerKind.ANCHORS:
        yield "anchors that are as long as what is read: the first runs make them"


def _each(pieces: Sequence[Piece], bases: Bases) -> dict[int, Base]:
    """What each slot is placed from, by the slot's piece."""
    return {
        at: one
        for index, one in bases.items()
        for at in range(index, index + one.size)
        if isinstance(pieces[at], Content)
    }


def _slots(pieces: Sequence[Piece], bases: Bases) -> tuple[SlotForecast, ...]:
    """The slots of a prompt, with blocks numbered."""
    return tuple(
        SlotForecast(slot=piece.origin, shared=bool(one.source), source=one.source, reason=one.reason, block=block)
        for block, (index, one) in enumerate(bases.items(), 1)
        for piece in pieces[index : index + one.size]
        if isinstance(piece, Content)
    )


def _depths(pieces: Sequence[Piece], bases: Bases) -> tuple[int, ...]:
    """Depths of a prompt's KV: what is computed is exact behind nothing but exact KV."""
    found: list[int] = []
    while len(found) < len(pieces):
        one = bases.get(len(found))
        found += one.placed() if one is not None and one.source else [int(any(found))]
    return tuple(found)


def _gains(pieces: Sequence[Piece], bases: Bases, others: Bases) -> str:
    """What another layout makes exact, and what it makes placeable as it is."""
    now, then = _each(pieces, bases), _each(pieces, others)
    kept = {
        Reason.IDENTICAL_PREFIX: (Reason.IDENTICAL_PREFIX,),
        Reason.SAME_HISTORY: (Reason.IDENTICAL_PREFIX, Reason.SAME_HISTORY),
    }
    found = []
    for reason, as_good in kept.items():
        better = [
            at for at, one in then.items() if one.reason is reason and (at not in now or now[at].reason not in as_good)
        ]
        if better:
            names = ", ".join(piece.origin for at in better if isinstance(piece := pieces[at], Content))
            found.append(f"{names} would {PROMISES[reason].format(then[better[-1]].source)}")
    return ", and ".join(found)


def _as_text(pieces: Sequence[Piece]) -> tuple[SlotForecast, ...]:
    """The slots of a prompt that an endpoint gets."""
    slots = (piece for piece in pieces if isinstance(piece, Content))
    return tuple(SlotForecast(slot=slot.origin, shared=False, reason=Reason.REMOTE_TEXT) for slot in slots)


def _begins_as(pieces: Sequence[Piece], exact: Base) -> str:
    """Which slots an endpoint's prefix cache can hold, because an earlier prompt begins with them, too."""
    names = [piece.origin for piece in pieces[: exact.size] if isinstance(piece, Content)]
    return f", which has read {', '.join(names)} as the beginning of {exact.source}" if names else ""
