"""Attention for prefills over a mask: transformers' sdpa without copying keys and values for every query head."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "agentmesh_sdpa"


def use_grouped_heads(model: Any) -> None:
    """Let a model on the CPU that runs transformers' sdpa attention use this module's; others stay as they are."""
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and model.device.type == "cpu":  # noqa: SLF001  # it has no public name
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


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
    but not on the CPU. Everything else goes to its own function.
    """
    plain = options.get("position_bias") is None and options.get("cache") is None and not options.get("dropout")
    if attention_mask is None or query.shape[2] == 1 or not plain:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=options.get("scaling"), enable_gqa=True
    )
    return mixed.transpose(1, 2).contiguous(), None
