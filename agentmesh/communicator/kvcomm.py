"""``kvcomm``: the method of arXiv 2510.12872, for comparison: slots and the fixed text behind them from anchor pools.

Faithful to the paper: an anchor pool for each slot with a length and an entropy criterion (eq. 5), offsets as weighted
means over anchors for the slot (eq. 6) and the fixed text behind it (eq. 7), layer 0 untouched, eviction of the least
used among the oldest ``window`` anchors, and all or nothing: one slot that cannot be predicted makes the call dense.

Deviations, each in its favour or needed to be correct:

- Keys, offsets and distances are position-free (docs/method.md, 2); the reference adds offsets in a rotated frame.
- Bases are free (docs/method.md, 3): the first reader's KV of a question, the sender's decode KV of a message. The
  reference pays a prefill of its own for each question; here the first reader is dense.
- The base of fixed text is its KV in the consumer's first prompt, instead of a prefill with literal markers.
- The fixed text behind a slot takes offsets of the last tokens of longer anchors, which lie next to it; slots take the
  first ones. Nothing is audited, and no slot is too short: the criterion alone decides.
- Weights for slots are by token and for fixed text by channel, as the reference code has them; the gate's weights come
  from the values of all layers, as there.
- A consumer has a pool of its own for each slot (anchors share base KV), so an anchor without this consumer's offset
  cannot occur; a use is counted for the anchors that carry nine tenths of the gate's weight, where the reference counts
  all; the pool never exceeds its limit, which is in anchors *and* in bytes.
- The last token of a message cut at its length has no KV and is computed. The prefix is exact and always reused.
- Learning is committed when a run ends, in the order of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from typing_extensions import Self

from agentmesh.communicator.base import Plan, Preset, demand_memory
from agentmesh.communicator.keeper import Keeper, KeptPlan
from agentmesh.communicator.labels import Label, Labels, computed
from agentmesh.communicator.learner import pending_part
from agentmesh.communicator.persistence import Persistence
from agentmesh.communicator.pools import NewAnchor, Pools
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.composition import Composition, Parts, Placement
from agentmesh.engine.spans import Part, Spans
from agentmesh.kv.arena import Arena
from agentmesh.kv.rope import Rope
from agentmesh.kv.values import KV, KVSource
from agentmesh.prompt.segments import Prompt, Reader
from agentmesh.reasons import Reason, Treatment
from agentmesh.sharing.anchors import Anchor, AnchoredFixed, AnchoredSlot, AnchorPool, Weighing, offset
from agentmesh.sharing.budget import Worth
from agentmesh.sharing.matching import REASONS, Match, Matcher, Relation

DEEPEST = 254
"""The paper reuses whatever it has, however often it was predicted before."""


@dataclass(frozen=True)
class Slot:
    """A matched slot: its segment, its pool, and what the pool makes of it."""

    match: Match
    pool: AnchorPool
    weighing: Weighing | Reason

    @property
    def base(self) -> KV:
        """The content's base KV, as far as it goes."""
        return self.match.cut(self.match.start, self.match.stop)

    def without_anchors(self) -> Slot:
        """The slot of a call that needs its anchors no more."""
        told = self.weighing if isinstance(self.weighing, Reason) else replace(self.weighing, anchors=())
        return replace(self, pool=AnchorPool(self.pool.fixed), weighing=told)


@dataclass(frozen=True)
class AnchoredPlan(KeptPlan):
    """A plan with its slots; ``dense`` where one of them made the call so."""

    slots: tuple[Slot, ...] = ()
    dense: bool = True

    def without_kv(self) -> Self:
        """As in ``Plan``; which anchors were used is still known, and the base of fixed text."""
        return replace(super().without_kv(), slots=tuple(slot.without_anchors() for slot in self.slots))


@final
class KVComm(Preset):
    """The paper's method.

    Args:
        spec: budget and anchor pools.
        fingerprint: of the model.
        rope: the model's rotation.
        spans: notes where the time goes.
    """

    def __init__(self, spec: CommunicatorSpec, fingerprint: str, rope: Rope, spans: Spans) -> None:
        self._spec = spec
        self._spans = spans
        self.keeper = Keeper(spec, fingerprint, rope)
        self.budget = self.keeper.budget
        self.pools = Pools(spec.anchors, self.budget)
        self._matcher = Matcher(self.keeper.segments, blocks=False, max_depth=DEEPEST, oldest=True)
        self._bases: dict[str, dict[tuple[int, tuple[int, ...]], KV]] = {}
        self._observing = False
        self._frozen = False

    @property
    def learns(self) -> bool:
        """It needs anchors."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of prefixes, segments and anchors."""
        return self.keeper.nbytes + self.pools.nbytes

    def begin(self, reader: Reader) -> None:
        """Fix which anchors the run sees."""
        self._pools(reader)

    def plan(self, prompt: Prompt) -> AnchoredPlan:
        """All slots and the fixed text behind them, or nothing but the prefix."""
        parts = Parts()
        with self._spans.part(Part.MATCH), parts.timed("match"):
            lead, lost = self.keeper.lead(prompt)
            at = lead[-1].stop if lead else 0
            found = self._matcher.match(prompt, at)
            demand_memory(prompt.reader, self.pools.ledger, lost=lost or found.lost)
            pools = self._pools(prompt.reader)
            slots = tuple(self._weighed(prompt, match, pools) for match in found.matches)
        with self._spans.part(Part.PLAN), parts.timed("plan"):
            labels = Labels(prompt, found.missing, at)
            learns = any(isinstance(slot.weighing, Reason) for slot in slots)
            blocked = Reason.OBSERVING if learns else Reason.ALL_OR_NONE if found.missing else None
            placed = list(lead)
            for number, slot in enumerate(slots):
                why = self._refusal(prompt, slot, blocked)
                if why is not None:
                    labels.paint(slot.match.start, slot.match.stop, computed(why, number))
                    continue
                for start, source, reason in self._sources(prompt, slot):
                    label = Label(Treatment.PLACED_REALIGNED, reason, slot.match.source, number)
                    labels.paint(start, start + source.tokens, label)
                    placed.append(Placement(start, source))
            labels.check(strict=self._spec.strict)
            return self._plan(labels, placed, slots, parts)

    def prefilled(self, prompt: Prompt, plan: Plan, arena: Arena) -> None:
        """Keep exact beginnings, and a reading of the contents."""
        assert isinstance(plan, AnchoredPlan), "a preset gets its own plans back"
        self.keeper.keep_prompt(prompt, plan, arena)

    def finished(self, prompt: Prompt, plan: Plan, arena: Arena, message: tuple[int, ...]) -> None:
        """Keep the message; a dense call gives anchors, another one counts which it used."""
        assert isinstance(plan, AnchoredPlan), "a preset gets its own plans back"
        self.keeper.keep_message(prompt, plan, arena, message)
        reader = prompt.reader
        if reader.exact or not reader.run or not plan.teaches or self._frozen:
            return
        with self._spans.part(Part.LEARN):
            for slot in plan.slots:
                name = self._name(prompt, slot.match)
                if isinstance(slot.weighing, Weighing):
                    if not plan.dense:
                        self.pools.ledger.note(reader.run, name, slot.weighing.used)
                elif plan.dense and self._has_room(prompt, slot.match, arena):
                    self.pools.ledger.note(reader.run, name, self._new(prompt, slot, arena))

    def keeps(self, prompt: Prompt) -> int:
        """As in ``Preset``."""
        return self.keeper.awaited_tokens(prompt)

    def starved(self, reader: Reader) -> None:
        """What the run would have taught is missing: deterministic runs that come later must not go on without it."""
        self.pools.ledger.missed(reader.order)

    def closed(self, plan: Plan) -> None:
        """Unpin what the call read and wrote."""
        assert isinstance(plan, AnchoredPlan), "a preset gets its own plans back"
        self.keeper.let_go(plan)

    def release(self, run: str) -> None:
        """Free a run's segments, commit its anchors."""
        self.keeper.release(run)
        with self._spans.part(Part.LEARN):
            self.pools.ledger.end(run)
        self._bases.pop(run, None)

    def observe_only(self, *, on: bool, checked: bool = False) -> None:  # noqa: ARG002  # nothing is audited here
        """Make every content an anchor while on, whatever the criterion says of it."""
        self._observing = on

    def attach(self, kept: Persistence) -> None:
        """Keep prefixes beyond this process; anchors are its own."""
        self.keeper.attach(kept, readings=False)

    def freeze(self) -> None:
        """Keep the anchors as they are."""
        self._frozen = self.pools.ledger.fixed = True

    def adopt(self, other: Preset) -> None:
        """Begin with the other's anchors; they are shared, not copied."""
        assert isinstance(other, KVComm), "presets adopt from their own kind"
        self.pools.ledger.adopt(other.pools.ledger)

    def _pools(self, reader: Reader) -> Mapping[str, AnchorPool]:
        return self.pools.ledger.view(reader.run, reader.order, reader.sees)

    @staticmethod
    def _name(prompt: Prompt, match: Match) -> str:
        """A slot of a tenant's consumer: the same origin and the same fixed text behind it."""
        content = prompt.segments[match.first].content
        assert content is not None, "a match begins at a slot"
        behind = prompt.segments[match.first + 1].tokens if match.first + 1 < len(prompt.segments) else ()
        return f"{prompt.reader.tenant} {prompt.reader.consumer} {content.origin} {','.join(map(str, behind))}"

    def _weighed(self, prompt: Prompt, match: Match, pools: Mapping[str, AnchorPool]) -> Slot:
        pool = pools.get(self._name(prompt, match), AnchorPool())
        if self._observing:
            return Slot(match, pool, Reason.NOT_WARM)
        return Slot(match, pool, pool.weigh(match.cut(match.start, match.stop), self._spec.anchors.gamma))

    @staticmethod
    def _refusal(prompt: Prompt, slot: Slot, blocked: Reason | None) -> Reason | None:
        """Why a slot is not placed: its own reason, or that of all slots of the call."""
        if prompt.reader.exact:
            return Reason.READS_EXACTLY
        if isinstance(slot.weighing, Reason):
            return slot.weighing
        return blocked

    @staticmethod
    def _sources(prompt: Prompt, slot: Slot) -> list[tuple[int, KVSource, Reason]]:
        """A slot and the fixed text behind it, to be placed; the prompt's last token is always computed."""
        match, weighing = slot.match, slot.weighing
        assert isinstance(weighing, Weighing), "only predicted slots are placed"
        reason = Reason.READ_BEFORE if match.relation is Relation.HISTORY else REASONS[match.relation]  # it moves both
        found: list[tuple[int, KVSource, Reason]] = [(match.start, AnchoredSlot(slot.base, weighing.anchors), reason)]
        behind = match.first + 1
        if behind < len(prompt.segments) and prompt.segments[behind].content is None and slot.pool.fixed is not None:
            start = prompt.starts[behind]
            stop = min(start + slot.pool.fixed.tokens, len(prompt.tokens) - 1)
            if stop > start:
                fixed = AnchoredFixed(slot.pool.fixed, slot.base, weighing.anchors, stop - start)
                found.append((start, fixed, Reason.ANCHORED))
        return found

    def _plan(self, labels: Labels, placed: list[Placement], slots: tuple[Slot, ...], parts: Parts) -> AnchoredPlan:
        def of_match(number: int, low: int, high: int) -> bytes:
            return bytes([slots[number].match.depth] * (high - low))

        shareable, shared = labels.slot_tokens()
        moved = [piece.start for piece in placed if labels[piece.start].match >= 0]
        plan = AnchoredPlan(
            Composition(labels.prompt.tokens, tuple(placed), labels.prompt.points),
            labels.rows(),
            shareable,
            shared,
            parts,
            labels.depths(of_match),
            exact_until=min(moved, default=len(labels)),
            pinned=tuple(slot.match.number for slot in slots),
            slots=slots,
            dense=not moved,
        )
        self.keeper.pin(plan)
        return plan

    def _has_room(self, prompt: Prompt, match: Match, arena: Arena) -> bool:
        """Whether an anchor fits beside what is live.

        In deterministic runs that may decide nothing: each may hold one anchor, or its part of half of the budget.
        """
        behind, reader = prompt.segments[match.first + 1 : match.first + 2], prompt.reader
        tokens = 2 * match.tokens + 2 * sum(len(one.tokens) for one in behind if one.content is None)
        need = tokens * arena.shape.bytes_per_token
        if reader.sees is None:
            return self.budget.room(need, most=Worth.LATER)
        held = self.pools.taught_bytes(reader.run)
        return not held or held + need <= pending_part(self.budget, reader.order - reader.sees)

    def _new(self, prompt: Prompt, slot: Slot, arena: Arena) -> NewAnchor:
        """An anchor from a dense call."""
        match, rope = slot.match, self.keeper.rope
        truth = arena.read_free(match.start, match.stop, rope)
        bases = self._bases.setdefault(prompt.reader.run, {})
        base = bases.setdefault((match.number, prompt.tokens[match.start : match.stop]), slot.base.owned())
        behind, fixed, first = match.first + 1, None, slot.pool.fixed
        if behind < len(prompt.segments) and prompt.segments[behind].content is None:
            start = prompt.starts[behind]
            now = arena.read_free(start, start + len(prompt.segments[behind].tokens), rope)
            first = now if first is None else first
            fixed = offset(first, now)
        return NewAnchor(Anchor(base, offset(base, truth), fixed), first)
