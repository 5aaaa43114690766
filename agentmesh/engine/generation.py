"""What the engine says of a request, and of its own time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FirstTokenReport:
    """The prompt is in: milliseconds since the request, of which ``queue_ms`` waiting for the engine."""

    queue_ms: float
    ttft_ms: float


@dataclass(frozen=True)
class Generation:
    """What one request produced.

    Args:
        tokens: generated ids without the stop token.
        text: their text.
        finish: ``stop``, ``length`` (the asked maximum) or ``context`` (the model's context is full).
        queue_ms: waiting for the engine, before the prefill and for steps in the middle of it.
        ttft_ms: from the request to the first token, waiting included.
        decode_ms: from the first token to the last.
        learn_ms: keeping KV, learning and checking after the message.
    """

    tokens: tuple[int, ...]
    text: str
    finish: str
    queue_ms: float
    ttft_ms: float
    decode_ms: float
    learn_ms: float


@dataclass
class Spent:
    """Where the engine's thread spent its time, in seconds, and the tokens that its decoding steps gave."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    keep_s: float = 0.0
    decoded: int = 0
