"""What an OpenAI client asks for, as a run of a mesh: which messages become which inputs, which parameters count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentmesh.blueprint import Blueprint
from agentmesh.config.base import Choice, Integer, Number
from agentmesh.config.mesh import AnswerSpec
from agentmesh.errors import did_you_mean
from agentmesh.serve.problems import RefusedError

SYSTEM, HISTORY = "system", "history"
"""Inputs that a mesh may declare: the system messages' text, and the turns before the last message."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "n": (1,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }
)
"""Parameters that a mesh cannot heed, and the values that ask for nothing; any other value is refused."""

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "reasoning_effort",
        "verbosity",
    }
)
"""Parameters that change no answer here."""


STOPS = 4
"""Stop texts of one request, as with OpenAI: each is looked for behind every token."""


class Unheard(Choice):
    """What to do with messages that a mesh has no input for."""

    REFUSE = "refuse"
    DROP = "drop"


class TextPart(BaseModel):
    """A piece of a message; text is all that a mesh reads."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """Its text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(BaseModel):
    """What a stream holds besides text."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of ``/v1/chat/completions``; ``inputs`` is ours, for meshes that read more than a question."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: Integer | None = None
    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    inputs: dict[str, str] = Field(default_factory=dict)

    def check(self) -> None:
        """Refuse what a mesh cannot heed, rather than leave it unheard.

        Raises:
            RefusedError: a parameter that is unknown, or has a value that asks for something.
        """
        if self.stream_options is not None and not self.stream:
            raise RefusedError(
                400, "'stream_options' are for streams; send `stream: true`, too", param="stream_options"
            )
        if isinstance(self.stop, list) and len(self.stop) > STOPS:
            raise RefusedError(400, f"{len(self.stop)} stop texts; expected at most {STOPS}", param="stop")
        for number, message in enumerate(self.messages):
            if message.tool_calls or message.function_call:
                raise RefusedError(
                    400,
                    f"message {number + 1} calls a tool, and a mesh reads text alone; send what the tool said as text",
                    param=f"messages[{number}]",
                    code="unsupported_messages",
                )
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name not in NEUTRAL:
                known = [*type(self).model_fields, *NEUTRAL, *IGNORED]
                raise RefusedError(
                    400,
                    f"unknown parameter {name[:80]!r}.{did_you_mean(name, known)}",
                    param=name,
                    code="unknown_parameter",
                )
            if value not in NEUTRAL[name]:
                can = " or ".join(map(repr, NEUTRAL[name])) or "null"
                raise RefusedError(
                    400,
                    f"a mesh cannot heed {name!r}; leave it out, or send {can}",
                    param=name,
                    code="unsupported_parameter",
                )

    @property
    def answer(self) -> AnswerSpec:
        """What is asked of the answer."""
        limits = [most for most in (self.max_tokens, self.max_completion_tokens) if most is not None]
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return AnswerSpec(
            max_tokens=min(limits, default=None),
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(text for text in stop if text),
        )


def inputs_of(asked: ChatRequest, blueprint: Blueprint, unheard: Unheard) -> tuple[dict[str, str], tuple[str, ...]]:
    """A run's inputs, and what was dropped of the messages.

    The last message goes to the mesh's main input, others to ``system`` and ``history`` where the mesh reads them.

    Args:
        asked: messages and inputs.
        blueprint: of the mesh.
        unheard: what to do with messages that it has no input for.

    Raises:
        RefusedError: an input is given twice, or messages have no input to go to.
    """
    *earlier, last = asked.messages
    if last.role != "user":
        raise RefusedError(400, f"the last message is the {last.role}'s; expected the user's", param="messages")
    found = {blueprint.main_input: last.text}
    dropped = []
    for name, text in ((SYSTEM, _system(earlier)), (HISTORY, _history(earlier))):
        if text and name in blueprint.inputs:
            found[name] = text
        elif text and unheard is Unheard.DROP:
            dropped.append(name)
        elif text:
            raise RefusedError(
                400,
                f"mesh {blueprint.name!r} has no input for {WHAT[name]}; send the last user message alone, or declare "
                f"`{name}` under the mesh's `inputs:` (a server started with --unheard drop leaves it out)",
                param="messages",
                code="unsupported_messages",
            )
    for name, text in asked.inputs.items():
        if name in found:
            raise RefusedError(400, f"input {name!r} is given twice, by a message and in `inputs`", param="inputs")
        found[name] = text
    return found, tuple(dropped)


WHAT: Mapping[str, str] = MappingProxyType({SYSTEM: "system messages", HISTORY: "earlier messages"})


def _system(messages: Sequence[ChatMessage]) -> str:
    return "\n\n".join(message.text for message in messages if message.role in ("system", "developer") and message.text)


def _history(messages: Sequence[ChatMessage]) -> str:
    said = [message for message in messages if message.role in ("user", "assistant") and message.text]
    return "\n\n".join(f"{message.role}: {message.text}" for message in said)
