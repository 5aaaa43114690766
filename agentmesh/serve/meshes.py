"""The meshes that a server offers. Those that name the same model share it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmesh.backend import Backend
from agentmesh.config.load import LoadedMesh
from agentmesh.errors import RequestTooLongError, UsageError, listing
from agentmesh.graphview import render
from agentmesh.mesh import Mesh
from agentmesh.models import Progress
from agentmesh.serve.problems import RefusedError

CHARACTERS = 16
"""Of a token, more than texts have on average: longer inputs are refused uncounted, because counting takes seconds."""

WHOLE = "this server takes at most {:,} tokens"


@dataclass(frozen=True)
class Served:
    """One mesh and what it is about."""

    mesh: Mesh
    about: str = ""

    @property
    def name(self) -> str:
        """The mesh's name, and the model's for OpenAI's clients."""
        return self.mesh.blueprint.name

    async def complete(self, given: Mapping[str, str], most: int) -> dict[str, str]:
        """A run's inputs with the mesh's defaults.

        Args:
            given: what the client gives.
            most: tokens that all of them may have together.

        Raises:
            RefusedError: one is missing.
            InputError: one is unknown, empty or not text.
            RequestTooLongError: they have more tokens.
        """
        blueprint, tokenizer = self.mesh.blueprint, self.mesh.load().tokenizer
        missing = [name for name in blueprint.inputs if name not in given and name not in blueprint.defaults]
        if missing:
            raise RefusedError(
                400,
                f"mesh {self.name!r} reads {listing(blueprint.inputs)}; give {listing(missing)} in the field `inputs` "
                '(extra_body={"inputs": {…}} in OpenAI\'s Python client)',
                param="inputs",
                code="missing_input",
            )
        inputs = blueprint.all_inputs(given)
        characters = sum(map(len, inputs.values()))
        if characters > most * CHARACTERS:
            raise RequestTooLongError(f"the inputs have {characters:,} characters; {WHOLE.format(most)}")
        tokens = await asyncio.to_thread(
            lambda: sum(len(tokenizer.encode(text, control=False)) for text in inputs.values())
        )
        if tokens > most:
            raise RequestTooLongError(f"the inputs have {tokens:,} tokens; {WHOLE.format(most)}")
        return inputs

    def describe(self) -> dict[str, Any]:
        """What a page needs to know of it."""
        blueprint = self.mesh.blueprint
        return {
            "name": self.name,
            "about": self.about,
            "model": blueprint.model.name,
            "preset": blueprint.communicator.preset,
            "inputs": list(blueprint.inputs),
            "defaults": dict(blueprint.defaults),
            "graph": json.loads(render(blueprint.topology, "json", unrolled=True)),
        }


def by_name(loaded: Sequence[LoadedMesh]) -> dict[str, Served]:
    """Name → mesh; no model is loaded.

    Raises:
        UsageError: two have the same name.
        ConfigError, TopologyError: one is wrong.
    """
    found: dict[str, Served] = {}
    for each in loaded:
        served = Served(Mesh.from_loaded(each), each.spec.about)
        if served.name in found:
            raise UsageError(f"two meshes are named {served.name!r}; give one of them another `name:` in its file")
        found[served.name] = served
    return found


def load_models(meshes: Mapping[str, Served], progress: Progress | None = None) -> None:
    """Load every mesh's models, each of this machine once.

    Raises:
        ModelError: the weights cannot be fetched or read.
        InputError: a mesh's realigners were made for something else, or the key of a remote model is not set.
        UsageError: a model is remote, and the library that it takes is not installed.
    """
    opened: dict[tuple[str, bool], Backend] = {}
    for served in meshes.values():
        blueprint = served.mesh.blueprint
        key = blueprint.model.model_dump_json(), blueprint.run.deterministic
        opened[key] = served.mesh.load(progress, beside=opened.get(key))


def width(meshes: Mapping[str, Served]) -> int:
    """How many runs their models serve well at once."""
    return max(served.mesh.width for served in meshes.values())


def close(meshes: Mapping[str, Served]) -> None:
    """Free all models."""
    for served in meshes.values():
        served.mesh.close()
