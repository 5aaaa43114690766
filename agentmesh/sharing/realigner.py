"""The interface of a realigner: what one link has learned, and how it moves KV into a consumer's context.

A realigner is a frozen value, one for each link. What an observation teaches is a *finding* that can be worked out at
once and added later, in the order of the runs. To add a realigner, write one module with one subclass, and enter it in
the table, ``config.presets.RealignerKind``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, final

import torch

from agentmesh.kv.arena import KVShape
from agentmesh.kv.values import KV, KVSource

Finding = TypeVar("Finding")


class Realigner(ABC, Generic[Finding]):
    """What one link has learned; immutable."""

    observations: int

    @property
    @abstractmethod
    def needs_warmup(self) -> bool:
        """Whether it must see observations before it can be used."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it holds."""

    @property
    @abstractmethod
    def residual(self) -> float:
        """Expected squared error of realigned KV, relative to the KV itself; mean over layers, keys and values."""

    @abstractmethod
    def outline(self) -> Realigner[Finding]:
        """What tells how much it has seen and how well it does, without what it has learned; it cannot realign."""

    @abstractmethod
    def ready(self) -> Realigner[Finding]:
        """What realigns, without what it was worked out from; it cannot learn. Always the same object."""

    @abstractmethod
    def study(self, base: KV, truth: KV, numbers: Sequence[int]) -> Finding:
        """What an observation teaches, whatever is known so far.

        Args:
            base: position-free KV of a block as an earlier agent's context made it.
            truth: position-free KV of the same tokens in the consumer's context; exact.
            numbers: of these tokens in their block, ascending.
        """

    @abstractmethod
    def learn(self, finding: Finding) -> Realigner[Finding]:
        """This and one more finding."""

    @abstractmethod
    def pack(self) -> dict[str, torch.Tensor]:
        """Everything learned, by name, to be saved."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], observations: int) -> Realigner[Finding]:
        """A realigner of this kind from what ``pack`` gave.

        Raises:
            KeyError: something is missing.
            ValueError: something has another shape than this model needs.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Work out what ``realign`` needs, if that was not done yet."""

    @abstractmethod
    def leverage(self, base: KV, numbers: Sequence[int]) -> torch.Tensor:
        """How unlike all that it has seen tokens with these numbers are, fp32 ``[T]``."""

    @abstractmethod
    def moves(self, base: KV, numbers: Sequence[int]) -> torch.Tensor:
        """How far it moves tokens with these numbers, squared, against the mean of all of them, fp32 ``[T]``."""

    @abstractmethod
    def realign(self, base: KV, numbers: Sequence[int]) -> KVSource:
        """KV of the tokens with these numbers in a block, as the consumer's context would have made it."""


@final
@dataclass(frozen=True)
class NoOffset(Realigner[None]):
    """``none``: KV is moved to its new position and nothing is added."""

    observations: int = 0

    @classmethod
    def empty(cls, _shape: KVShape) -> NoOffset:
        """It is the same for every model."""
        return cls()

    @property
    def needs_warmup(self) -> bool:
        """There is nothing to learn."""
        return False

    @property
    def nbytes(self) -> int:
        """Nothing."""
        return 0

    @property
    def residual(self) -> float:
        """It makes no prediction."""
        return 0.0

    def outline(self) -> NoOffset:
        """There is nothing else to it."""
        return self

    def ready(self) -> NoOffset:
        """As above."""
        return self

    def study(self, base: KV, truth: KV, numbers: Sequence[int]) -> None:
        """There is nothing to learn."""

    def learn(self, finding: None) -> NoOffset:  # noqa: ARG002  # there is nothing in it
        """One observation more, which a breaker counts."""
        return replace(self, observations=self.observations + 1)

    def pack(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def unpack(self, tensors: Mapping[str, torch.Tensor], observations: int) -> NoOffset:  # noqa: ARG002  # as above
        """The count alone."""
        return NoOffset(observations)

    def prepare(self) -> None:
        """Nothing is needed."""

    def leverage(self, base: KV, numbers: Sequence[int]) -> torch.Tensor:
        """Nothing was learned of any token."""
        return torch.zeros(len(numbers), device=base.keys.device)

    def moves(self, base: KV, numbers: Sequence[int]) -> torch.Tensor:
        """Nothing is added to any token."""
        return torch.zeros(len(numbers), device=base.keys.device)

    def realign(self, base: KV, numbers: Sequence[int]) -> KVSource:  # noqa: ARG002  # nothing depends on it
        """The base itself."""
        return base
