"""Steps that are replayed compute what the model computes, whatever their recordings saw before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from test_step import BUILT_OTHERWISE, TOKENS, ZOO, decode, runners, same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agentmesh.config.mesh import Decode, ModelSpec
from agentmesh.engine.composition import Composition, Placement
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.engine.probe import probe
from agentmesh.engine.recognise import recognise
from agentmesh.engine.recorded import STEPS, RecordedStep, Recording, Work, recorded
from agentmesh.engine.step import Step

READS_A_NUMBER = torch.ops.aten._local_scalar_dense.default


class Noting(TorchDispatchMode):
    """Notes operations with the tensors that they were given, and runs them again over the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is READS_A_NUMBER:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.noted.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.noted:
            pairs = zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True)
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


SIZES = (*STEPS, 64, 256)


class Tapes:
    """A recorder for any device, as strict as CUDA graphs: no operation may hang on a number that it reads back."""

    def __init__(self) -> None:
        self.made = 0

    def record(self, work: Work) -> Recording:
        self.made += 1
        work()
        with Noting() as noting:
            results = work()
        return Recording(results, noting.replay)


def replaying(
    model: Any, step: Step | None, recorder: Tapes | None = None, sizes: Sequence[int] = SIZES
) -> tuple[ArenaRunner, ArenaRunner]:
    """One that replays, and one that runs the model's own code."""
    assert step is not None
    found, reason = recorded(model, step, recorder or Tapes(), sizes)
    assert isinstance(found, RecordedStep), reason
    return runners(model, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(ZOO) - BUILT_OTHERWISE - {"llama-dynamic", "llama-longrope"}))
def test_logits_and_kv_are_the_models_own(name: str, dtype: torch.dtype) -> None:
    model = tiny.zoo()[name][0].to(dtype)
    replay, own = replaying(model, recognise(model), sizes=(1, 4, 64))

    logits, kv = decode(replay)
    own_logits, own_kv = decode(own)

    same(logits, own_logits, dtype)
    for mine, theirs in zip(kv, own_kv, strict=True):
        same(mine, theirs, dtype)


def test_one_tape_serves_steps_of_changing_tokens_positions_and_rows() -> None:
    """All that is recorded is recorded at first, for some numbers of rows, and results outlive the next step."""
    model, recorder = tiny.llama(), Tapes()
    replay, own = replaying(model, recognise(model), recorder)
    assert recorder.made == len(SIZES) * (len(model.model.layers) + 1)
    made = recorder.made

    sizes = (2, 1, 4, 3, 7, 3, 8)
    lengths = [[(5 * index + 11 * count) % 80 + 2 for index in range(count)] for count in sizes]
    found = [decode(replay, one) for one in lengths]

    for one, (logits, kv) in zip(lengths, found, strict=True):
        own_logits, own_kv = decode(own, one)
        same(logits, own_logits)
        for mine, theirs in zip(kv, own_kv, strict=True):
            same(mine, theirs)
    assert recorder.made == made


def test_many_steps_of_one_sequence_follow_each_other() -> None:
    model = tiny.llama()

    def written(runner: ArenaRunner) -> list[int]:
        cache = runner.open(40)
        logits = runner.prefill(cache, Composition(TOKENS[:9]))[None]
        tokens: list[int] = []
        for position in range(9, 39):
            tokens.append(int(logits[0].argmax()))
            logits = runner.decode([cache], [tokens[-1]], [position])
        return tokens

    replay, own = replaying(model, recognise(model))
    assert written(replay) == written(own)


@pytest.mark.parametrize("name", ["llama-yarn", "mistral-sliding", "qwen3-qk-norm"])
@pytest.mark.parametrize(("tokens", "replayed"), [(7, 3), (60, 30), (500, 250), (700, 350)])
def test_what_is_computed_between_placed_tokens_is_replayed_as_well(
    name: str, tokens: int, replayed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second token is placed; more rows than are recorded run the model's own code."""
    model = tiny.zoo()[name][0]
    replay, own = replaying(model, recognise(model), sizes=(4, 64, 256))
    text = tuple(torch.randint(300, (tokens,), generator=torch.Generator().manual_seed(1)).tolist())
    whole = own.open(tokens)
    own.prefill(whole, Composition(text))
    computed = frozenset(range(tokens - 1 - 2 * (replayed - 1), tokens - 1, 2))
    sparse = Composition(text, (Placement(0, whole.arena.read(0, tokens - 1).owned()),), recomputed=computed)
    rows: list[int] = []
    assert isinstance(replay.step, RecordedStep)
    compute = RecordedStep.compute

    def noted(step: RecordedStep, *about: Any) -> torch.Tensor:
        rows.append(len(about[1]))
        return compute(step, *about)

    monkeypatch.setattr(RecordedStep, "compute", noted)
    caches = [one.open(tokens) for one in (replay, own)]
    found, wanted = (one.prefill(cache, sparse) for one, cache in zip((replay, own), caches, strict=True))

    same(found, wanted)
    same(caches[0].arena.both, caches[1].arena.both)
    assert rows == ([replayed] if replayed <= 256 else [])


def test_steps_of_more_sequences_than_are_recorded_run_all_the_same() -> None:
    model = tiny.llama()
    replay, own = replaying(model, recognise(model))
    lengths = [2 + index % 5 for index in range(SIZES[-1] + 1)]

    same(decode(replay, lengths)[0], decode(own, lengths)[0])


def test_copies_of_weights_are_replayed_as_well() -> None:
    loaded = load(ModelSpec(name="random:tiny-llama", decode=Decode.BFLOAT16))
    assert isinstance(loaded.step, Step)
    replayed = RecordedStep(loaded.step, Tapes(), SIZES)
    plain, replay = (probe(loaded.model, step).runner for step in (loaded.step, replayed))
    assert isinstance(plain, ArenaRunner) and isinstance(replay, ArenaRunner)  # noqa: PT018  # for the types

    same(decode(replay)[0], decode(plain)[0])


@pytest.mark.model
def test_the_real_model_is_replayed(smollm2: LoadedModel) -> None:
    """Rounding only, alone and beside others."""
    assert isinstance(smollm2.step, Step)
    replay, own = replaying(smollm2.model, smollm2.step, sizes=(1, 4, 32))

    for lengths in ((30,), (3, 30, 89)):
        logits, own_logits = decode(replay, lengths)[0], decode(own, lengths)[0]
        assert float((logits - own_logits).norm() / own_logits.norm()) < 1e-5


class Refusing:
    """A recorder of a device that cannot."""

    def record(self, work: Work) -> Recording:
        try:
            raise RuntimeError("CUDA error: operation not permitted\nand more lines")
        finally:
            raise RuntimeError("the recording ended early")  # as a device says it


class Stale:
    """A recorder whose recordings do nothing when they are replayed."""

    def record(self, work: Work) -> Recording:
        return Recording(work(), lambda: None)


class Lost:
    """A recorder whose recordings write over memory that holds no numbers any more."""

    def record(self, work: Work) -> Recording:
        results = work()
        return Recording(results, lambda: [result.fill_(torch.nan) for result in results])


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Refusing(), "it cannot be recorded: CUDA error: operation not permitted"),
        (Stale(), "replayed for 1 rows it differs"),
        (Lost(), "replayed for 1 rows it differs"),
    ],
)
def test_what_cannot_be_recorded_or_differs_is_not_replayed_and_says_why(recorder: Any, reason: str) -> None:
    model = tiny.llama()
    step = recognise(model)
    assert step is not None

    found, why = recorded(model, step, recorder)

    assert found is step
    assert why.startswith(reason)
    assert "\n" not in why
    support = probe(model, found)
    assert not support.replays
    assert support.decoding(why) == f"few operations (no CUDA graphs: {why})"
    assert support.decoding("") == "few operations"
    assert probe(model).decoding("") == "the model's own code"


def test_a_replayed_step_is_told_of() -> None:
    model = tiny.llama()
    step = recognise(model)
    assert step is not None
    found, why = recorded(model, step, Tapes())

    support = probe(model, found)

    assert support.steps
    assert support.replays
    assert support.decoding(why) == "few operations, replayed from CUDA graphs"


def test_operations_that_hang_on_a_number_are_refused() -> None:
    """The recorder of these tests is as strict as a device."""

    def work() -> Sequence[Any]:
        return (torch.ones(3) * float(torch.ones(1).sum()),)

    with pytest.raises(RuntimeError, match="capturing"):
        Tapes().record(work)  # type: ignore[arg-type]  # what it returns does not matter
