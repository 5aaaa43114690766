"""What throughput is compared with: it must do the same work."""

from __future__ import annotations

import asyncio

from agentmesh.backend import Completion
from agentmesh.bench.baseline import GenerateBackend
from agentmesh.bench.speed import Silent
from agentmesh.config.mesh import GenerateSpec, ModelSpec
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.local import LocalBackend
from agentmesh.prompt import FIXED, Prompt, Segment


def test_the_baseline_decodes_as_the_engine_does() -> None:
    async def said(backend: LocalBackend | GenerateBackend, spec: GenerateSpec, seed: int = 0) -> Completion:
        tokens = tuple(range(40, 90))
        prompt = Prompt((Segment(FIXED, "", tokens),), ())
        return await backend.complete(prompt, spec, seed, Silent())

    ours = LocalBackend.open(ModelSpec(name="random:tiny-llama"), CommunicatorSpec(preset="dense"))
    with ours.engine as engine:
        theirs = GenerateBackend(engine)
        free = GenerateSpec(max_tokens=24)
        greedy = asyncio.run(said(ours, free))
        words = (engine.tokenizer.decode([token]) for token in greedy.tokens[6:])
        stop = next(word for word in words if word.isascii() and word.isalnum())
        stopped = free.model_copy(update={"stop": (stop,)})
        warm = free.model_copy(update={"temperature": 1.5})

        assert asyncio.run(said(theirs, free)).tokens == greedy.tokens
        engine.loaded.model.generation_config.repetition_penalty = 1.9
        assert asyncio.run(said(theirs, free)).tokens == greedy.tokens, "the model's own settings are not the mesh's"
        assert engine.loaded.model.generation_config.repetition_penalty == 1.9
        assert asyncio.run(said(theirs, stopped)).tokens == asyncio.run(said(ours, stopped)).tokens
        assert len(asyncio.run(said(theirs, stopped)).tokens) < len(greedy.tokens)
        drawn = [asyncio.run(said(theirs, warm, seed)).tokens for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        specials = engine.loaded.special_token_ids - engine.loaded.stop_token_ids
        assert specials.isdisjoint(token for tokens in drawn for token in tokens)
