"""A solved linear realigner: what placing a block needs of all that was learned (``linear.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agentmesh.kv.values import ALL, KV

POSITION_FEATURES = 4
POSITION_SCALE = 3.0
RANK = 16
"""Directions of a head's key offsets, and of its value offsets, that are kept (docs/figures.md)."""


def position_features(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Features ``[T, 4]`` of the tokens with these numbers in a block."""
    t = torch.tensor(numbers, dtype=torch.float32, device=device)
    stacked = torch.stack([torch.ones_like(t), 1 / (1 + t), torch.exp(-t / 8), torch.exp(-t / 32)], dim=1)
    return POSITION_SCALE * stacked


@dataclass(frozen=True)
class LinearMap:
    """A solved realigner, ready to be applied: a token's offset is ``xᵀ·down·up``, for keys and values apart.

    Args:
        down: fp32 ``[L·H, 2D + 4, 2R]``; the first ``R`` coordinates are the keys', the others the values'.
        up: fp32 ``[L·H, 2R, D]``; each part's rows are orthonormal, so an offset is as long as its coordinates.
    """

    down: torch.Tensor
    up: torch.Tensor

    @staticmethod
    def of(offsets: torch.Tensor, gram: torch.Tensor, rank: int = RANK) -> LinearMap:
        """The directions in which predicted offsets vary most (reduced-rank regression).

        Args:
            offsets: the whole regression, fp32 ``[L·H, 2D + 4, 2D]``.
            gram: of the features it was learned from, Σ x xᵀ, fp32 ``[L·H, 2D + 4, 2D + 4]``.
            rank: how many directions of keys, and of values; all ``D`` where it is more.
        """
        down, up = [], []
        for part in offsets.chunk(2, dim=2):
            directions = torch.linalg.eigh(part.mT @ gram @ part).eigenvectors[:, :, -rank:]
            down.append(part @ directions)
            up.append(directions.mT)
        return LinearMap(torch.cat(down, dim=2), torch.cat(up, dim=1))

    @staticmethod
    def bytes_of(rows: int, dim: int) -> int:
        """Bytes of a map with so many rows ``L·H`` and a head dim, before it is solved."""
        return 8 * rows * min(RANK, dim) * (3 * dim + POSITION_FEATURES)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.down.nbytes + self.up.nbytes

    @torch.inference_mode()
    def apply(self, base: KV, numbers: Sequence[int], layers: slice = ALL) -> KV:
        """Some layers of the base as the consumer's context would have made them.

        Args:
            base: the whole base.
            numbers: of its tokens in their block.
            layers: which layers to make.
        """
        base = base.fetch(layers)
        shape = base.keys.shape
        up = _of(self.up, layers, shape[1]).to(base.keys.dtype)
        inner, rank = self._coordinates(base, numbers, layers), up.shape[1] // 2
        keys = torch.baddbmm(base.keys.flatten(0, 1), inner[:, :, :rank], up[:, :rank])
        values = torch.baddbmm(base.values.flatten(0, 1), inner[:, :, rank:], up[:, rank:])
        return KV(keys.view(shape), values.view(shape), base.frame)

    @torch.inference_mode()
    def sizes(self, base: KV, numbers: Sequence[int], layers: slice) -> torch.Tensor:
        """How far it moves tokens: the squared lengths of their offsets in some layers, ``[L, H, T]``."""
        base = base.fetch(layers)
        inner = self._coordinates(base, numbers, layers)
        lengths: torch.Tensor = torch.linalg.vector_norm(inner, dim=2, dtype=torch.float32)
        return lengths.square().view(base.keys.shape[:3])

    def _coordinates(self, base: KV, numbers: Sequence[int], layers: slice) -> torch.Tensor:
        """Offsets of tokens in these layers along the kept directions, ``[L·H, T, 2R]``."""
        dim, dtype = base.keys.shape[3], base.keys.dtype
        down = _of(self.down, layers, base.keys.shape[1]).to(dtype)
        found = position_features(numbers, down.device).to(dtype) @ down[:, 2 * dim :]
        found.baddbmm_(base.keys.flatten(0, 1), down[:, :dim])
        found.baddbmm_(base.values.flatten(0, 1), down[:, dim : 2 * dim])
        return found


def _of(rows: torch.Tensor, layers: slice, heads: int) -> torch.Tensor:
    """The rows ``[L·H, …]`` of some layers."""
    return rows.view(-1, heads, *rows.shape[1:])[layers].flatten(0, 1)


@dataclass(frozen=True)
class Realigned:
    """KV that a linear map makes when it is placed."""

    base: KV
    numbers: Sequence[int]
    map: LinearMap

    @property
    def tokens(self) -> int:
        """Number of tokens ``T``."""
        return self.base.tokens

    def fetch(self, layers: slice = ALL) -> KV:
        """Apply the map to some layers."""
        return self.map.apply(self.base, self.numbers, layers)
