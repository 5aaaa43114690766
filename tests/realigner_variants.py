"""What the linear realigner owes to its parts: KL of simpler ones and of other choices of computed tokens.

    python tests/realigner_variants.py math-fully-connected --data questions.jsonl --warmup 20 --limit 20

Every variant sees the same calls, learns the same, and differs in one thing: the map that it makes of what it has
learned, or which tokens of a block are computed all the same. ``rank 16`` is the map of ``linear``; maps that differ
otherwise have full rank. Unless a variant or ``--own-picks`` says otherwise the first 16 tokens and up to 8 line
breaks of a block are computed, and none are picked, which would hide how good a map is. With all variants a question
takes minutes on one core; ``--variants "full rank;rank 8"`` names some.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch

from agentmesh import communicator
from agentmesh.bench import fidelity
from agentmesh.bench.data import dense_runs, read_questions
from agentmesh.bench.rig import DENSE, Recording
from agentmesh.blueprint import draft
from agentmesh.communicator import Preset, make
from agentmesh.config.load import load_mesh
from agentmesh.config.presets import CommunicatorSpec, specs
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.engine.loop import Engine, at_once
from agentmesh.engine.probe import Support, probe
from agentmesh.kv.arena import KVShape
from agentmesh.kv.values import KV
from agentmesh.local import LocalBackend
from agentmesh.mesh import Mesh
from agentmesh.sharing.linear import RIDGES, SAMPLED_LAYERS, Linear
from agentmesh.sharing.linearmap import RANK, LinearMap

Change = Callable[[Linear, torch.Tensor], torch.Tensor]
"""Makes another offset map ``[L·H, F, 2D]`` of a realigner's own."""

Maker = Callable[[KVShape], Linear]
"""Makes a variant that has learned nothing."""


@dataclass(frozen=True)
class Changed(Linear):
    """``linear`` with another map."""

    change: Change = lambda _linear, offsets: offsets
    rank: int = RANK

    @cached_property
    def map(self) -> LinearMap:
        """The map of what was learned, changed."""
        offsets = self.change(self, self.regression())
        offsets[: self.heads] = 0.0
        return LinearMap.of(offsets, self.gram, self.rank)


class InAllLayers(Linear):
    """``linear`` whose picks by offset go by all layers."""

    def moves(self, base: KV, numbers: Sequence[int]) -> torch.Tensor:
        """The predicted offset of each token, squared, against the mean of the others'; mean over layers and heads."""
        sizes = self.map.sizes(base, numbers, slice(1, None)).flatten(0, 1)
        return (sizes / sizes.mean(dim=1, keepdim=True).clamp_min(1e-12)).mean(dim=0)


class BetweenBlocks(Linear):
    """``linear`` whose picks by offset go to blocks by how far they move as a whole, and in a block as ever."""

    def moves(self, base: KV, numbers: Sequence[int]) -> torch.Tensor:
        """What ``linear`` says of each token, times the block's mean offset against its KV."""
        some = base.fetch(SAMPLED_LAYERS)
        energy = (some.keys.square() + some.values.square()).sum(dim=3).mean(dim=2)
        sizes = self.map.sizes(base, numbers, SAMPLED_LAYERS).mean(dim=2)
        return super().moves(base, numbers) * (sizes / energy).mean()


def changed(change: Change, rank: int, shape: KVShape) -> Changed:
    """A variant that has learned nothing."""
    empty = Linear.empty(shape)
    return Changed(empty.gram, empty.cross, empty.trial, empty.heads, change=change, rank=rank)


def scored(kind: type[Linear], shape: KVShape) -> Linear:
    """A variant that has learned nothing."""
    empty = Linear.empty(shape)
    return kind(empty.gram, empty.cross, empty.trial, empty.heads)


def means(linear: Linear, offsets: torch.Tensor) -> torch.Tensor:
    """An offset that depends on a token's place alone: the regression on the place features."""
    low = offsets.shape[2]
    gram, cross = linear.gram[:, low:, low:], linear.cross[:, low:]
    ridge = 0.01 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(gram.shape[1])
    found = torch.zeros_like(offsets)
    found[:, low:] = torch.linalg.solve(gram + ridge, cross)
    return found


def pooled(groups: int, linear: Linear, offsets: torch.Tensor) -> torch.Tensor:
    """One regression for all rows of a group: ``L`` groups share it across a layer's heads, one across all layers."""
    rows = offsets.shape[0] - linear.heads
    gram = linear.gram[linear.heads :].view(groups, rows // groups, *linear.gram.shape[1:]).sum(dim=1)
    cross = linear.cross[linear.heads :].view(groups, rows // groups, *linear.cross.shape[1:]).sum(dim=1)
    diagonal = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    ridge = RIDGES[0] * diagonal[:, None, None] * torch.eye(gram.shape[1])
    found = torch.linalg.solve(gram + ridge, cross).repeat_interleave(rows // groups, dim=0)
    return torch.cat([torch.zeros_like(offsets[: linear.heads]), found])


def only(part: slice, _linear: Linear, offsets: torch.Tensor) -> torch.Tensor:
    """Offsets of keys or of values alone."""
    found = torch.zeros_like(offsets)
    found[:, :, part] = offsets[:, :, part]
    return found


def in_layers(layers: slice, linear: Linear, offsets: torch.Tensor) -> torch.Tensor:
    """Offsets in some layers alone."""
    found = torch.zeros_like(offsets).view(-1, linear.heads, *offsets.shape[1:])
    found[layers] = offsets.view(found.shape)[layers]
    return found.view(offsets.shape)


def as_it_is(_linear: Linear, offsets: torch.Tensor) -> torch.Tensor:
    """The regression itself."""
    return offsets


def maps(shape: KVShape) -> dict[str, Maker]:
    """The variants of the map: those of some ranks, and of full rank changed ones."""
    dim, half, rest = shape.head_dim, shape.layers // 2, shape.layers - 1
    changes: dict[str, Change] = {
        "full rank": as_it_is,
        "place alone": means,
        "shared by heads": partial(pooled, rest),
        "shared by layers": partial(pooled, 1),
        "keys alone": partial(only, slice(0, dim)),
        "values alone": partial(only, slice(dim, 2 * dim)),
        "lower half": partial(in_layers, slice(0, half)),
        "upper half": partial(in_layers, slice(half, None)),
    }
    ranks = {f"rank {rank}": partial(changed, as_it_is, rank) for rank in (1, 4, 8, 16, 24, 32)}
    return ranks | {name: partial(changed, change, dim) for name, change in changes.items()}


PLAIN: dict[str, Any] = {"first": 16, "breaks": 8, "most_first": 0.2, "most_breaks": 0.1, "ratio": 0.0}
SCORES: dict[str, type[Linear]] = {
    ", all layers": InAllLayers,
    ", between blocks": BetweenBlocks,
}
OWN: dict[str, Any] = {"ratio": 0.08, "by": "offset", "first": 8, "most_picked": 8}
PICKED: dict[str, dict[str, Any]] = {
    **{
        f"{share} % by {by}": {"ratio": share / 100, "by": by}
        for share in (6, 15)
        for by in ("leverage", "offset", "attention")
    },
    "6 % by offset, all layers": {"ratio": 0.06, "by": "offset"},
    "20 % by attention": {"ratio": 0.2, "by": "attention"},
    **{f"as linear{name}": OWN for name in ("", ", between blocks")},
    "12 % by offset, no line breaks": {"ratio": 0.12, "by": "offset", "breaks": 0},
    "6 % by offset, no line breaks": {"ratio": 0.06, "by": "offset", "breaks": 0},
    "6 % by offset, first 8": {"ratio": 0.06, "by": "offset", "first": 8},
    **{
        f"{share} % by offset, first {first}, at most {most}": {
            "ratio": share / 100,
            "by": "offset",
            "first": first,
            "most_picked": most - first,
        }
        for share, first, most in ((8, 8, 16), (12, 4, 16), (16, 0, 16), (12, 8, 20), (16, 8, 24))
    },
    "24 % by offset alone, at most 24": {"ratio": 0.24, "by": "offset", "first": 0, "breaks": 0, "most_picked": 24},
}
"""Variants of what is computed all the same, besides the first tokens and line breaks."""


def main() -> None:
    """Measure what was asked for, and print a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--variants", default="", help="names, separated by semicolons; all by default")
    parser.add_argument("--own-picks", action="store_true", help="maps compute the tokens that linear itself computes")
    asked = parser.parse_args()

    mesh = load_mesh(asked.config)
    blueprint = draft(mesh)
    loaded = load(blueprint.local_model(), None)
    support = probe(loaded.model, loaded.step)
    makers = maps(support.runner.shape)
    for name in PICKED:
        kind = next((kind for ending, kind in SCORES.items() if name.endswith(ending)), Linear)
        makers[name] = partial(scored, kind)
    names = [name for name in makers if not asked.variants or name in asked.variants.split(";")]
    budget = int(psutil.virtual_memory().available * 0.6) // (2 * len(names))
    linear = specs(blueprint.communicator, ["linear"])["linear"].model_copy(update={"budget": budget})
    chosen = {}
    for name in names:
        given = linear.model_dump(exclude_unset=True) | {"budget": budget, "cost_gate": False}  # nothing is timed here
        if name in PICKED or not asked.own_picks:
            given["recompute"] = PLAIN | PICKED.get(name, {})
        chosen[name] = CommunicatorSpec.model_validate(given)
    of = {id(spec): makers[name] for name, spec in chosen.items()}

    def made(spec: CommunicatorSpec, support: Support, loaded: LoadedModel) -> Preset:
        with patch.object(communicator, "unlearned", lambda _kind: of[id(spec)]):
            return make(spec, support, loaded)

    backend = LocalBackend(Engine(loaded, support, at_once(deterministic=blueprint.run.deterministic)), DENSE)
    recording = Recording(backend)
    questions = read_questions(asked.data, asked.warmup + asked.limit)[: asked.warmup + asked.limit]
    with Mesh.from_loaded(mesh, model=recording) as open_mesh, patch.object(fidelity, "make", made):
        runs = dense_runs(open_mesh, recording, questions, {}, None)
        done = count(1)

        def tick() -> None:
            print(f"\rquestion {next(done)} of {len(questions)}", end="", file=sys.stderr, flush=True)

        found = fidelity.measure(backend, runs, chosen, asked.warmup, corpus=False, tick=tick)
    for name, figures in found.presets.items():
        low, high = figures.ci95
        share = figures.placed_tokens / max(figures.slot_tokens, 1)
        print(
            f"{name:30} kl {figures.kl_mean:.4f} [{low:.4f}, {high:.4f}] chained {figures.kl_chained:.4f} "
            f"placed {share:.0%} shared {figures.calls_shared}/{figures.calls_shareable}",
            flush=True,
        )


if __name__ == "__main__":
    main()
