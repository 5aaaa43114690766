"""Random models by family: real or tiny shapes with seeded random weights, for timing and for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from agentmesh.errors import NotFoundError, did_you_mean, listing

SEED = 0
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        **TINY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
    }


FAMILIES: dict[str, Callable[[], Any]] = {
    "tiny-llama": lambda: LlamaConfig(**TINY),
    "tiny-qwen2": lambda: Qwen2Config(**TINY),
    "tiny-qwen3": lambda: Qwen3Config(**TINY, head_dim=16),
    "tiny-mistral": lambda: MistralConfig(**TINY, sliding_window=64),
    "tiny-gemma3": lambda: Gemma3TextConfig(**TINY, head_dim=16, sliding_window=64, layer_types=MIXED),
    "tiny-smollm3": lambda: SmolLM3Config(**TINY, no_rope_layers=[1, 1, 0]),
    "smollm2-135m": lambda: LlamaConfig(**{**_sizes(576, 1536, 30, 9, 3), "vocab_size": 49152}),
    "qwen2.5-7b": lambda: Qwen2Config(**{**_sizes(3584, 18944, 28, 28, 4), "vocab_size": 152064}),
    "llama-3.1-8b": lambda: LlamaConfig(
        **{**_sizes(4096, 14336, 32, 32, 8), "vocab_size": 128256}, rope_parameters=LLAMA3
    ),
}


def random_config(family: str) -> Any:
    """The transformers configuration of a random family.

    Raises:
        NotFoundError: no such family; lists them.
    """
    if family not in FAMILIES:
        raise NotFoundError(
            f"no random family named {family!r}; there are {listing(FAMILIES)}.{did_you_mean(family, FAMILIES)}"
        )
    return FAMILIES[family]()


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with seeded random weights, made on its device in its dtype; the global random state is untouched."""
    with torch.random.fork_rng(), device:
        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and three control tokens, with a ChatML chat template."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=CONTROL[0], bos_token=CONTROL[1], eos_token=CONTROL[2], chat_template=CHATML
    )
