"""The HTTP of an endpoint: one attempt at a call, and what went wrong in the words of people."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, final

import httpx2
from pydantic import BaseModel, ValidationError

from agentmesh.config.mesh import RemoteModelSpec
from agentmesh.errors import AgentmeshError, RemoteError, RequestTooLongError, did_you_mean, listing

CONNECT_S = 10.0
ERROR_BYTES = 64 * 1024
SHOWN = 400
FOR_NOW = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses that say that the same request may be answered later."""

NO_KEY = frozenset({401, 403})
TOO_LONG = re.compile(r"context.{0,24}(length|size|window)|too many tokens|prompt is too long", re.IGNORECASE)
"""How vLLM, llama.cpp, OpenAI and others word that a prompt does not fit, in the message or in its code."""

DONE = "[DONE]"


class TransientError(RemoteError):
    """A call failed in a way that may pass.

    Attributes:
        after: seconds that the endpoint asks to wait; ``None`` where it does not say.
    """

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class _Delta(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Details(BaseModel):
    cached_tokens: int | None = None


class Counts(BaseModel):
    """``usage`` of a call, as endpoints send it."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Timings(BaseModel):
    """What llama.cpp sends beside it."""

    cache_n: int | None = None


class Chunk(BaseModel):
    """One event of a stream; what else an endpoint sends is passed over."""

    choices: tuple[_Choice, ...] = ()
    usage: Counts | None = None
    timings: _Timings | None = None
    error: Any = None

    @property
    def text(self) -> str:
        """The piece of text that it brings."""
        return "".join(choice.delta.content or "" for choice in self.choices)

    @property
    def finish(self) -> str:
        """Why the message ends; empty where it goes on."""
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason), "")

    @property
    def cached(self) -> int | None:
        """Prompt tokens that came from the endpoint's cache, where it says."""
        if self.usage is not None and self.usage.prompt_tokens_details is not None:
            return self.usage.prompt_tokens_details.cached_tokens
        return None if self.timings is None else self.timings.cache_n


@final
@dataclass(frozen=True)
class Endpoint:
    """Where a remote model is, and how to ask it.

    Args:
        spec: its address and settings.
        key: sent as a bearer token; empty for none. It stands in no error and no record.
    """

    spec: RemoteModelSpec
    key: str = ""

    def client(self) -> httpx2.AsyncClient:
        """A client for the calls of one run: it belongs to the event loop in which it is used."""
        timeout = httpx2.Timeout(self.spec.timeout, connect=min(CONNECT_S, self.spec.timeout), pool=None)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.AsyncClient(timeout=timeout, headers=headers)

    async def chat(self, client: httpx2.AsyncClient, body: Mapping[str, Any], hear: Callable[[Chunk], None]) -> None:
        """One attempt at a call. Cancelling it closes the connection, which stops the endpoint.

        Args:
            client: whose connections are used.
            body: the request.
            hear: told every event of the answer, as it comes.

        Raises:
            TransientError: it may be answered later: unreachable, busy, broken off, silent for too long.
            RemoteError: it will not be answered: key, name or settings are refused.
            RequestTooLongError: the prompt is longer than the model's context.
        """
        url = f"{self.spec.remote.rstrip('/')}/chat/completions"
        try:
            async with client.stream("POST", url, json=dict(body)) as response:
                if not response.is_success:
                    raise await self._refusal(client, response)
                await self._listen(response, hear)
        except httpx2.TimeoutException as error:
            limit = f"no answer within {self.spec.timeout:g} s ({type(error).__name__})"
            raise TransientError(f"{self.spec.remote}: {limit}; raise the model's `timeout`") from error
        except httpx2.ConnectError as error:
            raise TransientError(
                f"{self.spec.remote} cannot be reached ({error}); is the server running, and is the address right?"
            ) from error
        except httpx2.InvalidURL as error:
            raise RemoteError(f"{self.spec.remote} is no address that can be asked: {error}") from error
        except httpx2.DecodingError as error:
            raise RemoteError(f"{self.spec.remote}: what it answers cannot be decoded ({error})") from error
        except (httpx2.TransportError, httpx2.StreamError) as error:
            words = f"{type(error).__name__}: {error}"
            raise TransientError(f"{self.spec.remote}: the connection broke off ({words})") from error

    async def _listen(self, response: httpx2.Response, hear: Callable[[Chunk], None]) -> None:
        """Read a stream to its end."""
        finished = False
        try:
            async for event in httpx2.EventSource(response):
                if event.data.strip() == DONE:
                    break
                chunk = Chunk.model_validate_json(event.data)
                if chunk.error is not None:
                    raise self._failure(500, self._words(chunk.error), None)
                hear(chunk)
                finished = finished or bool(chunk.finish)
        except (httpx2.SSEError, httpx2.DecodingError, ValidationError) as error:
            raise RemoteError(
                f"{self.spec.remote} answers in another way than OpenAI-compatible endpoints stream chat completions: "
                f"{str(error)[:SHOWN]}"
            ) from error
        if not finished:
            raise TransientError(f"{self.spec.remote}: the answer broke off before its end")

    async def _refusal(self, client: httpx2.AsyncClient, response: httpx2.Response) -> AgentmeshError:
        """What an error status means."""
        data = b""
        async for piece in response.aiter_bytes():
            data += piece[: ERROR_BYTES - len(data)]
            if len(data) >= ERROR_BYTES:
                break
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = data.decode("utf-8", "replace")
        error = found.get("error", found.get("detail", found)) if isinstance(found, dict) else found
        status = response.status_code
        words = self._words(error) or response.reason_phrase
        if status == httpx2.codes.NOT_FOUND:
            there = await self._served(client)
            return RemoteError(f"{self.spec.remote} does not know {self.spec.name!r} ({words}); {there}")
        if response.is_redirect:
            words = f"it redirects to {response.headers.get('location')}; write that address under `remote:`"
        return self._failure(status, words, waited(response.headers.get("retry-after")))

    def _failure(self, status: int, words: str, after: float | None) -> AgentmeshError:
        where = f"{self.spec.name} at {self.spec.remote}"
        if TOO_LONG.search(words):
            return RequestTooLongError(f"{where}: the prompt does not fit the model's context: {words}")
        if status in NO_KEY:
            name = self.spec.api_key_env
            advice = f"look at the key in {name}" if name else "name the variable with the key under `api_key_env:`"
            return RemoteError(f"{where} refuses the key (status {status}: {words}); {advice}")
        if status in FOR_NOW:
            return TransientError(f"{where} does not answer now (status {status}: {words})", after)
        return RemoteError(f"{where} refuses the request (status {status}: {words})")

    def _words(self, error: Any) -> str:
        """An error as an endpoint words it, shortened, and never with the key in it."""
        if isinstance(error, dict):
            message = str(error.get("message") or json.dumps(error))
            kinds = [kind for kind in (error.get("code"), error.get("type")) if isinstance(kind, str)]
            error = " ".join([message, *(f"[{kind}]" for kind in kinds if kind not in message)])
        text = str(error).strip()
        return (text.replace(self.key, "…") if self.key else text)[:SHOWN]

    async def _served(self, client: httpx2.AsyncClient) -> str:
        """Which models there are, for those who asked for another."""
        wrong = "is the address right? It usually ends in /v1"
        try:
            answer = await client.get(f"{self.spec.remote.rstrip('/')}/models", timeout=CONNECT_S)
            names = [str(model["id"]) for model in answer.json()["data"]]
        except (httpx2.RequestError, ValueError, LookupError, TypeError, RecursionError):
            return wrong
        return f"it serves {listing(names)}.{did_you_mean(self.spec.name, names)}" if names else wrong


def waited(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms; ``None`` where it asks for nothing."""
    if header is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d+)?\s*", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
