"""Runs on replicas under Ray: the same results as in one process, whatever dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from openai_double import endpoint
from small import MESH, TASK

from agentmesh.blueprint import draft
from agentmesh.cli import invoke
from agentmesh.config.load import load_mesh
from agentmesh.errors import InputError, NodeError, RequestTooLongError, UsageError
from agentmesh.evaluate import evaluate
from agentmesh.evaluate.report import Report
from agentmesh.executors import Course, cluster, replicas
from agentmesh.executors.host import Failure, Ready
from agentmesh.executors.local import LocalExecutor
from agentmesh.executors.replicas import RayExecutor, Seat

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")

WARMUP, SAMPLES = 6, 6
HURT = """
import os
from pathlib import Path

from agentmesh import Agent

class Hurt(Agent):
    async def act(self, turn):
        if " 9 and " in turn.inputs["question"].text:
            Path(__file__).with_name(f"died-{os.getpid()}").touch()
            os.kill(os.getpid(), 9)
        return turn.inbox[-1].text
"""


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    """Ray as an executor starts it, once for all tests here."""
    ours, _ = cluster.connected(2)
    yield ours
    ours.shutdown()


@pytest.fixture
def threads_of_a_replica() -> Iterator[None]:
    """One thread, as each of two replicas on two processors has; with another number some processors round apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def request_of(tmp_path: Path) -> dict[str, Any]:
    """An evaluation of twelve samples, of which one cannot be answered."""
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.yaml").write_text(TASK)
    lines = [
        {"id": f"s{n}", "question": f"How many are {n} and {n + 1} pears in two boxes?", "answer": str(2 * n + 1)}
        for n in range(WARMUP + SAMPLES)
    ]
    lines[-1]["question"] = "pears " * 4000
    (tmp_path / "task" / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "mesh.yaml").write_text(MESH)
    return {"mesh": tmp_path / "mesh.yaml", "task": tmp_path / "task", "warmup": WARMUP}


def found(report: Report) -> list[Any]:
    rows = sorted(report.rows, key=lambda row: row.key)
    return [(*r.key, r.answer, r.error, [(c.node, c.placed_realigned, c.computed) for c in r.calls]) for r in rows]


def lines_of(report: Report) -> Counter[tuple[str, str]]:
    """Rows of a journal that have an answer, by preset and sample."""
    rows = map(json.loads, (report.path / "samples.jsonl").read_text().splitlines())
    return Counter((row["preset"], row["sample"]) for row in rows if not row["error"])


def hosts() -> list[int]:
    """Processes of replicas."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if one.cmdline()[:1] and one.cmdline()[0].startswith("ray::Host"):
                found.append(one.pid)
    return found


@pytest.mark.timeout(600)  # a minute on an idle machine, five where others compute beside it
@pytest.mark.usefixtures("threads_of_a_replica")
def test_two_replicas_of_which_two_are_killed_find_what_one_process_finds(
    session: Any, request_of: dict[str, Any], tmp_path: Path
) -> None:
    presets = ("dense", "linear", "kvcomm")
    here = evaluate(**request_of, presets=presets, runs_dir=tmp_path / "here")
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        """Kill one replica while they learn, and one as soon as a sample under ``linear`` is done."""
        while not stop.is_set() and len(killed) < 2:
            texts = [path.read_text() for path in (tmp_path / "there").glob("*/samples.jsonl")]
            now = any('"preset":"linear"' in text for text in texts) if killed else any(texts)
            for one in hosts()[-1:] if now else ():
                os.kill(one, signal.SIGKILL)
                killed.append(one)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        there = evaluate(**request_of, presets=presets, runs_dir=tmp_path / "there", executor="ray", replicas=2)
    finally:
        stop.set()
        killer.join()

    assert len(killed) == 2
    assert found(there) == found(here)
    assert set(lines_of(there).values()) == {1}
    assert there.results.paired == here.results.paired
    assert there.results.presets["linear"].calls_shared > 0
    assert there.results.presets["linear"].errors == 1
    learned = [(report.path / "learned-linear.safetensors").read_bytes() for report in (here, there)]
    assert learned[0] == learned[1]
    assert json.loads((there.path / "manifest.json").read_text())["replicas"] == 2


def test_a_sample_that_always_kills_its_replica_fails_alone(
    session: Any, request_of: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "TRIES", 2)
    monkeypatch.setattr(replicas, "TOGETHER", 1)
    (tmp_path / "hurt.py").write_text(HURT)
    text = MESH.replace("{use: fully-connected, agents: 2}", "{use: fully-connected, agents: 3}")
    text = text.replace("communicator:", '  agent.3: {python: "hurt:Hurt"}\ncommunicator:')
    (tmp_path / "mesh.yaml").write_text(text.replace("[Solver, Checker]", "Solver"))

    report = evaluate(
        request_of["mesh"],
        request_of["task"],
        presets=["dense"],
        warmup=8,
        limit=2,
        runs_dir=tmp_path / "runs",
        executor="ray",
    )

    rows = {row.sample: row for row in report.rows}
    assert not rows["s8"].error
    assert "ReplicaError: 2 replicas died over it" in rows["s9"].error
    assert len(list(tmp_path.glob("died-*"))) == 2


def test_failures_travel_as_values_and_are_the_same_errors_again() -> None:
    node = Failure.of(NodeError("no", node="a", round_=2)).error()

    assert isinstance(node, NodeError)
    assert (str(node), node.node, node.round) == ("no", "a", 2)
    assert isinstance(Failure.of(RequestTooLongError("long")).error(), RequestTooLongError)
    assert str(Failure("Strange", "x").error()) == "Strange: x"


def test_runs_go_to_the_replica_with_the_least_to_do_and_a_suspect_has_one_to_itself(session: Any) -> None:
    async def order(*asked: tuple[bool, float]) -> tuple[list[int], list[int]]:
        """Where runs went that were asked for in order, alone or not, and took so long; and the loads they saw."""
        executor = RayExecutor(2)
        executor._seats = [Seat("first"), Seat("second")]
        executor.ready["mesh"] = Ready({}, 2)
        taken: list[int] = []
        loads: list[int] = []

        async def one(seconds: float, *, alone: bool) -> None:
            async with executor._seat("mesh", alone=alone) as seat:
                taken.append(executor._seats.index(seat))
                loads.append(seat.load)
                await asyncio.sleep(seconds)

        await asyncio.wait_for(asyncio.gather(*(one(seconds, alone=alone) for alone, seconds in asked)), 20)
        assert [seat.load for seat in executor._seats] == [0, 0]
        return taken, loads

    shared = asyncio.run(order((False, 0.5), (False, 0.02), (False, 0.5), (False, 0.02), (False, 0), (False, 0)))
    apart = asyncio.run(order((False, 0.05), (False, 0.5), (True, 0.01), (True, 0.01), (False, 0.01)))

    assert shared[0] == [0, 1, 0, 1, 1, 1]
    assert apart == ([0, 1, 0, 0, 1], [1, 1, 2, 2, 2])


def test_what_replicas_observe_adds_up_to_what_one_learns(request_of: dict[str, Any], tmp_path: Path) -> None:
    blueprint = draft(load_mesh(request_of["mesh"]))
    samples = [{"question": f"How many are {n} and {n} pears in all of the boxes?"} for n in range(5)]

    async def work() -> None:
        one, parts, other = LocalExecutor(), LocalExecutor(), LocalExecutor()
        await one.prepare("mesh", blueprint, Course(samples, tmp_path / "one"))
        found = [await parts.observe(blueprint, samples[:2]), await parts.observe(blueprint, samples[2:])]
        pupil = other.pupil(blueprint)
        for part in found:
            pupil.learn(part)
        pupil.save_realigners(tmp_path / "other", blueprint.digests)
        for executor in (one, parts, other):
            await executor.close()

    asyncio.run(work())

    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_run_on_a_replica_shows_its_events_keeps_its_record_and_fills_its_store(
    session: Any, request_of: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", str(request_of["mesh"]), "-i", "question=How many are 3 and 4 pears in the boxes?", "--runs-dir"]
    assert invoke([*line, str(tmp_path / "here"), "--format", "json"]) == 0
    here = capsys.readouterr()
    store = ["--store", str(tmp_path / "kv")]
    assert invoke([*line, str(tmp_path / "there"), "--format", "json", "--executor", "ray", *store]) == 0
    there = capsys.readouterr()
    assert invoke([*line, str(tmp_path / "later"), "--format", "json", *store, "--set", "run.deterministic=false"]) == 0
    later = capsys.readouterr()

    assert json.loads(there.out)["answer"] == json.loads(here.out)["answer"]
    assert "agent.2: wrote 24 tokens" in there.err
    types = [
        [json.loads(event)["type"] for event in next(folder.glob("*/events.jsonl")).read_text().splitlines()]
        for folder in (tmp_path / "here", tmp_path / "there")
    ]
    assert types[0] == types[1]
    placed = [sum(call["placed_exact"] for call in json.loads(run.out)["calls"]) for run in (here, there, later)]
    assert placed[0] == placed[1] < placed[2]
    assert invoke([*line, str(tmp_path), "--executor", "ray", "--profile"]) == 2


def test_ray_listens_on_loopback_alone_and_asks_for_a_token(session: Any) -> None:
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {
        connection.laddr.ip
        for process in ours
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_mesh_with_a_remote_model_is_evaluated_under_dense_alone(request_of: dict[str, Any], tmp_path: Path) -> None:
    with endpoint("text:#### 7") as double:
        (tmp_path / "mesh.yaml").write_text(
            MESH.replace("model: random:tiny-llama", f"model: {{remote: '{double.url}', name: tiny}}")
        )
        with pytest.raises(InputError, match="nothing but `dense` and `single` differs there"):
            evaluate(**request_of, runs_dir=tmp_path / "runs")
        report = evaluate(**request_of, presets=["dense", "single"], limit=3, runs_dir=tmp_path / "runs")

    assert {row.answer for row in report.rows} == {"#### 7"}
    assert report.results.model == "tiny"
    assert all(call.endpoint for row in report.rows for call in row.calls)


def test_without_ray_the_executor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(UsageError, match=r"pip install 'agentmesh-kv\[ray\]'"):
        RayExecutor(2)
