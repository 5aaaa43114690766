"""Whose KV and statistics they are that outlive a process, and the keys under which they are found."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentmesh.config.presets import CommunicatorSpec, choices
from agentmesh.kv.arena import KVShape


def key_of(*parts: str, tokens: Sequence[int] = ()) -> str:
    """The name that something is found by."""
    return hashlib.sha256("\0".join(parts).encode() + b"\0\0" + array("q", tokens).tobytes()).hexdigest()


@dataclass(frozen=True)
class Scope:
    """Whose KV and statistics they are.

    Args:
        identity: of model and machine.
        shape: of the model's KV.
        consumers: agent → digest of its texts; of other agents only prefixes are kept.
        choices: what the preset does with what it places.
    """

    identity: str
    shape: KVShape
    consumers: Mapping[str, str]
    choices: str

    @staticmethod
    def of(identity: str, shape: KVShape, consumers: Mapping[str, str], spec: CommunicatorSpec) -> Scope:
        """The scope of a mesh's agents under a preset."""
        return Scope(identity, shape, consumers, choices(spec).model_dump_json())

    @property
    def mesh(self) -> str:
        """One text for all agents and choices."""
        return json.dumps([sorted(self.consumers.items()), self.choices])
