"""Which tokens of passages are computed: those that their own text and the prompt's other contents make most of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmesh import Mesh
from agentmesh.communicator.picks import ASKED, Picker, weigh
from agentmesh.config.presets import Recompute
from agentmesh.engine.scout import Scout
from agentmesh.events import CallRecord
from agentmesh.prompt import Content, ContentKind, Prompt, Reader, Segment
from agentmesh.reasons import Reason
from agentmesh.sharing.matching import Match, Relation
from agentmesh.sharing.segments import Reading
from agentmesh.sharing.tier.disk import DiskStore

QUESTION, RARE, OFTEN = (90, 91, 92), 91, 92
ONE, TWO = (1, 2, 3, RARE, 4, 5, 6, 7), (OFTEN, 8, 9, 10, OFTEN, 11, 12, 13)


def slot(name: str, tokens: tuple[int, ...], kind: ContentKind) -> Segment:
    return Segment(name, name, tokens, Content(name, kind, name, tokens))


PROMPT = Prompt(
    segments=(
        Segment("fixed", "", (60, 61)),
        slot("one", ONE, ContentKind.DOCUMENT),
        slot("two", TWO, ContentKind.DOCUMENT),
        slot("question", QUESTION, ContentKind.INPUT),
        Segment("fixed", "", (62,)),
    ),
    reader=Reader("run", "a"),
)


def match(start: int, tokens: tuple[int, ...], weights: torch.Tensor | None, at: int = 0) -> Match:
    reading = Reading("", "", (*range(200, 200 + at), *tokens), (), (), bytes(at + len(tokens)), weights=weights)
    stop = start + len(tokens)
    return Match(start, stop, 1, 1, 0, reading, at, Relation.CORPUS, 0, ContentKind.DOCUMENT, own=True)


def test_tokens_count_by_their_share_of_a_passage_and_more_beside_what_is_asked_for() -> None:
    found = weigh(PROMPT, [match(2, ONE, torch.ones(8)), match(10, TWO, 3 * torch.ones(10), at=2)])

    assert not found[:2].any()
    assert not found[18:].any()
    beside, far = (1 + ASKED) / 8, 1 / 8
    torch.testing.assert_close(found[2:10], torch.tensor([far, far, beside, beside, beside, beside, far, far]))
    half = (1 + ASKED / 2) / 10
    wanted = torch.tensor([half, half, half, half, half, half, half, 0.1])
    torch.testing.assert_close(found[10:18], wanted)


def test_a_passage_without_weights_is_not_placed_where_they_decide() -> None:
    class Blind(Scout):
        def can(self, by: Any) -> bool:  # of no kind
            return False

    known, unknown = match(2, ONE, torch.ones(8)), match(2, ONE, None)
    read = replace(unknown, relation=Relation.READ)
    picker = Picker(Recompute(documents=0.3), Blind(None))  # type: ignore[arg-type]  # asked about nothing else

    assert [picker.can(one) for one in (known, unknown, read)] == [True, False, True]
    picker = Picker(Recompute(ratio=0.1), Blind(None))  # type: ignore[arg-type]  # as above
    assert [picker.can(one) for one in (known, unknown, read)] == [False] * 3


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    text = "Pier {} holds {} boats, and the harbour master counts them each morning before the tide turns. "
    rows = [{"title": f"Pier {n}", "text": text.format(n, n + 7) * 2} for n in range(4)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def reading(documents: Path, store: Path | None, share: float = 0.3) -> Mesh:
    agents: dict[str, Any] = {
        "finder": {"kind": "retriever", "documents": str(documents), "top_k": 2},
        "reader": {"prompt": "{{ inbox[0] }}\nAbout {{ question }}", "generate": {"max_tokens": 8}},
    }
    nodes = {"nodes": {"finder": {}, "reader": {}}, "edges": [{"from": "finder", "to": "reader"}], "output": "reader"}
    about = {"preset": "epic", "recompute": {"first": 4, "documents": share}}
    if store is not None:
        about["store"] = str(store)
    return Mesh(agents=agents, topology=nodes, model="random:tiny-llama", communicator=about)


def picked(call: CallRecord) -> int:
    return sum(row.tokens for row in call.plan if row.reason is Reason.PICKED)


def test_a_share_of_passages_is_computed_and_nobody_looks(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scout, "attention", None)
    monkeypatch.setattr(Scout, "deviation", None)
    with reading(documents, None) as mesh:
        assert mesh.ingest() == 4
        call = mesh.run(question="Which pier holds 8 boats?").calls[0]

    placed = sum(row.tokens for row in call.plan if row.reason is Reason.FROM_CORPUS)
    assert placed > 0
    assert picked(call) == round(0.3 * (placed + picked(call)))


def test_weights_outlive_the_process(documents: Path, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with reading(documents, tmp_path / "kv") as mesh:
            mesh.ingest()
            found.append(mesh.run(question="Which pier holds 8 boats?"))

    first, second = found
    assert picked(first.calls[0]) > 0
    assert first.calls[0].plan == second.calls[0].plan
    assert [message.text for message in first.messages] == [message.text for message in second.messages]


def test_kept_passages_without_weights_are_ingested_again(documents: Path, tmp_path: Path) -> None:
    with reading(documents, tmp_path / "kv") as mesh:
        mesh.ingest()
    disk = DiskStore(tmp_path / "kv", 2**30)
    for entry, _ in list(disk._index.all()):
        record = disk.get(entry)
        assert record is not None
        bare = {name: tensor for name, tensor in record.tensors.items() if name != "weights"}
        disk.put(replace(record, tensors=bare), replaces=True)
    disk.close()

    with reading(documents, tmp_path / "kv") as mesh:
        assert mesh.ingest() == 4
        assert picked(mesh.run(question="Which pier holds 8 boats?").calls[0]) > 0
