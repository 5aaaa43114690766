"""Copies of a layer's weights that decoding steps read instead (``model.decode``): packed, int8, int4, bfloat16."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol, final

import torch
from torch.nn import functional

from agentmesh.config.mesh import Decode

FULL_ROWS = 16
"""Rows that MKL multiplies together; nine to fifteen of them take up to twice as long (see docs/figures.md)."""

PACKED_ROWS = FULL_ROWS
"""Rows of a product over packed copies."""

LEAST_PACKED = 5
"""Rows from which packed copies are faster; see docs/figures.md."""

INT8_ROWS = 4
"""Rows up to which int8 copies are faster; see docs/figures.md."""

LEVELS = 127

INT4_ROWS = 8
"""Rows up to which int4 copies are faster; see docs/figures.md."""

GROUP = 32
"""Weights of one output that share a scale and a middle in int4 copies, as in files quantised to four bits."""

KEPT = 0.01
"""Relative error of weights up to which four bits are enough for them; beyond it there are eight."""


class Copy(Protocol):
    """A copy of one layer's weights ``[out, in]``.

    Attributes:
        least, most: rows from which and up to which it is faster.
        together: rows that it multiplies at once; it wants a multiple of them.
    """

    least: ClassVar[int]
    most: ClassVar[float]
    together: ClassVar[int]

    def __init__(self, weight: torch.Tensor) -> None: ...

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``[R, in]`` times the copy, ``[R, out]``, in the number format of the rows."""


@final
class PackedCopy:
    """float32 weights in MKL's own order for products of ``PACKED_ROWS`` rows."""

    least: ClassVar[int] = LEAST_PACKED
    most: ClassVar[float] = PACKED_ROWS
    together: ClassVar[int] = PACKED_ROWS

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACKED_ROWS)  # noqa: SLF001  # no other name
        self._product = torch.ops.mkl._mkl_linear.default  # noqa: SLF001  # as above

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """As in ``Copy``; no row changes another."""
        product: torch.Tensor = self._product(rows, self._packed, self._weight, None, PACKED_ROWS)
        return product


@final
class Int8Copy:
    """Weights as int8, with one bfloat16 scale for each output."""

    least: ClassVar[int] = 1
    most: ClassVar[float] = INT8_ROWS
    together: ClassVar[int] = 1

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
        return product.to(rows.dtype)


@final
class Int4Copy:
    """Weights in groups of ``GROUP``: four bits each where that keeps them, else eight, as twice four.

    Weights that come from a file quantised to four bits in such groups (``Q4_0``, ``Q4_1``) are kept but for the
    rounding of each group's scale and middle to bfloat16. Rows are bfloat16.
    """

    least: ClassVar[int] = 1
    most: ClassVar[float] = INT4_ROWS
    together: ClassVar[int] = 1

    def __init__(self, weight: torch.Tensor) -> None:
        self._outputs = weight.shape[0]
        weight = functional.pad(weight.float(), (0, 0, 0, -self._outputs % 16))
        groups = weight.view(weight.shape[0], -1, GROUP)
        levels, scales, middles = _quantised(groups, 16)
        kept = (levels * scales + middles - groups).norm() <= KEPT * groups.norm()
        if kept:
            self._planes = [_plane(levels + 8, scales, middles)]
            return
        levels, scales, middles = _quantised(groups, 256)
        high = (levels / 16).floor()
        self._planes = [_plane(high + 8, 16 * scales, middles), _plane(levels - 16 * high, scales, 8 * scales)]

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """As in ``Copy``."""
        halves = rows.to(torch.bfloat16)
        first, *others = [
            torch._weight_int4pack_mm_for_cpu(halves, levels, GROUP, scales)  # noqa: SLF001  # it has no other name
            for levels, scales in self._planes
        ]
        whole: torch.Tensor = sum(others, first.float()) if others else first
        return whole[:, : self._outputs].to(rows.dtype)


@final
class BFloat16Copy:
    """Weights as bfloat16."""

    least: ClassVar[int] = 1
    most: ClassVar[float] = math.inf
    together: ClassVar[int] = 1

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.to(torch.bfloat16)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """As in ``Copy``."""
        return functional.linear(rows.to(torch.bfloat16), self._weight).to(rows.dtype)


COPIES: dict[Decode, type[Copy]] = {
    Decode.PACKED: PackedCopy,
    Decode.INT8: Int8Copy,
    Decode.INT4: Int4Copy,
    Decode.BFLOAT16: BFloat16Copy,
}


def filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows with zeros behind them, ``[count, in]``."""
    return functional.pad(rows, (0, 0, 0, count - rows.shape[0])) if count > rows.shape[0] else rows


def _quantised(groups: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights ``[out, G, GROUP]`` on ``count`` levels: levels around zero, and each group's scale and middle.

    Scales and middles ``[out, G, 1]`` are rounded to bfloat16 first; levels are those nearest with them.
    """
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    scales = ((high - low) / (count - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    middles = (low + scales * (count // 2)).bfloat16().float()
    scales = scales.bfloat16().float()
    return ((groups - middles) / scales).round().clamp(-count // 2, count // 2 - 1), scales, middles


def _plane(levels: torch.Tensor, scales: torch.Tensor, middles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels 0 to 15 in torch's order for products of few rows, and their scales and middles ``[G, out, 2]``."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.flatten(1).int(), 1)  # noqa: SLF001  # as above
    return packed, torch.cat((scales, middles), dim=-1).transpose(0, 1).contiguous().bfloat16()
