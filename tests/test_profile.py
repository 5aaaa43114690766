"""Profiles: parts that add up, a bounded trace that viewers open, and nothing at all while they are off."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import command

from agentmesh.config.load import mesh_from_dict
from agentmesh.config.mesh import ModelSpec
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition, Parts
from agentmesh.engine.forward import PlainRunner
from agentmesh.engine.generation import Generation, Spent
from agentmesh.engine.loading import load
from agentmesh.engine.loop import Engine
from agentmesh.engine.operations import FORWARD, PREFIX, PRODUCTS, Work, sort
from agentmesh.engine.probe import Level, probe
from agentmesh.engine.profile import Profiles, figures
from agentmesh.engine.sampling import Sampling
from agentmesh.engine.slices import Slices
from agentmesh.engine.spans import ENOUGH, Forwards, Limits, Part, Recorded, Spans
from agentmesh.kv.arena import Arena
from agentmesh.local import LocalBackend
from agentmesh.mesh import Mesh

MESH = {
    "version": 1,
    "model": "random:tiny-llama",
    "topology": {"use": "fully-connected", "agents": 3},
    "inputs": ["question"],
    "agents": {
        "agent": {
            "role": ["Solver", "Analyst", "Inspector"],
            "system": "You are a {{ role }}. You work with your team on problems, one small step after the other.",
            "prompt": "{{ question }}\n{% for m in inbox %}{{ m.role }}:\n{{ m }}\n{% endfor %}Go on.",
            "generate": {"max_tokens": 24},
        }
    },
    "communicator": {"preset": "linear", "max_kl": 1000, "audit": 1.0, "min_tokens": 8, "cost_gate": False},
}


class Whole:
    """A source that computes its whole prompt."""

    since: float | None = None
    limit: int = 2**40

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tuple(tokens)

    def room(self, need: int, *, alone: bool) -> bool:
        return True

    def compose(self) -> tuple[Composition, Parts]:
        return Composition(self.tokens), Parts()

    def placed(self) -> None: ...

    def prefilled(self, arena: Arena) -> None:
        pass

    def finished(self, arena: Arena, tokens: tuple[int, ...]) -> None:
        pass

    def checked(self, cache: ArenaCache, logits: torch.Tensor) -> Slices[None]:
        yield from ()

    def closed(self) -> None:
        pass


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    with Engine(loaded, probe(loaded.model, loaded.step)) as engine:
        yield engine


def answer(engine: Engine, prompts: int = 3, tokens: int = 30) -> list[Generation]:
    async def every() -> list[Generation]:
        calls = (
            engine.generate(
                Whole([40 + n, *range(60, 160)]), 101, Sampling(max_tokens=tokens), lambda _: None, lambda _: None
            )
            for n in range(prompts)
        )
        return list(await asyncio.gather(*calls))

    return asyncio.run(every())


def seconds(seen: Recorded, *parts: Part) -> float:
    return sum(seen.parts[part].seconds for part in parts if part in seen.parts)


def test_the_parts_add_up_to_the_wall_time_and_to_what_the_engine_counts_itself(engine: Engine) -> None:
    engine.core.spent = Spent()
    begun = time.perf_counter()
    engine.begin_profile()
    done = answer(engine)
    seen = engine.end_profile()
    wall, spent, found = time.perf_counter() - begun, engine.core.spent, figures(seen)

    assert found.wall_s <= wall
    assert sum(part.seconds for part in found.parts if not part.of) == pytest.approx(found.wall_s, rel=1e-6)
    assert seconds(seen, Part.IDLE) >= 0
    for whole in {part.of for part in found.parts if part.of}:
        inner = sum(part.seconds for part in found.parts if part.of == whole)
        assert inner == pytest.approx(next(part.seconds for part in found.parts if part.name == whole), rel=1e-6)
    looking = seconds(seen, Part.PROFILE)
    mine = spent.prefill_s + spent.decode_s + spent.keep_s - looking
    theirs = found.wall_s - looking - seconds(seen, Part.IDLE, Part.RUNS)
    assert mine == pytest.approx(theirs, rel=0.05, abs=0.01)
    assert found.steps.count == sum(part.calls for part in found.parts if part.name == "decoding steps") == 29
    assert found.steps.mean_rows == sum(len(one.tokens) - 1 for one in done) / found.steps.count
    assert (found.prefills.count, found.prefills.looked_at, found.prefills.mean_rows) == (3, 3, 101)
    assert (found.waited, found.waited_s > 0) == (3, True)


def test_most_of_a_tiny_models_decoding_is_outside_its_own_kernels_and_none_of_it_is_negative(engine: Engine) -> None:
    engine.begin_profile()
    answer(engine)
    found = figures(engine.end_profile())

    kinds = {part.name: part.seconds for part in found.parts if part.of == "decoding steps"}
    assert set(kinds) == {*(work.value for work in Work), "sampling and text", "Python between them"}
    assert all(value > 0 for value in kinds.values())
    assert found.outside is not None
    assert 0.3 < found.outside < 1
    own = sum(kinds[name] for name in ("matrix products", "attention", "norms, activations, views"))
    assert found.outside == pytest.approx(1 - own / sum(kinds.values()))


def test_the_trace_is_one_that_viewers_open_with_parts_and_operations_inside_them(engine: Engine) -> None:
    profiles = Profiles()
    with profiles.of(engine, "first"):
        answer(engine, prompts=2, tokens=8)
    with profiles.of(engine, "second"):
        answer(engine, prompts=1, tokens=2)
    events = json.loads(profiles.trace())["traceEvents"]

    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert processes == list(profiles.taken) == ["first", "second"]
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    assert {"prefill", "decode", "sampling and text", "keep", "linear", "scaled_dot_product_attention"} <= {
        event["name"] for event in spans
    }
    decodes = [event for event in spans if event["name"] == "decode"]
    inside = [
        event
        for event in spans
        if event["name"] in PRODUCTS
        and any(one["ts"] <= event["ts"] <= one["ts"] + one["dur"] + 1000 for one in decodes)
    ]
    assert len(inside) >= len(decodes)


def test_off_nothing_is_noted_and_on_the_tokens_are_the_same(engine: Engine) -> None:
    plain = answer(engine)
    spans = engine.spans
    assert spans.part(Part.KEEP) is spans.forward(Part.DECODE, 1) is spans.part(Part.PREFILL)  # one that does nothing

    engine.begin_profile()
    noted = answer(engine)
    engine.end_profile()

    assert [one.tokens for one in noted] == [one.tokens for one in plain]
    assert spans.part(Part.KEEP) is spans.part(Part.PREFILL)


def test_what_is_kept_and_looked_at_stays_bounded_however_long_it_goes_on(engine: Engine) -> None:
    limits = Limits(prefills=2, first=2, every=10, steps=4, spans=50, operations=60)
    engine.begin_profile(limits)
    answer(engine, prompts=4, tokens=120)
    seen = engine.end_profile()

    assert seen.forwards[Part.PREFILL].looks == 2
    assert seen.forwards[Part.DECODE].looks == 4
    assert seen.forwards[Part.DECODE].count == 119
    assert len(seen.spans) == 50
    assert all(len(forwards.operations) <= 60 for forwards in seen.forwards.values())
    assert figures(seen).left_out > 100
    assert seen.parts[Part.SAMPLE].calls == 119  # sums go on


def test_a_model_that_runs_whole_has_a_profile_too(engine: Engine) -> None:
    model = engine.loaded.model
    with Engine(engine.loaded, replace(engine.support, level=Level.DENSE, runner=PlainRunner(model))) as plain:
        plain.begin_profile()
        answer(plain, prompts=2, tokens=6)
        found = figures(plain.end_profile())

    kinds = {part.name: part.seconds for part in found.parts if part.of == "decoding steps"}
    assert kinds["matrix products"] > 0
    assert kinds["KV writes"] == 0  # transformers' own cache does what it does inside the model
    assert (found.steps.count, found.steps.mean_rows) == (5, 2)


def test_a_mesh_that_shares_shows_its_own_parts_and_an_audit_is_one_part() -> None:
    loaded = mesh_from_dict(MESH)
    with Mesh.from_loaded(loaded) as mesh:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        for number in range(6):
            mesh.run(question=f"Problem {number}: " + "count the boats. " * 4)
        profiles = Profiles()
        with profiles.of(backend.engine, "sharing"):
            result = mesh.run(question="Problem 99: " + "count the boats. " * 4)
    calls = {part.name: part.calls for part in profiles.taken["sharing"].parts if not part.of}

    assert sum(call.audit is not None for call in result.calls) == calls["audit"] == 2
    assert calls["prefill"] == calls["admit"] == 3  # an audit's own prefill counts in the audit
    assert min(calls[name] for name in ("plan", "match", "realign", "compose", "keep", "learn")) > 0
    assert calls["begin and end runs"] == 2


def event(name: str, begin: float, took: float, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": begin, "dur": took, "args": args}


def test_operations_are_sorted_by_where_they_run() -> None:
    mark = "user_annotation"
    events = [
        event(FORWARD, 0, 1000, mark),
        event("aten::arange", 10, 5),
        event(f"{PREFIX}model", 100, 800, mark),
        event("aten::linear", 110, 100),
        event("aten::addmm", 120, 80),  # counts in the linear
        event(f"{PREFIX}cache", 300, 50, mark),
        event("aten::copy_", 310, 10),  # counts in the cache's stretch
        event(f"{PREFIX}attention", 400, 100, mark),
        event("aten::cat", 410, 20),
        event("aten::silu", 600, 30),
        {"ph": "M", "name": "thread_name"},
    ]

    look = sort(events, 1000e-6)

    micro = {work: round(value * 1e6) for work, value in look.seconds.items()}
    assert micro == {Work.PRODUCTS: 100, Work.ATTENTION: 20, Work.OTHER: 30, Work.CACHE: 50, Work.OUTSIDE: 5}
    assert "addmm" not in {operation.name for operation in look.operations}

    assert look.noted == 6
    assert {work: count for work, count in look.inside.items() if count} == {Work.PRODUCTS: 1, Work.CACHE: 1}


def test_products_over_packed_weights_are_products() -> None:
    events = [
        event(f"{PREFIX}model", 100, 50, "user_annotation"),
        event("mkl::_mkl_linear", 110, 10),
        event("aten::_weight_int4pack_mm_for_cpu", 130, 10),
    ]

    assert round(sort(events, 200e-6).seconds[Work.PRODUCTS] * 1e6) == 20


def test_what_noting_costs_is_taken_off_again_and_nothing_gets_negative() -> None:
    seen = Forwards(looked_s=1.0, noted=100)
    seen.seconds |= {Work.PRODUCTS: 0.6, Work.CACHE: 0.01}
    seen.inside |= {Work.PRODUCTS: 20, Work.CACHE: 10}

    shares = seen.shares(0.002)

    assert shares[Work.PRODUCTS] == pytest.approx((0.6 - 0.04) / (1.0 - 0.2))
    assert shares[Work.CACHE] == 0
    assert sum(seen.shares(0.005).values()) == pytest.approx(1), "never more work than time"
    assert not Forwards().shares(0.0)


def test_what_noting_costs_is_told_by_steps_that_were_looked_at_and_those_before_them() -> None:
    device, spans = torch.device("cpu"), Spans()
    rows = torch.zeros(8, 64)
    spans.begin(device, 1.0, Limits(first=0, every=2))
    for _ in range(4 * ENOUGH):
        with spans.forward(Part.DECODE, 8), spans.part(Part.DECODE):
            for _ in range(50):
                rows.mul_(1.0)

    seen = spans.end()

    assert seen.forwards[Part.DECODE].looks >= ENOUGH
    assert 0 <= seen.noting < 1e-3
    spans.begin(device, 1.0, Limits(first=0, every=2))
    assert spans.end().noting == 1.0, "no step tells"


def test_on_a_device_work_counts_where_the_device_does_it() -> None:
    events = [
        event(f"{PREFIX}model", 100, 50, "user_annotation"),
        event("aten::linear", 110, 10),
        event("cudaLaunchKernel", 112, 2, "cuda_runtime", correlation=7),
        event("gemm", 130, 400, "kernel", correlation=7),
        event("cudaMemcpyAsync", 200, 2, "cuda_runtime", correlation=8),
        event("copy", 540, 30, "gpu_memcpy", correlation=8),
    ]

    look = sort(events, 600e-6, cuda=True)

    micro = {work: round(value * 1e6) for work, value in look.seconds.items() if value}
    assert micro == {Work.PRODUCTS: 400, Work.OUTSIDE: 30}
    assert [operation.name for operation in look.operations if operation.device] == ["gemm", "copy"]


def test_a_run_puts_its_profile_into_its_record(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(json.dumps(MESH))
    line = ["run", "mesh.yaml", "-i", "question=How many boats?", "--profile", "--display", "none"]
    command = [sys.executable, "-m", "agentmesh", *line]  # a process, of which the C library's words are seen, too

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "where the time went: run" in done.stderr
    assert "Outside the model's own kernels" in done.stderr
    assert "profiler_start" not in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    found = json.loads((folder / "profile.json").read_text())
    assert {part["name"] for part in found["parts"]} >= {"plan", "prefill", "decoding steps", "idle"}
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]


def test_benches_write_one_trace_of_all_that_they_measure(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(json.dumps(MESH))
    lines = [json.dumps({"id": i, "question": f"Problem {i}: count the boats."}) for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = ["--warmup", "1", "--limit", "2", "--concurrency", "2", "--presets", "dense,epic", "--baseline", "0"]
    load = ["bench", "throughput", "mesh.yaml", "--data", "data.jsonl", *options, "--profile", "--format", "json"]
    done = command(*load, "--trace", "t.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    runs = json.loads(done.stdout)["runs"]
    assert all(run["profile"]["steps"]["mean_rows"] > 1 for run in runs)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    processes = [one["args"]["name"] for one in events if one["name"] == "process_name"]
    assert processes == ["dense, 2 at once", "epic, 2 at once"]

    one = ["bench", "decode", "--model", "random:tiny-llama", "--prompt", "40", "--output", "8", "--repeat", "1"]
    text = command(*one, "--profile", cwd=tmp_path)
    assert "where the time went: decoding" in text.stdout
    assert (tmp_path / "trace.json").is_file()
    early = command(*one, "--profile", "--trace", "nowhere/t.json", cwd=tmp_path)
    assert early.returncode == 2
    assert "give a file in a folder that is there" in early.stderr
