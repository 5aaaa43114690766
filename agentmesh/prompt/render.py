"""From a role's template to token ids: one renderer for every preset.

The role's template and then the model's own chat template are rendered with sentinels in the slots' places; the text is
split at the sentinels and every segment is tokenised by itself. So all presets run on identical token ids, slot borders
are exact, and a message's ids are the ones it was generated as.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentmesh.errors import TemplateError
from agentmesh.prompt.segments import FIXED, Content, Prompt, Segment
from agentmesh.prompt.templates import RoleTemplate, Scope


class ChatTokenizer(Protocol):
    """What the renderer needs of a tokenizer."""

    def encode(self, text: str, *, control: bool) -> list[int]:
        """Token ids of a piece of text as it stands inside a longer text, without automatic start tokens.

        ``control`` says whether control strings such as ``<|im_start|>`` become control tokens.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, control tokens included."""

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages (``role``, ``content``) as the model's chat template writes them, up to where it would answer."""


@dataclass(frozen=True)
class Exchange:
    """One earlier prompt of an agent and its reply, as kept by ``memory: conversation``.

    Args:
        pieces: the user turn as fixed text and contents.
        reply: the agent's message, with the ids it was generated as.
        prompt_tokens: length of the whole prompt that was answered.
    """

    pieces: tuple[str | Content, ...]
    reply: Content
    prompt_tokens: int


@dataclass(frozen=True)
class PromptRenderer:
    """Renders role templates for one tokenizer.

    Args:
        tokenizer: the model's tokenizer and chat template.
        min_tokens: reuse points closer than this to the one before are not declared.
    """

    tokenizer: ChatTokenizer
    min_tokens: int = 32

    def render(
        self,
        template: RoleTemplate,
        scope: Scope,
        history: Sequence[Exchange] | None = None,
        *,
        leads: Sequence[Sequence[int]] = (),
    ) -> tuple[Prompt, tuple[str | Content, ...]]:
        """A prompt, and its user turn in pieces for a later ``Exchange``.

        Args:
            template: the agent's role.
            scope: the names it sees.
            history: earlier exchanges, oldest first, that come before the new turn; ``None`` for an agent without
                memory, whose prompts nothing continues.
            leads: token ids that other agents' prompts begin with; where they stop being identical to this prompt's
                own beginning, a reuse point is declared; where one is the same, the ends of slots are points, too.

        Raises:
            TemplateError: the template fails, or the chat template drops or repeats a slot.
        """
        system, user = template.render(scope)
        turn = tuple(scope.split(user))
        messages = [{"role": "system", "content": system}] if system else []
        for exchange in history or ():
            messages.append({"role": "user", "content": self._sentinels(exchange.pieces, scope)})
            messages.append({"role": "assistant", "content": self._sentinels((exchange.reply,), scope)})
        messages.append({"role": "user", "content": user})
        pieces = scope.split(self.tokenizer.chat(messages))
        self._check_slots(pieces, scope.split("".join(message["content"] for message in messages)))
        segments = self._segments(pieces)
        points = self._points(segments, leads, [exchange.prompt_tokens for exchange in history or ()])
        texts = tuple((message["role"], _text(scope.split(message["content"]))) for message in messages)
        return Prompt(segments, points, continues=history is not None, messages=texts), turn

    def _sentinels(self, pieces: Sequence[str | Content], scope: Scope) -> str:
        """Pieces of an earlier turn as text with this scope's sentinels."""
        texts = []
        for piece in pieces:
            if isinstance(piece, Content):
                scope.handle(piece)
                texts.append(scope.sentinel(len(scope.contents) - 1))
            else:
                texts.append(piece)
        return "".join(texts)

    def _check_slots(self, found: Sequence[str | Content], wanted: Sequence[str | Content]) -> None:
        contents = [piece for piece in found if isinstance(piece, Content)]
        if contents != [piece for piece in wanted if isinstance(piece, Content)]:
            raise TemplateError(
                "the model's chat template changes, drops or repeats the content of a slot; "
                "agentmesh cannot find the slots' borders in its output. Use a model with a plain chat template"
            )

    def _segments(self, pieces: Sequence[str | Content]) -> tuple[Segment, ...]:
        segments = []
        for piece in pieces:
            if isinstance(piece, str):
                tokens = tuple(self.tokenizer.encode(piece, control=True))
                segments.append(Segment(FIXED, piece, tokens))
            else:
                ids = piece.tokens
                tokens = tuple(self.tokenizer.encode(piece.text, control=False)) if ids is None else ids
                segments.append(Segment(piece.origin, piece.text, tokens, piece))
        return tuple(segments)

    def _points(
        self, segments: Sequence[Segment], leads: Sequence[Sequence[int]], ends: Sequence[int]
    ) -> tuple[int, ...]:
        """Declared reuse points: where identical beginnings of other prompts end, and the leading fixed text.

        Where another agent has the same leading text, its prompt may go on with the same slots (role-last layout,
        docs/method.md, 5), so each slot's end is a point, too.
        """
        total = sum(len(segment.tokens) for segment in segments)
        candidates = set(ends)
        if segments[0].content is None:
            own = segments[0].tokens
            candidates |= {len(own), *shared_beginnings(leads, own)}
            if sum(tuple(lead) == own for lead in leads) > 1:
                candidates |= _slot_ends(segments)
        points: list[int] = []
        for point in sorted(candidates):
            if (points[-1] if points else 0) + self.min_tokens <= point < total:
                points.append(point)
        return tuple(points)


def _text(pieces: Sequence[str | Content]) -> str:
    """Pieces as they read."""
    return "".join(piece.text if isinstance(piece, Content) else piece for piece in pieces)


def _slot_ends(segments: Sequence[Segment]) -> set[int]:
    """Positions behind the slots of a prompt."""
    ends, at = set(), 0
    for segment in segments:
        at += len(segment.tokens)
        if segment.content is not None:
            ends.add(at)
    return ends


def neutral_header(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """What a passage of a corpus stands behind while its KV is made: the chat template with a plain system text."""
    mark = "\ue002"
    turns = [{"role": "system", "content": "You are given a document."}, {"role": "user", "content": mark}]
    return tuple(tokenizer.encode(tokenizer.chat(turns).partition(mark)[0], control=True))


def shared_beginnings(leads: Sequence[Sequence[int]], own: Sequence[int]) -> tuple[int, ...]:
    """Lengths at which other agents' leading tokens stop being identical to ``own`` (docs/method.md, 5)."""
    lengths = set()
    for lead in leads:
        same = 0
        for mine, theirs in zip(own, lead, strict=False):
            if mine != theirs:
                break
            same += 1
        if 0 < same < len(own):
            lengths.add(same)
    return tuple(sorted(lengths))
