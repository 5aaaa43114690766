"""Processes on one persistent store, many at once, killed at any moment: no wrong answer, and the budget holds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from killing import SERVER, was_killed
from test_tier import MIB, folder_bytes
from tiering import BUDGET, PRESETS, QUESTIONS, ask, hammer, team, texts

from agentmesh.communicator.measures import Costs
from agentmesh.sharing.tier.disk import DiskStore

KILLS = 50


@pytest.fixture(autouse=True)
def _placing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared does not depend on how busy the machine is."""
    monkeypatch.setattr(Costs, "placing_pays", lambda _self, _tokens: True)


def test_fifty_kills_while_writing_change_no_answer_and_leave_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the server, which is started by the first process
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    wanted = {}
    for preset in PRESETS:
        with team(preset, None) as mesh:
            wanted[preset] = [texts(mesh, number) for number in range(QUESTIONS)]
    draw, path, answers = random.Random(7), tmp_path / "kv", tmp_path / "answers"
    answers.mkdir()
    kills = attempts = answered = read = 0
    while kills < KILLS:
        attempts += 1
        assert attempts < 4 * KILLS
        by_clock = draw.random() < 0.5
        operation = None if by_clock else draw.randint(1, 36)
        arguments = (str(answers), str(path), draw.choice(PRESETS), attempts, 5, operation)
        kills += was_killed(ask, arguments, draw.uniform(0.1, 0.4) if by_clock else None)
        if not path.exists():
            continue
        store = DiskStore(path, BUDGET)
        assert folder_bytes(path) <= BUDGET
        checked = store.verify()
        assert (checked.damaged, store.counts.damaged) == (0, 0)
        assert not list(store.folder.partial.iterdir())
        store.close()
        if attempts % 10 == 0:
            store.folder.index.unlink()
    for file in answers.iterdir():
        for line in file.read_text().split("\n")[:-1]:
            preset, number, said, hits = json.loads(line)
            assert said == wanted[preset][number]
            answered += 1
            read += hits > 0
    print(
        f"{kills} kills of {attempts} processes, {answered} runs answered, {read} of them with what an earlier one kept"
    )
    assert answered > KILLS / 2
    assert read > KILLS / 4


def test_several_processes_on_one_folder_agree_and_stay_within_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    budget, path = 4 * MIB, tmp_path / "kv"
    workers = [SERVER.Process(target=hammer, args=(str(path), seed, 200, budget)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0

    store = DiskStore(path, budget)
    assert folder_bytes(path) <= budget
    assert store.verify().damaged == 0
    store.close()
