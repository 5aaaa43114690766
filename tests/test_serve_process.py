"""``agentmesh serve`` as a process, on a tiny real model: its end, its tenants, its shared engine, its spans."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import httpx
import pytest
from channel import measure
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving import PATIENCE_S, command, eventually, offered, serving

from agentmesh.cli import invoke
from agentmesh.config.load import load_mesh
from agentmesh.local import LocalBackend
from agentmesh.serve.app import Service
from agentmesh.serve.meshes import by_name, close, load_models
from agentmesh.serve.spans import Spans
from agentmesh.testing import ScriptedModel

MESH = """version: 1
model: random:tiny-llama
topology: {use: fully-connected, agents: 2}
agents:
  agent:
    system: You are a member of a team that answers questions shortly, and never guesses.
    prompt: |
      {{ question }}
      {% for message in inbox %}
      {{ message }}
      {% endfor %}
    generate: {max_tokens: 120}
communicator: {preset: prefix, min_tokens: 4}
"""
QUESTION = "How many pears are in seven boxes of nine pears each, when three of them are taken out of every box?"


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    path = tmp_path / "team.yaml"
    path.write_text(MESH)
    return path


def test_sigterm_lets_the_runs_at_work_end_and_takes_no_more(mesh: Path) -> None:
    with command(mesh) as (url, process), httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
        body = {"model": "team", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            alone = http.post("/api/meshes/team/runs", json={"inputs": {"question": QUESTION}}).json()["run"]
            process.send_signal(signal.SIGTERM)
            eventually(lambda: refused(url))
            text = list(lines)

        assert alone
        assert text[-2] == "data: [DONE]"
        assert process.wait(PATIENCE_S) == 0


def test_ctrl_c_cancels_runs_that_take_longer_than_the_drain(mesh: Path) -> None:
    slow = ["--set", "agents.agent.generate.max_tokens=3900", "--drain", "0.2"]
    with command(mesh, *slow) as (url, process), httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
        body = {"model": "team", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            text = [line for line in lines if line]

        assert json.loads(text[-1].removeprefix("data: "))["error"]["code"] == "run_cancelled"
        assert process.wait(PATIENCE_S) == 130


def refused(url: str) -> bool:
    """Whether nobody listens any more."""
    try:
        httpx.get(f"{url}/health")
    except httpx.HTTPError:
        return True
    return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "there are no API keys"),  # noqa: S104  # it is refused
        (["--keys", "nowhere"], "the keys cannot be read"),
        (["--port", "taken"], "try another --port"),
        (["team.yaml"], "two meshes are named 'team'"),
        (["nowhere.yaml"], "does not exist"),
        (["--max-runs", "0"], "--max-runs"),
    ],
)
def test_a_server_that_cannot_serve_says_why_and_loads_nothing(
    mesh: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(mesh.parent)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = invoke(["serve", "team.yaml", *(port if word == "taken" else word for word in arguments)])

    assert found == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_meshes_that_name_the_same_model_share_it(mesh: Path) -> None:
    other = mesh.with_name("other.yaml")
    other.write_text(MESH.replace("prefix", "linear"))
    meshes = by_name([load_mesh(mesh), load_mesh(other)])
    load_models(meshes)
    try:
        first, second = (served.mesh.backend for served in meshes.values())
        assert isinstance(first, LocalBackend)
        assert isinstance(second, LocalBackend)
        assert first.engine is second.engine
        assert (first.preset, second.preset) == ("prefix", "linear")
    finally:
        close(meshes)


def test_a_server_whose_models_thread_has_ended_is_not_ready(mesh: Path) -> None:
    meshes = by_name([load_mesh(mesh)])
    load_models(meshes)
    try:
        with serving(Service(meshes)) as served:
            before = served.http.get("/ready")
            backend = meshes["team"].mesh.backend
            assert isinstance(backend, LocalBackend)
            backend.engine.thread.close()
            after = served.http.get("/ready")

            assert (before.status_code, before.json()) == (200, {"status": "ready"})
            assert (after.status_code, after.json()) == (503, {"status": "broken", "meshes": ["team"]})
            assert served.http.get("/health").status_code == 200
    finally:
        close(meshes)


def test_a_tenants_question_gives_another_tenant_no_hit() -> None:
    found = {kind: [one.cached for one in asked] for kind, asked in measure("random:tiny-llama", 2, 30).items()}

    assert all(again > new + 30 for again, new in zip(found["ann, again"], found["ann, new"], strict=True))
    assert found["bob, ann's"] == found["ann, new"]
    assert max(found["bob, new"]) < min(found["ann, again"])


def test_runs_become_spans_without_texts_unless_they_are_asked_for() -> None:
    found = {}
    for content in (False, True):
        exporter = InMemorySpanExporter()
        spans = Spans(exporter, content=content)
        with serving(Service(offered(ScriptedModel(lambda _text: "It is 7.")), watchers=(spans,))) as served:
            run = served.start("What is 3 + 4?")
            eventually(lambda served=served, run=run: served.row(run)["status"] == "done")
        spans.close()
        found[content] = exporter.get_finished_spans()
    plain = {span.name: span for span in found[False]}
    whole = plain["invoke_workflow pair"]
    calls = [span for span in found[False] if span.name == "chat smollm2-135m"]

    assert len(found[False]) == 5
    assert {plain[f"invoke_agent agent.{n}"].parent.span_id for n in (1, 2)} == {whole.context.span_id}  # type: ignore[union-attr]
    assert {span.parent.span_id for span in calls if span.parent} == {
        plain[f"invoke_agent agent.{n}"].context.span_id for n in (1, 2)
    }
    assert (
        sum(span.attributes["gen_ai.usage.input_tokens"] for span in calls if span.attributes)
        == (whole.attributes or {})["gen_ai.usage.input_tokens"]
    )
    assert all(span.start_time <= span.end_time for span in found[False])
    assert "3 + 4" not in "".join(span.to_json() for span in found[False])
    assert "3 + 4" in "".join(span.to_json() for span in found[True] if span.name.startswith("chat"))
