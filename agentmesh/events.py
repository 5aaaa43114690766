"""What happens in a run, as one versioned stream of typed events, and the records they carry.

One stream feeds the live display, the run folder, resume and replay. Everything here is plain data.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from agentmesh.config.base import Choice, Frozen
from agentmesh.metering import Audit, CheckRecord, EndpointUsage


class Treatment(Choice):
    """What happened to a run of prompt tokens."""

    PLACED_EXACT = "placed-exact"
    PLACED_REALIGNED = "placed-realigned"
    COMPUTED = "computed"


class Reason(Choice):
    """Why tokens were placed or computed. Nothing falls back, and nothing is reused, without one of these.

    ``about`` says what it means.
    """

    about: str

    def __new__(cls, value: str, about: str) -> Reason:  # noqa: PYI034  # `Self` came with Python 3.11
        """A reason and what it means."""
        made = str.__new__(cls, value)
        made._value_ = value
        made.about = about
        return made

    IDENTICAL_PREFIX = (
        "identical-prefix",
        "Same tokens after the same history were computed before: placed, bit for bit.",
    )
    SAME_HISTORY = (
        "same-history",
        "Same tokens after the same history, which holds realigned KV itself: placed as it is.",
    )
    READ_BEFORE = "read-before", "An earlier agent of the run read it: placed from that agent's context."
    WRITTEN_BEFORE = "written-before", "An earlier agent of the run wrote it: placed from what it decoded."
    FROM_CORPUS = "from-corpus", "A passage kept behind a neutral header: placed from there."
    COPIED = (
        "copied",
        "Its writer copied it from a text that is not in this prompt: placed from where the writer read it.",
    )
    ANCHORED = "anchored", "Fixed text behind a slot, placed with the offsets of that slot's anchors (`kvcomm`)."
    PRESET_DENSE = "preset-dense", "The preset computes everything."
    MODEL_UNSUPPORTED = "model-unsupported", "The probe refused the model's attention."
    NOT_SEEN = "not-seen", "This prefix was not computed before, or was evicted."
    BEHIND_PREFIX = "behind-prefix", "Differs from what was seen from here on, or belongs to one prompt alone."
    FIXED_TEXT = "fixed-text", "Fixed text of the agent's own template, behind its first slot."
    FIRST_READER = (
        "first-reader",
        "Nobody in this run has read or written it: its KV becomes the base for later readers.",
    )
    EVICTED = "evicted", "Its KV was dropped to keep the budget."
    TOO_SHORT = "too-short", "Shorter than `min_tokens`."
    BLOCK_HEAD = "block-head", "The first tokens of a placed block, computed to anchor it in its new context."
    LINE_BREAK = (
        "line-break",
        "A line break at the end of a placed block, computed to anchor the block in its new context.",
    )
    BESIDE_COPY = (
        "beside-copy",
        "Stands between words copied from a text that is not in this prompt, and depends on that text: computed.",
    )
    ECHO = (
        "echo",
        "Repeats a text ahead of it that its writer had not seen: computed, because nobody has made such KV.",
    )
    PICKED = "picked", "Tokens of a placed block that were picked to be computed (`recompute.ratio`, `documents`)."
    NO_KV = "no-kv", "The last token of a message has no KV, because nothing was decoded after it."
    NOT_WARM = "not-warm", "Too few observations of this slot: the whole call is computed, and observed."
    OBSERVING = (
        "observing",
        "Another slot of the call is not warm: the whole call is computed, so that what is observed is exact.",
    )
    PREDICTED_ERROR = "predicted-error", "The realigner expects an error above `max_kl`."
    BREAKER_OPEN = (
        "breaker-open",
        "Audits found an error above the limits: the slot is computed until it is learned again.",
    )
    TOO_DEEP = "too-deep", "Its KV was placed more often than `max_depth` already."
    NO_ROOM = "no-room", "The budget has no room for what must be learned of the slot."
    NOT_WORTH_IT = "not-worth-it", "Placing it would cost more time than computing it."
    REMOTE_TEXT = (
        "remote-text",
        "The agent's model is behind an endpoint, which is sent text and computes or caches it by itself.",
    )
    READS_EXACTLY = "reads-exactly", "The agent reads exact KV only (`reads: exact`)."
    DELIVERED_AS_TEXT = "delivered-as-text", "The edge says `deliver: text`."
    NO_ANCHOR_AS_LONG = (
        "no-anchor-as-long",
        "Fewer than two anchors are as long as the slot's content (paper, eq. 5): the call is computed.",
    )
    ANCHORS_TOO_EVEN = (
        "anchors-too-even",
        "The entropy of the anchors' weights is above the limit (paper, eq. 5): the call is computed.",
    )


FALLBACKS = frozenset(
    {
        Reason.MODEL_UNSUPPORTED,
        Reason.EVICTED,
        Reason.NOT_WARM,
        Reason.OBSERVING,
        Reason.PREDICTED_ERROR,
        Reason.BREAKER_OPEN,
        Reason.TOO_DEEP,
        Reason.NO_ROOM,
        Reason.NOT_WORTH_IT,
        Reason.NO_ANCHOR_AS_LONG,
        Reason.ANCHORS_TOO_EVEN,
    }
)
"""Reasons for computing what an earlier agent has read or written; ``strict`` turns them into errors."""

SHAREABLE = FALLBACKS | {
    Reason.SAME_HISTORY,
    Reason.READ_BEFORE,
    Reason.WRITTEN_BEFORE,
    Reason.FROM_CORPUS,
    Reason.COPIED,
    Reason.IDENTICAL_PREFIX,
    Reason.BLOCK_HEAD,
    Reason.LINE_BREAK,
    Reason.BESIDE_COPY,
    Reason.ECHO,
    Reason.PICKED,
    Reason.NO_KV,
    Reason.TOO_SHORT,
    Reason.READS_EXACTLY,
    Reason.DELIVERED_AS_TEXT,
}
"""Reasons of slot tokens that somebody has read or written before."""


class PlanRow(Frozen):
    """One run of a prompt's tokens with one treatment.

    ``segment`` names the text (``fixed``, ``question``, ``message solver.1@0``), ``kind`` the treatment, ``source``
    where placed KV came from. The ``text`` is there when the call has ended; the texts of a call's rows are its prompt.
    """

    segment: str
    kind: Treatment
    tokens: int
    source: str = ""
    reason: Reason
    text: str = ""


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
