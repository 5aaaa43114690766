"""From a mesh file's model entry to a model in memory, with what the rest needs to know of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hub_logging

from agentmesh.config.mesh import ModelSpec
from agentmesh.engine.attention import use_grouped_heads
from agentmesh.engine.catalog import FAMILIES, byte_tokenizer, random_config, random_model
from agentmesh.engine.embedded import EMBEDDED, MANIFEST, Progress, ensure, sha256
from agentmesh.errors import ModelError, NotFoundError, UnsupportedModelError, did_you_mean, listing

RANDOM = "random:"
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device.

    Args:
        name: as the mesh file names it.
        model: the transformers model.
        tokenizer: its fast tokenizer.
        stop_token_ids: ids that end a message.
        special_token_ids: control ids, which generation never picks unless they stop it.
        max_context: tokens of prompt and message together.
        fingerprint: sha256 over weights, configuration, tokenizer, chat template, dtype and versions; KV made under
            one fingerprint is never used under another.
        source: where the weights came from, for people.
    """

    name: str
    model: Any
    tokenizer: Any
    stop_token_ids: frozenset[int]
    special_token_ids: frozenset[int]
    max_context: int
    fingerprint: str
    source: str


@dataclass(frozen=True)
class _Parts:
    model: Any
    tokenizer: Any
    digest: str
    source: str


def load(spec: ModelSpec, progress: Progress | None = None) -> LoadedModel:
    """Load what a mesh file names: a random family, an embedded model, a folder, a GGUF file or a Hub repository.

    Raises:
        NotFoundError: the name fits none of these.
        ModelError: the weights cannot be fetched or read.
        UnsupportedModelError: not a causal language model with a fast tokenizer.
    """
    device = _device(spec.device)
    dtype = getattr(torch, spec.dtype.value)
    with _quiet():
        if spec.name.startswith(RANDOM):
            parts = _random(spec.name.removeprefix(RANDOM), dtype, device)
        elif spec.name in EMBEDDED:
            folder = ensure(spec.name, progress)
            digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
            parts = _pretrained(str(folder), {}, dtype, device, digest)
        else:
            parts = _elsewhere(spec, dtype, device)
    return _finished(spec, parts)


def exists(spec: ModelSpec) -> None:
    """Check a model's name without loading anything.

    Raises:
        NotFoundError: the name fits no kind of model; the message lists what does.
    """
    name, path = spec.name, Path(spec.name).expanduser()
    if name.startswith(RANDOM):
        random_config(name.removeprefix(RANDOM))
    elif name not in EMBEDDED and not (path / "config.json").is_file() and not path.is_file() and not _is_repo(name):
        choices = [*EMBEDDED, *(RANDOM + family for family in FAMILIES)]
        raise NotFoundError(
            f"no model named {name!r}; expected one of {listing(choices)}, a local folder with config.json, a .gguf "
            f"file, or a Hub repository such as org/name.{did_you_mean(name, choices)}"
        )


def _is_repo(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~", "/")) and not name.endswith(".gguf")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"no device {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} was asked for, but torch sees no CUDA device here; use auto or cpu")
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and notices off the screen, and leave its settings as they were."""
    level, bars = hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_error()
    hub_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bars:
            hub_logging.enable_progress_bar()


def _random(family: str, dtype: torch.dtype, device: torch.device) -> _Parts:
    config = random_config(family)
    digest = hashlib.sha256(f"{family}:{config.to_json_string()}".encode()).hexdigest()
    return _Parts(random_model(config, dtype, device), byte_tokenizer(), digest, f"random weights, {family}")


def _elsewhere(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> _Parts:
    exists(spec)
    path = Path(spec.name).expanduser()
    if path.is_file():
        return _pretrained(str(path.parent), {"gguf_file": path.name}, dtype, device, sha256(path))
    if path.is_dir():
        weights = [*sorted(path.glob("*.safetensors")), *sorted(path.glob("*.bin"))]
        digest = hashlib.sha256("".join(sha256(file) for file in weights).encode()).hexdigest()
        return _pretrained(str(path), {}, dtype, device, digest)
    where = {"revision": spec.revision} if spec.revision else {}
    parts = _pretrained(spec.name, where, dtype, device, "")
    commit = getattr(parts.model.config, "_commit_hash", None) or spec.revision or "unknown"
    return _Parts(parts.model, parts.tokenizer, f"{spec.name}@{commit}", f"{spec.name}@{commit}")


def _pretrained(place: str, options: dict[str, str], dtype: torch.dtype, device: torch.device, digest: str) -> _Parts:
    try:
        config = AutoConfig.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=dtype, **options).to(device)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"cannot load {place!r}: {_first_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"cannot load {place!r} as a causal language model: {_first_line(error)}"
        ) from error
    return _Parts(model, tokenizer, digest, place)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _finished(spec: ModelSpec, parts: _Parts) -> LoadedModel:
    model, tokenizer = parts.model.eval().requires_grad_(requires_grad=False), parts.tokenizer
    use_grouped_heads(model)
    if not tokenizer.is_fast:
        raise UnsupportedModelError(f"{spec.name} has no fast tokenizer, which agentmesh needs for exact slot borders")
    config = model.config.get_text_config()
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    stops |= {tokenizer.eos_token_id} - {None}
    facts = {
        "weights": parts.digest,
        "config": config.to_json_string(),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "chat": tokenizer.chat_template,
        "dtype": spec.dtype.value,
        "attention": config._attn_implementation,  # noqa: SLF001  # it has no public name
        "versions": [torch.__version__.split("+")[0], transformers.__version__],
    }
    return LoadedModel(
        name=spec.name,
        model=model,
        tokenizer=tokenizer,
        stop_token_ids=frozenset(stops),
        special_token_ids=frozenset(tokenizer.all_special_ids),
        max_context=getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT,
        fingerprint=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        source=parts.source,
    )
