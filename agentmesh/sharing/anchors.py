"""Anchor pools: the offsets that earlier contents of a slot got in a consumer's context (arXiv 2510.12872, eq. 5-7).

Anchors are immutable, and shared by everybody who looks at the pool. Everything is position-free.

Notation: ``A`` anchors in a pool; ``L, H, T, D`` as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from agentmesh.kv.values import ALL, KV
from agentmesh.reasons import Reason


@dataclass(frozen=True)
class Anchor:
    """One content that was seen in a slot, with what the consumer's context made of it.

    Args:
        base: its base KV; shared with other consumers' anchors of the same content.
        slot: the offset of its KV in the consumer's context, as long as ``base``.
        fixed: the offset of the fixed text behind it; ``None`` where there is none.
        uses: in how many predictions it took part with weight.
        mark: what it is known by, however often it is used and whatever becomes of its pool meanwhile.
    """

    base: KV
    slot: KV
    fixed: KV | None
    uses: int = 0
    mark: object = field(default_factory=object, repr=False, compare=False)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything it holds."""
        pieces = (self.base, self.slot) if self.fixed is None else (self.base, self.slot, self.fixed)
        return tuple(tensor for piece in pieces for tensor in (piece.keys, piece.values))


@dataclass(frozen=True)
class Weighing:
    """How a content compares with a pool, when its offsets can be predicted.

    Args:
        anchors: those that are as long.
        used: marks of the anchors that carry nine tenths of the gate's weights.
    """

    anchors: tuple[Anchor, ...]
    used: tuple[object, ...]


@dataclass(frozen=True)
class AnchorPool:
    """The anchors of one slot of one consumer, oldest first.

    Args:
        fixed: base KV of the fixed text behind the slot: as it was when the consumer first read it.
        anchors: at most as many as the mesh allows.
    """

    fixed: KV | None = None
    anchors: tuple[Anchor, ...] = ()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything it holds."""
        own = () if self.fixed is None else (self.fixed.keys, self.fixed.values)
        return (*own, *(tensor for anchor in self.anchors for tensor in anchor.tensors))

    @torch.inference_mode()
    def weigh(self, base: KV, gamma: float) -> Weighing | Reason:
        """Compare a content with the anchors; a reason where it has to become an anchor itself (eq. 5).

        Args:
            base: the content's base KV.
            gamma: share of the largest possible entropy that the weights may have.
        """
        fitting = [anchor for anchor in self.anchors if anchor.base.tokens >= base.tokens]
        if len(fitting) < 2:
            return Reason.NO_ANCHOR_AS_LONG
        wanted = base.values.float()
        distances = torch.stack([(a.base.values[:, :, : base.tokens].float() - wanted).norm() for a in fitting])
        weights = (-distances).softmax(dim=0)
        entropy = float(-(weights * weights.clamp_min(1e-30).log()).sum())
        if entropy > gamma * math.log(len(fitting)):
            return Reason.ANCHORS_TOO_EVEN
        return Weighing(tuple(fitting), _leading(weights, fitting))

    def add(self, anchor: Anchor, limit: int, window: int) -> AnchorPool:
        """This pool with one more anchor; among the oldest ``window`` the least used one makes room for it."""
        anchors = self.anchors
        if len(anchors) >= limit:
            oldest = anchors[:window]
            victim = min(range(len(oldest)), key=lambda index: oldest[index].uses)
            anchors = anchors[:victim] + anchors[victim + 1 :]
        return replace(self, anchors=(*anchors, anchor))

    def without(self, one: Anchor) -> AnchorPool:
        """This pool without an anchor, however often that was used in the meantime."""
        return replace(self, anchors=tuple(anchor for anchor in self.anchors if anchor.mark is not one.mark))

    def used(self, marks: tuple[object, ...]) -> AnchorPool:
        """This pool with one use more for the anchors with these marks, as far as they are still in it."""
        return replace(self, anchors=tuple(replace(a, uses=a.uses + (a.mark in marks)) for a in self.anchors))


@dataclass(frozen=True)
class AnchoredSlot:
    """A slot's KV as the anchors predict it (eq. 6): weights for each token, keys and values apart."""

    base: KV
    anchors: tuple[Anchor, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens ``T``."""
        return self.base.tokens

    @cached_property
    def _weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights ``[A, T]`` for keys and for values, from each token's mean absolute difference over all layers."""
        bases = [anchor.base.cut(0, self.tokens) for anchor in self.anchors]
        keys = torch.stack([(base.keys - self.base.keys).abs().float().mean(dim=(0, 1, 3)) for base in bases])
        values = torch.stack([(base.values - self.base.values).abs().float().mean(dim=(0, 1, 3)) for base in bases])
        return (-keys).softmax(dim=0), (-values).softmax(dim=0)

    @torch.inference_mode()
    def fetch(self, layers: slice = ALL) -> KV:
        """The base and the weighted offsets."""
        base = self.base.fetch(layers)
        keys, values = base.keys.clone(), base.values.clone()
        for number, anchor in enumerate(self.anchors):
            delta = anchor.slot.fetch(layers).cut(0, self.tokens)
            by_key, by_value = (weights[number].to(keys.dtype)[:, None] for weights in self._weights)
            keys += by_key * delta.keys
            values += by_value * delta.values
        return KV(keys, values, base.frame)


@dataclass(frozen=True)
class AnchoredFixed:
    """The fixed text behind a slot as the slot's anchors predict it (eq. 7): weights for each layer, head and dim.

    ``tokens`` of it are made, from its beginning on.
    """

    fixed: KV
    slot: KV
    anchors: tuple[Anchor, ...]
    tokens: int

    @torch.inference_mode()
    def fetch(self, layers: slice = ALL) -> KV:
        """The first reading's KV and the weighted offsets."""
        count, slot = self.slot.tokens, self.slot.fetch(layers)
        fitting = [anchor.base.fetch(layers) for anchor in self.anchors]
        bases = [base.cut(base.tokens - count, base.tokens) for base in fitting]
        offsets = [a.fixed.fetch(layers).cut(0, self.tokens) for a in self.anchors if a.fixed is not None]
        base = self.fixed.fetch(layers).cut(0, self.tokens)
        keys = _by_channel(base.keys, slot.keys, [b.keys for b in bases], [o.keys for o in offsets])
        values = _by_channel(base.values, slot.values, [b.values for b in bases], [o.values for o in offsets])
        return KV(keys, values, base.frame)


def offset(base: KV, truth: KV) -> KV:
    """``truth − base``, zero in layer 0, whose KV depends on the token alone."""
    keys, values = truth.keys - base.keys, truth.values - base.values
    keys[0], values[0] = 0.0, 0.0
    return KV(keys, values, base.frame)


def _leading(weights: torch.Tensor, anchors: Sequence[Anchor], share: float = 0.9) -> tuple[object, ...]:
    """Marks of the fewest anchors whose weights add up to a share of all."""
    order = weights.argsort(descending=True).tolist()
    found: list[object] = []
    total = 0.0
    for place in order:
        found.append(anchors[place].mark)
        total += float(weights[place])
        if total >= share:
            break
    return tuple(found)


def _by_channel(
    base: torch.Tensor, slot: torch.Tensor, bases: list[torch.Tensor], offsets: list[torch.Tensor]
) -> torch.Tensor:
    """``base + Σ w·offset`` with ``w [A, L, H, D]`` from the distance over the slot's tokens."""
    distances = torch.stack([(other - slot).float().norm(dim=2) for other in bases])
    weights = (-distances).softmax(dim=0).to(base.dtype)
    found = base.clone()
    for weight, delta in zip(weights, offsets, strict=True):
        found += weight[:, :, None, :] * delta
    return found
