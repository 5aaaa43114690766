"""What links have learned, in a file: safetensors with the model's fingerprint, the agents' texts, and audits.

Choices decide which tokens a map is learned from, and audits are of what a preset computes besides; so a file says
under which choices it was made, too, and serves no others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from agentmesh.communicator.linkstate import Audited, LinkState
from agentmesh.config.presets import CommunicatorSpec, choices
from agentmesh.errors import InputError, RecordError

VERSION = 3


@dataclass(frozen=True)
class Made:
    """What a file was made for.

    Args:
        fingerprint: of the model.
        consumers: agent → digest of its template; offsets hold for this text alone.
        choices: what the preset does with what it places, by name.
    """

    fingerprint: str
    consumers: Mapping[str, str]
    choices: Mapping[str, Any]

    @staticmethod
    def of(fingerprint: str, consumers: Mapping[str, str], spec: CommunicatorSpec) -> Made:
        """For a mesh's agents under a preset."""
        return Made(fingerprint, consumers, _flat(choices(spec).model_dump(mode="json")))


def save(path: Path, states: Mapping[str, LinkState], made: Made) -> None:
    """Write all links.

    Args:
        path: the file; replaced whole or not at all.
        states: what each link has learned.
        made: what for.

    Raises:
        RecordError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    links: dict[str, dict[str, Any]] = {}
    for name, state in sorted(states.items()):
        parts = {"exact": state.exact, "deep": state.deep}
        links[name] = {
            **{part: realigner.observations for part, realigner in parts.items()},
            "wait": state.wait,
            "audits": [audit.row for audit in state.audits],
        }
        for part, realigner in parts.items():
            if realigner.observations:
                own = realigner.pack()  # clones: links with one observation share what nothing was learned of yet
                tensors.update({f"{name}/{part}/{key}": t.clone().contiguous() for key, t in own.items()})
    about = {"version": VERSION, **vars(made), "links": links}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={"agentmesh": json.dumps(about)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise RecordError(f"{path} cannot be written: {error}; choose another place with --output") from error


def load(path: Path, fresh: LinkState, here: Made) -> dict[str, LinkState]:
    """Read links for this model, these agents and choices.

    Args:
        path: the file.
        fresh: a link of this model that has learned nothing.
        here: what it must have been made for.

    Raises:
        InputError: the file cannot be read, or was made for another model, other templates or other choices.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["agentmesh"])
            _check(path, about, here)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
        return {name: _link(name, known, fresh, tensors) for name, known in about["links"].items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"realigners {path}: cannot be read ({error}); make it with `agentmesh calibrate`") from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"realigners {path}: {error}; it is no file of `agentmesh calibrate` for this model"
        ) from error


def _check(path: Path, about: Mapping[str, Any], here: Made) -> None:
    again = "run `agentmesh calibrate` again"
    if about["version"] != VERSION:
        raise InputError(f"realigners {path}: version {about['version']}, expected {VERSION}; {again}")
    made = Made(about["fingerprint"], about["consumers"], about["choices"])
    if made.fingerprint != here.fingerprint:
        raise InputError(
            f"realigners {path} were learned with another model, dtype or library version "
            f"({made.fingerprint[:12]}…, this is {here.fingerprint[:12]}…); {again}"
        )
    changed = [node for node, digest in made.consumers.items() if here.consumers.get(node) != digest]
    if changed:
        raise InputError(f"realigners {path}: the texts of {', '.join(changed)} have changed since; {again}")
    names = [name for name in here.choices if made.choices.get(name) != here.choices[name]]
    if names:
        other = ", ".join(f"{name} {made.choices.get(name)}, here {here.choices[name]}" for name in names)
        raise InputError(f"realigners {path} were learned with other choices of the communicator ({other}); {again}")


def _flat(fields: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Fields of fields by their whole names, such as ``recompute.first``."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def _link(name: str, about: Mapping[str, Any], fresh: LinkState, tensors: Mapping[str, torch.Tensor]) -> LinkState:
    def part(which: str, empty: Any) -> Any:
        own = f"{name}/{which}/"
        found = {key.removeprefix(own): tensor for key, tensor in tensors.items() if key.startswith(own)}
        return empty.unpack(found, about[which]) if about[which] else empty

    return replace(
        fresh,
        exact=part("exact", fresh.exact),
        deep=part("deep", fresh.deep),
        audits=tuple(Audited.of(row) for row in about["audits"]),
        wait=about["wait"],
    )
