"""int8 weights for decoding few sequences: reading the weights is then what a step costs, and these are a quarter.

Every linear layer keeps its own weights, and prefills use them; a step that decodes at most ``ROWS`` sequences uses
int8 copies, one scale for each output. So prompts stay as they are, and messages are approximate (``model.decode``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn

from agentmesh.errors import UnsupportedModelError

ROWS = 4
"""Sequences in a step up to which int8 copies are faster; see docs/method.md."""

LEVELS = 127


@final
class Switch:
    """Says to all layers of one model which weights to use. Owned by the model's layers, thrown by its runner."""

    def __init__(self) -> None:
        self.on = False

    @contextmanager
    def decoding(self, rows: int) -> Iterator[None]:
        """Use the int8 copies for what runs inside, if that has few rows."""
        self.on = rows <= ROWS
        try:
            yield
        finally:
            self.on = False


@final
class TwoWayLinear(nn.Module):
    """A linear layer with an int8 copy of its weights ``[out, in]``.

    Args:
        inner: the layer.
        switch: says which weights to use.
    """

    def __init__(self, inner: nn.Linear, switch: Switch) -> None:
        super().__init__()
        self.copy: torch.Tensor
        self.scales: torch.Tensor
        self.inner = inner
        self.switch = switch
        weight = inner.weight.float()
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
        self.register_buffer("copy", (weight / scales[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scales", scales.to(torch.bfloat16), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weights."""
        return self.inner.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows ``[…, in]`` by the weights that the switch says; ``[…, out]``."""
        if not self.switch.on:
            found: torch.Tensor = self.inner(rows)
            return found
        flat = rows.reshape(-1, rows.shape[-1]).to(torch.bfloat16)
        product = torch._weight_int8pack_mm(flat, self.copy, self.scales)  # noqa: SLF001  # torch's kernel has no other name
        product = product.to(rows.dtype).view(*rows.shape[:-1], -1)
        bias: torch.Tensor | None = self.inner.bias
        return product if bias is None else product + bias


def quantise(model: Any, name: str) -> None:
    """Give every linear layer of a model on the CPU its int8 copy.

    Raises:
        UnsupportedModelError: the model is on another device, or has no linear layers.
    """
    if model.device.type != "cpu":
        raise UnsupportedModelError(
            f"`decode: int8` is for models on the CPU, {name} is on {model.device}; leave `decode` out there"
        )
    switch = Switch()
    found = [
        (parent, child, layer)
        for parent in model.modules()
        for child, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]
    if not found:
        raise UnsupportedModelError(f"{name} has no linear layers that `decode: int8` could copy; leave it out")
    for parent, child, layer in found:
        setattr(parent, child, TwoWayLinear(layer, switch))


def switch_of(model: Any) -> Switch | None:
    """The switch of a model that has int8 copies."""
    return next((layer.switch for layer in model.modules() if isinstance(layer, TwoWayLinear)), None)
