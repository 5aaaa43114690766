"""The foundation: an arena filled by placing and computing equals one full forward."""

from __future__ import annotations

import random

import pytest
import tiny
import torch

from agentmesh.engine.composition import Composition, Placement
from agentmesh.engine.forward import Runner
from agentmesh.engine.probe import probe


def random_split(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """Random disjoint spans to place, leaving the last token computed."""
    cuts = sorted(rng.sample(range(length), 2 * rng.randint(1, 4)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=True))
    return [(a, min(b, length - 1)) for a, b in spans if a < min(b, length - 1)]


def assert_sparse_equals_full(runner: Runner, tokens: list[int], spans: list[tuple[int, int]]) -> None:
    """Place ``spans`` from a full forward, compute the rest, compare every row and the logits."""
    full = runner.arena(len(tokens))
    wanted = runner.prefill(full, Composition(tuple(tokens)))
    sparse = runner.arena(len(tokens))
    sparse.arena.keys.fill_(float("nan"))
    sparse.arena.values.fill_(float("nan"))
    placed = tuple(Placement(a, full.arena.read(a, b).owned()) for a, b in spans)

    found = runner.prefill(sparse, Composition(tuple(tokens), placed))

    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(sparse.arena.keys, full.arena.keys, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(sparse.arena.values, full.arena.values, atol=2e-4, rtol=1e-4)


def test_full_forward_over_an_arena_is_the_models_own_forward() -> None:
    model = tiny.llama()
    runner = probe(model).runner
    assert runner is not None
    tokens = torch.randint(320, (1, 40), generator=torch.Generator().manual_seed(1))

    found = runner.prefill(runner.arena(40), Composition(tuple(tokens[0].tolist())))

    with torch.inference_mode():
        wanted = model(input_ids=tokens, logits_to_keep=1).logits[0, -1]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("seed", range(12))
def test_random_splits_on_a_two_layer_llama(seed: int) -> None:
    runner = probe(tiny.llama()).runner
    assert runner is not None
    rng = random.Random(seed)
    length = rng.randint(24, 90)
    tokens = [rng.randrange(320) for _ in range(length)]

    assert_sparse_equals_full(runner, tokens, random_split(rng, length))


def test_a_later_placed_row_is_invisible_to_an_earlier_computed_token() -> None:
    runner = probe(tiny.llama()).runner
    assert runner is not None
    tokens = tuple(range(10, 40))
    full = runner.arena(30)
    runner.prefill(full, Composition(tokens))
    poisoned = full.arena.read(20, 25).owned()
    poisoned.keys.fill_(50.0)
    poisoned.values.fill_(50.0)
    sparse = runner.arena(30)

    runner.prefill(sparse, Composition(tokens, (Placement(20, poisoned),)))

    torch.testing.assert_close(sparse.arena.keys[:, :, :20], full.arena.keys[:, :, :20], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sparse.arena.keys[1, :, 25:], full.arena.keys[1, :, 25:], atol=1e-2)
