"""The embedded model end to end: exact reuse, identical tokens under every preset, flat memory."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import psutil
import pytest
import torch

from agentmesh import Mesh
from agentmesh.communicator.dense import Dense
from agentmesh.communicator.prefix import Prefix
from agentmesh.engine.composition import Composition
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import LoadedModel
from agentmesh.engine.probe import Level, probe
from agentmesh.engine.tokenizer import HubTokenizer
from agentmesh.prompt import Content, ContentKind, Prompt, PromptRenderer, RoleTemplate, Scope
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.prefix import PrefixStore

pytestmark = pytest.mark.model

SYSTEM = "You are a careful solver of word problems. " * 8
QUESTIONS = ("Tom has 3 apples and buys 4 more. How many?", "A box holds 6 eggs. How many eggs are in 5 boxes?")


def prompts(loaded: LoadedModel) -> list[Prompt]:
    renderer = PromptRenderer(HubTokenizer(loaded.tokenizer))
    template = RoleTemplate(SYSTEM, "{{ question }}\nAnswer shortly.")
    scopes = [
        Scope({"question": Content(text, ContentKind.INPUT, "question")}, (), role="", node="a", round=0, rounds=1)
        for text in QUESTIONS
    ]
    return [renderer.render(template, scope)[0] for scope in scopes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_hit_is_bit_equal_to_a_cold_prefill(dtype: str, request: pytest.FixtureRequest) -> None:
    loaded: LoadedModel = request.getfixturevalue("smollm2" if dtype == "float32" else "smollm2_bf16")
    support = probe(loaded.model, loaded.step)
    runner = support.runner
    assert support.level is Level.REALIGN
    assert isinstance(runner, ArenaRunner)
    first, second = prompts(loaded)
    warm, cold = Prefix(PrefixStore(Budget(2**30)), "m"), Prefix(PrefixStore(Budget(2**30)), "m")
    caches = [runner.open(len(first.tokens)), runner.open(len(second.tokens)), runner.open(len(second.tokens))]
    runner.prefill(caches[0], warm.plan(first).composition)
    warm.prefilled(first, warm.plan(first), caches[0].arena)

    plan = warm.plan(second)
    hit = runner.prefill(caches[1], plan.composition)
    miss = runner.prefill(caches[2], cold.plan(second).composition)

    assert plan.composition.placed_tokens == second.points[-1] > 50
    assert torch.equal(hit, miss)
    assert torch.equal(caches[1].arena.keys, caches[2].arena.keys)
    assert torch.equal(caches[1].arena.values, caches[2].arena.values)
    dense = runner.prefill(runner.open(len(second.tokens)), Dense(Budget(2**30)).plan(second).composition)
    assert int(dense.argmax()) == int(hit.argmax())


def test_position_free_keys_survive_bf16_storage_and_moving(smollm2: LoadedModel) -> None:
    """Layer 0 depends on token and position alone: moved keys must be the model's own to 1e-5."""
    support = probe(smollm2.model, smollm2.step)
    runner, rope = support.runner, support.rope
    assert isinstance(runner, ArenaRunner)
    assert rope is not None
    tokens = prompts(smollm2)[0].tokens
    far = (*tokens[:40], *tokens)
    here, there, moved = (runner.open(len(far)) for _ in range(3))
    runner.prefill(here, Composition(tokens))
    runner.prefill(there, Composition(far))
    moved.arena.place(40, here.arena.read_free(0, len(tokens), rope), rope)

    difference = moved.arena.keys[0, :, 40:] - there.arena.keys[0, :, 40:]
    assert float(difference.abs().max()) < 1e-5 * float(there.arena.keys[0].abs().max())


def test_every_preset_runs_on_identical_token_ids_and_system_prompts_are_computed_once(root: Path) -> None:
    found = {}
    for preset in ("dense", "prefix"):
        sets = [f"communicator.preset={preset}", "agents.agent.generate.max_tokens=10"]
        with Mesh.from_yaml(root / "configs" / "demo.yaml", overrides=sets) as mesh:
            found[preset] = [mesh.run(question=question) for question in QUESTIONS]

    for dense, prefix in zip(found["dense"], found["prefix"], strict=True):
        assert [m.text for m in dense.messages] == [m.text for m in prefix.messages]
        assert [c.prompt_tokens for c in dense.calls] == [c.prompt_tokens for c in prefix.calls]
    assert all(call.placed_exact == 0 for result in found["dense"] for call in result.calls)
    assert all(call.placed_exact >= 20 for call in found["prefix"][1].calls)
    reasons = {str(row.reason) for row in found["prefix"][1].calls[0].plan}
    assert reasons == {"identical-prefix", "behind-prefix"}


@pytest.mark.parametrize(("preset", "budget"), [("prefix", 600_000), ("linear", 6_000_000)])
def test_three_hundred_runs_keep_memory_flat_and_the_budget(preset: str, budget: int) -> None:
    agents = {
        "agent": {
            "system": "You are number {{ node }}. " * 12,
            "prompt": "{{ question }}\n{% for m in inbox %}\n{{ m }}\n{% endfor %}",
            "generate": {"max_tokens": 8},
        }
    }
    process, sizes = psutil.Process(), []
    with Mesh(
        agents=agents,
        topology="fully-connected",
        model="random:tiny-llama",
        communicator={"preset": preset, "budget": budget, "min_tokens": 4, "max_kl": 1e6, "cost_gate": False},
    ) as mesh:
        backend = mesh.load()
        for number in range(0, 300, 20):
            texts = (f"Question {number + one}: {'word ' * ((number + one) % 40)}?" for one in range(20))
            results = asyncio.run(mesh.arun_all({"question": text} for text in texts))
            assert backend.communicator.nbytes <= budget
            gc.collect()
            sizes.append(process.memory_info().rss)

    assert max(sizes[4:]) - sizes[3] < 24 * 2**20, [size // 2**20 for size in sizes]
    assert any(call.placed_slots for result in results for call in result.calls) == (preset == "linear")
