"""What answers model calls: the interface between agents and a model, wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agentmesh.config.mesh import GenerateSpec
from agentmesh.events import PlanRow
from agentmesh.prompt import ChatTokenizer, Prompt


@dataclass(frozen=True)
class Completion:
    """One finished model call.

    Args:
        tokens: generated ids without the stop token.
        text: their text.
        finish: ``stop``, ``length`` or ``context``.
        queue_ms: waiting for the engine.
        ttft_ms: from the call to the first token, waiting included.
        decode_ms: from the first token to the last.
        rows: what was placed and computed, and why.
        preset: the strategy that decided it.
    """

    tokens: tuple[int, ...]
    text: str
    finish: str
    queue_ms: float
    ttft_ms: float
    decode_ms: float
    rows: tuple[PlanRow, ...]
    preset: str


class Listener(Protocol):
    """Hears of a model call while it runs."""

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

    def describe(self) -> dict[str, str]:
        """What a run's manifest says of the model: name, fingerprint, dtype, device, supported reuse."""

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        """Answer a prompt. Cancelling frees what the call holds."""

    def close(self) -> None:
        """Free the model and everything kept for it."""
