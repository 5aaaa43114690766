"""What a run gives back, gathered from its events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from agentmesh.config.base import Frozen
from agentmesh.events import CallRecord, Event, JudgeChecked, MessageRecord, ModelFinished, NodeFinished
from agentmesh.metering import CheckRecord


class Usage(Frozen):
    """Tokens and time of one agent, or of a whole run. Times in milliseconds.

    ``endpoint_cached``: of the prompt tokens of remote models, those that endpoints say came from their own caches.
    """

    calls: int = 0
    prompt_tokens: int = 0
    placed_exact: int = 0
    placed_realigned: int = 0
    computed: int = 0
    output_tokens: int = 0
    ttft_ms: float = 0.0
    decode_ms: float = 0.0
    endpoint_cached: int = 0

    @property
    def cached(self) -> int:
        """Prompt tokens that were computed neither here nor, as they say, by endpoints."""
        return self.placed_exact + self.placed_realigned + self.endpoint_cached

    def plus(self, call: CallRecord) -> Usage:
        """This usage and one more call."""
        ours = set(type(self).model_fields) - {"calls", "endpoint_cached"}
        sums = {name: getattr(self, name) + getattr(call, name) for name in ours}
        cached = (call.endpoint.cached_tokens if call.endpoint else None) or 0
        return Usage(calls=self.calls + 1, endpoint_cached=self.endpoint_cached + cached, **sums)


def usage_of(calls: Iterable[CallRecord]) -> Usage:
    """The usage of some calls together."""
    total = Usage()
    for call in calls:
        total = total.plus(call)
    return total


class RunResult(Frozen):
    """A finished run.

    ``messages`` are in the order of the unrolled graph, ``calls`` (model calls only) in the order they ended.
    ``checks``: what judges said when they were asked once more; no part of anything else here, ``wall_s`` included.
    """

    answer: str
    messages: tuple[MessageRecord, ...]
    calls: tuple[CallRecord, ...]
    wall_s: float
    checks: tuple[CheckRecord, ...] = ()

    @property
    def usage(self) -> Usage:
        """The whole run's usage."""
        return usage_of(self.calls)

    @property
    def usage_by_agent(self) -> dict[str, Usage]:
        """Node → its usage."""
        found: dict[str, Usage] = {}
        for call in self.calls:
            found[call.node] = found.get(call.node, Usage()).plus(call)
        return found


@dataclass
class Gathered:
    """What the events of one run say of its result; give ``take`` to the run as a sink."""

    _calls: list[CallRecord] = field(default_factory=list)
    _messages: dict[tuple[str, int], MessageRecord] = field(default_factory=dict)
    _checks: list[CheckRecord] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Follow one event."""
        if isinstance(event, ModelFinished):
            self._calls.append(event.call)
        elif isinstance(event, NodeFinished):
            self._messages[event.message.node, event.message.round] = event.message
        elif isinstance(event, JudgeChecked):
            self._checks.append(event.check)

    def result(self, answer: str, order: Iterable[tuple[str, int]], wall_s: float) -> RunResult:
        """The result; ``order`` names node and round of each message."""
        messages = tuple(self._messages[key] for key in order)
        return RunResult(
            answer=answer, messages=messages, calls=tuple(self._calls), wall_s=wall_s, checks=tuple(self._checks)
        )


class PartTime(Frozen):
    """What the engine's thread spent on one part, or on one kind of work ``of`` a part.

    Kinds of work have no calls: they are shares of the forwards that were looked at, carried over to all of them.
    """

    name: str
    of: str = ""
    seconds: float
    share: float
    calls: int = 0


class Looked(Frozen):
    """How many forwards of one kind there were, their mean rows (tokens or sequences), and how many were looked at."""

    count: int
    mean_rows: float
    looked_at: int


class Profile(Frozen):
    """Where the engine's thread spent ``wall_s`` seconds: its parts add up to them.

    ``waited_s`` is what ``waited`` requests waited for the thread, side by side. ``outside`` is the share of decoding
    steps that is not spent in the model's own kernels, the operations that its code calls (matrix products, attention,
    norms, activations): Python, sampling, KV writes, masks and views; ``None`` where nothing was decoded. ``left_out``
    spans and operations are not in the trace, which is bounded.
    """

    wall_s: float
    waited_s: float
    waited: int
    parts: tuple[PartTime, ...]
    prefills: Looked
    steps: Looked
    outside: float | None
    left_out: int


def audits_line(calls: Sequence[CallRecord]) -> str:
    """What the audits of a run found; empty where there were none."""
    audits = [call.audit for call in calls if call.audit is not None]
    if not audits:
        return ""
    mean = sum(audit.kl for audit in audits) / len(audits)
    flips = sum(audit.flip for audit in audits)
    opened = sorted({name for audit in audits for name in audit.opened})
    tail = f"; now computed until learned again: {', '.join(opened)}" if opened else ""
    return f"audits: {len(audits)} call(s) checked against dense, mean KL {mean:.4f} nats, {flips} flip(s){tail}"
