"""Attention for prefills over a mask: transformers' sdpa without copying keys and values for every query head."""

from __future__ import annotations

from typing import Any, Protocol, final

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agentmesh.engine.batch import BatchCache
from agentmesh.kv.arena import KVShape

NAME = "agentmesh_sdpa"
QUERIES_AT_ONCE = 128

FLASH_CAPABILITY = (8, 0)
FLASH_DIMS = 256
"""What torch's flash attention takes: devices from here on, and heads of so many dims."""

NEAR = 8
"""Tokens behind a token whose attention does not count as that of later text: most of it is grammar."""


class Watch(Protocol):
    """Sees the attention of every layer of one forward; passed to a model as the option ``agentmesh_watch``."""

    def see(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        """Add one layer's attention; shapes as in ``attention``."""


@final
class AttentionWatch:
    """Sums what one forward's queries take from each position, over layers and heads: attention times its value's norm.

    A position that is attended to but whose value is small, as the first ones are, adds little.

    Args:
        skip: how many of the first queries do not count.
    """

    def __init__(self, skip: int = 0) -> None:
        self.total = torch.zeros(0)
        self._skip = skip

    def see(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        """As in ``Watch``."""
        scores = _scores(query[:, :, self._skip :], key, scale)
        if mask is not None:
            scores += mask[:, :, self._skip :].float()
        taken = _taken(scores.softmax(dim=-1), value)
        self.total = taken if not len(self.total) else self.total + taken


@final
class TextWatch:
    """Sums what later tokens of a text take from each of its tokens, in forwards over a header and the text.

    As with ``AttentionWatch``, attention times the value's norm, over layers and heads; what the next ``NEAR`` tokens
    take does not count.

    Args:
        header: tokens ahead of the text.
        tokens: of the text.
    """

    def __init__(self, header: int, tokens: int) -> None:
        self.total = torch.zeros(tokens)
        self._header = header

    def see(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,  # noqa: ARG002  # a whole prompt is causal
        scale: float | None,
    ) -> None:
        """As in ``Watch``."""
        begin, end = self._header, key.shape[2]
        first = end - query.shape[2]
        position = torch.arange(end, device=query.device)
        for low in range(max(begin + NEAR + 1, first), end, QUERIES_AT_ONCE):
            high = min(low + QUERIES_AT_ONCE, end)
            behind = position[low:high, None] - position[:high]
            scores = _scores(query[:, :, low - first : high - first], key[:, :, :high], scale)
            paid = scores.masked_fill_(behind < 0, -torch.inf).softmax(dim=-1).masked_fill_(behind <= NEAR, 0.0)
            self.total[: high - begin] += _taken(paid, value[:, :, :high])[begin:].to(self.total)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Scores ``[B, Hq, T, T']`` in float32; no key is repeated."""
    batch, heads, asking, dims = query.shape
    scale = dims**-0.5 if scale is None else scale
    rows = (query.float() * scale).reshape(batch, key.shape[1], -1, dims)
    return (rows @ key.float().mT).view(batch, heads, asking, -1)


def _taken(paid: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention ``[B, Hq, T, T']`` times the norm of what is attended to, summed to ``[T']``."""
    grouped = paid.view(paid.shape[0], value.shape[1], -1, paid.shape[-1]).sum(dim=2)
    taken: torch.Tensor = (grouped * value.float().norm(dim=-1)).sum(dim=(0, 1))
    return taken


def use_grouped_heads(model: Any) -> None:
    """Let a model that runs transformers' sdpa attention use this module's; others stay as they are."""
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa":  # noqa: SLF001  # it has no public name
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def is_grouped(model: Any) -> bool:
    """Whether a model runs this module's attention, which can be watched."""
    return str(model.config.get_text_config()._attn_implementation) == NAME  # noqa: SLF001  # as above


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query [B, Hq, T, D]`` over ``key, value [B, H, T', D]``; returns ``[B, T, Hq, D]``.

    transformers repeats keys and values for grouped heads whenever there is a mask, which is needed on some devices
    but not on the CPU. Everything else goes to its own function. Queries go in chunks, each over the keys up to its
    last position (option ``agentmesh_last``), which saves half of a long prefill behind a prefix. A decoding step of
    several sequences (option ``agentmesh_batch``) attends over their own arenas; there the mask is only a stand-in, as
    wide as the layer's window. It is one, too, for the rest of a prompt behind what is cached (``agentmesh_rest``).
    """
    batch: BatchCache | None = options.pop("agentmesh_batch", None)
    if batch is not None:
        assert attention_mask is not None, "a batch says how far its layers see"
        return batch.attend(query, attention_mask.shape[3], options.get("scaling")), None
    if options.pop("agentmesh_rest", False):
        return rest(query, key, value, options.get("scaling")), None
    watch: Watch | None = options.pop("agentmesh_watch", None)
    if watch is not None:
        watch.see(query, key, value, attention_mask, options.get("scaling"))
    on_cpu = query.device.type == "cpu"
    plain = options.get("position_bias") is None and options.get("cache") is None and not options.get("dropout")
    if attention_mask is None or query.shape[2] == 1 or not plain or not on_cpu:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    last = options.get("agentmesh_last")
    pieces = []
    for low in range(0, query.shape[2], QUERIES_AT_ONCE):
        high = min(low + QUERIES_AT_ONCE, query.shape[2])
        seen = key.shape[2] if last is None else last[high - 1] + 1
        mixed = functional.scaled_dot_product_attention(
            query[:, :, low:high],
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=attention_mask[:, :, low:high, :seen],
            scale=options.get("scaling"),
            enable_gqa=True,
        )
        pieces.append(mixed.transpose(1, 2))
    return torch.cat(pieces, dim=1), None


def has_flash(shape: KVShape) -> bool:
    """Whether flash attention runs for a model's heads: grouped as they are, and without a mask."""
    half = shape.device.type == "cuda" and shape.dtype.itemsize == 2 and shape.head_dim <= FLASH_DIMS
    return half and torch.cuda.get_device_capability(shape.device) >= FLASH_CAPABILITY


def rest(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Attention ``[B, T, Hq, D]`` of the last ``T`` positions, each over the keys up to its own."""
    grouped = query.shape[1] != key.shape[1]
    ends = causal_lower_right(query.shape[2], key.shape[2])
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=ends, scale=scale, enable_gqa=grouped)
    return mixed.transpose(1, 2)
