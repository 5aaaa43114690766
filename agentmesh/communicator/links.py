"""What links have learned, in a persistent store: their statistics, their audits, and their breakers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from agentmesh.communicator.linkstate import Audited, LinkState, split_link
from agentmesh.communicator.scope import Scope, key_of
from agentmesh.sharing.tier.disk import DiskStore
from agentmesh.sharing.tier.records import Record
from agentmesh.sharing.tier.writer import Writer

LINKS = 10_000
PARTS = ("exact", "deep")


@dataclass(frozen=True)
class _Mark:
    """How far a link was when it was kept last."""

    observations: int
    wait: int
    audits: tuple[Audited, ...]

    @staticmethod
    def of(state: LinkState) -> _Mark:
        """Where a link is now."""
        return _Mark(state.observations, state.wait, state.audits)


@final
class KeptLinks:
    """What links have learned, beyond the process.

    Args:
        store: the engine's thread's own way into the folder.
        writer: keeps what need not be there at once.
        scope: whose it is.
        reads: whether anything is read.
    """

    def __init__(self, store: DiskStore, writer: Writer, scope: Scope, *, reads: bool) -> None:
        self._store = store
        self._writer = writer
        self._scope = scope
        self._reads = reads
        self._marks: dict[str, _Mark] = {}
        self._generations: dict[str, int] = {}
        self._loaded: set[str] = set()

    def of_tenant(self, tenant: str, fresh: LinkState) -> dict[str, LinkState]:
        """What a tenant's links have learned, by name; nothing when asked again."""
        if not self._reads or tenant in self._loaded:
            return {}
        self._loaded.add(tenant)
        found: dict[str, LinkState] = {}
        for entry in self._store.find("link", tenant, self._scope.identity, key_of("links", self._scope.mesh), LINKS):
            record = self._store.get(entry)
            if record is None:
                continue
            name = str(record.about.get("name"))
            state = link_state(record, fresh)
            if state is None:
                self._store.reject(entry)
            elif record.about.get("mesh") == self._scope.mesh and split_link(name)[1] == tenant and name not in found:
                self._writer.hit(entry)
                found[name] = state
                self._generations[name], self._marks[name] = record.generation, _Mark.of(state)
        return found

    def keep(self, states: Mapping[str, LinkState], warmup: int, *, all_of_them: bool = False) -> None:
        """Keep what links have learned since they were kept last, where it is enough to be worth a file.

        A breaker that opened is kept at once, and in a new generation: no process that still trusts what it has learned
        of the link can bring it back.
        """
        for name, state in states.items():
            old, new = self._marks.get(name), _Mark.of(state)
            plain, tenant = split_link(name)
            known = plain.rsplit(" ", 2)[0] in self._scope.consumers
            if not known or new == old or not (all_of_them or _due(old, new, warmup)):
                continue
            opened = state.wait > (old.wait if old is not None else 0)
            keys = (key_of("link", self._scope.mesh, plain), key_of("links", self._scope.mesh))
            generation = self._generations.get(name, 0)
            if opened:
                there = self._store.find("link", tenant, self._scope.identity, keys[0])
                generation = max([generation, *(entry.generation for entry in there)]) + 1
            about = {"name": name, "mesh": self._scope.mesh}
            record = link_record(state, tenant, self._scope.identity, keys, about, generation)
            self._marks[name], self._generations[name] = new, generation
            if opened:
                self._store.put(record, replaces=True)
            elif self._writer.takes(nbytes := sum(tensor.nbytes for tensor in record.tensors.values())):
                self._writer.submit(lambda store, record=record: store.put(record, replaces=True), nbytes)  # type: ignore[misc]


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


def _due(old: _Mark | None, new: _Mark, warmup: int) -> bool:
    """Whether a link has changed enough: its breaker, a quarter more observations, or some audits."""
    if old is None:
        return new.wait > 0 or new.observations >= warmup
    more = new.observations > old.observations and new.observations >= max(1.25 * old.observations, warmup)
    return new.wait != old.wait or more or abs(len(new.audits) - len(old.audits)) >= warmup
