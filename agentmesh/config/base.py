"""The frozen base of every file model, and the units and shorthands people write by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Strict
from pydantic import WithJsonSchema as JsonSchema
from pydantic_core import CoreSchema, core_schema

BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TIME_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

UNIT_LIMIT = 2**53  # beyond it a float no longer counts in ones

PYTHON_REF = r"^[\w.]+:[\w.]+$"
REFERENCE = r"^\$[A-Za-z_][A-Za-z0-9_]*$"
GROUP_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
NODE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*(\.[0-9]+)?$"
VARIABLE = r"^[A-Za-z_]\w*$"
TENANT = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$"
ENDPOINT = r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"
PATTERN_WORDS: Mapping[str, str] = MappingProxyType(
    {
        PYTHON_REF: "package.module:Name",
        REFERENCE: "$name of a parameter",
        GROUP_NAME: "a name of letters, digits, - and _ that starts with a letter",
        NODE_NAME: "the name of a group or node, such as solver or solver.2",
        VARIABLE: "a variable name of letters, digits and _",
        TENANT: "at most 64 letters, digits, dots, - and _, the first one a letter or digit, or nothing",
        ENDPOINT: "an address such as http://127.0.0.1:8000/v1, without a user, key or query in it",
    }
)
"""What each pattern asks for, in words an error message can use."""

Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]


class Choice(str, Enum):
    """A word out of a fixed list, equal to and printed as its text (``StrEnum`` for Python 3.10)."""

    __str__ = str.__str__


class Frozen(BaseModel):
    """A value read from a file: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def _quantity(value: Any) -> tuple[float, str] | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int | float):
        return (value, "") if 0 <= value < UNIT_LIMIT else None
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", value)
    return (float(match[1]), match[2]) if match else None


def parse_bytes(value: Any) -> int:
    """``1GiB``, ``512 MB`` or a plain number of bytes, as an int.

    Raises:
        ValueError: the text is no size.
    """
    parts = _quantity(value)
    if parts is None or parts[1].upper() not in BYTE_UNITS:
        raise ValueError(f"expected a size such as 512MiB or 2GB, found {value!r}")
    return int(parts[0] * BYTE_UNITS[parts[1].upper()])


def parse_seconds(value: Any) -> float:
    """``120s``, ``500ms``, ``2m`` or a plain number of seconds, as a float.

    Raises:
        ValueError: the text is no duration.
    """
    parts = _quantity(value)
    if parts is None or parts[1] not in TIME_UNITS:
        raise ValueError(f"expected a duration such as 120s, 500ms or 2m, found {value!r}")
    return parts[0] * TIME_UNITS[parts[1]]


def _unit_schema(*units: str) -> JsonSchema:
    pattern = rf"^\s*[0-9]+(\.[0-9]+)?\s*({'|'.join(units)})?\s*$"
    return JsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": pattern}]})


Bytes = Annotated[int, BeforeValidator(parse_bytes), _unit_schema("B", "[KMGkmg][Ii]?B")]
Seconds = Annotated[float, BeforeValidator(parse_seconds), _unit_schema("ms", "s", "m", "h", "d")]


@dataclass(frozen=True)
class Shorthand:
    """Marks a model that may be written as plain text, which stands for ``{key: text}``."""

    key: str

    def expand(self, value: Any) -> Any:
        """``{key: value}`` for text, anything else as it is."""
        return {self.key: value} if isinstance(value, str) else value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate the expanded value."""
        return core_schema.no_info_before_validator_function(self.expand, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Text, or what the model itself allows."""
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(schema)]}
