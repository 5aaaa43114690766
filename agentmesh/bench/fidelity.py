"""How far the presets' answers are from dense: KL of next-token distributions, teacher-forced (METHOD 5, 6.7).

For each question a dense run gives prompts and messages. Every preset prefills the same prompts and says the same
messages, twice: with the dense run's KV as bases (``kl_mean``), and with what it made itself, as in use
(``kl_chained``). Warm-up questions run dense under every preset, which only observes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from agentmesh.bench.figures import AgentFidelity, Fidelity, PresetFidelity
from agentmesh.bench.rig import Call, Rig, Said, keep, observe
from agentmesh.communicator import Preset, make
from agentmesh.communicator.base import Plan
from agentmesh.communicator.keeper import KeptPlan
from agentmesh.communicator.kvcomm import KVComm
from agentmesh.communicator.measures import divergence
from agentmesh.config.presets import CommunicatorSpec, Recompute, settings
from agentmesh.engine.composition import Placement
from agentmesh.engine.forward import ArenaRunner
from agentmesh.events import PlanRow, Treatment
from agentmesh.kv.values import ALL, KV, Frame, KVSource
from agentmesh.local import LocalBackend
from agentmesh.prompt import Content, ContentKind, Prompt, neutral_header

RESAMPLES = 1000


@dataclass(frozen=True)
class Measured:
    """One call under one preset: KL by token ``[T]``, agreement of the likeliest token, and what its plan counted.

    The plan itself would hold the KV that it placed.
    """

    question: int
    node: str
    place: int
    kl: torch.Tensor
    top1: float
    rows: tuple[PlanRow, ...]
    slot_tokens: int
    placed_slots: int

    @property
    def shares(self) -> bool:
        """Whether any slot was placed."""
        return self.placed_slots > 0

    @property
    def computed(self) -> dict[str, int]:
        """Computed tokens by their reason."""
        found: dict[str, int] = {}
        for row in self.rows:
            if row.kind is Treatment.COMPUTED and row.tokens:
                found[str(row.reason)] = found.get(str(row.reason), 0) + row.tokens
        return found


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
        prompt = call.prompt
        if self.name == "wrong_consumer":
            others = [node for node in nodes if node != call.node]
            wrong = others[nodes.index(call.node) % len(others)] if others else call.node
            prompt = replace(prompt, reader=replace(prompt.reader, consumer=wrong))
        plan = self.exact.plan(prompt)
        composition = plan.composition
        if self.name == "unrotated":
            pieces = [Placement(piece.start, _Unrotated(piece.kv)) for piece in composition.placed]
            composition = replace(composition, placed=tuple(pieces), ready=None)
        said = rig.composed(call, composition)
        self.results.append(_measured(question, len(self.results), call, plan, dense, said))
        keep(self.exact, call, _forgetting(plan), dense)


def controls(chosen: Mapping[str, CommunicatorSpec], new: Callable[[CommunicatorSpec], Preset]) -> list[Control]:
    """Another consumer's offsets, keys that are not rotated, nothing computed in the slots; none without ``linear``."""
    if "linear" not in chosen:
        return []
    spec = chosen["linear"].model_copy(update={"max_kl": 1e9, "audit": 0.0})
    bare = spec.model_copy(update={"recompute": Recompute()})
    kinds = (("wrong_consumer", spec), ("unrotated", spec), ("nothing_computed", bare))
    found = []
    for name, one in kinds:
        preset = new(one)
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
        tick()
    common = _common(subjects)
    return Fidelity(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        n=count,
        settings=settings(chosen),
        presets={subject.name: _summary(subject, common) for subject in subjects},
        controls={control.name: _mean_of_sharing(control.results) for control in spoilt},
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
            preset.ingest(contents, header)
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


def _common(subjects: Sequence[Subject]) -> set[tuple[int, int]]:
    """Calls (question, place) that share under every preset that shares slots at all."""
    sets = [{(m.question, m.place) for m in subject.results if m.shares} for subject in subjects]
    sharing = [found for found in sets if found]
    return set.intersection(*sharing) if sharing else set()


def _summary(subject: Subject, common: set[tuple[int, int]]) -> PresetFidelity:
    shared = [m for m in subject.results if m.shares]
    own = [m for m in subject.own if m.shares]
    tokens = torch.cat([m.kl for m in shared]) if shared else torch.zeros(1)
    agents = list(dict.fromkeys(m.node for m in subject.results))
    reasons: Counter[str] = Counter()
    for measured in subject.results:
        reasons.update(measured.computed)
    return PresetFidelity(
        kl_mean=_mean(shared),
        kl_chained=_mean(own),
        kl_common=_mean([m for m in shared if (m.question, m.place) in common]),
        kl_first=float(torch.stack([m.kl[0] for m in shared]).mean()) if shared else 0.0,
        kl_p99=float(tokens.quantile(0.99)),
        ci95=_interval(shared),
        top1=_top1(shared),
        slot_tokens=sum(m.slot_tokens for m in subject.results),
        placed_tokens=sum(m.placed_slots for m in subject.results),
        computed_tokens=sum(sum(m.computed.values()) for m in shared),
        calls=len(subject.results),
        calls_shareable=sum(m.slot_tokens > 0 for m in subject.results),
        calls_shared=len(shared),
        anchors_held=subject.exact.pools.held if isinstance(subject.exact, KVComm) else 0,
        reasons=dict(reasons),
        by_agent={node: _agent([m for m in subject.results if m.node == node]) for node in agents},
        chained_by_agent={node: _mean([m for m in own if m.node == node]) for node in agents},
    )


def _agent(results: Sequence[Measured]) -> AgentFidelity:
    shared = [m for m in results if m.shares]
    return AgentFidelity(
        kl_mean=_mean(shared),
        top1=_top1(shared),
        placed_tokens=sum(m.placed_slots for m in results),
        slot_tokens=sum(m.slot_tokens for m in results),
    )


def _mean(results: Sequence[Measured]) -> float:
    """Mean KL over all tokens; 0 where nothing shares."""
    return float(torch.cat([m.kl for m in results]).mean()) if results else 0.0


def _mean_of_sharing(results: Sequence[Measured]) -> float | None:
    """Mean KL over the calls that share; ``None`` where none does."""
    shared = [m for m in results if m.shares]
    return _mean(shared) if shared else None


def _top1(results: Sequence[Measured]) -> float:
    """Share of tokens whose likeliest next token is dense's; 1 where nothing shares."""
    total = sum(len(m.kl) for m in results)
    return sum(m.top1 * len(m.kl) for m in results) / total if total else 1.0


def _interval(results: Sequence[Measured]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean KL, resampling questions."""
    questions = sorted({m.question for m in results})
    if not questions:
        return 0.0, 0.0
    sums = torch.tensor([sum(float(m.kl.sum()) for m in results if m.question == q) for q in questions])
    sizes = torch.tensor([float(sum(len(m.kl) for m in results if m.question == q)) for q in questions])
    picks = torch.randint(len(questions), (RESAMPLES, len(questions)), generator=torch.Generator().manual_seed(0))
    means = sums[picks].sum(dim=1) / sizes[picks].sum(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high
