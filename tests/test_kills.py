"""An evaluation that is killed at fifty moments of its life, and resumed each time."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from killing import killed
from small import TASK

from agentmesh.evaluate.report import Report, evaluate
from agentmesh.evaluate.subjects import Request

KILLS, SAMPLES, WARMUP = 50, 30, 4
MESH = """
version: 1
model: random:tiny-llama
topology:
  nodes: {writer: {}, reader: {}, gate: {}}
  edges: [{from: writer, to: reader}, {from: reader, to: gate}]
  output: gate
agents:
  writer: {prompt: "Answer {{ question }}", generate: {max_tokens: 12}}
  reader: {prompt: "Check {{ question }}\\n{{ inbox[0] }}\\nNow.", generate: {max_tokens: 12}}
  gate: {python: "gates:Gate"}
communicator: {preset: linear, min_tokens: 8, warmup: 2, max_kl: 100.0, cost_gate: false}
run: {deterministic: true, concurrency: 2}
"""
GATES = """
from pathlib import Path

from agentmesh import Agent

class Gate(Agent):
    async def act(self, turn):
        closed = Path(__file__).with_name("closed")
        if closed.exists() and any(f" {n} " in turn.inputs["question"].text for n in (9, 21)):
            raise RuntimeError("the gate is closed")
        return turn.inbox[-1].text
"""
TOO_LONG = "s17"


@pytest.fixture
def request_of(tmp_path: Path) -> dict[str, Any]:
    """An evaluation in which one sample always fails, and two fail while a file named ``closed`` is there."""
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK)
    lines = [
        {"id": f"s{n}", "question": f"How many are {n} and {n + 1} pears in two boxes?", "answer": str(2 * n + 1)}
        for n in range(WARMUP + SAMPLES)
    ]
    lines[int(TOO_LONG[1:])]["question"] = "pears " * 4000
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "mesh.yaml").write_text(MESH)
    (tmp_path / "gates.py").write_text(GATES)
    return {
        "mesh": str(tmp_path / "mesh.yaml"),
        "task": str(folder),
        "presets": ("dense", "linear"),
        "warmup": WARMUP,
        "runs_dir": tmp_path / "runs",
    }


def outcome(report: Report) -> list[tuple[Any, ...]]:
    """What may not depend on how often an evaluation was cut off."""
    rows = sorted(report.rows, key=lambda row: row.key)
    return [
        (
            *row.key,
            row.answer,
            row.scores,
            row.extracted,
            row.error,
            [(c.placed_realigned, c.computed) for c in row.calls],
        )
        for row in rows
    ]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a kill may have left half a line behind them."""
    text = (path / "samples.jsonl").read_bytes() if (path / "samples.jsonl").is_file() else b""
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def newest(runs: Path) -> Path | None:
    """The evaluation that was begun last, where it came far enough to be resumed."""
    made = [path for path in runs.glob("*") if (path / "manifest.json").is_file()]
    return max(made, key=lambda path: path.stat().st_ctime_ns, default=None)


def check(path: Path, report: Report, whole: Report) -> None:
    """Nothing is lost, nothing is there twice, and everything is as in the evaluation that nobody killed."""
    assert outcome(report) == outcome(whole)
    good = Counter((line["preset"], line["sample"]) for line in lines_of(path) if not line["error"])
    assert len(good) == 2 * (SAMPLES - 1)
    assert set(good.values()) == {1}
    assert report.results.presets["linear"].errors == 1
    figures = [
        {
            name: (one.metrics, one.calls, one.tokens_placed, one.tokens_computed, one.errors)
            for name, one in each.items()
        }
        for each in (report.results.presets, whole.results.presets)
    ]
    assert figures[0] == figures[1]
    assert report.results.paired == whole.results.paired
    assert not list(path.glob("*.part"))


def test_fifty_kills_change_nothing_in_what_an_evaluation_finds(
    request_of: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the server, which is started by the first attempt
    whole = evaluate(Request(**request_of))
    draw = random.Random(5)
    path: Path | None = None
    kills = finished = retried = 0
    learned, reached = set(), set()
    runs, closed = tmp_path / "killed", tmp_path / "closed"
    closed.touch()
    while kills < KILLS or path is not None:
        request = {**request_of, "runs_dir": runs, "resume": path}
        by_clock = draw.random() < 0.88
        last = kills >= KILLS
        if killed(
            request,
            runs,
            seconds=draw.uniform(0.05, 1.0) if by_clock and not last else None,
            operation=None if by_clock or last else draw.randint(1, 16),
        ):
            kills += 1
            path = newest(runs) if path is None else path
            if path is not None:
                reached.add(len(lines_of(path)))
                learned.add((path / "learned-linear.safetensors").is_file())
            continue
        path = newest(runs) if path is None else path
        assert path is not None
        failed = {line["sample"] for line in lines_of(path) if line["error"]}
        if closed.exists():
            retried += len(failed - {TOO_LONG})
            closed.unlink()
            continue  # what failed runs again
        check(path, evaluate(Request(**{**request_of, "resume": path})), whole)
        finished += 1
        runs, path = tmp_path / f"killed-{finished}", None
        closed.touch()

    print(f"{kills} kills of {finished} evaluations, at {len(reached)} different lengths of the journal")
    assert retried
    assert len(reached) > 12
    assert learned == {False, True}
