"""Model calls of agents: a role template becomes a prompt, the backend answers it, the call is recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from agentmesh.agents.base import Turn
from agentmesh.backend import Backend, Completion
from agentmesh.config.mesh import AnswerSpec, GenerateSpec
from agentmesh.events import CallRecord, Event, FirstToken, ModelFinished, ModelStarted, TokenText
from agentmesh.prompt import Content, ContentKind, Exchange, PromptRenderer, RoleTemplate, Scope, said, texts_of
from agentmesh.reasons import PlanRow, Treatment


@dataclass(frozen=True)
class Caller:
    """Runs the model calls of one run.

    Args:
        backend_of: node → its model.
        min_tokens: reuse points closer together than this are not declared.
        emit: takes events.
        seed: of the run; every call's own seed derives from it and the call's place in the graph.
        leads: how the mesh's prompts begin, to find what they have in common.
        output: the node whose last message is the answer.
        answer: what is asked of that message.
        streams: whether anybody wants the text as it comes.
    """

    backend_of: Callable[[str], Backend]
    min_tokens: int
    emit: Callable[[Event], None]
    seed: int
    leads: Sequence[Sequence[int]] = ()
    output: str = ""
    answer: AnswerSpec | None = None
    streams: bool = True

    async def __call__(
        self, turn: Turn, template: RoleTemplate, generate: GenerateSpec, history: list[Exchange] | None
    ) -> Content:
        """The message for one turn; a ``history`` is continued and gets the new exchange."""
        backend = self.backend_of(turn.node)
        renderer = PromptRenderer(backend.tokenizer, self.min_tokens)
        prompt, pieces = renderer.render(template, scope_of(turn), history, leads=self.leads)
        if self.answer is not None and (turn.node, turn.round) == (self.output, turn.rounds - 1):
            generate = self.answer.within(generate)
        listener = _Listener(self.emit, turn, streams=self.streams)
        seed = call_seed(self.seed, turn.node, turn.round, turn.attempt)
        label = said(ContentKind.MESSAGE, turn.node, turn.round)
        prompt = replace(prompt, reader=replace(turn.reader, writes=label, seed=seed))
        self.emit(ModelStarted(node=turn.node, round=turn.round, prompt_tokens=len(prompt.tokens)))
        done = await backend.complete(prompt, generate, seed, listener)
        if done.endpoint is None:
            texts = texts_of(prompt, [row.tokens for row in done.rows], backend.tokenizer)
            rows = tuple(row.model_copy(update={"text": text}) for row, text in zip(done.rows, texts, strict=True))
            done = replace(done, rows=rows)
        self.emit(ModelFinished(call=_record(turn, done)))
        reply = Content(done.text, ContentKind.MESSAGE, label, done.tokens if done.endpoint is None else None)
        if history is not None:
            history.append(Exchange(pieces, reply, len(prompt.tokens)))
        return reply


def scope_of(turn: Turn) -> Scope:
    """The names that a turn's templates see."""
    return Scope(turn.inputs, turn.inbox, role=turn.role, node=turn.node, round=turn.round, rounds=turn.rounds)


def call_seed(run_seed: int, node: str, round_: int, attempt: int) -> int:
    """A call's own seed: the same for the same place in the graph, whatever else runs."""
    digest = hashlib.sha256(f"{run_seed}:{node}:{round_}:{attempt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class _Listener:
    """Turns what the backend reports of one call into events."""

    def __init__(self, emit: Callable[[Event], None], turn: Turn, *, streams: bool) -> None:
        self.streams = streams
        self._emit = emit
        self._turn = turn

    def first(self, ttft_ms: float, rows: tuple[PlanRow, ...]) -> None:
        """The first token is out."""
        counts = counts_of(rows)
        self._emit(FirstToken(node=self._turn.node, round=self._turn.round, ttft_ms=ttft_ms, **counts))

    def text(self, piece: str) -> None:
        """A piece of text is out."""
        self._emit(TokenText(node=self._turn.node, round=self._turn.round, text=piece))


def counts_of(rows: Sequence[PlanRow]) -> dict[str, int]:
    """Prompt tokens by treatment, and their sum."""
    tokens = {kind: sum(row.tokens for row in rows if row.kind is kind) for kind in Treatment}
    return {
        "prompt_tokens": sum(tokens.values()),
        "placed_exact": tokens[Treatment.PLACED_EXACT],
        "placed_realigned": tokens[Treatment.PLACED_REALIGNED],
        "computed": tokens[Treatment.COMPUTED],
    }


def _record(turn: Turn, done: Completion) -> CallRecord:
    counted = None if done.endpoint is None else done.endpoint.output_tokens
    return CallRecord(
        node=turn.node,
        round=turn.round,
        preset=done.preset,
        **counts_of(done.rows),
        output_tokens=len(done.tokens) if counted is None else counted,
        queue_ms=round(done.queue_ms, 3),
        ttft_ms=round(done.ttft_ms, 3),
        decode_ms=round(done.decode_ms, 3),
        finish=done.finish,
        plan=done.rows,
        slot_tokens=done.slot_tokens,
        placed_slots=done.placed_slots,
        parts_ms={name: round(ms, 3) for name, ms in done.parts_ms.items()},
        learn_ms=round(done.learn_ms, 3),
        audit=done.audit,
        endpoint=done.endpoint,
    )
