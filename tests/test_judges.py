"""Judges asked once more with their inbox in another order: in a run, in its record, and in an evaluation's figures."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Mesh, Turn, agent
from agentmesh.checks import another_order
from agentmesh.cli import invoke
from agentmesh.communicator.slots import Slots
from agentmesh.errors import RunError
from agentmesh.evaluate.choices import chosen
from agentmesh.evaluate.journal import Row
from agentmesh.evaluate.report import Report, evaluate
from agentmesh.evaluate.results import Judged, summarise
from agentmesh.evaluate.subjects import Request
from agentmesh.events import Event, JudgeChecked, parse_event
from agentmesh.local import LocalBackend
from agentmesh.reasons import Reason
from agentmesh.record import Recorder, outcome, read_events
from agentmesh.results import RunResult
from agentmesh.sharing.segments import NEVER
from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers import SCORERS
from agentmesh.testing import ScriptedModel

READ = {
    "prompt": "{{ role }} on\n{{ question }}\n{% for m in inbox %}\n{{ m.role }} wrote:\n{{ m }}\n{% endfor %}\nNow."
}
DEBATE = {"use": "debate", "debaters": 3, "rounds": 1}


def debate(reply: Any, judge: dict[str, Any] | None = None, **changes: Any) -> tuple[Mesh, ScriptedModel]:
    model = ScriptedModel(reply)
    agents = {"debater": READ, "judge": {**READ, **(judge or {})}}
    return Mesh(agents=agents, topology={**DEBATE, **changes}, model=model), model


def by_reader(prompt: str) -> str:
    """A debater says who it is; a judge says who comes first."""
    return prompt.partition("wrote")[0].split()[-1] if "judge on" in prompt else prompt.partition(" on")[0].split()[-1]


def checked(mesh: Mesh, **more: Any) -> tuple[RunResult, list[Event]]:
    events: list[Event] = []
    sinks = [events.append, *more.pop("sinks", ())]
    result = asyncio.run(mesh.arun(question="Which?", sinks=sinks, check_judges=True, **more))
    return result, events


def test_a_judge_answers_once_more_with_its_inbox_in_another_order() -> None:
    mesh, model = debate(by_reader)

    result, events = checked(mesh, sample="s1")
    plain = mesh.run(question="Which?")

    (check,) = result.checks
    names = [f"debater.{place + 1}" for place in check.order]
    assert sorted(check.order) == [0, 1, 2] != list(check.order)
    assert check.text == names[0] != result.answer == "debater.1"
    places = [model.calls[4].text.index(f"{name} wrote") for name in names]
    assert places == sorted(places)
    assert model.calls[4].seed == model.calls[3].seed
    assert (result.answer, result.messages) == (plain.answer, plain.messages)
    assert [call.node for call in result.calls] == [call.node for call in plain.calls]
    assert result.usage.prompt_tokens == plain.usage.prompt_tokens
    assert plain.checks == ()
    assert [event.type for event in events[-3:]] == ["node.finished", "judge.checked", "run.finished"]
    assert parse_event(events[-2].model_dump_json()) == events[-2]


def test_the_order_depends_on_sample_and_seed_alone() -> None:
    def order(**more: Any) -> tuple[int, ...]:
        return checked(debate(by_reader)[0], **more)[0].checks[0].order

    assert order(sample="a", seed=1) == order(sample="a", seed=1)
    assert len({order(sample=name, seed=seed) for name in "abcdef" for seed in range(3)}) == 5
    assert {another_order(2, str(n)) for n in range(9)} == {(1, 0)}


def test_who_reads_one_message_is_not_asked_again() -> None:
    mesh, model = debate(by_reader, debaters=1)

    assert checked(mesh)[0].checks == ()
    assert len(model.calls) == 2


def test_a_judge_of_several_rounds_is_asked_about_its_last_inbox_and_remembers_nothing_of_it() -> None:
    topology = {
        "nodes": {"debater": {"count": 2}, "judge": {}, "writer": {}},
        "rounds": 2,
        "edges": [{"from": "debater", "to": "judge"}, {"from": "judge", "to": "writer"}],
        "output": "writer",
    }
    numbers = iter(range(100))
    model = ScriptedModel(lambda _: f"reply-{next(numbers)}.")
    agents = {"debater": READ, "judge": {**READ, "memory": "conversation"}, "writer": READ}
    mesh = Mesh(agents=agents, topology=topology, model=model)

    result, events = checked(mesh)

    (check,) = result.checks
    said = {(m.node, m.round): m.text for m in result.messages}
    again = model.calls[-1].text
    assert (check.round, check.order) == (1, (1, 0))
    assert said["judge", 0] in again
    assert said["judge", 1] not in again
    assert again.rindex(said["debater.2", 1]) < again.rindex(said["debater.1", 1])
    assert [event.type for event in events].index("judge.checked") == len(events) - 2
    assert len(result.messages) == len(result.calls) == 8


def test_a_check_that_fails_is_noted_and_the_run_is_not_lost() -> None:
    replies = ["a", "b", "c", "the judge", RunError("no room")]

    result, _ = checked(debate(replies)[0])

    assert result.answer == "the judge"
    assert (result.checks[0].text, result.checks[0].error) == ("", "RunError: no room")


def test_a_judge_written_in_python_is_asked_like_any_other() -> None:
    @agent
    async def first(turn: Turn) -> str:
        return turn.inbox[0].node

    model = ScriptedModel(by_reader)
    mesh = Mesh(agents={"debater": READ, "judge": first}, topology=DEBATE, model=model)

    result, _ = checked(mesh)

    assert result.checks[0].text == f"debater.{result.checks[0].order[0] + 1}"
    assert result.answer == "debater.1"


def tiny(preset: str, reads: str, **judge: Any) -> Mesh:
    written = {"prompt": READ["prompt"], "generate": {"max_tokens": 12}}
    return Mesh(
        agents={"debater": written, "judge": {**written, "reads": reads, **judge}},
        topology={**DEBATE, "rounds": 2},
        model="random:tiny-llama",
        communicator={"preset": preset, "min_tokens": 4, "audit": 1.0, "max_kl": 100.0, "cost_gate": False},
        run={"deterministic": True},
    )


QUESTION = "How many pears are in two boxes that hold three pears and one pear each, and who ate them?"


def asked(mesh: Mesh, *, check: bool) -> tuple[RunResult, int]:
    """A run, and the bytes kept right before its KV is freed."""
    kept: list[int] = []
    with mesh:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        release = backend.communicator.release
        backend.communicator.release = lambda run: (kept.append(backend.communicator.nbytes), release(run))[1]
        result = asyncio.run(mesh.arun(question=QUESTION, check_judges=check))
    return result, kept[0]


def planned(result: RunResult) -> dict[tuple[str, int], Any]:
    """What was placed and audited in each call; calls of one round may end in any order."""
    return {(call.node, call.round): (call.plan, call.audit) for call in result.calls}


@pytest.mark.parametrize("preset", ["prefix", "rotate", "kvcomm"])
@pytest.mark.parametrize("reads", ["auto", "exact"])
def test_a_check_is_shared_as_any_call_and_leaves_nothing_behind(preset: str, reads: str) -> None:
    with_check, kept = asked(tiny(preset, reads), check=True)
    without, kept_without = asked(tiny(preset, reads), check=False)

    (check,) = with_check.checks
    judge = with_check.calls[-1]
    assert planned(with_check) == planned(without)
    assert with_check.messages == without.messages
    assert kept == kept_without
    assert check.placed + check.computed == judge.prompt_tokens
    assert check.text
    if preset == "rotate":
        lead = sum(row.tokens for row in judge.plan if row.reason is Reason.NOT_SEEN)  # the judge's own, seen by now
        assert check.placed == judge.placed_exact + judge.placed_realigned + lead
        assert (judge.placed_realigned > 0) is (reads == "auto")


@pytest.mark.parametrize("check", [True, False])
def test_what_a_check_will_read_stays_wanted_until_the_run_is_over(check: bool) -> None:
    with tiny("rotate", "auto") as mesh:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        assert isinstance(backend.communicator, Slots)
        segments, release = backend.communicator.keeper.segments, backend.communicator.release
        wanted: list[bool] = []

        def ended(run: str) -> None:
            wanted.extend(kept.next_use < NEVER for kept in segments._kept.values())
            release(run)

        backend.communicator.release = ended
        asyncio.run(mesh.arun(question=QUESTION, check_judges=check))

    assert any(wanted) is check


def test_a_conversing_judge_is_asked_without_keeping_its_prompt() -> None:
    with_check, kept = asked(tiny("prefix", "auto", memory="conversation"), check=True)
    without, kept_without = asked(tiny("prefix", "auto", memory="conversation"), check=False)

    assert kept == kept_without
    assert with_check.messages == without.messages


def test_a_run_is_read_back_with_line_separators_in_its_messages(tmp_path: Path) -> None:
    mesh, _ = debate(lambda _: "one\u2028two")
    recorder = Recorder(tmp_path, "debate", "", {})
    checked(mesh, sinks=[recorder.write])
    recorder.close()

    (check,) = [event.check for event in read_events(recorder.path) if isinstance(event, JudgeChecked)]
    assert check.text == "one\u2028two"
    assert outcome(recorder.path) == "finished"


MESH = """
version: 1
model: random:tiny-llama
topology: {use: debate, debaters: 2, rounds: 1}
agents:
  debater: &written
    prompt: |
      {{ role }} {{ node }} reads
      {{ question }}
      {% for message in inbox %}
      {{ message }}
      {% endfor %}
      Now.
    generate: {max_tokens: 12}
  judge: *written
communicator: {preset: rotate, min_tokens: 8, max_kl: 100.0, cost_gate: false}
run: {deterministic: true}
"""


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.yaml").write_text("version: 1\nkind: math\nfile: s.jsonl\nscorers: [gsm8k]\n")
    lines = [{"id": f"s{n}", "question": f"How many are {n} and {n} pears in boxes?", "answer": "7"} for n in range(4)]
    (tmp_path / "task" / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "mesh.yaml").write_text(MESH)
    return Request(
        str(tmp_path / "mesh.yaml"),
        str(tmp_path / "task"),
        presets=("dense", "rotate", "single"),
        warmup=0,
        runs_dir=tmp_path / "runs",
    )


def orders(report: Report) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {}
    for row in report.rows:
        found.setdefault(row.preset, []).extend(check.order for check in row.checks)
    return found


def test_an_evaluation_asks_judges_again_and_says_how_often_they_choose_the_same(
    request_: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(request_)

    assert orders(report) == {"dense": [(1, 0)] * 4, "rotate": [(1, 0)] * 4, "single": []}
    assert report.results.judge is not None
    pair = report.results.judge["rotate vs dense"]
    assert (pair.n, pair.n_shuffled) == (4, 4)
    assert pair.same_choice is not None
    assert pair.same_choice_shuffled is not None
    assert report.results.judge["single vs dense"].n == 0
    assert report.results.judge["single vs dense"].same_choice is None
    assert 0 <= (report.results.presets["dense"].order_stable or 0) <= 1
    assert report.results.presets["single"].order_stable is None
    summary = (report.path / "summary.md").read_text()
    assert "| rotate vs dense | 4 |" in summary.partition("The judge")[2]
    assert "same choice in both orders, by preset: dense" in summary

    assert invoke(["score", "last", "--runs-dir", str(request_.runs_dir)]) == 0
    assert "the judge, under both presets" in capsys.readouterr().out


def test_the_check_can_be_left_out(request_: Request, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", str(request_.mesh), "--task", request_.task, "--presets", "dense,rotate", "--warmup", "0"]
    assert invoke([*line, "--no-judge-check", "--runs-dir", str(request_.runs_dir), "--format", "json"]) == 0

    figures = json.loads(capsys.readouterr().out)["judge"]["rotate vs dense"]
    assert (figures["n"], figures["n_shuffled"], figures["same_choice_shuffled"]) == (4, 0, None)


def test_scoring_again_works_choices_out_for_journals_that_have_none(
    request_: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(request_)
    journal = report.path / "samples.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    old = [{key: value for key, value in row.items() if not key.startswith("chosen")} for row in rows]
    journal.write_text("".join(json.dumps(row) + "\n" for row in old))

    assert invoke(["score", "last", "--runs-dir", str(request_.runs_dir), "--format", "json"]) == 0

    assert json.loads(capsys.readouterr().out)["judge"] == report.results.model_dump(mode="json")["judge"]


def row(preset: str, sample: str, choice: list[str], again: list[str] | None = None) -> Row:
    plain = {"judge": tuple(choice)}
    shuffled = {} if again is None else {"judge": tuple(again)}
    return Row(preset=preset, sample=sample, scores={"x": 1.0}, chosen=plain, chosen_shuffled=shuffled)


def test_choices_are_compared_where_both_presets_have_them() -> None:
    rows = [
        *(row("dense", "a", ["d1"], ["d1"]), row("linear", "a", ["d1"], ["d2"])),
        *(row("dense", "b", ["d1"], ["d2"]), row("linear", "b", ["d2"], ["d2"])),
        *(row("dense", "c", [], ["d1"]), row("linear", "c", [])),
        *(row("dense", "d", ["d1"], []), Row(preset="linear", sample="d", scores={"x": 1.0})),
    ]

    found = summarise(rows, "t", "m", "x", {"judge": ["d1", "d2"]})

    assert found.judge == {
        "linear vs dense": Judged(n=3, same_choice=2 / 3, undecided=1, n_shuffled=2, same_choice_shuffled=0.5)
    }
    assert found.presets["dense"].order_stable == 0.25
    assert found.presets["linear"].order_stable == 0.5


@pytest.mark.parametrize(
    ("scorer", "judge", "said", "found"),
    [
        ("gsm8k", "So 4.0 it is", ["It is 4, not 5", "4.00", "5"], ["2"]),
        ("gsm8k", "The second is right", ["I think so", "The second is right", "5"], ["2"]),
        ("choice", "The answer is (B).", ["Answer: B, from 1989", "**C**", "I like 1989"], ["1"]),
        ("has_answer", "Surely limestone.", ["pink limestone", "granite, 7", "Limestone"], ["1", "3"]),
        ("qa", "The Limestone", ["limestone.", "pink", ""], ["1"]),
        (
            "code",
            "```python\ndef f(x):\n    return x + 1\n```",
            ["```\ndef f(x): return x+1  # up\n```", "2", "3"],
            ["1"],
        ),
        ("recall", "It is 7", ["7 or so", "8", "so 7"], ["1", "3"]),
        ("math", r"\boxed{\frac{1}{2}}", [r"$0.5$", r"\boxed{1/2}", r"\boxed{2}"], ["1", "2"]),
    ],
)
def test_a_judge_chooses_whose_answer_it_gives_as_the_scorer_reads_answers(
    scorer: str, judge: str, said: list[str], found: list[str]
) -> None:
    sample = Sample(
        id="a", question="q", answer="pink limestone", answers=("pink limestone", "limestone"), choices=("u", "v", "w")
    )
    reads = SCORERS[scorer]()
    candidates = {str(number): text for number, text in enumerate(said, 1)}
    try:
        assert list(asyncio.run(chosen(judge, candidates, sample, reads))) == found
    finally:
        reads.close()
