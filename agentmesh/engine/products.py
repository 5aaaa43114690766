"""Matrix products of few rows on the CPU: all cores at work, or smaller copies of the weights.

What a decoding step costs is reading the weights. On some processors torch multiplies few float32 rows on one core,
which cannot read memory as fast as all of them; the same product cut into one piece a core can. Copies of the weights
(``model.decode``) can be in the order in which a library reads them, which saves it sorting them at every product, or
in int8 or bfloat16, which are a quarter or half to read and make messages approximate.

The model's own code runs as it is; its linear layers look at a switch, which stands on ``OWN`` unless the runner throws
it. So whoever calls the model past the runner gets what transformers does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol, final

import torch
from torch import nn
from torch.nn import functional

from agentmesh.config.base import Choice
from agentmesh.config.mesh import Decode
from agentmesh.errors import UnsupportedModelError

SPLIT_ROWS = 64
"""Rows up to which cutting a product into pieces is faster; see docs/method.md."""

INT8_ROWS = 4
"""Rows up to which int8 copies are faster; see docs/method.md."""

FULL_ROWS = 16
"""Rows that MKL multiplies together; nine to fifteen of them take up to twice as long (see docs/method.md)."""

PACKED_ROWS = FULL_ROWS
"""Rows of a product over packed copies."""

LEAST_PACKED = 5
"""Rows from which packed copies are faster; see docs/method.md."""

PACK_AT_MOST = 2**30
"""Bytes of weights that ``decode: auto`` packs at most."""

TRIALS, WORTH = 5, 0.9
"""How often packing is tried, and what share of the time it may take to be worth its memory."""

LEVELS = 127


class Way(Choice):
    """How linear layers multiply."""

    OWN = "own"
    SPLIT = "split"
    COPY = "copy"


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
        filled = _filled(rows, PACKED_ROWS)
        product: torch.Tensor = torch.ops.mkl._mkl_linear(  # noqa: SLF001  # as above
            filled, self._packed, self._weight, None, PACKED_ROWS
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


def way_of(decode: Decode, rows: int) -> Way:
    """How so many rows are multiplied in a decoding step: over copies, if there are any and they are faster."""
    copy = COPIES.get(decode)
    return Way.COPY if copy is not None and copy.least <= rows <= copy.most else Way.SPLIT


@final
class Switch:
    """Says to all layers of one model how to multiply. Owned by the layers, thrown by the model's runner."""

    def __init__(self, decode: Decode) -> None:
        self.way = Way.OWN
        self._decode = decode

    def computing(self) -> AbstractContextManager[None]:
        """Use the model's own weights for what runs inside, unless it is a decoding step that uses others."""
        return self._thrown(Way.SPLIT if self.way is Way.OWN else self.way)

    def decoding(self, rows: int) -> AbstractContextManager[None]:
        """Use the copies for what runs inside, if there are any and they are faster for so many rows."""
        return self._thrown(way_of(self._decode, rows))

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
        self._few = _gains(weight)

    def copying(self, decode: Decode) -> Product:
        """The same product with a copy of its weights."""
        return Product(self.weight, self.bias, decode)

    def multiply(self, rows: torch.Tensor, way: Way) -> torch.Tensor:
        """Rows ``[R, in]`` times the weights; ``[R, out]``."""
        count = rows.shape[0]
        if way is Way.COPY and self._copy is not None:
            product = self._copy.multiply(rows).to(rows.dtype)
        elif way is not Way.OWN and self._few and count <= SPLIT_ROWS:
            product = self._multiply_few(_filled(rows, _full(count)))[:count]
        else:
            return functional.linear(rows, self.weight, self.bias)
        return product if self.bias is None else product + self.bias

    def _multiply_few(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows times the weights, in as many pieces as there are."""
        if self._cut is None:
            return functional.linear(rows, self.weight)
        pieces = torch.bmm(rows[None].expand(self.pieces, -1, -1), self._cut)
        return pieces.transpose(0, 1).reshape(rows.shape[0], -1)


@final
class QuickLinear(nn.Module):
    """A linear layer that multiplies as a switch says.

    Args:
        inner: the layer.
        switch: says how.
        decode: whether to keep a copy, and which.
    """

    def __init__(self, inner: nn.Linear, switch: Switch, decode: Decode) -> None:
        super().__init__()
        self.inner = inner
        self.switch = switch
        self.product = Product(inner.weight, inner.bias, decode)

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
        flat = rows.reshape(-1, rows.shape[-1])
        return self.product.multiply(flat, self.switch.way).view(*rows.shape[:-1], -1)


def check_copies(model: Any, name: str, decode: Decode) -> None:
    """Refuse copies of weights that cannot be made.

    Raises:
        UnsupportedModelError: copies are asked for, and the model is on another device, has these numbers already or
            no float32 ones to pack, or has no linear layers; or torch was built without MKL.
    """
    if decode not in COPIES:
        return
    if model.device.type != "cpu":
        raise UnsupportedModelError(
            f"`decode: {decode}` is for models on the CPU, {name} is on {model.device}; leave `decode` out there"
        )
    dtypes = {layer.weight.dtype for layer in model.modules() if type(layer) is nn.Linear}
    if not dtypes:
        raise UnsupportedModelError(f"{name} has no linear layers that `decode: {decode}` could copy; leave it out")
    if decode is Decode.BFLOAT16 and torch.bfloat16 in dtypes:
        raise UnsupportedModelError(f"{name} is loaded in bfloat16, `decode: bfloat16` copies nothing; leave it out")
    if decode is Decode.PACKED and dtypes != {torch.float32}:
        raise UnsupportedModelError(f"`decode: packed` packs float32 weights, {name} has others; leave it out")
    if decode is Decode.PACKED and not _has_mkl():
        raise UnsupportedModelError("`decode: packed` needs a torch with MKL, which this one lacks; leave it out")


def resolved(model: Any, decode: Decode) -> Decode:
    """``auto`` as what it means for a model on this machine; both choices multiply to the same numbers."""
    if decode is not Decode.AUTO:
        return decode
    layers = [layer.weight for layer in model.modules() if type(layer) is nn.Linear]
    few = all(_gains(weight) for weight in layers) and sum(weight.nbytes for weight in layers) <= PACK_AT_MOST
    if not layers or not few or not _has_mkl():
        return Decode.SAME
    return Decode.PACKED if _packing_pays(max(layers, key=torch.Tensor.numel)) else Decode.SAME


@torch.inference_mode()
def _packing_pays(weight: torch.Tensor) -> bool:
    """Whether a product of full rows is faster over a packed copy, as a short trial says."""
    rows = torch.zeros(PACKED_ROWS, weight.shape[1])
    products = {
        way: Product(weight, None, decode) for way, decode in ((Way.COPY, Decode.PACKED), (Way.SPLIT, Decode.SAME))
    }
    taken: dict[Way, list[float]] = {way: [] for way in products}
    for _ in range(TRIALS):
        for way, product in products.items():
            begun = time.perf_counter()
            product.multiply(rows, way)
            taken[way].append(time.perf_counter() - begun)
    return min(taken[Way.COPY]) < WORTH * min(taken[Way.SPLIT])


def quicken(model: Any, decode: Decode) -> None:
    """Let a model's linear layers multiply few rows faster, where its runner asks for it.

    Without copies it does nothing where there is nothing to gain: off the CPU, with other numbers than float32 (torch
    uses all cores there), or with one thread.
    """
    found = [
        (parent, child, layer)
        for parent in model.modules()
        for child, layer in parent.named_children()
        if type(layer) is nn.Linear and (decode in COPIES or _pieces(layer.weight) > 1)
    ]
    switch = Switch(decode)
    for parent, child, layer in found:
        setattr(parent, child, QuickLinear(layer, switch, decode))


def switch_of(model: Any) -> Switch | None:
    """The switch of a model that was quickened."""
    return next((layer.switch for layer in model.modules() if isinstance(layer, QuickLinear)), None)


def _pieces(weight: torch.Tensor) -> int:
    """Into how many equal pieces a layer's outputs are cut: one for each thread, or the next fewer that divide them."""
    if not _gains(weight):
        return 1
    return next(count for count in range(torch.get_num_threads(), 0, -1) if weight.shape[0] % count == 0)


def _gains(weight: torch.Tensor) -> bool:
    """Whether products of few rows can be made faster: in float32, on a CPU."""
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.is_contiguous()


def _full(rows: int) -> int:
    """So many rows, filled up where that is faster."""
    beyond = rows % FULL_ROWS
    return rows + FULL_ROWS - beyond if beyond > FULL_ROWS // 2 else rows


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows with zeros behind them, ``[count, in]``."""
    return functional.pad(rows, (0, 0, 0, count - rows.shape[0])) if count > rows.shape[0] else rows


def _has_mkl() -> bool:
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]  # torch's
