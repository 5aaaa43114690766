"""Tiny random transformers models over the attention and rope kinds that agentmesh meets."""

from __future__ import annotations

from typing import Any

import torch

from agentmesh.engine.attention import use_grouped_heads

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model with seeded random weights for ``config``, in eval mode."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    use_grouped_heads(model)
    return model.eval()


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A two-layer Llama (or other sizes by ``changes``)."""
    from transformers import LlamaConfig

    return build(LlamaConfig(**{**COMMON, "num_hidden_layers": 2, **changes}), dtype)


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """``rope_parameters`` of a kind."""
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


def zoo() -> dict[str, tuple[Any, str, tuple[str, ...]]]:
    """Name → (model, expected level, expected layer labels)."""
    import transformers as t

    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=128)
    llama3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longrope = rope("longrope", factor=4.0, original_max_position_embeddings=128, **factors)
    roped = ("rope", "rope", "rope")
    return {
        "llama-default": (build(t.LlamaConfig(**COMMON)), "realign", roped),
        "llama-llama3": (build(t.LlamaConfig(**COMMON, rope_parameters=llama3)), "realign", roped),
        "llama-yarn": (build(t.LlamaConfig(**COMMON, rope_parameters=yarn)), "realign", roped),
        "llama-linear": (build(t.LlamaConfig(**COMMON, rope_parameters=rope("linear", factor=2.0))), "realign", roped),
        "llama-dynamic": (
            build(t.LlamaConfig(**COMMON, rope_parameters=rope("dynamic", factor=2.0))),
            "dense",
            ("unsupported",) * 3,
        ),
        "llama-longrope": (build(t.LlamaConfig(**COMMON, rope_parameters=longrope)), "dense", ("unsupported",) * 3),
        "qwen2": (build(t.Qwen2Config(**COMMON)), "realign", roped),
        "qwen3-qk-norm": (build(t.Qwen3Config(**COMMON, head_dim=16)), "realign", roped),
        "mistral-sliding": (build(t.MistralConfig(**COMMON, sliding_window=8)), "realign", roped),
        "gemma2-softcap": (
            build(t.Gemma2Config(**COMMON, head_dim=16, sliding_window=8), torch.float32),
            "realign",
            roped,
        ),
        "gemma3-sliding-mix": (
            build(
                t.Gemma3TextConfig(
                    **COMMON,
                    head_dim=16,
                    sliding_window=8,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                )
            ),
            "realign",
            roped,
        ),
        "smollm3-nope": (
            build(t.SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1])),
            "realign",
            ("rope", "nope", "rope"),
        ),
        "glm4-partial-pairs": (
            build(t.Glm4Config(**COMMON, head_dim=16, partial_rotary_factor=0.5)),
            "realign",
            roped,
        ),
        "cohere2-pairs-nope": (
            build(
                t.Cohere2Config(
                    **COMMON,
                    sliding_window=8,
                    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                )
            ),
            "realign",
            ("rope", "rope", "nope"),
        ),
        "qwen3next-hybrid": (
            build(
                t.Qwen3NextConfig(
                    **COMMON,
                    head_dim=16,
                    layer_types=["linear_attention", "linear_attention", "full_attention"],
                    linear_num_value_heads=4,
                    linear_num_key_heads=2,
                    linear_key_head_dim=16,
                    linear_value_head_dim=16,
                    num_experts=4,
                    num_experts_per_tok=2,
                    moe_intermediate_size=32,
                    shared_expert_intermediate_size=32,
                    decoder_sparse_step=1,
                )
            ),
            "dense",
            ("unsupported",) * 3,
        ),
    }
