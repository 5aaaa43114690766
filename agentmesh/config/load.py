"""From a mesh or topology file to its checked model; every mistake is named with its line.

All mistakes of a file are reported together, in the order of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from agentmesh import library
from agentmesh.config.base import Frozen, Shorthand
from agentmesh.config.explain import explain
from agentmesh.config.mesh import MeshSpec
from agentmesh.config.nodes import Document, KeyPath
from agentmesh.config.overrides import override
from agentmesh.config.problems import Problem, Source, dotted, shown
from agentmesh.config.topology import Parameter, TopologySpec
from agentmesh.config.tree import resolve
from agentmesh.config.yaml import read
from agentmesh.errors import did_you_mean, listing

SCHEMAS: Mapping[str, type[Frozen]] = {"mesh": MeshSpec, "topology": TopologySpec}

_PLAIN = re.compile(r"[A-Za-z]([A-Za-z0-9_./ ,;()-]*[A-Za-z0-9_./)-])?")

Model = TypeVar("Model", bound=Frozen)


@dataclass(frozen=True)
class LoadedMesh:
    """A mesh file with its topology found.

    Args:
        spec: the file's content.
        topology: the topology it uses.
        params: values for the topology's parameters.
        topology_name: for people.
        source: where the values come from, for positions.
    """

    spec: MeshSpec
    topology: TopologySpec
    params: Mapping[str, Parameter]
    topology_name: str
    source: Source = field(default_factory=Source, repr=False, compare=False)

    @property
    def document(self) -> Document | None:
        """The file as read; None for a mesh built in Python."""
        return self.source.document

    @property
    def path(self) -> Path | None:
        """The file's path; None for a mesh built in Python."""
        return None if self.document is None else Path(self.document.name)

    def position(self, path: KeyPath, *, at_key: bool = False) -> str:
        """``file:line:column: path`` of a value (``--set …: path`` where it was set), or its path without a file."""
        return ": ".join(filter(None, [self.source.place(path, at_key=at_key), dotted(path)]))


def load_mesh(path: Path | str, *, overrides: Sequence[str] = (), libraries: Sequence[Path] = ()) -> LoadedMesh:
    """Read a mesh file, by path or by its name on a shelf.

    Args:
        path: the file.
        overrides: ``path=value`` texts, such as ``agents.solver.generate.max_tokens=32``.
        libraries: folders to search for names before the shipped ones.

    Raises:
        ConfigError: anything wrong in the file; starts with ``file:line:column``.
        NotFoundError: no such file or name.
    """
    document = read(library.find("configs", str(path), libraries=libraries))
    data, applied = override(document.root.value, overrides, _shorthands())
    source = Source(document, applied)
    return _resolved(_validated(MeshSpec, data, source), source, libraries)


def mesh_from_dict(data: Mapping[str, Any], *, libraries: Sequence[Path] = ()) -> LoadedMesh:
    """A mesh from plain data; errors name the key path.

    Raises:
        ConfigError: anything wrong in the data.
        NotFoundError: no topology of that name.
    """
    return _resolved(_validated(MeshSpec, dict(data), Source()), Source(), libraries)


def load_topology(name: Path | str, *, libraries: Sequence[Path] = ()) -> tuple[TopologySpec, str]:
    """Read a topology file, by path or name; its content and its name.

    Raises:
        ConfigError: anything wrong in the file.
        NotFoundError: no such file or name.
    """
    path = library.find("topologies", str(name), libraries=libraries)
    return load_file(TopologySpec, path), path.stem


def load_file(model: type[Model], path: Path) -> Model:
    """Read any YAML file that has a model.

    Raises:
        ConfigError: anything wrong in the file; starts with ``file:line:column``.
    """
    document = read(path)
    return _validated(model, document.root.value, Source(document))


def schema(kind: str = "mesh") -> dict[str, Any]:
    """JSON Schema of a mesh or topology file, for editors."""
    generated = SCHEMAS[kind].model_json_schema(by_alias=True)
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"agentmesh {kind} file"}
    return {**dialect, **{key: value for key, value in generated.items() if key != "title"}}


def dump(spec: Frozen) -> str:
    """A model as YAML that loads to the same model, defaults written out."""
    return written(spec.model_dump(by_alias=True))


def written(data: Any) -> str:
    """Plain data as YAML, each text in a style that reads back as the same text."""
    yaml = YAML(pure=True)
    yaml.width = 2**20
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    yaml.dump(_styled(data), stream)
    return stream.getvalue()


def _validated(model: type[Model], data: Any, source: Source) -> Model:
    try:
        if source.document is None:
            return model.model_validate(data)
        return model.model_validate(data, by_alias=True, by_name=False)  # a file writes `from`, never `source`
    except ValidationError as error:
        raise source.error(explain(error, model)) from error


def _resolved(spec: MeshSpec, source: Source, libraries: Sequence[Path]) -> LoadedMesh:
    """Find the topology and compare the mesh's parameters with those it declares."""
    if isinstance(spec.topology, TopologySpec):
        return LoadedMesh(spec, spec.topology, {}, spec.name or "inline", source)
    beside = None if source.document is None else Path(source.document.name).parent
    path = library.find("topologies", spec.topology.use, libraries=libraries, beside=beside)
    topology = load_file(TopologySpec, path)
    params: dict[str, Parameter] = dict(spec.topology.model_extra or {})
    problems = [problem for key in params for problem in _check_parameter(key, params[key], topology)]
    if problems:
        raise source.error(problems)
    return LoadedMesh(spec, topology, params, path.stem, source)


def _check_parameter(key: str, value: Parameter, topology: TopologySpec) -> list[Problem]:
    path: KeyPath = ("topology", key)
    if key not in topology.params:
        known = listing(topology.params)
        hint = did_you_mean(key, topology.params)
        return [Problem(path, f"unknown parameter; the topology has: {known}.{hint}".removesuffix("."), at_key=True)]
    default = topology.params[key]
    kind: type[Any] = type(default)
    if type(value) is kind or (kind is float and type(value) is int):
        return []
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    return [Problem(path, f"found {shown(value)}; expected {words}, such as the default {shown(default)}")]


def _shorthands() -> dict[str, str]:
    """Top-level keys of a mesh that may be plain text, and the key the text stands for."""
    fields = MeshSpec.model_fields.items()
    return {name: item.key for name, info in fields for item in info.metadata if isinstance(item, Shorthand)}


def _styled(value: Any) -> Any:
    """Plain data with each text in a style that reads back as the same text."""
    if isinstance(value, dict):
        return {_styled(key): _styled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_styled(item) for item in value]
    if not isinstance(value, str):
        return value
    value = str(value)  # a word out of a list becomes plain text
    if _PLAIN.fullmatch(value) and resolve(value) == value:
        return value
    lines = value.replace("\t", " ").split("\n")
    block = len(lines) > 1 and not value[0].isspace() and all(line.isprintable() for line in lines)
    return LiteralScalarString(value) if block else DoubleQuotedScalarString(value)
