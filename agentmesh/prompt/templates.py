"""Role templates: Jinja in a sandbox, with slots that can be printed and nothing else.

While a template renders, a slot's content is an opaque handle that prints as a sentinel: private-use characters around
a nonce and a number. So the text between sentinels is the template's own fixed text, exactly, whatever the content is.
A filter or a comparison on a handle would make the text depend on the content and is refused.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentmesh.errors import TemplateError, did_you_mean, listing
from agentmesh.prompt.segments import Content, Message

OPEN, CLOSE = "\ue000", "\ue001"
SCOPE_NAMES = ("inbox", "role", "node", "round", "rounds")


class SlotHandle:
    """A slot's content inside a template: ``{{ slot }}`` is all it allows."""

    def __init__(self, sentinel: str, origin: str) -> None:
        self._sentinel = sentinel
        self._origin = origin

    def _refuse(self, *_args: object) -> NoReturn:
        raise TemplateError(
            f"the template uses the content of {self._origin} for more than printing it; a slot may only be printed "
            "as {{ slot }}, because prompts must not depend on content that is shared as KV. "
            "Use its metadata (message.role, message.node, message.round) in conditions instead"
        )

    __str__ = __html__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __add__ = __radd__ = __mod__ = _refuse
    __hash__ = object.__hash__


class MessageHandle(SlotHandle):
    """A message inside a template: prints its contents; ``role``, ``node``, ``round`` are plain values."""

    def __init__(self, message: Message, parts: list[SlotHandle]) -> None:
        super().__init__("\n\n".join(part._sentinel for part in parts), f"the message of {message.node}")  # noqa: SLF001  # same class
        self.role = message.role
        self.node = message.node
        self.round = message.round
        self.parts = parts


def _finalize(value: Any) -> Any:
    return value._sentinel if isinstance(value, SlotHandle) else value  # noqa: SLF001  # the one reader


class Scope:
    """The names one rendering sees, and the contents behind the sentinels it hands out."""

    def __init__(self, inputs: Mapping[str, Content], inbox: Iterable[Message], **plain: str | int) -> None:
        self._nonce = secrets.token_hex(4)
        self.contents: list[Content] = []
        self.names: dict[str, Any] = dict(plain)
        self.names.update({name: self.handle(content) for name, content in inputs.items()})
        self.names["inbox"] = [self._message(message) for message in inbox]

    def handle(self, content: Content) -> SlotHandle:
        """A printable handle for a content."""
        self.contents.append(content)
        return SlotHandle(self.sentinel(len(self.contents) - 1), content.origin)

    def sentinel(self, index: int) -> str:
        """The text that stands for content number ``index``."""
        return f"{OPEN}{self._nonce}:{index}{CLOSE}"

    def split(self, text: str) -> list[str | Content]:
        """Text cut at its sentinels: fixed text and contents in order, without empty fixed text."""
        parts = re.split(f"{OPEN}{self._nonce}:(\\d+){CLOSE}", text)
        pieces: list[str | Content] = []
        for index, part in enumerate(parts):
            if index % 2:
                pieces.append(self.contents[int(part)])
            elif part:
                pieces.append(part)
        return pieces

    def _message(self, message: Message) -> MessageHandle:
        return MessageHandle(message, [self.handle(content) for content in message.contents])


def environment() -> ImmutableSandboxedEnvironment:
    """How all templates are written: whole lines for statements, and no name that is not there."""
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )


@dataclass(frozen=True)
class RoleTemplate:
    """An agent's system text and prompt, as written in the mesh file."""

    system: str
    prompt: str

    def check(self, inputs: Iterable[str]) -> None:
        """Find mistakes before anything runs.

        Raises:
            TemplateError: bad syntax, or a name that is neither an input nor one of inbox, role, node, round, rounds.
        """
        known = {*inputs, *SCOPE_NAMES}
        for part, source in (("system", self.system), ("prompt", self.prompt)):
            try:
                used = jinja2.meta.find_undeclared_variables(environment().parse(source))
            except jinja2.TemplateSyntaxError as error:
                raise TemplateError(f"{part}, line {error.lineno} of the template: {error.message}") from error
            for name in sorted(used - known - {"range"}):
                raise TemplateError(
                    f"{part}: {{{{ {name} }}}} is not known here; known names are {listing(known)}."
                    f"{did_you_mean(name, known)} A new input is declared under `inputs:` in the mesh file"
                )

    def render(self, scope: Scope) -> tuple[str, str]:
        """System text and prompt with sentinels in place of slots, outer whitespace removed.

        Raises:
            TemplateError: the template fails on these values.
        """
        return _render("system", self.system, scope), _render("prompt", self.prompt, scope)


def _render(part: str, source: str, scope: Scope) -> str:
    try:
        return environment().from_string(source).render(scope.names).strip()
    except jinja2.TemplateError as error:
        raise TemplateError(f"{part}: {error.message}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise TemplateError(f"{part}: {error}") from error
