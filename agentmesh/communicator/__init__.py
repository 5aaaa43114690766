"""What each prompt gets placed and what it computes, decided and explained."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from agentmesh.communicator.base import Plan, Preset
from agentmesh.communicator.dense import Dense
from agentmesh.communicator.kvcomm import KVComm
from agentmesh.communicator.prefix import Prefix
from agentmesh.communicator.slots import Slots
from agentmesh.config.presets import PRESETS, CommunicatorSpec, RealignerKind, Share, choices
from agentmesh.engine.forward import ArenaRunner
from agentmesh.engine.loading import LoadedModel
from agentmesh.engine.probe import Level, Support
from agentmesh.engine.scout import Scout
from agentmesh.errors import NotFoundError, SharingError, did_you_mean, listing
from agentmesh.kv.arena import KVShape
from agentmesh.reasons import Reason
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.prefix import PrefixStore
from agentmesh.sharing.realigner import Realigner

__all__ = ["Plan", "Preset", "make", "unlearned"]


def make(spec: CommunicatorSpec, support: Support, loaded: LoadedModel) -> Preset:
    """The preset a mesh asks for, or the most that its model supports.

    Args:
        spec: the mesh's communicator.
        support: what the model supports.
        loaded: the model; its fingerprint is part of every key.

    Raises:
        NotFoundError: no such preset.
        SharingError: the mesh is ``strict``, and the model supports less than its preset shares.
    """
    if spec.preset not in PRESETS:
        raise NotFoundError(
            f"no preset named {spec.preset!r}; there are {listing(PRESETS)}.{did_you_mean(spec.preset, PRESETS)}"
        )
    choice = choices(spec)
    runner = support.runner
    if choice.share is Share.NOTHING:
        return Dense(Budget(spec.budget))
    if support.level is Level.DENSE or not isinstance(runner, ArenaRunner):
        if spec.strict:
            raise _lacking(spec, loaded, "no reuse of KV")
        return Dense(Budget(spec.budget), Reason.MODEL_UNSUPPORTED)
    if choice.share is Share.SLOTS and support.level is Level.PREFIX and spec.strict:
        raise _lacking(spec, loaded, "nothing but exact prefixes")
    fingerprint = loaded.fingerprint
    if choice.share is Share.PREFIX:
        return Prefix(PrefixStore(Budget(spec.budget)), fingerprint, spec.min_tokens)
    if support.level is Level.PREFIX:
        return Prefix(PrefixStore(Budget(spec.budget)), fingerprint, spec.min_tokens, Reason.MODEL_UNSUPPORTED)
    if choice.realigner is RealignerKind.ANCHORS:
        assert runner.rope is not None, "the probe found it"
        return KVComm(spec, fingerprint, runner.rope, runner.spans)
    empty = unlearned(choice.realigner)
    return Slots(spec, choice, Scout(runner), fingerprint, lambda: empty(runner.shape), loaded.line_breaks)


def unlearned(kind: RealignerKind) -> Callable[[KVShape], Realigner[Any]]:
    """What makes a realigner of this kind that has learned nothing; ``RealignerKind`` is the table."""
    found: Callable[[KVShape], Realigner[Any]] = pkgutil.resolve_name(kind.made_by)
    return found


def _lacking(spec: CommunicatorSpec, loaded: LoadedModel, supported: str) -> SharingError:
    return SharingError(
        f"preset {spec.preset!r} needs more than {loaded.name} supports: {supported}, and `strict` is set. Take "
        "another model, or leave `strict` out"
    )
