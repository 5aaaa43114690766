"""A decoding step in few operations: what decoders of the common kind compute, without the model's own code.

A step of a small model is some two thousand operations, most of them so small that calling them is what they cost. Here
are the same sums in half of the calls: queries, keys and values come from one product and turn together, a gated
MLP begins with one product, and a norm takes three operations. Prefills run the model's own code.

Layers are read off the model's modules, by the names that most families give them (RMS norms, attention with grouped
heads and rotary embeddings, a gated MLP). Nothing is assumed of what the modules compute: whether a step is used is
decided by comparing it with the model's own forward (``recognise``).
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
from transformers.cache_utils import DynamicCache

from agentmesh.engine.batch import NextRows
from agentmesh.engine.copies import COPIES, filled
from agentmesh.engine.masks import UNLIMITED, windows_of
from agentmesh.engine.operations import Mark
from agentmesh.engine.products import Product, Tuning, halved, joined
from agentmesh.engine.spans import Spans
from agentmesh.kv.arena import Arena, KVShape

LENGTHS = (3, 30)
"""Tokens of the sequences that a step is tried on."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
        rows: ``[B, N]``.
        epsilon: of all norms.
    """

    def __init__(self, rows: torch.Tensor, epsilon: float) -> None:
        size = rows.shape[1]
        self._whole = functional.pad(rows, (0, 1), value=math.sqrt(size * epsilon))
        self._rows = self._whole[:, :size]
        self._cut: dict[int, torch.Tensor] = {}

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
        length = torch.linalg.vector_norm(self._whole, dim=-1, keepdim=True)
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
        device, count, way = self.shape.device, len(tokens), self.tuning.way(len(tokens))
        full = self.head.full(count, way)
        cached = NextRows(arenas, spans, full - count)
        ids, index = (_spread(one, cached.rows, full).to(device) for one in (tokens, positions))
        with spans.mark(Mark.MODEL):
            rows = self.embed(ids)
            turn, stream = self._turn(rows, index), Stream(rows, self.last.epsilon)
            for number, layer in enumerate(self.layers):
                mixed = joined(layer.mixed.multiply_full(stream.normed(layer.first), way))
                heads = self._heads(layer, mixed, turn)
                cached.write(number, heads)
                seen = cached.attend(number, self._queries(heads), layer.window, layer.scale)
                stream.add(layer.out.multiply_full(seen.reshape(full, -1), way))
                gate, entered = halved(layer.gated.multiply_full(stream.normed(layer.second), way))
                stream.add(layer.down.multiply_full(joined(layer.activation(gate) * entered), way))
            last = stream.normed(self.last)
            if full > count:
                last = filled(last[cached.rows], full)
            return joined(self.head.multiply_full(last, way))[:count]

    def _heads(self, layer: Layer, mixed: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Queries, keys and values ``[B, Hq + 2 H, D]``, normed and turned as the layer does."""
        heads = mixed.view(mixed.shape[0], -1, self.shape.head_dim)
        if layer.heads is not None:
            heads = torch.cat((layer.heads(heads[:, : -self.shape.heads]), heads[:, -self.shape.heads :]), dim=1)
        if not layer.turns:
            return heads
        cosines, sines = turn
        return torch.addcmul(heads * cosines, heads.roll(self.shape.head_dim // 2, -1), sines)

    def _queries(self, heads: torch.Tensor) -> torch.Tensor:
        """Queries ``[B, H, Hq / H, D]`` of all heads ``[B, Hq + 2 H, D]``, in one call: a slice and a view are two."""
        group, dims = self.queries // self.shape.heads, self.shape.head_dim
        size = len(heads), self.shape.heads, group, dims
        return heads.as_strided(size, (heads.stride(0), group * dims, dims, 1))

    def _turn(self, rows: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines ``[B, Hq + 2 H, D]`` that turn queries and keys and leave values as they are."""
        cosines, sines = (found[:, 0] for found in self.rotary(rows[:, None], positions[:, None]))
        half = self.shape.head_dim // 2
        sines = torch.cat((-sines[:, :half], sines[:, half:]), dim=-1)
        still = rows.new_ones(len(rows), self.shape.heads, self.shape.head_dim)
        turning = (len(rows), self.queries + self.shape.heads, self.shape.head_dim)
        return (
            torch.cat((cosines[:, None].expand(turning), still), dim=1),
            torch.cat((sines[:, None].expand(turning), torch.zeros_like(still)), dim=1),
        )


def _spread(numbers: Sequence[int], rows: Sequence[int], count: int) -> torch.Tensor:
    """One number for each of ``count`` rows, zeros for spare ones."""
    spread = [0] * count
    for row, number in zip(rows, numbers, strict=True):
        spread[row] = number
    return torch.tensor(spread)


def recognise(model: Any) -> Step | None:
    """A step for a model, if one computes what the model computes.

    Weights that are multiplied together are joined in memory; the model's own modules keep views of them.

    Args:
        model: a transformers causal language model in eval mode.

    Returns:
        ``None`` where the model is built differently, or differs in its numbers.
    """
    try:
        step = _read(model)
        return step if _error(model, step) <= TOLERANCE[step.shape.dtype] else None
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def _read(model: Any) -> Step:
    """A step made of a model's modules.

    Raises:
        AttributeError, KeyError, RuntimeError, TypeError, ValueError: some part is missing or of another kind.
    """
    body, head = model.model, model.lm_head
    attention = body.layers[0].self_attn
    weight, dims = attention.k_proj.weight, attention.head_dim
    windows = windows_of(model.config.get_text_config())
    layers, last = tuple(_layer(*one) for one in zip(body.layers, windows, strict=True)), Norm.of(body.norm)
    if any(norm.epsilon != last.epsilon for layer in layers for norm in (layer.first, layer.second)):
        raise ValueError("norms of several epsilons")
    return Step(
        shape=KVShape(len(layers), weight.shape[0] // dims, dims, weight.dtype, weight.device),
        queries=attention.q_proj.weight.shape[0] // dims,
        embed=body.embed_tokens,
        rotary=body.rotary_emb,
        layers=layers,
        last=last,
        head=_joined(head),
        tuning=Tuning(),
    )


def _layer(module: Any, window: int | None) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        first=Norm.of(module.input_layernorm),
        second=Norm.of(module.post_attention_layernorm),
        heads=_head_norm(attention),
        mixed=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_joined(attention.o_proj),
        gated=_joined(mlp.gate_proj, mlp.up_proj),
        down=_joined(mlp.down_proj),
        activation=mlp.act_fn.forward,
        turns=bool(getattr(attention, "use_rope", True)),
        window=window or UNLIMITED,
        scale=attention.scaling,
    )


def _head_norm(attention: Any) -> Norm | None:
    """One norm for query and key heads, with weights ``[Hq + H, D]``; ``None`` where there is none."""
    if not hasattr(attention, "q_norm"):
        return None
    dims, weights = attention.head_dim, []
    for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
        weights.append(norm.weight.expand(projection.weight.shape[0] // dims, dims))
    return Norm(torch.cat(weights), Norm.of(attention.q_norm).epsilon)


def _joined(*layers: Any) -> Product:
    """One product for linear layers of the same rows; the weights of several become views of what is joined."""
    if any(type(layer) is not nn.Linear for layer in layers):
        raise TypeError("only plain linear layers can be joined")
    if len(layers) == 1:
        return Product(layers[0].weight, layers[0].bias)
    whole = torch.cat([layer.weight for layer in layers])
    begin = 0
    for layer in layers:
        end = begin + len(layer.weight)
        layer.weight.data = whole[begin:end]
        begin = end
    return Product(whole, None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]))


@torch.inference_mode()
def _error(model: Any, step: Step) -> float:
    """Largest relative error of a step's logits and KV, over sequences of different lengths."""
    found = [_own(model, step.shape, length) for length in LENGTHS]
    logits = step.run([arena for arena, _, _ in found], LENGTHS, LENGTHS, Spans())
    errors = []
    for (arena, own_logits, own_rows), row in zip(found, logits, strict=True):
        errors += [_relative(row, own_logits), _relative(arena.both[:, :, :, arena.length - 1], own_rows)]
    return max(errors)


def _own(model: Any, shape: KVShape, length: int) -> tuple[Arena, torch.Tensor, torch.Tensor]:
    """What the model computes for the token ``length`` behind others: an arena before it, logits, and KV of its row."""
    generator = torch.Generator().manual_seed(0)
    known = model.config.get_text_config().vocab_size
    ids = torch.cat((torch.randint(known, (length,), generator=generator), torch.tensor([length])))
    cache = DynamicCache()
    logits = model(input_ids=ids[None].to(shape.device), past_key_values=cache, use_cache=True).logits[0, -1]
    arena = Arena(shape, length + 1)
    both = torch.stack([torch.cat((layer.keys, layer.values)) for layer in cache.layers], dim=1)
    arena.both[:, :, :, :length] = both[:, :, :, :length]
    arena.aim(slice(length, length + 1), length + 1)
    return arena, logits, both[:, :, :, length]


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).float().norm() / wanted.float().norm())
