"""Measurements of the engine. Every figure compares two ways within one run, interleaved, as medians."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from agentmesh.backend import Completion
from agentmesh.bench.baseline import decoding, told
from agentmesh.bench.rig import DENSE
from agentmesh.config.base import Frozen
from agentmesh.config.mesh import GenerateSpec, ModelSpec
from agentmesh.config.presets import CommunicatorSpec
from agentmesh.engine.embedded import Progress
from agentmesh.engine.profile import Profiles
from agentmesh.local import LocalBackend
from agentmesh.prompt import FIXED, Content, ContentKind, Prompt, Segment
from agentmesh.reasons import PlanRow
from agentmesh.results import Profile

DECODING = "decoding"
TEXT = (
    "The harbour town keeps a ledger of every boat that enters. Each line gives the day, the name of the boat, its "
    "captain, the weight of the cargo in tons and the number of crates. At the end of a month the clerk adds up the "
    "columns, compares them with the receipts and writes a short report for the council. "
)


class PrefixFigures(Frozen):
    """TTFT of one prompt with and without its beginning seen before, in milliseconds (medians)."""

    model: str
    dtype: str
    prompt_tokens: int
    seen_tokens: int
    repeats: int
    dense_ms: float
    cold_ms: float
    prefix_ms: float
    speedup: float
    same_tokens: bool


class DecodeFigures(Frozen):
    """Decoding of one sequence, tokens a second (medians).

    ``decode``: the weights that the arena's figure used; ``profile`` of the measured rounds if asked for.
    """

    model: str
    dtype: str
    decode: str
    prompt_tokens: int
    output_tokens: int
    repeats: int
    generate_tokens_per_s: float
    arena_tokens_per_s: float
    ratio: float
    same_tokens: bool
    profile: Profile | None = None


@dataclass(frozen=True)
class Silent:
    """A listener that does nothing."""

    streams = False

    def first(self, ttft_ms: float, rows: tuple[PlanRow, ...]) -> None:
        """Ignore the first token."""

    def text(self, piece: str) -> None:
        """Ignore text."""


def prefix(
    model: ModelSpec, *, prompt: int, seen: int, repeats: int, progress: Progress | None, tick: Callable[[], None]
) -> PrefixFigures:
    """TTFT under ``dense``, and under ``prefix`` cold and with the first ``seen`` tokens of the prompt in the store.

    Args:
        model: which model.
        prompt: length of the prompt in tokens.
        seen: length of its beginning that an earlier prompt shared.
        repeats: measured rounds; one more comes first and is not counted.
        progress: told how far fetching the model is.
        tick: called after each round.
    """
    times: dict[str, list[float]] = {"dense": [], "cold": [], "prefix": []}
    same = True
    with _backends(model, progress) as (dense, shared):
        for number in range(repeats + 1):
            whole = _prompt(dense, seen, prompt - seen, number)
            other = _prompt(dense, seen, prompt - seen, number, changed=True)
            done = {
                "dense": _complete(dense, whole, 8),
                "cold": _complete(shared, other, 8),
                "prefix": _complete(shared, whole, 8),
            }
            same = same and done["dense"].tokens == done["prefix"].tokens
            if number:
                for name, completion in done.items():
                    times[name].append(completion.ttft_ms)
            tick()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return PrefixFigures(
        model=model.name,
        dtype=model.dtype.value,
        prompt_tokens=prompt,
        seen_tokens=seen,
        repeats=repeats,
        dense_ms=medians["dense"],
        cold_ms=medians["cold"],
        prefix_ms=medians["prefix"],
        speedup=medians["dense"] / medians["prefix"],
        same_tokens=same,
    )


def decode(
    model: ModelSpec,
    *,
    prompt: int,
    output: int,
    repeats: int,
    profiles: Profiles | None = None,
    progress: Progress | None,
    tick: Callable[[], None],
) -> DecodeFigures:
    """Decoding speed over an arena against ``model.generate``, one sequence, greedy, the same prompt.

    Args:
        model: which model.
        prompt: length of the prompt in tokens.
        output: tokens to generate.
        repeats: measured rounds; one more comes first and is not counted.
        profiles: where a profile of the measured rounds goes; without it none is taken.
        progress: told how far fetching the model is.
        tick: called after each round.
    """
    ours, theirs, same = [], [], True
    with _backends(model, progress) as (dense, _), ExitStack() as open_:
        for number in range(repeats + 1):
            if number == 1 and profiles is not None:
                open_.enter_context(profiles.of(dense.engine, DECODING))
            text = _prompt(dense, prompt // 2, prompt - prompt // 2, number)
            done = _complete(dense, text, output)
            seconds, tokens = dense.engine.thread.do(partial(_generate, dense, text.tokens, output))
            same = same and tokens[: len(done.tokens)] == done.tokens
            if number and len(done.tokens) > 1:
                ours.append(1e3 * (len(done.tokens) - 1) / done.decode_ms)
                theirs.append((len(tokens) - 1) / seconds)
            tick()
    arena, plain = statistics.median(ours), statistics.median(theirs)
    return DecodeFigures(
        model=model.name,
        dtype=model.dtype.value,
        decode=dense.engine.loaded.decode.value,
        prompt_tokens=prompt,
        output_tokens=output,
        repeats=repeats,
        generate_tokens_per_s=plain,
        arena_tokens_per_s=arena,
        ratio=arena / plain,
        same_tokens=same,
        profile=profiles.taken[DECODING] if profiles else None,
    )


@contextmanager
def _backends(model: ModelSpec, progress: Progress | None) -> Iterator[tuple[LocalBackend, LocalBackend]]:
    """The same model under ``dense`` and ``prefix``."""
    dense = LocalBackend.open(model, DENSE, progress)
    shared = LocalBackend(dense.engine, CommunicatorSpec(preset="prefix"))
    try:
        yield dense, shared
    finally:
        dense.close()
        shared.close()


def _prompt(backend: LocalBackend, lead: int, rest: int, number: int, *, changed: bool = False) -> Prompt:
    """A prompt of fixed text and one input, of exact lengths; ``changed`` inputs differ from the first token on."""
    beginning = _tokens(backend, f"Ledger {number}. ", lead)
    end = _tokens(backend, f"{'Another' if changed else 'One'} question about month {number}. ", rest)
    segments = (
        Segment(FIXED, "", beginning),
        Segment("question", "", end, Content("", ContentKind.INPUT, "question", end)),
    )
    return Prompt(segments, (lead,))


def _tokens(backend: LocalBackend, start: str, count: int) -> tuple[int, ...]:
    text = start + TEXT * (1 + count // 40)
    return tuple(backend.tokenizer.encode(text, control=False)[:count])


def _complete(backend: LocalBackend, prompt: Prompt, output: int) -> Completion:
    return asyncio.run(backend.complete(prompt, GenerateSpec(max_tokens=output), 0, Silent()))


def _generate(backend: LocalBackend, tokens: tuple[int, ...], output: int) -> tuple[float, tuple[int, ...]]:
    """Seconds that ``model.generate`` takes from its first token to its last, and the tokens."""
    loaded = backend.engine.loaded
    ids = torch.tensor([tokens], device=loaded.model.device)

    def run(length: int) -> tuple[float, list[int]]:
        with told(loaded.model, decoding(GenerateSpec(max_tokens=length), loaded)):
            begun = time.perf_counter()
            out = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
            return time.perf_counter() - begun, out[0, len(tokens) :].tolist()

    first, _ = run(1)
    whole, generated = run(output)
    return whole - first, tuple(token for token in generated if token not in loaded.stop_token_ids)
