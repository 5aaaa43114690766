"""What a mesh can share, told before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Mesh
from agentmesh.blueprint import draft
from agentmesh.config.load import load_mesh
from agentmesh.events import CallRecord
from agentmesh.forecast import Forecast, forecast
from agentmesh.prompt.segments import FIXED
from agentmesh.reasons import Reason, Treatment


def of(root: Path, name: str, *sets: str) -> Forecast:
    return forecast(draft(load_mesh(root / "configs" / f"{name}.yaml", overrides=sets)))


def slots(found: Forecast, node: str) -> list[tuple[str, str, Reason]]:
    visit = next(visit for visit in found.visits if visit.node == node)
    return [(slot.slot, slot.source, slot.reason) for slot in visit.slots]


def test_role_first_agents_read_blocks_of_their_predecessor(root: Path) -> None:
    found = of(root, "math-fully-connected", "communicator.preset=linear")

    assert slots(found, "agent.1") == [("question", "", Reason.FIRST_READER)]
    assert slots(found, "agent.3") == [
        ("question", "agent.2", Reason.READ_BEFORE),
        ("message agent.1@0", "agent.2", Reason.READ_BEFORE),
        ("message agent.2@0", "agent.2", Reason.WRITTEN_BEFORE),
    ]
    assert [slot.block for slot in found.visits[2].slots] == [1, 1, 2]


def test_moving_the_role_behind_the_shared_text_is_advised_and_makes_it_exact(root: Path) -> None:
    first = of(root, "math-fully-connected", "communicator.preset=linear")
    last = of(root, "math-role-last", "communicator.preset=linear")

    assert any(line.startswith("agent.3") and "question" in line for line in first.advice)
    assert not last.advice
    assert slots(last, "agent.3") == [
        ("question", "agent.2", Reason.IDENTICAL_PREFIX),
        ("message agent.1@0", "agent.2", Reason.SAME_HISTORY),
        ("message agent.2@0", "agent.2", Reason.WRITTEN_BEFORE),
    ]


def test_a_judge_is_said_to_read_exactly(root: Path) -> None:
    found = of(root, "debate", "communicator.preset=linear")

    assert {reason for _, _, reason in slots(found, "judge")} == {Reason.READS_EXACTLY}


def test_dense_and_prefix_share_no_slots_across_prefixes(root: Path) -> None:
    dense = of(root, "math-fully-connected", "communicator.preset=dense")
    prefix = of(root, "math-fully-connected", "communicator.preset=prefix")

    assert {reason for _, _, reason in slots(dense, "agent.3")} == {Reason.PRESET_DENSE}
    assert {reason for _, _, reason in slots(prefix, "agent.3")} == {Reason.BEHIND_PREFIX}
    assert not dense.advice
    assert not dense.given


@pytest.mark.parametrize(
    ("set_to", "said"),
    [
        ("communicator.preset=linear", ("slots of 64 tokens or more", "observed 7 times: `agentmesh calibrate`")),
        ("communicator={preset: linear, realigners: r}", ("slots of 32", "observed 5 times: as those in the mesh's")),
        ("communicator.preset=kvcomm", ("slots of 64", "anchors that are as long")),
        ("communicator.preset=rotate", ("slots of 64",)),
    ],
)
def test_a_forecast_says_what_it_takes_for_granted(root: Path, set_to: str, said: Sequence[str]) -> None:
    sets = [set_to] if "{" in set_to else [set_to, "communicator.min_tokens=64", "communicator.warmup=7"]
    given = of(root, "math-fully-connected", *sets).given

    assert len(given) == len(said)
    assert all(part in line for part, line in zip(said, given, strict=True)), given


def test_passages_are_read_as_a_block_by_the_second_reader(root: Path) -> None:
    found = of(root, "rag-readers", "communicator.preset=linear")

    assert slots(found, "answerer")[0] == ("document retriever@0", "reader", Reason.READ_BEFORE)


def advised(found: Forecast) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in found.advice)


@pytest.mark.parametrize("preset", ["prefix", "linear", "kvcomm"])
def test_the_advice_is_what_the_role_last_layout_gives(root: Path, preset: str) -> None:
    """Exact is what it says to be exact, and nothing else; of the rest it names what has the same history."""
    advice = advised(of(root, "math-fully-connected", f"communicator.preset={preset}"))
    last = of(root, "math-role-last", f"communicator.preset={preset}")

    for visit in last.visits[1:]:
        kinds = {reason: [slot for slot in visit.slots if slot.reason is reason] for reason in Reason}
        exact, same = kinds[Reason.IDENTICAL_PREFIX], kinds[Reason.SAME_HISTORY]
        promised = [f"{', '.join(slot.slot for slot in exact)} would be an exact prefix after {exact[-1].source}"]
        if same:
            names = ", ".join(slot.slot for slot in same)
            source = same[-1].source
            promised.append(f"{names} would have the same history as in {source}: placed as it is, not exact")
        assert advice[visit.node].endswith(f"all agents have in common, {', and '.join(promised)}")
    assert ("not exact" in advice["agent.3"]) == (preset == "linear"), "kvcomm moves what has the same history, too"
    assert ("message agent.1@0" in advice["agent.3"]) == (preset != "kvcomm")
    assert not last.advice


TEXTS = "{{ question }}\n{% for m in inbox %}\n{{ m.role }}:\n{{ m }}\n{% endfor %}\nGo on."
GOES_ON = "{% if round == 0 %}{{ question }}\n{% endif %}" + TEXTS.partition("\n")[2]
WIDE_OPEN = {"cost_gate": False, "max_kl": 1e6, "warmup": 2, "audit": 0.0, "anchors": {"gamma": 50.0}}


def tiny(preset: str, topology: Mapping[str, Any], *, last: bool, memory: str = "none", **communicator: Any) -> Mesh:
    """Agents on a tiny random model whose gates let everything pass."""

    def agent(name: str) -> dict[str, Any]:
        system, prompt = (
            (f"You are a team. {'Work. ' * 12}", f"{texts} As {name}.") if last else (f"You are {name}. " * 5, texts)
        )
        written = {"role": name, "system": system, "prompt": prompt, "memory": memory}
        return {**written, "generate": {"max_tokens": 36, "temperature": 1.0}}

    texts = TEXTS if memory == "none" else GOES_ON
    team = [f"agent.{number + 1}" for number in range(topology.get("agents", 0))]
    names = team or ["judge", "debater.1", "debater.2"]
    communicator = {"preset": preset, **WIDE_OPEN, **communicator}
    agents = {name: agent(name.title()) for name in names}
    return Mesh(agents=agents, topology=topology, model="random:tiny-llama", communicator=communicator)


def happened(call: CallRecord) -> dict[str, tuple[str, str]]:
    """Slot → who gave most of it and why; what is computed of a placed slot is left out."""
    found: dict[str, tuple[str, str]] = {}
    for row in sorted(call.plan, key=lambda row: (row.kind is not Treatment.COMPUTED, row.tokens)):
        if row.segment != FIXED and row.tokens:
            found[row.segment] = (row.source, row.reason)
    return found


FULL5, DEBATE = {"use": "fully-connected", "agents": 5}, {"use": "debate", "debaters": 2, "rounds": 2}


def check_a_warm_run(mesh: Mesh) -> None:
    """Run until all is warm, and compare the last run with what was said ahead."""
    told = forecast(mesh.blueprint)
    for number in (*range(10, 17), 1):
        result = mesh.run(question=f"Question {number}: " + " ".join(f"word{number * 7 + i}" for i in range(12)))

    assert len(told.visits) == len(result.calls)
    for visit in told.visits:
        call = next(call for call in result.calls if (call.node, call.round) == (visit.node, visit.round))
        wanted = {
            slot.slot: ("prefix store" if slot.reason is Reason.IDENTICAL_PREFIX else slot.source, slot.reason)
            for slot in visit.slots
        }
        assert happened(call) == wanted, (visit.node, visit.round)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("preset", "topology", "changes"),
    [
        ("rotate", FULL5, {"max_depth": 2}),
        ("rotate", FULL5, {"max_depth": 0}),
        ("rotate", DEBATE, {}),
        ("linear", FULL5, {}),
        ("linear", DEBATE, {}),
        ("kvcomm", {"use": "fully-connected", "agents": 4}, {}),
        ("kvcomm", DEBATE, {}),
    ],
)
def test_a_warm_run_with_open_gates_does_what_the_forecast_says(
    preset: str, topology: dict[str, Any], changes: dict[str, Any], last: bool
) -> None:
    with tiny(preset, topology, last=last, **changes) as mesh:
        check_a_warm_run(mesh)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("preset", ["prefix", "rotate", "linear", "kvcomm"])
def test_agents_with_a_memory_go_on_from_what_they_have_read_and_said(preset: str, last: bool) -> None:
    with tiny(preset, {**DEBATE, "rounds": 3}, last=last, memory="conversation") as mesh:
        check_a_warm_run(mesh)


def test_a_debater_with_a_memory_has_its_own_earlier_turn_in_its_prompt(root: Path) -> None:
    found = of(root, "debate", "communicator.preset=linear")
    later = next(visit for visit in found.visits if (visit.node, visit.round) == ("debater.1", 1))

    assert [(slot.slot, slot.source, slot.reason) for slot in later.slots] == [
        ("question", "debater.1", Reason.IDENTICAL_PREFIX),
        ("message debater.1@0", "debater.1", Reason.SAME_HISTORY),
        ("message debater.2@0", "debater.2", Reason.WRITTEN_BEFORE),
    ]


def test_where_the_depth_decides_and_a_run_may_differ_the_forecast_says_so(root: Path) -> None:
    shallow = of(root, "math-team", "communicator.preset=linear", "communicator.max_depth=1")
    deep = of(root, "math-team", "communicator.preset=linear")

    assert slots(shallow, "agent.4")[2:] == [
        ("message agent.2@0", "agent.2", Reason.WRITTEN_BEFORE),
        ("message agent.3@0", "agent.3", Reason.WRITTEN_BEFORE),
    ]
    notes = [visit.note for visit in shallow.visits]
    assert [bool(note) for note in notes] == [False, False, False, True, True]
    assert notes[3].startswith("`max_depth: 1` decides")
    assert not any(visit.note for visit in deep.visits)


def test_anchors_place_all_slots_of_a_call_or_none(root: Path) -> None:
    """The sandbox's output has no KV, so `kvcomm` computes the reporter's other slots, too."""
    found = of(root, "code-fix", "communicator.preset=kvcomm")

    assert slots(found, "reporter") == [
        ("question", "", Reason.ALL_OR_NONE),
        ("message coder@0", "", Reason.ALL_OR_NONE),
        ("message runner@0", "", Reason.FIRST_READER),
    ]


def test_what_stands_behind_the_inbox_is_no_beginning_known_ahead(root: Path) -> None:
    """Reuse points are declared for beginnings that are the same without an inbox, and these prompts begin with it."""
    linear = advised(of(root, "rag-fully-connected", "communicator.preset=linear"))
    prefix = of(root, "rag-fully-connected", "communicator.preset=prefix")

    assert "exact prefix" not in linear["agent.3"]
    assert "document retriever@0, message agent.1@0 would have the same history" in linear["agent.3"]
    assert not prefix.advice


@pytest.mark.parametrize("name", ["math-team", "math-debate", "rag-fully-connected", "rag-debate"])
def test_a_mesh_and_its_role_last_layout_differ_in_the_order_of_texts_alone(root: Path, name: str) -> None:
    """The same agents read the same; question and passages are exact from their second reader on."""
    first, last = (
        of(root, name, "communicator.preset=prefix"),
        of(root, f"{name}-role-last", "communicator.preset=prefix"),
    )
    seen: set[str] = set()

    for one, other in zip(first.visits, last.visits, strict=True):
        assert (one.node, one.round) == (other.node, other.round)
        assert {slot.slot for slot in one.slots} == {slot.slot for slot in other.slots}
        for slot in other.slots:
            if slot.slot in seen and not slot.slot.startswith("message"):
                assert slot.reason is Reason.IDENTICAL_PREFIX, (other.node, other.round, slot.slot)
        seen |= {slot.slot for slot in other.slots}
    assert not last.advice
    specs = [load_mesh(root / "configs" / f"{mesh}.yaml").spec for mesh in (name, f"{name}-role-last")]
    assert specs[0].topology == specs[1].topology
    assert [agent.role for agent in specs[0].agents.values()] == [agent.role for agent in specs[1].agents.values()]
