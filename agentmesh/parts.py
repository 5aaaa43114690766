"""Whether all that a mesh names besides its file is there; loads no model."""

from __future__ import annotations

from agentmesh.blueprint import Blueprint
from agentmesh.config.mesh import ModelSpec
from agentmesh.errors import InputError
from agentmesh.workers import make_workers, predicates


def check_parts(blueprint: Blueprint) -> None:
    """Look for agents' Python and documents, realigners, and the model's name.

    Raises:
        NotFoundError: a Python reference or a model that does not exist.
        InputError: documents or realigners cannot be read.
    """
    make_workers(blueprint)
    predicates(blueprint)
    if blueprint.realigners is not None and not blueprint.realigners.is_file():
        raise InputError(f"realigners {blueprint.realigners}: no such file; make it with `agentmesh calibrate`")
    if isinstance(blueprint.model, ModelSpec) and blueprint.model.name != ModelSpec().name:
        from agentmesh.engine.loading import exists  # noqa: PLC0415  # torch takes seconds to import

        exists(blueprint.model)
