"""Validation errors in the words of the file: where, what was found, what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from agentmesh.config import mesh
from agentmesh.config.base import PATTERN_WORDS
from agentmesh.config.nodes import KeyPath
from agentmesh.config.topology import TopologySpec
from agentmesh.errors import did_you_mean, listing

TAGS = frozenset({"llm", "python", "vote", "retriever", "custom", "use", "inline", "str", "PythonRef", "int", "float"})
EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "at least one entry",
    "union_tag_not_found": "a mapping of keys to values",
}
RULES = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
}
WIDTH = 60


def explain(detail: ErrorDetails, model: type[BaseModel]) -> tuple[KeyPath, str]:
    """The key path of one error, and a message that says what was found and expected."""
    location = detail["loc"]
    path = tuple(part for index, part in enumerate(location) if not _is_tag(location, index))
    if detail["type"] == "missing":
        return path[:-1], f"key {path[-1]!r} is missing; it is required"
    if detail["type"] == "union_tag_invalid":
        path = (*path, "kind")
    if detail["type"] in RULES:
        key, words = RULES[detail["type"]]
        return path, f"found {_shown(detail['input'])}; expected {words} {detail['ctx'][key]}"
    special = SPECIAL.get(detail["type"])
    if special is not None:
        return path, special(detail, model)
    return path, f"found {_shown(detail['input'])}; expected {EXPECTED.get(detail['type'], detail['msg'])}"


def _unknown_key(detail: ErrorDetails, model: type[BaseModel]) -> str:
    *parents, found = detail["loc"]
    fields = _owner(model, tuple(parents)) or {}
    keys = [info.alias or name for name, info in fields.items()]
    return f"unknown key; expected one of {listing(keys)}.{did_you_mean(str(found), keys)}"


def _unknown_kind(detail: ErrorDetails, _model: type[BaseModel]) -> str:
    tag, tags = str(detail["ctx"]["tag"]), str(detail["ctx"]["expected_tags"])
    kinds = [kind for kind in tags.replace("'", "").split(", ") if kind != "custom"]
    return f"found {tag!r}; expected one of {listing(kinds)}.{did_you_mean(tag, kinds)}"


def _unknown_word(detail: ErrorDetails, _model: type[BaseModel]) -> str:
    words = [part.strip("' ") for part in str(detail["ctx"]["expected"]).replace(" or ", ", ").split(",")]
    hint = did_you_mean(str(detail["input"]), words)
    return f"found {_shown(detail['input'])}; expected one of {listing(words)}.{hint}"


def _wrong_form(detail: ErrorDetails, _model: type[BaseModel]) -> str:
    pattern = detail["ctx"]["pattern"]
    words = PATTERN_WORDS.get(pattern, f"text of the form {pattern}")
    return f"found {_shown(detail['input'])}; expected {words}"


SPECIAL: dict[str, Callable[[ErrorDetails, type[BaseModel]], str]] = {
    "extra_forbidden": _unknown_key,
    "union_tag_invalid": _unknown_kind,
    "enum": _unknown_word,
    "literal_error": _unknown_word,
    "string_pattern_mismatch": _wrong_form,
    "string_too_short": lambda _detail, _model: "found empty text; expected at least one character",
    "value_error": lambda detail, _model: str(detail["ctx"]["error"]),
}


def _is_tag(location: tuple[int | str, ...], index: int) -> bool:
    """Whether a part of the location is the tag of a union rather than a key of the file."""
    part = location[index]
    if not isinstance(part, str):
        return False
    if part.startswith(("constrained-", "function-", "tagged-union", "literal[", "tuple[", "is-instance")):
        return True
    after_agent = index == 2 and location[0] == "agents"
    after_topology = index == 1 and location[0] == "topology"
    last_of_union = index == len(location) - 1 and index > 2
    return part in TAGS and (after_agent or after_topology or last_of_union)


def _owner(model: type[BaseModel], location: tuple[int | str, ...]) -> dict[str, FieldInfo] | None:
    """The fields of the model that a location points at."""
    found: Any = model
    for part in location:
        if isinstance(found, type) and issubclass(found, BaseModel):
            fields = {info.alias or name: info for name, info in found.model_fields.items()}
            if part not in fields:
                return None
            found = fields[str(part)].annotation
        found = _inside(found, part)
    return found.model_fields if isinstance(found, type) and issubclass(found, BaseModel) else None


def _inside(annotation: Any, part: int | str) -> Any:
    """The model within a container or union that the next part of a location belongs to."""
    tagged = {
        "llm": mesh.LlmAgentSpec,
        "python": mesh.PythonAgentSpec,
        "vote": mesh.VoteAgentSpec,
        "retriever": mesh.RetrieverAgentSpec,
        "custom": mesh.CustomAgentSpec,
        "use": mesh.TopologyUse,
        "inline": TopologySpec,
    }
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if part in tagged:
        return tagged[str(part)]
    models = [arg for arg in get_args(annotation) if isinstance(arg, type) and issubclass(arg, BaseModel)]
    return models[0] if len(models) == 1 else annotation


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}…"
