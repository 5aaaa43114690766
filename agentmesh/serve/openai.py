"""The API of OpenAI's clients: each mesh is a model, and what its output node says is the answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any, final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from agentmesh.blueprint import Blueprint
from agentmesh.config.mesh import LlmAgentSpec
from agentmesh.events import CallRecord, TokenText, parse_event
from agentmesh.serve.asked import ChatRequest, Unheard, inputs_of
from agentmesh.serve.guard import response, tenant_of
from agentmesh.serve.limits import Limits
from agentmesh.serve.meshes import Served
from agentmesh.serve.native import SSE, STREAM_HEADERS, find
from agentmesh.serve.runs import Order, Run, Runs

GONE = 499
FINISH = {"context": "length"}
"""Ends of messages that OpenAI calls by another name."""


@final
class OpenAiApi:
    """Routes below ``/v1``.

    Args:
        meshes: by name.
        runs: their owner.
        limits: says how often a silent stream gives a sign of life.
        unheard: what to do with messages that a mesh has no input for.
    """

    def __init__(self, meshes: Mapping[str, Served], runs: Runs, limits: Limits, unheard: Unheard) -> None:
        self._meshes = meshes
        self._runs = runs
        self._limits = limits
        self._unheard = unheard
        self._since = int(time.time())
        self.router = APIRouter(prefix="/v1")
        self.router.add_api_route("/models", self.models)
        self.router.add_api_route("/models/{name}", self.model)
        self.router.add_api_route("/chat/completions", self.complete, methods=["POST"])

    async def models(self) -> dict[str, Any]:
        """The meshes."""
        return {"object": "list", "data": [self._model(name) for name in self._meshes]}

    async def model(self, name: str) -> dict[str, Any]:
        """One mesh."""
        return self._model(find(self._meshes, name).name)

    async def complete(self, asked: ChatRequest, request: Request) -> Response:
        """Run a mesh, and answer with what its output node says; who goes away takes the run along."""
        asked.check()
        served = find(self._meshes, asked.model, "model")
        inputs, dropped = inputs_of(asked, served.mesh.blueprint, self._unheard)
        run = await self._runs.start(Order(served, inputs, tenant_of(request), asked.seed, asked.answer))
        headers = {"x-agentmesh-run": run.id, **({"x-agentmesh-dropped": ", ".join(dropped)} if dropped else {})}
        with ExitStack() as undo:
            undo.callback(self._runs.cancel, run)
            await _first_of(run.speaking if asked.stream else run.ended, request)
            if run.error is not None:
                return response(run.error)
            if not asked.stream:
                return JSONResponse(_completion(run), headers=headers) if run.ended.is_set() else Response(None, GONE)
            undo.pop_all()
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _Stream(self._chunks(run, usage=usage), {**STREAM_HEADERS, **headers}, partial(self._runs.cancel, run))

    async def _chunks(self, run: Run, *, usage: bool) -> AsyncIterator[str]:
        """The answer in pieces, as server-sent events."""
        part = partial(_chunk, run, more={"usage": None} if usage else {})
        yield _data(part({"role": "assistant", "content": ""}))
        words = Words(run.order.served.mesh.blueprint, _stops(run))
        async for note in run.follow(-1, self._limits.beat_s):
            if note is None:
                yield ": still there\n\n"
            elif note.type == TokenText.model_fields["type"].default and (piece := words.take(note.data)):
                yield _data(part({"content": piece}))
        if run.error is not None:
            yield _data(run.error.body)
            return
        if rest := words.rest(_answer(run)):
            yield _data(part({"content": rest}))
        yield _data(part({}, _finish(run)))
        if usage:
            yield _data({**part({}), "choices": [], "usage": _usage(run), "agentmesh": _facts(run)})
        yield "data: [DONE]\n\n"

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._since, "owned_by": "agentmesh"}


@final
class Words:
    """Turns the output node's tokens into an answer: no white space around it, and no stop text behind it.

    Args:
        blueprint: of the mesh.
        stops: stop texts that the client asked for: what could become one is held back.
    """

    def __init__(self, blueprint: Blueprint, stops: Sequence[str] = ()) -> None:
        topology = blueprint.topology
        self._output, self._round = topology.output, topology.rounds - 1
        spec = blueprint.members[topology.output].spec
        retry = blueprint.run.retry if spec is None or spec.retry is None else spec.retry
        self._live = isinstance(spec, LlmAgentSpec) and not retry  # what is sent cannot be taken back
        self._stops = tuple(stops)
        self._sent = ""
        self._held = ""

    def take(self, data: str) -> str:
        """What may be sent when a token has come."""
        event = parse_event(data)
        assert isinstance(event, TokenText)
        if not self._live or (event.node, event.round) != (self._output, self._round):
            return ""
        text = self._held + event.text
        text = text if self._sent else text.lstrip()
        before = before_stop(text, self._stops)
        self._live = before == text
        sizes = ((stop, size) for stop in self._stops for size in range(1, min(len(stop), len(before) + 1)))
        begun = max((size for stop, size in sizes if stop.startswith(before[-size:])), default=0)
        piece = before[: len(before) - begun].rstrip()
        self._held = text[len(piece) :]
        self._sent += piece
        return piece

    def rest(self, answer: str) -> str:
        """What of the answer was not sent yet: all of it, where no model wrote it or a retry might have changed it."""
        return answer[len(self._sent) :] if answer.startswith(self._sent) else ""


def before_stop(text: str, stops: Sequence[str]) -> str:
    """A text up to the first stop text in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@final
class _Stream(StreamingResponse):
    """A stream that says when it is over, also where nobody ever read from it."""

    def __init__(self, content: AsyncIterator[str], headers: Mapping[str, str], over: Callable[[], None]) -> None:
        super().__init__(content, headers=dict(headers), media_type=SSE)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


async def _first_of(event: asyncio.Event, request: Request) -> None:
    """Wait for an event, or until the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waits = {asyncio.ensure_future(event.wait()), asyncio.ensure_future(gone())}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _stops(run: Run) -> tuple[str, ...]:
    """Stop texts that the client asked for; they end what a model writes, and nothing else."""
    order = run.order
    blueprint = order.served.mesh.blueprint
    written = isinstance(blueprint.members[blueprint.topology.output].spec, LlmAgentSpec)
    return order.answer.stop if order.answer is not None and written else ()


def _answer(run: Run) -> str:
    """The answer as OpenAI's clients expect it: without the stop text that the mesh's message ends with."""
    stops = _stops(run)
    text = before_stop(run.answer or "", stops)
    bare = [len(end) for stop in stops if text.endswith(end := stop.rstrip())]  # the run cut white space off
    return text[: len(text) - (max(bare, default=0) if _finish(run) == "stop" else 0)].rstrip()


def _completion(run: Run) -> dict[str, Any]:
    message = {"role": "assistant", "content": _answer(run), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": _finish(run), "logprobs": None}
    return {**_head(run, "chat.completion"), "choices": [choice], "usage": _usage(run), "agentmesh": _facts(run)}


def _chunk(
    run: Run, delta: dict[str, str], finish: str | None = None, *, more: Mapping[str, None] = MappingProxyType({})
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return {**_head(run, "chat.completion.chunk"), "choices": [choice], **more}


def _head(run: Run, kind: str) -> dict[str, Any]:
    number = run.id.replace("run-", "chatcmpl-")
    return {"id": number, "object": kind, "created": int(run.begun.timestamp()), "model": run.order.served.name}


def _data(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _last(run: Run) -> CallRecord | None:
    """The call that wrote the answer, where a model did."""
    output = run.order.served.mesh.blueprint.topology.output
    return next((call for call in reversed(run.calls) if call.node == output), None)


def _finish(run: Run) -> str:
    last = _last(run)
    return "stop" if last is None else FINISH.get(last.finish, last.finish)


def _usage(run: Run) -> dict[str, Any]:
    """All calls of the run together; what other agents wrote counts as reasoning."""
    usage, last = run.usage, _last(run)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.output_tokens - (last.output_tokens if last else 0)},
    }


def _facts(run: Run) -> dict[str, Any]:
    """What OpenAI has no words for."""
    usage = run.usage
    names = {"calls", "placed_exact", "placed_realigned", "computed", "endpoint_cached"}
    return {"run": run.id, **usage.model_dump(include=names)}
