"""Ray itself: started for this process alone, or reached where RAY_ADDRESS says; the actors, and what their deaths are.

What is started here listens on the loopback interface only, asks everybody for a token that this process has made up,
and has no dashboard.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator
from typing import Any, final

from agentmesh.blueprint import Blueprint
from agentmesh.config.mesh import RemoteModelSpec
from agentmesh.errors import ReplicaError, UsageError
from agentmesh.executors.host import Host

CALLS = 256
"""Calls that an actor takes at once; what goes beyond a mesh's width waits here, not there."""

ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # everywhere: nobody else joins, so all of it listens on loopback
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of a Ray of our own. It is read at the import, so where a program has imported Ray before, it decides."""


class LostError(ReplicaError):
    """A replica died while it was asked."""


@final
class Cluster:
    """Makes actors and asks them. Owns Ray where it was not running before, until ``close``.

    Args:
        replicas: how many actors there will be; they share the processors.

    Raises:
        UsageError: Ray is not installed.
        ReplicaError: it cannot be started or reached, or has fewer processors than replicas.
    """

    def __init__(self, replicas: int) -> None:
        self._ray, self._own = connected(replicas)
        known = self._ray.exceptions
        self._deaths = (known.RayActorError, known.OutOfMemoryError, known.WorkerCrashedError, known.ObjectLostError)
        there = self._ray.cluster_resources()
        self._processors = int(there.get("CPU", 0)) // replicas
        self._graphics = min(1.0, there.get("GPU", 0) / replicas)
        if not self._processors:
            raise ReplicaError(
                f"{replicas} replicas take a processor each, but the cluster has {there.get('CPU', 0):.0f}; "
                "ask for fewer"
            )

    def actor(self, blueprint: Blueprint) -> Any:
        """A new replica for a mesh's model, there when it first answers; it has as many threads as processors."""
        device = "cpu" if isinstance(blueprint.model, RemoteModelSpec) else blueprint.model.device
        options = {
            "num_cpus": self._processors,
            "num_gpus": 0 if device == "cpu" else self._graphics,
            "max_concurrency": CALLS,
        }
        return self._ray.remote(Host).options(**options).remote()

    async def ask(self, reference: Any) -> Any:
        """What an actor answers. Cancelling this cancels the work there.

        Raises:
            LostError: it died.
        """
        try:
            return await reference
        except self._deaths as error:
            raise LostError(str(error).splitlines()[0]) from error
        except asyncio.CancelledError:
            self._ray.cancel(reference)
            raise

    async def stream(self, references: Any) -> AsyncIterator[Any]:
        """What an actor's generator yields.

        Raises:
            LostError: it died.
        """
        try:
            async for reference in references:
                yield await reference
        except self._deaths as error:
            raise LostError(str(error).splitlines()[0]) from error

    def share(self, value: Any) -> Any:
        """Put a value where all actors reach it; the reference stands for it as an argument.

        Raises:
            UsageError: it cannot travel.
        """
        try:
            return self._ray.put(value)
        except TypeError as error:
            raise UsageError(f"this mesh cannot be sent to a replica: {error}; use agents from a module") from error

    def end(self, actor: Any) -> None:
        """End an actor's process, whatever it does."""
        self._ray.kill(actor)

    def close(self) -> None:
        """Stop Ray, where it was started here."""
        if self._own:
            self._ray.shutdown()


def connected(replicas: int) -> tuple[Any, bool]:
    """Ray, started or reached, and whether it is ours to stop.

    Raises:
        UsageError: it is not installed.
        ReplicaError: it cannot be started or reached.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address and "ray" not in sys.modules:
        for name, value in {**ALONE, "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
            os.environ.setdefault(name, value)
    try:
        import ray  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as error:
        raise UsageError("executor `ray` takes Ray: pip install 'agentmesh-kv[ray]'") from error
    if ray.is_initialized():
        return ray, False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            processors = max(os.cpu_count() or 1, replicas)
            ray.init(address="local", include_dashboard=False, num_cpus=processors, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        what = f"no cluster answers at RAY_ADDRESS={address}" if address else "Ray cannot be started"
        raise ReplicaError(f"{what}: {error}") from error
    return ray, True
