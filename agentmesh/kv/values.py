"""Keys and values of a run of tokens, as one immutable value.

Shape legend of the whole project: ``L`` layers, ``H`` kv heads, ``T`` tokens, ``D`` head dim, ``B`` batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

ALL = slice(None)


class Frame(Enum):
    """In which frame keys are kept (docs/method.md, 2)."""

    ABSOLUTE = "absolute"
    """Exactly as the cache held them, rotated to the position they were computed at."""

    FREE = "position-free"
    """Un-rotated, ready for any position."""


@dataclass(frozen=True)
class KV:
    """Keys and values of ``T`` consecutive tokens in every layer.

    Args:
        keys: ``[L, H, T, D]``.
        values: ``[L, H, T, D]``.
        frame: the keys' frame.
    """

    keys: torch.Tensor
    values: torch.Tensor
    frame: Frame

    def __post_init__(self) -> None:
        assert self.keys.ndim == 4, f"keys must be [L, H, T, D], got {tuple(self.keys.shape)}"
        assert self.keys.shape[:3] == self.values.shape[:3], "keys and values must agree in L, H and T"

    @property
    def tokens(self) -> int:
        """Number of tokens ``T``."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values hold."""
        return self.keys.nbytes + self.values.nbytes

    def fetch(self, layers: slice = ALL) -> KV:
        """Some layers of itself, as a view; a KV is its own source."""
        return KV(self.keys[layers], self.values[layers], self.frame)

    def cut(self, start: int, stop: int) -> KV:
        """Tokens ``start`` to ``stop`` as a view of the same memory."""
        return KV(self.keys[:, :, start:stop], self.values[:, :, start:stop], self.frame)

    def take(self, index: torch.Tensor) -> KV:
        """The tokens with some numbers ``[T]``, as a copy."""
        return KV(self.keys[:, :, index], self.values[:, :, index], self.frame)

    def owned(self) -> KV:
        """A contiguous copy that shares memory with nothing."""
        return KV(self.keys.clone(), self.values.clone(), self.frame)


class KVSource(Protocol):
    """KV that is made when it is placed: stored rows as they are, or realigned."""

    @property
    def tokens(self) -> int:
        """Number of tokens ``T``."""

    def fetch(self, layers: slice = ALL) -> KV:
        """The rows of some layers."""


def join(pieces: Sequence[KV]) -> KV:
    """Pieces of one frame, one after the other along ``T``."""
    frames = {piece.frame for piece in pieces}
    assert len(frames) == 1, f"pieces of different frames cannot be joined: {frames}"
    keys = torch.cat([piece.keys for piece in pieces], dim=2)
    values = torch.cat([piece.values for piece in pieces], dim=2)
    return KV(keys, values, frames.pop())
