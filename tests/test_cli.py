"""The command line as people use it: exit codes, JSON, clear errors, interruption, records."""

from __future__ import annotations

import io
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inprocess import command
from rich.console import Console

from agentmesh import display
from agentmesh.cli import invoke
from agentmesh.display import counting
from agentmesh.record import find_run, outcome, read_events, runs

MESH = """version: 1
model: random:tiny-llama
topology: fully-connected
agents:
  agent:
    system: |
      You are a {{ role }} of a team. You read the question and the answers of the others, then you answer shortly.
    prompt: |
      {{ question }}
      {% for message in inbox %}
      {{ message }}
      {% endfor %}
    generate: {max_tokens: 12}
"""


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return path


def started(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "agentmesh", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=120, check=False, **options)


def test_run_prints_one_json_object_with_the_stable_keys(mesh: Path, tmp_path: Path) -> None:
    done = started("run", mesh, "-i", "question=What is 3 + 4?", "--format", "json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) >= {"answer", "messages", "calls"}
    assert set(result["messages"][0]) == {"node", "role", "round", "text", "tokens"}
    call = result["calls"][0]
    keys = "node round preset prompt_tokens placed_exact placed_realigned computed output_tokens ttft_ms decode_ms plan"
    assert set(call) >= set(keys.split())
    assert set(call["plan"][0]) == {"segment", "kind", "tokens", "source", "reason", "text"}
    for call in result["calls"]:
        assert call["placed_exact"] + call["placed_realigned"] + call["computed"] == call["prompt_tokens"]
    record = runs(tmp_path / "runs")[0]
    assert outcome(record) == "finished"
    assert {"manifest.json", "mesh.yaml", "events.jsonl", "samples.jsonl", "results.json", "summary.md"} == {
        path.name for path in record.iterdir()
    }
    assert json.loads((record / "results.json").read_text()) == result


def test_presets_and_sets_change_the_run_but_not_the_tokens(mesh: Path, tmp_path: Path) -> None:
    common = ["-i", "question=What?", "--display", "none", "--format", "json"]
    dense = json.loads(command("run", mesh, *common, "--preset", "dense", cwd=tmp_path).stdout)
    prefix = json.loads(
        command("run", mesh, *common, "--set", "agents.agent.generate.max_tokens=12", cwd=tmp_path).stdout
    )

    assert {call["preset"] for call in dense["calls"]} == {"dense"}
    assert {call["preset"] for call in prefix["calls"]} == {"prefix"}
    assert dense["messages"] == prefix["messages"]
    assert [call["prompt_tokens"] for call in dense["calls"]] == [call["prompt_tokens"] for call in prefix["calls"]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "mesh.yaml"], 2, "input 'question' is missing"),
        (["run", "mesh.yaml", "-i", "question="], 2, "is empty"),
        (["run", "mesh.yaml", "-i", "qestion=x"], 2, "no input 'qestion'"),
        (["run", "mesh.yaml", "-i", "novalue"], 2, "expected NAME=TEXT"),
        (["run", "mesh.yaml", "-i", "question=@nowhere.txt"], 2, "cannot be read"),
        (["run", "mesh.yaml", "-i", "question=@latin1.txt"], 2, "is not UTF-8"),
        (["run", "mesh.yaml", "-i", "question=x", "--preset", "prefx"], 2, "Did you mean 'prefix'"),
        (["run", "mesh.yaml", "-i", "question=x", "--set", "model=smolm2-135m"], 2, "Did you mean 'smollm2-135m'"),
        (["run", "mesh.yaml", "-i", "question=@long.txt"], 1, "reads at most 4,095"),
        (["run", "mesh.yaml", "-i", "question=x", "--runs-dir", "mesh.yaml"], 1, "cannot write the run's record"),
        (["run", "nowhere.yaml", "-i", "question=x"], 2, "does not exist"),
        (["validate", "nowhere"], 2, "no config named 'nowhere'"),
        (["validate", "broken.yaml"], 2, "broken.yaml:2:1: not valid YAML"),
        (["graph", "debat"], 2, "Did you mean 'debate'"),
        (["plan", "demo", "--preset", "linar"], 2, "Did you mean 'linear'"),
        (["bench", "fidelity", "demo", "--data", "none.jsonl"], 2, "none.jsonl: cannot be read"),
        (["bench", "ttft", "--presets", "linear,blen"], 2, "Did you mean 'blend'"),
        (["bench", "ttft", "--layout", "sideways"], 2, "expected role-first or role-last"),
        (["bench", "ttft", "--set", "communicator=blend"], 2, "say which one's communicator is timed"),
        (["calibrate", "demo", "--data", "x.jsonl", "-o", "nowhere/r.safetensors"], 2, "does not exist"),
        (["graph", "debate", "--format", "png"], 2, "ascii, dot, json, mermaid"),
        (["runs", "show", "zzz"], 2, "no run named"),
        (["models", "pull", "gpt"], 2, "no model 'gpt'"),
        (["nonsense"], 2, "No such command"),
        (["run"], 2, "Missing argument"),
        (["bench", "prefix", "--seen", "5000"], 2, "must be less than"),
    ],
)
def test_wrong_requests_end_with_a_clear_error(
    mesh: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (mesh.parent / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (mesh.parent / "long.txt").write_text("many words " * 1900)
    (mesh.parent / "broken.yaml").write_text("version: [1\n")
    monkeypatch.chdir(mesh.parent)

    found = invoke(arguments)

    shown = capsys.readouterr().err
    assert found == code, shown
    assert message in " ".join(shown.split()), shown
    assert "Traceback" not in shown


def seconds(work: Callable[[], object]) -> float:
    """Processor time of the processes that ``work`` starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_looking_at_files_is_quick_and_loads_no_model(tmp_path: Path) -> None:
    """A second where Python and four libraries start in a quarter of one, each compared in its turn: speed wanders."""

    def libraries() -> None:
        subprocess.run([sys.executable, "-c", "import networkx, pydantic, rich, typer"], check=True, cwd=tmp_path)

    def look(arguments: Sequence[str]) -> None:
        done = started(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    for arguments in (
        ["graph", "debate"],
        ["validate", "demo"],
        ["plan", "demo", "--preset", "linear"],
        ["ls"],
        ["schema"],
        ["--help"],
    ):
        ratios: list[float] = []
        while len(ratios) < 3 and min(ratios, default=4) >= 4:
            start = seconds(libraries)
            ratios.append(seconds(partial(look, arguments)) / start)
        assert min(ratios) < 4, (arguments, ratios)


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (
        "run",
        "validate",
        "graph",
        "schema",
        "ls",
        "cp",
        "doctor",
        "models pull",
        "runs show",
        "bench prefix",
        "bench fidelity",
        "bench ttft",
        "plan",
        "calibrate",
    ):
        assert invoke([*verb.split(), "--help"]) == 0
    assert "question=" in capsys.readouterr().out


def test_options_can_be_set_in_the_environment(mesh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMESH_RUN_PRESET", "dense")
    monkeypatch.setenv("AGENTMESH_RUN_FORMAT", "json")

    done = command("run", mesh, "-i", "question=x", cwd=tmp_path)

    assert json.loads(done.stdout)["calls"][0]["preset"] == "dense"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_a_readable_record(
    mesh: Path, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def heeding() -> None:
        """Shells let what they start in the background ignore SIGINT, and with it all its children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    long = ["--set", "agents.agent.generate.max_tokens=1900"]
    line = [sys.executable, "-m", "agentmesh", "run", str(mesh), "-i", "question=What?", *long]
    with subprocess.Popen(
        line,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heeding,  # noqa: PLW1509  # one call to the system
    ) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            folders = runs(tmp_path / "runs")
            if folders and any(event.type == "model.first_token" for event in read_events(folders[0])):
                break
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)

    record = find_run(tmp_path / "runs", "last")
    numbers = [event.seq for event in read_events(record)]
    assert numbers == sorted(set(numbers))
    assert numbers[:3] == [0, 1, 2]
    if number == signal.SIGINT:
        assert process.returncode == 130, said.decode()
        assert outcome(record) == "cancelled"
    else:
        assert outcome(record) == "cut off"
    assert invoke(["runs", "show", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert ("cancelled after" in capsys.readouterr().out) == (number == signal.SIGINT)


def test_a_full_disk_fails_the_run_and_keeps_what_was_finished(mesh: Path, tmp_path: Path) -> None:
    """A file size limit stands for a full disk: the write fails in the middle of the run."""
    assert command("run", mesh, "-i", "question=x", "--display", "none", cwd=tmp_path).returncode == 0
    before = find_run(tmp_path / "runs", "last")

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    arguments = ["run", mesh, "-i", "question=" + "long " * 400, "--display", "none"]
    done = started(*arguments, cwd=tmp_path, preexec_fn=small_files)  # a single-threaded child

    assert done.returncode == 1
    assert "cannot write the run's record" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert outcome(before) == "finished"
    assert json.loads((before / "results.json").read_text())["answer"]


def test_runs_are_listed_and_shown(mesh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "records")
    assert invoke(["runs", "ls", "--runs-dir", folder]) == 0
    assert invoke(["run", str(mesh), "-i", "question=x", "--display", "plain", "--runs-dir", folder]) == 0
    assert invoke(["runs", "ls", "--runs-dir", folder, "--format", "json"]) == 0
    capsys.readouterr()

    assert invoke(["runs", "show", "last", "--runs-dir", folder, "--format", "json"]) == 0

    shown = json.loads(capsys.readouterr().out)
    assert shown["outcome"] == "finished"
    assert shown["manifest"]["model"]["name"] == "random:tiny-llama"
    assert len(shown["manifest"]["model"]["fingerprint"]) == 64


@pytest.mark.parametrize("exact", [True, False])
def test_a_manifest_says_whether_the_same_run_may_give_other_tokens(mesh: Path, tmp_path: Path, exact: bool) -> None:
    folder = tmp_path / "records"
    asked = ["run", str(mesh), "-i", "question=x", "--display", "plain", "--runs-dir", str(folder)]

    assert invoke([*asked, *(["--deterministic"] if exact else [])]) == 0

    (record,) = folder.iterdir()
    said = json.loads((record / "manifest.json").read_text())["determinism"]
    assert said.startswith("The same seed, inputs and order" if exact else "The same run may give other tokens")
    assert ("deterministic: true" in (record / "mesh.yaml").read_text()) is exact


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["doctor", "--model", "random:tiny-smollm3", "--format", "json"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["model random:tiny-smollm3"]["layers"] == "2 rope, 1 nope"
    assert {"versions", "machine", "models", "sandbox"} <= set(report)


def test_validate_looks_at_all_files_and_at_what_they_name(
    mesh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mesh.parent)
    text = mesh.read_text(encoding="utf-8")
    learned = "communicator: {preset: linear, realigners: r.safetensors}"
    wrong = {
        "model.yaml": ("model: random:tiny-llama", "model: smolm2-135m", "Did you mean 'smollm2-135m'"),
        "learned.yaml": ("version: 1", f"version: 1\n{learned}", "calibrate"),
        "role.yaml": ("  agent:", "  agent:\n    python: nowhere:Role", "cannot import 'nowhere'"),
    }
    for name, (old, new, _) in wrong.items():
        assert old in text, name
        Path(name).write_text(text.replace(old, new), encoding="utf-8")

    assert invoke(["validate", *wrong, "mesh.yaml"]) == 2

    shown = capsys.readouterr()
    assert shown.out.startswith("mesh.yaml: ok"), "a wrong file keeps no other from being looked at"
    for _, _, message in wrong.values():
        assert message in shown.err
    assert invoke(["validate", *wrong, "mesh.yaml", "--format", "json"]) == 2
    rows = json.loads(capsys.readouterr().out)
    assert [(row["config"], row["ok"]) for row in rows] == [*((name, False) for name in wrong), ("mesh.yaml", True)]


def test_long_work_says_in_a_log_after_every_tenth_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: 0.0))
    for total, told in ((25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]), (3, [1, 2, 3])):
        log = io.StringIO()
        with counting(Console(file=log), "measuring", total) as tick:
            for _ in range(total):
                tick()
        assert log.getvalue().splitlines() == [f"measuring: {number} of {total} after 0:00:00" for number in told]


def test_long_work_shows_a_bar_on_a_terminal() -> None:
    shown = io.StringIO()
    with counting(Console(file=shown, force_terminal=True), "measuring", 2) as tick:
        tick()

    assert "measuring" in shown.getvalue()
    assert "1/2" in shown.getvalue()
    assert "after" not in shown.getvalue()
