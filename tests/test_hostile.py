"""The sandbox and the scorer against programs that mean harm, in every way of containment that this machine allows."""

from __future__ import annotations

import asyncio
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hostile import KNOWN_LIMITS, PROGRAMS, Hostile

from agentmesh.sandbox import CodeResult, Limits, plans, run_code, runner
from agentmesh.sandbox.launch import OPEN_FOLDERS, Isolation, Plan
from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.base import Output
from agentmesh.suites.scorers.programs import CodeScorer

AT_ONCE = 4  # on two cores; with more, fork bombs hold up the supervisors of their neighbours
SLACK_SECONDS = 2.5
SECRET_NAME, SECRET = "HOSTILE_TEST_KEY", secrets.token_hex(12)
SAMPLE = Sample(
    id="add",
    question="Write `add(a, b)`.",
    entry_point="add",
    tests="def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(20, 30) == 50\n",
)
WRONG = "\nif 'add' not in globals():\n    def add(a, b):\n        return 0\n"


@dataclass(frozen=True)
class Found:
    """What one program did: run by itself, and as a solution."""

    result: CodeResult
    score: float
    peak_bytes: int
    left: list[str]


@dataclass(frozen=True)
class Place:
    """Where hostile programs run: a containment, and what of the caller they could reach."""

    plan: Plan
    canary: Path
    port: int
    token: str

    def fill(self, code: str) -> str:
        """A program's text for this place."""
        words = {"TOKEN": self.token, "CANARY": str(self.canary), "PORT": str(self.port), "SECRET_NAME": SECRET_NAME}
        for word, text in words.items():
            code = code.replace(word, text)
        return code


def apart(plan: Plan) -> bool:
    """Whether the caller's files and processes are not the code's own."""
    return plan.other_user or plan.view


def available() -> list[Plan]:
    """The first plan of each isolation that works here."""
    found: dict[Isolation, Plan] = {}
    for plan in plans._candidates():
        if plan.isolation not in found and plans._failure(plan) is None:
            found[plan.isolation] = plan
    return list(found.values())


def marked(token: str) -> list[psutil.Process]:
    """The processes of one run that live: by name, or by what stands in their command line."""
    found = []
    for entry in psutil.process_iter(["name", "cmdline", "status"]):
        named = entry.info["name"] == token or any(token in word for word in entry.info["cmdline"] or ())
        if named and entry.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(entry)
    return found


def litter(token: str) -> list[str]:
    """What a run left where every user may write."""
    folders = {*OPEN_FOLDERS, tempfile.gettempdir()}
    return [str(path) for folder in folders for path in Path(folder).glob(f"*{token}*")]


async def watched(token: str, peak: list[int]) -> None:
    """Note the memory that a run's processes hold together."""
    while True:
        total = 0
        for process in marked(token):
            with suppress(psutil.NoSuchProcess):
                memory = process.memory_info()
                total += memory.rss - memory.shared
        peak.append(total)
        await asyncio.sleep(0.02)


async def tried(place: Place, program: Hostile) -> Found:
    """Run one program by itself and as a solution."""
    mark = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{place.token}', 0, 0, 0); del ctypes\n"
    code, limits = place.fill(program.code), Limits(time_s=program.seconds, **program.limits)
    peak = [0]
    watch = asyncio.ensure_future(watched(place.token, peak)) if "memory_bytes" in program.limits else None
    result = await run_code(mark + code, limits)
    if watch is not None:
        watch.cancel()
    for _ in range(40):  # what was killed is listed until the kernel has cleared it away
        if not marked(place.token):
            break
        await asyncio.sleep(0.05)
    left = [*map(str, marked(place.token)), *litter(place.token)]
    scored = await CodeScorer(limits).score(SAMPLE, Output(f"```python\n{code}{WRONG}```", ()))
    return Found(result, scored.values["pass@1"], max(peak), left)


async def all_tried(places: dict[str, Place], plan: Plan) -> dict[str, Found]:
    """Every program in its place: some at a time, and alone what takes all that a user may have."""
    found = {}
    room = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> None:
        async with room:
            found[name] = await tried(places[name], PROGRAMS[name])

    may = [name for name, program in PROGRAMS.items() if apart(plan) or not program.needs_apart]
    alone = [name for name in may if PROGRAMS[name].alone and not plan.other_user]
    await asyncio.gather(*(one(name) for name in may if name not in alone))
    for name in alone:
        await one(name)
    return found


def a_canary(folder: Path) -> Path:
    """A folder of the caller with a file that only the caller may read."""
    folder.mkdir()
    kept = folder / "kept"
    kept.write_text(SECRET)
    kept.chmod(0o600)
    folder.chmod(0o755)
    return folder


def seen(folder: Path) -> list[tuple[str, int, int]]:
    """What of a folder must not change: names, modes, sizes."""
    return [(path.name, path.stat().st_mode, path.stat().st_size) for path in (folder, *sorted(folder.iterdir()))]


@pytest.fixture(scope="module", params=available(), ids=lambda plan: plan.isolation.name.lower())
def tries(request: pytest.FixtureRequest) -> Iterator[tuple[Plan, dict[str, Found], set[str]]]:
    """A plan, what each program did under it, and what it changed of the caller's."""
    plan: Plan = request.param
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base.chmod(0o755)
        patch.setenv(SECRET_NAME, SECRET)
        patch.setattr(runner, "choose_plan", lambda: plan)
        port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        places = {}
        for number, name in enumerate(PROGRAMS):
            token = f"hm{secrets.token_hex(6)}"
            canary = a_canary(base / f"canary-{number}")
            for address in (f"\0{token}-abstract", str(canary / "socket")):
                server = stack.enter_context(socket.socket(socket.AF_UNIX))
                server.bind(address)
                server.listen()
            places[name] = Place(plan, canary, port, token)
        before = {name: seen(place.canary) for name, place in places.items()}
        found = asyncio.run(all_tried(places, plan))
        changed = {
            name: f"{seen(place.canary)}" for name, place in places.items() if seen(place.canary) != before[name]
        }
        yield plan, found, changed


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_does_no_harm(tries: tuple[Plan, dict[str, Found], set[str]], name: str) -> None:
    plan, everything, changed = tries
    if name not in everything:
        pytest.skip("as the caller's own user, among the caller's own processes and files, this is not contained")
    program, found = PROGRAMS[name], everything[name]
    result, said = found.result, found.result.stdout + found.result.stderr

    lacking = not apart(plan) or (program.needs_namespaces and plan.isolation is Isolation.NONE)

    assert found.score == 0.0
    assert result.duration_s < program.seconds + SLACK_SECONDS
    assert found.left == []
    if apart(plan):
        assert name not in changed
        assert SECRET not in said
    assert len(result.stdout) <= Limits(**program.limits).output_bytes
    assert found.peak_bytes <= 4 * Limits(**program.limits).memory_bytes
    assert program.says is None or result.stdout == program.says or lacking, said
    assert program.ends is None or result.completed == program.ends, result


def test_a_right_solution_passes_the_same_tests() -> None:
    found = asyncio.run(CodeScorer().score(SAMPLE, Output("```python\ndef add(a, b):\n    return a + b\n```", ())))

    assert found.values["pass@1"] == 1.0


@pytest.mark.parametrize("name", KNOWN_LIMITS)
def test_what_tests_cannot_tell_from_a_right_solution(name: str) -> None:
    """Known limits of every scorer that runs tests beside the program; what mends one of them moves it to PROGRAMS."""
    found = asyncio.run(CodeScorer().score(SAMPLE, Output(f"```python\n{KNOWN_LIMITS[name]}\n```", ())))

    assert found.values["pass@1"] == 1.0
