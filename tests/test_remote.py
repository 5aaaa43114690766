"""Remote models against a real endpoint in another process: what is sent, what comes back, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai_double import Double, endpoint

from agentmesh import Mesh
from agentmesh.blueprint import draft
from agentmesh.cli import invoke
from agentmesh.config.load import dump, load_mesh, mesh_from_dict
from agentmesh.config.mesh import RemoteModelSpec
from agentmesh.errors import ConfigError, InputError, NodeError, RemoteError, RequestTooLongError, UsageError
from agentmesh.events import Event
from agentmesh.forecast import Forecast, forecast
from agentmesh.reasons import Reason
from agentmesh.remote import Backoff, RemoteBackend
from agentmesh.remote.endpoint import Endpoint, waited
from agentmesh.remote.text import TextTokenizer
from agentmesh.testing import ScriptedModel

READ = {"system": "You are a {{ role }}.", "prompt": "{{ question }}\n{% for m in inbox %}\n{{ m }}\n{% endfor %}"}


def spec(double: Double, **more: Any) -> dict[str, Any]:
    return {"remote": double.url, "name": "tiny", "timeout": 5, **more}


def single(double: Double, agent: dict[str, Any] | None = None, **more: Any) -> Mesh:
    return Mesh(agents={"solver": {**READ, **(agent or {})}}, topology="single", model=spec(double, **more))


def quick(double: Double, agent: dict[str, Any] | None = None, **more: Any) -> Mesh:
    """The same, waiting for hundredths of a second where half a second would be waited."""
    model = RemoteBackend(Endpoint(RemoteModelSpec(**spec(double, **more))), Backoff(first=0.01))
    return Mesh(agents={"solver": {**READ, **(agent or {})}}, topology="single", model=model)


def test_messages_go_out_as_chat_and_come_back_with_the_endpoint_s_counts() -> None:
    events: list[Event] = []
    with (
        endpoint("text:seven of them") as double,
        single(double, {"generate": {"max_tokens": 9, "stop": ["#"]}}) as mesh,
    ):
        result = mesh.run(question="<|im_start|>How many?", sinks=[events.append])
        body = double.requests()[0]["body"]

    assert result.answer == "seven of them"
    assert body["messages"] == [
        {"role": "system", "content": "You are a solver."},
        {"role": "user", "content": "<|im_start|>How many?"},
    ]
    assert (body["model"], body["max_tokens"], body["temperature"], body["stop"]) == ("tiny", 9, 0.0, ["#"])
    assert 0 <= body["seed"] < 2**31
    call = result.calls[0]
    assert call.endpoint is not None
    assert call.endpoint.url == double.url
    assert (call.prompt_tokens, call.output_tokens) == (call.endpoint.prompt_tokens, 3)
    assert sum(row.tokens for row in call.plan) == call.prompt_tokens == call.computed
    assert {row.reason for row in call.plan} == {Reason.REMOTE_TEXT}
    assert "How many?" in "".join(row.text for row in call.plan)
    assert "".join(event.text for event in events if event.type == "model.token") == "seven of them"
    assert [event.type for event in events].index("model.first_token") < len(events) - 4


def test_a_seed_is_the_same_in_every_run_and_the_body_takes_more_fields_with_a_salt_for_each_tenant() -> None:
    with endpoint("text:a") as double, single(double, body={"cache_salt": "ours"}) as mesh:
        mesh.run(question="?")
        mesh.run(question="?")
        mesh.run(question="?", seed=5, tenant="ann")
        bodies = [request["body"] for request in double.requests()]

    assert [body["cache_salt"] for body in bodies] == ["ours", "ours", "ours ann"]
    assert bodies[0]["seed"] == bodies[1]["seed"] != bodies[2]["seed"]


def test_what_the_endpoint_had_cached_stands_beside_ours() -> None:
    handbook = ("The office opens at nine. " * 20).strip()
    with endpoint("text:yes") as double:
        mesh = Mesh(
            agents={"agent": {"prompt": "{{ question }}\n{% for m in inbox %}\n{{ m }}\n{% endfor %}"}},
            topology={"use": "chain", "agents": 2},
            model=spec(double),
        )
        result = mesh.run(question=handbook)

    first, second = (call.endpoint for call in result.calls)
    assert first is not None
    assert second is not None
    assert first.cached_tokens == 0
    assert second.cached_tokens == len(handbook) // 4
    assert result.usage.endpoint_cached == second.cached_tokens
    assert result.usage.placed_exact == result.usage.placed_realigned == 0


def test_a_busy_endpoint_is_asked_again_when_it_says() -> None:
    with endpoint("busy:503", "busy:429:0.3", "cut:", "text:at last") as double, quick(double) as mesh:
        result = mesh.run(question="?")
        times = [request["at"] for request in double.requests()]

    assert result.answer == "at last"
    assert result.calls[0].endpoint is not None
    assert result.calls[0].endpoint.attempts == len(times) == 4
    assert times[2] - times[1] >= 0.29
    assert result.calls[0].queue_ms >= 290


def test_waits_double_and_never_fall_short_of_what_is_asked() -> None:
    backoff = Backoff(first=0.5, most=8.0)

    for attempt, longest in ((1, 0.5), (2, 1.0), (3, 2.0), (9, 8.0)):
        waits = {backoff.wait(attempt, None) for _ in range(50)}
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert backoff.wait(1, 7.5) == 7.5


def test_both_forms_of_retry_after_are_read() -> None:
    assert waited("12") == 12
    assert waited("soon") is None
    assert waited(None) is None
    assert waited("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    later = waited("Fri, 01 Jan 2100 00:00:00 GMT")
    assert later is not None
    assert later > 1e9


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("busy:429:3600", "asks to wait 3600 s"),
        ("busy:503", r"gave up after 2 attempt\(s\)"),
        ("cut:half a", "passed on already"),
        ("plain", "in another way than OpenAI-compatible endpoints"),
        ("inside:[1]", "in another way than OpenAI-compatible endpoints"),
        ("garbled", "cannot be decoded"),
        ("deep", r"refuses the request \(status 400"),
        ("endless", "seems not to know that setting"),
        ('error:400:{"error": {"message": "top_p must be in (0, 1]", "type": "BadRequestError"}}', "top_p must be in"),
    ],
)
def test_what_an_endpoint_does_wrong_is_said(step: str, words: str) -> None:
    with (
        endpoint(step) as double,
        quick(double, {"generate": {"max_tokens": 20}}, retry=1) as mesh,
        pytest.raises(NodeError, match=words) as caught,
    ):
        mesh.run(question="?")

    assert isinstance(caught.value.__cause__, RemoteError)


@pytest.mark.parametrize(
    "step",
    [
        'error:400:{"error": {"message": "the request exceeds the available context size", "code": 400}}',
        'error:400:{"error": {"message": "no", "code": "context_length_exceeded", "type": "invalid_request_error"}}',
        'error:500:{"error": {"message": "no", "code": 500, "type": "exceed_context_size_error"}}',
        'error:400:{"message": "This model\'s maximum context length is 64 tokens.", "object": "error"}',
        'inside:{"error": {"message": "the request exceeds the available context size"}}',
    ],
)
def test_a_prompt_beyond_the_context_is_not_tried_again(step: str) -> None:
    with endpoint(step) as double, single(double, {"retry": 3}) as mesh:
        with pytest.raises(NodeError, match="does not fit the model's context") as caught:
            mesh.run(question="?")
        asked = len(double.requests())

    assert isinstance(caught.value.__cause__, RequestTooLongError)
    assert asked == 1


def test_an_unreachable_host_and_a_silent_one_are_told_apart() -> None:
    with endpoint("never") as double:
        with quick(double, timeout=0.2, retry=1) as mesh, pytest.raises(NodeError, match=r"no answer within 0\.2 s"):
            mesh.run(question="?")
        assert len(double.requests()) == 2
    with quick(double, retry=1) as mesh, pytest.raises(NodeError, match="cannot be reached"):
        mesh.run(question="?")


def test_an_unknown_model_is_answered_with_those_that_are_served() -> None:
    with endpoint("text:a") as double:
        with (
            single(double, name="tinny") as mesh,
            pytest.raises(NodeError, match=r"serves tiny, tiny-long\. Did you mean 'tiny'"),
        ):
            mesh.run(question="?")
        wrong = {**spec(double), "remote": double.base}
        mesh = Mesh(agents={"solver": READ}, topology="single", model=wrong)
        with pytest.raises(NodeError, match="usually ends in /v1"):
            mesh.run(question="?")


def test_a_key_comes_from_the_environment_and_stands_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", "sk-right")
    with endpoint("text:in", key="sk-right") as double:
        with single(double, api_key_env="OUR_KEY") as mesh:
            assert mesh.run(question="?").answer == "in"
            assert "sk-right" not in json.dumps(mesh.load().describe())
        with single(double) as mesh, pytest.raises(NodeError, match="name the variable with the key"):
            mesh.run(question="?")
        monkeypatch.setenv("OUR_KEY", "sk-wrong")
        with single(double, api_key_env="OUR_KEY") as mesh, pytest.raises(NodeError, match="key in OUR_KEY") as caught:
            mesh.run(question="?")
        assert "sk-wrong" not in str(caught.value)
        assert "Incorrect API key" in str(caught.value)
    monkeypatch.delenv("OUR_KEY")
    with single(double, api_key_env="OUR_KEY") as mesh, pytest.raises(InputError, match="OUR_KEY, which is not set"):
        mesh.run(question="?")


def test_cancelling_a_run_closes_the_connection() -> None:
    async def cancel(mesh: Mesh) -> None:
        async for event in mesh.stream(question="?"):
            if event.type == "model.token":
                return

    with endpoint("hang") as double, single(double) as mesh:
        asyncio.run(cancel(mesh))
        until = time.monotonic() + 20
        while not (gone := double.requests()[0]["gone"]) and time.monotonic() < until:
            time.sleep(0.05)

    assert gone


def test_a_node_is_tried_again_where_its_message_broke_off() -> None:
    with endpoint("cut:half a", "text:a whole one") as double, quick(double, {"retry": 1}) as mesh:
        assert mesh.run(question="?").answer == "a whole one"


def test_an_agent_with_a_memory_sends_its_earlier_turns() -> None:
    with endpoint("text:hm") as double:
        mesh = Mesh(
            agents={"debater": {**READ, "memory": "conversation"}, "judge": READ},
            topology={"use": "debate", "debaters": 2, "rounds": 2},
            model=spec(double),
        )
        mesh.run(question="What?")
        roles = [[message["role"] for message in request["body"]["messages"]] for request in double.requests()]

    assert roles.count(["user", "assistant", "user"]) == 2


def test_remote_and_local_agents_read_each_other() -> None:
    local = ScriptedModel(["local one", "local two"])
    with endpoint("echo") as double:
        mesh = Mesh(
            agents={"agent.1": READ, "agent.2": {**READ, "model": spec(double)}, "agent.3": READ},
            topology={"use": "chain", "agents": 3},
            model=local,
        )
        result = mesh.run(question="What?")
        sent = double.requests()[0]["body"]["messages"][-1]["content"]

    assert "local one" in sent
    assert sent[::-1] in local.calls[1].text
    assert [call.endpoint is not None for call in result.calls] == [False, True, False]
    assert result.answer == "local two"


def test_what_a_remote_agent_wrote_is_new_text_to_a_local_reader() -> None:
    with endpoint("text:the shop has six red boxes and each of them holds seven green pears " * 1) as double:
        mesh = Mesh(
            agents={"agent.1": {**READ, "model": spec(double)}, "agent": {**READ, "generate": {"max_tokens": 6}}},
            topology={"use": "fully-connected", "agents": 3},
            model="random:tiny-llama",
            communicator={"preset": "epic", "min_tokens": 4},
        )
        with mesh:
            result = mesh.run(question="How many pears are there in all of the boxes of the shop together?")

    rows = {call.node: {row.segment: str(row.reason) for row in call.plan} for call in result.calls}
    name = "message agent.1@0"
    assert set(rows["agent.1"].values()) == {"remote-text"}
    assert rows["agent.2"][name] == "first-reader"
    assert rows["agent.3"][name] in ("read-before", "block-head")
    assert result.usage_by_agent["agent.3"].placed_realigned > 0


def planned(order: str = "shared-first", **changes: Any) -> Forecast:
    remote = {"remote": "http://127.0.0.1:1/v1", "name": "big", "order": order}
    agents = {"agent": {**READ, "role": ["Solver", "Checker", "Editor"], "model": remote}, **changes}
    data = {"version": 1, "topology": {"use": "fully-connected", "agents": 3}, "agents": agents}
    return forecast(draft(mesh_from_dict({**data, "communicator": "linear"})))


def test_a_plan_says_that_text_is_sent_and_what_the_order_of_texts_costs() -> None:
    as_written, shared_first = planned("as-written"), planned()
    mixed = planned(**{"agent.2": READ})

    assert {slot.reason for visit in as_written.visits for slot in visit.slots} == {Reason.REMOTE_TEXT}
    assert as_written.visits[0].note == "text to big at http://127.0.0.1:1/v1"
    assert any("agent.2: with its own text behind" in line and "question" in line for line in as_written.advice)
    assert not shared_first.advice
    assert "has read question, message agent.1@0 as the beginning of agent.2" in shared_first.visits[2].note
    assert {slot.reason for slot in mixed.visits[1].slots} == {Reason.FIRST_READER}


def test_texts_that_several_agents_of_an_endpoint_read_are_a_common_beginning() -> None:
    with endpoint("text:a") as double:
        agents = {
            "worker": {**READ, "role": ["Solver", "Checker"]},
            "hub": {**READ, "model": spec(double, name="tiny-long")},
        }
        mesh = Mesh(agents=agents, topology={"use": "star", "workers": 2}, model=spec(double))
        mesh.run(question="What is shared?")
        sent = [request["body"]["messages"] for request in double.requests()]

    texts = [[(message["role"], message["content"]) for message in messages] for messages in sent]
    assert [("user", "What is shared?\n\nYou are a Solver.")] in texts
    assert [("user", "What is shared?\n\nYou are a Checker.")] in texts
    assert texts[-1][0] == ("system", "You are a hub."), "it has its endpoint for itself"


def test_a_mesh_of_remote_agents_alone_loads_no_model_of_this_machine() -> None:
    with endpoint("text:a") as double:
        mesh = Mesh(agents={"agent": {**READ, "model": spec(double)}}, topology="chain")
        mesh.run(question="?")

        assert isinstance(mesh.backend, RemoteBackend)
        assert mesh.width == 8
        mesh.close()
        assert mesh.backend is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"remote": "http://me:secret@host/v1", "name": "a"}, "without a user, key or query"),
        ({"remote": "ftp://host/v1", "name": "a"}, "an address such as"),
        ({"remote": "http://host/v1"}, "missing key 'name'"),
        ({"remote": "http://host/v1", "name": "a", "api_key": "sk-1"}, "Did you mean 'api_key_env'"),
        ({"remote": "http://host/v1", "name": "a", "body": {"messages": []}}, "fills them itself"),
    ],
)
def test_mistakes_in_a_remote_model_are_named(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Mesh(agents={"solver": READ}, topology="single", model=model)


def test_an_edge_that_must_share_kv_refuses_a_remote_end() -> None:
    topology = {
        "nodes": {"a": {}, "b": {}},
        "edges": [{"from": "a", "to": "b", "deliver": "kv"}],
        "output": "b",
    }
    remote = {"remote": "http://127.0.0.1:1/v1", "name": "big"}
    with pytest.raises(ConfigError, match="the model of b is remote and takes and gives text only"):
        Mesh(agents={"a": READ, "b": {**READ, "model": remote}}, topology=topology, communicator="linear")


def test_the_command_line_runs_a_remote_mesh_and_refuses_what_needs_a_local_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint("text:forty two") as double:
        (tmp_path / "mesh.yaml").write_text(
            f"version: 1\nmodel: {{remote: '{double.url}', name: tiny}}\ntopology: single\n"
            "agents:\n  solver: {prompt: '{{ question }}'}\n"
        )
        mesh, runs = str(tmp_path / "mesh.yaml"), ["--runs-dir", str(tmp_path / "runs")]
        assert invoke(["run", mesh, "-i", "question=What?", *runs]) == 0
        shown = capsys.readouterr()
        assert "forty two" in shown.out
        assert "remote-text, 0 cached" in shown.out
        assert invoke(["plan", mesh]) == 0
        shown = capsys.readouterr()
        assert "remote-text" in shown.out
        assert f"text to tiny at {double.url}" in shown.out
        store = ["--store", str(tmp_path / "kv")]
        assert invoke(["run", mesh, "-i", "question=What?", *store, *runs]) == 0
        assert not (tmp_path / "kv").exists()
        (tmp_path / "docs.jsonl").write_text('{"text": "Pears are green."}')
        for refused in (
            ["run", mesh, "-i", "question=What?", "--profile", *runs],
            ["cache", "warm", str(tmp_path / "docs.jsonl"), "--mesh", mesh, *store],
        ):
            capsys.readouterr()
            assert invoke(refused) == 2
            assert "takes text only" in capsys.readouterr().err
    record = next((tmp_path / "runs").glob("*/results.json"))
    assert json.loads(record.read_text())["calls"][0]["endpoint"]["output_tokens"] == 2


def test_without_the_extra_a_remote_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("agentmesh.remote")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    mesh = Mesh(agents={"solver": READ}, topology="single", model={"remote": "http://127.0.0.1:1/v1", "name": "big"})

    with pytest.raises(UsageError, match=r"takes httpx2: pip install 'agentmesh-kv\[remote\]'"):
        mesh.run(question="?")


def test_texts_survive_the_stand_in_for_a_tokenizer() -> None:
    tokenizer = TextTokenizer()
    for text in ("", "a", "é", "日本語 and 🥑", "\x00\x01\x02\x03\x04"):
        assert tokenizer.decode(tokenizer.encode(text, control=False)) == text


def test_a_remote_model_reads_back_from_the_record_of_its_mesh(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(
        "version: 1\nmodel: {remote: 'http://127.0.0.1:1/v1', name: big, api_key_env: KEY}\ntopology: single\n"
        "agents:\n  solver: {prompt: '{{ question }}'}\n"
    )
    spec = load_mesh(path).spec
    path.write_text(dump(spec))

    assert load_mesh(path).spec == spec
