"""Copies of a layer's weights that decoding steps read instead (``model.decode``): packed, int8, bfloat16."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol, final

import torch
from torch.nn import functional

from agentmesh.config.mesh import Decode

FULL_ROWS = 16
"""Rows that MKL multiplies together; nine to fifteen of them take up to twice as long (see docs/method.md)."""

PACKED_ROWS = FULL_ROWS
"""Rows of a product over packed copies."""

LEAST_PACKED = 5
"""Rows from which packed copies are faster; see docs/method.md."""

INT8_ROWS = 4
"""Rows up to which int8 copies are faster; see docs/method.md."""

LEVELS = 127


class Copy(Protocol):
    """A copy of one layer's weights ``[out, in]``, faster for at least ``least`` and at most ``most`` rows."""

    least: ClassVar[int]
    most: ClassVar[float]

    def __init__(self, weight: torch.Tensor) -> None: ...

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``[R, in]`` times the copy, ``[R, out]``, in the copy's own number format."""


@final
class PackedCopy:
    """float32 weights in MKL's own order for products of ``PACKED_ROWS`` rows."""

    least: ClassVar[int] = LEAST_PACKED
    most: ClassVar[float] = PACKED_ROWS

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACKED_ROWS)  # noqa: SLF001  # no other name

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """As in ``Copy``; what is filled up changes no other row."""
        product: torch.Tensor = torch.ops.mkl._mkl_linear(  # noqa: SLF001  # as above
            filled(rows, PACKED_ROWS), self._packed, self._weight, None, PACKED_ROWS
        )
        return product[: rows.shape[0]]


@final
class Int8Copy:
    """Weights as int8, with one bfloat16 scale for each output."""

    least: ClassVar[int] = 1
    most: ClassVar[float] = INT8_ROWS

    def __init__(self, weight: torch.Tensor) -> None:
        weight = weight.float()
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
        self._weight = (weight / scales[:, None]).round().to(torch.int8)
        self._scales = scales.to(torch.bfloat16)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """As in ``Copy``."""
        product: torch.Tensor = torch._weight_int8pack_mm(  # noqa: SLF001  # it has no other name
            rows.to(torch.bfloat16), self._weight, self._scales
        )
        return product


@final
class BFloat16Copy:
    """Weights as bfloat16."""

    least: ClassVar[int] = 1
    most: ClassVar[float] = math.inf

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.to(torch.bfloat16)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """As in ``Copy``."""
        return functional.linear(rows.to(torch.bfloat16), self._weight)


COPIES: dict[Decode, type[Copy]] = {
    Decode.PACKED: PackedCopy,
    Decode.INT8: Int8Copy,
    Decode.BFLOAT16: BFloat16Copy,
}


def filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows with zeros behind them, ``[count, in]``."""
    return functional.pad(rows, (0, 0, 0, count - rows.shape[0])) if count > rows.shape[0] else rows
