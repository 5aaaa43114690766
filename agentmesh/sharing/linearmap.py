"""A solved linear realigner: what placing a block needs of all that was learned (``linear.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agentmesh.kv.values import ALL, KV

POSITION_FEATURES = 4
POSITION_SCALE = 3.0
DIRECTIONS = 16
"""Random directions by which ``sizes`` measures offsets: an eighth of the work of whole ones at a head dim of 64."""


def position_features(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Features ``[T, 4]`` of the tokens with these numbers in a block."""
    t = torch.tensor(numbers, dtype=torch.float32, device=device)
    stacked = torch.stack([torch.ones_like(t), 1 / (1 + t), torch.exp(-t / 8), torch.exp(-t / 32)], dim=1)
    return POSITION_SCALE * stacked


@dataclass(frozen=True)
class LinearMap:
    """A solved realigner, ready to be applied.

    Args:
        weights: fp32 ``[L·H, 2D + 4, 2D]``; the identity is part of it, so it gives the new KV, not the offset.
    """

    weights: torch.Tensor

    @torch.inference_mode()
    def apply(self, base: KV, numbers: Sequence[int], layers: slice = ALL) -> KV:
        """Some layers of the base as the consumer's context would have made them.

        Args:
            base: the whole base.
            numbers: of its tokens in their block.
            layers: which layers to make.
        """
        base = base.fetch(layers)
        dim = base.keys.shape[3]
        out = _mapped(base, numbers, self._of(layers, base.keys.shape[1]))
        return KV(out[..., :dim], out[..., dim:], base.frame)

    @torch.inference_mode()
    def sizes(self, base: KV, numbers: Sequence[int], layers: slice) -> torch.Tensor:
        """How far it moves tokens: about the squared lengths of their offsets in some layers, ``[L, H, T]``.

        A random projection keeps lengths (Johnson and Lindenstrauss): one head's with a deviation of √(2/16), a third;
        the mean over 24 heads with one of 7 %.
        """
        base = base.fetch(layers)
        weights = self._of(layers, base.keys.shape[1])
        directions = _directions(weights.shape[2], weights.device)
        offsets = weights @ directions
        offsets[:, : len(directions)] -= directions
        lengths: torch.Tensor = torch.linalg.vector_norm(_mapped(base, numbers, offsets), dim=3).float()
        return lengths.square()

    def _of(self, layers: slice, heads: int) -> torch.Tensor:
        """The weights of some layers, ``[L·H, 2D + 4, 2D]``."""
        return self.weights.view(-1, heads, *self.weights.shape[1:])[layers].flatten(0, 1)


def _directions(size: int, device: torch.device) -> torch.Tensor:
    """Random signs ``[size, 16]``, the same every time, scaled so that projecting keeps mean squared lengths."""
    chosen = torch.randint(2, (size, DIRECTIONS), generator=torch.Generator().manual_seed(0)).to(device)
    scaled: torch.Tensor = (2.0 * chosen - 1.0) / DIRECTIONS**0.5
    return scaled


def _mapped(base: KV, numbers: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
    """``xᵀW`` of tokens with weights ``[L·H, 2D + 4, N]``: ``[L, H, T, N]``."""
    count, heads, tokens, dim = base.keys.shape
    weights = weights.to(base.keys.dtype)
    places = position_features(numbers, base.keys.device).to(base.keys.dtype)
    out = places @ weights[:, 2 * dim :]
    out.baddbmm_(base.keys.flatten(0, 1), weights[:, :dim])
    out.baddbmm_(base.values.flatten(0, 1), weights[:, dim : 2 * dim])
    return out.view(count, heads, tokens, -1)


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
