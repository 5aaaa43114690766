"""What a mesh can share, told before any weights are loaded."""

from __future__ import annotations

from pathlib import Path

from agentmesh.blueprint import draft
from agentmesh.config.load import load_mesh
from agentmesh.events import Reason
from agentmesh.forecast import Forecast, forecast


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


def test_passages_are_read_as_a_block_by_the_second_reader(root: Path) -> None:
    found = of(root, "rag-readers", "communicator.preset=linear")

    assert slots(found, "answerer")[0] == ("document retriever@0", "reader", Reason.READ_BEFORE)
