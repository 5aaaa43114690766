"""The anchor pools of ``kvcomm``: what owns them, learns them run by run, and keeps them inside the byte budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from agentmesh.config.presets import AnchorSpec
from agentmesh.kv.values import KV
from agentmesh.sharing.anchors import Anchor, AnchorPool, offset
from agentmesh.sharing.budget import Budget, Worth
from agentmesh.sharing.ledger import Ledger


@dataclass(frozen=True)
class NewAnchor:
    """A finding: an anchor, and the fixed text's KV that its offset refers to."""

    anchor: Anchor
    fixed: KV | None

    def measured_from(self, fixed: KV | None) -> Anchor:
        """The anchor with the offset of its fixed text from the base of a pool.

        Of runs that overlap, each takes what it read first as that base; the pool keeps one.
        """
        if self.anchor.fixed is None or self.fixed is None or fixed is None or self.fixed is fixed:
            return self.anchor
        between, own = offset(fixed, self.fixed), self.anchor.fixed
        return replace(self.anchor, fixed=KV(own.keys + between.keys, own.values + between.values, own.frame))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything it holds."""
        own = () if self.fixed is None else (self.fixed.keys, self.fixed.values)
        return (*own, *self.anchor.tensors)


Finding = NewAnchor | tuple[object, ...]


class Pools:
    """Owns the anchor pools, inside a byte budget.

    Args:
        spec: size of a pool, and how it evicts.
        budget: where the anchors count.
    """

    def __init__(self, spec: AnchorSpec, budget: Budget) -> None:
        self._spec = spec
        self._budget = budget
        self._counted = -1, 0
        self.ledger: Ledger[AnchorPool, Finding] = Ledger(self._learn, lambda pool: pool)
        budget.join(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all anchors that are in pools, that runs still see, or that wait for their run to end; each once."""
        if self._counted[0] == self.ledger.changes:
            return self._counted[1]
        waiting = (finding for finding in self.ledger.pending() if isinstance(finding, NewAnchor))
        held = [t for pool in self.ledger.held() for t in pool.tensors]
        held += [t for finding in waiting for t in finding.tensors]
        found = sum({t.data_ptr(): t.nbytes for t in {id(t): t for t in held}.values()}.values())
        self._counted = self.ledger.changes, found
        return found

    def taught_bytes(self, run: str) -> int:
        """Bytes of the anchors that a run has made so far."""
        made = (finding for finding in self.ledger.noted(run) if isinstance(finding, NewAnchor))
        return sum(tensor.nbytes for finding in made for tensor in finding.tensors)

    @property
    def held(self) -> int:
        """Anchors in all pools."""
        return sum(len(pool.anchors) for pool in self.ledger.states.values())

    def evict(self, wanted: int, worth: Worth) -> int:
        """Give up the oldest anchor of the fullest pool until there is room, for all runs; see ``budget.Store``."""
        before, states = self.nbytes, self.ledger.states
        while worth is Worth.LATER and self.held and before - self.nbytes < wanted:
            name = max(states, key=lambda name: len(states[name].anchors))
            self.ledger.change(name, partial(AnchorPool.without, one=states[name].anchors[0]))
            self.ledger.spoil(order=-1)
        return before - self.nbytes

    def _learn(self, name: str, pool: AnchorPool | None, finding: Finding) -> AnchorPool | None:
        pool = pool or AnchorPool()
        if isinstance(finding, tuple):
            return pool.used(finding)
        if not self._budget.room(sum(tensor.nbytes for tensor in finding.tensors), most=Worth.LATER):
            self.ledger.spoil()
            return None
        pool = self.ledger.states.get(name, pool)  # the budget may have dropped anchors of this very pool
        if pool.fixed is None:
            pool = replace(pool, fixed=finding.fixed)
        return pool.add(finding.measured_from(pool.fixed), self._spec.pool, self._spec.window)
