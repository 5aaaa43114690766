"""Evaluations of meshes built in Python: from files, from networkx graphs, with roles of one's own, inside a test."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from agentmesh import Mesh, Turn, agent
from agentmesh.errors import InputError, UsageError
from agentmesh.evaluate import aevaluate, evaluate
from agentmesh.local import LocalBackend
from agentmesh.testing import ScriptedModel

READ = {
    "prompt": "{{ role }} reads\n{{ question }}\n{% for m in inbox %}\n{{ m }}\n{% endfor %}\nNow.",
    "generate": {"max_tokens": 12},
}
SETTINGS = {"preset": "linear", "min_tokens": 8, "warmup": 2, "max_kl": 100.0}


@agent
def cut(turn: Turn) -> str:
    """A role of the user's own: hands on the first half of what it reads."""
    return turn.inbox[-1].text[: len(turn.inbox[-1].text) // 2] + "7"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "task.yaml").write_text('version: 1\nkind: math\nfile: s.jsonl\nscorers: [gsm8k]\nuntil: ["Question:"]\n')
    lines = [{"id": f"s{n}", "question": f"How many are {n} and {n} pears in boxes?", "answer": "7"} for n in range(6)]
    (folder / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def a_mesh(**changes: Any) -> Mesh:
    values: dict[str, Any] = {
        "agents": {"solver": READ, "cut": cut, "writer": READ},
        "topology": nx.DiGraph([("solver", "cut"), ("cut", "writer"), ("solver", "writer")]),
        "model": "random:tiny-llama",
        "communicator": SETTINGS,
        "run": {"deterministic": True},
        "name": "own",
    }
    return Mesh(**{**values, **changes})


def test_a_mesh_with_a_graph_and_roles_of_ones_own_is_evaluated_like_a_file(task: Path, tmp_path: Path) -> None:
    report = evaluate(
        a_mesh(), task, limit=3, warmup=3, presets=["dense", "linear", "single"], runs_dir=tmp_path / "runs"
    )

    assert {name: one.n for name, one in report.results.presets.items()} == {"dense": 3, "linear": 3, "single": 3}
    assert report.results.presets["linear"].calls_shared > 0
    assert all("7" in m.text for row in report.rows for m in row.messages if m.node == "cut")
    assert (report.results.mesh, report.results.model) == ("own", "random:tiny-llama")
    written = (report.path / "mesh.yaml").read_text()
    assert "test_evaluate_mesh:cut" in written
    assert "Question:" in written
    assert (
        evaluate(a_mesh(), task, limit=3, warmup=3, presets=["dense", "linear", "single"], resume=report.path).results
        == report.results
    )


def test_a_mesh_object_gives_what_its_file_gives(task: Path, tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    agents = {"agent": READ}
    data = {"topology": {"use": "chain", "agents": 2}, "agents": agents, "communicator": SETTINGS}
    path.write_text(json.dumps({"version": 1, "model": "random:tiny-llama", **data, "run": {"deterministic": True}}))
    more: dict[str, Any] = {"task": task, "limit": 2, "warmup": 3, "runs_dir": tmp_path / "runs"}

    found = [
        evaluate(mesh, **more)
        for mesh in (path, Mesh.from_yaml(path), a_mesh(agents=agents, topology=data["topology"]))
    ]

    # rows come in the order in which their runs ended
    answers = [{row.key: (row.answer, row.scores) for row in report.rows} for report in found]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 4


def test_the_model_of_a_loaded_mesh_is_used_and_left_as_it_was(task: Path, tmp_path: Path) -> None:
    with a_mesh() as mesh:
        before = mesh.run(question="How many pears?")
        backend = mesh.backend
        assert isinstance(backend, LocalBackend)
        kept = backend.communicator.nbytes
        report = evaluate(mesh, task, limit=2, warmup=2, presets=["dense"], runs_dir=tmp_path / "runs")

        assert report.results.presets["dense"].n == 2
        assert mesh.backend is backend
        assert backend.communicator.nbytes == kept
        assert mesh.run(question="How many pears?").answer == before.answer


def test_a_scripted_model_cannot_be_evaluated_and_says_what_to_do(task: Path) -> None:
    with pytest.raises(InputError, match=r"mesh own was given a ScriptedModel.*by its name"):
        evaluate(a_mesh(model=ScriptedModel(lambda _: "7")), task)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"overrides": ["run.seed=1"]}, "overrides change entries of a mesh file"),
        ({"presets": ["lineer"]}, "Did you mean 'linear'"),
    ],
)
def test_what_an_object_cannot_do_is_refused_before_a_model_is_loaded(
    task: Path, changes: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmesh.engine.loop.load", None)

    with pytest.raises(InputError, match=found):
        evaluate(a_mesh(), task, **{"limit": 2, "warmup": 2, **changes})


def test_a_mesh_without_a_token_budget_has_no_single_agent_to_be_compared_with(task: Path) -> None:
    mesh = a_mesh(agents={"cut": agent(lambda turn: turn.question)}, topology={"nodes": {"cut": {}}, "output": "cut"})

    with pytest.raises(InputError, match="mesh own has none whose `max_tokens` is known"):
        evaluate(mesh, task, presets=["dense", "single"])


def test_where_an_event_loop_runs_the_async_way_works_and_the_other_names_it(task: Path, tmp_path: Path) -> None:
    async def notebook() -> float:
        with pytest.raises(UsageError, match=r"an event loop is running here already; use `await .*aevaluate"):
            evaluate(a_mesh(), task)
        with pytest.raises(UsageError, match="to_thread"):
            a_mesh().ingest()
        report = await aevaluate(a_mesh(), task, limit=2, warmup=2, presets=["dense"], runs_dir=tmp_path / "runs")
        return report.score("dense")

    assert 0 <= asyncio.run(notebook()) <= 1


USERS_TEST = """
import networkx as nx
from agentmesh import Mesh, agent
from agentmesh.evaluate import evaluate

@agent
def seven(turn):
    return "The answer is 7"

def test_my_mesh_is_good(tmp_path):
    graph = nx.DiGraph([("solver", "seven")])
    solver = {"prompt": "{{ question }}", "generate": {"max_tokens": 4}}
    mesh = Mesh(agents={"solver": solver, "seven": seven}, topology=graph, model="random:tiny-llama")
    report = evaluate(mesh, task=TASK, limit=2, warmup=0, presets=["dense"], runs_dir=tmp_path)
    report.assert_score_at_least(1.0, preset="dense")
    report.assert_score_at_least(LEAST, preset="dense", metric="strict")
"""


@pytest.mark.parametrize(("least", "status", "said"), [("1.0", 0, "1 passed"), ("1.5", 1, "dense scores 1.000 in")])
def test_an_evaluation_is_of_use_in_a_users_own_tests(
    task: Path, tmp_path: Path, least: str, status: int, said: str
) -> None:
    code = USERS_TEST.replace("TASK", repr(str(task))).replace("LEAST", least)
    (tmp_path / "test_mine.py").write_text(code)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_mine.py")]

    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == status
    assert said in done.stdout
