"""What stands in for a tokenizer where text is sent: nobody here knows the tokens of a remote model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from agentmesh.prompt import Prompt
from agentmesh.reasons import PlanRow, Reason, Treatment

BYTES_A_TOKEN = 4
"""How texts are counted until the endpoint says how long they are: about right for English, and no more than that."""


@final
class TextTokenizer:
    """Four bytes are a token, and a chat is written as a person would read it; no model ever sees either."""

    def encode(self, text: str, *, control: bool) -> list[int]:  # noqa: ARG002  # no string is special here
        """Numbers that ``decode`` makes the text of again."""
        data = text.encode("utf-8", "surrogatepass")
        pieces = [data[at : at + BYTES_A_TOKEN] for at in range(0, len(data), BYTES_A_TOKEN)]
        return [int.from_bytes(b"\1" + piece, "big") for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of numbers from ``encode``."""
        pieces = [token.to_bytes((token.bit_length() + 7) // 8, "big")[1:] for token in tokens]
        return b"".join(pieces).decode("utf-8", "replace")

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages one below the other, each under its role."""
        return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


def rows_of(prompt: Prompt, tokens: int) -> tuple[PlanRow, ...]:
    """A row for each segment of a prompt of so many tokens, which segments share by their length."""
    sizes = [len(segment.text) for segment in prompt.segments]
    whole, found, before = max(sum(sizes), 1), [], 0
    for index, segment in enumerate(prompt.segments, 1):
        upto = tokens * sum(sizes[:index]) // whole
        found.append(
            PlanRow(
                segment=segment.label,
                kind=Treatment.COMPUTED,
                tokens=upto - before,
                reason=Reason.REMOTE_TEXT,
                text=segment.text,
            )
        )
        before = upto
    return tuple(found)
