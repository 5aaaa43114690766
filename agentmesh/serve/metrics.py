"""Counts and times for Prometheus, under the names that inference servers use, behind ``agentmesh_``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from agentmesh.events import Event, FirstToken, ModelFinished
from agentmesh.local import LocalBackend
from agentmesh.serve.limits import Gate
from agentmesh.serve.meshes import Served
from agentmesh.serve.runs import Run

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
BY_MESH = ("model_name",)


@final
class Metrics:
    """Owns a server's counters; hears of all runs. Nothing in it names a tenant.

    Args:
        gate: tells how many runs are at work and wait.
        meshes: tell how full their KV budgets are.
    """

    def __init__(self, gate: Gate, meshes: Mapping[str, Served]) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, about: str, labels: tuple[str, ...] = BY_MESH) -> Counter:
            return Counter(f"agentmesh_{name}", about, labels, registry=registry)

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"agentmesh_{name}_seconds", about, BY_MESH, buckets=SECONDS, registry=registry)

        def gauge(name: str, about: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"agentmesh_{name}", about, labels, registry=registry)

        gauge("num_requests_running", "Runs at work.").set_function(lambda: gate.at_work)
        gauge("num_requests_waiting", "Runs that wait for their turn.").set_function(lambda: gate.waiting)
        usage = gauge("kv_cache_usage_perc", "Share of a mesh's KV budget in use, from 0 to 1.", BY_MESH)
        for name, served in meshes.items():
            backend = served.mesh.backend
            if isinstance(backend, LocalBackend):
                usage.labels(name).set_function(partial(_used, backend))
        self._ended = counter("requests", "Runs that ended, by how.", (*BY_MESH, "status"))
        self._responses = counter("http_responses", "HTTP responses, by status.", ("status",))
        self._prompt = counter("prompt_tokens", "Prompt tokens of all model calls.")
        self._exact = counter("prefix_cache_hits", "Prompt tokens placed bit for bit.")
        self._realigned = counter("realigned_cache_hits", "Prompt tokens placed with realigned KV.")
        self._generated = counter("generation_tokens", "Tokens written by all agents.")
        self._whole = seconds("e2e_request_latency", "From a run's request to its end.")
        self._queued = seconds("request_queue_time", "From a run's request to its beginning.")
        self._answer = seconds("time_to_first_token", "From a run's request to the first token of its answer.")
        self._calls = seconds("call_time_to_first_token", "Of a model call: from its inputs to its first token.")
        self._token = seconds("time_per_output_token", "Of a model call: decoding, by token.")

    def heard(self, run: Run, event: Event) -> None:
        """Count an event."""
        mesh, topology = run.order.served.name, run.order.served.mesh.blueprint.topology
        if event.seq == 0:
            self._queued.labels(mesh).observe(run.age_s)
        if isinstance(event, FirstToken):
            self._calls.labels(mesh).observe(event.ttft_ms / 1e3)
            if (event.node, event.round) == (topology.output, topology.rounds - 1):
                self._answer.labels(mesh).observe(run.age_s)
        elif isinstance(event, ModelFinished):
            call = event.call
            self._prompt.labels(mesh).inc(call.prompt_tokens)
            self._exact.labels(mesh).inc(call.placed_exact)
            self._realigned.labels(mesh).inc(call.placed_realigned)
            self._generated.labels(mesh).inc(call.output_tokens)
            if call.output_tokens > 1:
                self._token.labels(mesh).observe(call.decode_ms / 1e3 / (call.output_tokens - 1))

    def over(self, run: Run) -> None:
        """Count a run that has ended."""
        mesh = run.order.served.name
        self._ended.labels(mesh, run.status.value).inc()
        self._whole.labels(mesh).observe(run.age_s)

    def responded(self, status: int) -> None:
        """Count an HTTP response."""
        self._responses.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


def _used(backend: LocalBackend) -> float:
    return backend.used_bytes / backend.communicator.budget.limit
