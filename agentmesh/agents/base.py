"""The interface of an agent: it turns the inbox of one turn into one message.

A role of your own is a class with ``act``, or a function under ``@agent``, sync or async:

    @agent
    def shout(turn):
        return turn.inbox[-1].text.upper()

    class Careful(Agent):
        async def act(self, turn):
            draft = await turn.generate("Solve: {{ question }}")
            return await turn.generate("Check this answer to {{ question }}: " + draft.text)
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

from agentmesh.config.mesh import GenerateSpec
from agentmesh.prompt import Content, ContentKind, Exchange, Message, Reader, RoleTemplate

Answer = str | Content | Sequence[Content]
"""What an agent may return: text, or contents that keep their token ids."""


def contents_of(answer: Answer, kind: ContentKind, origin: str) -> tuple[Content, ...]:
    """An answer as contents; plain text becomes one of a kind and origin."""
    if isinstance(answer, str):
        return (Content(answer, kind, origin),)
    return (answer,) if isinstance(answer, Content) else tuple(answer)


class Generates(Protocol):
    """Runs a role template through the model for one turn."""

    async def __call__(
        self, turn: Turn, template: RoleTemplate, generate: GenerateSpec, history: list[Exchange] | None
    ) -> Content:
        """The generated message with its token ids."""


@dataclass(frozen=True)
class Turn:
    """One visit of a node.

    Args:
        node: its name.
        role: its role's name.
        round: from 0.
        rounds: how many there are.
        inputs: the run's inputs by name.
        inbox: the messages that reached it, by round and declaration.
        history: the agent's own earlier exchanges in this run, for ``memory: conversation``.
        attempt: 0, or the number of the retry.
        reader: what sharing needs to know of the visit.
    """

    node: str
    role: str
    round: int
    rounds: int
    inputs: Mapping[str, Content]
    inbox: tuple[Message, ...]
    history: list[Exchange]
    attempt: int
    reader: Reader
    _model: Generates

    @property
    def question(self) -> str:
        """The text of the input ``question``; empty where the mesh has none."""
        return self.inputs["question"].text if "question" in self.inputs else ""

    async def generate(self, prompt: str, system: str = "", **settings: Any) -> Content:
        """Let the mesh's model write. ``{{ question }}`` and ``inbox`` work as in a mesh file.

        Args:
            prompt: a prompt template.
            system: a system template.
            settings: as under ``generate:`` in a mesh file (``max_tokens``, ``temperature``, …).

        Returns:
            The message; return it from ``act`` as it is, so that its KV can be shared.

        Raises:
            TemplateError: the template cannot be rendered.
        """
        template = RoleTemplate(system, prompt)
        return await self.complete(template, GenerateSpec.model_validate(settings))

    async def complete(
        self, template: RoleTemplate, generate: GenerateSpec, history: list[Exchange] | None = None
    ) -> Content:
        """As ``generate``, for a checked template; a ``history`` is continued and gets the new exchange."""
        return await self._model(self, template, generate, history)

    def aside(self, inbox: tuple[Message, ...], model: Generates) -> Turn:
        """The same turn once more, with another inbox, as no part of the run."""
        reader = replace(self.reader, aside=True)
        return replace(self, inbox=inbox, history=list(self.history), reader=reader, _model=model)


class Agent(ABC):
    """Turns an inbox into a message. One object serves a node for the life of a mesh, runs may overlap in it."""

    @abstractmethod
    async def act(self, turn: Turn) -> Answer:
        """The node's message for one turn.

        Raises:
            Exception: whatever it raises fails the node, which is retried as the mesh file says.
        """

    def corpus(self) -> Sequence[Content]:
        """Documents that it may hand out, so that their KV can be made ahead; none for most agents."""
        return ()


@final
class FunctionAgent(Agent):
    """A plain function as an agent; made by ``@agent``."""

    def __init__(self, function: Callable[[Turn], Answer | Awaitable[Answer]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__
        self.name = f"{function.__module__}:{function.__qualname__}"

    async def act(self, turn: Turn) -> Answer:
        """Call the function, and wait for it where it is async."""
        found = self._function(turn)
        return await found if inspect.isawaitable(found) else found


def agent(function: Callable[[Turn], Answer | Awaitable[Answer]]) -> FunctionAgent:
    """Decorator: use a function ``(turn) → text`` as an agent."""
    return FunctionAgent(function)
