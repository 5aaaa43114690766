"""Rotary position embedding of cached keys: rotate to positions and back, all layers at once.

Rotation is done in fp32 with the *unscaled* cos and sin of the model's inverse frequencies, then cast back to the
keys' dtype. A scaling factor that a rope type applies to cos and sin (YaRN) therefore stays inside the key and is
never applied twice (docs/method.md, 2). A layer without rotation (NoPE) has inverse frequencies of zero, which makes
both directions the identity, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Rope:
    """How a model rotates its keys.

    Args:
        inv_freq: fp32 ``[L, R/2]``, radians per position; zero rows for NoPE layers.
        interleaved: whether a pair is (2i, 2i+1) instead of (i, i + R/2).

    The first ``R`` of the ``D`` head dims rotate; the rest pass through (partial rotary).
    """

    inv_freq: torch.Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        assert self.inv_freq.ndim == 2, f"inv_freq must be [L, R/2], got {tuple(self.inv_freq.shape)}"

    @property
    def rotary_dim(self) -> int:
        """Number of rotated head dims ``R``."""
        return 2 * self.inv_freq.shape[1]

    @cached_property
    def shared(self) -> bool:
        """Whether all layers rotate alike, so that one table serves them."""
        return bool((self.inv_freq == self.inv_freq[:1]).all())

    def of(self, layers: slice) -> Rope:
        """The rotation of some layers alone."""
        return self if self.shared else Rope(self.inv_freq[layers], self.interleaved)

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Position-free keys turned to ``positions``.

        Args:
            keys: ``[L, H, T, D]``.
            positions: integers ``[T]``.

        Returns:
            New keys ``[L, H, T, D]`` in the dtype of ``keys``.
        """
        return self._turn(keys, positions, 1.0, torch.empty_like(keys))

    def rotate_into(self, out: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> None:
        """The same, written to other memory ``[L, H, T, D]`` that does not overlap the keys'."""
        self._turn(keys, positions, 1.0, out)

    def unrotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys cached at ``positions`` turned back to be position-free; shapes as in ``rotate``."""
        return self._turn(keys, positions, -1.0, torch.empty_like(keys))

    def _turn(self, keys: torch.Tensor, positions: torch.Tensor, sign: float, out: torch.Tensor) -> torch.Tensor:
        inv_freq = (self.inv_freq[:1] if self.shared else self.inv_freq).to(keys.device)
        angles = positions.to(keys.device, torch.float32)[None, :, None] * inv_freq[:, None, :]  # [L, T, R/2]
        cos = angles.cos().unsqueeze(1)  # [L, 1, T, R/2]
        sin = angles.sin().unsqueeze(1) * sign
        turned, dim = keys[..., : self.rotary_dim].float(), self.rotary_dim
        whole = out[..., :dim] if out.dtype is torch.float32 else torch.empty_like(turned)
        (first, second), (out_first, out_second) = self._pairs(turned), self._pairs(whole)
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        if out.dtype is not torch.float32:
            out[..., :dim] = whole
        out[..., dim:] = keys[..., dim:]
        return out

    def _pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two members of every rotated pair, as views ``[..., R/2]``."""
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        half = self.inv_freq.shape[1]
        return x[..., :half], x[..., half:]
