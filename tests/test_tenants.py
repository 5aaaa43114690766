"""Tenants of one mesh: what is kept or learned for one is never used for another, also where hashes collide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_slots import a_match
from tiering import question, team

from agentmesh import Mesh
from agentmesh.communicator.learner import Learner
from agentmesh.communicator.measures import Costs
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.errors import InputError
from agentmesh.events import CallRecord
from agentmesh.prompt import Reader
from agentmesh.reasons import Reason
from agentmesh.results import RunResult
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.realigner import NoOffset
from agentmesh.testing import ScriptedModel


class Colliding:
    """A digest that is the same for everything."""

    def __init__(self, _data: bytes = b"") -> None:
        pass

    def digest(self) -> bytes:
        return b"same"


@pytest.fixture(autouse=True)
def _placing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared does not depend on how busy the machine is."""
    monkeypatch.setattr(Costs, "placing_pays", lambda _self, _tokens: True)


@pytest.fixture(params=[False, True], ids=["sha256", "colliding"])
def collides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the stores' hash is one that always collides; it is their own first."""
    if request.param:
        for module in ("prefix", "segments"):
            monkeypatch.setattr(f"agentmesh.sharing.{module}.hashlib", type("H", (), {"sha256": Colliding}))
    return bool(request.param)


def placed(result: RunResult) -> list[tuple[int, int, int]]:
    """Of each call what was placed, and what was known to be shareable."""
    return [(call.placed_exact, call.placed_realigned, call.slot_tokens) for call in result.calls]


def texts(result: RunResult) -> list[str]:
    return [message.text for message in result.messages]


@pytest.mark.parametrize("preset", ["prefix", "rotate", "kvcomm"])
def test_a_tenant_gets_what_a_new_process_would_give_it_whatever_others_asked(preset: str, collides: bool) -> None:
    with team(preset, None, anchors={"gamma": 1.0}) as one:
        alone = one.run(question=question(1), tenant="b")
    with team(preset, None, anchors={"gamma": 1.0}) as one:
        for _ in range(3):
            mine = one.run(question=question(1), tenant="a")
        other = one.run(question=question(1), tenant="b")
        again = one.run(question=question(1), tenant="b")

    assert placed(other) == placed(alone)
    assert texts(other) == texts(alone) == texts(mine)
    if preset == "prefix":
        assert (placed(again) == placed(other)) is collides, (
            "where hashes collide nobody finds anything, not even oneself"
        )


@pytest.mark.usefixtures("collides")
def test_passages_that_one_tenant_ingested_are_first_read_by_the_other(tmp_path: Path) -> None:
    lines = [json.dumps({"title": f"Pier {n}", "text": f"Pier {n} holds boats. " * 6}) for n in range(2)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    agents: dict[str, Any] = {
        "finder": {"kind": "retriever", "documents": str(tmp_path / "docs.jsonl"), "top_k": 1},
        "reader": {"prompt": "{{ inbox[0] }}\nGo on.", "generate": {"max_tokens": 8}},
    }
    nodes = {"nodes": {"finder": {}, "reader": {}}, "edges": [{"from": "finder", "to": "reader"}], "output": "reader"}
    with Mesh(agents=agents, topology=nodes, model="random:tiny-llama", communicator="epic") as one:
        assert one.ingest(tenant="a") == 2
        found: dict[str, CallRecord] = {
            tenant: one.run(question="Which pier?", tenant=tenant).calls[0] for tenant in ("b", "a", "")
        }
        assert one.ingest(tenant="b") == 2

    reasons = {tenant: {row.reason for row in call.plan if row.tokens} for tenant, call in found.items()}
    assert Reason.FROM_CORPUS in reasons["a"]
    assert Reason.FROM_CORPUS not in reasons["b"] | reasons[""]


def test_what_a_tenant_teaches_warms_its_own_links_only() -> None:
    with team("linear", None) as one:
        for number in range(2):
            one.run(question=question(number), tenant="a")
        other = one.run(question=question(9), tenant="b")
        mine = one.run(question=question(9), tenant="a")

    assert all(call.placed_slots for call in mine.calls[1:])
    assert not any(call.placed_slots for call in other.calls)


def test_what_a_mesh_was_given_serves_every_tenant_and_each_goes_on_from_there() -> None:
    learner = Learner(CommunicatorSpec(preset="rotate"), NoOffset, Budget(1000))
    given = learner.fresh
    learner.begin_with({"b read input": given.__class__(NoOffset(7), NoOffset(0), wait=3)}, "a file")
    reader = Reader("run 0", 0, consumer="b", tenant="t")

    assert learner.verdict(reader, a_match()).reason is Reason.BREAKER_OPEN

    learner.audited(reader, [(a_match(), learner.fresh.exact)], 0.0, flip=False)
    learner.end(reader.run)
    assert len(learner.ledger.states["b read input of t"].audits) == 1
    assert learner.ledger.states["b read input of t"].wait == 3
    assert not learner.ledger.states["b read input"].audits


@pytest.mark.parametrize("tenant", ["a b", "../x", ".hidden", "x" * 65, "ü", "a\n"])
def test_what_cannot_name_a_tenant_is_refused(tenant: str) -> None:
    with Mesh(agents={"solver": {"prompt": "{{ question }}"}}, topology="single", model=ScriptedModel(["x"])) as one:
        with pytest.raises(InputError, match=r"tenant .*: expected at most 64 letters"):
            one.run(question="?", tenant=tenant)
        with pytest.raises(InputError, match="tenant"):
            one.ingest(tenant=tenant)
