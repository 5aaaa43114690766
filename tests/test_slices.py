"""Long work on the engine's thread in slices: checks of calls and passages, beside sequences that go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from agentmesh import Mesh
from agentmesh.communicator.slots import Slots
from agentmesh.config.mesh import ModelSpec
from agentmesh.engine import composition, core
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.generation import Generation
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
from agentmesh.sharing.linear import Linear

SLICES = 6


class Checked:
    """A source whose check takes several slices."""

    since: float | None = None
    limit: int = 2**40

    def __init__(self, slices: int = 0) -> None:
        self.slices = slices
        self.tokens: tuple[int, ...] = (5, 6, 7, 8)
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


async def in_its_fourth_slice(engine: Engine, checked: Checked) -> asyncio.Future[Generation]:
    """A call whose check has begun and goes on."""
    fourth, event_loop = asyncio.Event(), asyncio.get_running_loop()
    checked.fourth = lambda: event_loop.call_soon_threadsafe(fourth.set)
    asked = asyncio.ensure_future(engine.generate(checked, 4, Sampling(2), lambda _report: None, lambda _piece: None))
    await fourth.wait()
    return asked


def test_work_in_slices_gives_what_it_gives_at_once() -> None:
    seen: list[int] = []
    work = counted(2, seen)

    assert [advance(work), advance(work), advance(work)] == [(), (), ("done",)]
    assert at_once(counted(2, seen)) == at_once(noted(Spans(), Part.AUDIT, counted(2, seen))) == "done"
    assert seen == [0, 1, -1] * 3


def test_work_that_is_given_up_between_two_slices_is_closed() -> None:
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
        asked = await in_its_fourth_slice(engine, checked)
        asked.cancel()
        await asyncio.wait({asked})
        await engine.do(lambda: None)

    asyncio.run(given_up())

    assert checked.seen[-2:] == ["checked", "closed"]
    assert checked.seen.count("checked") == 1
    assert not engine.core.admission.held
    assert engine.support.runner.pool.lent_bytes == 0


def test_an_engine_that_is_closed_between_two_slices_of_a_check_cancels_the_call() -> None:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    engine, checked = Engine(loaded, probe(loaded.model, loaded.step)), Checked(10**6)

    async def closed_meanwhile() -> None:
        asked = await in_its_fourth_slice(engine, checked)
        await asyncio.to_thread(engine.close)
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(closed_meanwhile())


def test_long_work_that_nobody_waits_for_any_more_ends_and_lets_others_begin(engine: Engine) -> None:
    """As long as it is under way a request that finds no room waits: what the work holds will be free."""
    runner, admission, seen = engine.support.runner, engine.core.admission, []
    assert isinstance(runner, ArenaRunner)

    class Poor(Checked):
        def room(self, need: int, *, alone: bool) -> bool:
            seen.append(alone)
            return runner.pool.lent_bytes == 0

    def holding() -> Slices[None]:
        cache = runner.open(64)
        try:
            while True:
                yield
        finally:
            runner.close(cache)

    async def beside() -> None:
        work = asyncio.ensure_future(engine.in_slices(holding()))
        while not admission.beside:
            await engine.do(lambda: None)
        asked = asyncio.ensure_future(
            engine.generate(Poor(), 4, Sampling(2), lambda _report: None, lambda _piece: None)
        )
        while not admission.waiting:
            await engine.do(lambda: None)
        work.cancel()
        await asked
        await engine.do(lambda: None)

    asyncio.run(asyncio.wait_for(beside(), 60))

    assert seen == [False, True]
    assert not admission.beside
    assert runner.pool.lent_bytes == 0


@pytest.mark.parametrize("limit", ["TURN_TOKENS", "TURN_S"])
def test_a_long_prompt_makes_way_after_so_many_tokens_or_seconds(
    engine: Engine, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 20)
    monkeypatch.setattr(core, limit, 1e-9)
    decoded: list[int] = []

    class Long(Checked):
        def compose(self) -> tuple[Composition, Parts]:
            decoded.append(engine.core.spent.decoded)
            return super().compose()

        def prefilled(self, arena: Arena) -> None:
            decoded.append(engine.core.spent.decoded)

    async def beside_a_live_one() -> None:
        begun, long = asyncio.Event(), Long()
        long.tokens = tuple(range(40, 140))
        live = asyncio.ensure_future(
            engine.generate(Checked(), 4, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
        )
        await begun.wait()
        await engine.generate(long, 100, Sampling(1), lambda _report: None, lambda _piece: None)
        live.cancel()
        await asyncio.wait({live})
        await engine.do(lambda: None)

    asyncio.run(beside_a_live_one())

    assert decoded[1] - decoded[0] >= 4, "a step behind each of five forwards but the last"


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


@pytest.mark.parametrize("rehearsed", [False, True])
def test_a_check_in_slices_finds_and_teaches_what_one_forward_does(
    monkeypatch: pytest.MonkeyPatch, *, rehearsed: bool
) -> None:
    found = []
    for most in (1024, 64):
        monkeypatch.setitem(composition.AT_ONCE, "cpu", most)
        with a_mesh(preset="linear", warmup=2) as mesh:
            backend = mesh.load()
            assert isinstance(backend, LocalBackend)
            mesh.run(question="How many boats are there? " * 20)
            mesh.run(question="How many oars are there? " * 20)
            if rehearsed:
                backend.observe_only(on=True, checked=True)
            [_, call] = mesh.run(question="How many nets are in the boats? " * 20).calls
            assert isinstance(backend.communicator, Slots)
            [state] = backend.communicator.learner.ledger.states.values()
            assert isinstance(state.exact, Linear)
            assert call.audit is not None
            found.append((call.audit.kl, call.audit.flip, state.exact.observations, state.exact.gram))

    (kl, flip, count, gram), (same_kl, same_flip, same_count, same_gram) = found
    assert same_kl == pytest.approx(kl, rel=1e-2, abs=1e-6)
    assert (same_flip, same_count) == (flip, count) == (flip, 3)
    torch.testing.assert_close(same_gram, gram, rtol=1e-3, atol=1e-3)


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


def test_a_passage_in_slices_has_the_kv_and_the_weights_of_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_passage_that_two_ask_for_at_once_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 32)
    text = "The harbour town keeps a ledger of every boat. " * 8
    computed: list[int] = []
    inner = Scout.passage

    def counting(self: Scout, cache: ArenaCache, header: Sequence[int], tokens: Sequence[int]) -> Slices[Any]:
        computed.append(len(tokens))
        return inner(self, cache, header, tokens)

    monkeypatch.setattr(Scout, "passage", counting)

    async def twice(backend: LocalBackend) -> list[int]:
        passage = Content(text, ContentKind.DOCUMENT, "ledger")
        return await asyncio.gather(backend.ingest([passage]), backend.ingest([passage]))

    with a_mesh() as mesh:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        kept = asyncio.run(twice(backend))

    assert sorted(kept) == [0, 1]
    assert len(computed) == 1


def test_a_passage_of_more_than_half_of_the_budget_is_kept() -> None:
    text = "The harbour town keeps a ledger of every boat. " * 8
    with a_mesh() as mesh:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        asyncio.run(backend.ingest([Content(text, ContentKind.DOCUMENT, "ledger")]))
        size = backend.communicator.nbytes
    with a_mesh(budget=int(1.5 * size)) as mesh:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        assert asyncio.run(backend.ingest([Content(text, ContentKind.DOCUMENT, "ledger")])) == 1


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
