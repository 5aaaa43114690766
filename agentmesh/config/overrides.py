"""``--set path=value``: values given over those of a file, without changing the data that was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentmesh.config.nodes import KeyPath
from agentmesh.config.problems import Override, dotted, shown
from agentmesh.config.tree import resolve
from agentmesh.config.yaml import parse
from agentmesh.errors import ConfigError

EXAMPLE = "agents.solver.generate.max_tokens=32"


def override(
    data: Mapping[str, Any], texts: Sequence[str], shorthands: Mapping[str, str]
) -> tuple[dict[str, Any], tuple[Override, ...]]:
    """The data with every ``path=value`` applied in order, and where each one wrote.

    Args:
        data: a file's data; it is left as it is.
        texts: the overrides as typed.
        shorthands: top-level keys whose plain text stands for a mapping with one key, and that key.

    Raises:
        ConfigError: an override is no ``path=value``, or its path leads through a value that holds no others.
    """
    changed = dict(data)
    done: list[Override] = []
    for text in texts:
        path, equals, value = text.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set {text}: expected path=value, such as {EXAMPLE}")
        setter = _Setter(text, _value(text, value.strip()), shorthands)
        changed = setter.put(changed, parts)
        done.append(Override(setter.path, text))
    return changed, tuple(done)


def _value(override_text: str, text: str) -> Any:
    """Flow YAML or a quoted scalar where the text begins like one; otherwise one plain scalar, templates included."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"--set {override_text!a}: found bytes that are no UTF-8; expected UTF-8")
    if text.startswith(("[", "{", '"', "'")) and not text.startswith(("{{", "{%", "{#")):
        return parse(text, f"--set {override_text.partition('=')[0].strip()}").root.value
    try:
        return resolve(text)
    except ValueError as error:
        raise ConfigError(f"--set {override_text}: {error}") from error


class _Setter:
    """Puts one value; ``path`` is the place it went to."""

    def __init__(self, text: str, value: Any, shorthands: Mapping[str, str]) -> None:
        self.path: KeyPath = ()
        self._text = text
        self._value = value
        self._shorthands = shorthands

    def put(self, holder: Any, parts: list[str]) -> Any:
        """A copy of ``holder`` with the value at ``parts`` below it."""
        if not parts:
            return self._value
        if isinstance(holder, str) and len(self.path) == 1 and self.path[0] in self._shorthands:
            holder = {self._shorthands[str(self.path[0])]: holder}
        if isinstance(holder, list):
            index = self._index(holder, parts[0])
            self.path = (*self.path, index)
            return [*holder[:index], self.put(holder[index], parts[1:]), *holder[index + 1 :]]
        if holder is not None and not isinstance(holder, dict):
            raise ConfigError(
                f"--set {self._text}: {dotted(self.path)} is {shown(holder)}, which has no {parts[0]!r}; "
                f"set {dotted(self.path)} itself"
            )
        holder = holder or {}
        size = next((size for size in range(len(parts), 1, -1) if ".".join(parts[:size]) in holder), 1)
        key = ".".join(parts[:size])  # a node's name has a dot of its own: solver.2
        self.path = (*self.path, key)
        return {**holder, key: self.put(holder.get(key), parts[size:])}

    def _index(self, holder: list[Any], part: str) -> int:
        if not (part.isascii() and part.isdecimal()) or int(part[:9]) >= len(holder):
            raise ConfigError(
                f"--set {self._text}: found {part!r}; expected a position in {dotted(self.path)}, "
                f"which has {len(holder)} (the first is 0)"
            )
        return int(part)
