"""A remote model as a backend: a prompt's messages go out, text and the endpoint's counts come back."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import httpx2

from agentmesh.backend import Completion, Listener
from agentmesh.config.mesh import GenerateSpec, RemoteModelSpec
from agentmesh.errors import InputError, RemoteError
from agentmesh.metering import EndpointUsage
from agentmesh.prompt import Content, Prompt, Reader
from agentmesh.remote.endpoint import Chunk, Endpoint, TransientError
from agentmesh.remote.text import TextTokenizer, rows_of

SEEDS = 2**31
"""Some endpoints keep a seed in 32 bits."""

CHARACTERS_A_TOKEN = 64
"""A message of more characters than so many a token asked for will not end by itself."""

PRESET = "text"
SALT = "cache_salt"
"""vLLM's word for what parts its prefix cache."""


@dataclass(frozen=True)
class Backoff:
    """Seconds to wait before a call is sent again: twice as long each time, up to a half less at random."""

    first: float = 0.5
    most: float = 60.0

    def wait(self, attempt: int, asked: float | None) -> float:
        """Seconds before attempt number ``attempt + 1``, counted from 1; at least what the endpoint asked for."""
        longest = min(self.most, self.first * 2 ** (attempt - 1))
        return max(random.uniform(longest / 2, longest), asked or 0.0)  # noqa: S311  # spreads calls, no secret


@final
class RemoteBackend:
    """Answers model calls through an endpoint. Owns a client for each run that is going on.

    Args:
        endpoint: where the model is.
        backoff: how failed calls are spread.
    """

    def __init__(self, endpoint: Endpoint, backoff: Backoff = Backoff()) -> None:  # a frozen value
        self._endpoint = endpoint
        self._backoff = backoff
        self._clients: dict[str, httpx2.AsyncClient] = {}
        self.tokenizer = TextTokenizer()

    @classmethod
    def open(cls, spec: RemoteModelSpec) -> RemoteBackend:
        """Read the key from the environment; nothing is asked yet.

        Raises:
            InputError: the variable is not set, or holds what is no key.
        """
        if spec.api_key_env is None:
            return cls(Endpoint(spec))
        key = os.environ.get(spec.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            found = "holds characters that no key has" if key else "is not set"
            raise InputError(
                f"model {spec.name} at {spec.remote} takes its key from the environment variable {spec.api_key_env}, "
                f"which {found}; set it, for instance: export {spec.api_key_env}=…"
            )
        return cls(Endpoint(spec, key))

    @property
    def name(self) -> str:
        """The model's name at the endpoint."""
        return self._endpoint.spec.name

    @property
    def preset(self) -> str:
        """``text``: no preset is in force where KV cannot go."""
        return PRESET

    @property
    def width(self) -> int:
        """As the model's entry says."""
        return self._endpoint.spec.concurrency

    def describe(self) -> dict[str, str]:
        """Name and address."""
        return {"name": self.name, "source": self._endpoint.spec.remote, "reuse": PRESET}

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        """Send a prompt as messages, again where the endpoint fails before its first token and the failure may pass.

        Raises:
            RemoteError: it cannot be reached, refuses the request, or broke off.
            RequestTooLongError: the prompt is longer than the model's context.
        """
        client, heard = self._clients[prompt.reader.run], _Heard(prompt, generate, listener)
        body, attempt = self._body(prompt, generate, seed), 1
        while True:
            heard.sent = time.perf_counter()
            try:
                await self._endpoint.chat(client, body, heard.take)
                return heard.completion(self._endpoint.spec.remote, attempt)
            except TransientError as error:
                wait = self._backoff.wait(attempt, error.after)
                self._check(error, attempt, wait, begun=bool(heard.pieces))
            await asyncio.sleep(wait)
            attempt += 1

    def _check(self, error: TransientError, attempt: int, wait: float, *, begun: bool) -> None:
        """Give up where trying again would do no good, or is not allowed.

        Raises:
            RemoteError: the failure, and why it stands.
        """
        why = ""
        if begun:
            why = "; a part of the message was passed on already, so it is not asked for again here (see `retry`)"
        elif wait > self._backoff.most:
            why = f"; it asks to wait {wait:.0f} s, more than {self._backoff.most:g} s"
        elif attempt > self._endpoint.spec.retry:
            why = f"; gave up after {attempt} attempt(s)"
        if why:
            raise RemoteError(f"{error}{why}") from error

    def _body(self, prompt: Prompt, generate: GenerateSpec, seed: int) -> dict[str, Any]:
        """A request for a streamed answer; a salt of the endpoint's cache becomes the tenant's own."""
        settings: dict[str, Any] = {
            "max_tokens": generate.max_tokens,
            "temperature": generate.temperature,
            "top_p": generate.top_p,
            "seed": seed % SEEDS,
        }
        if generate.top_k is not None:
            settings["top_k"] = generate.top_k
        if generate.stop:
            settings["stop"] = list(generate.stop)
        own = dict(self._endpoint.spec.body)
        if SALT in own and prompt.reader.tenant:
            own[SALT] = f"{own[SALT]} {prompt.reader.tenant}"
        return {
            **settings,
            **own,
            "model": self.name,
            "messages": [{"role": role, "content": text} for role, text in prompt.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def ingest(self, contents: Sequence[Content], tenant: str = "") -> int:  # noqa: ARG002  # see Backend
        """Nothing can be kept there."""
        return 0

    async def begin(self, reader: Reader) -> None:
        """Make a run's client."""
        self._clients[reader.run] = self._endpoint.client()

    async def release(self, run: str) -> None:
        """Close a run's connections."""
        client = self._clients.pop(run, None)
        if client is not None:
            await client.aclose()

    def close(self) -> None:
        """Nothing is left: connections end with their runs."""


@dataclass
class _Heard:
    """What has come of a call. ``begun`` and ``sent`` are when it was made, and when it was sent the last time."""

    prompt: Prompt
    generate: GenerateSpec
    listener: Listener
    begun: float = field(default_factory=time.perf_counter)
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    pieces: list[str] = field(default_factory=list)
    length: int = 0
    finish: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached: int | None = None

    def take(self, chunk: Chunk) -> None:
        """Follow one event of the answer.

        Raises:
            RemoteError: the message goes on and on.
        """
        if chunk.text:
            self._text(chunk.text)
        self.finish = chunk.finish or self.finish
        self.cached = chunk.cached if chunk.cached is not None else self.cached
        if chunk.usage is not None:
            self.prompt_tokens, self.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens

    def _text(self, piece: str) -> None:
        self.last = time.perf_counter()
        if not self.pieces:
            self.first = self.last
            self.listener.first((self.first - self.begun) * 1e3, rows_of(self.prompt, len(self.prompt.tokens)))
        self.length += len(piece)
        if self.length > CHARACTERS_A_TOKEN * (self.generate.max_tokens + 1):
            raise RemoteError(
                f"the endpoint has sent {self.length} characters, but max_tokens is {self.generate.max_tokens}; it "
                "seems not to know that setting"
            )
        self.pieces.append(piece)
        self.listener.text(piece)

    def completion(self, url: str, attempts: int) -> Completion:
        """The finished call; where the endpoint has counted nothing, lengths are estimated."""
        text, now = "".join(self.pieces), time.perf_counter()
        first = self.first or now
        usage = EndpointUsage(
            url=url,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached,
            attempts=attempts,
        )
        counted = len(self.prompt.tokens) if self.prompt_tokens is None else self.prompt_tokens
        return Completion(
            tuple(TextTokenizer().encode(text, control=False)),
            text,
            self.finish,
            queue_ms=(self.sent - self.begun) * 1e3,
            ttft_ms=(first - self.begun) * 1e3,
            decode_ms=max(0.0, self.last - first) * 1e3,
            rows=rows_of(self.prompt, counted),
            preset=PRESET,
            endpoint=usage,
        )
