"""Meshes from Python and from files, with scripted and tiny models: scheduling, failures, custom roles, events."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from agentmesh import Agent, Mesh, Turn, agent
from agentmesh.errors import ConfigError, InputError, NodeError, NotFoundError, RunError, TopologyError, UsageError
from agentmesh.events import Event
from agentmesh.testing import ScriptedModel
from agentmesh.turns import together

ASK = {"prompt": "{{ question }}"}
READ = {"prompt": "{{ question }}\n{% for m in inbox %}\n{{ m }}\n{% endfor %}"}


def chain(replies: Any, **changes: Any) -> Mesh:
    return Mesh(agents={"agent": READ}, topology="chain", model=ScriptedModel(replies), **changes)


def types(events: list[Event]) -> list[str]:
    return [event.type for event in events]


def test_a_chain_hands_each_message_to_the_next_agent() -> None:
    model = ScriptedModel(["one", "two", "three"])
    mesh = Mesh(agents={"agent": READ}, topology="chain", model=model)

    result = mesh.run(question="What?")

    assert result.answer == "three"
    assert [message.text for message in result.messages] == ["one", "two", "three"]
    assert ["two" in call.text for call in model.calls] == [False, False, True]
    assert ["one" in call.text for call in model.calls] == [False, True, False]
    model.assert_complete()


def test_calls_add_up_and_usage_is_by_agent() -> None:
    result = chain(["a", "bb", "ccc"]).run(question="What?")

    for call in result.calls:
        assert call.placed_exact + call.placed_realigned + call.computed == call.prompt_tokens
        assert sum(row.tokens for row in call.plan) == call.prompt_tokens
        assert "What?" in "".join(row.text for row in call.plan)
    assert result.usage.calls == 3
    assert result.usage.output_tokens == 6
    assert result.usage_by_agent["agent.3"].output_tokens == 3


def test_text_comes_piece_by_piece_only_where_somebody_takes_events() -> None:
    heard, unheard = ScriptedModel(["one", "two", "three"]), ScriptedModel(["one", "two", "three"])
    events: list[Event] = []

    for model, sinks in ((heard, [events.append]), (unheard, [])):
        Mesh(agents={"agent": READ}, topology="chain", model=model).run(question="What?", sinks=sinks)

    assert {call.streams for call in heard.calls} == {True}
    assert types(events).count("model.token") == 3
    assert {call.streams for call in unheard.calls} == {False}


def test_every_model_call_says_when_its_prompt_is_there() -> None:
    events: list[Event] = []
    result = chain(["one", "two", "three"]).run(question="What?", sinks=[events.append])

    calls = [event for event in events if event.type.startswith(("node.", "model."))]
    each = ["node.started", "model.started", "model.first_token", "model.token", "model.finished", "node.finished"]
    assert types(calls) == 3 * each
    begun = [(event.node, event.prompt_tokens) for event in events if event.type == "model.started"]
    assert begun == [(call.node, call.prompt_tokens) for call in result.calls]


def test_custom_roles_are_functions_and_classes_sync_and_async() -> None:
    @agent
    def shout(turn: Turn) -> str:
        return turn.inbox[-1].text.upper()

    @agent
    async def wait(turn: Turn) -> str:
        await asyncio.sleep(0)
        return f"{turn.role}: {turn.question}"

    class Careful(Agent):
        async def act(self, turn: Turn) -> Any:
            return await turn.generate("Check {{ question }}", system="careful", max_tokens=9)

    model = ScriptedModel(["fine"])
    agents = {"a": wait, "b": shout, "c": Careful()}
    mesh = Mesh(agents=agents, topology=nx.DiGraph([("a", "b"), ("b", "c")]), model=model)

    result = mesh.run(question="what?")

    assert [message.text for message in result.messages] == ["a: what?", "A: WHAT?", "fine"]
    assert model.calls[0].generate.max_tokens == 9


def test_a_failing_agent_fails_the_run_with_its_cause() -> None:
    @agent
    def broken(turn: Turn) -> str:
        raise ZeroDivisionError("on purpose")

    mesh = Mesh(agents={"a": broken, "b": ASK}, topology=nx.DiGraph([("a", "b")]), model=ScriptedModel(["x"]))
    events: list[Event] = []

    with pytest.raises(NodeError, match=r"a \(round 0\) failed: ZeroDivisionError: on purpose") as caught:
        asyncio.run(mesh.arun(question="?", sinks=[events.append]))

    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert types(events)[-2:] == ["node.failed", "run.failed"]
    assert "b" not in {event.node for event in events if event.type == "node.started"}


def test_a_failed_visit_is_tried_again() -> None:
    mesh = Mesh(
        agents={"solver": {**ASK, "retry": 2}},
        topology="single",
        model=ScriptedModel([RunError("no"), RunError("no"), "yes"]),
    )
    events: list[Event] = []

    result = asyncio.run(mesh.arun(question="?", sinks=[events.append]))

    assert result.answer == "yes"
    assert types(events).count("node.retrying") == 2


def test_a_time_limit_ends_a_visit() -> None:
    @agent
    async def slow(turn: Turn) -> str:
        await asyncio.sleep(60)
        return "late"

    mesh = Mesh(agents={"solver": slow}, topology="single", model=ScriptedModel([]), run={"timeout": "50ms"})
    begun = time.perf_counter()

    with pytest.raises(NodeError, match=r"longer than its limit of 0\.05 s"):
        mesh.run(question="?")

    assert time.perf_counter() - begun < 5


def test_ready_nodes_run_together() -> None:
    running: list[int] = []
    most: list[int] = []

    @agent
    async def member(turn: Turn) -> str:
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(0.02)
        running.pop()
        return turn.node

    mesh = Mesh(agents={"worker": member, "hub": member}, topology="star", model=ScriptedModel([]))
    mesh.run(question="?")

    assert max(most) == 3


def test_conditions_and_visits_limit_what_is_delivered() -> None:
    spec = {
        "nodes": {"writer": {}, "critic": {}},
        "rounds": 4,
        "edges": [
            {"from": "writer", "to": "critic"},
            {"from": "critic", "to": "writer", "when": "previous-round", "if": 'contains("REVISE")', "max_visits": 2},
        ],
        "output": "writer",
    }
    model = ScriptedModel(lambda prompt: "REVISE" if "CRITIC" in prompt else "draft")
    agents = {"writer": READ, "critic": {"system": "CRITIC", "prompt": "{{ inbox[0] }}"}}
    events: list[Event] = []

    mesh = Mesh(agents=agents, topology=spec, model=model)
    result = asyncio.run(mesh.arun(question="?", sinks=[events.append]))

    assert [m.round for m in result.messages if m.node == "writer"] == [0, 1, 2]
    assert types(events).count("node.skipped") == 2
    assert result.answer == "draft"


def test_an_output_that_never_ran_is_no_success() -> None:
    spec = {
        "nodes": {"a": {}, "b": {}},
        "edges": [{"from": "a", "to": "b", "if": 'contains("never")'}],
        "output": "b",
    }
    mesh = Mesh(agents={"a": ASK, "b": READ}, topology=spec, model=ScriptedModel(["no"]))

    with pytest.raises(RunError, match="output node b never ran"):
        mesh.run(question="?")


def test_an_empty_answer_is_no_success() -> None:
    with pytest.raises(RunError, match="empty answer"):
        Mesh(agents={"solver": ASK}, topology="single", model=ScriptedModel([" \n"])).run(question="?")


def test_a_vote_counts_what_the_pattern_finds() -> None:
    agents = {"worker": ASK, "hub": {"kind": "vote", "extract": r"answer is (\d+)"}}
    mesh = Mesh(
        agents=agents,
        topology="star",
        model=ScriptedModel(["the answer is 7", "the answer is 9", "so the answer is 9"]),
    )

    assert mesh.run(question="?").answer == "9"


def test_code_is_run_in_the_sandbox() -> None:
    agents = {"a": ASK, "b": {"kind": "python", "time_limit": "20s"}}
    mesh = Mesh(
        agents=agents, topology=nx.DiGraph([("a", "b")]), model=ScriptedModel(["Here:\n```python\nprint(6*7)\n```"])
    )

    assert mesh.run(question="?").answer == "42"


def test_a_retriever_hands_over_the_passages_that_fit(tmp_path: Path) -> None:
    (tmp_path / "cats.txt").write_text("Cats purr and sleep in the sun.")
    (tmp_path / "tides.md").write_text("The moon pulls the sea and makes the tides.")
    agents = {"r": {"kind": "retriever", "documents": str(tmp_path), "top_k": 1}, "a": READ}
    model = ScriptedModel(["done"])

    Mesh(agents=agents, topology=nx.DiGraph([("r", "a")]), model=model).run(question="What makes the tides?")

    assert "moon pulls" in model.calls[0].text
    assert "purr" not in model.calls[0].text
    assert "document tides" in [segment.label for segment in model.calls[0].prompt.segments]


def test_an_agent_with_memory_continues_its_own_prompt() -> None:
    model = ScriptedModel(["first", "second", "verdict"])
    agents = {"debater": {**READ, "memory": "conversation"}, "judge": READ}
    spec = {"use": "debate", "debaters": 1, "rounds": 2}

    Mesh(agents=agents, topology=spec, model=model).run(question="?")

    first, second = model.calls[0].prompt, model.calls[1].prompt
    assert second.tokens[: len(first.tokens)] == first.tokens
    assert "first" in second.text


def test_streaming_yields_the_events_in_order_and_can_be_left() -> None:
    async def collect() -> list[Event]:
        return [event async for event in chain(["a", "b", "c"]).stream(question="?")]

    async def leave() -> None:
        async for event in chain(["a", "b", "c"]).stream(question="?"):
            if event.type == "node.started":
                break

    events = asyncio.run(collect())
    asyncio.run(leave())

    assert [event.seq for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("run.started", "run.finished")


def test_cancelling_a_run_is_recorded() -> None:
    @agent
    async def slow(turn: Turn) -> str:
        await asyncio.sleep(60)
        return "late"

    events: list[Event] = []

    async def cancelled() -> None:
        mesh = Mesh(agents={"solver": slow}, topology="single", model=ScriptedModel([]))
        task = asyncio.create_task(mesh.arun(question="?", sinks=[events.append]))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())

    assert events[-1].type == "run.cancelled"


def test_runs_of_one_mesh_may_overlap() -> None:
    async def several() -> list[str]:
        model = ScriptedModel(lambda prompt: prompt.split("user\n")[1].split("<|im_end|>")[0])
        mesh = Mesh(agents={"solver": ASK}, topology="single", model=model)
        results = await asyncio.gather(*(mesh.arun(question=f"q{i}") for i in range(8)))
        return [result.answer for result in results]

    assert asyncio.run(several()) == [f"q{i}" for i in range(8)]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_runs_overlap_than_the_mesh_allows(concurrency: int) -> None:
    running: list[int] = []
    most: list[int] = []

    @agent
    async def member(turn: Turn) -> str:
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(0.01)
        running.pop()
        return "done"

    run = {"concurrency": concurrency}
    mesh = Mesh(agents={"solver": member}, topology="single", model=ScriptedModel([]), run=run)

    async def several() -> None:
        await asyncio.gather(*(mesh.arun(question="?") for _ in range(7)))

    asyncio.run(several())
    asyncio.run(several())

    assert max(most) == concurrency


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'question' is missing"),
        ({"question": "  "}, "is empty"),
        ({"question": "a", "contxt": "b"}, "no input 'contxt'"),
        ({"question": "\udcff"}, "not UTF-8"),
    ],
)
def test_bad_inputs_are_refused_before_anything_runs(inputs: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chain(["a"]).run(inputs)


def test_an_input_that_a_run_does_not_give_has_its_default() -> None:
    model = ScriptedModel(["fine", "fine"])
    with_book = {"prompt": "{{ book }}\n{{ question }}"}
    mesh = Mesh(
        agents={"solver": with_book}, topology="single", model=model, inputs={"question": None, "book": "Rule one."}
    )

    mesh.run(question="What?")
    mesh.run(question="What?", book="Rule two.")

    assert ["Rule one." in call.text for call in model.calls] == [True, False]
    assert "Rule two." in model.calls[1].text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"agents": {"agnet": ASK}}, ConfigError, "Did you mean 'agent'"),
        ({"agents": {"agent.1": ASK}}, ConfigError, "no agent for agent.2"),
        ({"communicator": "prefx"}, ConfigError, "Did you mean 'prefix'"),
        ({"topology": "chian"}, NotFoundError, "Did you mean 'chain'"),
        ({"topology": {"use": "chain", "agent": 2}}, ConfigError, "Did you mean 'agents'"),
        ({"agents": {"agent": {"prompt": "{{ questoin }}"}}}, ConfigError, "Did you mean 'question'"),
        ({"agents": {"agent": {**ASK, "role": ["a", "b", "c", "d"]}}}, ConfigError, "4 roles for 3"),
        ({"agents": {"agent": {"python": "nowhere:Role"}}}, NotFoundError, "cannot import 'nowhere'"),
        ({"inputs": ["inbox"]}, ConfigError, "inbox"),
        ({"inputs": {"question": ""}}, ConfigError, "defaults.question"),
        ({"topology": nx.DiGraph([("a", "b"), ("b", "a")])}, TopologyError, "a → b → a|b → a → b|sinks"),
    ],
)
def test_a_wrong_mesh_is_refused_when_it_is_built(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Mesh(**{"agents": {"agent": ASK}, "topology": "chain", "model": ScriptedModel([]), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"communicator": "prefx"}, "Did you mean 'prefix'"),
        ({"agents": {"a": {"prompt": "{{ questoin }}"}, "b": READ}}, "Did you mean 'question'"),
        ({"agents": {"a": ASK}}, "no agent for b"),
        ({"agents": {"a": ASK, "b": READ, "c": READ}}, "no group or node of that name"),
    ],
)
def test_a_mesh_on_a_networkx_graph_is_checked_like_a_file(changes: dict[str, Any], message: str) -> None:
    given = {"agents": {"a": ASK, "b": READ}, "topology": nx.DiGraph([("a", "b")]), "model": ScriptedModel([])}

    with pytest.raises(ConfigError, match=message):
        Mesh(**{**given, **changes})


def test_a_running_event_loop_is_told_to_await() -> None:
    async def inside() -> None:
        with pytest.raises(UsageError, match="await mesh"):
            chain(["a"]).run(question="?")

    asyncio.run(inside())


MESH = """
version: 1
model: random:tiny-llama
topology: my-graph.yaml
agents:
  asker: {prompt: "{{ question }}", generate: {max_tokens: 8}}
  loud: {python: my_roles:Loud, options: {mark: "!"}}
"""
GRAPH = (
    "nodes: {asker: {}, loud: {}}\nedges: [{from: asker, to: loud, if: {python: 'my_roles:always'}}]\noutput: loud\n"
)
ROLES = """
from agentmesh import Agent

class Loud(Agent):
    def __init__(self, mark):
        self.mark = mark

    async def act(self, turn):
        return f"{turn.inbox[0].node} said {len(turn.inbox[0].contents[0].tokens)} tokens{self.mark}"

def always(message):
    return True
"""


def test_a_graph_file_and_roles_beside_the_mesh_run_on_a_tiny_model(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    (tmp_path / "my-graph.yaml").write_text(GRAPH)
    (tmp_path / "my_roles.py").write_text(ROLES)

    with Mesh.from_yaml(tmp_path / "mesh.yaml") as mesh:
        result = mesh.run(question="What?")

    assert result.answer == "asker said 8 tokens!"
    assert result.calls[0].output_tokens == 8


def test_when_one_of_many_runs_fails_the_others_have_ended_before_anybody_hears_of_it() -> None:
    ended: list[int] = []

    async def run(number: int) -> None:
        try:
            await asyncio.sleep(0 if number == 0 else 60)
            raise RunError("on purpose")
        finally:
            await asyncio.sleep(0.01)  # freeing what it holds takes its time
            ended.append(number)

    async def all_of_them() -> None:
        with pytest.raises(RunError, match="on purpose"):
            await together(run(number) for number in range(3))
        assert sorted(ended) == [0, 1, 2]

    asyncio.run(all_of_them())
