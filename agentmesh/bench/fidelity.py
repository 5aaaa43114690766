"""How far the presets' answers are from dense: KL of next-token distributions, teacher-forced (docs/method.md, 6.7).

For each question a dense run gives prompts and messages. Every preset prefills the same prompts and says the same
messages, twice: with the dense run's KV as bases (``kl_mean``), and with what it made itself, as in use
(``kl_chained``). Warm-up questions run dense under every preset, which only observes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from agentmesh.bench.figures import Fidelity, PresetFidelity
from agentmesh.bench.measured import Measured, common_calls, difference, mean_of_sharing, summary
from agentmesh.bench.rig import Call, Rig, Said, anchors_held, give_heap_back, keep, observe
from agentmesh.communicator import Preset, make
from agentmesh.communicator.base import Plan
from agentmesh.communicator.keeper import KeptPlan
from agentmesh.communicator.measures import divergence
from agentmesh.communicator.slots import SlotPlan
from agentmesh.config.presets import CommunicatorSpec, Recompute, RecomputeSpec, settings
from agentmesh.engine.composition import Placement
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.slices import at_once
from agentmesh.kv.values import ALL, KV, Frame, KVSource
from agentmesh.local import LocalBackend
from agentmesh.prompt import Content, ContentKind, Prompt, neutral_header

CONTROLS = ("wrong_consumer", "unrotated", "nothing_computed")
"""Another consumer's offsets, keys that are not rotated, nothing computed in the slots."""


@dataclass
class Subject:
    """One preset under measurement: with exact bases, and with its own."""

    name: str
    exact: Preset
    chained: Preset
    results: list[Measured] = field(default_factory=list)
    own: list[Measured] = field(default_factory=list)

    @property
    def presets(self) -> tuple[Preset, ...]:
        """Its presets."""
        return (self.exact,) if self.exact is self.chained else (self.exact, self.chained)

    def observe(self, call: Call, dense: Said) -> None:
        """A warm-up call; what it teaches is adopted later by the others."""
        observe(self.exact, call, dense)

    def measure(
        self,
        rig: Rig,
        call: Call,
        dense: Said,
        question: int,
        nodes: Sequence[str],  # noqa: ARG002  # a control needs it
    ) -> None:
        """A measured call, both ways."""
        place = len(self.results)
        plan = self.exact.plan(call.prompt)
        said = rig.composed(call, plan.composition)
        self.results.append(_measured(question, place, call, plan, dense, said))
        keep(self.exact, call, _forgetting(plan), dense)
        plan, said = rig.own(self.chained, call)
        self.own.append(_measured(question, place, call, plan, dense, said))


@dataclass
class Control(Subject):
    """A negative control on ``linear``: what must come out worse."""

    def measure(self, rig: Rig, call: Call, dense: Said, question: int, nodes: Sequence[str]) -> None:
        """A measured call with exact bases, spoilt."""
        plan = self._misled(call, nodes) if self.name == "wrong_consumer" else self.exact.plan(call.prompt)
        if plan is None:
            plan = self.exact.plan(call.prompt)
            unshared = _measured(question, len(self.results), call, plan, dense, dense)
            self.results.append(replace(unshared, placed_slots=0))
            keep(self.exact, call, _forgetting(plan), dense)
            return
        composition = plan.composition
        if self.name == "unrotated":
            pieces = [Placement(piece.start, _Unrotated(piece.kv)) for piece in composition.placed]
            composition = replace(composition, placed=tuple(pieces), ready=None)
        said = rig.composed(call, composition)
        self.results.append(_measured(question, len(self.results), call, plan, dense, said))
        keep(self.exact, call, _forgetting(plan), dense)

    def _misled(self, call: Call, nodes: Sequence[str]) -> Plan | None:
        """A plan with offsets of the next agent that has any for this call; ``None`` where nobody has.

        The first agent comes last: of what its team wrote, most is new to it, and what it wrote itself needs no offset.
        """
        first, *others = dict.fromkeys(nodes)
        at = others.index(call.node) if call.node in others else 0
        for wrong in (*others[at:], *others[:at], first):
            if wrong == call.node:
                continue
            plan = self.exact.plan(replace(call.prompt, reader=replace(call.prompt.reader, consumer=wrong)))
            assert isinstance(plan, SlotPlan), "controls spoil a preset that shares slots"
            if any(one.shared for one in plan.decisions):
                return plan
            self.exact.closed(plan)
        return None


def stores(names: Sequence[str]) -> int:
    """How many presets live at once: two of each name, and one for each control."""
    return 2 * len(names) + (len(CONTROLS) if "linear" in names else 0)


def controls(chosen: Mapping[str, CommunicatorSpec], new: Callable[[CommunicatorSpec], Preset]) -> list[Control]:
    """The negative controls on ``linear``; none without it."""
    if "linear" not in chosen:
        return []
    spec = chosen["linear"].model_copy(update={"max_kl": 1e9, "audit": 0.0})
    bare = spec.model_copy(update={"recompute": RecomputeSpec.exactly(Recompute()), "repeats": False})
    found = []
    for name in CONTROLS:
        preset = new(bare if name == "nothing_computed" else spec)
        found.append(Control(name, preset, preset))
    return found


def measure(
    backend: LocalBackend,
    questions: Iterator[Sequence[Call]],
    chosen: Mapping[str, CommunicatorSpec],
    warmup: int,
    *,
    corpus: bool,
    tick: Callable[[], None],
) -> Fidelity:
    """Measure presets on calls of dense runs.

    Args:
        backend: the model.
        questions: the calls of each question, the warm-up's first.
        chosen: preset → its settings.
        warmup: how many questions are observed only.
        corpus: whether passages are kept behind a neutral header before anybody reads them.
        tick: called after each question.
    """
    support, loaded = backend.engine.support, backend.engine.loaded
    assert isinstance(support.runner, ArenaRunner), "checked by the caller"

    def new(spec: CommunicatorSpec) -> Preset:
        return make(spec, support, loaded)

    rig, count = Rig(support.runner), 0
    header = neutral_header(backend.tokenizer) if corpus else None
    subjects = [Subject(name, new(spec), new(spec)) for name, spec in chosen.items()]
    spoilt = controls(chosen, new)
    for number, calls in enumerate(questions):
        observed = number < warmup
        if number == warmup:
            _adopt(subjects, spoilt)
        _question(rig, subjects if observed else [*subjects, *spoilt], calls, header, number, observed=observed)
        count += number >= warmup
        give_heap_back()
        tick()
    common = common_calls([subject.results for subject in subjects])
    linear = next((subject.results for subject in subjects if subject.name == "linear"), [])
    return Fidelity(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        n=count,
        settings=settings(chosen),
        presets={subject.name: _summary(subject, common) for subject in subjects},
        minus_linear={
            subject.name: found
            for subject in subjects
            if subject.name != "linear" and (found := difference(subject.results, linear)) is not None
        },
        controls={control.name: mean_of_sharing(control.results) for control in spoilt},
        controls_minus_linear={
            control.name: found for control in spoilt if (found := difference(control.results, linear)) is not None
        },
    )


def _adopt(subjects: Sequence[Subject], spoilt: Sequence[Control]) -> None:
    """Let everybody begin with what was learned in the warm-up."""
    for subject in subjects:
        subject.chained.adopt(subject.exact)
        for control in spoilt if subject.name == "linear" else ():
            control.exact.adopt(subject.exact)


def _question(
    rig: Rig,
    subjects: Sequence[Subject],
    calls: Sequence[Call],
    header: tuple[int, ...] | None,
    number: int,
    *,
    observed: bool,
) -> None:
    """All calls of one question under every preset."""
    nodes = [call.node for call in calls]
    contents = list(dict.fromkeys(content for call in calls for content in documents(call.prompt)))
    for preset in (preset for subject in subjects for preset in subject.presets):
        preset.observe_only(on=observed)
        if header is not None:
            at_once(preset.ingest(contents, header))
    for call in calls:
        dense = rig.dense(call)
        for subject in subjects:
            if observed:
                subject.observe(call, dense)
            else:
                subject.measure(rig, call, dense, number, nodes)
    for preset in (preset for subject in subjects for preset in subject.presets):
        preset.release(calls[0].prompt.reader.run)


@dataclass(frozen=True)
class _Unrotated:
    """Placed keys left as if they stood at the beginning of the prompt."""

    inner: KVSource

    @property
    def tokens(self) -> int:
        """Number of tokens ``T``."""
        return self.inner.tokens

    def fetch(self, layers: slice = ALL) -> KV:
        """The same rows in a frame that nobody rotates."""
        kv = self.inner.fetch(layers)
        return kv if kv.frame is Frame.ABSOLUTE else KV(kv.keys, kv.values, Frame.ABSOLUTE)


def documents(prompt: Prompt) -> list[Content]:
    """The passages in a prompt, with their tokens."""
    return [
        replace(segment.content, tokens=segment.tokens)
        for segment in prompt.segments
        if segment.content is not None and segment.content.kind is ContentKind.DOCUMENT
    ]


def _forgetting(plan: Plan) -> Plan:
    """The plan of a call whose KV is kept as dense but which teaches nothing more than it would in use."""
    if not isinstance(plan, KeptPlan) or not plan.approximate:
        return plan
    return replace(plan.as_dense(), teaches=False)


def _measured(question: int, place: int, call: Call, plan: Plan, dense: Said, said: Said) -> Measured:
    same = (dense.logits.argmax(dim=-1) == said.logits.argmax(dim=-1)).double().mean()
    kl = divergence(dense.logits, said.logits)
    return Measured(question, call.node, place, kl, float(same), plan.rows, plan.slot_tokens, plan.placed_slots)


def _summary(subject: Subject, common: set[tuple[int, int]]) -> PresetFidelity:
    return summary(subject.results, subject.own, common, anchors_held(subject.exact))
