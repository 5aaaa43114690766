"""The model of this process: an engine and a communicator behind the backend interface."""

from __future__ import annotations

from typing import final

from agentmesh.backend import Completion, Listener
from agentmesh.communicator import Plan, Preset, make
from agentmesh.config.mesh import CommunicatorSpec, GenerateSpec, ModelSpec
from agentmesh.engine.composition import Composition
from agentmesh.engine.embedded import Progress
from agentmesh.engine.loading import load
from agentmesh.engine.loop import Engine, FirstTokenReport
from agentmesh.engine.probe import probe
from agentmesh.engine.sampling import Sampling
from agentmesh.engine.tokenizer import HubTokenizer
from agentmesh.kv.arena import Arena
from agentmesh.prompt import Prompt


@final
class LocalBackend:
    """Runs a model on this machine.

    Args:
        model: which one.
        communicator: how its KV is reused.
        progress: told how far fetching and converting are.

    Raises:
        NotFoundError: no such model or preset.
        ModelError: the weights cannot be fetched or read.
    """

    def __init__(self, model: ModelSpec, communicator: CommunicatorSpec, progress: Progress | None = None) -> None:
        loaded = load(model, progress)
        self.engine = Engine(loaded, probe(loaded.model))
        self.communicator: Preset = make(communicator, self.engine.support, loaded.fingerprint)
        self._preset = communicator.preset

    @property
    def name(self) -> str:
        """The model's name."""
        return self.engine.loaded.name

    @property
    def preset(self) -> str:
        """The preset's name."""
        return self._preset

    @property
    def tokenizer(self) -> HubTokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def describe(self) -> dict[str, str]:
        """Name, source, fingerprint, dtype, device and supported reuse."""
        loaded, support = self.engine.loaded, self.engine.support
        return {
            "name": loaded.name,
            "source": loaded.source,
            "fingerprint": loaded.fingerprint,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "reuse": support.level.value,
            "reuse_limit": support.reason,
        }

    async def complete(self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener) -> Completion:
        """Plan, prefill and decode one prompt on the engine's thread.

        Raises:
            RequestTooLongError: the prompt does not fit the model's context.
        """
        source = _Planned(self.communicator, prompt)
        sampling = Sampling(
            generate.max_tokens, generate.temperature, generate.top_p, generate.top_k, generate.stop, seed
        )

        def on_first(report: FirstTokenReport) -> None:
            listener.first(report.ttft_ms, source.decided.rows)

        done = await self.engine.generate(source, len(prompt.tokens), sampling, on_first, listener.text)
        return Completion(
            done.tokens,
            done.text,
            done.finish,
            done.queue_ms,
            done.ttft_ms,
            done.decode_ms,
            source.decided.rows,
            self._preset,
        )

    def close(self) -> None:
        """Stop the engine; what it kept is freed with it."""
        self.engine.close()


class _Planned:
    """A prompt whose plan is made when the engine begins it."""

    def __init__(self, preset: Preset, prompt: Prompt) -> None:
        self._preset = preset
        self._prompt = prompt
        self._plan: Plan | None = None

    @property
    def decided(self) -> Plan:
        """The plan; made by now."""
        assert self._plan is not None, "the engine composes a prompt before it reports on it"
        return self._plan

    def compose(self) -> Composition:
        """Plan the prompt now."""
        self._plan = self._preset.plan(self._prompt)
        return self._plan.composition

    def prefilled(self, arena: Arena | None) -> None:
        """Let the preset keep what later prompts may use."""
        if arena is not None:
            self._preset.observe(self._prompt, arena)
