"""Some seconds of the load in load.py."""

from __future__ import annotations

from load import Plan, load


def test_a_load_of_some_seconds_is_answered_or_refused_and_leaves_nothing() -> None:
    options = ("--max-runs", "3", "--max-queue", "4", "--max-tenant-runs", "5", "--wait", "2")
    tally = load(Plan(seconds=4, clients=12, leg_seconds=2.0, tokens=4, seed=3, options=options))

    assert tally.ends["streamed"] + tally.ends["answered"] + tally.ends["followed"] > 10
    assert tally.ends["left"] > 3
    assert tally.ends["refused"] > 0
    assert tally.ends["told why not"] > 0
