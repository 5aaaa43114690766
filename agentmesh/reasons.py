"""What happened to each run of a prompt's tokens, and why: the words in which every plan answers for itself."""

from __future__ import annotations

from agentmesh.config.base import Choice, Frozen


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
    ALL_OR_NONE = (
        "all-or-none",
        "Another slot is not placed (nobody has read it, or its edge wants text), and `kvcomm` places all or none.",
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
        Reason.ALL_OR_NONE,
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
