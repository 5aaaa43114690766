"""The models of a mesh: its own, and the remote ones that agents name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

from agentmesh.backend import Backend
from agentmesh.blueprint import Blueprint
from agentmesh.config.mesh import RemoteModelSpec
from agentmesh.errors import UsageError
from agentmesh.prompt import Reader

Progress = Callable[[str, int, int], None]


@final
class Models:
    """Opens models when they are first needed. Owned by a mesh.

    Args:
        blueprint: says which agent writes with which model.
        own: the mesh's own model, where it was given.
    """

    def __init__(self, blueprint: Blueprint, own: Backend | None) -> None:
        self._blueprint = blueprint
        self.own = own
        self._remote: dict[str, Backend] = {}
        self._of: dict[str, Backend] = {}

    def open(self, progress: Progress | None = None, beside: Backend | None = None) -> Backend:
        """Open all that are not open; the mesh's own.

        Args:
            progress: told how far fetching and converting are.
            beside: what another mesh has loaded for the same model; its weights and its thread serve both then.

        Raises:
            ModelError: the weights cannot be fetched or read.
            InputError: the mesh's realigners were made for something else, its store is no folder, or the key of a
                remote model is not set.
            UsageError: a model is remote, and the library that it takes is not installed.
        """
        for node, member in self._blueprint.members.items():
            if member.remote is not None and node not in self._of:
                self._of[node] = self._open_remote(member.remote)
        if self.own is None:
            model = self._blueprint.model
            if isinstance(model, RemoteModelSpec):
                self.own = self._open_remote(model)
            else:
                self.own = _open_local(self._blueprint, progress, beside)
        return self.own

    def of(self, node: str) -> Backend:
        """The model that writes for a node; all are open by now."""
        assert self.own is not None, "a run begins by opening the models"
        return self._of.get(node, self.own)

    def all(self) -> Iterator[Backend]:
        """Every open model, the mesh's own first."""
        if self.own is not None:
            yield self.own
        yield from (backend for backend in self._remote.values() if backend is not self.own)

    async def begin(self, reader: Reader) -> None:
        """A run begins; called in the order of the runs."""
        for backend in self.all():
            await backend.begin(reader)

    async def release(self, run: str) -> None:
        """A run has ended. The first model that keeps KV is asked before anything is awaited."""
        own, *remote = self.all()
        try:
            await own.release(run)
        finally:
            for backend in remote:
                await backend.release(run)

    def close(self) -> None:
        """Free all of them."""
        for backend in self.all():
            backend.close()
        self.own = None
        self._remote.clear()
        self._of.clear()

    def _open_remote(self, model: RemoteModelSpec) -> Backend:
        """The backend for an endpoint; agents with the same settings share it."""
        key = model.model_dump_json()
        if key not in self._remote:
            try:
                from agentmesh.remote import RemoteBackend  # noqa: PLC0415  # an extra
            except ModuleNotFoundError as error:
                raise UsageError(
                    f"model {model.name} is at {model.remote}, and asking it takes {error.name}: "
                    "pip install 'agentmesh-kv[remote]'"
                ) from error
            self._remote[key] = RemoteBackend.open(model)
        return self._remote[key]


def _open_local(blueprint: Blueprint, progress: Progress | None, beside: Backend | None) -> Backend:
    """The model of this machine, with what the mesh has learned before and what it keeps beyond the process."""
    from agentmesh.local import LocalBackend  # noqa: PLC0415  # torch and transformers take seconds to import

    spec, exact = blueprint.communicator, blueprint.run.deterministic
    if isinstance(beside, LocalBackend):
        backend = LocalBackend(beside.engine, spec)
    else:
        backend = LocalBackend.open(blueprint.local_model(), spec, progress, deterministic=exact)
    try:
        if blueprint.realigners is not None:
            backend.load_realigners(blueprint.realigners, blueprint.digests)
        if spec.store is not None:
            folder = blueprint.folder / Path(spec.store.path).expanduser()
            backend.keep_in(folder, spec.store, blueprint.digests, reads=not exact)
    except UsageError:
        backend.close()
        raise
    return backend
