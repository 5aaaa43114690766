"""What a mesh is compared with: transformers' own ``generate``, one call at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch

from agentmesh.backend import Completion, Listener
from agentmesh.communicator.base import rows
from agentmesh.config.mesh import GenerateSpec
from agentmesh.engine.loading import LoadedModel
from agentmesh.engine.loop import Engine
from agentmesh.engine.tokenizer import HubTokenizer
from agentmesh.prompt import Content, Prompt, Reader
from agentmesh.reasons import Reason


class _Clock:
    """A streamer that notes when each token is there; the prompt comes first and is not noted."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, _tokens: torch.Tensor) -> None:
        """One more token, or the prompt."""
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        """The text has ended."""


@final
@dataclass
class GenerateBackend:
    """Answers calls with ``model.generate``, decoded as they ask, nothing reused, one after the other.

    Args:
        engine: has the model, whose thread runs it here, too.

    Attributes:
        decode_s: seconds between first and last tokens.
        decoded: tokens that came in them.
    """

    engine: Engine
    preset: str = "dense"
    width: int = 1
    decode_s: float = 0.0
    decoded: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.loaded.name

    @property
    def tokenizer(self) -> HubTokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def describe(self) -> dict[str, str]:
        """The model's name."""
        return {"name": self.name}

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        """Generate, when it is this call's turn."""
        arrived = time.perf_counter()
        async with self._turn:
            begun = time.perf_counter()
            tokens, clock = await self.engine.do(partial(self._generate, prompt.tokens, generate, seed))
        first, last = clock.times[0], clock.times[-1]
        self.decode_s += last - first
        self.decoded += len(clock.times) - 1
        computed = rows(prompt, 0, "", Reason.PRESET_DENSE)
        listener.first((first - arrived) * 1e3, computed)
        finish = "length" if len(tokens) == generate.max_tokens else "stop"
        return Completion(
            tokens,
            self.tokenizer.decode(tokens),
            finish,
            (begun - arrived) * 1e3,
            (first - arrived) * 1e3,
            (last - first) * 1e3,
            computed,
            self.preset,
        )

    def _generate(self, prompt: Sequence[int], spec: GenerateSpec, seed: int) -> tuple[tuple[int, ...], _Clock]:
        clock, loaded = _Clock(), self.engine.loaded
        ids = torch.tensor([list(prompt)], device=loaded.model.device)
        with torch.random.fork_rng(), told(loaded.model, decoding(spec, loaded)):
            torch.manual_seed(seed)
            found = loaded.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=clock,
                tokenizer=loaded.tokenizer,
            )
        tokens = tuple(token for token in found[0, len(prompt) :].tolist() if token not in loaded.stop_token_ids)
        return tokens, clock

    async def ingest(self, contents: Sequence[Content], tenant: str = "") -> int:  # noqa: ARG002  # the interface of a backend
        """Nothing is kept."""
        return 0

    async def begin(self, reader: Reader) -> None:
        """Nothing is kept for a run."""

    async def release(self, run: str) -> None:
        """Nothing is kept for a run."""

    def close(self) -> None:
        """Whoever loaded the model frees it."""


@contextmanager
def told(model: Any, config: Any) -> Iterator[None]:
    """Inside, a model decodes as told, and nothing comes from its own settings, such as a repetition penalty."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def decoding(spec: GenerateSpec, loaded: LoadedModel) -> Any:
    """What ``generate`` is told (transformers' ``GenerationConfig``), so that it decodes as the engine does."""
    drawn = {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": spec.top_k or 0}
    return type(loaded.model.generation_config)(
        max_new_tokens=spec.max_tokens,
        do_sample=spec.temperature > 0,
        eos_token_id=sorted(loaded.stop_token_ids) or None,
        pad_token_id=0,
        suppress_tokens=sorted(loaded.special_token_ids - loaded.stop_token_ids) or None,
        stop_strings=list(spec.stop) or None,
        **(drawn if spec.temperature > 0 else {}),
    )
