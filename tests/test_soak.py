"""Some seconds of the soak in soak.py, and that it sees what it is there to see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from soak import GROWTH_BYTES, LEGS_NEEDED, Plan, SoakError, check_growth, soak

from agentmesh.engine.loop import Engine


@pytest.mark.timeout(600)  # the runs of a lesson take a minute on a core of their own, several on a busy machine
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_soak_of_some_seconds_ends_at_rest(deterministic: bool) -> None:
    tally = soak(Plan(seconds=5, seed=3, leg_seconds=1.0, deterministic=deterministic))

    assert tally.ends["done"] > 20
    assert tally.ends["cancelled"] > 5
    assert tally.ends["refused"] > 0
    assert bool(tally.ends["lessons"]) is deterministic
    assert tally.live > 0
    assert tally.stored > 0


def test_a_soak_sees_runs_that_are_never_released(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gives_up(self: Engine, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread.executor, work)

    monkeypatch.setattr(Engine, "do", gives_up)

    with pytest.raises(SoakError, match=r"not at rest after its runs: .*open runs"):
        soak(Plan(seconds=60, seed=3, leg_seconds=2.0))


def test_a_soak_sees_memory_that_grows() -> None:
    little, much = 10 * GROWTH_BYTES, 12 * GROWTH_BYTES
    check_growth([little] * 20 + [much] * (LEGS_NEEDED - 21))
    check_growth([little] * 10 + [much] * 20)

    with pytest.raises(SoakError, match="memory grows, from 320 to 384 MiB"):
        check_growth([little] * 20 + [much] * 10)
