"""A server of meshes whose agents, all or some of them, write with remote models."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from openai_double import endpoint
from serving import eventually, offered, serving

from agentmesh.config.load import load_mesh
from agentmesh.local import LocalBackend
from agentmesh.serve.app import Service
from agentmesh.serve.meshes import by_name, close, load_models

QUESTION = "How many pears are in both of the boxes? " * 8
MIXED = """
version: 1
name: {name}
model: random:tiny-llama
topology: {{use: chain, agents: 2}}
agents:
  agent.1: {{prompt: "{{{{ question }}}}", generate: {{max_tokens: 4}}}}
  agent.2:
    prompt: "{{{{ question }}}}\\n{{{{ inbox[0] }}}}"
    {model}
"""


def ask(url: str, mesh: str = "pair", *, stream: bool = False) -> object:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return client.chat.completions.create(
        model=mesh, messages=[{"role": "user", "content": QUESTION}], stream=stream, temperature=0.5, max_tokens=7
    )


def test_a_mesh_of_remote_agents_answers_and_counts_what_the_endpoint_had_cached() -> None:
    with endpoint("text:It is 7.") as double:
        model = {"remote": double.url, "name": "tiny", "body": {"cache_salt": "ours"}}
        meshes = offered(model)
        load_models(meshes)
        with serving(Service(meshes)) as served:
            whole = ask(served.url)
            pieces = list(ask(served.url, stream=True))  # type: ignore[call-overload]
            described = served.http.get("/api/meshes").json()["meshes"][0]
            bodies = [request["body"] for request in double.requests()]
        close(meshes)

    assert isinstance(whole, openai.types.chat.ChatCompletion)
    assert whole.choices[0].message.content == "It is 7."
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "It is 7."
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == len(QUESTION) // 4
    assert described["model"] == "tiny"
    assert [body["max_tokens"] for body in bodies] == [24, 7, 24, 7]
    assert [body["temperature"] for body in bodies] == [0.0, 0.5, 0.0, 0.5]


def test_what_an_endpoint_fails_at_is_no_failure_of_the_server_and_a_cancelled_run_leaves_it() -> None:
    with endpoint("busy:503", "hang") as double:
        meshes = offered({"remote": double.url, "name": "tiny", "retry": 0})
        load_models(meshes)
        with serving(Service(meshes)) as served:
            with pytest.raises(openai.APIStatusError) as failed:
                ask(served.url)
            run = served.start(QUESTION)
            eventually(lambda: len(double.requests()) == 2)
            served.http.delete(f"/api/runs/{run}")
            eventually(lambda: bool(double.requests()[1]["gone"]))
            assert served.row(run)["status"] == "cancelled"
            assert served.metric("agentmesh_num_requests_running") == 0
        close(meshes)

    assert failed.value.status_code == 502
    assert failed.value.body is not None
    assert failed.value.code == "endpoint_failed"


def test_meshes_of_one_local_model_share_it_whether_or_not_other_agents_are_remote(tmp_path: Path) -> None:
    with endpoint("text:It is 8.") as double:
        remote = f"model: {{remote: '{double.url}', name: tiny}}"
        for name, model in (("mixed", remote), ("local", "generate: {max_tokens: 4}")):
            (tmp_path / f"{name}.yaml").write_text(MIXED.format(name=name, model=model))
        meshes = by_name([load_mesh(tmp_path / f"{name}.yaml") for name in ("mixed", "local")])
        load_models(meshes)
        try:
            backends = [served.mesh.backend for served in meshes.values()]
            with serving(Service(meshes)) as served:
                answers = [ask(served.url, name) for name in meshes]
        finally:
            close(meshes)

    assert all(isinstance(backend, LocalBackend) for backend in backends)
    assert len({backend.engine for backend in backends if isinstance(backend, LocalBackend)}) == 1
    assert [isinstance(answer, openai.types.chat.ChatCompletion) for answer in answers] == [True, True]
    assert answers[0].choices[0].message.content == "It is 8."  # type: ignore[attr-defined]
