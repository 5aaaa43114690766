"""The exact prefix store: budget, eviction, identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentmesh.kv.values import KV, Frame
from agentmesh.sharing import prefix as module
from agentmesh.sharing.budget import Budget, Worth
from agentmesh.sharing.prefix import PrefixStore

BYTES = 2 * 4 * 4


def reader(tokens: Sequence[int]) -> Callable[[int, int], KV]:
    """KV whose values are the token ids, so that a wrong hit would show."""
    data = torch.tensor(tokens, dtype=torch.float32).reshape(1, 1, -1, 1).expand(1, 1, len(tokens), 4).contiguous()

    def read(start: int, stop: int) -> KV:
        return KV(data[:, :, start:stop], data[:, :, start:stop], Frame.ABSOLUTE)

    return read


def values(pieces: list[KV]) -> list[int]:
    return [int(value) for piece in pieces for value in piece.keys[0, 0, :, 0]]


def test_the_longest_prefix_that_ends_at_a_point_is_found() -> None:
    store = PrefixStore(Budget(10_000))
    store.insert(b"m", range(10), (4, 8), reader(range(10)))

    assert values(store.match(b"m", [*range(8), 99], (4, 8))) == list(range(8))
    assert values(store.match(b"m", [0, 1, 2, 3, 99, 98, 97, 96, 95], (4, 8))) == [0, 1, 2, 3]
    assert store.match(b"m", range(10), (3,)) == []


def test_another_tenant_finds_nothing() -> None:
    store = PrefixStore(Budget(10_000))
    store.insert(b"one", range(10), (8,), reader(range(10)))

    assert store.match(b"two", range(10), (8,)) == []


def test_a_hash_collision_costs_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def colliding(root: bytes, tokens: Sequence[int], points: Sequence[int]) -> Iterator[tuple[bytes, None, tuple]]:
        yield b"same", None, tuple(tokens[: points[0]])

    monkeypatch.setattr(module, "_chain", colliding)
    store = PrefixStore(Budget(10_000))
    store.insert(b"m", [1, 2, 3], (2,), reader([1, 2, 3]))

    assert values(store.match(b"m", [1, 2, 9], (2,))) == [1, 2]
    assert store.match(b"m", [7, 8, 9], (2,)) == []


def test_a_prefix_pushes_out_nothing_that_a_run_waits_for() -> None:
    class Awaited:
        nbytes = 9_990

        def evict(self, wanted: int, worth: Worth) -> int:
            assert worth is not Worth.AWAITED
            return 0

    budget = Budget(10_000)
    budget.join(Awaited())
    store = PrefixStore(budget)

    store.insert(b"m", range(10), (8,), reader(range(10)))

    assert store.match(b"m", range(10), (8,)) == []
    assert len(store) == 0


def test_what_is_kept_is_a_copy() -> None:
    source = torch.ones(1, 1, 4, 4)
    store = PrefixStore(Budget(10_000))
    store.insert(b"m", range(4), (4,), lambda a, b: KV(source[:, :, a:b], source[:, :, a:b], Frame.ABSOLUTE))
    source.zero_()

    assert float(store.match(b"m", range(5), (4,))[0].keys.sum()) == 16.0


def test_ends_of_chains_go_first_and_an_oversized_piece_is_refused() -> None:
    store = PrefixStore(Budget(10 * BYTES))
    store.insert(b"m", range(9), (4, 8), reader(range(9)))
    store.insert(b"m", range(100, 106), (5,), reader(range(100, 106)))

    assert values(store.match(b"m", range(9), (4, 8))) == [0, 1, 2, 3]
    store.insert(b"m", range(200, 300), (50,), reader(range(200, 300)))
    assert store.match(b"m", range(200, 300), (50,)) == []
    assert len(store) == 2, "and it pushes nothing out"


class StoreMachine(RuleBasedStateMachine):
    """Any order of inserts and lookups keeps the budget and never returns foreign KV."""

    def __init__(self) -> None:
        super().__init__()
        self.store = PrefixStore(Budget(40 * BYTES))

    @rule(head=st.integers(0, 3), tail=st.integers(0, 5), points=st.sets(st.integers(1, 15), min_size=1, max_size=3))
    def insert(self, head: int, tail: int, points: set[int]) -> None:
        tokens = [head] * 8 + [tail] * 8
        self.store.insert(b"m", tokens, tuple(sorted(points)), reader(tokens))

    @rule(head=st.integers(0, 3), tail=st.integers(0, 5), points=st.sets(st.integers(1, 15), min_size=1, max_size=3))
    def match(self, head: int, tail: int, points: set[int]) -> None:
        tokens = [head] * 8 + [tail] * 8
        found = values(self.store.match(b"m", tokens, tuple(sorted(points))))
        assert found == tokens[: len(found)]
        assert len(found) in {0, *points}

    @rule(wanted=st.integers(1, 40 * BYTES))
    def evict(self, wanted: int) -> None:
        held = self.store.nbytes
        assert self.store.evict(wanted, Worth.LATER) == held - self.store.nbytes >= min(wanted, held)

    @invariant()
    def the_budget_holds_and_the_count_is_true(self) -> None:
        entries = self.store._entries
        assert self.store.nbytes == sum(entry.kv.nbytes for entry in entries.values()) <= self.store.budget.limit
        for key, entry in entries.items():
            assert entry.children == sum(other.parent == key for other in entries.values())
            assert entry.parent is None or entry.parent in entries


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_any_order_of_operations = StoreMachine.TestCase
