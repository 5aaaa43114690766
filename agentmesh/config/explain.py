"""Says in a person's words what pydantic found: paths without union labels, one message for each value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from agentmesh.config.base import PATTERN_WORDS, Shorthand
from agentmesh.config.nodes import KeyPath
from agentmesh.config.problems import Problem, shown
from agentmesh.config.topology import Parameter
from agentmesh.errors import did_you_mean, listing

KINDS = ("llm", "python", "retriever", "vote")

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "string_type": "text",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "list_type": "a list",
        "dict_type": "a mapping",
        "finite_number": "a finite number",
        "greater_than_equal": "at least {ge}",
        "greater_than": "more than {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "less than {lt}",
        "enum": "{expected}",
        "literal_error": "{expected}",
        "string_too_short": "text that is not empty",
        "too_short": "at least {min_length} of them",
    }
)
"""What was expected, by pydantic's error type; the braces are filled from the error's context."""

BOUNDS = frozenset({"greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number"})


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an error stands: its path, the model that owns the last key, the type there, and the union around it."""

    path: KeyPath
    owner: type[BaseModel] | None
    annotation: Any
    union: KeyPath | None
    at_key: bool


def explain(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """The problems of a validation error: one for each value, however many branches of a union it failed."""
    branches: dict[KeyPath, list[tuple[_Place, ErrorDetails]]] = {}
    problems: list[Problem] = []
    for details in error.errors(include_url=False):
        place = _locate(model, details["loc"])
        if place.union is None:
            problems.append(_problem(place, details))
        else:
            branches.setdefault(place.union, []).append((place, details))
    for union, members in branches.items():
        problems.extend(_merged(union, members))
    return list(dict.fromkeys(problems))


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys a file may use in a model, as written there."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _merged(union: KeyPath, members: list[tuple[_Place, ErrorDetails]]) -> Iterable[Problem]:
    """Of a union's branches keep those that fit the value's type; where none does, join what they expected."""
    fitting = [
        (place, details)
        for place, details in members
        if len(place.path) > len(union) or details["type"] in BOUNDS | {"missing"}
    ]
    here = [(place, details) for place, details in members if place.path == union and details["type"] != "missing"]
    if fitting:
        here = [(place, details) for place, details in here if not details["type"].endswith("_type")]
    deeper = [(place, details) for place, details in fitting if (place, details) not in here]
    for place, details in deeper:
        yield _problem(place, details)
    if here:
        words = " or ".join(dict.fromkeys(_expected(place, details) for place, details in here))
        choices = [choice for _, details in here for choice in _choices(details)]
        value = here[0][1]["input"]
        yield Problem(union, f"found {shown(value)}; expected {words}.{_hint(value, choices)}".removesuffix("."))


def _problem(place: _Place, details: ErrorDetails) -> Problem:
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        choices = keys_of(place.owner) if place.owner else []
        suggestion = did_you_mean(str(place.path[-1]), choices)
        return Problem(place.path, f"unknown key; expected one of: {listing(choices)}.{suggestion}", at_key=True)
    if kind == "missing":
        return Problem(place.path[:-1], f"missing key {str(place.path[-1])!r}; add it here", at_key=True)
    if kind == "union_tag_invalid":
        tag = str(details.get("ctx", {}).get("tag"))
        words = f"found {tag!r}; expected one of: {listing(KINDS)}.{did_you_mean(tag, KINDS)}"
        return Problem((*place.path, "kind"), words)
    if place.at_key:
        return Problem(place.path, f"found the key {str(value)!r}; expected {_expected(place, details)}", at_key=True)
    if kind == "value_error":
        return Problem(place.path, str(details.get("ctx", {}).get("error")))
    words = f"found {shown(value)}; expected {_expected(place, details)}."
    return Problem(place.path, f"{words}{_hint(value, _choices(details), kind)}".removesuffix("."))


def _expected(place: _Place, details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return PATTERN_WORDS.get(context["pattern"], f"text that matches {context['pattern']}")
    if kind in ("model_type", "model_attributes_type"):
        annotation = _model_in(place.annotation)
        keys = f" with the keys: {listing(keys_of(annotation))}" if annotation else ""
        return f"{'a name, or ' if _shorthand(place) else ''}a mapping{keys}"
    if kind == "string_type" and _description(place.annotation):
        return _description(place.annotation)
    bounds = {key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()}
    return WORDS.get(kind, details["msg"]).format(**bounds)


def _hint(value: Any, choices: list[str], kind: str = "") -> str:
    if isinstance(value, str):
        return did_you_mean(value, choices)
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f' Put it in quotes: "{str(value).lower()}"'
    return ' Write "" for empty text' if kind == "string_type" and value is None else ""


def _choices(details: ErrorDetails) -> list[str]:
    """The words an enum or literal allows, out of pydantic's ``'a', 'b' or 'c'``."""
    text = details.get("ctx", {}).get("expected", "") if details["type"] in ("enum", "literal_error") else ""
    return [part.strip(" '") for part in text.replace(" or ", ", ").split(",") if part]


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> _Place:
    """Follow pydantic's location along the types, and leave out the labels of union branches."""
    annotation: Any = model
    owner: type[BaseModel] | None = None
    union: KeyPath | None = None
    path: KeyPath = ()
    for part in loc:
        members = _members(annotation)
        if len(members) > 1:
            union = union if _tagged(members) else path
            annotation = _branch(members, str(part))
        elif part == "[key]":
            return _Place(path, owner, annotation, union, at_key=True)
        else:
            path = (*path, part)
            owner = _model_in(annotation)
            annotation = _child(annotation, part)
    return _Place(path, owner, annotation, union, at_key=False)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> list[Any]:
    """The branches of a union without None, or the annotation alone; the branches keep their tags."""
    bare = _bare(annotation)
    if get_origin(bare) not in (Union, UnionType):
        return [annotation]
    members = [member for member in get_args(bare) if member is not type(None)]
    return members if len(members) > 1 else _members(members[0])


def _tag(annotation: Any) -> str | None:
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((item.tag for item in metadata if isinstance(item, Tag)), None)


def _description(annotation: Any) -> str:
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((item.description for item in metadata if isinstance(item, FieldInfo) and item.description), "")


def _tagged(members: list[Any]) -> bool:
    return any(_tag(member) is not None for member in members)


def _branch(members: list[Any], label: str) -> Any:
    """The branch a label names: by tag, by the model's name, a tuple or text; others have nothing below."""
    for member in members:
        bare = _bare(member)
        named = isinstance(bare, type) and bare.__name__ == label
        if _tag(member) == label or named or (get_origin(bare) is tuple and label.startswith("tuple")):
            return bare
        if bare is str and label == "constrained-str":
            return member
    return Any


def _model_in(annotation: Any) -> type[BaseModel] | None:
    bare = _bare(_members(annotation)[0])
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def _child(annotation: Any, part: int | str) -> Any:
    bare = _bare(_members(annotation)[0])
    model = _model_in(bare)
    if model is not None:
        for name, field in model.model_fields.items():
            if part in (name, field.alias):
                return field.annotation
        return Parameter if model.model_config.get("extra") == "allow" else Any
    arguments = get_args(bare)
    if get_origin(bare) is dict:
        return arguments[1]
    return arguments[0] if get_origin(bare) is tuple else Any


def _shorthand(place: _Place) -> bool:
    field = None
    if place.owner is not None and place.path:
        field = next((f for name, f in place.owner.model_fields.items() if place.path[-1] in (name, f.alias)), None)
    return field is not None and any(isinstance(item, Shorthand) for item in field.metadata)
