"""The native API: meshes, runs, and each run's events as a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field

from agentmesh.config.base import Frozen, Integer
from agentmesh.errors import did_you_mean, listing
from agentmesh.reasons import Reason
from agentmesh.serve.guard import tenant_of
from agentmesh.serve.limits import Limits
from agentmesh.serve.meshes import Served
from agentmesh.serve.problems import RefusedError
from agentmesh.serve.runs import Order, Run, Runs

SSE = "text/event-stream"
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class RunRequest(Frozen):
    """What a native run is asked to do."""

    inputs: dict[str, str] = Field(default_factory=dict)
    seed: Integer | None = None


@final
class NativeApi:
    """Routes below ``/api``."""

    def __init__(self, meshes: Mapping[str, Served], runs: Runs, limits: Limits) -> None:
        self._meshes = meshes
        self._runs = runs
        self._limits = limits
        self.router = APIRouter(prefix="/api")
        self.router.add_api_route("/meshes", self.meshes)
        self.router.add_api_route("/meshes/{name}/runs", self.start, methods=["POST"], status_code=201)
        self.router.add_api_route("/runs", self.runs)
        self.router.add_api_route("/runs/{name}", self.run)
        self.router.add_api_route("/runs/{name}", self.cancel, methods=["DELETE"])
        self.router.add_api_route("/runs/{name}/events", self.events)

    async def meshes(self) -> dict[str, Any]:
        """What can be run, and what the reasons in its plans mean."""
        return {
            "meshes": [served.describe() for served in self._meshes.values()],
            "reasons": {str(reason): reason.about for reason in Reason},
        }

    async def start(self, name: str, asked: RunRequest, request: Request) -> dict[str, str]:
        """Begin a run; it goes on if nobody listens."""
        order = Order(find(self._meshes, name), asked.inputs, tenant_of(request), asked.seed)
        return {"run": (await self._runs.start(order)).id}

    async def runs(self, request: Request) -> dict[str, Any]:
        """The tenant's runs, newest first."""
        return {"runs": [run.row() for run in self._runs.of(tenant_of(request))]}

    async def run(self, name: str, request: Request) -> dict[str, Any]:
        """One run with its inputs."""
        run = self._runs.find(tenant_of(request), name)
        return {**run.row(), "inputs": dict(run.order.inputs)}

    async def cancel(self, name: str, request: Request) -> JSONResponse:
        """Stop a run."""
        run = self._runs.find(tenant_of(request), name)
        self._runs.cancel(run)
        return JSONResponse(run.row(), 202)

    async def events(self, name: str, request: Request) -> Response:
        """A run's events from its beginning, or behind ``Last-Event-ID``, until it ends."""
        run = self._runs.find(tenant_of(request), name)
        last = request.headers.get("last-event-id", "")
        after = int(last) if last.isdecimal() else -1
        return StreamingResponse(self._stream(run, after), headers=STREAM_HEADERS, media_type=SSE)

    async def _stream(self, run: Run, after: int) -> AsyncIterator[str]:
        async for note in run.follow(after, self._limits.beat_s):
            yield ": still there\n\n" if note is None else f"id: {note.seq}\nevent: {note.type}\ndata: {note.data}\n\n"
        yield f"event: end\ndata: {json.dumps({'status': run.status})}\n\n"


def find(meshes: Mapping[str, Served], name: str, param: str = "") -> Served:
    """A mesh by name.

    Raises:
        RefusedError: none has it.
    """
    if name not in meshes:
        known = f"this server offers {listing(meshes)}.{did_you_mean(name, meshes)}"
        raise RefusedError(404, f"no mesh {name[:80]!r}; {known}", param=param, code="model_not_found")
    return meshes[name]
