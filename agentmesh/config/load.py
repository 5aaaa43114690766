"""From a mesh or topology file to its checked model; every mistake is named with its line.

All mistakes of a file are reported together, in the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from agentmesh import library
from agentmesh.config.base import Frozen
from agentmesh.config.explain import explain
from agentmesh.config.mesh import MeshSpec
from agentmesh.config.nodes import Document, KeyPath
from agentmesh.config.topology import Parameter, TopologySpec
from agentmesh.config.yaml import parse, read
from agentmesh.errors import ConfigError, did_you_mean, listing

EXCERPTS = 5
SHORTHAND = {"model": "name", "communicator": "preset", "topology": "use"}
"""Entries of a mesh that may be one word, and the key that the word stands for."""

Model = TypeVar("Model", bound=Frozen)


@dataclass(frozen=True)
class LoadedMesh:
    """A mesh file with its topology found.

    Args:
        spec: the file's content.
        topology: the topology it uses.
        params: values for the topology's parameters.
        topology_name: for people.
        document: the file as read, for positions; ``None`` for a mesh built in Python.
    """

    spec: MeshSpec
    topology: TopologySpec
    params: Mapping[str, Parameter]
    topology_name: str
    document: Document | None = None

    def position(self, path: KeyPath) -> str:
        """``file:line:column`` of a value, or its dotted path where there is no file."""
        dotted = ".".join(str(part) for part in path)
        if self.document is None:
            return dotted
        line, column = self.document.locate(path)
        return f"{self.document.name}:{line}:{column}: {dotted}"


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
    data = dict(document.root.value)
    for override in overrides:
        _override(data, override)
    spec = _validated(MeshSpec, data, document)
    return _resolved(spec, document, libraries)


def mesh_from_dict(data: Mapping[str, Any], *, libraries: Sequence[Path] = ()) -> LoadedMesh:
    """A mesh from plain data; errors name the key path.

    Raises:
        ConfigError: anything wrong in the data.
    """
    return _resolved(_validated(MeshSpec, dict(data), None), None, libraries)


def load_topology(name: str, *, libraries: Sequence[Path] = ()) -> tuple[TopologySpec, str]:
    """Read a topology file, by path or name; its content and its name.

    Raises:
        ConfigError: anything wrong in the file.
        NotFoundError: no such file or name.
    """
    path = library.find("topologies", name, libraries=libraries)
    document = read(path)
    return _validated(TopologySpec, document.root.value, document), path.stem


def _resolved(spec: MeshSpec, document: Document | None, libraries: Sequence[Path]) -> LoadedMesh:
    if isinstance(spec.topology, TopologySpec):
        return LoadedMesh(spec, spec.topology, {}, spec.name or "inline", document)
    beside = None if document is None else Path(document.name).parent
    path = library.find("topologies", spec.topology.use, libraries=libraries, beside=beside)
    found = read(path)
    topology = _validated(TopologySpec, found.root.value, found)
    params = dict(spec.topology.model_extra or {})
    for key in params:
        if key not in topology.params:
            place = LoadedMesh(spec, topology, params, path.stem, document).position(("topology", key))
            hint = did_you_mean(key, topology.params)
            raise ConfigError(f"{place}: {path.stem} has no such parameter; it has {listing(topology.params)}.{hint}")
    return LoadedMesh(spec, topology, params, path.stem, document)


def _validated(model: type[Model], data: Any, document: Document | None) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, model, document))) from error


def _lines(error: ValidationError, model: type[BaseModel], document: Document | None) -> Iterator[str]:
    """One line an error in the order of the file, the first few with the source line under them."""
    found = []
    for detail in error.errors():
        path, message = explain(detail, model)
        found.append((_place(detail, path, document), ".".join(map(str, path)), message))
    for index, (place, dotted, message) in enumerate(sorted(found, key=lambda item: item[0] or (0, 0))):
        text = f"{dotted}: {message}" if dotted else message
        if document is None or place is None:
            yield text
            continue
        excerpt = f"\n{document.excerpt(*place)}" if index < EXCERPTS else ""
        yield f"{document.name}:{place[0]}:{place[1]}: {text}{excerpt}"


def _place(detail: ErrorDetails, path: KeyPath, document: Document | None) -> tuple[int, int] | None:
    if document is None:
        return None
    return document.locate(path, at_key=detail["type"] == "extra_forbidden")


def _override(data: dict[str, Any], override: str) -> None:
    """Apply ``path=value`` to a file's data; the value is read as YAML."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected path=value, such as agents.solver.generate.max_tokens=32")
    value: Any = parse(text, f"--set {path}").root.value
    keys = _node_keys(keys, data)
    holder: Any = data
    for depth, key in enumerate(keys[:-1]):
        if isinstance(holder, dict) and depth == 0 and isinstance(holder.get(key), str) and key in SHORTHAND:
            holder[key] = {SHORTHAND[key]: holder[key]}
        holder = _step(holder, key, override)
    _assign(holder, keys[-1], value, override)


def _node_keys(keys: list[str], data: dict[str, Any]) -> list[str]:
    """Path parts with an agent's dotted name (``solver.1``) put together again."""
    agents = data.get("agents")
    if keys[0] == "agents" and len(keys) > 2 and isinstance(agents, dict) and f"{keys[1]}.{keys[2]}" in agents:
        return ["agents", f"{keys[1]}.{keys[2]}", *keys[3:]]
    return keys


def _step(holder: Any, key: str, override: str) -> Any:
    if isinstance(holder, list):
        return holder[_index(holder, key, override)]
    if not isinstance(holder, dict):
        raise ConfigError(f"--set {override}: {key!r} lies below a plain value; expected a key of a mapping")
    if not isinstance(holder.get(key), dict | list):
        holder[key] = {}
    return holder[key]


def _assign(holder: Any, key: str, value: Any, override: str) -> None:
    if isinstance(holder, list):
        holder[_index(holder, key, override)] = value
    elif isinstance(holder, dict):
        holder[key] = value
    else:
        raise ConfigError(f"--set {override}: {key!r} lies below a plain value; expected a key of a mapping")


def _index(holder: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(holder):
        raise ConfigError(f"--set {override}: found {key!r}; expected a position from 0 to {len(holder) - 1}")
    return int(key)


def schema(kind: str = "mesh") -> dict[str, Any]:
    """JSON Schema of a mesh or topology file, for editors."""
    model: type[Frozen] = TopologySpec if kind == "topology" else MeshSpec
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema(by_alias=True)}


def dump(spec: Frozen) -> str:
    """A model as YAML that loads to the same model."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 120
    stream = StringIO()
    yaml.dump(spec.model_dump(mode="json", by_alias=True, exclude_defaults=False), stream)
    return stream.getvalue()
