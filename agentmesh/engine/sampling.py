"""How one sequence chooses its next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from agentmesh.errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """Decoding settings of one request.

    Args:
        max_tokens: at most so many tokens.
        temperature: 0 is greedy.
        top_p: smallest set of tokens with this probability.
        top_k: at most so many candidates.
        stop: texts that end the message after the token which completes one.
        seed: of this sequence's own random numbers.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0


class Sampler:
    """Picks tokens for one sequence; its random numbers depend on nothing but the seed.

    Args:
        sampling: how to decode.
        suppressed: ids that are never picked, ``[S]``.
    """

    def __init__(self, sampling: Sampling, suppressed: torch.Tensor) -> None:
        self._suppressed = suppressed
        self._never = frozenset(suppressed.tolist())
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        self._greedy = sampling.temperature == 0
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k is not None:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def pick(self, logits: torch.Tensor) -> int:
        """The next token id for logits ``[V]``; special tokens other than stops are never picked.

        Raises:
            ModelError: the logits are no numbers.
        """
        if self._greedy and (likeliest := _likeliest(logits)) not in self._never:
            return likeliest
        scores = logits.index_fill(0, self._suppressed, float("-inf"))
        if self._greedy:
            return _likeliest(scores)
        scores = scores[None].float()
        warped = self._warpers(None, scores - scores.max())  # so that no temperature, however low, makes them infinite
        odds = warped.softmax(-1).cpu()
        if not odds.isfinite().all():
            raise _no_numbers()
        return int(torch.multinomial(odds, 1, generator=self._generator))


def _likeliest(logits: torch.Tensor) -> int:
    """The first of the largest logits ``[V]``. torch looks at one number after the other on a CPU, numpy at many."""
    if logits.device.type == "cpu" and logits.dtype is torch.float32:
        row = logits.numpy()
        index = int(row.argmax())
        largest = float(row[index])
    else:
        largest, index = float((found := logits.max(dim=0)).values), int(found.indices)
    if math.isnan(largest):  # what is no number counts as the largest
        raise _no_numbers()
    return index


def _no_numbers() -> ModelError:
    return ModelError(
        "the model's logits for the next token are not numbers (NaN): its weights are damaged, or they "
        "overflow in this dtype; try model.dtype: float32, and `agentmesh doctor`"
    )
