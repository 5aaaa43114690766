"""What answers model calls: the interface between agents and a model, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agentmesh.config.mesh import GenerateSpec
from agentmesh.metering import Audit, EndpointUsage
from agentmesh.prompt import ChatTokenizer, Content, Prompt, Reader
from agentmesh.reasons import PlanRow


@dataclass(frozen=True)
class Completion:
    """One finished model call.

    Args:
        tokens: generated ids without the stop token; those of a remote model stand for their number only.
        text: their text.
        finish: ``stop``, ``length`` or ``context``.
        queue_ms: waiting for the engine.
        ttft_ms: from the call to the first token, waiting included.
        decode_ms: from the first token to the last.
        rows: what was placed and computed, and why.
        preset: the strategy that decided it.
        slot_tokens, placed_slots: shareable slot tokens, and how many of them were placed.
        parts_ms: where the time before the first token went.
        learn_ms: keeping KV, learning and checking after the message.
        audit: the call checked against a dense prefill, where it was.
        endpoint: what the endpoint says of the call of a remote model, whose rows have their texts already.
    """

    tokens: tuple[int, ...]
    text: str
    finish: str
    queue_ms: float
    ttft_ms: float
    decode_ms: float
    rows: tuple[PlanRow, ...]
    preset: str
    slot_tokens: int = 0
    placed_slots: int = 0
    parts_ms: Mapping[str, float] = field(default_factory=dict)
    learn_ms: float = 0.0
    audit: Audit | None = None
    endpoint: EndpointUsage | None = None


class Listener(Protocol):
    """Hears of a model call while it runs."""

    @property
    def streams(self) -> bool:
        """Whether anybody wants the text as it comes; if nobody does, ``text`` need not be called."""

    def first(self, ttft_ms: float, rows: tuple[PlanRow, ...]) -> None:
        """The first token is out."""

    def text(self, piece: str) -> None:
        """A piece of text is out."""


class Backend(Protocol):
    """A model at work."""

    @property
    def name(self) -> str:
        """The model's name, for people."""

    @property
    def preset(self) -> str:
        """The communicator's preset in force."""

    @property
    def tokenizer(self) -> ChatTokenizer:
        """What prompts are tokenised with."""

    @property
    def width(self) -> int:
        """How many runs it serves well at once."""

    def describe(self) -> dict[str, str]:
        """What a run's manifest says of the model: name, fingerprint, dtype, device, supported reuse."""

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        """Answer a prompt. Cancelling frees what the call holds."""

    async def ingest(self, contents: Sequence[Content], tenant: str = "") -> int:
        """Keep passages of a corpus for a tenant before anybody reads them; how many were new and kept."""

    async def begin(self, reader: Reader) -> None:
        """A run begins; called in the order of the runs."""

    async def release(self, run: str) -> None:
        """A run has ended: free what was kept for it."""

    def close(self) -> None:
        """Free the model and everything kept for it."""
