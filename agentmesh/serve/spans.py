"""Runs as OpenTelemetry spans, under the names of its GenAI conventions. All of those names stand here.

A run is ``invoke_workflow MESH``, a visit in it ``invoke_agent NODE``, a model call in that ``chat MODEL``. Texts are
left out unless they are asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode

from agentmesh.events import CallRecord, Event, ModelFinished, NodeFailed, NodeFinished, NodeStarted
from agentmesh.results import Usage, usage_of
from agentmesh.serve.runs import Run, Status

PROVIDER = {"gen_ai.provider.name": "agentmesh"}
Visit = tuple[str, int]


@dataclass
class _Open:
    """What is open of one run."""

    whole: Span
    visits: dict[Visit, Span] = field(default_factory=dict)
    began: dict[Visit, int] = field(default_factory=dict)


@final
class Spans:
    """Hears of all runs; owns the spans that are open.

    Args:
        exporter: where spans go.
        content: whether texts of inputs, prompts and messages go with them.
    """

    def __init__(self, exporter: SpanExporter, *, content: bool) -> None:
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: "agentmesh"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("agentmesh")
        self._content = content
        self._open: dict[Run, _Open] = {}

    @classmethod
    def to_collector(cls, *, content: bool) -> Spans:
        """Spans that go by OTLP over HTTP to where ``OTEL_EXPORTER_OTLP_ENDPOINT`` says."""
        return cls(OTLPSpanExporter(), content=content)

    def heard(self, run: Run, event: Event) -> None:
        """Open and close spans as a run goes on."""
        at = int(event.ts * 1e9)
        if run not in self._open:
            self._open[run] = _Open(self._begin_run(run, at))
        spans = self._open[run]
        if isinstance(event, NodeStarted):
            self._begin_visit(spans, event, at)
        elif isinstance(event, ModelFinished):
            self._call(run, spans, event.call, at)
        elif isinstance(event, NodeFinished):
            span = spans.visits.pop((event.message.node, event.message.round))
            if self._content:
                span.set_attribute("gen_ai.output.messages", _message("assistant", event.message.text))
            span.end(at)
        elif isinstance(event, NodeFailed):
            self._fail(spans.visits.pop((event.node, event.round)), event.error_type, event.error, at)

    def over(self, run: Run) -> None:
        """Close what is still open of a run."""
        spans = self._open.pop(run, None)
        if spans is None:
            return
        for span in spans.visits.values():
            span.end()
        if run.status is Status.DONE:
            spans.whole.set_attributes(_tokens(run.usage))
            spans.whole.end()
        else:
            self._fail(spans.whole, run.status.value, str(run.error), None)

    def close(self) -> None:
        """Send what has not been sent yet."""
        self._provider.shutdown()

    def _begin_run(self, run: Run, at: int) -> Span:
        mesh = run.order.served.name
        facts = {"gen_ai.operation.name": "invoke_workflow", "gen_ai.agent.name": mesh, "agentmesh.run": run.id}
        if self._content:
            facts["gen_ai.input.messages"] = _message("user", json.dumps(dict(run.order.inputs), ensure_ascii=False))
        return self._tracer.start_span(f"invoke_workflow {mesh}", attributes={**PROVIDER, **facts}, start_time=at)

    def _begin_visit(self, spans: _Open, event: NodeStarted, at: int) -> None:
        visit = event.node, event.round
        if event.attempt and visit in spans.visits:
            spans.visits[visit].add_event("retry", {"attempt": event.attempt}, at)
        else:
            facts = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": event.node}
            spans.visits[visit] = self._tracer.start_span(
                f"invoke_agent {event.node}",
                trace.set_span_in_context(spans.whole),
                attributes={**PROVIDER, **facts, "agentmesh.role": event.role, "agentmesh.round": event.round},
                start_time=at,
            )
        spans.began[visit] = at

    def _call(self, run: Run, spans: _Open, call: CallRecord, at: int) -> None:
        visit, blueprint = (call.node, call.round), run.order.served.mesh.blueprint
        model = (blueprint.remote_of(call.node) or blueprint.model).name
        begun = at - int((call.ttft_ms + call.decode_ms + call.learn_ms) * 1e6)
        span = self._tracer.start_span(
            f"chat {model}",
            trace.set_span_in_context(spans.visits[visit]),
            kind=SpanKind.INTERNAL,
            attributes={
                **PROVIDER,
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": model,
                "gen_ai.response.finish_reasons": (call.finish,),
                "gen_ai.response.time_to_first_chunk": call.ttft_ms / 1e3,
                "agentmesh.preset": call.preset,
                **_tokens(usage_of([call])),
            },
            start_time=max(begun, spans.began[visit]),
        )
        if self._content:
            span.set_attribute("gen_ai.input.messages", _message("user", "".join(row.text for row in call.plan)))
        span.end(at)

    def _fail(self, span: Span, kind: str, text: str, at: int | None) -> None:
        span.set_attribute("error.type", kind)
        span.set_status(StatusCode.ERROR, text if self._content else None)
        span.end(at)


def _tokens(usage: Usage) -> dict[str, int]:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached,
    }


def _message(role: str, text: str) -> str:
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}], ensure_ascii=False)
