"""Time to first token in the paper's setting (arXiv 2510.12872, table 2).

Fully connected agents, each with a fixed prefix of its own, read the same question and all earlier messages. Everything
between the prompt and its first token counts: planning, matching, realigning, copying, the forward. Learning is outside
and reported by itself. Passages of documents may stand before the question (docs/method.md, 5). Messages are text of
the asked length, prefilled in their sender's context, so that a measurement takes minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from agentmesh.bench.data import Passages
from agentmesh.bench.fidelity import documents
from agentmesh.bench.figures import PresetTimes, Speedup, Times, refused
from agentmesh.bench.rig import Call, Rig, Timed, anchors_held, median_parts
from agentmesh.bench.text import english_tokens
from agentmesh.communicator import Preset, make
from agentmesh.config.base import Choice
from agentmesh.config.presets import CommunicatorSpec, settings, specs
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.slices import at_once
from agentmesh.local import LocalBackend
from agentmesh.prompt import FIXED, ChatTokenizer, Content, ContentKind, Prompt, Reader, Segment, neutral_header
from agentmesh.reasons import Treatment

COMMON_PREFIX = 32


class Layout(Choice):
    """Where an agent's own fixed text stands: before what the agents share, or behind it (docs/method.md, 5)."""

    ROLE_FIRST = "role-first"
    ROLE_LAST = "role-last"


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        agents: how many there are.
        question: tokens of the question.
        prefix: tokens of each agent's own fixed text.
        output: tokens of each message.
        layout: where the agents' own text stands, for presets that do not say.
        passages: documents that stand before the question.
        corpus: whether passages are kept behind a neutral header before anybody reads them.
    """

    agents: int
    question: int
    prefix: int
    output: int
    layout: Layout
    passages: Passages | None = None
    corpus: bool = False


def layout_of(name: str, setting: Setting) -> Layout:
    """The layout that a preset is measured in: its own (``NAME@role-last``), or the setting's."""
    _, _, layout = name.partition("@")
    return Layout(layout) if layout else setting.layout


@dataclass
class _Subject:
    name: str
    preset: Preset
    layout: Layout
    rounds: list[list[Timed]] = field(default_factory=list)
    learn_ms: float = 0.0
    keep_ms: list[float] = field(default_factory=list)
    ingest_ms: list[float] = field(default_factory=list)
    kv_bytes: int = 0


def measure(
    backend: LocalBackend,
    base: CommunicatorSpec,
    names: Sequence[str],
    setting: Setting,
    *,
    warmup: int,
    repeat: int,
    tick: Callable[[], None],
) -> Times:
    """Time presets on the same calls.

    Args:
        backend: the model.
        base: settings of every preset, such as the budget.
        names: presets; ``NAME@role-last`` measures one in a layout of its own.
        setting: sizes.
        warmup: rounds that are not counted.
        repeat: rounds whose medians are reported.
        tick: called after each preset's round.
    """
    support, loaded = backend.engine.support, backend.engine.loaded
    assert isinstance(support.runner, ArenaRunner), "checked by the caller"
    rig = Rig(support.runner)
    chosen = specs(base, [name.partition("@")[0] for name in names])
    subjects = [
        _Subject(name, make(chosen[name.partition("@")[0]], support, loaded), layout_of(name, setting))
        for name in names
    ]
    for number in range(warmup + repeat):
        turn = number % len(subjects)
        for subject in subjects[turn:] + subjects[:turn]:
            calls = round_of_calls(backend.tokenizer, setting, subject.layout, number)
            if setting.corpus:
                subject.ingest_ms.append(_ingest(subject.preset, calls[0], neutral_header(backend.tokenizer)))
            timed = [rig.timed(subject.preset, call) for call in calls]
            subject.kv_bytes = max(subject.kv_bytes, subject.preset.nbytes)
            keep_ms = sum(one.learn_ms for one in timed) + rig.released(subject.preset, f"round {number}")
            if number < warmup:
                subject.learn_ms += keep_ms
            else:
                subject.rounds.append(timed)
                subject.keep_ms.append(keep_ms)
            tick()
    presets = {subject.name: _summary(subject, setting.agents) for subject in subjects}
    described = {**asdict(setting), "warmup": warmup, "repeat": repeat, "presets": settings(chosen)}
    return Times(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        settings=described,
        presets=presets,
        speedup=_speedups(presets),
    )


def round_of_calls(tokenizer: ChatTokenizer, setting: Setting, layout: Layout, number: int) -> list[Call]:
    """The agents' calls on one question; only question and messages differ between rounds."""
    shared = [
        Content(
            "", ContentKind.DOCUMENT, f"document {one}", english_tokens(tokenizer, f"passage {number} {one}", tokens)
        )
        for one, tokens in enumerate(setting.passages.sizes if setting.passages else (), 1)
    ]
    question = english_tokens(tokenizer, f"question {number}", setting.question)
    shared.append(Content("", ContentKind.INPUT, "question", question))
    messages: list[Content] = []
    calls = []
    for agent in range(1, setting.agents + 1):
        name = f"agent.{agent}"
        label = f"message {name}@0"
        said = english_tokens(tokenizer, f"message {number} {agent}", setting.output)
        prompt = _prompt(tokenizer, setting, layout, agent, [*shared, *messages])
        awaited = {content.origin: 1 for content in (*shared, *messages)} | {label: 1}
        reader = Reader(f"round {number}", number, None, name, awaited=awaited, writes=label, seed=number)
        calls.append(Call(Prompt(prompt.segments, prompt.points, reader=reader), said))
        messages.append(Content("", ContentKind.MESSAGE, label, said))
    return calls


def _prompt(
    tokenizer: ChatTokenizer, setting: Setting, layout: Layout, agent: int, contents: Sequence[Content]
) -> Prompt:
    own = english_tokens(tokenizer, f"role {agent}", setting.prefix)
    first = layout is Layout.ROLE_FIRST
    lead = own if first else english_tokens(tokenizer, "team", COMMON_PREFIX)
    segments, points, at = [Segment(FIXED, "", lead)], [len(lead)], len(lead)
    for content in contents:
        label = tuple(tokenizer.encode(_label(content), control=False))
        assert content.tokens is not None, "a bench gives contents as tokens"
        segments += [Segment(FIXED, "", label), Segment(content.origin, "", content.tokens, content)]
        at += len(label) + len(content.tokens)
        if not first:
            points.append(at)
    end = tuple(tokenizer.encode("\n\nAnswer the question.\n", control=False))
    segments.append(Segment(FIXED, "", end if first else (*own, *end)))
    return Prompt(tuple(segments), tuple(points))


def _label(content: Content) -> str:
    """The fixed text before a content."""
    if content.kind is ContentKind.MESSAGE:
        return f"\n\n{content.origin.removeprefix('message ').partition('@')[0]} wrote:\n"
    return "\n\nPassage:\n" if content.kind is ContentKind.DOCUMENT else "\n\nQuestion:\n"


def _ingest(preset: Preset, call: Call, header: tuple[int, ...]) -> float:
    """Milliseconds to keep a call's passages as those of a corpus."""
    begun = time.perf_counter()
    at_once(preset.ingest(documents(call.prompt), header))
    return (time.perf_counter() - begun) * 1e3


def _summary(subject: _Subject, agents: int) -> PresetTimes:
    columns = [[timed[agent] for timed in subject.rounds] for agent in range(agents)]
    medians = tuple(statistics.median(one.ttft_ms for one in column) for column in columns)
    parts = tuple(median_parts(column) for column in columns)
    return PresetTimes(
        by_agent_ms=medians,
        sum_ms=sum(medians),
        parts_ms={name: sum(part[name] for part in parts) for name in parts[0]},
        parts_by_agent_ms=parts,
        learn_ms=subject.learn_ms,
        keep_ms=statistics.median(subject.keep_ms),
        ingest_ms=statistics.median(subject.ingest_ms) if subject.ingest_ms else 0.0,
        kv_bytes=subject.kv_bytes,
        placed=tuple(column[-1].plan.composition.placed_tokens for column in columns),
        computed=tuple(column[-1].plan.count(Treatment.COMPUTED) for column in columns),
        calls_shared=tuple(sum(one.plan.placed_slots > 0 for one in column) for column in columns),
        anchors_held=anchors_held(subject.preset),
        reasons=tuple(refused(one.plan.rows for one in column) for column in columns),
    )


def _speedups(presets: Mapping[str, PresetTimes]) -> dict[str, Speedup]:
    if "dense" not in presets:
        return {}
    dense = presets["dense"]
    return {
        name: Speedup(
            by_agent=tuple(a / b for a, b in zip(dense.by_agent_ms, times.by_agent_ms, strict=True)),
            sum=dense.sum_ms / times.sum_ms,
        )
        for name, times in presets.items()
    }
