"""A step in few operations for a model, read off its modules and compared with what the model computes.

Layers are read by the names that most families give their parts (RMS norms, attention with grouped heads and rotary
embeddings, a gated MLP). Nothing is assumed of what the modules compute: whether a step is used is decided by comparing
it with the model's own forward, logits and KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from agentmesh.engine.masks import UNLIMITED, windows_of
from agentmesh.engine.products import Product, Tuning
from agentmesh.engine.spans import Spans
from agentmesh.engine.step import Layer, Norm, Step
from agentmesh.kv.arena import Arena, KVShape

LENGTHS = (3, 30)
"""Tokens of the sequences that a step is tried on."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Runs(Protocol):
    """What computes the next token of some sequences; see ``Step``."""

    @property
    def shape(self) -> KVShape:
        """Of one token's KV."""

    def run(
        self, arenas: Sequence[Arena], tokens: Sequence[int], positions: Sequence[int], spans: Spans
    ) -> torch.Tensor:
        """As ``Step.run``."""


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
        return step if error_of(model, step) <= TOLERANCE[step.shape.dtype] else None
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
def error_of(model: Any, step: Runs, count: int = len(LENGTHS)) -> float:
    """Largest relative error of a step's logits and KV to a model's own, over sequences of different lengths.

    Args:
        model: the model.
        step: what is compared with it.
        count: of sequences.

    Returns:
        Not a number where some logits or KV are none.
    """
    texts, lengths = {length: [*trial_text(model, length), length] for length in LENGTHS}, (LENGTHS * count)[:count]
    wanted = {length: own(model, step.shape, text) for length, text in texts.items()}
    arenas = [_before(wanted[length].kv, step.shape) for length in lengths]
    logits = step.run(arenas, lengths, lengths, Spans())
    errors = []
    for length, arena, row in zip(lengths, arenas, logits, strict=True):
        errors += [relative(row, wanted[length].logits)]
        errors += [relative(arena.both[:, :, :, length], wanted[length].kv[:, :, :, length])]
    return float(torch.tensor(errors).max())


@dataclass(frozen=True)
class Own:
    """What a model computes: logits ``[V]`` at the last token, and KV ``[2, L, H, T, D]``."""

    logits: torch.Tensor
    kv: torch.Tensor


def trial_text(model: Any, length: int) -> list[int]:
    """Token ids to try something on; the same for each model and length."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (length,), generator=generator).tolist()


def own(model: Any, shape: KVShape, text: Sequence[int], cut: int = 0) -> Own:
    """What the model's own code computes for a text, in one forward or in two (``cut``: tokens of the first)."""
    cache = DynamicCache()
    for piece in (text[:cut], text[cut:]):
        if piece:
            ids = torch.tensor([piece], device=shape.device)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Own(
        output.logits[0, -1], torch.stack([torch.cat((layer.keys, layer.values)) for layer in cache.layers], dim=1)
    )


def _before(kv: torch.Tensor, shape: KVShape) -> Arena:
    """An arena with all but the last token of some KV, aimed at that."""
    tokens = kv.shape[3]
    arena = Arena(shape, tokens)
    arena.both[:, :, :, :-1] = kv[:, :, :, :-1]
    arena.aim(slice(tokens - 1, tokens), tokens)
    return arena


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; not a number where either is none."""
    return float((found - wanted).float().norm() / wanted.float().norm())
