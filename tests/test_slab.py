"""Slabs: arenas side by side, what they take up, and sequences that attend together as they would alone."""

from __future__ import annotations

import gc
import mmap
import sys
import weakref
from collections.abc import Sequence

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from agentmesh.engine.batch import NextRows
from agentmesh.engine.group import grouped, side_by_side
from agentmesh.engine.spans import Spans
from agentmesh.kv import pool as pools
from agentmesh.kv import slab as slabs
from agentmesh.kv.arena import Arena, KVShape
from agentmesh.kv.pool import ArenaPool
from agentmesh.kv.slab import Slab

SHAPE = KVShape(3, 2, 16, torch.float32, torch.device("cpu"))
QUERIES = 6
GROUPED = SHAPE.heads, QUERIES // SHAPE.heads, SHAPE.head_dim
CAPACITY = 40


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def slots_of(arenas: Sequence[Arena]) -> list[int]:
    assert all(arena.slot is not None for arena in arenas)
    return [arena.slot.number for arena in arenas if arena.slot is not None]


def filled(pool: ArenaPool, lengths: Sequence[int], seed: int = 0) -> list[Arena]:
    """Arenas with random KV, each aimed at the row of its last token."""
    generator = torch.Generator().manual_seed(seed)
    arenas = [pool.open(SHAPE, CAPACITY) for _ in lengths]
    for arena, length in zip(arenas, lengths, strict=True):
        arena.both[:, :, :, :length] = torch.randn(SHAPE.size(length), generator=generator)
        arena.aim(slice(length - 1, length), length)
    return arenas


def alone(arena: Arena, layer: int, query: torch.Tensor, window: int) -> torch.Tensor:
    """Attention of one sequence's ``query [H, Hq / H, D]``, in the same shape."""
    rows = slice(max(0, arena.length - window), arena.length)
    keys, values = (
        one[layer, :, rows].repeat_interleave(QUERIES // SHAPE.heads, 0) for one in (arena.keys, arena.values)
    )
    mixed = functional.scaled_dot_product_attention(query.flatten(0, 1)[:, None], keys, values)
    return mixed[:, 0].view(*GROUPED)


def test_neighbours_are_taken_first_and_a_slot_that_is_emptied_is_zero_again() -> None:
    slab = Slab((1024, 4), torch.float32, 3)
    slots = [slab.take() for _ in range(3)]
    assert slab.take() is None
    for number, slot in enumerate(slots):
        assert slot is not None
        assert slot.number == number
        slot.memory.fill_(number + 1)
    view = slots[1].memory[5:]  # type: ignore[union-attr]  # asserted above
    del slot, slots[1]
    assert slab.take() is None, "somebody holds a view"
    assert float(view.mean()) == 2

    del view

    assert float(slab.memory[1].abs().max()) == 0
    assert {float(slab.memory[place].mean()) for place in (0, 2)} == {1, 3}
    again = slab.take()
    assert again is not None
    assert again.number == 1


def test_what_was_written_to_a_slot_is_given_back_to_the_system() -> None:
    size = (64, 2**18)  # 64 MiB
    slab = Slab(size, torch.float32, 8)
    before = resident()
    slot = slab.take()
    assert slot is not None
    assert resident() - before < 2**23, "only what is written to takes up memory"
    slot.memory.fill_(1.0)
    assert resident() - before > 2**25

    del slot

    assert resident() - before < 2**23


def gives_pages_ahead() -> bool:
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(slabs.POPULATE)
    except OSError:
        return False
    return sys.platform == "linux"


@pytest.mark.skipif(not gives_pages_ahead(), reason="this system gives no pages ahead: Linux does from 5.14 on")
def test_memory_for_rows_is_there_before_they_are_written() -> None:
    size = (64, 2**18)  # 64 MiB
    slot = Slab(size, torch.float32, 2).take()
    assert slot is not None
    before = resident()

    slot.claim(run=2**20, part=slice(2**19 + 5, 2**20))

    assert 2**24 < resident() - before < 2**26, "half of it"
    assert float(slot.memory.abs().max()) == 0


def test_an_arena_claims_rows_of_its_own_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed: list[tuple[int, int, slice]] = []
    monkeypatch.setattr(Slab, "claim", lambda _slab, number, run, part: claimed.append((number, run, part)))
    first, second = (ArenaPool().open(SHAPE, capacity) for capacity in (CAPACITY, CAPACITY))
    row = SHAPE.head_dim * 4

    first.claim(slice(30, 158))
    second.claim(slice(CAPACITY, 158))
    Arena(SHAPE, CAPACITY).claim(slice(0, 5))

    assert claimed == [(0, pools.SMALLEST * row, slice(30 * row, CAPACITY * row))]


def test_where_no_slab_can_be_mapped_an_arena_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_size: object) -> Slab:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pools, "Slab", refused)
    monkeypatch.setattr(refused, "fits", Slab.fits, raising=False)

    assert ArenaPool().open(SHAPE, CAPACITY).slot is None


def test_a_system_that_gives_no_pages_ahead_gives_them_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "POPULATE", 9999)
    slot = Slab((64, 2**10), torch.float32, 2).take()
    assert slot is not None

    slot.claim(run=2**12, part=slice(0, 2**12))
    slot.claim(run=2**12, part=slice(0, 2**12))

    assert float(slot.memory.fill_(2).mean()) == 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_slabs_are_made_of_whole_pages_on_the_cpu(device: str) -> None:
    assert Slab.fits((1024, 4), torch.float32, torch.device(device)) is (device == "cpu")
    assert not Slab.fits((1000, 3), torch.float32, torch.device(device))


def test_arenas_of_similar_capacity_lie_side_by_side_and_long_ones_have_memory_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = ArenaPool()
    short, longer = [pool.open(SHAPE, 100 + n) for n in range(3)], pool.open(SHAPE, 600)

    assert slots_of(short) == [0, 1, 2]
    assert len({id(arena.slot.slab) for arena in short if arena.slot is not None}) == 1
    assert slots_of([longer]) == [0]
    assert [arena.both.shape[3] for arena in short] == [arena.capacity for arena in short] == [100, 101, 102]
    assert short[0].nbytes == 100 * SHAPE.bytes_per_token, "as much as may be written"
    monkeypatch.setattr(pools, "SLAB_BYTES", 2000 * SHAPE.bytes_per_token)
    assert pool.open(SHAPE, 100).slot is not None
    assert pool.open(SHAPE, 600).slot is None, "a slab would have room for one"


def test_more_arenas_than_a_slab_has_slots_get_another_one() -> None:
    pool = ArenaPool()
    arenas = [pool.open(SHAPE, 50) for _ in range(pools.SLOTS + 2)]

    assert slots_of(arenas) == [*range(pools.SLOTS), 0, 1]


def test_an_arena_that_was_given_back_is_used_again_and_its_slab_goes_with_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = ArenaPool()
    first, second = pool.open(SHAPE, 100), pool.open(SHAPE, 80)
    assert first.slot is not None
    slab = weakref.ref(first.slot.slab)
    pool.give(second)

    assert pool.need(SHAPE, 60) == 0
    assert pool.need(SHAPE, 30) == 30 * SHAPE.bytes_per_token, "more than twice as large is too large"
    assert pool.open(SHAPE, 60) is second
    pool.give(first)
    pool.give(second)
    assert pool.nbytes == 180 * SHAPE.bytes_per_token
    assert pool.clear() == 180 * SHAPE.bytes_per_token
    assert pool.nbytes == 0
    del first, second
    gc.collect()
    assert slab() is None

    monkeypatch.setattr(pools, "SPARE_BYTES", 0)
    for arena in [pool.open(SHAPE, capacity) for capacity in (100, 70, 90)]:
        pool.give(arena)
    assert pool.nbytes == 190 * SHAPE.bytes_per_token, "two are kept whatever their size, the largest"


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=9),
    gone=st.sets(st.integers(0, 8)),
    window=st.sampled_from([4, 17, 10_000]),
    spare=st.integers(0, 3),
    shuffle=st.randoms(use_true_random=False),
)
def test_sequences_attend_together_as_they_would_alone(
    lengths: list[int], gone: set[int], window: int, spare: int, shuffle: object
) -> None:
    """Whatever their lengths, whoever is missing between them, in whatever order; old rows behind them do not count."""
    pool = ArenaPool()
    for old in filled(pool, [CAPACITY] * len(lengths), seed=1):
        pool.give(old)
    arenas = filled(pool, lengths)
    here = [arena for index, arena in enumerate(arenas) if index not in gone] or arenas
    shuffle.shuffle(here)  # type: ignore[attr-defined]  # hypothesis' Random
    query = torch.randn(len(here) + spare, *GROUPED, generator=torch.Generator().manual_seed(2))

    for order in (list(range(len(here))), side_by_side(here)):
        step = NextRows([here[index] for index in order], Spans(), spare)
        assert len(set(step.rows)) == len(here)
        for layer in range(SHAPE.layers):
            mixed = step.attend(layer, query, window, None)
            assert mixed.shape[0] == len(query)
            assert torch.isfinite(mixed).all()
            for row, index in zip(step.rows, order, strict=True):
                torch.testing.assert_close(mixed[row], alone(here[index], layer, query[row], window))


def test_an_arena_that_nobody_gives_back_frees_its_slot_when_it_is_gone() -> None:
    pool = ArenaPool()
    kept = pool.open(SHAPE, 50)
    for _ in range(3 * pools.SLOTS):
        assert slots_of([pool.open(SHAPE, 50)]) == [1]
    assert slots_of([kept]) == [0]


def test_sequences_of_like_length_attend_together_and_a_much_longer_one_alone() -> None:
    pool = ArenaPool()
    arenas = filled(pool, [10, 11, 12, 40, 9])

    assert [len(group.places) for group in grouped(arenas)] == [3, 1, 1]
    assert [len(group.places) for group in grouped(arenas[:3])] == [3]
    assert [len(group.places) for group in grouped(arenas[2::-1])] == [1, 1, 1], "in another order than their slots"
    assert [len(group.places) for group in grouped([arenas[0], Arena(SHAPE, 40, None), arenas[1]])] == [1, 1, 1]
    assert side_by_side([arenas[2], arenas[0], arenas[1]]) == [1, 2, 0]


@pytest.mark.parametrize(
    ("spare", "rows", "of_the_step"), [(0, [0, 1, 2, 3], 4), (1, [0, 1, 3, 4], 5), (3, [0, 1, 3, 4], 7)]
)
def test_spare_rows_stand_where_a_sequence_is_missing(spare: int, rows: list[int], of_the_step: int) -> None:
    arenas = filled(ArenaPool(), [10, 11, 9, 10, 12])
    step = NextRows([arenas[index] for index in (0, 1, 3, 4)], Spans(), spare)

    assert step.rows == rows
    query = torch.randn(of_the_step, *GROUPED)
    assert step.attend(0, query, 100, None).shape == query.shape


def test_rows_are_written_to_each_arena_and_nowhere_else() -> None:
    pool = ArenaPool()
    arenas = filled(pool, [10, 20, 15])
    before = [arena.both.clone() for arena in arenas]
    heads = torch.randn(5, QUERIES + 2 * SHAPE.heads, SHAPE.head_dim)

    NextRows(arenas, Spans(), 2).write(1, heads)

    for arena, old, row in zip(arenas, before, heads, strict=False):
        new = row[QUERIES:].view(2, SHAPE.heads, SHAPE.head_dim)
        assert torch.equal(arena.both[:, 1, :, arena.length - 1], new)
        old[:, 1, :, arena.length - 1] = new
        assert torch.equal(arena.both[:, :, :, : arena.length], old[:, :, :, : arena.length])
