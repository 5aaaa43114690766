"""The server as a whole: routes, guard, errors, the page's files, and the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from agentmesh.errors import AgentmeshError
from agentmesh.local import LocalBackend
from agentmesh.serve.asked import Unheard
from agentmesh.serve.guard import Guard, response
from agentmesh.serve.keys import Keys
from agentmesh.serve.limits import Gate, Limits
from agentmesh.serve.meshes import Served
from agentmesh.serve.metrics import Metrics
from agentmesh.serve.native import NativeApi
from agentmesh.serve.openai import OpenAiApi
from agentmesh.serve.problems import RefusedError, refusal
from agentmesh.serve.runs import Runs, Watcher

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Service:
    """What a server is made of.

    Args:
        meshes: by name; their models are loaded.
        keys: whose requests are answered; without any, everybody's on this machine.
        limits: how much it takes on.
        unheard: what to do with messages that a mesh has no input for.
        watchers: hear of all runs.
    """

    meshes: Mapping[str, Served]
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    unheard: Unheard = Unheard.REFUSE
    watchers: Sequence[Watcher] = ()


def make_app(service: Service) -> FastAPI:
    """The server of a service; its ``state.runs`` owns the runs."""
    meshes, limits = service.meshes, service.limits
    gate = Gate(limits)
    metrics = Metrics(gate, meshes)
    runs = Runs(limits, gate, (metrics, *service.watchers))

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await runs.drain()

    async def counted() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app = FastAPI(title="agentmesh", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.runs, app.state.meshes = runs, meshes
    app.include_router(NativeApi(meshes, runs, limits).router)
    app.include_router(OpenAiApi(meshes, runs, limits, service.unheard).router)
    app.add_api_route("/metrics", counted)
    app.add_api_route("/health", health)
    app.add_api_route("/ready", ready)
    app.add_api_route("/", page)
    app.add_api_route("/page/{name}", page)
    for wrong in (AgentmeshError, Exception):
        app.add_exception_handler(wrong, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _elsewhere)
    app.add_middleware(Guard, keys=service.keys, limits=limits, responded=metrics.responded)
    return app


async def health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


async def ready(request: Request) -> JSONResponse:
    """Whether new runs are taken: the server is not about to stop, and the threads of all models are alive."""
    runs: Runs = request.app.state.runs
    dead = [name for name, served in request.app.state.meshes.items() if not _alive(served)]
    if runs.closing:
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": "broken", "meshes": dead}, 503) if dead else JSONResponse({"status": "ready"})


def _alive(served: Served) -> bool:
    backend = served.mesh.backend
    return not isinstance(backend, LocalBackend) or backend.engine.thread.alive


async def page(name: str = "index.html") -> Response:
    """A file of the page."""
    files = {path.name: path for path in PAGE.iterdir()} if PAGE.is_dir() else {}
    if name not in files:
        raise RefusedError(404, f"no file {name[:80]!r} of the live page is installed here", code="not_found")
    return FileResponse(files[name], headers={"Cache-Control": "no-cache"})


async def _refused(_request: Request, error: Exception) -> Response:
    return response(refusal(error))


async def _invalid(_request: Request, error: Exception) -> Response:
    """A body or parameter of the wrong shape: the first mistake, and where it is."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return response(RefusedError(400, f"{where or 'body'}: {first['msg']}", param=where))


async def _elsewhere(request: Request, error: Exception) -> Response:
    """An address or method that does not exist."""
    assert isinstance(error, HTTPException)
    return response(RefusedError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
