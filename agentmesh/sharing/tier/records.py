"""What a store's file holds: tensors, and in the same safetensors file all that must agree before they are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from agentmesh.sharing.tier.folder import DamagedError
from agentmesh.sharing.tier.index import Entry

LAYOUT = 1
FACTS = "agentmesh"
LENGTH = 8
HEAD = 1 << 16
"""Bytes read at first to learn what a file holds; a longer header is read as long as it is, up to ``LONGEST``."""

LONGEST = 1 << 24
LARGEST = 1 << 63
"""Of numbers that SQLite keeps, without their sign."""


@dataclass(frozen=True)
class Record:
    """One file's content.

    Args:
        kind: ``prefix``, ``reading`` or ``link``.
        tenant: whose it is.
        fingerprint: of the model, code and machine that made it.
        keys: what it is found by.
        tensors: by name.
        about: what else its kind needs, as JSON.
        tokens: how many tokens' KV it holds.
        generation, rank: see ``Entry``.
    """

    kind: str
    tenant: str
    fingerprint: str
    keys: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    generation: int = 0
    rank: int = 0

    def encode(self) -> bytes:
        """The file; tensors are copied to the processor's memory where they are elsewhere."""
        facts = {
            name: getattr(self, name) for name in ("kind", "tenant", "fingerprint", "tokens", "generation", "rank")
        }
        text = json.dumps({"layout": LAYOUT, **facts, "keys": self.keys, "about": self.about})
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            own = tensor.detach().cpu().contiguous()
            shared = any(own.data_ptr() == other.data_ptr() for other in tensors.values())
            tensors[name] = own.clone() if shared else own
        return bytes(save(tensors, metadata={FACTS: text}))

    @staticmethod
    def decode(data: bytes) -> Record:
        """What ``encode`` made.

        Raises:
            DamagedError: it is nothing of the kind.
        """
        try:
            facts = _facts(data[LENGTH : LENGTH + int.from_bytes(data[:LENGTH], "little")])
            return Record(
                facts["kind"],
                facts["tenant"],
                facts["fingerprint"],
                tuple(facts["keys"]),
                load(data),
                facts["about"],
                facts["tokens"],
                facts["generation"],
                facts["rank"],
            )
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(str(error)) from error


def entry_of(data: bytes, digest: str, nbytes: int, now: float) -> Entry:
    """What an index needs to know of a file, from its beginning.

    Raises:
        DamagedError: it is no file of a store, or of another layout.
    """
    try:
        facts = _facts(data[LENGTH : LENGTH + header_bytes(data)])
        named = ("tenant", "kind", "fingerprint", "tokens", "generation", "rank")
        tenant, kind, fingerprint, tokens, generation, rank = (facts[name] for name in named)
        keys = tuple(map(str, facts["keys"]))
        "".join([str(tenant), str(kind), str(fingerprint), *keys]).encode()
        return Entry(
            str(tenant), digest, str(kind), str(fingerprint), nbytes, _number(tokens), _number(generation),
            _number(rank), keys, now, now,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedError(str(error)) from error


def header_bytes(data: bytes) -> int:
    """Length of a file's header, from its first bytes.

    Raises:
        DamagedError: no header is that long.
    """
    size = int.from_bytes(data[:LENGTH], "little")
    if not 0 < size <= LONGEST:
        raise DamagedError(f"a header of {size} bytes")
    return size


def _number(value: Any) -> int:
    if not -LARGEST < int(value) < LARGEST:
        raise ValueError("a number that no index can hold")
    return int(value)


def _facts(header: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(json.loads(header)["__metadata__"][FACTS])
    if facts["layout"] != LAYOUT:
        raise ValueError(f"layout {facts['layout']}, expected {LAYOUT}")
    return facts
