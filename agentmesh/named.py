"""Prompts with names instead of texts: what a visit will read, as far as templates say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import final

from agentmesh.blueprint import Blueprint, Member
from agentmesh.config.mesh import LlmAgentSpec, Memory, RetrieverAgentSpec
from agentmesh.errors import TemplateError
from agentmesh.foreseen import Piece
from agentmesh.prompt import Content, ContentKind, Message, RoleTemplate, Scope, said
from agentmesh.topology import Delivery, Visit

TURN_ENDS = "\ue003"
"""Between a user turn and the agent's reply."""


@final
@dataclass
class NamedPrompts:
    """What visits will read, as far as templates say.

    Args:
        blueprint: the mesh.
        histories: what agents with a memory have read and said so far, each with what ends a turn.
        unknown: agents with a memory of whose turns one could not be rendered.
    """

    blueprint: Blueprint
    histories: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)

    def next(self, visit: Visit, member: Member, spec: LlmAgentSpec) -> tuple[Piece, ...]:
        """The prompt of the next visit; an agent with a memory goes on from its earlier ones.

        Raises:
            TemplateError: it cannot be rendered without texts, or an earlier one of the same agent could not.
        """
        remembers = spec.memory is Memory.CONVERSATION
        if visit.node in self.unknown:
            raise TemplateError(f"{visit.node} goes on from a turn that is not known ahead")
        try:
            system, turn = self._rendered(member, spec, visit.inbox, visit.round)
        except TemplateError:
            self.unknown |= {visit.node} if remembers else set()
            raise
        history = self.histories.get(visit.node, ())
        if remembers:
            self.histories[visit.node] = (*history, *turn, reply(visit), "\n")
        return _joined((*system, *history, *turn))

    def _rendered(
        self, member: Member, spec: LlmAgentSpec, inbox: Sequence[Delivery], round_: int
    ) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """A visit's system text and its own turn, with named slots.

        Raises:
            TemplateError: it cannot be rendered without texts.
        """
        messages = [self._message(delivery) for delivery in inbox]
        scope = named_scope(self.blueprint, member, messages, round_)
        system, user = RoleTemplate(spec.system, spec.prompt).render(scope)
        return tuple(scope.split(f"{system}\n")), (*scope.split(user), TURN_ENDS)

    def leads(self) -> dict[str, str]:
        """How the prompts of all agents begin for whom that is known without an inbox."""
        found = {}
        for node, member in self.blueprint.members.items():
            if isinstance(member.spec, LlmAgentSpec):
                with suppress(TemplateError):
                    system, turn = self._rendered(member, member.spec, (), 0)
                    found[node] = str(_joined((*system, *turn))[0])
        return found

    def _message(self, delivery: Delivery) -> Message:
        member = self.blueprint.members[delivery.source]
        kind = ContentKind.DOCUMENT if isinstance(member.spec, RetrieverAgentSpec) else ContentKind.MESSAGE
        deliver = self.blueprint.topology.edges[delivery.order].deliver.value
        # passages follow from inputs alone, so they are the same in every round
        origin = said(kind, delivery.source, 0 if kind is ContentKind.DOCUMENT else delivery.source_round)
        content = Content("", kind, origin, deliver=deliver)
        return Message(delivery.source, member.role, delivery.source_round, (content,))


def named_scope(blueprint: Blueprint, member: Member, messages: Sequence[Message] = (), round_: int = 0) -> Scope:
    """What a member's templates see, with inputs by name."""
    inputs = {name: Content("", ContentKind.INPUT, name) for name in blueprint.inputs}
    rounds = blueprint.topology.rounds
    return Scope(inputs, messages, role=member.role, node=member.node, round=round_, rounds=rounds)


def reply(visit: Visit) -> Content:
    """What a visit writes, by name."""
    return Content("", ContentKind.MESSAGE, said(ContentKind.MESSAGE, visit.node, visit.round))


def _joined(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Pieces with neighbouring texts in one."""
    found: list[Piece] = []
    for piece in pieces:
        if found and isinstance(piece, str) and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return tuple(found)
