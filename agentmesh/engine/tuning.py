"""How a model's products of few rows are multiplied on this machine: what was asked for, and what short trials say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from agentmesh.config.mesh import Decode
from agentmesh.engine.copies import COPIES, FULL_ROWS, GROUP
from agentmesh.engine.products import Product, Tuning, Way, gains
from agentmesh.errors import UnsupportedModelError

PACK_AT_MOST = 2**30
"""Bytes of weights that ``decode: auto`` packs at most."""

ALWAYS_CUT = 4
"""Rows from which products are cut on every machine: whole, their last bits could be others."""

TRIED, ROUNDS, WORTH = 12, 5, 0.9
"""Of a trial: how many weights, so that they come from memory, how often, and what share of the time is worth it."""

Trial = tuple[Sequence[Product], Way]
"""Products, and how they are multiplied."""


def check_copies(model: Any, name: str, decode: Decode) -> None:
    """Refuse copies of weights that cannot be made.

    Raises:
        UnsupportedModelError: copies are asked for, and the model is on another device, has these numbers already or
            no float32 ones to pack, or has no linear layers or such that do not divide into groups; or torch was built
            without MKL.
    """
    if decode not in COPIES:
        return
    if model.device.type != "cpu":
        raise UnsupportedModelError(
            f"`decode: {decode}` is for models on the CPU, {name} is on {model.device}; leave `decode` out there"
        )
    weights = [layer.weight for layer in model.modules() if type(layer) is nn.Linear]
    dtypes = {weight.dtype for weight in weights}
    if not weights:
        raise UnsupportedModelError(f"{name} has no linear layers that `decode: {decode}` could copy; leave it out")
    if decode is Decode.BFLOAT16 and torch.bfloat16 in dtypes:
        raise UnsupportedModelError(f"{name} is loaded in bfloat16, `decode: bfloat16` copies nothing; leave it out")
    if decode is Decode.INT4 and (uneven := sorted({w.shape[1] for w in weights if w.shape[1] % GROUP})):
        raise UnsupportedModelError(
            f"`decode: int4` takes weights in groups of {GROUP}, {name} has rows of {uneven[0]}; use `int8` there"
        )
    if decode is Decode.PACKED and dtypes != {torch.float32}:
        raise UnsupportedModelError(f"`decode: packed` packs float32 weights, {name} has others; leave it out")
    if decode is Decode.PACKED and not _has_mkl():
        raise UnsupportedModelError("`decode: packed` needs a torch with MKL, which this one lacks; leave it out")


def tuned(model: Any, decode: Decode, *, trials: bool = True) -> Tuning:
    """What is fastest for a model on this machine, as short trials say, and what ``auto`` means.

    Without ``trials`` nothing depends on a moment's speed: ``auto`` copies nothing, and all products are cut.
    """
    layers = [layer.weight for layer in model.modules() if type(layer) is nn.Linear]
    if not layers or not all(gains(weight) for weight in layers):
        return Tuning(Decode.SAME if decode is Decode.AUTO else decode)
    if not trials:
        return Tuning(Decode.SAME if decode is Decode.AUTO else decode)
    largest = sorted(layers, key=torch.Tensor.numel, reverse=True)
    if decode is Decode.AUTO:
        packs = _has_mkl() and sum(weight.nbytes for weight in layers) <= PACK_AT_MOST
        decode = Decode.PACKED if packs and _packing_pays(largest[:1]) else Decode.SAME
    return Tuning(decode, 1 if _cutting_pays(largest[1 : TRIED + 1]) else ALWAYS_CUT)


def _packing_pays(weights: Sequence[torch.Tensor]) -> bool:
    """Whether products of full rows are faster over packed copies."""
    packed, cut = ([Product(weight, None, decode) for weight in weights] for decode in (Decode.PACKED, Decode.SAME))
    return _faster((packed, Way.COPY), (cut, Way.SPLIT), FULL_ROWS)


def _cutting_pays(weights: Sequence[torch.Tensor]) -> bool:
    """Whether products of one row are faster when they are cut."""
    products = [Product(weight, None) for weight in weights]
    return _faster((products, Way.SPLIT), (products, Way.OWN), 1)


@torch.inference_mode()
def _faster(one: Trial, other: Trial, rows: int) -> bool:
    """Whether one way takes clearly less time than the other, in the best of a few rounds each."""
    taken: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for seconds, (products, way) in zip(taken, (one, other), strict=True):
            given = [torch.zeros(rows, product.weight.shape[1]) for product in products]
            begun = time.perf_counter()
            for product, row in zip(products, given, strict=True):
                product.multiply(row, way)
            seconds.append(time.perf_counter() - begun)
    return min(taken[0]) < WORTH * min(taken[1])


def _has_mkl() -> bool:
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]  # torch's
