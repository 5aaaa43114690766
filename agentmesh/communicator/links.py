"""What a link has learned, as a record of a persistent store: its statistics, its audits, and its breaker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agentmesh.communicator.linkstate import Audited, LinkState
from agentmesh.sharing.tier.records import Record

PARTS = ("exact", "deep")


def link_record(
    state: LinkState, tenant: str, identity: str, keys: tuple[str, ...], about: Mapping[str, Any], generation: int
) -> Record:
    """A link's record. What it has learned lives and dies with its breaker, so both are in one file.

    Args:
        state: what it has learned.
        tenant: whose it is.
        identity: of model and machine.
        keys: what it is found by.
        about: its name, and whose agents it belongs to.
        generation: how often its breaker has opened.
    """
    realigners = {part: getattr(state, part) for part in PARTS}
    tensors = {
        f"{part}/{name}": tensor
        for part, realigner in realigners.items()
        if realigner.observations
        for name, tensor in realigner.pack().items()
    }
    facts = {
        **about,
        **{part: realigner.observations for part, realigner in realigners.items()},
        "wait": state.wait,
        "audits": [audit.row for audit in state.audits],
    }
    return Record("link", tenant, identity, keys, tensors, facts, generation=generation, rank=state.observations)


def link_state(record: Record, fresh: LinkState) -> LinkState | None:
    """What a record holds; ``None`` where it does not fit the model's links.

    Args:
        record: the record.
        fresh: a link of this model that has learned nothing.
    """
    try:
        audits = tuple(Audited.of(row) for row in record.about["audits"])
        parts = {}
        for part in PARTS:
            own = {
                key.removeprefix(f"{part}/"): tensor
                for key, tensor in record.tensors.items()
                if key.startswith(f"{part}/")
            }
            empty, count = getattr(fresh, part), int(record.about[part])
            parts[part] = empty.unpack(own, count) if count else empty
        return replace(fresh, **parts, audits=audits, wait=int(record.about["wait"]))
    except (KeyError, TypeError, ValueError):
        return None
