"""Meshes with a persistent store: what a restarted one shares, what it must not, and that its answers are the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tiering import PROMPT, question, team, texts

from agentmesh import Mesh
from agentmesh.communicator import links, persistence
from agentmesh.communicator.learner import Learner
from agentmesh.communicator.linkstate import Audited, LinkState
from agentmesh.communicator.measures import Costs
from agentmesh.communicator.persistence import Persistence
from agentmesh.communicator.scope import Scope
from agentmesh.communicator.slots import Slots
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.local import LocalBackend
from agentmesh.prompt import Reader
from agentmesh.reasons import Reason
from agentmesh.results import RunResult
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.realigner import NoOffset
from agentmesh.sharing.tier.counts import Counts
from agentmesh.sharing.tier.disk import DiskStore

WARM = 3


def kept(mesh: Mesh) -> Persistence:
    backend = mesh.load()
    assert isinstance(backend, LocalBackend)
    assert backend.kept is not None
    return backend.kept


def counts(mesh: Mesh) -> Counts:
    return kept(mesh).store.counts


def placed(result: RunResult) -> list[tuple[int, int, int]]:
    return [(call.placed_exact, call.placed_realigned, call.placed_slots) for call in result.calls]


def said(result: RunResult) -> list[str]:
    return [message.text for message in result.messages]


def reasons(result: RunResult) -> set[Reason]:
    return {row.reason for call in result.calls for row in call.plan if row.tokens}


@pytest.fixture(autouse=True)
def _placing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared does not depend on how busy the machine is."""
    monkeypatch.setattr(Costs, "placing_pays", lambda _self, _tokens: True)


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A store in which a mesh under ``linear`` has learned from three questions."""
    with team("linear", tmp_path / "kv") as mesh:
        for number in range(WARM):
            mesh.run(question=question(number))
    return tmp_path / "kv"


@pytest.mark.parametrize("tenant", ["", "t"])
def test_a_restarted_mesh_shares_from_its_first_request_all_that_a_running_one_shares(
    tmp_path: Path, tenant: str
) -> None:
    with team("linear", tmp_path / "kv") as running:
        for number in range(WARM):
            running.run(question=question(number), tenant=tenant)
        wanted = running.run(question=question(50), tenant=tenant)
    shutil.rmtree(tmp_path / "kv")
    with team("linear", tmp_path / "kv") as mesh:
        for number in range(WARM):
            mesh.run(question=question(number), tenant=tenant)

    with team("linear", tmp_path / "kv") as restarted:
        first = restarted.run(question=question(50), tenant=tenant)

    assert sum(call.placed_slots for call in wanted.calls) > 0
    assert placed(first) == placed(wanted)
    assert said(first) == said(wanted)


@pytest.mark.parametrize("preset", ["prefix", "rotate", "epic", "linear", "blend", "kvcomm"])
def test_a_question_that_is_asked_again_after_a_restart_gets_the_same_answer(tmp_path: Path, preset: str) -> None:
    def asked(place: Path | None, *numbers: int) -> list[RunResult]:
        with team(preset, place, warmup=2) as mesh:
            return [mesh.run(question=question(number)) for number in numbers]

    without, (cold, first) = asked(None, 2, 3)[-1], asked(tmp_path / "kv", 2, 3)
    (again,) = asked(tmp_path / "kv", 3)

    assert said(first) == said(without)
    if preset == "linear":
        assert not first.calls[1].placed_realigned
        assert again.calls[1].placed_realigned, "two questions warmed its link"
    else:
        assert said(again) == said(without)
    assert sum(call.placed_exact for call in again.calls) > sum(call.placed_exact for call in cold.calls)
    if preset not in ("prefix", "kvcomm"):
        assert Reason.SAME_HISTORY in reasons(again), "the first reader's own reading"
        assert Reason.FIRST_READER not in reasons(again)


def test_another_model_dtype_text_or_choice_finds_nothing_of_it(warm: Path) -> None:
    def first(change: Callable[[dict[str, Any]], None]) -> tuple[int, int]:
        agents: dict[str, Any] = {
            f"agent.{n}": {"role": f"Role {n}", "system": f"You are number {n}. " * 4, "prompt": PROMPT} for n in (1, 2)
        }
        spec: dict[str, Any] = {"preset": "linear", "max_kl": 1e6, "audit": 0.0, "warmup": 2, "store": str(warm)}
        settings = {"agents": agents, "communicator": spec, "model": "random:tiny-llama"}
        for member in agents.values():
            member["generate"] = {"max_tokens": 8}
        change(settings)
        with Mesh(topology={"use": "fully-connected", "agents": 2}, **settings) as mesh:
            result = mesh.run(question=question(0))
            return sum(call.placed_slots for call in result.calls), counts(mesh).hits

    def text(settings: dict[str, Any]) -> None:
        settings["agents"]["agent.2"]["prompt"] += " And on."

    assert min(first(lambda _settings: None)) > 0
    assert first(text)[0] == 0
    assert first(lambda s: s["communicator"].update(recompute={"first": 4}))[0] == 0
    assert first(lambda s: s.update(model={"name": "random:tiny-llama", "dtype": "bfloat16"})) == (0, 0)
    assert first(lambda s: s.update(model="random:tiny-qwen3")) == (0, 0)


def flip(files: list[Path]) -> None:
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


def cut(files: list[Path]) -> None:
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])


def swap(files: list[Path]) -> None:
    for one, other in zip(files[::2], files[1::2], strict=False):
        one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
        one.write_bytes(other_bytes)
        other.write_bytes(one_bytes)
    files[-1].write_bytes(b"")


@pytest.mark.parametrize(("harm", "preset"), [(flip, "linear"), (flip, "prefix"), (cut, "linear"), (swap, "linear")])
@pytest.mark.parametrize("index", ["kept", "garbage"])
def test_a_damaged_store_is_a_cold_one(
    tmp_path: Path, harm: Callable[[list[Path]], None], preset: str, index: str
) -> None:
    path = tmp_path / "kv"
    with team(preset, None) as mesh:
        cold = mesh.run(question=question(0))
    with team(preset, path) as mesh:
        for number in range(WARM):
            mesh.run(question=question(number))
    harm(sorted((path / "tenants" / "default").iterdir()))
    if index == "garbage":
        (path / "index.sqlite").write_bytes(b"garbage" * 1000)

    with team(preset, path) as mesh:
        result = mesh.run(question=question(0))
        assert counts(mesh).damaged >= 2
        assert counts(mesh).hits == 0

    assert placed(result) == placed(cold)
    assert said(result) == said(cold)


def test_a_lost_index_costs_nothing(warm: Path) -> None:
    for file in warm.glob("index.sqlite*"):
        file.unlink()
    with team("linear", warm) as mesh:
        result = mesh.run(question=question(50))

    assert sum(call.placed_slots for call in result.calls) > 0


def test_deterministic_runs_plan_the_same_whatever_the_store_holds(warm: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(warm, broken)
    for file in (broken / "tenants" / "default").iterdir():
        file.write_bytes(b"x")

    found = []
    for place in (None, tmp_path / "empty", warm, broken):
        with team("linear", place) as mesh:
            strict = Mesh.from_blueprint(
                replace(mesh.blueprint, run=mesh.blueprint.run.model_copy(update={"deterministic": True}))
            )
        with strict as mesh:
            found.append([mesh.run(question=question(number)) for number in (0, 1, 0)])
            if place is not None:
                assert counts(mesh).hits == 0
    plans = [[[call.plan for call in result.calls] for result in results] for results in found]

    assert all(plan == plans[0] for plan in plans)
    assert DiskStore(tmp_path / "empty", 2**30).totals(), "what they compute is kept all the same"


@pytest.mark.parametrize("collide", [False, True])
@pytest.mark.parametrize("preset", ["prefix", "rotate", "linear"])
def test_tenants_are_apart_on_disk_also_where_keys_collide(
    tmp_path: Path, preset: str, collide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if collide:
        for module in (persistence, links):
            monkeypatch.setattr(module, "key_of", lambda *_parts, **_tokens: "same")
    with team(preset, None) as mesh:
        alone = mesh.run(question=question(0), tenant="b")
    with team(preset, tmp_path / "kv") as mesh:
        for number in range(WARM):
            mesh.run(question=question(number), tenant="a")

    with team(preset, tmp_path / "kv") as mesh:
        other = mesh.run(question=question(0), tenant="b")
        assert counts(mesh).hits == 0
        mine = mesh.run(question=question(0), tenant="a")
        hits = counts(mesh).hits
    with team(preset, tmp_path / "kv") as mesh:
        nobody = mesh.run(question=question(0))

    assert placed(other) == placed(nobody) == placed(alone)
    assert said(other) == said(nobody) == said(alone)
    if not collide:
        assert hits > 0
        assert placed(mine) != placed(alone)
    if preset == "prefix":
        assert said(mine) == said(alone)


def test_the_tenant_of_a_store_is_that_of_runs_that_name_none(tmp_path: Path) -> None:
    spec = {"preset": "prefix", "store": {"path": str(tmp_path / "kv"), "tenant": "team-7"}}
    agents = {"solver": {"system": "You solve. " * 9, "prompt": "{{ question }}", "generate": {"max_tokens": 4}}}
    with Mesh(agents=agents, topology="single", model="random:tiny-llama", communicator=spec) as mesh:
        mesh.run(question=question(0))
        mesh.run(question=question(0), tenant="other")

    assert {path.name for path in (tmp_path / "kv" / "tenants").iterdir()} == {"tenant-team-7", "tenant-other"}


def librarian(path: Path, documents: Path, preset: str = "epic") -> Mesh:
    agents: dict[str, Any] = {
        "finder": {"kind": "retriever", "documents": str(documents), "top_k": 2},
        "reader": {"prompt": "{{ inbox[0] }}\nGo on.", "generate": {"max_tokens": 8}},
    }
    nodes = {"nodes": {"finder": {}, "reader": {}}, "edges": [{"from": "finder", "to": "reader"}], "output": "reader"}
    return Mesh(
        agents=agents, topology=nodes, model="random:tiny-llama", communicator={"preset": preset, "store": str(path)}
    )


def test_passages_that_were_ingested_once_are_read_from_the_store_ever_after(tmp_path: Path) -> None:
    documents = tmp_path / "docs.jsonl"
    documents.write_text(
        "\n".join(json.dumps({"title": f"Pier {n}", "text": f"Pier {n} holds boats. " * 6}) for n in range(4))
    )
    with librarian(tmp_path / "kv", documents) as mesh:
        assert mesh.ingest() == 4
    with librarian(tmp_path / "kv", documents) as mesh:
        without = mesh.run(question="Which pier?")
        assert counts(mesh).hits == 2, "the two that it was handed, though nobody ingested here"
    with librarian(tmp_path / "kv", documents) as mesh:
        assert mesh.ingest() == 4
        assert (counts(mesh).hits, counts(mesh).stored) == (4, 0), "none is computed again"

    assert Reason.FROM_CORPUS in reasons(without)


def test_a_passage_that_was_read_behind_another_question_is_read_again(tmp_path: Path) -> None:
    def ask(*numbers: int) -> list[RunResult]:
        agents = {"solo": {"prompt": "{{ question }}\n{{ passage }}\nGo on.", "generate": {"max_tokens": 4}}}
        spec = {"preset": "rotate", "store": str(tmp_path / "kv"), "cost_gate": False}
        nodes = {"nodes": {"solo": {}}, "output": "solo"}
        inputs = ["question", "passage"]
        with Mesh(agents=agents, topology=nodes, model="random:tiny-llama", communicator=spec, inputs=inputs) as mesh:
            return [mesh.run(question=question(number), passage=question(9)) for number in numbers]

    ask(0, 1)
    same, other, again = ask(1, 2, 0)

    assert other.calls[0].placed_slots == 0
    assert Reason.FIRST_READER in reasons(other)
    for one in (same, again):
        assert one.calls[0].placed_slots == one.calls[0].slot_tokens > 100


def test_what_was_said_and_what_is_approximate_never_reaches_the_disk(warm: Path) -> None:
    with team("linear", warm) as mesh:
        for number in range(8, 12):
            mesh.run(question=question(number))
    disk = DiskStore(warm, 2**30)
    readings = [record for entry, _ in disk._index.all() if (record := disk.get(entry)) and record.kind == "reading"]
    disk.close()

    assert readings
    for record in readings:
        assert not record.tensors["depths"].any()
        assert {origin for _, _, origin in record.about["spans"]} == {"question"}


def scope(model: str = "model", **consumers: str) -> Scope:
    import torch

    from agentmesh.kv.arena import KVShape

    shape = KVShape(2, 1, 4, torch.float32, torch.device("cpu"))
    return Scope.of(model, shape, consumers or {"b": "text"}, CommunicatorSpec(preset="rotate"))


@dataclass(frozen=True)
class Process:
    """A learner as one process has it, and where it keeps what it learns."""

    learner: Learner
    kept: Persistence

    @classmethod
    def on(cls, path: Path, *, reads: bool = True, **consumers: str) -> Process:
        learner = Learner(CommunicatorSpec(preset="rotate", warmup=2), NoOffset, Budget(10**6))
        kept = Persistence(DiskStore(path, 2**26), scope(**consumers), 10**6, reads=reads)
        learner.archive = kept.links
        return cls(learner, kept)

    @property
    def states(self) -> dict[str, LinkState]:
        return self.learner.ledger.states

    def begin(self, *, tenant: str = "") -> None:
        self.learner.begin(Reader("run", 0, consumer="b", tenant=tenant))

    def close(self) -> None:
        self.learner.settle()
        self.kept.close()


LINK = "b read input"


def test_a_breaker_that_opened_stays_open_whatever_other_processes_still_believe(tmp_path: Path) -> None:
    trusting = LinkState(NoOffset(9), NoOffset(0))
    seed = Process.on(tmp_path)
    seed.states[LINK] = trusting
    seed.close()

    one, two = Process.on(tmp_path), Process.on(tmp_path)
    for process in (one, two):
        process.begin()
        assert process.states[LINK] == trusting
    one.states[LINK] = replace(one.learner.fresh, wait=2)
    one.learner.end("run")
    two.states[LINK] = LinkState(NoOffset(50), NoOffset(0))
    two.close()
    one.close()

    after = Process.on(tmp_path)
    after.begin()
    assert after.states[LINK].wait == 2
    assert after.states[LINK].observations == 0
    after.close()


def test_a_breaker_that_opens_in_a_process_that_reads_nothing_counts_too(tmp_path: Path) -> None:
    for reads in (True, False):
        process = Process.on(tmp_path, reads=reads)
        process.begin()
        process.states[LINK] = replace(process.learner.fresh, wait=2)
        process.learner.end("run")
        process.states[LINK] = LinkState(NoOffset(4 + reads), NoOffset(0))
        process.close()

    after = Process.on(tmp_path)
    after.begin()
    assert after.states[LINK].observations == 4
    after.close()


def test_a_store_is_written_as_a_path_or_with_its_limits() -> None:
    plain = CommunicatorSpec.model_validate({"store": "kv"}).store
    full = {"path": "kv", "budget": "1GiB", "ttl": "7d", "tenant": "t"}
    chosen = CommunicatorSpec.model_validate({"store": full}).store

    assert CommunicatorSpec().store is None
    assert plain is not None
    assert (plain.path, plain.ttl, plain.tenant) == ("kv", 30 * 86400, "")
    assert chosen is not None
    assert (chosen.budget, chosen.ttl, chosen.tenant) == (2**30, 7 * 86400, "t")


def test_audits_of_a_link_go_on_counting_after_a_restart(tmp_path: Path) -> None:
    audits = tuple(Audited(0.01 * n, n % 2 == 0, 0.1) for n in range(7))
    process = Process.on(tmp_path)
    process.states[LINK] = LinkState(NoOffset(5), NoOffset(1), audits, wait=1)
    process.close()

    again = Process.on(tmp_path)
    again.begin()
    assert again.states[LINK] == LinkState(NoOffset(5), NoOffset(1), audits, wait=1)
    again.close()


def test_links_of_changed_texts_unknown_agents_and_other_tenants_are_not_taken_up(tmp_path: Path) -> None:
    process = Process.on(tmp_path)
    process.states.update(
        {LINK: LinkState(NoOffset(5), NoOffset(0)), "custom read input": LinkState(NoOffset(5), NoOffset(0))}
    )
    process.close()

    changed, tenant, same = Process.on(tmp_path, b="new"), Process.on(tmp_path), Process.on(tmp_path)
    changed.begin()
    tenant.begin(tenant="t")
    same.begin()
    assert (set(changed.states), set(tenant.states), set(same.states)) == (set(), set(), {LINK})
    for one in (changed, tenant, same):
        one.close()


def test_the_memory_budget_holds_with_a_store_and_what_waits_for_it(tmp_path: Path) -> None:
    with team("linear", tmp_path / "kv", budget=3_000_000) as mesh:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        assert isinstance(backend.communicator, Slots)
        for number in range(12):
            mesh.run(question=question(number % 7))
            assert backend.communicator.budget.used <= 3_000_000
        assert backend.peak_bytes <= 3_000_000
        assert counts(mesh).stored > 0


def test_what_is_read_for_one_prompt_is_bounded(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with team("linear", None) as mesh:
        wanted = texts(mesh, 0)
    monkeypatch.setattr(persistence, "READ_BYTES", 10)
    with team("rotate", warm) as mesh:
        mesh.run(question=question(0))
        assert counts(mesh).read_bytes == 0
    monkeypatch.setattr(persistence, "READ_SECONDS", -1.0)
    monkeypatch.setattr(persistence, "READ_BYTES", 2**30)
    with team("prefix", warm) as mesh:
        assert texts(mesh, 0) == wanted
        assert counts(mesh).read_bytes == 0
