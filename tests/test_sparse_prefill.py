"""The foundation: an arena filled by placing and computing equals one full forward."""

from __future__ import annotations

import random

import pytest
import tiny
import torch

from agentmesh.engine import composition
from agentmesh.engine.composition import Composition, Placement
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import LoadedModel
from agentmesh.engine.probe import probe


def random_split(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """Random disjoint spans to place, leaving the last token computed."""
    cuts = sorted(rng.sample(range(length), 2 * rng.randint(1, 4)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=True))
    return [(a, min(b, length - 1)) for a, b in spans if a < min(b, length - 1)]


def assert_sparse_equals_full(runner: ArenaRunner, tokens: list[int], spans: list[tuple[int, int]]) -> None:
    """Place ``spans`` from a full forward, compute the rest, compare every row and the logits."""
    full = runner.open(len(tokens))
    wanted = runner.prefill(full, Composition(tuple(tokens)))
    sparse = runner.open(len(tokens))
    sparse.arena.keys.fill_(float("nan"))
    sparse.arena.values.fill_(float("nan"))
    placed = tuple(Placement(a, full.arena.read(a, b).owned()) for a, b in spans)

    found = runner.prefill(sparse, Composition(tuple(tokens), placed))

    for mine, theirs in (
        (found, wanted),
        (sparse.arena.keys, full.arena.keys),
        (sparse.arena.values, full.arena.values),
    ):
        assert float((mine - theirs).norm() / theirs.norm()) < 2e-5
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)


def test_full_forward_over_an_arena_is_the_models_own_forward() -> None:
    model = tiny.llama()
    runner = probe(model).runner
    assert isinstance(runner, ArenaRunner)
    tokens = torch.randint(320, (1, 40), generator=torch.Generator().manual_seed(1))

    found = runner.prefill(runner.open(40), Composition(tuple(tokens[0].tolist())))

    with torch.inference_mode():
        wanted = model(input_ids=tokens, logits_to_keep=1).logits[0, -1]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("seed", range(12))
def test_random_splits_on_a_two_layer_llama(seed: int) -> None:
    runner = probe(tiny.llama()).runner
    assert isinstance(runner, ArenaRunner)
    rng = random.Random(seed)
    length = rng.randint(24, 90)
    tokens = [rng.randrange(320) for _ in range(length)]

    assert_sparse_equals_full(runner, tokens, random_split(rng, length))


@pytest.mark.model
@pytest.mark.parametrize("seed", range(3))
def test_random_splits_on_the_embedded_model(smollm2: LoadedModel, seed: int) -> None:
    runner = probe(smollm2.model).runner
    assert isinstance(runner, ArenaRunner)
    rng = random.Random(seed)
    text = "Every morning the baker counts loaves, sells most of them before noon, and gives the rest away. " * 6
    tokens = smollm2.tokenizer.encode(text)[: rng.randint(60, 120)]

    assert_sparse_equals_full(runner, tokens, random_split(rng, len(tokens)))


def test_a_later_placed_row_is_invisible_to_an_earlier_computed_token() -> None:
    runner = probe(tiny.llama()).runner
    assert isinstance(runner, ArenaRunner)
    tokens = tuple(range(10, 40))
    full = runner.open(30)
    runner.prefill(full, Composition(tokens))
    poisoned = full.arena.read(20, 25).owned()
    poisoned.keys.fill_(50.0)
    poisoned.values.fill_(50.0)
    sparse = runner.open(30)

    runner.prefill(sparse, Composition(tokens, (Placement(20, poisoned),)))

    torch.testing.assert_close(sparse.arena.keys[:, :, :20], full.arena.keys[:, :, :20], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sparse.arena.keys[1, :, 25:], full.arena.keys[1, :, 25:], atol=1e-2)


@pytest.mark.parametrize("cuts", [(), (20, 35)])
def test_tokens_computed_inside_a_placement_replace_what_was_placed(cuts: tuple[int, ...]) -> None:
    runner = probe(tiny.llama()).runner
    assert isinstance(runner, ArenaRunner)
    tokens = tuple(torch.randint(320, (50,), generator=torch.Generator().manual_seed(2)).tolist())
    full = runner.open(50)
    runner.prefill(full, Composition(tokens))
    spoilt = full.arena.read(5, 45).owned()
    again = (9, 10, 27, 44)
    for position in again:
        spoilt.keys[:, :, position - 5], spoilt.values[:, :, position - 5] = 1e3, -1e3
    wanted = Composition(tokens, (Placement(5, spoilt),), cuts, frozenset(again))

    sparse = runner.open(50)
    runner.prefill(sparse, wanted)

    assert wanted.placed_tokens == 36
    torch.testing.assert_close(sparse.arena.keys[:, :, :50], full.arena.keys[:, :, :50], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(sparse.arena.values[:, :, :50], full.arena.values[:, :, :50], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("behind", [0, 700])
def test_a_long_prompt_is_computed_in_several_forwards(behind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of at most ``AT_ONCE`` tokens; logits and KV are those of one forward, also behind what is placed."""
    runner = probe(tiny.llama(max_position_embeddings=2048)).runner
    assert isinstance(runner, ArenaRunner)
    tokens = tuple(torch.randint(320, (1500,), generator=torch.Generator().manual_seed(0)).tolist())
    before = runner.open(1500)
    runner.prefill(before, Composition(tokens))
    in_pieces = Composition(tokens, (Placement(0, before.arena.read(0, behind)),) if behind else ())
    assert [len(chunk) for chunk in in_pieces.chunks("cpu")] == ([750, 750] if not behind else [800])
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 300)
    assert [len(chunk) for chunk in in_pieces.chunks("cpu")] == ([266, 267, 267] if behind else [300] * 5)
    cut = runner.open(1500)
    found = runner.prefill(cut, in_pieces)
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 1500)
    whole = runner.open(1500)

    wanted = runner.prefill(whole, Composition(tokens))

    assert torch.allclose(found, wanted, atol=1e-4)
    assert torch.allclose(cut.arena.both, whole.arena.both, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prefix_hit_is_bit_equal_to_the_same_prompt_computed_cold(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies between two cuts is in the same forwards, whether or not what lies ahead of them was placed."""
    monkeypatch.setitem(composition.AT_ONCE, "cpu", 16)
    runner = probe(tiny.llama(dtype)).runner
    assert isinstance(runner, ArenaRunner)
    tokens = tuple(torch.randint(320, (100,), generator=torch.Generator().manual_seed(5)).tolist())
    cold, warm = runner.open(100), runner.open(100)
    wanted = runner.prefill(cold, Composition(tokens, cuts=(40,)))

    hit = Composition(tokens, (Placement(0, cold.arena.read(0, 40).owned()),), cuts=(40,))
    found = runner.prefill(warm, hit)

    assert [len(chunk) for chunk in hit.chunks("cpu")] == [15, 15, 15, 15]
    assert torch.equal(found, wanted)
    assert torch.equal(warm.arena.both, cold.arena.both)
