"""``rotate``, ``epic``, ``linear``, ``blend``: exact prefixes and, behind them, every shareable slot is placed.

The plan of a prompt is made in four steps: the longest exact prefix; what earlier agents have read or written of the
rest, in blocks as long as possible; which of these blocks may be placed (gates); and which of their tokens are computed
all the same. A slot that must be observed first makes its call dense, so that what is observed is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch

from agentmesh.communicator.audits import Auditor
from agentmesh.communicator.base import Plan, Preset, demand_memory
from agentmesh.communicator.blocks import (
    Brush,
    Decision,
    Poor,
    apart,
    compose,
    head,
    without_base,
)
from agentmesh.communicator.keeper import Keeper, KeptPlan
from agentmesh.communicator.labels import Labels
from agentmesh.communicator.learner import Learner, Verdict
from agentmesh.communicator.linkstate import shares
from agentmesh.communicator.measures import Costs, draw
from agentmesh.communicator.passages import Passages
from agentmesh.communicator.persistence import Persistence
from agentmesh.communicator.picks import Picker
from agentmesh.config.presets import CommunicatorSpec, PresetSpec
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.scout import Scout
from agentmesh.engine.slices import Slices, noted
from agentmesh.engine.spans import Part
from agentmesh.kv.arena import Arena
from agentmesh.metering import Audit
from agentmesh.prompt.segments import Content, Prompt, Reader
from agentmesh.reasons import Reason
from agentmesh.sharing.matching import Match, Matcher, Relation
from agentmesh.sharing.realigner import NoOffset, Realigner
from agentmesh.sharing.repeats import copies


@dataclass(frozen=True)
class SlotPlan(KeptPlan):
    """A plan, with what its call needs to know afterwards.

    Args:
        decisions: every match, placed or not.
        audited: whether the call is checked afterwards.
        looked: the arena of its look, until it was prefilled.
        apart: positions inside matches that are not placed from them, and teach nothing of them.
        look_ms: what picking the tokens that are computed all the same took.
        computed: tokens that are computed.
        moved: tokens that are placed behind the exact prefix, those that are computed over them included.
    """

    decisions: tuple[Decision, ...] = ()
    audited: bool = False
    looked: list[Arena] = field(default_factory=list)
    apart: frozenset[int] = frozenset()
    look_ms: float = 0.0
    computed: int = 0
    moved: int = 0


@final
class Slots(Preset):
    """Shares slots behind exact prefixes.

    Args:
        spec: limits and gates.
        choice: the preset's choices.
        scout: looks at caches and checks calls.
        fingerprint: of the model.
        empty: makes a realigner that has learned nothing.
        line_breaks: token ids whose text holds a line break.
    """

    def __init__(
        self,
        spec: CommunicatorSpec,
        choice: PresetSpec,
        scout: Scout,
        fingerprint: str,
        empty: Callable[[], Realigner[Any]],
        line_breaks: frozenset[int] = frozenset(),
    ) -> None:
        self._spec = spec
        self._choice = choice
        self._scout = scout
        self._spans = scout.runner.spans
        self._brush = Brush(choice, line_breaks)
        self._picker = Picker(choice.recompute, scout)
        assert scout.runner.rope is not None, "slots are shared in models with a known rotation"
        self.keeper = Keeper(spec, fingerprint, scout.runner.rope)
        self.budget = self.keeper.budget
        self.learner = Learner(spec, empty, self.budget)
        self._matcher = Matcher(self.keeper.segments, choice.blocks, spec.max_depth)
        self._costs = Costs()
        self._still = NoOffset()
        self._rehearses = False
        self._passages = Passages(spec.min_tokens, self.keeper, scout)
        self._auditor = Auditor(spec, choice, self.learner, scout, self.keeper.rope, self._brush, self._picker)

    @property
    def learns(self) -> bool:
        """Whether its realigner needs observations."""
        return self.learner.fresh.exact.needs_warmup

    @property
    def nbytes(self) -> int:
        """Bytes of prefixes, segments and statistics."""
        return self.keeper.nbytes + self.learner.nbytes

    def begin(self, reader: Reader) -> None:
        """Fix which realigners the run sees."""
        self.learner.begin(reader)

    def plan(self, prompt: Prompt) -> SlotPlan:
        """Prefix, matches, gates, and the choice of computed tokens; see ``Preset.plan``."""
        parts = Parts()
        with self._spans.part(Part.MATCH), parts.timed("match"):
            lead, lost = self.keeper.lead(prompt)
            at = lead[-1].stop if lead else 0
            self.keeper.recall(prompt, at)
            found = self._matcher.match(prompt, at)
            demand_memory(prompt.reader, self.learner.ledger, lost=lost or found.lost)
        with self._spans.part(Part.PLAN), parts.timed("plan"):
            decisions = self._with_copies(prompt, self._decide(prompt, found.matches))
            poor = tuple(without_base(prompt, decisions)) if self._choice.repeats else ()
            labels = Labels(prompt, found.missing, at)
            self._brush.paint(labels, decisions, poor)
        matched = parts.match
        with self._spans.part(Part.MATCH), parts.timed("match"):
            ready = self._picker.pick(labels, lead, decisions)
        look_ms = parts.match - matched
        with self._spans.part(Part.PLAN), parts.timed("plan"):
            labels.check(strict=self._spec.strict)
            composition = replace(compose(labels, lead, decisions), ready=ready)
            return replace(self._plan(labels, composition, decisions, poor, parts), look_ms=look_ms)

    def placed(self, plan: Plan) -> None:
        """Give the arena of a look back."""
        assert isinstance(plan, SlotPlan), "a preset gets its own plans back"
        self._give_back(plan)

    def prefilled(self, prompt: Prompt, plan: Plan, arena: Arena) -> None:
        """Keep exact beginnings as prefixes, and what the run's later visits read as a reading."""
        assert isinstance(plan, SlotPlan), "a preset gets its own plans back"
        self._costs.see(plan.parts, plan.computed, plan.moved, plan.look_ms)
        self.keeper.keep_prompt(prompt, plan, arena)

    def finished(self, prompt: Prompt, plan: Plan, arena: Arena, message: tuple[int, ...]) -> None:
        """Keep the message, and learn from a dense call."""
        assert isinstance(plan, SlotPlan), "a preset gets its own plans back"
        self.keeper.keep_message(prompt, plan, arena, message)
        if _teaches(prompt, plan) and not plan.approximate:
            with self._spans.part(Part.LEARN):
                self._auditor.observe(prompt, plan.decisions, plan.apart, arena)

    def checked(self, prompt: Prompt, plan: Plan, cache: ArenaCache, logits: torch.Tensor) -> Slices[Audit | None]:
        """Check a sample of the calls that share; while a mesh is calibrated, all that might."""
        assert isinstance(plan, SlotPlan), "a preset gets its own plans back"
        if not _teaches(prompt, plan) or not (plan.audited or self._rehearses):
            return None
        audit = self._audit(prompt, plan, cache, logits)
        return (yield from noted(self._spans, Part.AUDIT, audit))

    def keeps(self, prompt: Prompt) -> int:
        """As in ``Preset``."""
        return self.keeper.awaited_tokens(prompt)

    def starved(self, reader: Reader) -> None:
        """What the run would have taught is missing: deterministic runs that come later must not go on without it."""
        self.learner.ledger.missed(reader.order)

    def closed(self, plan: Plan) -> None:
        """Unpin what the call read and wrote, give the arena of its look back."""
        assert isinstance(plan, SlotPlan), "a preset gets its own plans back"
        self.keeper.let_go(plan)
        self._give_back(plan)

    def release(self, run: str) -> None:
        """Free a run's segments, commit what it taught."""
        self.keeper.release(run)
        with self._spans.part(Part.LEARN):
            self.learner.end(run)

    def ingest(self, contents: Sequence[Content], header: tuple[int, ...], tenant: str = "") -> Slices[int]:
        """Keep passages of a corpus; those that are too short, kept already, or beyond the budget are left out."""
        return self._passages.ingest(contents, header, tenant)

    def observe_only(self, *, on: bool, checked: bool = False) -> None:
        """Count no slot as warm while on."""
        self.learner.observing, self._rehearses = on, on and checked

    def freeze(self) -> None:
        """Learn nothing from now on; slots that are cold stay so, and keep no other slot from being placed."""
        self.learner.freeze()

    def adopt(self, other: Preset) -> None:
        """Begin with the other's links."""
        assert isinstance(other, Slots), "presets adopt from their own kind"
        self.learner.ledger.adopt(other.learner.ledger)

    def attach(self, kept: Persistence) -> None:
        """Keep prefixes, readings and what links learn beyond this process."""
        self.learner.archive = kept.links
        self.keeper.attach(kept, readings=True)

    def settle(self) -> None:
        """Keep what links have learned, however little."""
        self.learner.settle()

    def _audit(self, prompt: Prompt, plan: SlotPlan, cache: ArenaCache, logits: torch.Tensor) -> Slices[Audit | None]:
        """Check a call that shared, or what sharing would have made of one that did not."""
        if plan.approximate:
            return (yield from self._auditor.audit(prompt, plan.decisions, plan.apart, cache, logits))
        with self.learner.rehearsing():
            decisions = self._decide(prompt, [one.match for one in plan.decisions if shares(one.match.relation)])
        return (yield from self._auditor.rehearse(prompt, self._with_copies(prompt, decisions), cache, logits))

    def _give_back(self, plan: SlotPlan) -> None:
        """Let the arena of a call's look be used again."""
        while plan.looked:
            self._scout.runner.pool.give(plan.looked.pop())

    def _decide(self, prompt: Prompt, matches: Sequence[Match]) -> tuple[Decision, ...]:
        """Gate every match; where one has to be observed first, or all together do not pay, none is placed."""
        decisions = tuple(Decision(match, self._gate(prompt, match)) for match in matches)
        if any(decision.verdict.cold for decision in decisions) and not self.learner.frozen:
            calm = Verdict(None, Reason.OBSERVING)
            return tuple(Decision(one.match, calm) if one.placed else one for one in decisions)
        asks = self._spec.cost_gate and not self.learner.frozen and not self._rehearses and self._clock_decides(prompt)
        shared = [one.match for one in decisions if one.shared]
        if asks and shared and not self._costs.placing_pays(self._left(shared)):
            dear = Verdict(None, Reason.NOT_WORTH_IT)
            return tuple(Decision(one.match, dear) if one.shared else one for one in decisions)
        return decisions

    def _clock_decides(self, prompt: Prompt) -> bool:
        """Whether a clock may decide what is computed: not in deterministic runs, nor where computing is a failure."""
        demanded = any(segment.comes_as_kv for segment in prompt.segments)
        return prompt.reader.sees is None and not self._spec.strict and not demanded

    def _left(self, matches: Sequence[Match]) -> int:
        """About how many tokens of matches are placed: not their heads, and not what is picked of the others."""
        behind = [(match, match.tokens - head(self._choice.recompute, match)) for match in matches]
        return sum(tokens for _, tokens in behind) - self._picker.about(behind)

    def _gate(self, prompt: Prompt, match: Match) -> Verdict:
        """Whether a match may be placed, whatever it costs (docs/method.md, 6.2)."""
        if prompt.reader.exact:
            return Verdict(None, Reason.READS_EXACTLY)
        if match.tokens < self._spec.min_tokens:
            return Verdict(None, Reason.TOO_SHORT)
        if match.relation is Relation.HISTORY:
            return Verdict(self._still)
        if not self._picker.can(match):
            return Verdict(None, Reason.MODEL_UNSUPPORTED)
        return self.learner.verdict(prompt.reader, match)

    def _with_copies(self, prompt: Prompt, decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
        """Decisions, and behind them those of parts of their matches that have a nearer base."""
        return decisions + tuple(self._copies(prompt, decisions))

    def _copies(self, prompt: Prompt, decisions: Sequence[Decision]) -> Iterator[Decision]:
        """Parts of matches that have a nearer base; placed where their match is."""
        for decision in decisions if self._choice.repeats else ():
            match = decision.match
            begin = match.start + head(self._choice.recompute, match)
            for found in copies(self.keeper.segments, prompt, match, begin, self._spec.max_depth):
                yield Decision(found, Verdict(self._still) if decision.placed else decision.verdict)

    def _plan(
        self,
        labels: Labels,
        composition: Composition,
        decisions: tuple[Decision, ...],
        poor: Sequence[Poor],
        parts: Parts,
    ) -> SlotPlan:
        def of_match(number: int, low: int, high: int) -> bytes:
            return decisions[number].match.depths(low, high)

        depths = labels.depths(of_match)
        reader = labels.prompt.reader
        moved = [decision.match.start for decision in decisions if decision.placed]
        exact_until, pieces = min(moved, default=len(labels)), composition.placed
        shareable, placed = labels.slot_tokens()
        plan = SlotPlan(
            composition,
            labels.rows(),
            shareable,
            placed,
            parts,
            depths,
            exact_until=exact_until,
            pinned=tuple(decision.match.number for decision in decisions),
            decisions=decisions,
            audited=any(depths) and reader.run != "" and draw(reader.seed, labels.prompt.tokens) < self._spec.audit,
            looked=[] if composition.ready is None else [composition.ready],
            apart=apart(decisions, poor),
            computed=len(composition.tokens) - composition.placed_tokens,
            moved=sum(piece.kv.tokens for piece in pieces if piece.start >= exact_until),
        )
        self.keeper.pin(plan)
        return plan


def _teaches(prompt: Prompt, plan: SlotPlan) -> bool:
    """Whether a call may be learned from, and checked."""
    return bool(prompt.reader.run) and not prompt.reader.exact and plan.teaches
