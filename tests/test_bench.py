"""The benchmarks that compare presets, and calibration: small but whole, on the command line and on the real model."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inprocess import command
from rich.console import Console
from safetensors import safe_open

from agentmesh import Mesh
from agentmesh.bench import session, ttft
from agentmesh.bench.data import GivenPassages, Passages, Question, dense_runs, read_questions
from agentmesh.bench.fidelity import _Unrotated
from agentmesh.bench.figures import Fidelity, ScalingPoint, Throughput
from agentmesh.bench.rig import Rig, observe
from agentmesh.bench.scaling import Grid, fit_of
from agentmesh.bench.ttft import Layout, Setting, round_of_calls
from agentmesh.communicator import make
from agentmesh.communicator.base import Plan
from agentmesh.communicator.slots import Slots
from agentmesh.config.load import load_mesh
from agentmesh.config.mesh import ModelSpec
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.composition import Placement
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.engine.loop import Engine
from agentmesh.engine.probe import probe
from agentmesh.engine.slices import at_once
from agentmesh.errors import InputError, RequestTooLongError
from agentmesh.metering import Audit
from agentmesh.reasons import Reason
from agentmesh.tables import fidelity_table, throughput_table
from agentmesh.testing import ByteTokenizer

MESH = """
version: 1
model: random:tiny-llama
topology: {use: fully-connected, agents: 3}
agents:
  agent:
    role: [Solver, Analyst, Inspector]
    system: You are a {{ role }}. You work with your team on problems, one small step after the other.
    prompt: |
      {{ question }}
      {% for message in inbox %}
      {{ message.role }}:
      {{ message }}
      {% endfor %}
      Go on.
    generate: {max_tokens: 40}
communicator: {preset: linear, max_kl: 1000, cost_gate: false}
"""


TWO_STEPS = (
    "A farmer has {} crates of pears with {} pears in each crate. On the way to the market he sells a third of the "
    "crates and gives two pears away. How many pears does he bring to the market in the end?"
)
FIDELITY = {"model", "dtype", "n", "settings", "presets", "controls"}
PRESET = {
    *("kl_mean", "kl_chained", "kl_common", "kl_first", "kl_p99", "ci95", "top1"),
    *("slot_tokens", "placed_tokens", "computed_tokens"),
    *("calls", "calls_shareable", "calls_shared", "anchors_held", "by_agent"),
}
SHARED = {"slot_tokens", "placed_tokens", "calls_shareable", "calls_shared", "reasons"}
AGENT = {"kl_mean", "top1", "placed_tokens", "slot_tokens"}
TIMES = {"by_agent_ms", "sum_ms", "parts_ms", "learn_ms", "kv_bytes", "placed", "computed"}
PARTS = {"plan", "match", "realign", "compose", "forward"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mesh.yaml").write_text(MESH)
    lines = [json.dumps({"id": i, "question": f"Problem {i}: " + "count the boats. " * 4}) for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


def figures(*arguments: str, cwd: Path) -> Any:
    done = command(*arguments, "--format", "json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fidelity_gives_the_documented_figures_and_a_plot(folder: Path) -> None:
    options = ["--warmup", "6", "--limit", "2", "--presets", "prefix,epic,linear,kvcomm", "--plot", "f.png"]
    found = figures("bench", "fidelity", "mesh.yaml", "--data", "data.jsonl", *options, cwd=folder)

    assert set(found) == FIDELITY | {"minus_linear", "controls_minus_linear"}
    assert found["n"] == 2
    assert set(found["controls"]) == {"wrong_consumer", "unrotated", "nothing_computed"}
    assert set(found["presets"]) == set(found["settings"]) == {"prefix", "epic", "linear", "kvcomm"}
    for preset in found["presets"].values():
        assert set(preset) == PRESET | {"reasons", "chained_by_agent", "chained"}
        assert set(preset["chained"]) == SHARED
        assert len(preset["ci95"]) == 2
        assert {frozenset(agent) for agent in preset["by_agent"].values()} == {frozenset(AGENT)}
    linear, prefix = found["presets"]["linear"], found["presets"]["prefix"]
    assert linear["calls"] == 6
    assert linear["calls_shareable"] == linear["calls_shared"] == 4
    assert linear["chained"]["calls_shareable"] == linear["chained"]["calls_shared"] == 4
    assert {one["calls"] for one in found["controls_minus_linear"].values()} == {4}
    assert 0 < linear["placed_tokens"] < linear["slot_tokens"]
    assert set(linear["by_agent"]) == {"agent.1", "agent.2", "agent.3"}
    assert prefix["placed_tokens"] == 0
    assert set(found["minus_linear"]) <= {"epic", "kvcomm"}
    epic = found["minus_linear"]["epic"]
    assert epic["calls"] == 4
    assert epic["ci95"][0] <= epic["kl_mean"] <= epic["ci95"][1]
    assert epic["kl_mean"] == pytest.approx(found["presets"]["epic"]["kl_mean"] - linear["kl_mean"], abs=1e-6)
    assert found["settings"]["linear"]["recompute"]["first"] == 8
    assert (folder / "f.png").read_bytes().startswith(b"\x89PNG")


def test_another_consumer_is_no_control_where_no_other_has_learned(folder: Path) -> None:
    options = ["--warmup", "6", "--limit", "1", "--presets", "linear"]
    text = MESH.replace("agents: 3", "agents: 2").replace("[Solver, Analyst, Inspector]", "[Solver, Analyst]")
    (folder / "mesh.yaml").write_text(text)
    found = figures("bench", "fidelity", "mesh.yaml", "--data", "data.jsonl", *options, cwd=folder)

    assert found["presets"]["linear"]["calls_shared"] == 1
    assert found["controls"]["wrong_consumer"] is None
    assert set(found["controls_minus_linear"]) == {"unrotated", "nothing_computed"}
    shown = Console(width=80, file=io.StringIO())
    shown.print(fidelity_table(Fidelity.model_validate(found)))
    assert isinstance(shown.file, io.StringIO)
    text = shown.file.getvalue()
    assert "wrong_consumer shares nothing" in text
    assert "…" not in text, "a terminal of 80 columns shows all of it"


def test_ttft_gives_the_documented_figures_and_a_plot(tmp_path: Path) -> None:
    sizes = ["--agents", "3", "--question", "60", "--prefix", "40", "--output", "40", "--warmup", "5", "--repeat", "1"]
    presets = "dense,prefix,prefix@role-last,kvcomm,linear"
    options = [*sizes, "--presets", presets, "--plot", "t.png", "--model", "random:tiny-llama", "--no-cost-gate"]
    found = figures("bench", "ttft", *options, cwd=tmp_path)

    assert set(found) == {"model", "dtype", "settings", "presets", "speedup"}
    assert set(found["presets"]) == set(found["speedup"]) == set(presets.split(","))
    assert {name for name, preset in found["presets"].items() if preset["anchors_held"]} == {"kvcomm"}
    for preset in found["presets"].values():
        assert set(preset) == TIMES | {
            "parts_by_agent_ms",
            "keep_ms",
            "ingest_ms",
            "calls_shared",
            "reasons",
            "anchors_held",
        }
        assert {frozenset(parts) for parts in (preset["parts_ms"], *preset["parts_by_agent_ms"])} == {frozenset(PARTS)}
        assert [len(preset[key]) for key in ("by_agent_ms", "placed", "computed")] == [3, 3, 3]
        assert preset["sum_ms"] == pytest.approx(sum(preset["by_agent_ms"]))
    for speedup in found["speedup"].values():
        assert set(speedup) == {"by_agent", "sum"}
        assert len(speedup["by_agent"]) == 3
    assert {"agents", "question", "prefix", "output", "layout", "warmup", "repeat", "presets"} <= set(found["settings"])
    linear = found["presets"]["linear"]
    assert linear["calls_shared"] == [0, 1, 1]
    assert linear["placed"][0] < min(linear["placed"][1:])
    dense = found["presets"]["dense"]
    for name in presets.split(","):
        one = found["presets"][name]
        if "role-last" not in name:
            sums = [placed + computed for placed, computed in zip(one["placed"], one["computed"], strict=True)]
            assert sums == dense["computed"]
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_calibrated_mesh_shares_in_its_first_run(folder: Path) -> None:
    to_be_made = ["--set", "communicator.realigners=r.safetensors"]
    options = ["--data", "data.jsonl", "--limit", "6", "-o", "r.safetensors", *to_be_made]
    done = command("calibrate", "mesh.yaml", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "agent.3 read input: 6 observations" in done.stdout
    assert "checks" not in done.stdout, "too few observations to say what sharing costs"

    common = ["-i", f"question=Problem 99: {'count the boats. ' * 4}", "--display", "none", "--strict"]
    use = ["--set", "communicator.realigners=r.safetensors"]
    result = figures("run", "mesh.yaml", *common, *use, cwd=folder)
    assert [call["placed_slots"] > 0 for call in result["calls"]] == [False, True, True]

    cold = command("run", "mesh.yaml", *common, cwd=folder)
    assert cold.returncode == 1
    assert "agentmesh calibrate" in cold.stderr

    small = command("run", "mesh.yaml", *common, *use, "--set", "communicator.budget=10KiB", cwd=folder)
    assert small.returncode == 2
    assert "raise it to at least twice that" in small.stderr

    (folder / "mesh.yaml").write_text(MESH.replace("Go on.", "Continue."))
    changed = command("run", "mesh.yaml", *common, *use, cwd=folder)
    assert changed.returncode == 2
    assert "have changed since" in changed.stderr


def test_a_calibration_measures_what_sharing_costs_and_saves_it(folder: Path) -> None:
    options = ["--data", "data.jsonl", "--limit", "24", "-o", "r.safetensors", "--set", "run.concurrency=1"]
    lines = (folder / "data.jsonl").read_text().splitlines()
    (folder / "data.jsonl").write_text("\n".join([*lines, *(line.replace("Problem", "Task") for line in lines)]))
    done = command("calibrate", "mesh.yaml", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stdout.splitlines() if line.startswith("agent.3 read input"))
    assert re.search(r"24 observations, residual \S+, KL \S+ in 19 checks", told), told
    with safe_open(folder / "r.safetensors", framework="pt") as file:
        links = json.loads(file.metadata()["agentmesh"])["links"]
    assert len(links["agent.3 read input"]["audits"]) == 19
    assert all(abs(kl) < 0.01 and residual > 0 for kl, _, residual in links["agent.3 read input"]["audits"])


def test_a_mesh_that_shares_no_slots_is_calibrated_for_linear(folder: Path) -> None:
    options = ["--data", "data.jsonl", "--limit", "6", "-o", "r.safetensors"]
    done = command("calibrate", "mesh.yaml", *options, "--set", "communicator=prefix", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "communicator: {preset: linear, realigners: r.safetensors}" in done.stdout

    for preset in ("epic", "kvcomm"):
        refused = command("calibrate", "mesh.yaml", *options, "--set", f"communicator={preset}", cwd=folder)
        assert refused.returncode == 2
        assert f"preset '{preset}' learns nothing that can be saved" in refused.stderr


@pytest.mark.model
def test_a_shipped_mesh_with_the_real_model_is_calibrated_and_shares_in_its_first_run(tmp_path: Path) -> None:
    """With the gates as they are by default."""
    lines = [json.dumps({"id": n, "question": TWO_STEPS.format(n + 3, 2 * n + 1)}) for n in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    shipped = Path(__file__).parents[1] / "configs" / "math-fully-connected.yaml"
    (tmp_path / "mesh.yaml").write_text(shipped.read_text().replace("max_tokens: 96", "max_tokens: 40"))
    options = ["--data", "data.jsonl", "--limit", "6", "-o", "r.safetensors"]
    done = command("calibrate", "mesh.yaml", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    use = ["--set", "communicator={preset: linear, realigners: r.safetensors}", "--strict", "--display", "none"]
    question = ["-i", f"question={TWO_STEPS.format(19, 23)}"]
    result = figures("run", "mesh.yaml", *question, *use, cwd=tmp_path)
    assert [call["placed_slots"] > 0 for call in result["calls"]] == [False, True, True]


def test_bad_data_is_refused_before_a_model_is_loaded(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"question": "one"}\n{"text": "two"}\n')

    bad = command("bench", "fidelity", "mesh.yaml", "--data", "bad.jsonl", "--warmup", "1", "--limit", "1", cwd=folder)
    few = command("bench", "fidelity", "mesh.yaml", "--data", "data.jsonl", cwd=folder)
    cut = command("bench", "fidelity", "mesh.yaml", "--data", "data.jsonl", "--passages", "4by256", cwd=folder)

    assert "bad.jsonl:2: expected" in bad.stderr
    assert "has 12 questions, but 60 are asked for" in few.stderr
    assert {bad.returncode, few.returncode, cut.returncode} == {2}


def test_the_stores_of_a_bench_fit_into_memory_together_and_figures_say_their_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 900 * 2**20
    monkeypatch.setattr(session.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    options = ["--data", "data.jsonl", "--warmup", "1", "--limit", "1", "--presets", "epic,linear"]

    short = figures("bench", "fidelity", "mesh.yaml", *options, cwd=folder)["settings"]
    asked = ("--set", "communicator.budget=64MiB")
    ample = figures("bench", "fidelity", "mesh.yaml", *options, *asked, cwd=folder)["settings"]

    told = (folder / "mesh.yaml").read_text().replace("preset: linear,", "preset: linear, budget: 48MiB,")
    (folder / "told.yaml").write_text(told)
    file = figures("bench", "fidelity", "told.yaml", *options, cwd=folder)["settings"]
    entry = ("--set", "communicator={preset: linear, budget: 40MiB}")
    whole = figures("bench", "fidelity", "mesh.yaml", *options, *entry, cwd=folder)["settings"]

    assert {one["budget"] for one in file.values()} == {48 * 2**20}
    assert {one["budget"] for one in whole.values()} == {40 * 2**20}
    stores = 2 * 2 + 3
    assert {one["budget"] for one in short.values()} == {int(free * session.MEMORY_SHARE) // stores}
    assert {one["budget"] for one in ample.values()} == {64 * 2**20}


TEAM = """
version: 1
model: smollm2-135m
topology: {use: fully-connected, agents: 3}
agents:
  agent:
    role: [Math Solver, Mathematical Analyst, Inspector]
    system: You are the {{ role }} of a team. You solve word problems the way a {{ role }} does, one step at a time.
    prompt: |
      Question:
      {{ question }}

      {% for message in inbox %}
      The {{ message.role }} wrote:
      {{ message }}

      {% endfor %}
      Reply step by step.
    generate: {max_tokens: 56}
communicator: {preset: linear, audit: 0.0, budget: 2GiB}
"""


def word_problem(number: int) -> Question:
    rng = random.Random(number)
    name, thing = rng.choice(["Mara", "Tom", "Ines", "Otto"]), rng.choice(["nets", "lamps", "crates", "ropes"])
    a, b, c = rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 6)
    return Question(
        f"{name} keeps {a} boxes in a shed at the harbour, and each box holds {b} {thing}. On Monday {name} sells {c} "
        f"of the {thing} and a boat brings {2 * c} more. How many {thing} are in the shed on Monday evening?"
    )


def test_a_line_gives_all_inputs_that_a_mesh_reads(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"id": "a", "question": "How many?", "style": "short", "answer": "3", "context": None}))
    agents = {"agent": {"prompt": "{{ style }}\n{{ problem }}"}}
    blueprint = Mesh(agents=agents, topology={"use": "chain", "agents": 1}, inputs=["problem", "style"]).blueprint

    (found,) = read_questions(path, 1)

    assert found.inputs(blueprint) == {"problem": "How many?", "style": "short"}


@pytest.fixture(scope="module")
def vivid() -> LoadedModel:
    """A tiny random model with larger weights, so that where its KV comes from shows in what it says."""
    loaded = load(ModelSpec(name="random:tiny-qwen3"))
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "proj" in name:
                weight.mul_(5)
            elif "lm_head" in name:
                weight.mul_(10)
    return loaded


def unrotated(plan: Plan) -> Plan:
    """Its keys stay as if they stood at the beginning of the prompt."""
    placed = tuple(Placement(piece.start, _Unrotated(piece.kv)) for piece in plan.composition.placed)
    return replace(plan, composition=replace(plan.composition, placed=placed, ready=None))


def audits_of(
    vivid: LoadedModel, spoil: Callable[[Plan], Plan] = lambda plan: plan, *, learned_by: str = "agent.2"
) -> tuple[list[Audit | None], Plan]:
    """Ten audits of an agent behind a warm-up, and its plan for the question after them.

    A random model has no sure answers, so its first tokens flip by chance: only KL is limited here.
    """
    support = probe(vivid.model, vivid.step)
    assert isinstance(support.runner, ArenaRunner)
    rig, setting = Rig(support.runner), Setting(3, 60, 40, 40, Layout.ROLE_FIRST)
    preset = make(CommunicatorSpec(preset="linear", audit=1.0, max_flips=1.0, cost_gate=False), support, vivid)
    assert isinstance(preset, Slots)
    rounds = [round_of_calls(ByteTokenizer(), setting, setting.layout, number) for number in range(16)]
    for number, calls in enumerate(rounds[:5]):
        for call in calls:
            observe(preset, call, rig.dense(call))
        preset.release(f"round {number}")
    ledger, found = preset.learner.ledger, []
    known = {name: state for name, state in ledger.states.items() if name.startswith(f"{learned_by} ")}
    ledger.states = {name.replace(learned_by, "agent.2"): state for name, state in known.items()}
    for number, (first, call, _) in enumerate(rounds[5:], 5):
        observe(preset, first, rig.dense(first))
        plan = preset.plan(call.prompt)
        if number == 15:
            return found, plan
        plan = spoil(plan)
        said = rig.composed(call, plan.composition)
        preset.prefilled(call.prompt, plan, said.arena)
        preset.finished(call.prompt, plan, said.arena, call.message)
        found.append(at_once(preset.checked(call.prompt, plan, said.cache, said.logits[0])))
        preset.closed(plan)
        preset.release(f"round {number}")
    raise AssertionError("there are sixteen rounds")


def test_ten_audits_leave_the_breaker_of_an_honest_slot_closed(vivid: LoadedModel) -> None:
    audits, after = audits_of(vivid)

    assert all(audit is not None and not audit.opened for audit in audits)
    assert after.placed_slots > 0


@pytest.mark.parametrize(("spoil", "learned_by"), [(unrotated, "agent.2"), (lambda plan: plan, "agent.3")])
def test_keys_that_are_not_rotated_and_offsets_of_another_consumer_open_a_breaker_within_ten_audits(
    vivid: LoadedModel, spoil: Callable[[Plan], Plan], learned_by: str
) -> None:
    audits, after = audits_of(vivid, spoil, learned_by=learned_by)

    assert "agent.2 wrote message" in {name for audit in audits if audit is not None for name in audit.opened}
    said = {row.reason for row in after.rows if row.segment == "message agent.1@0"}
    assert said == {Reason.BREAKER_OPEN, Reason.NO_KV}
    assert after.placed_slots == 0


@pytest.mark.model
@pytest.mark.timeout(900)  # two minutes on a quick machine, four in a slow hour
def test_on_the_real_model_linear_is_near_dense_and_the_controls_are_not(tmp_path: Path) -> None:
    (tmp_path / "team.yaml").write_text(TEAM)
    questions = [word_problem(number) for number in range(12)]
    names = ["rotate", "epic", "linear"]

    found = session.fidelity(
        load_mesh(tmp_path / "team.yaml"),
        questions,
        names,
        (8, 4),
        None,
        corpus=False,
        progress=None,
        tick=lambda: None,
    )

    linear, rotate, epic = (found.presets[name] for name in ("linear", "rotate", "epic"))
    assert linear.calls_shared == linear.calls_shareable == 8
    assert linear.placed_tokens >= 0.75 * linear.slot_tokens
    assert linear.kl_mean <= 0.007
    assert linear.kl_chained <= 0.0075
    assert linear.kl_mean < epic.kl_mean < rotate.kl_mean
    assert found.controls["unrotated"] >= 8 * linear.kl_mean
    assert found.controls["wrong_consumer"] >= 1.4 * linear.kl_mean
    assert found.controls["nothing_computed"] >= 1.6 * linear.kl_mean


@pytest.mark.parametrize("layout", Layout)
def test_a_round_of_calls_has_the_asked_sizes_in_both_layouts(layout: Layout) -> None:
    calls = round_of_calls(ByteTokenizer(), Setting(3, 100, 50, 40, layout), layout, 1)
    again = round_of_calls(ByteTokenizer(), Setting(3, 100, 50, 40, layout), layout, 1)
    other = round_of_calls(ByteTokenizer(), Setting(3, 100, 50, 40, layout), layout, 2)

    assert [call.prompt.tokens for call in calls] == [call.prompt.tokens for call in again]
    assert all(len(call.message) == 40 for call in calls)
    for number, call in enumerate(calls):
        sizes = [len(segment.tokens) for segment in call.prompt.segments if segment.content is not None]
        assert sizes == [100] + [40] * number, "the question and the messages before"
    first, last = [{call.prompt.segments[place].tokens for call in calls} for place in (0, -1)]
    if layout is Layout.ROLE_FIRST:
        assert [len(lead) for lead in first] == [50, 50, 50]
        assert [len(end) for end in last] == [len("\n\nAnswer the question.\n")]
    else:
        assert [len(lead) for lead in first] == [ttft.COMMON_PREFIX]
        assert len(last) == 3
    assert [one.prompt.segments[0] for one in calls] == [one.prompt.segments[0] for one in other]
    assert calls[0].prompt.segments[2].tokens != other[0].prompt.segments[2].tokens, "another question"


@pytest.mark.parametrize(
    ("bench", "preset", "said"),
    [
        ("ttft", "prefix@rolelast", "expected prefix@role-first, role-last"),
        ("fidelity", "linear@role-last", "layouts are for `bench ttft`"),
        ("ttft", "prefixx@role-last", "Did you mean 'prefix'?"),
    ],
)
def test_a_layout_that_is_none_is_refused_before_anything_is_loaded(
    folder: Path, bench: str, preset: str, said: str
) -> None:
    where = ("mesh.yaml", "--data", "data.jsonl") if bench == "fidelity" else ("--model", "random:tiny-llama")
    found = command("bench", bench, *where, "--presets", preset, cwd=folder)

    assert found.returncode == 2
    assert said in " ".join(found.stderr.split())


def test_throughput_refuses_a_mesh_with_a_store(folder: Path) -> None:
    options = ["--warmup", "1", "--limit", "1", "--set", "communicator={preset: linear, store: {path: kept}}"]
    found = command("bench", "throughput", "mesh.yaml", "--data", "data.jsonl", *options, cwd=folder)

    assert found.returncode == 2
    assert "--set communicator.store=null" in " ".join(found.stderr.split())


def test_a_deterministic_mesh_says_how_many_runs_overlap(folder: Path) -> None:
    options = ["--warmup", "0", "--limit", "1", "--concurrency", "16", "--presets", "dense", "--baseline", "0"]
    options += ["--set", "run.deterministic=true"]
    found = figures("bench", "throughput", "mesh.yaml", "--data", "data.jsonl", *options, cwd=folder)

    assert [(run["concurrency"], run["at_once"]) for run in found["runs"]] == [(16, 8)]


def test_throughput_compares_presets_and_concurrencies_with_one_call_at_a_time(folder: Path) -> None:
    options = ["--warmup", "5", "--limit", "4", "--concurrency", "1,4", "--presets", "dense,linear", "--baseline", "1"]
    found = figures("bench", "throughput", "mesh.yaml", "--data", "data.jsonl", *options, cwd=folder)

    assert set(found) == {"model", "dtype", "settings", "baseline", "runs"}
    assert found["baseline"]["name"] == "transformers generate, one at a time"
    assert [(run["preset"], run["concurrency"]) for run in found["runs"]] == [
        ("dense", 1),
        ("linear", 1),
        ("dense", 4),
        ("linear", 4),
    ]
    for run in found["runs"]:
        assert run["tokens_per_s"] > 0
        assert run["at_once"] == run["concurrency"]
        assert 0 < run["prefill_share"] + run["decode_share"] + run["keep_share"] <= 1
        assert run["ttft_ms"]["p50"] <= run["ttft_ms"]["p90"]
        assert (run["placed_share"] > 0) == (run["preset"] == "linear")
        assert (run["calls_shared"] > 0) == (run["preset"] == "linear")
        assert run["calls_shared"] <= run["calls_shareable"]
        assert bool(run["reasons"]) == (run["calls_shareable"] > 0)
    shown = Console(width=80, file=io.StringIO())
    shown.print(throughput_table(Throughput.model_validate(found)))
    assert isinstance(shown.file, io.StringIO)
    text = shown.file.getvalue()
    assert "…" not in text, "a terminal of 80 columns shows all of it"
    assert all(reason in text for run in found["runs"] for reason in run["reasons"])
    wrong = command("bench", "throughput", "mesh.yaml", "--data", "data.jsonl", "--concurrency", "two", cwd=folder)
    assert wrong.returncode == 2
    assert "expected numbers from 1 on" in wrong.stderr


def test_ttft_of_a_mesh_takes_its_limits_and_its_choices_for_its_own_preset(folder: Path) -> None:
    sizes = ["--agents", "2", "--question", "60", "--prefix", "40", "--output", "40", "--warmup", "0", "--repeat", "1"]
    own = "communicator={preset: epic, min_tokens: 50, recompute: {first: 4}, budget: 90MiB, cost_gate: false}"
    options = [*sizes, "--model", "random:tiny-llama", "--presets", "rotate,epic@role-last", "--mesh", "mesh.yaml"]
    found = figures("bench", "ttft", *options, "--set", own, cwd=folder)

    chosen = found["settings"]["presets"]
    assert {name: of["recompute"]["first"] for name, of in chosen.items()} == {"rotate": 0, "epic": 4}
    for of in chosen.values():
        assert (of["min_tokens"], of["budget"], of["cost_gate"]) == (50, 90 * 2**20, False)
    placed = {name: times["placed"][1] for name, times in found["presets"].items()}
    assert placed["rotate"] == 60, "the question; its message is too short, as the mesh says"
    assert placed["epic@role-last"] > 60


def test_ttft_of_a_mesh_whose_own_preset_is_not_asked_for_is_refused(folder: Path) -> None:
    options = ["--mesh", "mesh.yaml", "--set", "communicator=blend", "--presets", "dense,linear"]
    found = command("bench", "ttft", *options, cwd=folder)

    assert found.returncode == 2
    assert "the mesh has 'blend', whose choices would not be timed; add blend" in " ".join(found.stderr.split())


@pytest.mark.parametrize("corpus", [False, True])
def test_ttft_of_passages_as_a_block_and_from_the_corpus(tmp_path: Path, corpus: bool) -> None:
    sizes = ["--agents", "2", "--question", "20", "--prefix", "20", "--output", "40", "--warmup", "5", "--repeat", "1"]
    options = [
        *sizes,
        "--presets",
        "dense,epic",
        "--model",
        "random:tiny-llama",
        "--passages",
        "2x50",
        "--no-cost-gate",
    ]
    found = figures("bench", "ttft", *options, *(["--corpus"] if corpus else []), cwd=tmp_path)

    epic = found["presets"]["epic"]
    assert (epic["placed"][0] > 60) == corpus  # two passages of 50, less the 16 first tokens of each
    assert epic["placed"][1] > 60
    assert (epic["ingest_ms"] > 0) == corpus


def test_ttft_checks_every_layout_against_the_models_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Role-last prompts begin with 32 tokens that role-first ones do not have."""
    checked: list[int] = []

    def check(_engine: Engine, tokens: int) -> None:
        checked.append(tokens)
        raise RequestTooLongError("far too long")

    monkeypatch.setattr(Engine, "check", check)
    setting = Setting(2, 100, 50, 40, Layout.ROLE_FIRST)
    for names in (("dense",), ("dense", "prefix@role-last")):
        with pytest.raises(RequestTooLongError):
            session.ttft(
                ModelSpec(name="random:tiny-llama"),
                names,
                setting,
                1,
                1,
                base=CommunicatorSpec(),
                progress=None,
                tick=lambda: None,
            )

    assert checked[1] - checked[0] == ttft.COMMON_PREFIX


def test_a_question_that_is_there_twice_with_other_passages_is_refused() -> None:
    asked = [Question("Which pier?", (f"Pier {number} holds boats. " * 4,)) for number in (1, 2)]
    recording: Any = SimpleNamespace(tokenizer=ByteTokenizer())
    given = {"finder": GivenPassages("question")}
    mesh: Any = None

    with pytest.raises(InputError, match="the question 'Which pier\\?' is there twice"):
        next(dense_runs(mesh, recording, asked, given, Passages(2, 20)))


def test_scaling_gives_the_documented_figures_a_fit_and_a_plot(tmp_path: Path) -> None:
    sizes = ["--model", "random:tiny-llama", "--lengths", "256,512,1024", "--placed", "0,0.5,0.75", "--repeat", "2"]
    found = figures("bench", "scaling", *sizes, "--plot", "s.png", cwd=tmp_path)

    assert set(found) == {"model", "dtype", "settings", "points", "fit"}
    assert set(found["fit"]) == {"base_ms", "ms_per_token", "ms_per_million_pairs", "ms_per_mib", "r2", "worst"}
    points = {(point["prompt_tokens"], point["share"]): point for point in found["points"]}
    assert list(points) == [(length, share) for length in (256, 512, 1024) for share in (0.0, 0.5, 0.75)]
    for (length, share), point in points.items():
        assert point["placed"] + point["computed"] == length
        assert bool(share) == bool(point["bytes_placed"]) == bool(point["parts_ms"]["realign"])
        assert share * length - 24 <= point["placed"] <= share * length  # some tokens of a block are computed
        assert 0 < sum(point["parts_ms"].values()) <= 1.05 * point["ttft_ms"]
        assert share or point["attended"] == length * (length + 1) // 2
    assert points[1024, 0.75]["attended"] < points[1024, 0.5]["attended"] < points[1024, 0.0]["attended"]
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_fit_finds_what_times_were_made_of() -> None:
    def point(computed: int, attended: int, mib: int) -> ScalingPoint:
        ms = 3 + 0.5 * computed + 7 * attended / 1e6 + 0.25 * mib
        return ScalingPoint(
            prompt_tokens=0,
            share=0,
            placed=0,
            computed=computed,
            attended=attended,
            bytes_placed=mib * 2**20,
            ttft_ms=ms,
            parts_ms={},
            speedup=1,
            matching_share=0,
            realigning_share=0,
            fitted_ms=0,
        )

    points = [point(n, n * n // 2 + 90 * mib, mib) for n in (500, 1000, 4000, 8000) for mib in (0, 40, 300)]
    fit, fitted = fit_of(points)

    assert (fit.base_ms, fit.ms_per_token, fit.ms_per_million_pairs, fit.ms_per_mib) == pytest.approx((3, 0.5, 7, 0.25))
    assert fit.r2 == pytest.approx(1)
    assert fit.worst < 1e-6
    assert fitted == pytest.approx([one.ttft_ms for one in points])


def test_what_scaling_measures_by_default_can_be_measured() -> None:
    assert Grid((512, 1024, 2048, 4096, 7680), (0.0, 0.5, 0.9), 3).ticks == 5 + 3 * 15


def test_scaling_says_what_it_cannot_measure(tmp_path: Path) -> None:
    tiny = ["bench", "scaling", "--model", "random:tiny-llama", "--repeat", "1"]
    few = command(*tiny, "--lengths", "256,512", "--placed", "0.5", cwd=tmp_path)
    short = command(*tiny, "--lengths", "90,512,1024", "--placed", "0.5", cwd=tmp_path)
    shares = command(*tiny, "--placed", "half", cwd=tmp_path)
    long = command(*tiny, "--lengths", "256,512,90000", "--placed", "0.5", cwd=tmp_path)

    assert "make 4 points, too few for a fit of 4 coefficients" in few.stderr
    assert "is a block of 45 tokens" in short.stderr
    assert "expected shares from 0 to below 1" in shares.stderr
    assert "the prompt has 90,000 tokens" in long.stderr
    assert {few.returncode, short.returncode, shares.returncode} == {2}
