"""Products of few rows: cut into pieces they are the same numbers; copies are close, some for small steps only."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from agentmesh.config.mesh import Decode, Dtype, ModelSpec
from agentmesh.engine import tuning
from agentmesh.engine.composition import Composition
from agentmesh.engine.copies import GROUP, INT4_ROWS, INT8_ROWS, LEAST_PACKED, PACKED_ROWS, Int4Copy, Int8Copy
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.engine.probe import probe
from agentmesh.engine.products import SPLIT_ROWS, Product, QuickLinear, Switch, Tuning, Way, quicken, switch_of
from agentmesh.engine.step import Step
from agentmesh.engine.tuning import ALWAYS_CUT, check_copies
from agentmesh.errors import UnsupportedModelError

PROMPT = tuple(range(3, 40))
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": Dtype.BFLOAT16},
    "int8": {"decode": Decode.INT8},
}


def runner_of(loaded: LoadedModel) -> ArenaRunner:
    found = probe(loaded.model, loaded.step).runner
    assert isinstance(found, ArenaRunner)
    return found


@pytest.fixture(scope="module")
def plain() -> ArenaRunner:
    return runner_of(load(ModelSpec(name="random:tiny-llama")))


@pytest.fixture(scope="module")
def quick() -> ArenaRunner:
    return runner_of(load(ModelSpec(name="random:tiny-llama", decode=Decode.INT8)))


def step(runner: ArenaRunner, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one prompt, and those of a step that decodes that many copies of it."""
    caches, first = [], torch.empty(0)
    for _ in range(sequences):
        cache = runner.open(len(PROMPT) + 1)
        first = runner.prefill(cache, Composition(PROMPT))
        caches.append(cache)
    return first, runner.decode(caches, [5] * sequences, [len(PROMPT)] * sequences)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 15, 16, 24, 25, SPLIT_ROWS - 1, SPLIT_ROWS, SPLIT_ROWS + 1])
def test_a_product_in_pieces_is_the_same_product(rows: int) -> None:
    layer = torch.nn.Linear(96, 6 * 7)
    switch = Switch(Tuning())
    quick = QuickLinear(layer, switch)
    given = torch.randn(rows, 96)

    with torch.inference_mode(), switch.computing():
        found = quick(given)

    assert torch.allclose(found, layer(given), atol=1e-5)
    assert torch.equal(quick(given), layer(given)), "nobody asks for pieces out here"


def test_outputs_that_threads_do_not_divide_are_cut_into_fewer_pieces() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        quick = QuickLinear(torch.nn.Linear(8, 9), Switch(Tuning()))
    finally:
        torch.set_num_threads(threads)

    assert quick.product.pieces == 3


def test_only_layers_that_gain_are_changed() -> None:
    for dtype, threads, wanted in ((torch.float32, 2, True), (torch.float32, 1, False), (torch.bfloat16, 2, False)):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(dtype)
        model.device = torch.device("cpu")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            quicken(model, Tuning())
        finally:
            torch.set_num_threads(before)

        assert (switch_of(model) is not None) is wanted


@pytest.mark.parametrize("rows", [LEAST_PACKED, 12, PACKED_ROWS])
def test_a_packed_copy_multiplies_like_the_weights_whatever_rows_are_beside(rows: int) -> None:
    weight, given = torch.randn(48, 96), torch.randn(PACKED_ROWS, 96)
    product = Product(weight, torch.randn(48), Decode.PACKED)

    with torch.inference_mode():
        found = product.multiply(given[:rows], Tuning(Decode.PACKED).way(rows))

    torch.testing.assert_close(found, torch.nn.functional.linear(given[:rows], weight, product.bias))
    assert torch.equal(found, product.multiply(given, Way.COPY)[:rows])
    assert product.full(rows, Way.COPY) == PACKED_ROWS
    assert torch.equal(product.multiply_full(given, Way.COPY)[:rows], found)


def test_copies_are_used_where_they_are_faster() -> None:
    ways = {decode: [Tuning(decode).way(rows) is Way.COPY for rows in (1, 4, 5, 16, 17)] for decode in Decode}

    assert ways == {
        Decode.AUTO: [False] * 5,
        Decode.SAME: [False] * 5,
        Decode.PACKED: [False, False, True, True, False],
        Decode.INT8: [True, True, False, False, False],
        Decode.INT4: [True, True, True, False, False],
        Decode.BFLOAT16: [True] * 5,
    }


@pytest.mark.parametrize("pays", [True, False])
def test_weights_are_packed_by_themselves_where_that_is_faster(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_packing_pays", lambda _weights: pays)

    found = {name: load(ModelSpec(name="random:tiny-llama", **more)).decode for name, more in KINDS.items()}

    assert found == {"float32": Decode.PACKED if pays else Decode.SAME, "bfloat16": Decode.SAME, "int8": Decode.INT8}
    monkeypatch.setattr(tuning, "PACK_AT_MOST", 1000)
    assert load(ModelSpec(name="random:tiny-llama")).decode is Decode.SAME


def test_single_rows_are_cut_where_that_is_faster_and_more_rows_always() -> None:
    assert [Tuning(whole_below=ALWAYS_CUT).way(rows) for rows in (1, 3, 4)] == [Way.OWN, Way.OWN, Way.SPLIT]
    assert Tuning().way(1) is Way.SPLIT


def test_without_trials_nothing_depends_on_a_moments_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_trial: object) -> bool:
        raise AssertionError("no trial was asked for")

    monkeypatch.setattr(tuning, "_faster", never)

    for asked, used in ((Decode.AUTO, Decode.SAME), (Decode.INT8, Decode.INT8)):
        loaded = load(ModelSpec(name="random:tiny-llama", decode=asked), trials=False)
        assert isinstance(loaded.step, Step)
        assert loaded.step.tuning == Tuning(used)


def test_a_trial_takes_the_faster_way_by_a_clear_margin() -> None:
    small, large = (Product(torch.randn(size, 256), None) for size in (64, 8192))

    assert tuning._faster(([small], Way.OWN), ([large], Way.OWN), 4)
    assert not tuning._faster(([large], Way.OWN), ([small], Way.OWN), 4)


@pytest.fixture(scope="module")
def half() -> ArenaRunner:
    return runner_of(load(ModelSpec(name="random:tiny-llama", decode=Decode.BFLOAT16)))


@pytest.mark.parametrize("sequences", [1, INT8_ROWS, INT8_ROWS + 1])
def test_a_step_of_bfloat16_copies_is_closer_than_one_of_int8_copies(
    plain: ArenaRunner, half: ArenaRunner, sequences: int
) -> None:
    own, own_next = step(plain, sequences)
    first, following = step(half, sequences)

    assert torch.equal(first, own), "prompts are prefilled with the model's own weights"
    assert following.dtype is torch.float32
    error = (following - own_next).norm() / own_next.norm()
    assert 0 < float(error) < 0.01


@pytest.mark.parametrize("sequences", [1, INT8_ROWS])
def test_a_small_step_is_close_to_the_models_own_weights_and_not_equal(
    plain: ArenaRunner, quick: ArenaRunner, sequences: int
) -> None:
    own, own_next = step(plain, sequences)
    first, following = step(quick, sequences)

    assert torch.equal(first, own)
    error = (following - own_next).norm() / own_next.norm()
    assert 0 < float(error) < 0.03


def test_a_larger_step_uses_the_models_own_weights(plain: ArenaRunner, quick: ArenaRunner) -> None:
    assert torch.equal(step(quick, INT8_ROWS + 1)[1], step(plain, INT8_ROWS + 1)[1])


def test_a_step_that_fails_leaves_the_own_weights_in_use(plain: ArenaRunner, quick: ArenaRunner) -> None:
    with pytest.raises(AttributeError):
        quick.decode([None], [5], [0])  # type: ignore[list-item]  # no cache at all

    assert torch.equal(step(quick, 1)[0], step(plain, 1)[0])


def test_kv_of_steps_over_copies_is_kept_apart_by_the_fingerprint() -> None:
    names = {decode: load(ModelSpec(name="random:tiny-llama", decode=decode)).fingerprint for decode in Decode}

    assert len(set(names.values())) == 4
    assert names[Decode.AUTO] == names[Decode.SAME] == names[Decode.PACKED], "the same numbers"


def test_what_cannot_be_copied_is_refused() -> None:
    model = torch.nn.ReLU()
    model.device = torch.device("cpu")

    with pytest.raises(UnsupportedModelError, match="no linear layers"):
        check_copies(model, "relu", Decode.INT8)
    uneven = torch.nn.Sequential(torch.nn.Linear(48, 32))
    uneven.device = torch.device("cpu")
    with pytest.raises(UnsupportedModelError, match="rows of 48; use `int8`"):
        check_copies(uneven, "uneven", Decode.INT4)
    model.device = torch.device("meta")
    with pytest.raises(UnsupportedModelError, match="is on meta"):
        check_copies(model, "relu", Decode.INT8)
    with pytest.raises(UnsupportedModelError, match="packs float32 weights"):
        load(ModelSpec(name="random:tiny-llama", dtype=Dtype.BFLOAT16, decode=Decode.PACKED))
    with pytest.raises(UnsupportedModelError, match="is loaded in bfloat16"):
        load(ModelSpec(name="random:tiny-llama", dtype=Dtype.BFLOAT16, decode=Decode.BFLOAT16))


def test_int4_copies_keep_weights_of_sixteen_levels_and_give_others_eight_bits() -> None:
    rows, shape = torch.randn(INT4_ROWS, 96), (40, 3, GROUP)
    quantised = ((torch.randint(0, 16, shape) * 0.01) + torch.randn(40, 3, 1)).flatten(1)

    errors = {}
    for name, weight in {"sixteen levels": quantised, "any": torch.randn(40, 96)}.items():
        for kind in (Int4Copy, Int8Copy):
            wanted = torch.nn.functional.linear(rows.bfloat16().float(), weight)
            errors[name, kind] = float((kind(weight).multiply(rows).float() - wanted).norm() / wanted.norm())

    assert errors["sixteen levels", Int4Copy] < 0.004, "bfloat16 and nothing else"
    assert errors["any", Int4Copy] < errors["any", Int8Copy] < 0.02
    assert [len(Int4Copy(weight)._planes) for weight in (quantised, torch.randn(40, 96))] == [1, 2]


@pytest.mark.model
@pytest.mark.parametrize(("decode", "most"), [(Decode.INT8, 0.01), (Decode.INT4, 0.002)])
def test_the_real_model_writes_nearly_what_its_own_weights_write(
    smollm2: LoadedModel, decode: Decode, most: float
) -> None:
    """Teacher-forced over 12 tokens of its own: KL below the limits that realigned KV is held to."""
    quick, own = load(ModelSpec(decode=decode)), smollm2
    text = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tuple(own.tokenizer.encode(text, add_special_tokens=False))
    runners = [runner_of(own), runner_of(quick)]
    caches = [runner.open(len(prompt) + 12) for runner in runners]
    logits = [runner.prefill(cache, Composition(prompt)) for runner, cache in zip(runners, caches, strict=True)]
    kls, same = [], []
    for position in range(len(prompt), len(prompt) + 12):
        token = int(logits[0].argmax())
        logits = [runner.decode([c], [token], [position])[0] for runner, c in zip(runners, caches, strict=True)]
        dense, copied = (one.double().log_softmax(dim=-1) for one in logits)
        kls.append(float((dense.exp() * (dense - copied)).sum()))
        same.append(int(dense.argmax()) == int(copied.argmax()))

    assert 0 < sum(kls) / len(kls) < most
    assert sum(same) >= 0.75 * len(same)


def test_a_manifest_says_which_weights_decoded() -> None:
    from agentmesh import Mesh

    with Mesh(
        agents={"solver": {"prompt": "{{ question }}", "generate": {"max_tokens": 4}}},
        topology="single",
        model={"name": "random:tiny-llama", "decode": "int8"},
    ) as mesh:
        asyncio.run(mesh.arun(question="What?"))

        assert mesh.load().describe()["decode"] == "int8"
