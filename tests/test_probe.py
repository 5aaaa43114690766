"""Every attention and rope kind: what the probe says, and that it is true."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers.cache_utils import DynamicCache

from agentmesh.communicator.prefix import Prefix
from agentmesh.engine.composition import Composition, Placement
from agentmesh.engine.forward import ArenaRunner, PlainRunner
from agentmesh.engine.masks import MaskPlan
from agentmesh.engine.probe import probe
from agentmesh.prompt import Prompt, Segment
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.prefix import PrefixStore

ZOO = tiny.zoo()
REUSABLE = [name for name, (_, level, _) in ZOO.items() if level != "dense"]
WHOLE = [name for name in ZOO if name not in REUSABLE]
TOKENS = tuple(torch.randint(3, 320, (90,), generator=torch.Generator().manual_seed(3)).tolist())


def runner_of(model: Any) -> ArenaRunner:
    runner = probe(model).runner
    assert isinstance(runner, ArenaRunner)
    return runner


@pytest.fixture(params=REUSABLE)
def reusable(request: pytest.FixtureRequest) -> ArenaRunner:
    return runner_of(ZOO[request.param][0])


@pytest.mark.parametrize("name", ZOO)
def test_the_probe_labels_every_layer(name: str) -> None:
    model, level, labels = ZOO[name]

    support = probe(model)

    assert (support.level.value, support.layers) == (level, labels)
    assert bool(support.reason) == (level == "dense")


@pytest.mark.parametrize("name", WHOLE)
def test_what_a_cache_of_transformers_takes_is_known_ahead(name: str) -> None:
    runner = probe(ZOO[name][0]).runner
    assert isinstance(runner, PlainRunner)
    cache = runner.open(90)

    runner.begin(cache, Composition(TOKENS)).finish()

    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert 0 < sum(tensor.nbytes for tensor in tensors) <= runner.need(90) == runner.nbytes
    assert runner.need(90) <= 2 * sum(tensor.nbytes for tensor in tensors)
    runner.close(cache)
    assert runner.nbytes == 0


def test_a_full_prefill_is_the_models_own_forward(reusable: ArenaRunner) -> None:
    found = reusable.prefill(reusable.open(90), Composition(TOKENS))

    with torch.inference_mode():
        wanted = reusable.model(input_ids=torch.tensor([TOKENS]), logits_to_keep=1).logits[0, -1]
    assert torch.equal(found, wanted)


def test_placed_and_computed_tokens_equal_a_full_prefill(reusable: ArenaRunner) -> None:
    full = reusable.open(90)
    wanted = reusable.prefill(full, Composition(TOKENS))
    placed = tuple(Placement(a, full.arena.read(a, b)) for a, b in ((4, 21), (30, 31), (44, 80)))

    found = reusable.prefill(reusable.open(90), Composition(TOKENS, placed))

    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_keys_moved_to_another_position_are_the_models_keys_there(reusable: ArenaRunner) -> None:
    """The same tokens with nothing but a shift: every layer's keys must be explained by the rotation."""
    here = reusable.open(40)
    reusable.prefill(here, Composition(TOKENS[:40]))
    there = reusable.open(200)
    shifted, positions = DynamicCache(), torch.arange(100, 140)
    with torch.inference_mode():
        reusable.model(
            input_ids=torch.tensor([TOKENS[:40]]), position_ids=positions[None], past_key_values=shifted, use_cache=True
        )
    assert reusable.rope is not None

    there.arena.place(100, here.arena.read_free(0, 40, reusable.rope), reusable.rope)

    wanted = torch.cat([layer.keys for layer in shifted.layers])
    torch.testing.assert_close(there.arena.keys[:, :, 100:140], wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REUSABLE)
def test_a_prefix_hit_is_bit_equal_to_the_same_prompt_computed_cold(name: str, dtype: torch.dtype) -> None:
    model = tiny.build(ZOO[name][0].config, dtype)
    runner = runner_of(model)
    prompt = Prompt((Segment("fixed", "", TOKENS[:60]), Segment("question", "", TOKENS[60:])), (60,))
    other = Prompt((Segment("fixed", "", TOKENS[:60]), Segment("question", "", TOKENS[10:30])), (60,))
    warm, cold = Prefix(PrefixStore(Budget(2**24)), "m"), Prefix(PrefixStore(Budget(2**24)), "m")
    first = runner.open(90)
    runner.prefill(first, warm.plan(other).composition)
    warm.prefilled(other, warm.plan(other), first.arena)
    caches = {"warm": runner.open(90), "cold": runner.open(90)}

    plan = warm.plan(prompt)
    warm_logits = runner.prefill(caches["warm"], plan.composition)
    cold_logits = runner.prefill(caches["cold"], cold.plan(prompt).composition)

    assert plan.composition.placed_tokens == 60
    assert torch.equal(warm_logits, cold_logits)
    assert torch.equal(caches["warm"].arena.keys, caches["cold"].arena.keys)
    assert torch.equal(caches["warm"].arena.values, caches["cold"].arena.values)


def test_sequences_of_any_length_decode_together_as_they_would_alone(reusable: ArenaRunner) -> None:
    """Lengths below and above the tiny models' windows of 8."""
    lengths, alone, caches = (3, 8, 30, 89), [], []
    for length in lengths:
        caches.append(reusable.open(90))
        reusable.prefill(caches[-1], Composition(TOKENS[:length]))
        other = reusable.open(90)
        reusable.prefill(other, Composition(TOKENS[:length]))
        alone.append(reusable.forward(other, (TOKENS[length],), (length,)))

    together = reusable.decode(caches, [TOKENS[length] for length in lengths], lengths)

    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-3)
    assert [cache.arena.length for cache in caches] == [length + 1 for length in lengths]


def test_models_with_an_attention_of_their_own_decode_one_by_one() -> None:
    batches = {name: runner_of(ZOO[name][0]).batches for name in REUSABLE}

    assert batches.pop("gemma2-softcap") is False
    assert all(batches.values())


def test_masks_equal_brute_force() -> None:
    positions = torch.tensor([0, 3, 4, 9, 15])
    plan = MaskPlan({"full_attention": None, "sliding_attention": 4}, by_type=True, dtype=torch.float32)

    masks = plan.build(positions, 16)

    assert isinstance(masks, dict)
    for row, query in enumerate(positions.tolist()):
        for key in range(16):
            assert bool(masks["full_attention"][0, 0, row, key] == 0) == (key <= query)
            assert bool(masks["sliding_attention"][0, 0, row, key] == 0) == (query - 4 < key <= query)


def test_a_refused_model_still_runs_whole() -> None:
    model, _, _ = ZOO["qwen3next-hybrid"]
    runner = probe(model).runner
    cache = runner.open(90)

    found = runner.begin(cache, Composition(TOKENS[:40])).finish()
    found = runner.forward(cache, (TOKENS[40],), (40,))

    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([TOKENS[:41]]), logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
