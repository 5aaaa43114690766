"""Evaluations exported for other programs: tables that pandas reads back, programs as evalplus wants them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from agentmesh.cli import invoke
from agentmesh.evaluate.export import call_table, evalplus_id, sample_table, solutions
from agentmesh.evaluate.folder import Settings, create
from agentmesh.evaluate.journal import Journal, Row
from agentmesh.evaluate.report import read_report
from agentmesh.events import CallRecord
from agentmesh.metering import Audit
from agentmesh.suites.samples import Sample

UGLY = ['two\nlines, "quoted"', "cr\r\nlf; \ttab", "", "=1+1", "NA", " é 你 \u2028 ", "7"]
PROMPT = 'from typing import List\n\n\ndef add(x: List[int]) -> int:\n    """Sum."""\n'
WHOLE = "```python\ndef add(x: List[int]) -> int:\n    return sum(x)\n```"


def a_call(**changes: Any) -> CallRecord:
    values: dict[str, Any] = {
        "node": "solver",
        "round": 0,
        "preset": "dense",
        "prompt_tokens": 10,
        "placed_exact": 2,
        "placed_realigned": 3,
        "computed": 5,
        "output_tokens": 4,
        "queue_ms": 1.5,
        "ttft_ms": 20.25,
        "decode_ms": 30.0,
        "finish": "stop",
        "plan": (),
        "parts_ms": {"prefill": 12.5},
    }
    return CallRecord(**{**values, **changes})


def rows() -> list[Row]:
    more = a_call(node="checker", audit=Audit(kl=0.25, flip=True))
    found = [
        Row(
            preset=preset,
            sample=f"s{number}",
            begun=1.0,
            ended=3.5,
            answer=text,
            scores={"flexible": 0.5, **({"strict": 1.0} if number else {})},
            extracted={"gsm8k": text[:3]},
            calls=(a_call(), more),
            chosen={"judge": ("solver",)} if number else {},
        )
        for preset in ("dense", "linear")
        for number, text in enumerate(UGLY)
    ]
    return [*found, Row(preset="linear", sample="s9", error="NodeError: no room")]


def an_evaluation(root: Path, rows: list[Row], task: str = "math-mini", data: Path | None = None) -> Path:
    settings = Settings(
        task=task,
        data=None if data is None else str(data),
        samples_sha256="",
        mesh="m",
        mesh_sha256="",
        model="x",
        presets=("dense", "linear"),
        warmup=0,
        limit=None,
        seed=0,
        epochs=1,
        judges={},
    )
    path = create(root, "t", settings, "", {})
    with Journal(path / "samples.jsonl") as journal:
        for row in rows:
            journal.append(row)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_pandas_reads_both_tables_back(tmp_path: Path, kind: str) -> None:
    an_evaluation(tmp_path / "runs", rows())
    line = [
        "runs",
        "export",
        "last",
        "--format",
        kind,
        "-o",
        str(tmp_path / "out"),
        "--runs-dir",
        str(tmp_path / "runs"),
    ]
    assert invoke(line) == 0

    def read(name: str) -> pd.DataFrame:
        file = tmp_path / "out" / f"{name}.{kind}"
        return pd.read_csv(file, keep_default_na=False) if kind == "csv" else pd.read_json(file, lines=True)

    samples, calls = read("samples"), read("calls")
    assert list(samples["answer"]) == [*UGLY, *UGLY, ""]
    assert list(samples["prompt_tokens"]) == [20] * 14 + [0]
    assert list(samples["wall_s"]) == [2.5] * 14 + [0]
    assert samples["error"].iloc[-1] == "NodeError: no room"
    assert samples["strict"].iloc[1] in (1.0, "1.0")
    assert len(calls) == 28
    assert (calls["placed_exact"] + calls["placed_realigned"] + calls["computed"] == calls["prompt_tokens"]).all()
    assert list(calls["node"][:2]) == ["solver", "checker"]
    assert float(calls["audit_kl"].iloc[1]) == 0.25
    parts = calls["parts_ms"].iloc[0]
    assert (json.loads(parts) if kind == "csv" else parts) == {"prefill": 12.5}


def test_the_help_names_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["runs", "export", "--help"]) == 0

    said = re.findall(r"\w+", capsys.readouterr().out)
    columns = {*sample_table(rows()[:2])[0], *call_table(rows()[:1])[0]} - {"flexible"}
    assert columns <= set(said)


def test_a_report_is_the_same_table(tmp_path: Path) -> None:
    frame = read_report(an_evaluation(tmp_path, rows())).to_dataframe()

    assert list(frame.columns) == list(dict.fromkeys(name for record in sample_table(rows()) for name in record))
    assert frame.groupby("preset")["flexible"].mean().to_dict() == {"dense": 0.5, "linear": 0.5}


def test_csv_has_a_column_for_what_only_some_rows_have(tmp_path: Path) -> None:
    path = an_evaluation(tmp_path, rows())
    assert invoke(["runs", "export", str(path)]) == 0

    with (path / "export" / "samples.csv").open(newline="", encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    assert [row["strict"] for row in found[:2]] == ["", "1.0"]
    assert [row["chosen"] for row in found[:2]] == ["", '{"judge": ["solver"]}']


@pytest.fixture
def programs(tmp_path: Path) -> tuple[Path, Path]:
    """An evaluation of three samples of a code task, and its data."""
    test = "def check(candidate):\n    assert candidate([1, 2]) == 3\n"
    lines = [
        {"id": f"HumanEval/{n}", "question": PROMPT, "meta": {"entry_point": "add", "test": test}} for n in range(3)
    ]
    data = tmp_path / "humaneval.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    answers = [WHOLE, "    return sum(x)", "I do not know."]
    found = [
        Row(preset=preset, sample=f"HumanEval/{n}", answer=answer)
        for preset in ("dense", "linear")
        for n, answer in enumerate(answers)
    ]
    found[-1] = Row(preset="linear", sample="HumanEval/2", error="NodeError: no room")
    return an_evaluation(tmp_path / "runs", found, "humaneval", data), data


def test_evalplus_gets_whole_programs_under_its_own_ids(programs: tuple[Path, Path]) -> None:
    path, _ = programs
    assert invoke(["runs", "export", str(path), "--format", "evalplus"]) == 0

    lines = {
        preset: [json.loads(line) for line in (path / "export" / f"evalplus-{preset}.jsonl").read_text().splitlines()]
        for preset in ("dense", "linear")
    }
    assert [line["task_id"] for line in lines["dense"]] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert [line["task_id"] for line in lines["linear"]] == ["HumanEval/0", "HumanEval/1"]
    assert all(line.keys() == {"task_id", "solution"} for line in lines["dense"])
    for line in lines["dense"][:2]:
        names: dict[str, Any] = {}
        exec(line["solution"], names)  # noqa: S102  # written right here
        assert names["add"]([1, 2]) == 3
    assert lines["dense"][2]["solution"] == "I do not know."


def test_evalplus_needs_a_code_task_and_its_samples(
    programs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = programs
    mathematics = an_evaluation(tmp_path / "maths", [Row(preset="dense", sample="math-mini/001", answer="7")])

    assert invoke(["runs", "export", str(mathematics), "--format", "evalplus"]) == 2
    assert "task math-mini is about math" in capsys.readouterr().err
    data.write_text(data.read_text().splitlines()[0])
    assert invoke(["runs", "export", str(path), "--format", "evalplus"]) == 2
    assert "sample 'HumanEval/1' is no longer in" in capsys.readouterr().err
    assert invoke(["runs", "export", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("sample", "task", "found"),
    [
        ("HumanEval/7", "humaneval", "HumanEval/7"),
        ("humaneval/7", "own", "HumanEval/7"),
        ("mbpp/280", "mbpp", "Mbpp/280"),
        ("280", "mbpp", "Mbpp/280"),
        ("280", "own", "280"),
        ("code-mini/001", "code-mini", "code-mini/001"),
    ],
)
def test_ids_are_those_of_evalplus(sample: str, task: str, found: str) -> None:
    assert evalplus_id(sample, task) == found


def test_a_task_without_a_signature_gives_its_last_code_block() -> None:
    sample = Sample(id="mbpp/2", question="Write a function that adds.", entry_point="", tests="assert add(1) == 1")
    row = Row(preset="dense", sample="mbpp/2", answer="Here:\n```python\ndef add(x):\n    return x\n```\nDone.")

    assert solutions([row], {"mbpp/2": sample}, "mbpp") == [
        {"task_id": "Mbpp/2", "solution": "def add(x):\n    return x\n"}
    ]
