"""One run of a mesh, from its first event to its result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from agentmesh.backend import Backend
from agentmesh.blueprint import Blueprint
from agentmesh.calls import Caller
from agentmesh.checks import Checks
from agentmesh.config.mesh import AnswerSpec, LlmAgentSpec
from agentmesh.errors import RecordError, RunError, TemplateError, UsageError
from agentmesh.events import RunCancelled, RunFailed, RunFinished, RunStarted
from agentmesh.models import Models
from agentmesh.named import named_scope
from agentmesh.prompt import Content, ContentKind, Message, PromptRenderer, Reader, RoleTemplate
from agentmesh.results import Gathered, RunResult
from agentmesh.scheduler import Walk
from agentmesh.stream import EventStream, Sink
from agentmesh.workers import make_workers, predicates


@dataclass(frozen=True)
class Asked:
    """What one run is asked to do, as ``Mesh.arun`` says, and who reads for it."""

    inputs: Mapping[str, str]
    seed: int
    sample: str
    reader: Reader
    check: bool
    answer: AnswerSpec | None


@final
class Runner:
    """Walks a blueprint's graph, once for each run. Owns its workers.

    Args:
        blueprint: the mesh.
        models: what its agents ask; loaded before the first run.
    """

    def __init__(self, blueprint: Blueprint, models: Models) -> None:
        self._blueprint = blueprint
        self._models = models
        self._workers = make_workers(blueprint)
        self._predicates = predicates(blueprint)
        self._leads: tuple[tuple[int, ...], ...] | None = None

    def corpus(self) -> list[Content]:
        """All documents that agents may hand out."""
        return [content for worker in self._workers.values() for content in worker.agent.corpus()]

    async def run(self, backend: Backend, asked: Asked, sinks: Sequence[Sink]) -> RunResult:
        """One run.

        Args:
            backend: the mesh's own model.
            asked: what is asked of it.
            sinks: called with every event, in order.

        Raises:
            NodeError, RunError, UsageError: it has no answer; its events say so, too.
            RecordError: a sink cannot write.
        """
        gathered = Gathered()
        stream = EventStream((gathered.take, *sinks), asked.sample)
        begun = time.perf_counter()
        stream.emit(self._started(backend, asked.inputs))
        finished = False
        try:
            await self._models.begin(asked.reader)
            walk = self._walk(backend, stream, asked, streams=bool(sinks))
            messages = await walk.run()
            answer = self._answer(messages)
            wall = time.perf_counter() - begun
            await walk.check_judges()
            finished = True
            stream.emit(RunFinished(answer=answer, wall_s=wall))
        except RecordError:
            finished = True  # no record can be written, so none of the failure either
            raise
        except (RunError, UsageError) as error:
            finished = True
            wall = time.perf_counter() - begun
            stream.emit(RunFailed(error_type=type(error).__name__, error=str(error), wall_s=wall))
            raise
        finally:
            await self._models.release(asked.reader.run)
            if not finished:
                stream.emit(RunCancelled(wall_s=time.perf_counter() - begun))
        return gathered.result(answer, ((message.node, message.round) for message in messages), wall)

    def _walk(self, backend: Backend, stream: EventStream, asked: Asked, *, streams: bool) -> Walk:
        inputs = {name: Content(text, ContentKind.INPUT, name) for name, text in asked.inputs.items()}
        min_tokens, output = self._blueprint.communicator.min_tokens, self._blueprint.topology.output
        if self._leads is None:
            self._leads = self._find_leads(PromptRenderer(backend.tokenizer, min_tokens))
        caller = Caller(
            self._models.of, min_tokens, stream.emit, asked.seed, self._leads, output, asked.answer, streams
        )
        checks = None
        if asked.check:
            checks = Checks(lambda hear: replace(caller, emit=hear, streams=False), f"{stream.sample}\0{asked.seed}")
        return Walk(
            self._blueprint.topology,
            self._workers,
            inputs,
            caller,
            stream.emit,
            self._predicates,
            lambda text: len(backend.tokenizer.encode(text, control=False)),
            asked.reader,
            checks,
        )

    def _find_leads(self, renderer: PromptRenderer) -> tuple[tuple[int, ...], ...]:
        """How the prompt of every agent with the mesh's own model begins, up to its first slot."""
        leads = []
        for member in self._blueprint.members.values():
            if not isinstance(member.spec, LlmAgentSpec) or member.remote is not None:
                continue
            template = RoleTemplate(member.spec.system, member.spec.prompt)
            try:
                prompt, _ = renderer.render(template, named_scope(self._blueprint, member))
            except TemplateError:
                continue  # a template that needs an inbox to render has no beginning known ahead
            if prompt.segments[0].content is None:
                leads.append(prompt.segments[0].tokens)
        return tuple(leads)

    def _started(self, backend: Backend, given: Mapping[str, str]) -> RunStarted:
        topology = self._blueprint.topology
        return RunStarted(
            mesh=self._blueprint.name,
            preset=backend.preset,
            model=backend.name,
            nodes=tuple(node.name for node in topology.nodes),
            rounds=topology.rounds,
            inputs=dict(given),
        )

    def _answer(self, messages: Sequence[Message]) -> str:
        output = self._blueprint.topology.output
        said = [message for message in messages if message.node == output]
        if not said:
            raise RunError(f"the output node {output} never ran: no message reached it (see the edges' conditions)")
        answer = said[-1].text.strip()
        if not answer:
            raise RunError(f"the output node {output} wrote an empty answer; look at its prompt and max_tokens")
        return answer
