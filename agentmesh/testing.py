"""Doubles for tests of meshes and agents: no weights, no torch, no network.

    model = ScriptedModel(["7", lambda prompt: "The answer is 7"])
    mesh = Mesh(agents={...}, topology="chain", model=model)
    mesh.run(question="3 + 4?")
    model.assert_complete()

For a tiny real model name ``random:tiny-llama`` (random weights, real engine, no download).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from agentmesh.backend import Completion, Listener
from agentmesh.config.mesh import GenerateSpec
from agentmesh.prompt import Content, Prompt, Reader
from agentmesh.reasons import PlanRow, Reason, Treatment

CONTROL = {"<|im_start|>": 256, "<|im_end|>": 257}

Reply = str | Exception | Callable[[str], str]


@final
class ByteTokenizer:
    """One token a byte, and ChatML control tokens: exact, tiny, and free of libraries."""

    def encode(self, text: str, *, control: bool) -> list[int]:
        """UTF-8 bytes; control strings become ids 256 and 257 where they may."""
        tokens: list[int] = []
        while text:
            name = next((name for name in CONTROL if control and text.startswith(name)), None)
            piece = name or text[0]
            tokens += [CONTROL[name]] if name else list(piece.encode())
            text = text[len(piece) :]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, control strings included."""
        names = {number: name.encode() for name, number in CONTROL.items()}
        return b"".join(names.get(token, bytes([token % 256])) for token in tokens).decode("utf-8", "replace")

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """ChatML."""
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        return "".join(turns) + "<|im_start|>assistant\n"


@dataclass(frozen=True)
class ScriptedCall:
    """One call that a scripted model answered."""

    prompt: Prompt
    generate: GenerateSpec
    seed: int
    streams: bool

    @property
    def text(self) -> str:
        """The whole prompt as text."""
        return self.prompt.text


@final
class ScriptedModel:
    """A backend that answers from a script.

    Args:
        replies: one for each call, in the order of the calls: a text, an exception to raise, or a function of the
            prompt's text. A single function instead of a list answers every call.
        name: the model's name in events.
    """

    def __init__(self, replies: Sequence[Reply] | Callable[[str], str], name: str = "scripted") -> None:
        self._replies = replies
        self.calls: list[ScriptedCall] = []
        self.name = name
        self.preset = "dense"
        self.width = 4
        self.tokenizer = ByteTokenizer()
        self.closed = False

    def describe(self) -> dict[str, str]:
        """The model's name."""
        return {"name": self.name}

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        """The next reply of the script.

        Raises:
            AssertionError: the script has ended.
        """
        begun = time.perf_counter()
        number = len(self.calls)
        self.calls.append(ScriptedCall(prompt, generate, seed, listener.streams))
        if callable(self._replies):
            reply: Reply = self._replies
        else:
            assert number < len(self._replies), f"call {number + 1}, but the script has {len(self._replies)} replies"
            reply = self._replies[number]
        if isinstance(reply, Exception):
            raise reply
        text = reply(prompt.text) if callable(reply) else reply
        kind, reason = Treatment.COMPUTED, Reason.PRESET_DENSE
        rows = tuple(
            PlanRow(segment=part.label, kind=kind, tokens=len(part.tokens), reason=reason) for part in prompt.segments
        )
        ttft = (time.perf_counter() - begun) * 1e3
        listener.first(ttft, rows)
        if listener.streams:
            listener.text(text)
        tokens = tuple(self.tokenizer.encode(text, control=False))
        return Completion(tokens, text, "stop", 0.0, ttft, 0.0, rows, self.preset)

    async def ingest(self, contents: Sequence[Content], tenant: str = "") -> int:  # noqa: ARG002  # the interface of a backend
        """Nothing is kept."""
        return 0

    async def begin(self, reader: Reader) -> None:
        """Nothing is kept for a run."""

    async def release(self, run: str) -> None:
        """Nothing is kept for a run."""

    def close(self) -> None:
        """Note that the mesh let go of the model."""
        self.closed = True

    def assert_complete(self) -> None:
        """Fail where replies are left over.

        Raises:
            AssertionError: some replies were never asked for.
        """
        if not callable(self._replies):
            left = len(self._replies) - len(self.calls)
            assert left <= 0, f"{left} replies of the script were never asked for"
