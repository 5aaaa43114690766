"""Matrix products of few rows on the CPU: all cores at work, full groups of rows, or copies of the weights.

What a decoding step costs is reading the weights. On some processors torch multiplies few float32 rows on one core,
which cannot read memory as fast as all of them; the same product cut into one piece a core can. Copies of the weights
(``engine/copies.py``) can be in the order in which a library reads them, or smaller.

The model's own code runs as it is; its linear layers look at a switch, which stands on ``OWN`` unless the runner throws
it. So whoever calls the model past the runner gets what transformers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional

from agentmesh.config.base import Choice
from agentmesh.config.mesh import Decode
from agentmesh.engine.copies import COPIES, FULL_ROWS, filled

SPLIT_ROWS = 64
"""Rows up to which cutting a product into pieces is faster; see docs/figures.md."""


class Way(Choice):
    """How linear layers multiply."""

    OWN = "own"
    SPLIT = "split"
    COPY = "copy"


@dataclass(frozen=True)
class Tuning:
    """How a model's decoding steps multiply on this machine; all but smaller copies give the same numbers.

    Args:
        decode: which copies there are.
        whole_below: products of fewer rows are not cut.
    """

    decode: Decode = Decode.SAME
    whole_below: int = 1

    def way(self, rows: int) -> Way:
        """How so many rows are multiplied: over copies, if there are any and they are faster; else cut, or whole."""
        copy = COPIES.get(self.decode)
        if copy is not None and copy.least <= rows <= copy.most:
            return Way.COPY
        return Way.SPLIT if rows >= self.whole_below else Way.OWN


@final
class Switch:
    """Says to all layers of one model how to multiply. Owned by the layers, thrown by the model's runner."""

    def __init__(self, tuning: Tuning) -> None:
        self.way = Way.OWN
        self.tuning = tuning

    def computing(self) -> AbstractContextManager[None]:
        """Use the model's own weights for what runs inside, unless it is a decoding step that uses others."""
        return self._thrown(Way.SPLIT if self.way is Way.OWN else self.way)

    def decoding(self, rows: int) -> AbstractContextManager[None]:
        """Use the copies for what runs inside, if there are any and they are faster for so many rows."""
        return self._thrown(self.tuning.way(rows))

    @contextmanager
    def _thrown(self, way: Way) -> Iterator[None]:
        before, self.way = self.way, way
        try:
            yield
        finally:
            self.way = before


@final
class Product:
    """A product with weights ``[out, in]``: as torch multiplies, cut into pieces, or over a copy.

    Args:
        weight: ``[out, in]``; kept as it is.
        bias: ``[out]``, or ``None``.
        decode: whether to keep a copy, and which.

    Attributes:
        pieces: into how many a product of few rows is cut.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, decode: Decode = Decode.SAME) -> None:
        self.weight = weight
        self.bias = bias
        self.pieces = _pieces(weight)
        self._copy = COPIES[decode](weight) if decode in COPIES else None
        self._cut = weight.view(self.pieces, -1, weight.shape[1]).mT if self.pieces > 1 else None
        self._cut_bias = None if bias is None else bias.view(self.pieces, 1, -1)
        self._few = gains(weight)

    def copying(self, decode: Decode) -> Product:
        """The same product with a copy of its weights."""
        return Product(self.weight, self.bias, decode)

    def full(self, rows: int, way: Way) -> int:
        """So many rows, filled up where that is faster."""
        if way is Way.COPY and self._copy is not None:
            return rows + -rows % self._copy.together
        return _full(rows) if way is not Way.OWN and self._few and rows <= SPLIT_ROWS else rows

    def multiply(self, rows: torch.Tensor, way: Way) -> torch.Tensor:
        """Rows ``[R, in]`` times the weights; ``[R, out]``."""
        count = rows.shape[0]
        full = self.full(count, way)
        product = joined(self.multiply_full(filled(rows, full), way))
        return product if full == count else product[:count]

    def multiply_full(self, rows: torch.Tensor, way: Way) -> torch.Tensor:
        """As ``multiply``, for so many rows as ``full`` says; ``[R, out]``, or ``[P, R, out / P]`` in pieces."""
        if way is Way.COPY and self._copy is not None:
            product = self._copy.multiply(rows)
        elif way is not Way.OWN and self._cut is not None and rows.shape[0] <= SPLIT_ROWS:
            product = torch.bmm(rows.expand(self.pieces, -1, -1), self._cut)
            return product if self._cut_bias is None else product + self._cut_bias
        else:
            return functional.linear(rows, self.weight, self.bias)
        return product if self.bias is None else product + self.bias


def joined(product: torch.Tensor) -> torch.Tensor:
    """A product ``[R, out]`` that may lie in pieces ``[P, R, out / P]``, in one."""
    return product if product.dim() == 2 else product.transpose(0, 1).reshape(product.shape[1], -1)


def halved(product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of a product's outputs, in pieces if it is in an even number of them."""
    if product.dim() == 3 and len(product) % 2:
        product = joined(product)
    first, second = product.chunk(2, dim=1 if product.dim() == 2 else 0)
    return first, second


@final
class QuickLinear(nn.Module):
    """A linear layer that multiplies as a switch says.

    Args:
        inner: the layer.
        switch: says how, and whether to keep a copy.
    """

    def __init__(self, inner: nn.Linear, switch: Switch) -> None:
        super().__init__()
        self.inner = inner
        self.switch = switch
        self.product = Product(inner.weight, inner.bias, switch.tuning.decode)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weights."""
        return self.inner.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's own bias."""
        found: torch.Tensor | None = self.inner.bias
        return found

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows ``[…, in]``; ``[…, out]``."""
        if self.switch.way is Way.OWN:
            own: torch.Tensor = self.inner(rows)
            return own
        flat = rows.reshape(-1, rows.shape[-1])
        return self.product.multiply(flat, self.switch.way).view(*rows.shape[:-1], -1)


def quicken(model: Any, tuning: Tuning) -> None:
    """Let a model's linear layers multiply few rows faster, where its runner asks for it.

    Without copies it does nothing where there is nothing to gain: off the CPU, with other numbers than float32 (torch
    uses all cores there), or with one thread.
    """
    found = [
        (parent, child, layer)
        for parent in model.modules()
        for child, layer in parent.named_children()
        if type(layer) is nn.Linear and (tuning.decode in COPIES or _pieces(layer.weight) > 1)
    ]
    switch = Switch(tuning)
    for parent, child, layer in found:
        setattr(parent, child, QuickLinear(layer, switch))


def switch_of(model: Any) -> Switch | None:
    """The switch of a model that was quickened."""
    return next((layer.switch for layer in model.modules() if isinstance(layer, QuickLinear)), None)


def _pieces(weight: torch.Tensor) -> int:
    """Into how many equal pieces a layer's outputs are cut: one for each thread, or the next fewer that divide them."""
    if not gains(weight):
        return 1
    return next(count for count in range(torch.get_num_threads(), 0, -1) if weight.shape[0] % count == 0)


def gains(weight: torch.Tensor) -> bool:
    """Whether products of few rows can be made faster: in float32, on a CPU."""
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.is_contiguous()


def _full(rows: int) -> int:
    """So many rows, filled up where that is faster."""
    beyond = rows % FULL_ROWS
    return rows + FULL_ROWS - beyond if beyond > FULL_ROWS // 2 else rows
