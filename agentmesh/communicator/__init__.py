"""What each prompt gets placed and what it computes, decided and explained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from agentmesh.communicator.base import Plan, Preset
from agentmesh.communicator.dense import Dense
from agentmesh.communicator.prefix import Prefix
from agentmesh.config.mesh import CommunicatorSpec
from agentmesh.engine.probe import Level, Support
from agentmesh.errors import NotFoundError, did_you_mean, listing
from agentmesh.events import Reason
from agentmesh.sharing.prefix import PrefixStore

__all__ = ["PRESETS", "Plan", "Preset", "make"]


def _dense(_spec: CommunicatorSpec, _root: bytes) -> Preset:
    return Dense()


def _prefix(spec: CommunicatorSpec, root: bytes) -> Preset:
    return Prefix(PrefixStore(spec.budget), root, spec.min_tokens)


PRESETS: dict[str, Callable[[CommunicatorSpec, bytes], Preset]] = {"dense": _dense, "prefix": _prefix}


def make(spec: CommunicatorSpec, support: Support, fingerprint: str, tenant: str = "local") -> Preset:
    """The preset a mesh asks for, or the most that its model supports.

    Args:
        spec: the mesh's communicator.
        support: what the model supports.
        fingerprint: of model, tokenizer, dtype and versions.
        tenant: whose KV it is; tenants never share.

    Raises:
        NotFoundError: no such preset.
    """
    if spec.preset not in PRESETS:
        raise NotFoundError(
            f"no preset named {spec.preset!r}; there are {listing(PRESETS)}.{did_you_mean(spec.preset, PRESETS)}"
        )
    if support.level is Level.DENSE and spec.preset != "dense":
        return Dense(Reason.MODEL_UNSUPPORTED)
    root = hashlib.sha256(f"{fingerprint}\n{tenant}".encode()).digest()
    return PRESETS[spec.preset](spec, root)
