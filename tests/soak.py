"""A soak: many runs at once for a long time, cancelled at random, under tiny budgets, with short and long texts.

    make soak MINUTES=60                       # or: python tests/soak.py --minutes 60 --model random:tiny-llama

One mesh runs for some seconds, then the next; in between everything must be at rest. With ``--deterministic`` every run
is compared with the same run made alone, or has to say that memory was too short for that. What meshes know is fixed
then; between them fresh ones learn from runs that overlap, and must learn what the same runs teach one after the other.
What is wrong ends it with a message that says what, and exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import psutil

from agentmesh import Mesh
from agentmesh.communicator.kvcomm import KVComm
from agentmesh.communicator.slots import Slots
from agentmesh.config.mesh import ModelSpec
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.engine.loop import Engine, at_once
from agentmesh.engine.probe import probe
from agentmesh.errors import NodeError, RequestTooLongError, SharingError
from agentmesh.local import LocalBackend
from agentmesh.reasons import Reason
from agentmesh.results import RunResult

STUCK_SECONDS = 120.0
GROWTH_BYTES, LEGS_NEEDED = 32 * 2**20, 30
SHORT_SECONDS = 60.0  # nothing can be said of memory in so short a time
MANY = 1000  # questions: a tokenizer remembers new ones for long, which is no growth of the engine's
PLENTY = 100_000  # tokens of a budget in which nothing is evicted
WARM = 6
LESSON = 16  # runs from which a fresh mesh learns: those behind the eighth see what the first ones taught
WORDS = ("pears", "boxes", "seven", "how", "many", "left", "river", "each", "of", "them")
LEARNING = ("linear", "kvcomm")
REALIGNED = {Reason.READ_BEFORE, Reason.WRITTEN_BEFORE}
AGENTS = {
    "writer": {
        "system": "You are the writer of a small team that answers questions. " * 3,
        "prompt": "{{ question }}\nWrite.",
        "generate": {"max_tokens": 24, "temperature": 0.7},
    },
    "critic": {
        "system": "You are a critic. " * 6,
        "prompt": "{{ question }}\n{% for m in inbox %}\n{{ m }}\n{% endfor %}\nGo on.",
        "generate": {"max_tokens": 8},
        "memory": "conversation",
    },
    "judge": {
        "prompt": "{% for m in inbox %}\n{{ m }}\n{% endfor %}\nAbout {{ question }}",
        "generate": {"max_tokens": 16},
    },
}
TOPOLOGY = {
    "nodes": {"writer": {}, "critic": {}, "judge": {}},
    "edges": [
        {"from": "writer", "to": "critic"},
        {"from": "critic", "to": "writer", "when": "previous-round"},
        {"from": "writer", "to": "judge", "when": "last-round"},
        {"from": "critic", "to": "judge", "when": "last-round"},
    ],
    "rounds": 2,
    "output": "judge",
}


class SoakError(Exception):
    """Something is wrong: what was found, and what was expected."""


@dataclass(frozen=True)
class Plan:
    """What soaks.

    Attributes:
        model: its name.
        seconds: how long.
        seed: of everything that is drawn.
        concurrency: runs at once.
        deterministic: one sequence a forward, and every run compared with the same run alone; where memory is short for
            that, it must say so (``SharingError``, counted as ``short``).
        leg_seconds: how long one mesh runs before everything must be at rest.
    """

    model: str = "random:tiny-llama"
    seconds: float = 60.0
    seed: int = 0
    concurrency: int = 16
    deterministic: bool = False
    leg_seconds: float = 6.0


@dataclass(frozen=True)
class Job:
    """One run: its question, its seed, after how many seconds it is cancelled, and again while it ends."""

    question: str
    seed: int
    cancelled_after: float | None = None
    again_after: float | None = None


@dataclass
class Tally:
    """How runs ended, RSS after each leg, and the most KV since the last line: live, stored, beyond a budget; bytes."""

    ends: Counter[str] = field(default_factory=Counter)
    rss: list[int] = field(default_factory=list)
    live: int = 0
    stored: int = 0
    over: int = 0

    def line(self, seconds: float) -> str:
        """One line about all of it."""
        names = ("done", "cancelled", "refused", "short", "lessons")
        count = " ".join(f"{name} {self.ends[name]:,}" for name in names)
        most = f"most live {self.live / 2**20:.2f} MiB, most stored {self.stored / 2**20:.2f} MiB"
        return f"{seconds / 60:6.1f} min  {count}  RSS {self.rss[-1] / 2**20:,.0f} MiB, {most}"


class Rig:
    """One model with a mesh for each of some presets; budgets are in tokens' worth of KV."""

    def __init__(self, loaded: LoadedModel, *, deterministic: bool) -> None:
        support = probe(loaded.model, loaded.step)
        runner = support.runner
        assert isinstance(runner, ArenaRunner)
        self.engine = Engine(loaded, support, at_once(deterministic=deterministic))
        self._token = runner.shape.bytes_per_token
        self._exact = deterministic
        budgets = {"dense": 2500, "prefix": 3000, "linear": 6000}
        if not deterministic:
            budgets = {"prefix": 3000, "linear": 6000, "kvcomm": 8000, "epic": 4000, "blend": 5000}
        self.meshes = {preset: self._mesh(preset, tokens) for preset, tokens in budgets.items()}

    @contextmanager
    def fresh(self, preset: str) -> Iterator[Mesh]:
        """A mesh that has learned nothing, and has room for everything."""
        mesh = self._mesh(preset, PLENTY)
        try:
            yield mesh
        finally:
            mesh.close()

    def _mesh(self, preset: str, tokens: int) -> Mesh:
        about = {"preset": preset, "budget": tokens * self._token, "min_tokens": 4, "max_kl": 1e6, "audit": 0.1}
        about["anchors"] = {"gamma": 1.0}  # kvcomm shares what little there is to share
        backend = LocalBackend(self.engine, CommunicatorSpec(**about))
        run = {"concurrency": 256, "deterministic": self._exact}
        return Mesh(agents=AGENTS, topology=TOPOLOGY, model=backend, communicator=about, run=run)

    def warm(self) -> None:
        """Teach what learns, and freeze it: what runs give then depends on nothing before."""
        for preset, mesh in self.meshes.items():
            with self.fresh(preset) as teacher:
                for number in range(WARM):
                    teacher.run(question=f"How many pears are in {number} boxes?")
                taught = backend_of(mesh).communicator
                taught.adopt(backend_of(teacher).communicator)
                taught.freeze()


def backend_of(mesh: Mesh) -> LocalBackend:
    """The backend that a rig gave its mesh."""
    backend = mesh.load()
    assert isinstance(backend, LocalBackend)
    return backend


def question_of(draw: random.Random, longest: int) -> str:
    """A question: mostly short, sometimes long, seldom too long."""
    longer = draw.random()
    words = draw.randint(1, 40) if longer < 0.85 else draw.randint(100, 400) if longer < 0.97 else longest
    return " ".join(draw.choice(WORDS) for _ in range(words))


def jobs(draw: random.Random, longest: int, pool: int) -> Iterator[Job]:
    """Runs without end, with ``pool`` questions and seeds."""
    known = [(question_of(draw, longest), draw.randint(0, 99)) for _ in range(pool)]
    while True:
        question, seed = draw.choice(known)
        cancelled = draw.expovariate(4.0) if draw.random() < 0.3 else None
        yield Job(question, seed, cancelled, draw.expovariate(100.0) if draw.random() < 0.5 else None)


async def ended(mesh: Mesh, job: Job) -> RunResult | str:
    """A run's result, or that it was refused, or that memory was too short for a deterministic one.

    Raises:
        SoakError: it failed otherwise.
    """
    try:
        return await mesh.arun(question=job.question, seed=job.seed)
    except NodeError as error:
        if isinstance(error.__cause__, RequestTooLongError):
            return "refused"
        if isinstance(error.__cause__, SharingError):
            return "short"
        raise SoakError(f"a run failed: {error}") from error


async def outcome(mesh: Mesh, job: Job) -> tuple[str, ...]:
    """What a run says, node by node, or how else it ended; see ``ended``."""
    result = await ended(mesh, job)
    return (result,) if isinstance(result, str) else ("done", *(message.text for message in result.messages))


async def one(mesh: Mesh, job: Job, alone: Mapping[Job, tuple[str, ...]], tally: Tally) -> None:
    """One run from its start to its end, whichever it is.

    Raises:
        SoakError: it did not end, failed, or said something else than alone.
    """
    task = asyncio.ensure_future(outcome(mesh, job))
    done, _ = await asyncio.wait({task}, timeout=job.cancelled_after or STUCK_SECONDS)
    if not done and job.cancelled_after is not None:
        task.cancel()
        if job.again_after is not None:
            await asyncio.wait({task}, timeout=job.again_after)
            task.cancel()
        done, _ = await asyncio.wait({task}, timeout=STUCK_SECONDS)
    if not done:
        what = "of being cancelled" if job.cancelled_after is not None else "of its beginning"
        raise SoakError(f"a run is stuck: no end within {STUCK_SECONDS:g} s {what}; {job}")
    if task.cancelled():
        tally.ends["cancelled"] += 1
        return
    found = task.result()
    tally.ends[found[0]] += 1
    key = Job(job.question, job.seed)
    if alone and ("short",) not in (found, alone[key]) and found != alone[key]:
        about = f"preset {backend_of(mesh).preset}, seed {job.seed}, question of {len(job.question)} characters"
        raise SoakError(f"a run among others said {found}, alone it said {alone[key]} ({about})")


async def lesson(mesh: Mesh, lessons: Sequence[Job], overlapping: int) -> list[Any]:
    """What a fresh mesh says, places and realigns while it learns, run by run, or how one failed."""
    room = asyncio.Semaphore(overlapping)

    async def learn(job: Job) -> Any:
        async with room:
            result = await ended(mesh, job)
        if isinstance(result, str):
            return result
        rows = [[row.tokens for row in call.plan if row.reason in REALIGNED] for call in result.calls]
        return [message.text for message in result.messages], [call.placed_slots for call in result.calls], rows

    return await asyncio.gather(*map(learn, lessons))


def check_lesson(made: Rig, preset: str, work: Iterator[Job], plan: Plan, tally: Tally) -> None:
    """Let two fresh meshes learn from the same runs, overlapping and one after the other.

    Raises:
        SoakError: they do not say and place the same, or place nothing.
    """
    lessons, found = list(islice(work, LESSON)), []
    for overlapping in (plan.concurrency, 1):
        with made.fresh(preset) as mesh:
            found.append(asyncio.run(lesson(mesh, lessons, overlapping)))
    among, alone = found
    different = [number for number in range(LESSON) if among[number] != alone[number]]
    if different:
        first = different[0]
        raise SoakError(
            f"preset {preset} learned something else from runs that overlap: run {first} gave {among[first]}, and "
            f"{alone[first]} behind the others"
        )
    if not any(any(rows) for one in among if isinstance(one, tuple) for rows in one[2]):
        raise SoakError(f"preset {preset} realigned nothing in {LESSON} runs from which it learned")
    tally.ends["lessons"] += LESSON


async def leg(mesh: Mesh, work: Iterator[Job], alone: Mapping[Job, tuple[str, ...]], plan: Plan, tally: Tally) -> None:
    """Run one mesh for a while, as many runs at once as asked, and let all of them end."""
    until = time.monotonic() + plan.leg_seconds
    backend = backend_of(mesh)

    async def worker() -> None:
        while time.monotonic() < until:
            await one(mesh, next(work), alone, tally)

    def look() -> None:
        tally.live = max(tally.live, backend.engine.core.admission.live_bytes)
        tally.stored = max(tally.stored, backend.communicator.nbytes)
        budget = backend.communicator.budget
        tally.over = max(tally.over, budget.used - budget.limit)

    async def watch() -> None:
        while True:
            await backend.engine.do(look)
            await asyncio.sleep(0.05)

    await backend.engine.do(backend.engine.core.admission.drop_spare)  # another mesh's, whose budget may be larger
    watching = asyncio.ensure_future(watch())
    workers = [asyncio.ensure_future(worker()) for _ in range(plan.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in (*workers, watching):
            task.cancel()
        await asyncio.wait({*workers, watching})
    await backend.engine.do(lambda: None)  # what was submitted before, such as closing, is done then
    rest(mesh)
    if tally.over > 0:
        raise SoakError(f"preset {backend.preset} held {tally.over:,} bytes more than its budget")


def rest(mesh: Mesh) -> None:
    """Check that nothing is left of runs that have ended.

    Raises:
        SoakError: something is.
    """
    backend = backend_of(mesh)
    engine, preset = backend.engine, backend.communicator
    left: dict[str, Any] = {
        "live sequences": engine.core.live,
        "arenas in use": engine.core.admission.held,
        "waiting requests": engine.core.admission.waiting,
        "turns": mesh._turns._ends,
    }
    if isinstance(preset, Slots | KVComm):
        ledger = preset.learner.ledger if isinstance(preset, Slots) else preset.pools.ledger
        segments = preset.keeper.segments
        left |= {"readings": segments._kept, "lost contents": segments._lost}
        left |= {"open runs": ledger._active, "uncommitted runs": ledger._ended}
    found = {name: len(what) for name, what in left.items() if what}
    if found:
        raise SoakError(f"preset {backend.preset} is not at rest after its runs: {found}; expected none of them")


def held(process: psutil.Process) -> int:
    """Bytes that this process holds, without what was freed and only kept for later by the C library."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(process.memory_info().rss)


def check_growth(rss: list[int]) -> None:
    """Compare memory late with memory in the middle.

    Args:
        rss: bytes, one for each leg; nothing can be said of fewer than ``LEGS_NEEDED``.

    Raises:
        SoakError: it grows.
    """
    third = len(rss) // 3
    if len(rss) < LEGS_NEEDED:
        return
    middle, late = max(rss[third : 2 * third]), max(rss[2 * third :])
    if late - middle > max(GROWTH_BYTES, 0.03 * middle):
        sizes = [size // 2**20 for size in rss[:: max(1, len(rss) // 12)]]
        raise SoakError(f"memory grows, from {middle / 2**20:.0f} to {late / 2**20:.0f} MiB; MiB over time: {sizes}")


@contextmanager
def rig(plan: Plan, loaded: LoadedModel) -> Iterator[Rig]:
    """A rig, warm where it is deterministic, and closed at the end."""
    made = Rig(loaded, deterministic=plan.deterministic)
    try:
        if plan.deterministic:
            made.warm()
        yield made
    finally:
        made.engine.close()


def fill_words(loaded: LoadedModel, draw: random.Random) -> None:
    """Let the tokenizer remember as many words as it ever does, so that memory that grows later is not its own."""
    ids = range(3, loaded.tokenizer.vocab_size - 1)
    for _ in range(20_000):
        loaded.tokenizer.encode(loaded.tokenizer.decode(draw.choices(ids, k=60)), add_special_tokens=False)


def runs_alone(plan: Plan, loaded: LoadedModel, work: Iterator[Job]) -> dict[str, dict[Job, tuple[str, ...]]]:
    """What the questions give one after the other, under each preset."""
    questions = {Job(job.question, job.seed) for job, _ in zip(work, range(200), strict=False)}
    with rig(plan, loaded) as made:
        return {
            preset: {job: asyncio.run(outcome(mesh, job)) for job in questions} for preset, mesh in made.meshes.items()
        }


def soak(plan: Plan, report: float = 60.0) -> Tally:
    """Soak for a while.

    Args:
        plan: what, and how long.
        report: seconds between two printed lines.

    Raises:
        SoakError: a run is stuck, failed or said something else than alone; something is left; memory grows.
    """
    loaded = load(ModelSpec(name=plan.model))
    longest = int(loaded.max_context * 1.2)
    if plan.seconds > SHORT_SECONDS:
        fill_words(loaded, random.Random(plan.seed))
    pool = 16 if plan.deterministic else MANY  # few where each is also asked alone
    alone: dict[str, dict[Job, tuple[str, ...]]] = {}
    if plan.deterministic:
        alone = runs_alone(plan, loaded, jobs(random.Random(plan.seed), longest, pool))
    work, tally, process = jobs(random.Random(plan.seed), longest, pool), Tally(), psutil.Process()
    with rig(plan, loaded) as made:
        begun = shown = time.monotonic()
        told = False
        while time.monotonic() - begun < plan.seconds:
            for preset, mesh in made.meshes.items():
                if told:
                    tally.live = tally.stored = 0
                asyncio.run(leg(mesh, work, alone.get(preset, {}), plan, tally))
                tally.rss.append(held(process))
                told = time.monotonic() - shown > report
                if told:
                    shown = time.monotonic()
                    print(tally.line(shown - begun), flush=True)
            for preset in LEARNING if plan.deterministic else ():
                check_lesson(made, preset, work, plan, tally)
            check_growth(tally.rss)
    print(tally.line(time.monotonic() - begun), flush=True)
    if tally.ends["short"] > tally.ends["done"]:
        raise SoakError(f"memory was too short for most runs: {dict(tally.ends)}; expected it for some")
    return tally


def main() -> int:
    """Soak as the command line says; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--seed", type=int, default=0, help="of questions, seeds and cancellations (0)")
    parser.add_argument("--concurrency", type=int, default=16, help="runs at once (16)")
    parser.add_argument("--model", default="random:tiny-llama", help="a model's name (random:tiny-llama)")
    parser.add_argument("--deterministic", action="store_true", help="compare every run with the same run alone")
    given = parser.parse_args()
    plan = Plan(given.model, given.minutes * 60, given.seed, given.concurrency, deterministic=given.deterministic)
    try:
        tally = soak(plan)
    except SoakError as error:
        print(f"soak failed: {error}", file=sys.stderr)
        return 1
    print(f"soak passed: {sum(tally.ends.values()):,} runs, nothing left, memory flat")
    return 0


if __name__ == "__main__":
    sys.exit(main())
