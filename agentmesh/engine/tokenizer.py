"""A transformers tokenizer as the prompt renderer and the decoder need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

GUARD = "\n"

UNFINISHED = "\ufffd"
"""What stands for bytes that are no whole character."""


class HubTokenizer:
    """Wraps a fast transformers tokenizer.

    Some tokenizers (SentencePiece) put a space before the first word of every text they are given, which would change
    text that is tokenised piece by piece. It is found out once, and then every piece is encoded behind a guard whose
    tokens are dropped.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._guard = GUARD if self._adds_space() else ""

    def encode(self, text: str, *, control: bool) -> list[int]:
        """Token ids of a piece of text; ``control`` lets control strings become control tokens."""
        head = self._ids(self._guard, control=control)
        return self._ids(self._guard + text, control=control)[len(head) :]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, control tokens included."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages as the chat template writes them; a model without one gets plain paragraphs.

        A template that refuses a system message gets it as the beginning of the first user message.
        """
        if self._tokenizer.chat_template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        if messages[0]["role"] == "system" and not self._takes_system():
            head, first, *rest = messages
            messages = [{"role": "user", "content": f"{head['content']}\n\n{first['content']}"}, *rest]
        text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text

    def stream(self) -> TextStream:
        """A fresh decoder for one generated message."""
        backend = self._tokenizer.backend_tokenizer
        return TextStream(lambda ids: str(backend.decode(list(ids), skip_special_tokens=True)))

    def _ids(self, text: str, *, control: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not control)
        return ids

    def _adds_space(self) -> bool:
        ids = self._tokenizer.encode("a", add_special_tokens=False)
        return self.decode([*ids, *ids]) != "aa"

    def _takes_system(self) -> bool:
        probe = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        try:
            self._tokenizer.apply_chat_template(probe, tokenize=False)
        except TemplateError:
            return False
        return True


class TextStream:
    """Turns generated ids into text as they come, whole characters at a time.

    A few ids before the new ones are decoded with them, since a tokenizer may write an id otherwise at the beginning
    of a text. Bytes that are no character are told with the next one that is.

    Args:
        decode: turns ids into text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._begin = self._told = 0
        self._before = ""

    def push(self, token: int) -> str:
        """The text that a token completes; empty while a character is unfinished."""
        self._ids.append(token)
        return self._tell(whole=True)

    def end(self) -> str:
        """What is left: bytes of a character that was not finished."""
        return self._tell(whole=False)

    def _tell(self, *, whole: bool) -> str:
        text = self._decode(self._ids[self._begin :])
        if len(text) <= len(self._before) or (whole and text.endswith(UNFINISHED)):
            return ""
        new, self._begin, self._told = text[len(self._before) :], self._told, len(self._ids)
        self._before = self._decode(self._ids[self._begin :])
        return new
