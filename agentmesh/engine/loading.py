"""From a mesh file's model entry to a model in memory, with what the rest needs to know of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agentmesh.config.mesh import Decode, ModelSpec
from agentmesh.engine.attention import use_grouped_heads
from agentmesh.engine.catalog import FAMILIES, KNOWN, SEED, byte_tokenizer, quiet, random_config, random_model, sha256
from agentmesh.engine.embedded import Progress, digests, ensure
from agentmesh.engine.probe import refused_by_config
from agentmesh.engine.products import quicken
from agentmesh.engine.recognise import recognise
from agentmesh.engine.recorded import AnyStep, CUDAGraphs, recorded
from agentmesh.engine.step import Step
from agentmesh.engine.tuning import check_copies, tuned
from agentmesh.errors import ModelError, NotFoundError, UnsupportedModelError, did_you_mean, listing

RANDOM = "random:"
UNSET_LENGTH = 10**9  # tokenizers without a stated length say some 10^30
NOT_IDENTITY = frozenset({"_name_or_path", "dtype", "transformers_version"})
WEIGHTS = ("*.safetensors", "*.bin")

BYTE_LEVEL_BREAK = "\u010a"
"""How byte-level vocabularies write a line break."""

BYTE_FALLBACK_BREAK = "<0x0A>"
"""How vocabularies with a byte fallback write it."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device.

    Args:
        name: as the mesh file names it.
        model: the transformers model.
        tokenizer: its fast tokenizer.
        stop_token_ids: ids that end a message.
        special_token_ids: control ids, which generation never picks unless they stop it.
        line_breaks: ids whose text holds a line break.
        max_context: tokens of prompt and message together.
        fingerprint: sha256 over weights, configuration, tokenizer, chat template, dtype and versions; KV made under
            one fingerprint is never used under another.
        source: where the weights came from, for people.
        decode: which weights decode messages.
        config: the text model's transformers configuration.
        step: decodes in fewer operations than the model's own code; ``None`` where none computes the same.
        unrecorded: why a step on a CUDA device is not replayed from CUDA graphs; empty where it is, and elsewhere.
    """

    name: str
    model: Any
    tokenizer: Any
    stop_token_ids: frozenset[int]
    special_token_ids: frozenset[int]
    line_breaks: frozenset[int]
    max_context: int
    fingerprint: str
    source: str
    config: Any
    decode: Decode = Decode.SAME
    step: AnyStep | None = None
    unrecorded: str = ""

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how a conversation is written."""
        return bool(self.tokenizer.chat_template)


@dataclass(frozen=True)
class _Parts:
    model: Any
    tokenizer: Any
    digest: str
    source: str


def fetch(spec: ModelSpec, progress: Progress | None = None) -> None:
    """Get an embedded model's files, which takes time once; ``load`` does it, too, but may run where nobody listens.

    Raises:
        NotFoundError: no such model.
        ModelError: the weights cannot be fetched.
    """
    exists(spec)
    if spec.name in KNOWN:
        ensure(spec.name, progress)


def load(spec: ModelSpec, progress: Progress | None = None, *, trials: bool = True) -> LoadedModel:
    """Load what a mesh file names: a random family, an embedded model, a folder, a GGUF file or a Hub repository.

    Args:
        spec: the model.
        progress: told how far fetching and converting are.
        trials: whether short trials decide how decoding steps multiply; else it is the same at every start.

    Raises:
        NotFoundError: the name fits none of these.
        ModelError: the weights cannot be fetched or read.
        UnsupportedModelError: not a causal language model with a fast tokenizer.
    """
    exists(spec)
    device, dtype = _device(spec.device), getattr(torch, spec.dtype.value)
    path = Path(spec.name).expanduser()
    with quiet(reading_gguf=path.suffix == ".gguf"):
        if spec.name.startswith(RANDOM):
            parts = _random(spec.name.removeprefix(RANDOM), dtype, device)
        elif spec.name in KNOWN:
            place = ensure(spec.name, progress)
            parts = _pretrained(str(place), {}, dtype, device, _digest(place, digests(place)))
        elif path.is_file():
            parts = _pretrained(str(path.parent), {"gguf_file": path.name}, dtype, device, sha256(path))
        elif path.is_dir():
            parts = _pretrained(str(path), {}, dtype, device, _digest(path, {}))
        else:
            parts = _hub(spec, dtype, device)
    return _finished(spec, parts, trials=trials)


def exists(spec: ModelSpec) -> None:
    """Check a model's name without loading anything.

    Raises:
        NotFoundError: the name fits no kind of model; the message lists what does.
    """
    name, path = spec.name, Path(spec.name).expanduser()
    if name.startswith(RANDOM):
        random_config(name.removeprefix(RANDOM))
    elif name not in KNOWN and not _is_local(path) and not _is_repo(name):
        choices = [*KNOWN, *(RANDOM + family for family in FAMILIES)]
        found = "a folder without config.json" if path.is_dir() else "no such model"
        raise NotFoundError(
            f"model {name!r}: {found}; expected one of {listing(choices)}, a local folder with config.json, a .gguf "
            f"file, or a Hub repository such as org/name.{did_you_mean(name, choices)}"
        )


def _is_local(path: Path) -> bool:
    return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file())


def _is_repo(name: str) -> bool:
    parts = name.split("/")
    local = name.startswith((".", "~", "/")) or name.endswith(".gguf") or Path(name).exists()
    return len(parts) == 2 and all(parts) and not local


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = f"no device {name!r}; expected auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(wanted) from error
    if device.type not in {"cpu", "cuda"}:
        raise ModelError(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def _digest(folder: Path, known: Mapping[str, str]) -> str:
    """One digest over a folder's weights; those of files that are not known already are made."""
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    lines = [f"{file.name} {known.get(file.name) or sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _random(family: str, dtype: torch.dtype, device: torch.device) -> _Parts:
    config = random_config(family)
    digest = hashlib.sha256(f"{family}:{SEED}:{dtype}".encode()).hexdigest()
    try:
        model = random_model(config, dtype, device)
    except (RuntimeError, MemoryError) as error:
        raise ModelError(f"cannot make {RANDOM}{family} in {dtype} on {device}: {_first_line(error)}") from error
    return _Parts(model, byte_tokenizer(), digest, f"random weights, {family}")


def _hub(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> _Parts:
    where = {"revision": spec.revision} if spec.revision else {}
    try:
        parts = _pretrained(spec.name, where, dtype, device, "")
    except ModelError as error:
        raise ModelError(
            f"{error}. Tried the Hub repository {spec.name} ({spec.revision or 'newest revision'}), in the Hub's local "
            f"cache and online; no local folder has that name. Without a network there are {listing(KNOWN)} and "
            f"{RANDOM}{{{listing(FAMILIES)}}}"
        ) from error
    commit = parts.model.config._commit_hash or spec.revision or "newest"  # noqa: SLF001  # it has no public name
    return _Parts(parts.model, parts.tokenizer, f"{spec.name}@{commit}", f"{spec.name}@{commit}")


def _pretrained(place: str, options: dict[str, str], dtype: torch.dtype, device: torch.device, digest: str) -> _Parts:
    """Read a model and its tokenizer; attention is torch's fused one (sdpa) wherever the model has it."""
    name = "/".join([place, *([options["gguf_file"]] if "gguf_file" in options else [])])
    try:
        config = AutoConfig.from_pretrained(place, **options)
        _check_causal(config, name)
        model, report = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        model.to(device)
    except (OSError, RuntimeError, ImportError, MemoryError, SafetensorError) as error:
        raise ModelError(f"cannot load {name!r}: {_first_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"cannot load {name!r} as a causal language model: {_first_line(error)}") from error
    if report["missing_keys"]:
        raise ModelError(f"{name!r} lacks the weights {listing(report['missing_keys'])}; it is not a whole model")
    return _Parts(model, tokenizer, digest, name)


def _check_causal(config: Any, name: str) -> None:
    named = config.architectures or ()
    if config.is_encoder_decoder or (named and not set(named) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        raise UnsupportedModelError(
            f"{name!r} is a {', '.join(named) or config.model_type}, which does not write text token by token from "
            "left to right; agentmesh needs a causal language model"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _line_breaks(tokenizer: Any) -> frozenset[int]:
    """Ids whose text holds a line break: few of the vocabulary's entries can, and only those are decoded."""
    marks = ("\n", BYTE_LEVEL_BREAK, BYTE_FALLBACK_BREAK)
    likely = [number for entry, number in tokenizer.get_vocab().items() if any(mark in entry for mark in marks)]
    return frozenset(number for number in likely if "\n" in tokenizer.decode([number]))


def _finished(spec: ModelSpec, parts: _Parts, *, trials: bool) -> LoadedModel:
    model, tokenizer = parts.model.eval().requires_grad_(requires_grad=False), parts.tokenizer
    if not tokenizer.is_fast:
        raise UnsupportedModelError(f"{spec.name} has no fast tokenizer, which agentmesh needs for exact slot borders")
    use_grouped_heads(model)
    check_copies(model, spec.name, spec.decode)
    tuning, read = tuned(model, spec.decode, trials=trials), recognise(model)
    step, unrecorded = (None, "") if read is None else _stepping(model, read.tuned(tuning), graphs=spec.graphs)
    quicken(model, tuning if step is None else replace(tuning, decode=Decode.SAME))
    config = model.config.get_text_config()
    control = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return LoadedModel(
        name=spec.name,
        model=model,
        tokenizer=tokenizer,
        stop_token_ids=_stops(spec.name, model, tokenizer),
        special_token_ids=frozenset(control.union(tokenizer.all_special_ids)),
        line_breaks=_line_breaks(tokenizer),
        max_context=_context(spec.name, config, tokenizer),
        fingerprint=_fingerprint(spec, config, parts),
        source=parts.source,
        config=config,
        decode=tuning.decode,
        step=step,
        unrecorded=unrecorded,
    )


def _stepping(model: Any, step: Step, *, graphs: bool) -> tuple[AnyStep, str]:
    """How a model decodes, and why not from CUDA graphs on a CUDA device."""
    if step.shape.device.type != "cuda":
        return step, ""
    reason = refused_by_config(model.config.get_text_config()) if graphs else "`model.graphs` is false"
    return (step, reason) if reason else recorded(model, step, CUDAGraphs(step.shape.device))


def _stops(name: str, model: Any, tokenizer: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    stops |= {tokenizer.eos_token_id} - {None}
    if not stops:
        raise UnsupportedModelError(
            f"{name} names no token that ends a message; set eos_token in its tokenizer_config.json or eos_token_id in "
            "its generation_config.json"
        )
    return frozenset(stops)


def _context(name: str, config: Any, tokenizer: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if positions >= UNSET_LENGTH:
        raise UnsupportedModelError(
            f"{name} does not say how long a text it can read; set max_position_embeddings in its config.json"
        )
    return int(positions)


def _fingerprint(spec: ModelSpec, config: Any, parts: _Parts) -> str:
    facts = {
        "weights": parts.digest,
        "config": {key: value for key, value in json.loads(config.to_json_string()).items() if key not in NOT_IDENTITY},
        "tokenizer": parts.tokenizer.backend_tokenizer.to_str(),
        "chat": parts.tokenizer.chat_template,
        "dtype": spec.dtype.value,
        "decode": spec.decode.value if spec.decode.approximates else Decode.SAME.value,
        "attention": config._attn_implementation,  # noqa: SLF001  # it has no public name
        "versions": [library.__version__.split(".")[:2] for library in (torch, transformers)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
