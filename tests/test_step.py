"""A step in few operations computes what the model's own code computes, or there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch

from agentmesh.config.mesh import Decode, ModelSpec
from agentmesh.engine.composition import Composition
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.engine.probe import probe
from agentmesh.engine.recognise import recognise
from agentmesh.engine.recorded import AnyStep
from agentmesh.engine.step import Step

ZOO = tiny.zoo()
BUILT_OTHERWISE = {
    "gemma2-softcap",
    "gemma3-sliding-mix",
    "glm4-partial-pairs",
    "cohere2-pairs-nope",
    "qwen3next-hybrid",
}
TOKENS = tuple(torch.randint(3, 320, (90,), generator=torch.Generator().manual_seed(3)).tolist())
LENGTHS = (3, 8, 30, 89)  # below and above the tiny models' windows of 8


def runners(model: Any, step: AnyStep | None) -> tuple[ArenaRunner, ArenaRunner]:
    """One that decodes in few operations, and one that runs the model's own code."""
    found = probe(model, step).runner, probe(model).runner
    assert isinstance(found[0], ArenaRunner) and isinstance(found[1], ArenaRunner)  # noqa: PT018  # for the types
    assert found[0].step is not None
    assert found[1].step is None
    return found[0], found[1]


def decode(runner: ArenaRunner, lengths: Sequence[int] = LENGTHS) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of one step, and all KV afterwards."""
    caches = [runner.open(length + 1) for length in lengths]
    for cache, length in zip(caches, lengths, strict=True):
        runner.prefill(cache, Composition(TOKENS[:length]))
    logits = runner.decode(caches, [TOKENS[length] for length in lengths], lengths)
    return logits, [cache.arena.both[:, :, :, : cache.arena.length] for cache in caches]


def same(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {"atol": 1e-4, "rtol": 1e-3} if dtype is torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(found, wanted, **tolerance)


def test_models_that_are_built_otherwise_have_no_step() -> None:
    assert {name for name, (model, _, _) in ZOO.items() if recognise(model) is None} == BUILT_OTHERWISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(ZOO) - BUILT_OTHERWISE - {"llama-dynamic", "llama-longrope"}))
def test_logits_and_kv_are_the_models_own(name: str, dtype: torch.dtype) -> None:
    model = tiny.zoo()[name][0].to(dtype)
    short, own = runners(model, recognise(model))

    logits, kv = decode(short)
    own_logits, own_kv = decode(own)

    same(logits, own_logits, dtype)
    for mine, theirs in zip(kv, own_kv, strict=True):
        same(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_beside_spare_rows_are_computed_as_alone(dtype: torch.dtype) -> None:
    """Products fill nine to fifteen rows up; no sequence has a spare row's KV, and none is missing."""
    model = tiny.zoo()["qwen2"][0].to(dtype)
    runner, own = runners(model, recognise(model))
    lengths = (3, 8, 30, 89, 5, 6, 7, 40, 41, 42, 43)

    logits, kv = decode(runner, lengths)
    own_logits, own_kv = decode(own, lengths)

    assert logits.shape[0] == len(lengths)
    same(logits, own_logits, dtype)
    for mine, theirs in zip(kv, own_kv, strict=True):
        same(mine, theirs, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [(30,), (3, 30, 8)])
def test_products_in_any_number_of_pieces_are_put_together_rightly(threads: int, lengths: tuple[int, ...]) -> None:
    """Pieces of a gated product are its halves where there is an even number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = tiny.zoo()["qwen2"][0]
        runner, own = runners(model, recognise(model))
        (logits, kv), (own_logits, own_kv) = decode(runner, lengths), decode(own, lengths)
    finally:
        torch.set_num_threads(before)

    torch.testing.assert_close(logits, own_logits, atol=1e-4, rtol=1e-3)
    for mine, theirs in zip(kv, own_kv, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_joining_weights_changes_nothing_of_what_the_model_computes_and_takes_no_memory() -> None:
    untouched, model = (tiny.zoo()["qwen2"][0] for _ in range(2))
    ids = torch.tensor([TOKENS])

    step = recognise(model)

    assert step is not None
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)
    joined, own = step.layers[0].mixed.weight, model.model.layers[0].self_attn.k_proj.weight
    assert own.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


def test_a_model_whose_numbers_differ_has_no_step() -> None:
    """What a module computes is not what its name says: only the comparison finds out."""
    model = tiny.llama()
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda _module, _given, found: found * 1.01)

    assert recognise(model) is None


def test_layers_that_are_not_plain_are_left_alone() -> None:
    class Scaled(torch.nn.Linear):
        """As an adapter's layer might be."""

    model = tiny.llama()
    attention = model.model.layers[0].self_attn
    attention.v_proj = Scaled(64, 32, bias=False)
    before = attention.k_proj.weight.data_ptr()

    assert recognise(model) is None
    assert attention.k_proj.weight.data_ptr() == before


@pytest.mark.parametrize("decode_with", [Decode.INT8, Decode.BFLOAT16])
def test_a_step_multiplies_by_the_copies_that_were_asked_for(decode_with: Decode) -> None:
    plain, copied = (load(ModelSpec(name="random:tiny-llama", decode=one)) for one in (Decode.SAME, decode_with))

    assert isinstance(plain.step, Step)
    assert isinstance(copied.step, Step)
    assert plain.step.tuning.decode is Decode.SAME
    logits = [decode(runners(one.model, one.step)[0])[0] for one in (plain, copied)]
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert 0 < error < 0.03


@pytest.mark.model
def test_the_real_model_decodes_in_few_operations(smollm2: LoadedModel) -> None:
    """Rounding only, and little more than half of the operations."""
    short, own = runners(smollm2.model, smollm2.step)

    logits, own_logits = decode(short)[0], decode(own)[0]

    assert float((logits - own_logits).norm() / own_logits.norm()) < 1e-5
    assert operations(short) < 0.6 * operations(own)


def operations(runner: ArenaRunner) -> int:
    """Operations of one step of one sequence that torch dispatches for the code that runs it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    cache = runner.open(9)
    runner.prefill(cache, Composition(TOKENS[:8]))
    with Count() as count:
        runner.decode([cache], [5], [8])
    return count.seen
