"""The engine on the real model and on tiny ones: tokens, seeds, stops, cancelling."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from agentmesh import Mesh
from agentmesh.bench.speed import Silent
from agentmesh.config.mesh import GenerateSpec, ModelSpec
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine import composition, core, loop, outbox
from agentmesh.engine.admission import AHEAD
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.embedded import Progress
from agentmesh.engine.forward import ArenaRunner, CacheSize, PlainRunner
from agentmesh.engine.generation import FirstTokenReport, Generation
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.engine.loop import BATCH, Engine
from agentmesh.engine.prefill import Prefill
from agentmesh.engine.probe import Level, probe
from agentmesh.engine.sampling import Sampler, Sampling
from agentmesh.engine.slices import Slices
from agentmesh.errors import ModelError, RequestTooLongError, UsageError
from agentmesh.kv.arena import Arena
from agentmesh.local import RUNS_A_CORE, SHORT_TOKENS, LocalBackend
from agentmesh.planned import PlannedPrompt
from agentmesh.prompt import FIXED, Prompt, Segment
from agentmesh.reasons import Treatment
from agentmesh.sharing.budget import Worth

QUESTION = "A box holds 6 eggs. How many eggs are in 5 boxes? Explain step by step."


class Whole:
    """A source that computes its whole prompt."""

    since: float | None = None
    limit: int = 2**40
    used: int = 3 * 2**20

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tuple(tokens)
        self.seen: list[int] = []

    def room(self, need: int, *, alone: bool) -> bool:
        return True

    def compose(self) -> tuple[Composition, Parts]:
        return Composition(self.tokens), Parts()

    def placed(self) -> None: ...

    def prefilled(self, arena: Arena) -> None:
        self.seen.append(arena.length)

    def finished(self, arena: Arena, tokens: tuple[int, ...]) -> None:
        assert arena.length >= len(self.tokens) + len(tokens) - 1

    def checked(self, cache: ArenaCache, logits: torch.Tensor) -> Slices[None]:
        self.seen.append(int(logits.argmax()))
        yield from ()

    def closed(self) -> None:
        self.seen.append(-1)


def generate(engine: Engine, tokens: list[int], sampling: Sampling) -> tuple[Generation, str, list[FirstTokenReport]]:
    pieces: list[str] = []
    reports: list[FirstTokenReport] = []
    done = asyncio.run(engine.generate(Whole(tokens), len(tokens), sampling, reports.append, pieces.append))
    return done, "".join(pieces), reports


@pytest.fixture(scope="module")
def tiny_engine() -> Iterator[Engine]:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    with Engine(loaded, probe(loaded.model, loaded.step)) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(smollm2: LoadedModel) -> Iterator[Engine]:
    with Engine(smollm2, probe(smollm2.model, smollm2.step)) as engine:
        yield engine


def chat(loaded: LoadedModel, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return loaded.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.model
def test_greedy_decoding_equals_generate_token_for_token(engine: Engine) -> None:
    tokens = chat(engine.loaded, QUESTION)

    done, streamed, reports = generate(engine, tokens, Sampling(max_tokens=60))

    out = engine.loaded.model.generate(
        input_ids=torch.tensor([tokens]), max_new_tokens=60, do_sample=False, pad_token_id=2
    )
    wanted = [token for token in out[0, len(tokens) :].tolist() if token not in engine.loaded.stop_token_ids]
    assert list(done.tokens) == wanted
    assert streamed == done.text == engine.loaded.tokenizer.decode(wanted)
    assert done.finish in ("stop", "length")
    assert len(reports) == 1
    assert reports[0].ttft_ms > 0


@pytest.mark.model
def test_kv_made_by_decoding_is_exact_to_rounding(engine: Engine) -> None:
    tokens = chat(engine.loaded, QUESTION)
    done, _, _ = generate(engine, tokens, Sampling(max_tokens=24))
    runner = engine.support.runner
    assert isinstance(runner, ArenaRunner)
    whole = [*tokens, *done.tokens]
    decoded, computed = runner.open(len(whole)), runner.open(len(whole))
    runner.prefill(decoded, Composition(tuple(tokens)))
    for position in range(len(tokens), len(whole)):
        runner.forward(decoded, whole[position : position + 1], (position,))
    runner.prefill(computed, Composition(tuple(whole)))

    one, other = (cache.arena.read(0, len(whole)) for cache in (decoded, computed))
    for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.model
def test_a_stop_text_ends_the_message_after_the_token_that_completes_it(engine: Engine) -> None:
    tokens = chat(engine.loaded, QUESTION)
    free, _, _ = generate(engine, tokens, Sampling(max_tokens=40))
    stop = free.text[10:16]

    done, _, _ = generate(engine, tokens, Sampling(max_tokens=40, stop=(stop,)))

    assert done.finish == "stop"
    assert stop in done.text
    assert free.tokens[: len(done.tokens)] == done.tokens
    assert stop not in engine.loaded.tokenizer.decode(done.tokens[:-1])


def test_the_same_seed_gives_the_same_tokens_and_another_does_not(tiny_engine: Engine) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        return generate(tiny_engine, list(range(40)), Sampling(24, temperature=1.0, top_p=0.9, top_k=50, seed=seed))[
            0
        ].tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_special_tokens_other_than_stops_are_never_generated(tiny_engine: Engine) -> None:
    done, _, _ = generate(tiny_engine, list(range(40)), Sampling(200, temperature=5.0, seed=3))

    assert not set(done.tokens) & tiny_engine.loaded.special_token_ids


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(tiny_engine: Engine) -> None:
    with pytest.raises(RequestTooLongError, match=r"5,000 tokens.*at most 4,095"):
        generate(tiny_engine, [1] * 5000, Sampling())


def test_a_message_ends_where_the_context_is_full(tiny_engine: Engine) -> None:
    done, _, _ = generate(tiny_engine, [1] * 4090, Sampling(max_tokens=100))

    assert done.finish in ("context", "stop")
    assert len(done.tokens) <= 6


def test_cancelling_one_sequence_leaves_the_others_running(tiny_engine: Engine) -> None:
    async def both() -> Generation:
        quiet = Sampling(max_tokens=2000)
        slow = asyncio.create_task(
            tiny_engine.generate(Whole([5] * 50), 50, quiet, lambda _report: None, lambda _piece: None)
        )
        await asyncio.sleep(0.05)
        other = asyncio.create_task(
            tiny_engine.generate(Whole([7] * 50), 50, Sampling(8), lambda _report: None, lambda _piece: None)
        )
        slow.cancel()
        done = await other
        assert slow.cancelled() or slow.done()
        return done

    assert len(asyncio.run(both()).tokens) <= 8


def test_sequences_decoded_side_by_side_equal_those_decoded_alone(tiny_engine: Engine) -> None:
    prompts = [[number] * 30 for number in range(3, 9)]

    async def together() -> list[Generation]:
        work = [
            tiny_engine.generate(Whole(p), 30, Sampling(20), lambda _report: None, lambda _piece: None) for p in prompts
        ]
        return await asyncio.gather(*work)

    alone = [generate(tiny_engine, prompt, Sampling(20))[0].tokens for prompt in prompts]

    assert [done.tokens for done in asyncio.run(together())] == alone


def test_a_step_of_many_sequences_tells_an_event_loop_once(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    send = outbox._send

    def noted(loop: asyncio.AbstractEventLoop, calls: list[outbox.Call]) -> None:
        told.append(len(calls))
        send(loop, calls)

    monkeypatch.setattr(outbox, "_send", noted)
    pieces: list[str] = []

    async def together(on_text: Callable[[str], None] | None) -> list[Generation]:
        prompts = [[number] * 30 for number in range(3, 9)]
        work = [tiny_engine.generate(Whole(p), 30, Sampling(20), lambda _report: None, on_text) for p in prompts]
        return await asyncio.gather(*work)

    done = asyncio.run(together(pieces.append))

    assert len(pieces) > 6 * 10
    assert max(told) > 1
    assert len(told) < len(pieces) / 2
    told.clear()
    assert [one.tokens for one in asyncio.run(together(None))] == [one.tokens for one in done]
    assert sum(told) == len(done), "nobody wants pieces: only the ends are told"


def test_tokens_of_a_batch_of_one_do_not_depend_on_neighbours_at_all() -> None:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    sampling = Sampling(40, temperature=1.5, seed=4)

    async def together(engine: Engine) -> list[Generation]:
        prompts = [[number] * (20 + number) for number in range(3, 9)]
        return await asyncio.gather(*(quiet(engine, prompt, sampling) for prompt in prompts))

    with Engine(loaded, probe(loaded.model, loaded.step), batch=1) as engine:
        first = asyncio.run(quiet(engine, [5] * 25, sampling))
        assert asyncio.run(together(engine))[2].tokens == first.tokens


def test_a_step_that_fails_fails_its_sequences_and_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    support = probe(loaded.model, loaded.step)
    calls = []

    def broken(*_arguments: object) -> torch.Tensor:
        calls.append(1)
        raise MemoryError("no room for the logits")

    async def two(engine: Engine) -> list[Generation | BaseException]:
        work = [quiet(engine, [number] * 30, Sampling(20)) for number in (3, 4)]
        return await asyncio.gather(*work, return_exceptions=True)

    with Engine(loaded, support) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(ArenaRunner, "decode", broken)
            failed = asyncio.run(two(engine))
        assert [type(error) for error in failed] == [MemoryError, MemoryError]
        assert all(isinstance(done, Generation) for done in asyncio.run(two(engine)))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_sequence_without_odds_fails_alone(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    whole = ArenaRunner.decode

    def damaged(runner: ArenaRunner, caches: Any, tokens: Any, positions: Any) -> torch.Tensor:
        logits = whole(runner, caches, tokens, positions).clone()
        logits[[row for row, position in enumerate(positions) if position >= 50]] = torch.nan
        return logits

    async def two(engine: Engine) -> list[Generation | BaseException]:
        work = [quiet(engine, [3] * length, Sampling(20, temperature=temperature)) for length in (20, 45)]
        return await asyncio.gather(*work, return_exceptions=True)

    monkeypatch.setattr(ArenaRunner, "decode", damaged)
    with Engine(loaded, probe(loaded.model, loaded.step)) as engine:
        short, long = asyncio.run(two(engine))
        assert isinstance(short, Generation)
        assert isinstance(long, ModelError)
        assert "not numbers" in str(long)
        assert not engine.core.live


def test_logits_that_are_no_numbers_are_told_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor([3.0, torch.nan, 20.0], dtype=dtype)
        with pytest.raises(ModelError, match="not numbers"):
            Sampler(Sampling(), torch.tensor([0])).pick(logits)


@pytest.mark.parametrize("seed", range(20))
def test_text_is_streamed_as_it_is_in_the_end_whatever_bytes_a_model_writes(tiny_engine: Engine, seed: int) -> None:
    """Half of these ids are bytes that are no character by themselves; the last one may be unfinished."""
    made = random.Random(seed)
    tokens = [made.choice((made.randrange(3, 256), made.randrange(3, 320))) for _ in range(40)]
    tokens = [token for token in tokens if token not in tiny_engine.loaded.special_token_ids]
    stream = tiny_engine.tokenizer.stream()

    pieces = [*(stream.push(token) for token in tokens), stream.end()]

    assert "".join(pieces) == tiny_engine.tokenizer.decode(tokens)


def test_a_message_that_is_cut_in_the_middle_of_a_character_is_streamed_whole(tiny_engine: Engine) -> None:
    for seed in range(12):
        done, streamed, _ = generate(tiny_engine, [3] * 20, Sampling(9, temperature=3.0, seed=seed))
        assert streamed == done.text


def test_no_temperature_is_too_low_to_draw_at() -> None:
    logits = torch.tensor([3.0, 25.0, 20.0, -4.0])
    for temperature in (1e-40, 1e-30, 1e-4):
        assert Sampler(Sampling(temperature=temperature), torch.tensor([], dtype=torch.long)).pick(logits) == 1


def test_an_engine_that_is_closed_cancels_what_it_decodes() -> None:
    loaded = load(ModelSpec(name="random:tiny-llama"))

    async def closed_midway() -> None:
        engine = Engine(loaded, probe(loaded.model, loaded.step))
        begun = asyncio.Event()
        task = asyncio.create_task(
            engine.generate(Whole([5] * 50), 50, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
        )
        await begun.wait()
        await asyncio.to_thread(engine.close)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 20)
        with pytest.raises(asyncio.CancelledError):
            await quiet_source(engine, Whole([5] * 50))

    asyncio.run(closed_midway())


async def quiet(engine: Engine, prompt: list[int], sampling: Sampling) -> Generation:
    return await engine.generate(Whole(prompt), len(prompt), sampling, lambda _report: None, lambda _piece: None)


async def quiet_source(engine: Engine, source: Whole) -> Generation:
    return await engine.generate(source, len(source.tokens), Sampling(2), lambda _report: None, lambda _piece: None)


class Rationed(Whole):
    """A source that may begin only while fewer than so many are live."""

    def __init__(self, tokens: list[int], live: list[Rationed], most: int) -> None:
        super().__init__(tokens)
        self.live = live
        self.most = most
        self.peak = 0

    def room(self, need: int, *, alone: bool) -> bool:
        assert alone is not self.live
        if len(self.live) >= self.most:
            return False
        self.live.append(self)
        return True

    def prefilled(self, arena: Arena) -> None:
        self.peak = len(self.live)

    def closed(self) -> None:
        if self in self.live:
            self.live.remove(self)


def test_what_a_request_held_is_free_when_it_is_over_whether_or_not_anybody_looks_for_garbage(
    tiny_engine: Engine,
) -> None:
    held: list[weakref.ref[Arena]] = []

    class Noting(Whole):
        def prefilled(self, arena: Arena) -> None:
            held.append(weakref.ref(arena))

    async def one() -> None:
        await tiny_engine.generate(Noting([5] * 9), 9, Sampling(6), lambda _report: None, lambda _piece: None)
        await tiny_engine.do(tiny_engine.core.admission.drop_spare)

    gc.disable()
    try:
        asyncio.run(one())
        assert [arena() for arena in held] == [None]
    finally:
        gc.enable()


def test_live_sequences_get_their_turn_between_prompts(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of 60 tokens are beyond 100, so the third one waits for a step."""
    monkeypatch.setattr(core, "TURN_TOKENS", 100)
    steps: list[int] = []

    class Noting(Whole):
        def compose(self) -> tuple[Composition, Parts]:
            steps.append(tiny_engine.core.spent.decoded)
            return super().compose()

    async def beside_a_live_one() -> None:
        begun = asyncio.Event()
        live = asyncio.ensure_future(
            tiny_engine.generate(Whole([5] * 50), 50, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
        )
        await begun.wait()
        sources = [Noting([7 + number] * 60) for number in range(8)]
        arriving = [
            asyncio.ensure_future(tiny_engine.generate(s, 60, Sampling(1), lambda _report: None, lambda _piece: None))
            for s in sources
        ]
        await asyncio.gather(*arriving)
        live.cancel()
        await asyncio.wait({live})

    asyncio.run(beside_a_live_one())

    assert len(steps) == 8
    assert max(Counter(steps).values()) == 2


def test_a_long_prompt_takes_several_turns(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 tokens in forwards of 50: after every 100 there is a step; an earlier run's prompt waits behind it."""
    monkeypatch.setattr(core, "TURN_TOKENS", 100)
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 50)
    seen: list[tuple[str, int]] = []
    begun: dict[str, float] = {}

    class Noting(Whole):
        def __init__(self, name: str, tokens: int, since: float) -> None:
            super().__init__([7] * tokens)
            self.name, self.since = name, since

        def compose(self) -> tuple[Composition, Parts]:
            seen.append((f"{self.name} begins", tiny_engine.core.spent.decoded))
            begun.setdefault(self.name, time.perf_counter())
            return super().compose()

        def prefilled(self, arena: Arena) -> None:
            seen.append((f"{self.name} is in", tiny_engine.core.spent.decoded))

    async def beside_a_live_one() -> Generation:
        ready = asyncio.Event()
        live = asyncio.ensure_future(
            tiny_engine.generate(Whole([5] * 50), 50, Sampling(3000), lambda _report: ready.set(), lambda _piece: None)
        )
        await ready.wait()
        begun["asked"] = time.perf_counter()
        reports: list[FirstTokenReport] = []
        asked = [
            asyncio.ensure_future(
                tiny_engine.generate(source, len(source.tokens), Sampling(1), reports.append, lambda _piece: None)
            )
            for source in (Noting("long", 500, 2.0), Noting("short", 20, 1.0))
        ]
        found, _ = await asyncio.gather(*asked)
        live.cancel()
        await asyncio.wait({live})
        await tiny_engine.do(lambda: None)
        return found

    found = asyncio.run(beside_a_live_one())

    assert [name for name, _ in seen] == ["long begins", "long is in", "short begins", "short is in"]
    assert seen[1][1] - seen[0][1] >= 4, "steps went in between"
    assert found.queue_ms > (begun["long"] - begun["asked"]) * 1e3, "waiting for steps is waiting"
    assert not tiny_engine.core.admission.held
    assert not tiny_engine.core.admission.waiting


def test_who_gives_up_while_others_are_swept_away_does_not_begin(tiny_engine: Engine) -> None:
    gone, given_up = Whole([7] * 9), threading.Event()

    async def one_after_another() -> None:
        event_loop, begun, busy = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        class Slow(Whole):
            def closed(self) -> None:
                event_loop.call_soon_threadsafe(following.cancel)
                given_up.wait(20)

        live = asyncio.ensure_future(
            tiny_engine.generate(Slow([5] * 50), 50, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
        )
        await begun.wait()
        blocked = asyncio.ensure_future(tiny_engine.do(lambda: busy.wait(20)))
        await asyncio.sleep(0.05)
        following = asyncio.ensure_future(quiet_source(tiny_engine, gone))
        following.add_done_callback(lambda _done: given_up.set())
        await asyncio.sleep(0.05)
        live.cancel()
        await asyncio.wait({live})
        busy.set()
        await asyncio.wait({blocked, following})
        await tiny_engine.do(lambda: None)

    asyncio.run(one_after_another())

    assert gone.seen == [-1]
    assert not tiny_engine.core.admission.held
    assert not tiny_engine.core.live


def test_an_engine_that_is_closed_computes_no_further_forward_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 50)
    loaded = load(ModelSpec(name="random:tiny-llama"))
    engine, reached = Engine(loaded, probe(loaded.model, loaded.step)), threading.Event()
    go_on, count = Prefill.go_on, 0

    def closing(prefill: Prefill) -> int:
        nonlocal count
        count += 1
        if count == 2:
            reached.set()
            while not engine.core.closing:
                time.sleep(0.01)
        return go_on(prefill)

    monkeypatch.setattr(Prefill, "go_on", closing)
    closer = threading.Thread(target=lambda: (reached.wait(20), engine.close()))
    closer.start()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(asyncio.wait_for(quiet_source(engine, Whole([7] * 500)), 30))
    closer.join()

    assert count == 2


@pytest.mark.parametrize("tokens", [1, 40])
def test_an_engine_that_is_closed_during_the_last_forward_of_a_prompt_cancels_it(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the prompt's first token is all that was asked for."""
    loaded = load(ModelSpec(name="random:tiny-llama"))
    engine, reached, closed = Engine(loaded, probe(loaded.model, loaded.step)), threading.Event(), threading.Event()
    go_on = Prefill.go_on
    close = ThreadPoolExecutor.shutdown

    def closing(prefill: Prefill) -> int:
        reached.set()
        assert closed.wait(20)
        return go_on(prefill)

    def shutdown(pool: ThreadPoolExecutor, *, wait: bool = True, cancel_futures: bool = False) -> None:
        close(pool, wait=False, cancel_futures=cancel_futures)
        closed.set()
        close(pool, wait=wait)

    monkeypatch.setattr(Prefill, "go_on", closing)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    closer = threading.Thread(target=lambda: (reached.wait(20), engine.close()))
    closer.start()

    async def asked() -> None:
        sampling = Sampling(tokens)
        await engine.generate(Whole([7] * 30), 30, sampling, lambda _report: None, lambda _piece: None)

    async def within() -> None:
        await asyncio.wait_for(asked(), 30)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(within())
    closer.join()
    assert not engine.core.live


def test_who_gives_up_in_the_middle_of_a_long_prompt_is_let_go_after_the_next_forward(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 50)
    gone, forwards = Whole([7] * 500), 0
    loop_, runner = asyncio.new_event_loop(), tiny_engine.support.runner
    assert isinstance(runner, ArenaRunner)
    go_on = Prefill.go_on

    async def given_up() -> None:
        asked = asyncio.ensure_future(quiet_source(tiny_engine, gone))

        def giving_up(prefill: Prefill) -> int:
            nonlocal forwards
            forwards += 1
            cancelled = threading.Event()
            loop_.call_soon_threadsafe(lambda: (asked.cancel(), loop_.call_soon(cancelled.set)))
            cancelled.wait(20)
            return go_on(prefill)

        monkeypatch.setattr(Prefill, "go_on", giving_up)
        await asyncio.wait({asked})
        await tiny_engine.do(lambda: None)

    loop_.run_until_complete(given_up())
    loop_.close()

    assert forwards <= 2
    assert gone.seen == [-1]
    assert not tiny_engine.core.admission.held
    assert not tiny_engine.core.admission.waiting


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
def test_who_has_given_up_is_let_go_before_the_next_prompt_begins(tiny_engine: Engine, how: str) -> None:
    seen: list[tuple[list[int], int]] = []
    gone = Whole([5] * 50)

    class Noting(Whole):
        def compose(self) -> tuple[Composition, Parts]:
            seen.append((list(gone.seen), len(tiny_engine.core.admission.held)))
            return super().compose()

    async def one_after_another() -> None:
        begun, busy = asyncio.Event(), threading.Event()
        asked = tiny_engine.generate(gone, 50, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
        live = asyncio.ensure_future(asyncio.wait_for(asked, 0.3 if how == "timed out" else 60))
        await begun.wait()
        blocked = asyncio.ensure_future(tiny_engine.do(lambda: busy.wait(20)))
        following = asyncio.ensure_future(quiet_source(tiny_engine, Noting([7] * 9)))
        await asyncio.sleep(0.05)
        if how == "cancelled":
            live.cancel()
        await asyncio.wait({live})
        busy.set()
        await asyncio.gather(blocked, following)

    asyncio.run(one_after_another())

    assert seen == [([50, -1], 1)], "closed, and only the next one's cache is in use"


def test_memory_for_a_message_is_claimed_with_its_cache(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed: list[slice] = []
    monkeypatch.setattr(Arena, "claim", lambda _arena, rows: claimed.append(rows))

    generate(tiny_engine, [5] * 9, Sampling(2))

    assert claimed == [slice(9, 9 + AHEAD)]


def test_what_must_be_done_on_the_thread_is_done_even_if_nobody_waits_any_more(tiny_engine: Engine) -> None:
    done: list[str] = []

    async def given_up() -> None:
        busy, begun = threading.Event(), asyncio.ensure_future(tiny_engine.do(lambda: busy.wait(20)))
        waiting = asyncio.ensure_future(tiny_engine.do(lambda: done.append("released")))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert not done
        busy.set()
        await begun
        await tiny_engine.do(lambda: None)

    asyncio.run(given_up())

    assert done == ["released"]


def test_requests_wait_for_memory_in_the_order_of_their_arrival(tiny_engine: Engine) -> None:
    live: list[Rationed] = []
    sources = [Rationed([5, 6, 7 + number], live, most=2) for number in range(7)]
    order: list[int] = []

    async def one(number: int) -> None:
        sampling = Sampling(max_tokens=4 + 3 * (number % 3))
        await tiny_engine.generate(sources[number], 3, sampling, lambda _r: order.append(number), lambda _t: None)

    async def all_of_them() -> None:
        runs = [asyncio.ensure_future(one(number)) for number in range(7)]
        await asyncio.sleep(0.02)
        runs[4].cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        await tiny_engine.do(lambda: None)  # what was submitted before, such as closing, is done then

    asyncio.run(all_of_them())

    assert max(source.peak for source in sources) == 2
    assert [number for number in order if number != 4] == [0, 1, 2, 3, 5, 6]
    assert not live
    assert not tiny_engine.core.admission.waiting  # nobody was forgotten


def test_where_memory_is_short_the_requests_of_earlier_runs_go_first(tiny_engine: Engine) -> None:
    live: list[Rationed] = []
    sources = [Rationed([5, 6, 7 + number], live, most=1) for number in range(4)]
    sources[2].since, sources[3].since = 2.0, 1.0  # runs that began long before these requests
    order: list[int] = []

    async def all_of_them() -> None:
        sampling = Sampling(max_tokens=12)
        await asyncio.gather(
            *(
                tiny_engine.generate(source, 3, sampling, lambda _r, n=number: order.append(n), lambda _t: None)
                for number, source in enumerate(sources)
            )
        )

    asyncio.run(all_of_them())

    assert order == [0, 3, 2, 1]


def test_a_request_that_can_never_fit_is_refused_with_its_size(tiny_engine: Engine) -> None:
    told = r"may take 203 tokens, 0\.\d MiB of KV.* holds 3\.0 MiB that cannot be.*communicator\.budget"
    with pytest.raises(RequestTooLongError, match=told):
        asyncio.run(
            tiny_engine.generate(
                Rationed([5, 6, 7], [], most=0), 3, Sampling(max_tokens=200), lambda _r: None, lambda _t: None
            )
        )


def test_an_arena_that_another_mesh_left_lets_no_request_pass_the_budget() -> None:
    """Making room frees the arena that would have been used again; a fresh one must fit, too."""
    loaded = load(ModelSpec(name="random:tiny-llama"))
    with Engine(loaded, probe(loaded.model, loaded.step)) as engine:
        large, small = (LocalBackend(engine, CommunicatorSpec(preset="dense", budget=size)) for size in (2**24, 2**17))

        def ask(backend: LocalBackend, tokens: int) -> None:
            prompt = Prompt((Segment(FIXED, "", tuple(range(40, 40 + tokens))),), ())

            async def at_rest() -> None:
                await backend.complete(prompt, GenerateSpec(max_tokens=4), 0, Silent())
                await engine.do(lambda: None)  # an answer is out before its arena is given back

            asyncio.run(at_rest())

        ask(large, 250)
        assert engine.support.runner.pool.nbytes > 2**16
        ask(small, 20)
        assert small.communicator.budget.used <= 2**17
        ask(large, 250)
        with pytest.raises(RequestTooLongError, match="the budget of"):
            ask(small, 250)


@pytest.mark.parametrize("preset", ["prefix", "rotate", "kvcomm"])
def test_a_call_holds_no_kv_that_its_stores_may_evict(tiny_engine: Engine, preset: str) -> None:
    backend = LocalBackend(tiny_engine, CommunicatorSpec(preset=preset, min_tokens=4))
    prompt = Prompt((Segment(FIXED, "", tuple(range(40, 80))),), (20,))
    held: list[weakref.ref[Any]] = []
    gone: list[bool] = []

    class Watched(PlannedPrompt):
        def compose(self) -> tuple[Composition, Parts]:
            made = super().compose()
            held.extend(weakref.ref(piece.kv) for piece in made[0].placed)
            return made

        def prefilled(self, arena: Arena) -> None:
            assert all(kv() is not None for kv in held), "the store has it"
            for store in backend.communicator.budget._stores:
                store.evict(2**40, Worth.LATER)
            gone.extend(kv() is None for kv in held)
            super().prefilled(arena)

    for _ in range(2):
        source = Watched(backend.communicator, prompt, 0, None, backend.note_bytes)
        asyncio.run(tiny_engine.generate(source, 40, Sampling(2), lambda _report: None, lambda _piece: None))

    assert gone == [True]
    assert source.decided.count(Treatment.PLACED_EXACT) == 20


def test_as_many_runs_at_once_as_the_budget_has_room_for(tiny_engine: Engine) -> None:
    bytes_per_token = tiny_engine.support.runner.size(1)
    budgets = (2**30, 3 * SHORT_TOKENS * bytes_per_token, 100 * bytes_per_token)
    backends = [LocalBackend(tiny_engine, CommunicatorSpec(preset="dense", budget=budget)) for budget in budgets]

    assert [backend.width for backend in backends] == [min(BATCH, RUNS_A_CORE * torch.get_num_threads()), 3, 1]


def test_a_deterministic_run_is_refused_where_sequences_decode_together(tiny_engine: Engine) -> None:
    backend = LocalBackend(tiny_engine, CommunicatorSpec(preset="dense"))
    agents = {"solo": {"prompt": "{{ question }}", "generate": {"max_tokens": 4}}}
    topology = {"nodes": {"solo": {}}, "output": "solo"}
    one = Mesh(agents=agents, topology=topology, model=backend, communicator="dense", run={"deterministic": True})

    with pytest.raises(UsageError, match=r"decodes several sequences in one forward.*deterministic=True"):
        one.run(question="How?")


def test_placing_and_keeping_count_in_what_live_sequences_wait_for(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "TURN_S", 0.05)
    decoded: list[int] = []

    class Slow(Whole):
        def compose(self) -> tuple[Composition, Parts]:
            decoded.append(tiny_engine.core.spent.decoded)
            time.sleep(0.06)
            return super().compose()

    async def beside_a_live_one() -> None:
        begun = asyncio.Event()
        live = asyncio.ensure_future(
            tiny_engine.generate(Whole([5] * 50), 50, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
        )
        await begun.wait()
        await asyncio.gather(*(quiet_source(tiny_engine, Slow([7] * 9)) for _ in range(6)))
        live.cancel()
        await asyncio.wait({live})
        await tiny_engine.do(lambda: None)

    asyncio.run(beside_a_live_one())

    assert all(later > earlier for earlier, later in pairwise(decoded)), "a step between any two of them"


def test_an_engine_stops_with_the_last_backend_that_uses_it() -> None:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    engine = Engine(loaded, probe(loaded.model, loaded.step))
    first, second = (LocalBackend(engine, CommunicatorSpec(preset="dense")) for _ in range(2))

    first.close()
    first.close()
    assert engine.thread.do(lambda: "works") == "works"
    second.close()
    with pytest.raises(RuntimeError):
        engine.thread.do(lambda: None)


def test_a_model_that_runs_whole_waits_for_memory_too() -> None:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    runner = PlainRunner(loaded.model, CacheSize(100.0, 10.0))
    support = replace(probe(loaded.model, loaded.step), level=Level.DENSE, runner=runner)
    with Engine(loaded, support) as engine:
        spec = CommunicatorSpec(preset="dense", budget=2 * runner.need(24))
        backend = LocalBackend(engine, spec)
        peaks: list[int] = []

        class Watched(PlannedPrompt):
            def placed(self) -> None:
                peaks.append(len(engine.core.admission.held))
                super().placed()

        async def several(count: int, tokens: int) -> None:
            prompts = [Prompt((Segment(FIXED, "", tuple(range(40, 40 + tokens))),), ()) for _ in range(count)]
            sources = [Watched(backend.communicator, prompt, 0, None, backend.note_bytes) for prompt in prompts]
            nobody = lambda _: None  # noqa: E731  # takes what is said, twice
            asked = (engine.generate(source, tokens, Sampling(4), nobody, nobody) for source in sources)
            await asyncio.gather(*asked)

        asyncio.run(several(5, 20))
        assert max(peaks) == 2
        assert backend.peak_bytes == 2 * runner.need(24)
        with pytest.raises(RequestTooLongError, match="the budget of"):
            asyncio.run(several(1, 80))
        assert runner.nbytes == 0


def test_a_request_beyond_the_whole_budget_does_not_wait_for_others_to_end(tiny_engine: Engine) -> None:
    async def beside_a_live_one() -> None:
        begun = asyncio.Event()
        live = asyncio.ensure_future(
            tiny_engine.generate(Whole([5] * 50), 50, Sampling(3000), lambda _report: begun.set(), lambda _piece: None)
        )
        await begun.wait()
        large = Whole([7] * 9)
        large.limit = 2**10
        with pytest.raises(RequestTooLongError, match=r"may take 11 tokens, .* the budget of 0\.0 MiB"):
            await quiet_source(tiny_engine, large)
        assert not live.done()
        live.cancel()
        await asyncio.wait({live})

    asyncio.run(beside_a_live_one())


def test_a_model_is_loaded_on_the_thread_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noting(model: ModelSpec, progress: Progress | None, *, trials: bool) -> LoadedModel:
        threads.append(threading.current_thread().name)
        return load(model, progress, trials=trials)

    monkeypatch.setattr(loop, "load", noting)
    with Engine.open(ModelSpec(name="random:tiny-llama")) as engine:
        threads.append(engine.thread.do(lambda: threading.current_thread().name))

    assert threads == ["agentmesh-engine_0"] * 2


def test_a_model_that_cannot_be_loaded_leaves_no_thread() -> None:
    before = set(threading.enumerate())

    with pytest.raises(ModelError, match="no device"):
        Engine.open(ModelSpec(name="random:tiny-llama", device="abacus"))

    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()
