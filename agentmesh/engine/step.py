"""A decoding step in few operations: what decoders of the common kind compute, without the model's own code.

A step of a small model is some two thousand operations, most of them so small that calling them is what they cost. Here
are the same sums in half of the calls: queries, keys and values come from one product and turn together, a gated
MLP begins with one product, and a norm takes three operations. Prefills run the model's own code, unless they
are replayed (``engine/recorded.py``).

Where its layers come from: ``engine/recognise.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional

from agentmesh.engine.batch import NextRows
from agentmesh.engine.copies import COPIES, filled
from agentmesh.engine.operations import Mark
from agentmesh.engine.products import Product, Tuning, Way, halved, joined
from agentmesh.engine.spans import Spans
from agentmesh.kv.arena import Arena, KVShape

Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosines and signed sines ``[B, Hq + 2 H, D]`` that turn queries and keys and leave values as they are."""


@dataclass(frozen=True)
class Norm:
    """Divides rows ``[…, N]`` by their root mean square, and multiplies by weights ``[N]``; by head ``[Hq + H, N]``."""

    weight: torch.Tensor
    epsilon: float

    @cached_property
    def stretched(self) -> torch.Tensor:
        """The weights times the root of ``N``, for rows that are divided by their length."""
        return self.weight * math.sqrt(self.weight.shape[-1])

    @classmethod
    def of(cls, module: Any) -> Norm:
        """What a model's norm module says it does."""
        epsilon = getattr(module, "variance_epsilon", None)
        return cls(module.weight, module.eps if epsilon is None else epsilon)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows over their last dimension."""
        size = self.weight.shape[-1:]
        if self.weight.dim() == 1:
            return functional.rms_norm(rows, size, self.weight, self.epsilon)
        return functional.rms_norm(rows, size, eps=self.epsilon) * self.weight


@final
class Stream:
    """The rows ``[B, N]`` that layers add to, with the divisors of their norms close at hand.

    torch has no fused norm on a CPU and makes one of nine operations. In float32 it is three here: each row has one
    more number, whose square is ``N`` times epsilon, so the length of the whole is all that its norm divides by.

    Args:
        whole: the rows with one more number each, ``[B, N + 1]``.
    """

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole
        self._rows = whole[:, :-1]
        self._cut: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, rows: torch.Tensor, epsilon: float) -> Stream:
        """A stream of rows ``[B, N]``, with the epsilon of all norms."""
        return cls(functional.pad(rows, (0, 1), value=math.sqrt(rows.shape[1] * epsilon)))

    def add(self, product: torch.Tensor) -> None:
        """Add a product ``[B, N]``, in pieces or not."""
        if product.dim() == 2:
            self._rows.add_(product)
            return
        if len(product) not in self._cut:
            self._cut[len(product)] = self._rows.view(len(self._rows), len(product), -1).transpose(0, 1)
        self._cut[len(product)].add_(product)

    def normed(self, norm: Norm) -> torch.Tensor:
        """The rows behind a norm, ``[B, N]``."""
        if self._rows.dtype is not torch.float32:
            return norm(self._rows)
        length = torch.linalg.vector_norm(self.whole, dim=-1, keepdim=True)
        return (self._rows * norm.stretched).div_(length)


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        first, second: norms before the attention and before the MLP.
        heads: weights and epsilon that norm query and key heads ``[Hq + H, D]``; ``None`` where they are not normed.
        mixed: queries, keys and values in one product, ``[(Hq + 2 H) D, hidden]``.
        out: the product behind the attention.
        gated: gate and input of the MLP in one product.
        down: the product at the MLP's end.
        activation: of the gate.
        turns: whether queries and keys turn with their position.
        window: how many keys a query sees.
        scale: of the scores.
    """

    first: Norm
    second: Norm
    heads: Norm | None
    mixed: Product
    out: Product
    gated: Product
    down: Product
    activation: Callable[[torch.Tensor], torch.Tensor]
    turns: bool
    window: int
    scale: float


@final
@dataclass(frozen=True)
class Step:
    """The next token of some sequences.

    Args:
        shape: of one token's KV.
        queries: query heads ``Hq``.
        embed: token ids to rows ``[B, hidden]``.
        rotary: the model's own rotary embedding.
        layers: in order.
        last: the norm before the head.
        head: the product that gives logits.
        tuning: how the products are multiplied.
    """

    shape: KVShape
    queries: int
    embed: nn.Module
    rotary: nn.Module
    layers: tuple[Layer, ...]
    last: Norm
    head: Product
    tuning: Tuning

    def tuned(self, tuning: Tuning) -> Step:
        """The same step with products that are multiplied in other ways, over copies of their weights if need be."""
        if tuning.decode not in COPIES:
            return replace(self, tuning=tuning)
        decode = tuning.decode
        layers = tuple(
            replace(
                layer,
                mixed=layer.mixed.copying(decode),
                out=layer.out.copying(decode),
                gated=layer.gated.copying(decode),
                down=layer.down.copying(decode),
            )
            for layer in self.layers
        )
        return replace(self, layers=layers, head=self.head.copying(decode), tuning=tuning)

    @torch.inference_mode()
    def run(
        self, arenas: Sequence[Arena], tokens: Sequence[int], positions: Sequence[int], spans: Spans
    ) -> torch.Tensor:
        """Compute one more token of each sequence and write its KV.

        Args:
            arenas: one a sequence, each aimed at the row of its next token.
            tokens: the next token of each.
            positions: where it stands.
            spans: notes where the time goes.

        Returns:
            Logits ``[B, V]``.
        """
        count, way = len(tokens), self.tuning.way(len(tokens))
        full = self.head.full(count, way)
        cached = NextRows(arenas, spans, full - count)
        ids, index = (spread(one, cached.rows, full).to(self.shape.device) for one in (tokens, positions))
        with spans.mark(Mark.MODEL):
            stream, turn = self.begin(ids, index)
            for number, layer in enumerate(self.layers):
                heads = self.enter(layer, stream, turn, way)
                cached.write(number, heads)
                seen = cached.attend(number, self.queries_of(heads), layer.window, layer.scale)
                self.leave(layer, stream, seen.reshape(full, -1), way)
            last = stream.normed(self.last)
            return self.end(last[cached.rows] if full > count else last)

    def begin(self, ids: torch.Tensor, index: torch.Tensor) -> tuple[Stream, Turn]:
        """What layers add to for tokens ``[B]`` at positions ``[B]``, and how their heads turn."""
        rows = self.embed(ids)
        return Stream.of(rows, self.last.epsilon), self._turn(rows, index)

    def enter(self, layer: Layer, stream: Stream, turn: Turn, way: Way) -> torch.Tensor:
        """What a layer has to do before it attends: all heads ``[B, Hq + 2 H, D]``, normed and turned."""
        mixed = joined(layer.mixed.multiply_full(stream.normed(layer.first), way))
        return self._heads(layer, mixed, turn)

    def leave(self, layer: Layer, stream: Stream, seen: torch.Tensor, way: Way) -> None:
        """What a layer has to do when its queries have seen ``[B, Hq D]``: it adds that, and its MLP."""
        stream.add(layer.out.multiply_full(seen, way))
        gate, entered = halved(layer.gated.multiply_full(stream.normed(layer.second), way))
        stream.add(layer.down.multiply_full(joined(layer.activation(gate) * entered), way))

    def end(self, last: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, V]`` of normed rows ``[B, N]``."""
        count, way = len(last), self.tuning.way(len(last))
        full = self.head.full(count, way)
        return joined(self.head.multiply_full(filled(last, full) if full > count else last, way))[:count]

    def queries_of(self, heads: torch.Tensor) -> torch.Tensor:
        """Queries ``[B, H, Hq / H, D]`` of all heads ``[B, Hq + 2 H, D]``, in one call: a slice and a view are two."""
        group, dims = self.queries // self.shape.heads, self.shape.head_dim
        size = len(heads), self.shape.heads, group, dims
        return heads.as_strided(size, (heads.stride(0), group * dims, dims, 1))

    def _heads(self, layer: Layer, mixed: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Queries, keys and values ``[B, Hq + 2 H, D]``, normed and turned as the layer does."""
        heads = mixed.view(mixed.shape[0], -1, self.shape.head_dim)
        if layer.heads is not None:
            heads = torch.cat((layer.heads(heads[:, : -self.shape.heads]), heads[:, -self.shape.heads :]), dim=1)
        if not layer.turns:
            return heads
        cosines, sines = turn
        return torch.addcmul(heads * cosines, heads.roll(self.shape.head_dim // 2, -1), sines)

    def _turn(self, rows: torch.Tensor, positions: torch.Tensor) -> Turn:
        """How the heads of rows at ``positions [B]`` turn."""
        cosines, sines = (found[:, 0] for found in self.rotary(rows[:, None], positions[:, None]))
        half = self.shape.head_dim // 2
        sines = torch.cat((-sines[:, :half], sines[:, half:]), dim=-1)
        still = rows.new_ones(len(rows), self.shape.heads, self.shape.head_dim)
        turning = (len(rows), self.queries + self.shape.heads, self.shape.head_dim)
        return (
            torch.cat((cosines[:, None].expand(turning), still), dim=1),
            torch.cat((sines[:, None].expand(turning), torch.zeros_like(still)), dim=1),
        )


def spread(numbers: Sequence[int], rows: Sequence[int], count: int) -> torch.Tensor:
    """One number for each of ``count`` rows, zeros for spare ones; on the CPU."""
    found = [0] * count
    for row, number in zip(rows, numbers, strict=True):
        found[row] = number
    return torch.tensor(found)
