"""Evaluations on a tiny model: the journal, resuming, figures, statistics, scoring again, comparing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import MESH, TASK

from agentmesh.cli import invoke
from agentmesh.errors import InputError, NodeError, RecordError, UsageError
from agentmesh.evaluate import evaluate as agentmesh_evaluate
from agentmesh.evaluate import report
from agentmesh.evaluate.journal import Journal, Row
from agentmesh.evaluate.report import Report, evaluate, read_report
from agentmesh.evaluate.results import summarise
from agentmesh.evaluate.statistics import interval, mcnemar, paired_interval
from agentmesh.evaluate.subjects import Request
from agentmesh.events import CallRecord
from agentmesh.reasons import PlanRow, Reason, Treatment


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK)
    lines = [
        {"id": f"s{n}", "question": f"How many are {n} and {n + 1} pears in two boxes?", "answer": str(2 * n + 1)}
        for n in range(10)
    ]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return path


def a_request(mesh: Path, **changes: Any) -> Request:
    plain: dict[str, Any] = {"warmup": 3, "limit": "4", "runs_dir": mesh.parent / "runs"}
    return Request(mesh=str(mesh), task=str(mesh.parent / "task"), **{**plain, **changes})


def outcome(report: Report) -> list[tuple[Any, ...]]:
    """What may not depend on how often an evaluation was cut off."""
    rows = sorted(report.rows, key=lambda row: row.key)
    return [(*row.key, row.answer, row.scores, [call.placed_realigned for call in row.calls]) for row in rows]


def test_an_evaluation_compares_presets_on_the_same_samples(mesh: Path) -> None:
    report = evaluate(a_request(mesh, presets=("dense", "linear")))
    dense, linear = report.results.presets["dense"], report.results.presets["linear"]

    assert (dense.n, linear.n, dense.errors) == (4, 4, 0)
    assert [row.sample for row in report.rows if row.preset == "linear"] == ["s3", "s4", "s5", "s6"]
    assert list(dense.metrics) == ["flexible", "strict"]
    assert dense.calls_shared == 0
    assert linear.calls_shared == linear.calls_shareable == 4
    assert linear.tokens_placed + linear.tokens_computed == dense.tokens_placed + dense.tokens_computed
    pair = report.results.paired["linear vs dense"]
    assert pair.n == 4
    assert pair.ci95[0] <= pair.delta <= pair.ci95[1]
    assert 0 <= pair.same_text <= pair.same_answer <= 1
    written = json.loads((report.path / "results.json").read_text())
    assert written == report.results.model_dump(mode="json")
    assert "linear vs dense" in (report.path / "summary.md").read_text()


def test_nothing_is_learned_from_measured_samples(mesh: Path) -> None:
    together = evaluate(a_request(mesh, presets=("linear",)))
    alone = evaluate(a_request(mesh, presets=("linear",), limit="7-7"))

    one = next(row for row in together.rows if row.sample == "s6")
    assert one.answer == alone.rows[0].answer
    placed = [[call.placed_realigned for call in row.calls] for row in (one, alone.rows[0])]
    assert placed[0] == placed[1]
    assert placed[0][1] > 0


def test_the_command_goes_on_with_an_evaluation_that_was_killed(mesh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Test_kills.py kills more often, without the command line."""
    whole = evaluate(a_request(mesh, presets=("dense", "linear")))
    runs_dir = mesh.parent / "killed"
    line = ["eval", str(mesh), "--task", str(mesh.parent / "task"), "--warmup", "3", "--limit", "4"]
    line += ["--presets", "dense,linear", "--runs-dir", str(runs_dir)]
    command = [sys.executable, "-m", "agentmesh", *line]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(runs_dir.glob("*/samples.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    path = next(runs_dir.iterdir())
    assert not (path / "results.json").exists()
    shown = ["runs", "show", path.name, "--runs-dir", str(runs_dir)]
    assert invoke(shown) == 0
    assert f"{path.name}: cut off" in capsys.readouterr().out

    assert invoke([*line, "--resume", path.name]) == 0

    assert outcome(read_report(path)) == outcome(whole)
    capsys.readouterr()
    assert invoke([*shown, "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["outcome"], said["results"]["presets"]["linear"]["n"]) == ("finished", 4)
    assert len((path / "samples.jsonl").read_text().splitlines()) == 8


def test_an_evaluation_that_is_interrupted_says_how_to_go_on(
    mesh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(request: Request, _progress: object, started: Callable[[Path, int], Callable[[], None]]) -> None:
        started(request.runs_dir / "20260101T000000-mesh-1", 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "evaluate", interrupted)

    assert invoke(["eval", str(mesh), "--task", str(mesh.parent / "task")]) == 130

    said = " ".join(capsys.readouterr().err.split())
    assert "the same command with --resume 20260101T000000-mesh-1" in said


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_cut_off_and_its_sample_runs_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "samples.jsonl"
    with Journal(path) as journal:
        for name in "abc":
            journal.append(Row(preset="dense", sample=name, answer="7"))
    os.truncate(path, path.stat().st_size - cut)

    with Journal(path) as journal:
        assert [key[1] for key in journal.rows] == ["a", "b"]
        journal.append(Row(preset="dense", sample="c", answer="8"))
    with Journal(path) as journal:
        assert journal.rows["dense", "c", 0].answer == "8"


def test_a_damaged_line_inside_a_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"preset": 3}\n')

    with pytest.raises(RecordError, match=r"samples\.jsonl:1: no row of an evaluation"):
        Journal(path)


def test_failed_samples_are_noted_and_tried_again(mesh: Path) -> None:
    short = ("agents.agent.generate.max_tokens=1", "agents.agent.generate.stop=[zzz]")
    long = mesh.parent / "task" / "samples.jsonl"
    lines = [json.loads(line) for line in long.read_text().splitlines()]
    lines[4]["question"] = "pears " * 4000
    long.write_text("\n".join(map(json.dumps, lines)))

    report = evaluate(a_request(mesh, presets=("dense",), overrides=short[:1]))

    failed = [row for row in report.rows if row.error]
    assert [row.sample for row in failed] == ["s4"]
    assert "RequestTooLongError" in failed[0].error
    assert report.results.presets["dense"].errors == 1
    again = evaluate(a_request(mesh, presets=("dense",), overrides=short[:1], resume=report.path))
    assert len((again.path / "samples.jsonl").read_text().splitlines()) == 5
    with pytest.raises(NodeError, match="the prompt has"):
        evaluate(a_request(mesh, presets=("dense",), overrides=short[:1], fail_on_error=True))


def test_resuming_asks_for_the_same_evaluation(mesh: Path) -> None:
    report = evaluate(a_request(mesh, presets=("dense",)))

    with pytest.raises(InputError, match=r"differs in seed; seed was 0, now 1"):
        evaluate(a_request(mesh, presets=("dense",), resume=report.path, seed=1))


def test_scoring_again_uses_the_samples_as_they_are_now(mesh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(a_request(mesh, presets=("dense",)))
    samples = mesh.parent / "task" / "samples.jsonl"
    rows = {row.sample: row for row in report.rows}
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        if line["id"] in rows:
            line["answer"] = rows[line["id"]].extracted["gsm8k"] or "none"
    samples.write_text("\n".join(map(json.dumps, lines)))

    assert invoke(["score", "last", "--runs-dir", str(mesh.parent / "runs"), "--format", "json"]) == 0

    shown = json.loads(capsys.readouterr().out)
    found = sum(bool(row.extracted["gsm8k"]) for row in report.rows)
    assert shown["presets"]["dense"]["metrics"]["flexible"]["value"] == found / 4


def test_two_evaluations_are_compared_sample_by_sample(mesh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluate(a_request(mesh, presets=("dense",)))
    other = evaluate(a_request(mesh, presets=("prefix",), limit="2"))
    options = ["--runs-dir", str(mesh.parent / "runs"), "--format", "json"]

    assert invoke(["runs", "compare", one.path.name, other.path.name, *options]) == 0

    found = json.loads(capsys.readouterr().out)["presets"]["dense vs prefix"]
    assert (found["n"], found["same_text"], found["delta"]) == (2, 1.0, 0.0)


def test_a_report_is_of_use_in_a_test(mesh: Path) -> None:
    done = agentmesh_evaluate(
        mesh, mesh.parent / "task", presets=["dense"], warmup=3, limit=4, runs_dir=mesh.parent / "runs"
    )
    report = read_report(done.path)

    assert report.results == done.results
    report.assert_score_at_least(0.0, preset="dense")
    with pytest.raises(AssertionError, match=r"dense scores .*, expected at least 1\.1"):
        report.assert_score_at_least(1.1, preset="dense")
    with pytest.raises(InputError, match="no metric 'em'; there are flexible, strict"):
        report.score("dense", "em")
    with pytest.raises(InputError, match="no preset 'linear' was evaluated"):
        report.score("linear")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"presets": ("lineer",)}, "no preset named 'lineer'.*Did you mean 'linear'"),
        ({"presets": ()}, "--presets is empty"),
        ({"limit": "11"}, "--limit 11: there are 10 samples"),
        ({"task": "code-mini"}, "runs code that a model wrote.*--allow-code-execution"),
        ({"task": "rag-mini"}, "brings passages, but mesh mesh never reads them"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    mesh: Path, changes: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmesh.engine.loop.load", None)
    values = {"mesh": str(mesh), "task": str(mesh.parent / "task"), "runs_dir": mesh.parent / "runs", **changes}

    with pytest.raises(UsageError, match=found):
        evaluate(Request(**values))


def test_intervals_hold_the_mean_and_shrink_with_more_samples() -> None:
    few, many = [1.0, 0.0] * 10, [1.0, 0.0] * 100

    assert interval(few)[0] < interval(many)[0] < 0.5 < interval(many)[1] < interval(few)[1]
    assert interval([1.0] * 20)[0] < 1.0
    low, high = interval([0.2, 0.4, 0.9, 0.3] * 10)
    assert low < 0.45 < high
    assert interval([0.3] * 5) == (0.3, 0.3)


def test_paired_figures_know_how_many_samples_differ() -> None:
    same = [1.0, 0.0] * 50
    other = [0.0, *same[1:]]

    low, high = paired_interval(same, same)
    assert low < 0 < high
    assert high < 0.03
    assert paired_interval(same, other)[1] > paired_interval(same, same)[1]
    assert mcnemar(same, same) == 1.0
    assert mcnemar([1.0] * 10, [0.0] * 10) == pytest.approx(2 / 2**10)
    assert mcnemar([0.5], [1.0]) is None
    low, high = paired_interval([0.5, 0.6] * 20, [0.4, 0.6] * 20)
    assert 0 < low < 0.05 < high


def test_the_primary_metric_is_compared_where_a_sample_has_it() -> None:
    def rows(preset: str, *recalls: float | None) -> list[Row]:
        return [
            Row(
                preset=preset,
                sample=str(number),
                answer=preset if recall is None else "same",
                scores={**({} if recall is None else {"recall": recall}), "has_answer": 1.0},
            )
            for number, recall in enumerate(recalls)
        ]

    found = summarise([*rows("dense", None, 0.5, 1.0, None), *rows("linear", None, 0.5, 0.5, None)], "t", "m", "x")

    pair = found.paired["linear vs dense"]
    assert (pair.n, pair.delta, pair.same_text) == (2, -0.25, 1.0)
    assert list(found.presets["dense"].metrics) == ["recall", "has_answer"]
    assert found.presets["dense"].metrics["recall"].value == 0.75
    none = summarise([*rows("dense", None), *rows("linear", None)], "t", "m", "x").paired["linear vs dense"]
    assert (none.n, none.delta) == (1, 0)


def test_reasons_are_those_of_shareable_tokens() -> None:
    """A line break of fixed text inside a block is computed for the same reason, and is no shareable token."""
    plan = [
        PlanRow(segment=segment, kind=Treatment.COMPUTED, tokens=tokens, reason=reason)
        for segment, tokens, reason in (
            ("input question", 16, Reason.BLOCK_HEAD),
            ("fixed", 3, Reason.LINE_BREAK),
            ("message a@0", 2, Reason.LINE_BREAK),
            ("input question", 9, Reason.FIRST_READER),
        )
    ]
    counts = {"prompt_tokens": 30, "placed_exact": 0, "placed_realigned": 0, "computed": 30, "output_tokens": 1}
    times = {"queue_ms": 0.0, "ttft_ms": 1.0, "decode_ms": 1.0}
    call = CallRecord(node="a", round=0, preset="linear", finish="stop", plan=plan, slot_tokens=18, **counts, **times)

    found = summarise([Row(preset="linear", sample="1", calls=[call])], "t", "m", "x").presets["linear"]

    assert found.reasons == {"block-head": 16, "line-break": 2}
    assert found.slot_tokens - found.placed_slots == sum(found.reasons.values())


def test_the_command_lists_what_it_needs(mesh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["eval", str(mesh), "--task", "gsm8"]) == 2
    assert "Did you mean 'gsm8k'" in capsys.readouterr().err.replace("\n", " ")
