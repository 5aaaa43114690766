"""Laws of rotation."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmesh.kv.arena import Arena, KVShape
from agentmesh.kv.rope import Rope
from agentmesh.kv.values import KV, Frame, join

SHAPE = KVShape(2, 2, 12, torch.float32, torch.device("cpu"))


def rope(*, interleaved: bool, partial: bool = False) -> Rope:
    half = 4 if partial else 6
    frequencies = 1.0 / 10000 ** (torch.arange(half) / half)
    return Rope(torch.stack([frequencies, torch.zeros(half)]), interleaved=interleaved)


def keys(count: int) -> torch.Tensor:
    return torch.randn(2, 2, count, 12, generator=torch.Generator().manual_seed(count))


@given(st.integers(0, 3000), st.integers(0, 3000), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_two_rotations_are_one(first: int, second: int, interleaved: bool, partial: bool) -> None:
    turn, x = rope(interleaved=interleaved, partial=partial), keys(3)
    here = torch.full((3,), first)

    twice = turn.rotate(turn.rotate(x, here), torch.full((3,), second))

    torch.testing.assert_close(twice, turn.rotate(x, here + second), atol=2e-3, rtol=1e-3)


@given(st.integers(0, 8000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_rotating_back_restores_and_keeps_norms(start: int, interleaved: bool) -> None:
    turn, x = rope(interleaved=interleaved), keys(5)
    positions = torch.arange(start, start + 5)

    turned = turn.rotate(x, positions)

    torch.testing.assert_close(turn.unrotate(turned, positions), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)


def test_rotation_by_nothing_and_layers_without_rotation_are_bitwise_identities() -> None:
    turn, x = rope(interleaved=False), keys(4)

    assert torch.equal(turn.rotate(x, torch.zeros(4)), x)
    assert torch.equal(turn.rotate(x, torch.arange(4) + 77)[1], x[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_rotated_into_an_arena_is_what_is_rotated(interleaved: bool, dtype: torch.dtype) -> None:
    turn, x, positions = rope(interleaved=interleaved, partial=True), keys(4).to(dtype), torch.arange(5, 9)
    memory = torch.full((2, 2, 10, 12), 7.0, dtype=dtype)

    turn.rotate_into(memory[:, :, 3:7], x, positions)

    assert torch.equal(memory[:, :, 3:7], turn.rotate(x, positions))
    torch.testing.assert_close(turn.rotate(x, positions), turn.rotate(x.float(), positions).to(dtype), rtol=0, atol=0)
    assert torch.equal(memory[:, :, 3:7, 8:], x[..., 8:]), "what does not rotate passes through"
    assert bool((memory[:, :, :3] == 7.0).all())
    assert bool((memory[:, :, 7:] == 7.0).all())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_cutting_and_joining_is_the_identity(sizes: list[int]) -> None:
    total = sum(sizes)
    whole = KV(keys(total), keys(total) * 2, Frame.FREE)
    edges = [sum(sizes[:index]) for index in range(len(sizes) + 1)]

    joined = join([whole.cut(a, b) for a, b in pairwise(edges)])

    assert torch.equal(joined.keys, whole.keys)
    assert torch.equal(joined.values, whole.values)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=8))
@settings(max_examples=30, deadline=None)
def test_an_arena_holds_what_was_written_last(writes: list[tuple[int, int]]) -> None:
    arena = Arena(SHAPE, 80)
    arena.keys.zero_()
    arena.values.zero_()
    model = torch.zeros(2, 2, 80, 12)
    for number, (start, count) in enumerate(writes):
        piece = keys(count) + number
        arena.place(start, KV(piece, piece, Frame.ABSOLUTE), None)
        model[:, :, start : start + count] = piece
    arena.aim(slice(0, 0), 80)

    assert torch.equal(arena.read(0, 80).keys, model)
