"""The values a prompt is made of. They know no tokenizer, model or agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from agentmesh.config.base import Choice


class ContentKind(Choice):
    """Where a slot's text comes from, which decides where its base KV comes from (docs/method.md, 3)."""

    INPUT = "input"
    MESSAGE = "message"
    DOCUMENT = "document"
    RESULT = "result"


def said(kind: ContentKind, node: str, round_: int) -> str:
    """The origin of what a node said in a round, such as ``message solver.1@0``."""
    return f"{kind} {node}@{round_}"


@dataclass(frozen=True)
class Content:
    """One run of text with one origin.

    Args:
        text: the text.
        kind: where it comes from.
        origin: its name in plans and events, such as ``question`` or ``message solver.1@0``.
        tokens: its token ids where they are given (a message keeps the ids it was generated as); ``None`` lets
            the renderer tokenise the text.
        deliver: ``auto``; ``text`` where its edge wants it computed, ``kv`` where it must be shared.
    """

    text: str
    kind: ContentKind
    origin: str
    tokens: tuple[int, ...] | None = None
    deliver: str = "auto"


@dataclass(frozen=True)
class Message:
    """What one visit of a node said: one content, or several (a retriever's passages)."""

    node: str
    role: str
    round: int
    contents: tuple[Content, ...]

    @property
    def text(self) -> str:
        """The whole text, contents separated by a blank line."""
        return "\n\n".join(content.text for content in self.contents)


FIXED = "fixed"
"""The label of segments that are no slots: text of templates."""


@dataclass(frozen=True)
class Segment:
    """A run of token ids with one origin; ``content`` is ``None`` for the fixed text of a template."""

    label: str
    text: str
    tokens: tuple[int, ...]
    content: Content | None = None

    @property
    def comes_as_kv(self) -> bool:
        """Whether its edge demands that it is shared: computing it is a failure."""
        return self.content is not None and self.content.deliver == "kv"


@dataclass(frozen=True)
class Reader:
    """Who reads a prompt, as far as sharing needs to know.

    Args:
        run: names the run; what is kept for it is freed when it ends.
        order: the run's place among all runs of its mesh; learning is committed in this order.
        sees: the last run whose learning this one may use; ``None`` for whatever is committed when it begins.
        consumer: the agent, by name; offsets are learned for each consumer.
        exact: whether it may read exact KV only.
        awaited: how many visits of the run are still to come before each content (by origin) is read again, this
            call's own message included; what is missing is not read again.
        held: origins that stay wanted though no visit reads them: judges are asked about them when the run is over.
        writes: origin of the message that this call writes.
        seed: of the call; decides whether it is audited.
        aside: whether the call is no part of its run: nothing is kept of it, and nothing learned from it.
        tenant: for whom the run is; what is kept or learned for one tenant is never seen by another.
    """

    run: str = ""
    order: int = 0
    sees: int | None = None
    consumer: str = ""
    exact: bool = False
    awaited: Mapping[str, int] = field(default_factory=dict)
    held: frozenset[str] = frozenset()
    writes: str = ""
    seed: int = 0
    aside: bool = False
    tenant: str = ""


@dataclass(frozen=True)
class Prompt:
    """An ordered list of segments, ready for the engine.

    Args:
        segments: the text in order; concatenating their tokens gives the prompt.
        points: declared reuse points, ascending positions inside the prompt at which another prompt's identical
            beginning may end. Prefill is cut there whether or not anything is reused.
        continues: whether a later prompt of the same conversation will begin with the whole of this one.
        reader: whose prompt it is.
        messages: the same as chat messages, role and text, for a model that is sent text.
    """

    segments: tuple[Segment, ...]
    points: tuple[int, ...] = ()
    continues: bool = False
    reader: Reader = field(default_factory=Reader)
    messages: tuple[tuple[str, str], ...] = ()

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The token ids of the whole prompt."""
        return tuple(token for segment in self.segments for token in segment.tokens)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The position of each segment's first token."""
        positions, at = [], 0
        for segment in self.segments:
            positions.append(at)
            at += len(segment.tokens)
        return tuple(positions)

    @cached_property
    def first_content(self) -> int:
        """The position at which its first content begins that has tokens; its end where there is none."""
        contents = (
            at for one, at in zip(self.segments, self.starts, strict=True) if one.content is not None and one.tokens
        )
        return next(contents, len(self.tokens))

    @property
    def text(self) -> str:
        """The prompt as a person would read it, control tokens included."""
        return "".join(segment.text for segment in self.segments)
