"""What a model supports, established when it is loaded and never assumed (docs/method.md, 6.1).

First the configuration is read: recurrent, latent or chunked attention keeps KV that cannot be sliced. Then the model
is run: keys of the same tokens at two positions must differ by a rotation, a prefill from placed and computed tokens
must equal a full forward, and sequences that decode together must get what each gets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from agentmesh.engine.composition import Composition, Placement
from agentmesh.engine.forward import ArenaRunner, CacheSize, PlainRunner, Runner
from agentmesh.engine.masks import MaskPlan, windows_of
from agentmesh.engine.products import switch_of
from agentmesh.engine.recorded import AnyStep, RecordedStep
from agentmesh.kv.arena import KVShape
from agentmesh.kv.rope import Rope

PROBE_TOKENS = 24
PROBE_SHIFT = 37
SHORT = 16
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
LENGTH_DEPENDENT = ("dynamic", "longrope")


class Level(Enum):
    """How much KV reuse a model allows; each level includes the one before."""

    DENSE = "dense"
    """Every prompt is computed whole, over the model's own cache."""

    PREFIX = "prefix"
    """Exact prefixes are reused."""

    REALIGN = "realign"
    """KV can be moved to other positions."""


@dataclass(frozen=True)
class Support:
    """What the probe found.

    Args:
        level: the highest level of reuse.
        layers: one label a layer: ``rope``, ``nope`` or ``unsupported``.
        reason: why the level is not higher; empty at the highest.
        runner: runs the model, over arenas above level ``dense``.
    """

    level: Level
    layers: tuple[str, ...]
    reason: str
    runner: Runner

    @property
    def steps(self) -> bool:
        """Whether it decodes by a step of few operations instead of by the model's own code."""
        return isinstance(self.runner, ArenaRunner) and self.runner.step is not None

    @property
    def replays(self) -> bool:
        """Whether its steps are replayed from CUDA graphs."""
        return isinstance(self.runner, ArenaRunner) and isinstance(self.runner.step, RecordedStep)

    def decoding(self, unrecorded: str) -> str:
        """How it decodes, in words; ``unrecorded`` says why it has no CUDA graphs where it might."""
        if not self.steps:
            return "the model's own code"
        if self.replays:
            return "few operations, replayed from CUDA graphs"
        return f"few operations (no CUDA graphs: {unrecorded})" if unrecorded else "few operations"

    @property
    def rope(self) -> Rope | None:
        """How keys are rotated; ``None`` where KV cannot be moved."""
        return self.runner.rope if isinstance(self.runner, ArenaRunner) else None


def probe(model: Any, step: AnyStep | None = None) -> Support:
    """Establish what ``model`` (a transformers causal language model in eval mode) supports; ``step`` decodes it."""
    config = model.config.get_text_config()
    refusal = refused_by_config(config)
    shape = None if refusal else _kv_shape(model)
    if shape is None:
        refusal = refusal or "its layers keep KV of different sizes"
        labels: tuple[str, ...] = ("unsupported",) * config.num_hidden_layers
        return Support(Level.DENSE, labels, refusal, PlainRunner(model, _cache_size(model)))
    masks = _mask_plan(config, shape.dtype)
    labels, rope = _rope(model, ArenaRunner(model, shape, masks, None))
    runner = ArenaRunner(model, shape, masks, rope)
    batching = replace(runner, batches=True)
    if _batch_error(batching) <= TOLERANCE[shape.dtype]:
        runner = batching
    runner = replace(runner, switch=switch_of(model), step=step if runner.batches else None)
    if rope is None:
        return Support(Level.PREFIX, labels, "keys do not turn with their position as rotary embeddings do", runner)
    error = _sparse_error(runner)
    if error > TOLERANCE[shape.dtype]:
        refusal = f"a prefill from placed and computed tokens differs from a full forward by {error:.1e}"
        return Support(Level.PREFIX, labels, refusal, runner)
    return Support(Level.REALIGN, labels, "", runner)


def refused_by_config(config: Any) -> str:
    """Why a configuration rules out slicing the model's KV; empty where it does not."""
    types = set(getattr(config, "layer_types", None) or ())
    odd = sorted(types - {"full_attention", "sliding_attention"})
    if odd:
        return f"it has layers of type {', '.join(odd)}"
    classes = {type(layer) for layer in DynamicCache(config=config).layers}
    odd = sorted(cls.__name__ for cls in classes - {DynamicLayer, DynamicSlidingWindowLayer})
    if odd:
        return f"it keeps its cache in {', '.join(odd)}"
    for key, what in (("kv_lora_rank", "latent attention"), ("attention_chunk_size", "chunked attention")):
        if getattr(config, key, None) is not None:
            return f"it uses {what}"
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") in LENGTH_DEPENDENT:
            return f"its rope type {parameters['rope_type']!r} changes its table with the prompt's length"
    return ""


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rope parameters of a configuration, one dict for each layer type that has its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


@torch.inference_mode()
def _kv_shape(model: Any) -> KVShape | None:
    """The size of one token's KV, read from what the model caches; ``None`` where layers differ."""
    cache = DynamicCache()
    model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    sizes = {(layer.keys.shape, layer.values.shape) for layer in cache.layers if layer.is_initialized}
    uniform = len(sizes) == 1 and all(layer.is_initialized for layer in cache.layers)
    keys, values = next(iter(sizes))
    if not uniform or keys != values or len(cache.layers) != model.config.get_text_config().num_hidden_layers:
        return None
    first = cache.layers[0].keys
    return KVShape(len(cache.layers), keys[1], keys[3], first.dtype, first.device)


@torch.inference_mode()
def _cache_size(model: Any) -> CacheSize:
    """How large the caches of a model get that keeps no KV of its own shape: those of two short prompts tell."""
    sizes = []
    for tokens in (SHORT, 2 * SHORT):
        cache = DynamicCache(config=model.config)
        ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        held = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
        sizes.append(sum(tensor.nbytes for tensor in held))
    token = (sizes[1] - sizes[0]) / SHORT
    return CacheSize(sizes[0] - token * SHORT, token)


def _mask_plan(config: Any, dtype: torch.dtype) -> MaskPlan:
    """One mask a layer type where the configuration names types; else one for all layers."""
    types = getattr(config, "layer_types", None) or ["all"] * config.num_hidden_layers
    windows = dict(zip(types, windows_of(config), strict=True))
    return MaskPlan(windows, by_type=len(windows) > 1, dtype=dtype)


def _inv_freq(model: Any, layers: int) -> torch.Tensor | None:
    """Inverse frequencies ``[L, R/2]`` from the model's rotary buffers; ``None`` where there are none for a layer."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    types = getattr(model.config.get_text_config(), "layer_types", None) or [""] * layers
    rows = []
    for layer in range(layers):
        endings = (f"layers.{layer}.self_attn.rotary_emb.inv_freq", f"rotary_emb.{types[layer]}_inv_freq")
        found = [b for name, b in buffers.items() if name.endswith((*endings, "rotary_emb.inv_freq"))]
        if not found:
            return None
        rows.append(found[0].detach().float())
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else None


def _rope(model: Any, runner: ArenaRunner) -> tuple[tuple[str, ...], Rope | None]:
    """Label every layer by how its keys follow their position, and the rotation that explains all of them."""
    layers = runner.shape.layers
    inv_freq = _inv_freq(model, layers)
    if inv_freq is None:
        inv_freq = torch.zeros((layers, 1))
    here = _keys_at(runner, range(PROBE_TOKENS))
    there = _keys_at(runner, range(PROBE_SHIFT, PROBE_SHIFT + PROBE_TOKENS))
    shift = torch.full((PROBE_TOKENS,), PROBE_SHIFT, device=here.device)
    candidates = {
        "halves": Rope(inv_freq, interleaved=False),
        "pairs": Rope(inv_freq, interleaved=True),
        "nope": Rope(torch.zeros_like(inv_freq)),
    }
    errors = {
        name: _relative_error(rope.rotate(here.float(), shift), there.float()) for name, rope in candidates.items()
    }
    best = [min(errors, key=lambda name: errors[name][layer]) for layer in range(layers)]
    passed = [errors[name][layer] <= TOLERANCE[runner.shape.dtype] for layer, name in enumerate(best)]
    labels = tuple(
        ("nope" if name == "nope" else "rope") if ok else "unsupported" for name, ok in zip(best, passed, strict=True)
    )
    styles = {name for name in best if name != "nope"}
    if not all(passed) or len(styles) > 1:
        return labels, None
    turning = torch.tensor([[name != "nope"] for name in best], device=inv_freq.device)
    return labels, Rope(inv_freq * turning, interleaved=styles == {"pairs"})


def _probe_tokens(runner: ArenaRunner) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = runner.model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (PROBE_TOKENS,), generator=generator).tolist()


@torch.inference_mode()
def _keys_at(runner: ArenaRunner, positions: Sequence[int]) -> torch.Tensor:
    """Keys ``[L, H, T, D]`` of the probe tokens computed at ``positions`` with nothing before them."""
    cache = DynamicCache()
    device = runner.shape.device
    runner.model(
        input_ids=torch.tensor([_probe_tokens(runner)], device=device),
        position_ids=torch.tensor([list(positions)], device=device),
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([layer.keys for layer in cache.layers])


def _relative_error(found: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """Norm of the difference over the norm of ``wanted``, by layer (dim 0)."""
    difference = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    return [float(value) for value in difference]


def _sparse_error(runner: ArenaRunner) -> float:
    """Largest relative error of KV and logits when a prompt's beginning, or two pieces in its middle, are placed."""
    tokens = _probe_tokens(runner)
    full = runner.open(PROBE_TOKENS)
    wanted = runner.prefill(full, Composition(tuple(tokens)))
    worst = []
    for edges in (((0, 9),), ((3, 8), (12, 19))):
        pieces = tuple(Placement(a, full.arena.read(a, b)) for a, b in edges)
        sparse = runner.open(PROBE_TOKENS)
        found = runner.prefill(sparse, Composition(tuple(tokens), pieces))
        worst += _relative_error(found.float()[None], wanted.float()[None])
        for mine, theirs in ((sparse.arena.keys, full.arena.keys), (sparse.arena.values, full.arena.values)):
            worst += _relative_error(mine.float(), theirs.float())
    return max(worst)


def _batch_error(runner: ArenaRunner) -> float:
    """Largest relative error of logits when sequences of different lengths decode together instead of alone.

    An attention that does not know of batches fails by its shapes or by its numbers; either way there are none.
    """
    tokens, ends = _probe_tokens(runner), (PROBE_TOKENS - 1, PROBE_TOKENS // 2)
    caches, alone = [], []
    for end in ends:
        cache = runner.open(end + 1)
        runner.prefill(cache, Composition(tuple(tokens[:end])))
        alone.append(runner.forward(cache, tokens[end : end + 1], (end,)))
        caches.append(cache)
    try:
        together = runner.decode(caches, [tokens[end] for end in ends], ends)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return float("inf")
    return max(_relative_error(together.float(), torch.stack(alone).float()))
