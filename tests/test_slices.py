"""Long work on the engine's thread in slices: checks of calls and passages, beside sequences that go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from agentmesh import Mesh
from agentmesh.config.mesh import ModelSpec
from agentmesh.engine import composition
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.core import TURN_S, TURN_TOKENS, SinceStep
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import load
from agentmesh.engine.loop import Engine
from agentmesh.engine.probe import probe
from agentmesh.engine.sampling import Sampling
from agentmesh.engine.scout import Scout
from agentmesh.engine.slices import Slices, advance, at_once, noted
from agentmesh.engine.spans import Part, Spans
from agentmesh.kv.arena import Arena
from agentmesh.local import LocalBackend
from agentmesh.prompt import Content, ContentKind

SLICES = 6


class Checked:
    """A source whose check takes several slices."""

    since: float | None = None
    limit: int = 2**40

    def __init__(self, slices: int = 0) -> None:
        self.slices = slices
        self.tokens = (5, 6, 7, 8)
        self.seen: list[str] = []
        self.fourth: Callable[[], object] = lambda: None

    def room(self, need: int, *, alone: bool) -> bool:
        return True

    def compose(self) -> tuple[Composition, Parts]:
        return Composition(self.tokens), Parts()

    def placed(self) -> None: ...

    def prefilled(self, arena: Arena) -> None: ...

    def finished(self, arena: Arena, tokens: tuple[int, ...]) -> None:
        self.seen.append("finished")

    def checked(self, cache: ArenaCache, logits: torch.Tensor) -> Slices[None]:
        assert cache.arena.length >= len(self.tokens)
        try:
            for number in range(self.slices):
                self.seen.append(f"slice {number}")
                if number == 3:
                    self.fourth()
                yield
        finally:
            self.seen.append("checked")

    def closed(self) -> None:
        self.seen.append("closed")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    with Engine(loaded, probe(loaded.model, loaded.step)) as engine:
        yield engine


def counted(slices: int, seen: list[int]) -> Slices[str]:
    try:
        for number in range(slices):
            seen.append(number)
            yield
        return "done"
    finally:
        seen.append(-1)


def test_work_in_turns_gives_what_it_gives_at_once() -> None:
    seen: list[int] = []
    work = counted(2, seen)

    assert [advance(work), advance(work), advance(work)] == [(), (), ("done",)]
    assert at_once(counted(2, seen)) == at_once(noted(Spans(), Part.AUDIT, counted(2, seen))) == "done"
    assert seen == [0, 1, -1] * 3


def test_work_that_is_given_up_between_two_turns_is_closed() -> None:
    seen: list[int] = []
    work = noted(Spans(), Part.AUDIT, counted(9, seen))
    advance(work)

    work.close()

    assert seen == [0, -1]


def test_live_sequences_get_tokens_between_the_slices_of_a_check(engine: Engine) -> None:
    pieces: list[int] = []

    class Noting(Checked):
        def checked(self, cache: ArenaCache, logits: torch.Tensor) -> Slices[None]:
            work = super().checked(cache, logits)
            while not advance(work):
                pieces.append(engine.core.spent.decoded)
                yield

    checked = Noting(SLICES)

    async def beside_a_live_one() -> float:
        begun = asyncio.Event()
        live = asyncio.ensure_future(
            engine.generate(Checked(), 4, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
        )
        await begun.wait()
        done = await engine.generate(checked, 4, Sampling(2), lambda _report: None, lambda _piece: None)
        live.cancel()
        await asyncio.wait({live})
        await engine.do(lambda: None)
        return done.learn_ms

    learn_ms = asyncio.run(beside_a_live_one())

    assert len(pieces) == SLICES
    assert all(later > earlier for earlier, later in pairwise(pieces))
    assert checked.seen[-2:] == ["checked", "closed"]
    assert learn_ms > 0


def test_who_gives_up_during_a_check_ends_it_and_holds_nothing(engine: Engine) -> None:
    checked = Checked(10**6)

    async def given_up() -> None:
        fourth, event_loop = asyncio.Event(), asyncio.get_running_loop()
        checked.fourth = lambda: event_loop.call_soon_threadsafe(fourth.set)
        asked = asyncio.ensure_future(
            engine.generate(checked, 4, Sampling(2), lambda _report: None, lambda _piece: None)
        )
        await fourth.wait()
        asked.cancel()
        await asyncio.wait({asked})
        await engine.do(lambda: None)

    asyncio.run(given_up())

    assert checked.seen[-2:] == ["checked", "closed"]
    assert checked.seen.count("checked") == 1
    assert not engine.core.admission.held
    assert engine.support.runner.pool.lent_bytes == 0


def test_a_turn_of_prompts_ends_by_tokens_or_by_time() -> None:
    assert not SinceStep(TURN_TOKENS - 1, TURN_S / 2).enough
    assert SinceStep(TURN_TOKENS, 0.0).enough
    assert SinceStep(1, TURN_S).enough


def a_mesh(**extra: Any) -> Mesh:
    def member(number: int) -> dict[str, Any]:
        text = {
            "role": f"Role {number}",
            "system": f"You are number {number}. " * 4,
            "prompt": "{{ question }}\nGo on.",
        }
        return {**text, "generate": {"max_tokens": 8}}

    return Mesh(
        agents={f"agent.{number}": member(number) for number in (1, 2)},
        topology={"use": "fully-connected", "agents": 2},
        model="random:tiny-llama",
        communicator={"preset": "rotate", "audit": 1.0, "max_kl": 1e6, "max_flips": 1.0, "cost_gate": False, **extra},
    )


def test_an_audit_is_computed_in_the_calls_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 64)
    held: list[tuple[int, int]] = []
    inner = Scout.composed

    def noting(self: Scout, cache: ArenaCache, one: Composition) -> Slices[torch.Tensor]:
        work = inner(self, cache, one)
        while not (given := advance(work)):
            held.append((self.runner.pool.lent_bytes, cache.arena.nbytes))
            yield
        return given[0]

    monkeypatch.setattr(Scout, "composed", noting)
    with a_mesh() as mesh:
        calls = mesh.run(question="How many boats are there? " * 20).calls

    assert [call.audit is not None for call in calls] == [False, True]
    assert len(held) >= 5, "a forward a turn"
    assert all(lent == own for lent, own in held)


def test_a_passage_in_turns_has_the_kv_and_the_weights_of_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    runner = probe(loaded.model, loaded.step).runner
    assert isinstance(runner, ArenaRunner)
    scout, header, tokens = Scout(runner), (1, 2, 3), tuple(range(20, 120))
    found = []
    for most in (1024, 40):
        monkeypatch.setitem(composition.AT_ONCE, "cpu", most)
        cache = runner.open(len(header) + len(tokens))
        work, slices = scout.passage(cache, header, tokens), 1
        while not (given := advance(work)):
            slices += 1
        found.append((slices, given[0], cache.arena.both[:, :, :, : cache.arena.length].clone()))

    (one, whole, kv), (three, pieces, same) = found
    assert (one, three) == (1, 3)
    assert whole is not None
    assert pieces is not None
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(same, kv)


def test_passages_are_kept_while_others_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 32)
    with a_mesh() as mesh:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        kept = asyncio.run(_ingested(backend))

    assert kept > 3


async def _ingested(backend: LocalBackend) -> int:
    """Tokens that a live sequence got while one long passage was computed."""
    engine, begun = backend.engine, asyncio.Event()
    live = asyncio.ensure_future(
        engine.generate(Checked(), 4, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
    )
    await begun.wait()
    before = engine.core.spent.decoded
    text = "The harbour town keeps a ledger of every boat. " * 8
    assert await backend.ingest([Content(text, ContentKind.DOCUMENT, "ledger")]) == 1
    decoded = engine.core.spent.decoded - before
    live.cancel()
    await asyncio.wait({live})
    return decoded
