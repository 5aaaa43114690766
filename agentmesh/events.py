"""What happens in a run, as one versioned stream of typed events, and the records they carry.

One stream feeds the live display, the run folder, resume and replay. Everything here is plain data.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from agentmesh.config.base import Frozen
from agentmesh.metering import Audit, CheckRecord, EndpointUsage
from agentmesh.reasons import PlanRow


class CallRecord(Frozen):
    """One model call. ``placed_exact + placed_realigned + computed = prompt_tokens``; times in milliseconds.

    ``ttft_ms`` counts from the moment the inputs are there to the first token, waiting for the engine included
    (``queue_ms`` of it); ``parts_ms`` is where the rest of it went, ``learn_ms`` what was spent after the message on
    keeping KV, learning and auditing. ``slot_tokens`` are shareable: an earlier agent read or wrote them, or the store
    holds them; ``placed_slots`` of them were placed. An ``endpoint`` answered the call of a remote model: tokens
    are counted as it counts them (as four bytes each where it does not say), and rows share them by their length.
    """

    node: str
    round: int
    preset: str
    prompt_tokens: int
    placed_exact: int
    placed_realigned: int
    computed: int
    output_tokens: int
    queue_ms: float
    ttft_ms: float
    decode_ms: float
    finish: str
    plan: tuple[PlanRow, ...]
    slot_tokens: int = 0
    placed_slots: int = 0
    parts_ms: dict[str, float] = Field(default_factory=dict)
    learn_ms: float = 0.0
    audit: Audit | None = None
    endpoint: EndpointUsage | None = None


class MessageRecord(Frozen):
    """What one visit of a node said."""

    node: str
    role: str
    round: int
    text: str
    tokens: int


class EventBase(Frozen):
    """Fields of every event: ``seq`` counts from 0 within a run, ``ts`` is Unix time in seconds."""

    v: Literal[1] = 1
    seq: int = 0
    ts: float = 0.0
    sample: str = ""


class RunStarted(EventBase):
    """A run begins."""

    type: Literal["run.started"] = "run.started"
    mesh: str
    preset: str
    model: str
    nodes: tuple[str, ...]
    rounds: int
    inputs: dict[str, str]


class NodeStarted(EventBase):
    """A node's inputs are there and it begins a visit."""

    type: Literal["node.started"] = "node.started"
    node: str
    round: int
    role: str
    attempt: int = 0


class NodeSkipped(EventBase):
    """A node does not run in a round, because no edge into it is active."""

    type: Literal["node.skipped"] = "node.skipped"
    node: str
    round: int
    reason: str


class NodeRetrying(EventBase):
    """A visit failed and is tried again."""

    type: Literal["node.retrying"] = "node.retrying"
    node: str
    round: int
    attempt: int
    error: str


class NodeFinished(EventBase):
    """A visit ended with a message."""

    type: Literal["node.finished"] = "node.finished"
    message: MessageRecord


class NodeFailed(EventBase):
    """A visit failed for good."""

    type: Literal["node.failed"] = "node.failed"
    node: str
    round: int
    error_type: str
    error: str


class EdgeTaken(EventBase):
    """A message went along an edge, or a condition kept it back."""

    type: Literal["edge"] = "edge"
    source: str
    target: str
    round: int
    taken: bool


class ModelStarted(EventBase):
    """A model call begins: its prompt is there, and waits for the engine or is prefilled."""

    type: Literal["model.started"] = "model.started"
    node: str
    round: int
    prompt_tokens: int


class FirstToken(EventBase):
    """A model call has its first token."""

    type: Literal["model.first_token"] = "model.first_token"
    node: str
    round: int
    ttft_ms: float
    prompt_tokens: int
    placed_exact: int
    placed_realigned: int
    computed: int


class TokenText(EventBase):
    """A piece of streamed text; shown live, not kept in the run folder."""

    type: Literal["model.token"] = "model.token"
    node: str
    round: int
    text: str


class ModelFinished(EventBase):
    """A model call ended."""

    type: Literal["model.finished"] = "model.finished"
    call: CallRecord


class Warned(EventBase):
    """Something the user should know that stops nothing."""

    type: Literal["warning"] = "warning"
    text: str


class JudgeChecked(EventBase):
    """A judge was asked once more, when the run's messages were all there; no part of messages, calls and answer."""

    type: Literal["judge.checked"] = "judge.checked"
    check: CheckRecord


class RunFinished(EventBase):
    """A run ended with an answer."""

    type: Literal["run.finished"] = "run.finished"
    answer: str
    wall_s: float


class RunFailed(EventBase):
    """A run ended without an answer."""

    type: Literal["run.failed"] = "run.failed"
    error_type: str
    error: str
    wall_s: float


class RunCancelled(EventBase):
    """A run was interrupted."""

    type: Literal["run.cancelled"] = "run.cancelled"
    wall_s: float


Event = Annotated[
    RunStarted
    | NodeStarted
    | NodeSkipped
    | NodeRetrying
    | NodeFinished
    | NodeFailed
    | EdgeTaken
    | ModelStarted
    | FirstToken
    | TokenText
    | ModelFinished
    | Warned
    | JudgeChecked
    | RunFinished
    | RunFailed
    | RunCancelled,
    Field(discriminator="type"),
]

_ADAPTER: TypeAdapter[Event] = TypeAdapter(Event)


def parse_event(data: str | bytes | dict[str, Any]) -> Event:
    """An event from a JSONL line or a dict.

    Raises:
        pydantic.ValidationError: the data is no event of this version.
    """
    return _ADAPTER.validate_python(data) if isinstance(data, dict) else _ADAPTER.validate_json(data)
