"""A server as its clients see it: OpenAI's own client, native runs, and what happens when somebody goes away."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import PATIENCE_S, HeldModel, InThread, events_of, eventually, offered, serving

from agentmesh.errors import InputError
from agentmesh.events import TokenText
from agentmesh.serve.app import Service
from agentmesh.serve.asked import Unheard
from agentmesh.serve.guard import Guard
from agentmesh.serve.keys import Keys, read_keys
from agentmesh.serve.limits import Gate, Limits
from agentmesh.serve.meshes import Served
from agentmesh.serve.openai import Words, before_stop
from agentmesh.serve.problems import RefusedError
from agentmesh.serve.server import Punctual
from agentmesh.testing import ScriptedModel

KEYS = "ann key-of-ann-0123456789, bob key-of-bob-0123456789, metrics key-of-metrics-0123"
ASK: dict[str, Any] = {"model": "pair", "messages": [{"role": "user", "content": "What is 3 + 4?"}]}


def words(text: str) -> str:
    return "  It is 7.\n" if "<|im_start|>user\nWhat" in text else "Fine."


def client(served: InThread, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[InThread, ScriptedModel]]:
    """A server of one scripted mesh."""
    model = ScriptedModel(words)
    with serving(Service(offered(model))) as served:
        yield served, model


@pytest.fixture
def held() -> Iterator[tuple[InThread, HeldModel]]:
    """A server whose model answers when it may."""
    model = HeldModel(words)
    limits = Limits(runs=2, queue=1, tenant_runs=3, wait_s=30, run_s=30, beat_s=0.05, body_bytes=2000, body_s=0.5)
    with serving(Service(offered(model), limits=limits)) as served:
        yield served, model
        model.go.set()


def test_openais_client_gets_models_an_answer_and_usage(pair: tuple[InThread, ScriptedModel]) -> None:
    served, _ = pair
    ask = client(served)

    answer = ask.chat.completions.create(**ASK)

    assert [model.id for model in ask.models.list()] == ["pair"]
    assert ask.models.retrieve("pair").owned_by == "agentmesh"
    assert answer.choices[0].message.content == "It is 7."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "pair"
    row = served.row(answer.id.replace("chatcmpl-", "run-"))
    assert row["answer"] == "It is 7."
    assert row["inputs"] == {"question": "What is 3 + 4?"}
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == row["tokens_computed"]
    assert usage.completion_tokens == 2 * len(words("<|im_start|>user\nWhat"))
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens // 2
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_is_the_same_answer_in_pieces_and_ends_with_usage_where_asked(
    pair: tuple[InThread, ScriptedModel],
) -> None:
    ask = client(pair[0]).chat.completions

    plain = list(ask.create(**ASK, stream=True))
    counted = list(ask.create(**ASK, stream=True, stream_options={"include_usage": True}))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in plain) == "It is 7."
    assert plain[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in plain[-2:]] == [None, "stop"]
    assert all(chunk.usage is None for chunk in (*plain, *counted[:-1]))
    assert counted[-1].choices == []
    assert counted[-1].usage is not None
    assert counted[-1].usage.total_tokens == ask.create(**ASK).usage.total_tokens  # type: ignore[union-attr]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("changes", "error", "code", "message"),
    [
        ({"model": "pear"}, openai.NotFoundError, "model_not_found", "Did you mean 'pair'"),
        ({"n": 2}, openai.BadRequestError, "unsupported_parameter", "cannot heed 'n'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, None, "'tools'"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, None, "'response_format'"),
        ({"stop": list("abcde")}, openai.BadRequestError, None, "at most 4"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, None, "'stream_options'"),
        ({"max_tokens": 0}, openai.BadRequestError, None, "max_tokens: Input should be greater"),
        ({"temperature": "hot"}, openai.BadRequestError, None, "temperature"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "unknown_parameter", "Did you mean 'temperature'"),
        ({"extra_body": {"inputs": {"qestion": "x"}}}, openai.BadRequestError, "invalid_input", "no input 'qestion'"),
        ({"extra_body": {"inputs": {"question": "x"}}}, openai.BadRequestError, None, "given twice"),
        ({"messages": []}, openai.BadRequestError, None, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, openai.BadRequestError, None, "the assistant's"),
        ({"messages": [{"role": "user", "content": " "}]}, openai.BadRequestError, "invalid_input", "is empty"),
        (
            {"messages": [{"role": "system", "content": "Be kind."}, *ASK["messages"]]},
            openai.BadRequestError,
            "unsupported_messages",
            "no input for system messages",
        ),
        (
            {"messages": [*ASK["messages"], {"role": "assistant", "content": "7"}, *ASK["messages"]]},
            openai.BadRequestError,
            "unsupported_messages",
            "no input for earlier messages",
        ),
        (
            {"messages": [*ASK["messages"], {"role": "assistant", "tool_calls": [CALL]}, *ASK["messages"]]},
            openai.BadRequestError,
            "unsupported_messages",
            "message 2 calls a tool",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            openai.BadRequestError,
            None,
            "messages",
        ),
    ],
)
def test_what_a_mesh_cannot_heed_is_refused_by_name(
    pair: tuple[InThread, ScriptedModel],
    changes: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str | None,
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        client(pair[0]).chat.completions.create(**{**ASK, **changes})

    assert message in caught.value.message
    assert code is None or caught.value.code == code
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "invalid_request_error"


def test_parameters_that_change_nothing_are_accepted(pair: tuple[InThread, ScriptedModel]) -> None:
    text = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]}]
    changes = {"user": "ann", "n": 1, "presence_penalty": 0, "tools": [], "metadata": {"a": "b"}, "messages": text}

    answer = client(pair[0]).chat.completions.create(**{**ASK, **changes})

    assert answer.choices[0].message.content == "It is 7."
    assert pair[1].calls[-2].text.count("What is it?") == 1


def test_a_request_changes_the_answers_settings_within_the_meshs_own(pair: tuple[InThread, ScriptedModel]) -> None:
    served, model = pair

    client(served).chat.completions.create(
        **ASK, max_completion_tokens=5, max_tokens=9, temperature=0.5, top_p=0.9, stop=["\n"], seed=3
    )
    inner, last = model.calls[-2:]
    client(served).chat.completions.create(**ASK, max_tokens=1000)

    assert (inner.generate.max_tokens, inner.generate.temperature, inner.generate.stop) == (24, 0.0, ())
    assert (last.generate.max_tokens, last.generate.temperature, last.generate.top_p) == (5, 0.5, 0.9)
    assert last.generate.stop == ("\n",)
    assert model.calls[-1].generate.max_tokens == 20
    assert model.calls[-1].seed != last.seed


def test_earlier_and_system_messages_go_to_inputs_of_those_names() -> None:
    agents = {"node": {"prompt": "{{ system }}\n{{ history }}\n{{ question }}\n{{ context }}"}}
    inputs = {"question": None, "system": "none", "history": "none", "context": None}
    model = ScriptedModel(lambda _text: "Yes.")
    meshes = offered(model, "reader", agents=agents, inputs=inputs, topology={"nodes": {"node": {}}, "output": "node"})
    before = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    messages = [{"role": "developer", "content": "Be kind."}, *before, {"role": "user", "content": "Three?"}]
    with serving(Service(meshes)) as served:
        ask = client(served).chat.completions
        ask.create(model="reader", messages=messages, extra_body={"inputs": {"context": "Four."}})  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError, match="give context in the field `inputs`"):
            ask.create(model="reader", messages=messages)  # type: ignore[arg-type]

    text = model.calls[0].text
    assert "Be kind.\nuser: One?\n\nassistant: Two.\nThree?\nFour." in text


def test_a_server_may_drop_messages_and_says_so() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *ASK["messages"]]
    with serving(Service(offered(ScriptedModel(words)), unheard=Unheard.DROP)) as served:
        answer = client(served).chat.completions.with_raw_response.create(model="pair", messages=messages)

    assert answer.headers["x-agentmesh-dropped"] == "system"
    assert answer.parse().choices[0].message.content == "It is 7."


def test_a_failed_run_is_a_server_error_that_clients_do_not_try_again() -> None:
    model = ScriptedModel([ValueError("no luck"), "Fine.", ValueError("no luck")])
    with serving(Service(offered(model))) as served:
        with pytest.raises(
            openai.InternalServerError, match=r"agent\.1 \(round 0\) failed: ValueError: no luck"
        ) as one:
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="none").chat.completions.create(**ASK)
        assert one.value.response.headers["x-should-retry"] == "false"
        assert len(model.calls) == 1

        stream = client(served).chat.completions.create(**ASK, stream=True)  # fails when it has begun
        with pytest.raises(openai.APIError, match=r"agent\.2"):
            list(stream)
        assert [row["status"] for row in served.http.get("/api/runs").json()["runs"]] == ["failed", "failed"]


def test_an_answer_that_a_retry_might_change_is_sent_when_it_is_done() -> None:
    agents = {"node": {"prompt": "{{ question }}", "retry": 1}}
    alone = {"nodes": {"node": {}}, "output": "node"}
    model = ScriptedModel([ValueError("no luck"), "Well."])
    with serving(Service(offered(model, agents=agents, topology=alone))) as served:
        chunks = list(client(served).chat.completions.create(**ASK, stream=True))

    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Well.", None]


def test_a_client_that_goes_away_frees_its_slot(held: tuple[InThread, HeldModel]) -> None:
    served, model = held
    for stream in (False, True):
        before = model.cancelled
        with pytest.raises(httpx.ReadTimeout):
            served.http.post("/v1/chat/completions", json={**ASK, "stream": stream}, timeout=0.3)
        eventually(lambda before=before: model.cancelled == before + 1)
    model.go.set()
    with served.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer:
        next(answer.iter_lines())
    eventually(lambda: served.metric("agentmesh_num_requests_running") == 0)

    assert [run["status"] for run in served.http.get("/api/runs").json()["runs"]][1:] == ["cancelled", "cancelled"]
    assert client(served).chat.completions.create(**ASK).choices[0].message.content == "It is 7."


def test_more_than_a_server_takes_on_is_refused_with_a_time_to_come_back(held: tuple[InThread, HeldModel]) -> None:
    served, model = held
    runs = [served.start() for _ in range(3)]  # two at work, one waits

    with pytest.raises(openai.RateLimitError) as caught:
        client(served).chat.completions.create(**ASK)
    native = served.http.post("/api/meshes/pair/runs", json={"inputs": {"question": "x"}})
    assert served.metric("agentmesh_num_requests_running") == 2
    assert served.metric("agentmesh_num_requests_waiting") == 1
    model.go.set()
    eventually(lambda: all(served.row(run)["status"] == "done" for run in runs))

    assert caught.value.code == "overloaded"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert native.status_code == 429
    assert int(native.headers["retry-after"]) >= 1
    assert served.metric("agentmesh_http_responses_total") > 3


def test_runs_that_wait_or_take_too_long_are_given_up() -> None:
    model = HeldModel(words)
    limits = Limits(runs=1, wait_s=0.2, run_s=0.8)
    with serving(Service(offered(model), limits=limits)) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(client(served).chat.completions.create, **ASK)
        eventually(lambda: model.begun == 1)
        with pytest.raises(openai.RateLimitError, match=r"waited 0\.2 s for its turn"):
            client(served).chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.InternalServerError, match=r"limit of 0\.8 s") as late:
            first.result()

        assert late.value.status_code == 504
        assert model.cancelled == 1
        assert served.metric("agentmesh_num_requests_running") == 0


def test_bodies_that_are_too_long_or_too_slow_are_refused(held: tuple[InThread, HeldModel]) -> None:
    served, _ = held

    def slowly() -> Iterator[bytes]:
        yield b'{"inputs": '
        threading.Event().wait(1.0)
        yield b"{}}"

    json_type = {"Content-Type": "application/json"}
    path = "/api/meshes/pair/runs"
    long = served.http.post(path, json={"inputs": {"question": "x" * 3000}})
    slow = served.http.post(path, content=slowly(), headers=json_type)
    deep = served.http.post(path, content=b"[" * 1900, headers=json_type)
    form = served.http.post(path, content=b"{}", headers={"Content-Type": "text/plain"})

    assert [answer.status_code for answer in (long, slow, deep, form)] == [413, 408, 400, 415]
    assert all(answer.json()["error"]["message"] for answer in (long, slow, deep, form))


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nHost: "])
def test_a_connection_on_which_no_request_comes_is_closed(head: bytes) -> None:
    with serving(Service(offered(ScriptedModel(words))), http=Punctual, timeout_keep_alive=1) as served:
        place = served.http.base_url
        with socket.create_connection((place.host, place.port), PATIENCE_S) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" if head else b"")
            answered = raw.recv(4096) if head else b""
            raw.sendall(head)
            until = time.monotonic() + PATIENCE_S / 2
            while raw.recv(4096):
                assert time.monotonic() < until

        assert (b"200 OK" in answered) == bool(head)
        assert served.http.get("/health").status_code == 200


def test_inputs_of_too_many_tokens_are_refused() -> None:
    with (
        serving(Service(offered(ScriptedModel(words)), limits=Limits(input_tokens=10))) as served,
        pytest.raises(openai.BadRequestError, match="14 tokens; this server takes at most 10") as caught,
    ):
        client(served).chat.completions.create(**ASK)

    assert caught.value.code == "context_length_exceeded"


def test_a_native_run_goes_on_alone_and_its_events_replay_from_anywhere(pair: tuple[InThread, ScriptedModel]) -> None:
    served, _ = pair
    run = served.start()
    eventually(lambda: served.row(run)["status"] == "done")

    def events(headers: dict[str, str]) -> list[tuple[str, dict[str, Any], str]]:
        with served.http.stream("GET", f"/api/runs/{run}/events", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            return list(events_of(answer.iter_lines()))

    whole = events({})
    later = events({"Last-Event-ID": whole[3][2]})

    kinds = [kind for kind, _, _ in whole]
    assert kinds[0] == "run.started"
    assert kinds[-2:] == ["run.finished", "end"]
    assert kinds.count("node.finished") == kinds.count("model.finished") == 2
    assert [data["seq"] for _, data, number in whole[:-1]] == [int(number) for _, _, number in whole[:-1]]
    assert all(data["type"] == kind for kind, data, _ in whole[:-1])
    assert whole[-1][1] == {"status": "done"}
    assert later == whole[4:]
    listed = served.http.get("/api/runs").json()["runs"][0]
    numbers = {"calls", "calls_shared", "tokens_placed", "tokens_computed"}
    assert set(listed) == {"run", "mesh", "status", "begun", "wall_s", "answer", "error"} | numbers
    assert (listed["run"], listed["calls"], listed["answer"]) == (run, 2, "It is 7.")


def test_events_come_live_with_signs_of_life_and_a_run_can_be_cancelled(held: tuple[InThread, HeldModel]) -> None:
    served, model = held
    run = served.start()
    kinds, lines = [], []
    with served.http.stream("GET", f"/api/runs/{run}/events") as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if line == ": still there" and lines.count(line) == 2:
                assert served.http.delete(f"/api/runs/{run}").status_code == 202
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))

    assert kinds == ["run.started", "node.started", "model.started", "run.cancelled", "end"]
    assert served.row(run)["status"] == "cancelled"
    assert model.cancelled == 1
    assert served.http.get("/api/runs/nobody/events").status_code == 404


def test_the_history_is_bounded() -> None:
    with serving(Service(offered(ScriptedModel(words)), limits=Limits(history=3))) as served:
        runs = []
        for _ in range(5):
            runs.append(served.start())
            eventually(lambda: served.http.get("/api/runs").json()["runs"][0]["status"] == "done")
        kept = [row["run"] for row in served.http.get("/api/runs").json()["runs"]]

        assert kept == runs[:1:-1]
        assert served.http.get(f"/api/runs/{runs[0]}").status_code == 404


def test_meshes_are_described_with_their_graphs(pair: tuple[InThread, ScriptedModel]) -> None:
    (mesh,) = pair[0].http.get("/api/meshes").json()["meshes"]

    assert set(mesh) == {"name", "about", "model", "preset", "inputs", "defaults", "graph"}
    assert mesh["inputs"] == ["question"]
    assert [node["name"] for node in mesh["graph"]["nodes"]] == ["agent.1", "agent.2"]
    assert mesh["graph"]["output"] == "agent.2"


def test_keys_decide_whose_runs_one_sees() -> None:
    keys = read_keys(None, KEYS)
    with serving(Service(offered(ScriptedModel(words)), keys)) as served:
        ann, bob = client(served, "key-of-ann-0123456789"), client(served, "key-of-bob-0123456789")
        run = ann.chat.completions.create(**ASK).id.replace("chatcmpl-", "run-")
        as_ann, as_bob = ({"Authorization": f"Bearer {key.api_key}"} for key in (ann, bob))
        as_metrics = {"Authorization": "Bearer key-of-metrics-0123"}

        with pytest.raises(openai.AuthenticationError):
            client(served, "guess").models.list()
        found = [
            served.http.get(f"/api/runs/{run}{tail}", headers=who).status_code
            for who in (as_ann, as_bob)
            for tail in ("", "/events")
        ]
        assert found == [200, 200, 404, 404]
        assert served.http.delete(f"/api/runs/{run}", headers=as_bob).status_code == 404
        assert served.http.get("/api/runs", headers=as_bob).json() == {"runs": []}
        assert [served.http.get("/metrics", headers=who).status_code for who in ({}, as_ann, as_metrics)] == [
            401,
            401,
            200,
        ]
        assert served.http.get("/api/runs", headers=as_metrics).status_code == 401
        assert served.http.get("/health").status_code == served.http.get("/ready").status_code == 200
        assert "ann" not in served.http.get("/metrics", headers=as_metrics).text


def test_without_keys_a_server_answers_to_this_machines_names_only(pair: tuple[InThread, ScriptedModel]) -> None:
    for host, status in (
        ("localhost:1", 200),
        ("[::1]:1", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
    ):
        assert pair[0].http.get("/api/meshes", headers={"Host": host}).status_code == status


def test_every_answer_forbids_what_comes_from_elsewhere(pair: tuple[InThread, ScriptedModel]) -> None:
    http = pair[0].http

    for path in ("/health", "/nowhere", "/api/meshes", "/page/..%2fapp.py", "/page/nothing.js"):
        answer = http.get(path)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert http.get("/page/nothing.js").json()["error"]["message"].startswith("no file 'nothing.js' of the live page")
    assert http.get("/page/..%2fapp.py").status_code == 404
    assert http.get("/nowhere").json()["error"]["message"] == "GET /nowhere: Not Found"


def test_metrics_count_what_runs_did() -> None:
    with serving(Service(offered(ScriptedModel(words)))) as served:
        answer = client(served).chat.completions.create(**ASK)
        served.http.get("/nowhere")
        text = served.http.get("/metrics").text

    assert answer.usage is not None
    assert f'agentmesh_prompt_tokens_total{{model_name="pair"}} {float(answer.usage.prompt_tokens)}' in text
    assert f'agentmesh_generation_tokens_total{{model_name="pair"}} {float(answer.usage.completion_tokens)}' in text
    assert 'agentmesh_requests_total{model_name="pair",status="done"} 1.0' in text
    assert 'agentmesh_time_to_first_token_seconds_count{model_name="pair"} 1.0' in text
    assert 'agentmesh_call_time_to_first_token_seconds_count{model_name="pair"} 2.0' in text
    assert 'agentmesh_http_responses_total{status="404"} 1.0' in text
    assert "process_resident_memory_bytes" in text


def test_slots_go_to_the_tenant_with_the_fewest_runs_at_work_and_in_order_among_those() -> None:
    gate = Gate(Limits(runs=2, queue=9, tenant_runs=4))
    ann = [gate.claim("ann") for _ in range(4)]
    bob = gate.claim("bob")
    with pytest.raises(RefusedError, match="4 runs of yours"):
        gate.claim("ann")
    assert [ticket.at_work for ticket in (*ann, bob)] == [True, True, False, False, False]

    gate.close(ann[0], 1.0)
    assert [ticket.at_work for ticket in (*ann[2:], bob)] == [False, False, True]
    gate.close(bob, 1.0)
    assert [ticket.at_work for ticket in ann[2:]] == [True, False]
    for ticket in ann[1:]:
        gate.close(ticket, 1.0)

    assert (gate.at_work, gate.waiting) == (0, 0)


def test_keys_are_read_from_lines_and_never_shown(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    digest = "sha256:5a1f2c9c2a4d7f7c3d7e1cf6b0a6b1d8d5d6cd0f2d5c2a0e3f2b9f1e8d7c6b5a"
    file.write_text(f"# ours\nann  key-of-ann-0123456789   # her laptop\n\nbob {digest}\n")

    keys = read_keys(file, "cleo key-of-cleo-0123456789")

    assert keys.tenant("Bearer key-of-ann-0123456789") == "ann"
    assert keys.tenant("bearer key-of-cleo-0123456789") == "cleo"
    assert keys.tenant("Basic key-of-ann-0123456789") is None
    assert keys.tenant("") is None
    assert sorted(keys.tenants.values()) == ["ann", "bob", "cleo"]
    assert not Keys()
    for wrong in ("ann", "ann short", "ann/x key-of-ann-0123456789", "ann key-of-ann-0123456789 more"):
        file.write_text(wrong)
        with pytest.raises(Exception, match=r"keys:1: ") as caught:
            read_keys(file, None)
        assert "key-of" not in str(caught.value)
    for wrong, why in (
        ("# none yet\n", "holds no key"),
        ("ann key-of-both-01234567\nbob key-of-both-01234567", "ann, too"),
    ):
        file.write_text(wrong)
        with pytest.raises(InputError, match=why) as caught:
            read_keys(file, None)
        assert "key-of" not in str(caught.value)


def test_a_client_that_reads_nothing_loses_its_answer() -> None:
    over = []

    async def answers(_scope: Any, _receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        finally:
            over.append(True)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_message: Any) -> None:
        await asyncio.Event().wait()

    guard = Guard(answers, Keys(), Limits(stall_s=0.05), lambda _status: None)
    scope = {"type": "http", "method": "GET", "path": "/health", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, receive, send))

    assert over == [True]


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(pair: tuple[InThread, ScriptedModel]) -> None:
    ask = client(pair[0]).chat.completions

    for stop, answer in (("is 7", "It"), (["7.\n", "x"], "It is"), ("\n", "It is 7."), ("It", "")):
        whole = ask.create(**ASK, stop=stop)
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask.create(**ASK, stop=stop, stream=True)]
        assert (whole.choices[0].message.content, "".join(pieces)) == (answer, answer)


def test_each_chunk_of_a_stream_with_usage_has_the_field(pair: tuple[InThread, ScriptedModel]) -> None:
    counted = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    texts = [pair[0].http.post("/v1/chat/completions", json=asked).text for asked in (counted, {**ASK, "stream": True})]
    chunks, plain = ([json.loads(line[6:]) for line in text.split("\n\n") if "{" in line] for text in texts)

    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert not any("usage" in chunk for chunk in plain)


def test_halves_of_characters_are_refused_and_do_not_break_the_answer(pair: tuple[InThread, ScriptedModel]) -> None:
    for changes in ({"\ud800": 1}, {"inputs": {"\ud800": 7}}, {"model": "\ud800"}, {"inputs": {"\ud800": "x"}}):
        content = json.dumps({**ASK, **changes}).encode()
        answer = pair[0].http.post(
            "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["message"]


def test_a_full_server_refuses_before_it_counts_tokens(
    held: tuple[InThread, HeldModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, model = held
    runs = [served.start() for _ in range(3)]
    counted = []
    monkeypatch.setattr(Served, "complete", lambda *_: counted.append(True))

    answer = served.http.post("/api/meshes/pair/runs", json={"inputs": {"question": "What?"}})
    assert (answer.status_code, counted) == (429, [])
    model.go.set()
    eventually(lambda: all(served.row(run)["status"] == "done" for run in runs))


def test_a_refused_input_gives_its_slot_back(pair: tuple[InThread, ScriptedModel]) -> None:
    for _ in range(90):  # more than wait and work together
        assert pair[0].http.post("/api/meshes/pair/runs", json={"inputs": {"qestion": "x"}}).status_code == 400
    assert pair[0].metric("agentmesh_num_requests_running") == 0
    pair[0].start()


@given(
    st.text(alphabet="ab \n", min_size=1).filter(str.strip),
    st.lists(st.integers(0, 12)),
    st.lists(st.text("ab ", min_size=1), max_size=2),
)
def test_the_pieces_of_a_stream_are_the_answer_however_it_is_cut(text: str, cuts: list[int], stops: list[str]) -> None:
    served = offered(ScriptedModel(words))["pair"]
    streamed = Words(served.mesh.blueprint, stops)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    tokens = [text[start:stop] for start, stop in pairwise(places)]

    pieces = [streamed.take(TokenText(node="agent.2", round=0, text=token).model_dump_json()) for token in tokens]
    other = streamed.take(TokenText(node="agent.1", round=0, text="no").model_dump_json())

    answer = before_stop(text.lstrip(), stops).rstrip()
    assert "".join(pieces) + streamed.rest(answer) == answer
    assert stops or "".join(pieces) == answer
    assert other == ""
