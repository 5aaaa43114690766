"""The linear realigner: predicts how a token's KV changes when its context does (docs/method.md, 4).

For each layer and kv head a ridge regression maps the base KV of a token, and where it stands in its block, to the
offset of its KV in the consumer's context, both position-free:

    x = [k_b; v_b; 1; 1/(1+t); exp(-t/8); exp(-t/32)]        y = [k* - k_b; v* - v_b]

Only sufficient statistics are kept, so their size depends on the model alone. How strongly to regularise and how far to
trust the prediction is decided by *prequential* error: every observation is predicted before it is added, with each of
a few ridge strengths; for each layer, head, and keys and values apart, the strength and the shrinkage (0 to 1) that
would have done best so far are taken. A realigner that does not help shrinks to no offset at all. What is applied keeps
the directions in which its predictions vary most (``linearmap.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch

from agentmesh.kv.arena import KVShape
from agentmesh.kv.values import KV, KVSource
from agentmesh.sharing.linearmap import POSITION_FEATURES, LinearMap, Realigned, position_features
from agentmesh.sharing.realigner import Realigner

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
TRIAL_SUMS = ("cross", "square", "energy", "scale")
SAMPLED_LAYERS = slice(1, None, 4)
"""Layers by which ``moves`` goes: enough to know the tokens that move farthest, at a quarter of the work."""

MEMORY = 0.9
"""Share of the prequential sums that is kept at each observation: early predictions were made from little."""


def features(base: KV, numbers: Sequence[int]) -> torch.Tensor:
    """``x`` of every token, fp32 ``[L·H, T, 2D + 4]``."""
    keys = base.keys.flatten(0, 1).float()
    values = base.values.flatten(0, 1).float()
    places = position_features(numbers, keys.device).expand(len(keys), -1, -1)
    return torch.cat([keys, values, places], dim=2)


def robust_weights(offsets: torch.Tensor) -> torch.Tensor:
    """Weights ``[L·H, T]`` of tokens with offsets ``[L·H, T, 2D]``: small where an offset is large for its head.

    A few tokens (line breaks, sentence ends) have offsets many times larger than all others; unweighted, the
    regression and its prequential error would be about them alone (docs/figures.md).
    """
    parts = offsets.view(*offsets.shape[:2], 2, -1).square().sum(dim=3)
    relative = (parts / parts.mean(dim=1, keepdim=True).clamp_min(1e-12)).mean(dim=2)
    weights = 1 / (relative + relative.median(dim=1, keepdim=True).values + 1e-6)
    return weights / weights.mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Trial:
    """Prequential sums for each ridge strength ``G``: how predictions compared with what then was seen.

    Args:
        cross: Σ ŷ·y, ``[G, L·H, 2]``; the last dim is keys and values.
        square: Σ ŷ·ŷ, ``[G, L·H, 2]``.
        energy: Σ y·y, ``[L·H, 2]``.
        scale: Σ of the true keys' and values' squares, ``[L·H, 2]``.
    """

    cross: torch.Tensor
    square: torch.Tensor
    energy: torch.Tensor
    scale: torch.Tensor

    def fading(self, newer: Trial) -> Trial:
        """These sums, faded, and newer ones."""
        return Trial(
            MEMORY * self.cross + newer.cross,
            MEMORY * self.square + newer.square,
            MEMORY * self.energy + newer.energy,
            MEMORY * self.scale + newer.scale,
        )

    @cached_property
    def shrinkage(self) -> torch.Tensor:
        """The best factor on the prediction, ``[G, L·H, 2]``, between 0 and 1."""
        return torch.where(self.square > 0, self.cross / self.square.clamp_min(1e-30), 0.0).clamp(0.0, 1.0)

    @cached_property
    def errors(self) -> torch.Tensor:
        """Squared error at the best shrinkage, ``[G, L·H, 2]``; never above ``energy``."""
        s = self.shrinkage
        return self.energy - 2 * s * self.cross + s * s * self.square


@dataclass(frozen=True)
class LinearFinding:
    """What one observation adds, and all that is needed to judge a prediction of it.

    Args:
        gram: Σ x xᵀ, fp32 ``[L·H, F, F]``.
        cross: Σ x yᵀ, fp32 ``[L·H, F, 2D]``.
        energy: Σ y·y, ``[L·H, 2]``.
        scale: Σ of the true keys' and values' squares, ``[L·H, 2]``.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor
    scale: torch.Tensor

    def trial(self, solutions: Sequence[torch.Tensor]) -> Trial:
        """How solutions ``[L·H, F, 2D]`` would have predicted it: ŷ = xᵀW, so Σ ŷ·y and Σ ŷ·ŷ follow from the sums."""
        return Trial(
            torch.stack([_by_part(solution * self.cross) for solution in solutions]),
            torch.stack([_by_part(solution * (self.gram @ solution)) for solution in solutions]),
            self.energy,
            self.scale,
        )


@final
@dataclass(frozen=True)
class Linear(Realigner[LinearFinding]):
    """What one link has learned.

    Args:
        gram: Σ x xᵀ, fp32 ``[L·H, F, F]`` with ``F = 2D + 4``.
        cross: Σ x yᵀ, fp32 ``[L·H, F, 2D]``.
        trial: prequential sums.
        heads: kv heads ``H``; the first ``H`` rows are layer 0, whose KV needs no offset.
        observations: how many were added.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    trial: Trial
    heads: int
    observations: int = 0

    @staticmethod
    def empty(shape: KVShape) -> Linear:
        """Nothing learned yet, for a model's KV."""
        rows, dim = shape.layers * shape.heads, shape.head_dim
        size = 2 * dim + POSITION_FEATURES

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, device=shape.device)

        trial = Trial(zeros(len(RIDGES), rows, 2), zeros(len(RIDGES), rows, 2), zeros(rows, 2), zeros(rows, 2))
        return Linear(zeros(rows, size, size), zeros(rows, size, 2 * dim), trial, shape.heads)

    @property
    def needs_warmup(self) -> bool:
        """A regression needs observations."""
        return True

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all sums, and of the map that they give; of the map alone where the sums are not there."""
        trial = self.trial
        sums = (self.gram, self.cross, trial.cross, trial.square, trial.energy, trial.scale)
        return self._map_bytes + sum(tensor.nbytes for tensor in sums)

    @property
    def _map_bytes(self) -> int:
        if not self.gram.numel():
            return self.map.nbytes if "map" in vars(self) else 0
        rows, _, outer = self.cross.shape
        return LinearMap.bytes_of(rows, outer // 2)

    def outline(self) -> Linear:
        """The prequential sums and the count alone; see ``Realigner.outline``."""
        return replace(self, gram=self.gram.new_empty(0), cross=self.cross.new_empty(0))

    def ready(self) -> Linear:
        """The map, and what ``outline`` has."""
        return self._ready

    @cached_property
    def _ready(self) -> Linear:
        found = self.outline()
        vars(found)["map"] = self.map  # as if it had been worked out there
        return found

    @torch.inference_mode()
    def study(self, base: KV, truth: KV, numbers: Sequence[int]) -> LinearFinding:
        """Sums of one observation; see ``Realigner.study``."""
        x = features(base, numbers)
        true = torch.cat([truth.keys.flatten(0, 1), truth.values.flatten(0, 1)], dim=2).float()
        y = true - torch.cat([base.keys.flatten(0, 1), base.values.flatten(0, 1)], dim=2).float()
        root = robust_weights(y).sqrt()[..., None]
        x, y, true = x * root, y * root, true * root
        return LinearFinding(x.mT @ x, x.mT @ y, _by_part(y * y), _by_part(true * true))

    @torch.inference_mode()
    def learn(self, finding: LinearFinding) -> Linear:
        """These statistics and one more observation, which is predicted first.

        Predicting here and not in ``study`` makes every observation but the very first a trial, also where many runs
        overlap that all began with nothing.
        """
        trial = self.trial.fading(finding.trial(self._solutions())) if self.observations else self.trial
        gram, cross = self.gram + finding.gram, self.cross + finding.cross
        return replace(self, gram=gram, cross=cross, trial=trial, observations=self.observations + 1)

    def pack(self) -> dict[str, torch.Tensor]:
        """All sums."""
        trial = {f"trial.{name}": tensor for name, tensor in vars(self.trial).items() if name in TRIAL_SUMS}
        return {"gram": self.gram, "cross": self.cross, **trial}

    def unpack(self, tensors: Mapping[str, torch.Tensor], observations: int) -> Linear:
        """Sums of the same shapes as these."""
        own = self.pack()
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}")
        found = {name: tensors[name].to(self.gram.device) for name in own}
        trial = Trial(*(found[f"trial.{name}"] for name in TRIAL_SUMS))
        return Linear(found["gram"], found["cross"], trial, self.heads, observations)

    def prepare(self) -> None:
        """Solve the regression, and work out its residual; both are kept."""
        _ = self.map, self.residual

    def realign(self, base: KV, numbers: Sequence[int]) -> KVSource:
        """KV that the map makes when it is placed."""
        return Realigned(base, numbers, self.map)

    @torch.inference_mode()
    def leverage(self, base: KV, numbers: Sequence[int]) -> torch.Tensor:
        """``xᵀ(A + λI)⁻¹x`` of each token, mean over layers and heads; layer 0 has no offset and does not count."""
        rows = features(base, numbers)[self.heads :]
        factor = self._factor(RIDGES[len(RIDGES) // 2])[self.heads :]
        halves: torch.Tensor = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
        return halves.square().sum(dim=1).mean(dim=0)

    @torch.inference_mode()
    def moves(self, base: KV, numbers: Sequence[int]) -> torch.Tensor:
        """Mean over heads and every fourth layer of each token's offset, squared, against the mean of all tokens."""
        sizes = self.map.sizes(base, numbers, SAMPLED_LAYERS).flatten(0, 1)
        return (sizes / sizes.mean(dim=1, keepdim=True).clamp_min(1e-12)).mean(dim=0)

    def _solutions(self) -> list[torch.Tensor]:
        """Ridge solutions ``[L·H, F, 2D]``, one for each strength."""
        return [torch.cholesky_solve(self.cross, self._factor(ridge)) for ridge in RIDGES]

    def _factor(self, ridge: float) -> torch.Tensor:
        """The Cholesky factor of ``A + λI``, ``[L·H, F, F]``, for one strength."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2).mean(dim=1)
        eye = torch.eye(self.gram.shape[1], device=self.gram.device)
        factor: torch.Tensor = torch.linalg.cholesky(self.gram + (ridge * diagonal + 1e-6)[:, None, None] * eye)
        return factor

    @cached_property
    def chosen(self) -> torch.Tensor:
        """The ridge strength of each layer and head, for keys and values: indices ``[L·H, 2]``."""
        return self.trial.errors.argmin(dim=0)

    @cached_property
    def residual(self) -> float:
        """Expected error after realigning, relative to the KV itself: mean over layers, keys and values alike.

        It is that of the whole regression; the directions that the map leaves out hold little of it (docs/figures.md).
        """
        left = self.trial.errors.min(dim=0).values[self.heads :]
        scale = self.trial.scale[self.heads :].clamp_min(1e-30)
        return float((left / scale).mean())

    def regression(self) -> torch.Tensor:
        """The best ridge solution of each layer and head, shrunk, ``[L·H, F, 2D]``; layer 0's is no offset."""
        dim = self.cross.shape[2] // 2
        solutions = torch.stack(self._solutions())  # [G, L·H, F, 2D]
        rows = torch.arange(solutions.shape[1], device=solutions.device)
        parts = []
        for part in (0, 1):
            which = self.chosen[:, part]
            best = solutions[which, rows][:, :, part * dim : (part + 1) * dim]
            parts.append(best * self.trial.shrinkage[which, rows, part][:, None, None])
        offsets = torch.cat(parts, dim=2)
        offsets[: self.heads] = 0.0
        return offsets

    @cached_property
    def map(self) -> LinearMap:
        """The realigner that these statistics give."""
        return LinearMap.of(self.regression(), self.gram)


def _by_part(product: torch.Tensor) -> torch.Tensor:
    """Sums over dim 1, and over keys' and values' dims apart: ``[L·H, N, 2D] → [L·H, 2]``."""
    return product.sum(dim=1).view(len(product), 2, -1).sum(dim=2)
