"""What happens in a run, as one versioned stream of typed events, and the records they carry.

One stream feeds the live display, the run folder, resume and replay. Everything here is plain data.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from agentmesh.config.base import Choice, Frozen


class Treatment(Choice):
    """What happened to a run of prompt tokens."""

    PLACED_EXACT = "placed-exact"
    PLACED_REALIGNED = "placed-realigned"
    COMPUTED = "computed"


class Reason(Choice):
    """Why tokens were placed or computed. Nothing falls back without one of these."""

    IDENTICAL_PREFIX = "identical-prefix"
    """Same tokens after the same history were computed before: placed, bit for bit."""

    PRESET_DENSE = "preset-dense"
    """The preset computes everything."""

    MODEL_UNSUPPORTED = "model-unsupported"
    """The probe refused the model's attention: everything is computed."""

    NOT_SEEN = "not-seen"
    """This prefix was not computed before, or was evicted."""

    BEHIND_PREFIX = "behind-prefix"
    """Differs from what was seen from here on, or belongs to one prompt alone."""


class PlanRow(Frozen):
    """One run of a prompt's tokens with one treatment.

    ``segment`` names the text (``fixed``, ``question``, ``message solver.1@0``), ``kind`` the treatment, ``source``
    where placed KV came from.
    """

    segment: str
    kind: Treatment
    tokens: int
    source: str = ""
    reason: Reason


class CallRecord(Frozen):
    """One model call. ``placed_exact + placed_realigned + computed = prompt_tokens``; times in milliseconds.

    ``ttft_ms`` counts from the moment the inputs are there to the first token, waiting for the engine included
    (``queue_ms`` of it).
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
    | FirstToken
    | TokenText
    | ModelFinished
    | Warned
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
