"""The same on a CUDA device as on the CPU: prefills from placed and computed tokens, steps, shared slots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from agentmesh import Mesh
from agentmesh.config.mesh import Dtype, ModelSpec
from agentmesh.engine.catalog import byte_tokenizer, random_config, random_model
from agentmesh.engine.composition import Composition, Placement
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import load
from agentmesh.engine.probe import Level, Support, probe
from agentmesh.local import LocalBackend
from agentmesh.reasons import Treatment

DEVICE = os.environ.get("AGENTMESH_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE.startswith("cuda") and not torch.cuda.is_available(),
    reason="there is no CUDA device; AGENTMESH_TEST_DEVICE=cpu runs them here",
)
TOKENS = tuple(torch.randint(3, 250, (90,), generator=torch.Generator().manual_seed(3)).tolist())
LENGTHS = (5, 30, 89)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's files: random weights that are made on a device differ from those made on another one."""
    place, cpu = tmp_path_factory.mktemp("model"), torch.device("cpu")
    random_model(random_config("tiny-llama"), torch.float32, cpu).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def supported(folder: Path, device: str) -> Support:
    loaded = load(ModelSpec(name=str(folder), device=device))
    return probe(loaded.model, loaded.step)


def test_steps_are_replayed_from_graphs_unless_that_is_switched_off() -> None:
    logits = []
    for graphs in (True, False):
        loaded = load(ModelSpec(name="random:tiny-llama", device=DEVICE, graphs=graphs))
        support = probe(loaded.model, loaded.step)
        assert support.replays == (graphs and DEVICE.startswith("cuda")), loaded.unrecorded
        runner = support.runner
        assert isinstance(runner, ArenaRunner)
        for count in (1, 3, 2, 3):  # a tape is used again
            caches = [runner.open(length + 1) for length in LENGTHS[:count]]
            for cache, length in zip(caches, LENGTHS, strict=False):
                runner.prefill(cache, Composition(TOKENS[:length]))
            logits.append(runner.decode(caches, [TOKENS[length] for length in LENGTHS[:count]], LENGTHS[:count]))

    for replayed, plain in zip(logits[:4], logits[4:], strict=True):
        torch.testing.assert_close(replayed, plain, atol=2e-3, rtol=2e-3)


def found(folder: Path, device: str) -> tuple[Level, bool, torch.Tensor, torch.Tensor]:
    """Level, whether it has a step, logits of a sparse prefill, and logits of a step of several sequences."""
    support = supported(folder, device)
    runner = support.runner
    assert isinstance(runner, ArenaRunner)
    caches = [runner.open(length + 1) for length in LENGTHS]
    for cache, length in zip(caches, LENGTHS, strict=True):
        runner.prefill(cache, Composition(TOKENS[:length]))
    step = runner.decode(caches, [TOKENS[length] for length in LENGTHS], LENGTHS)
    sparse = runner.open(len(TOKENS))
    assert runner.rope is not None
    moved = caches[-1].arena.read_free(20, 60, runner.rope)
    logits = runner.prefill(sparse, Composition(TOKENS, (Placement(20, moved),), cuts=(15,)))
    return support.level, support.steps, logits.cpu(), step.cpu()


def test_prefills_and_steps_are_those_of_the_cpu(folder: Path) -> None:
    level, steps, sparse, step = found(folder, DEVICE)
    own_level, own_steps, own_sparse, own_step = found(folder, "cpu")

    assert (level, steps) == (own_level, own_steps)
    torch.testing.assert_close(sparse, own_sparse, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(step, own_step, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
@pytest.mark.parametrize("computed", [40, 300])
def test_what_is_computed_behind_and_between_placed_tokens_is_that_of_a_whole_prompt(
    computed: int, dtype: Dtype, folder: Path
) -> None:
    """Few rows are replayed, more run the model's own code; either way behind a prefix and scattered."""
    loaded = load(ModelSpec(name=str(folder), device=DEVICE, dtype=dtype))
    runner = probe(loaded.model, loaded.step).runner
    assert isinstance(runner, ArenaRunner)
    text = tuple(torch.randint(3, 250, (500,), generator=torch.Generator().manual_seed(4)).tolist())
    whole = runner.open(500)
    wanted = runner.prefill(whole, Composition(text))
    between = frozenset(torch.randperm(499, generator=torch.Generator().manual_seed(5))[:computed].tolist())
    ways = [
        Composition(text, (Placement(0, whole.arena.read(0, 500 - computed)),)),
        Composition(text, (Placement(0, whole.arena.read(0, 499)),), recomputed=between),
    ]

    for way in ways:
        cache = runner.open(500)
        logits = runner.prefill(cache, way)
        within = 1e-3 if dtype is Dtype.FLOAT32 else 3e-2
        assert (logits - wanted).float().norm() < within * wanted.float().norm()
        assert (cache.arena.both - whole.arena.both).float().norm() < within * whole.arena.both.float().norm()


@pytest.mark.parametrize("preset", ["prefix", "linear", "kvcomm", "blend"])
def test_agents_share(preset: str) -> None:
    agents = {
        f"agent.{number}": {
            "system": f"You are number {number}. " * 6,
            "prompt": "{{ question }}\n{% for m in inbox %}\n{{ m }}\n{% endfor %}\nGo on.",
            "generate": {"max_tokens": 40},
        }
        for number in (1, 2, 3)
    }
    about = {"preset": preset, "cost_gate": False, "max_kl": 1e6, "min_tokens": 8, "anchors": {"gamma": 1.0}}
    with Mesh(
        agents=agents,
        topology={"use": "fully-connected", "agents": 3},
        model={"name": "random:tiny-llama", "device": DEVICE},
        communicator=about,
    ) as one:
        backend = one.load()
        assert isinstance(backend, LocalBackend)
        assert str(backend.engine.loaded.model.device).startswith(DEVICE)
        assert one.width >= 1
        results = [one.run(question=f"How many pears are in {n} boxes of seven? " * 3) for n in range(8)]

    rows = [row for call in results[-1].calls for row in call.plan if row.tokens]
    wanted = Treatment.PLACED_EXACT if preset == "prefix" else Treatment.PLACED_REALIGNED
    assert any(row.kind is wanted for row in rows)
    assert all(len(result.messages) == 3 for result in results)
