"""What is known of a link: realigners, audits, breaker; all of it frozen values.

A *link* is a consumer and what the reading's agent had to do with the text. For each link there are two realigners, for
exact bases and for approximate ones, its audits, and its breaker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentmesh.config.presets import CommunicatorSpec
from agentmesh.prompt.segments import Reader
from agentmesh.sharing.matching import Match, Relation
from agentmesh.sharing.realigner import Realigner

KL_PER_RESIDUAL = 0.1
"""Nats for each unit of relative residual, before audits or a calibration have measured it; see docs/figures.md."""

SETTLED = 10
"""So many observations of bases of one depth predict them as well as twenty of the other depth (docs/figures.md)."""

AUDITS_KEPT = 50
AUDITS_NEEDED = 10

OF_TENANT = " of "
"""Between a link's name and its tenant."""


@dataclass(frozen=True)
class Audited:
    """One audit as a link remembers it."""

    kl: float
    flip: bool
    residual: float

    @property
    def row(self) -> list[float | bool]:
        """As files keep it."""
        return [self.kl, self.flip, self.residual]

    @classmethod
    def of(cls, row: Sequence[Any]) -> Audited:
        """From a file's row.

        Raises:
            TypeError, ValueError: it is none.
        """
        kl, flip, residual = row
        return cls(float(kl), bool(flip), float(residual))


@dataclass(frozen=True)
class LinkState:
    """What is known of one link.

    Args:
        exact: the realigner for exact bases.
        deep: the realigner for bases that are approximate themselves.
        audits: the last ones.
        wait: observations that an opened breaker still waits for; 0 where it is closed.
        opened: how often the breaker has opened in this process.
    """

    exact: Realigner[Any]
    deep: Realigner[Any]
    audits: tuple[Audited, ...] = ()
    wait: int = 0
    opened: int = 0

    def realigner(self, depth: int, warmup: int) -> Realigner[Any]:
        """The one for bases of a depth; the other one where that has seen more, until this has seen enough itself."""
        first, second = (self.deep, self.exact) if depth else (self.exact, self.deep)
        return first if first.observations >= min(second.observations, max(warmup, SETTLED)) else second

    def shown(self, warmup: int, *, sums: bool) -> LinkState:
        """What a run sees of it: of a realigner that is not warm yet the outline, of others what realigns.

        Args:
            warmup: observations from which it is warm.
            sums: whether a run needs the statistics themselves.
        """
        exact, deep = (_shown(one, warmup, sums=sums) for one in (self.exact, self.deep))
        return replace(self, exact=exact, deep=deep)

    @property
    def observations(self) -> int:
        """Of both realigners."""
        return self.exact.observations + self.deep.observations

    def told(self) -> str:
        """What is known, for people."""
        known = f"{self.exact.observations} observations, residual {self.exact.residual:.4f}"
        if self.wait:
            return f"{known}, breaker open: audits found errors above the limits"
        if not self.audits:
            return known
        kl = max(0.0, sum(audit.kl for audit in self.audits) / len(self.audits))
        return f"{known}, KL {kl:.4f} in {len(self.audits)} checks"

    def predicted_kl(self, residual: float) -> float:
        """Nats a token that a residual stands for, as audits have measured it."""
        seen = sum(audit.residual for audit in self.audits)
        if len(self.audits) < AUDITS_NEEDED or not seen:
            return KL_PER_RESIDUAL * residual
        return residual * sum(audit.kl for audit in self.audits) / seen


@dataclass(frozen=True)
class Observed:
    """A finding of one observation."""

    deep: bool
    finding: Any


@dataclass(frozen=True)
class Checked:
    """A finding of one audit; ``opened``: how often its link's breaker had opened when the call shared."""

    opened: int
    audited: Audited


Finding = Observed | Checked

Taught = tuple[str, Finding]
"""A link's name, and a finding about it."""


def link(reader: Reader, match: Match) -> str:
    """The name of a link: offsets are learned by consumer, what the source did with the text, its kind, and tenant."""
    name = f"{reader.consumer} {match.relation} {match.kind}"
    return f"{name}{OF_TENANT}{reader.tenant}" if reader.tenant else name


def split_link(name: str) -> tuple[str, str]:
    """A link's name without its tenant, and the tenant."""
    plain, _, tenant = name.rpartition(OF_TENANT)
    return (plain, tenant) if plain and " " not in tenant else (name, "")


def shares(relation: Relation) -> bool:
    """Whether a match of this relation is a slot's own base in another context, so that there is something to learn."""
    return relation not in (Relation.HISTORY, Relation.COPIED)


def _shown(realigner: Realigner[Any], warmup: int, *, sums: bool) -> Realigner[Any]:
    if not realigner.observations:
        return realigner
    if realigner.needs_warmup and realigner.observations < warmup:
        return realigner.outline()
    return realigner if sums else realigner.ready()


def bytes_of(state: LinkState) -> int:
    """Of its statistics."""
    return sum(realigner.nbytes for realigner in (state.exact, state.deep) if realigner.observations)


def too_far(audits: Sequence[Audited], spec: CommunicatorSpec) -> bool:
    """Whether the moving averages of a link's audits pass a limit; of flips one says nothing."""
    if len(audits) < AUDITS_NEEDED:
        return False
    kl = sum(audit.kl for audit in audits) / len(audits)
    flips = sum(audit.flip for audit in audits)
    return kl > spec.max_kl or flips > max(1, spec.max_flips * len(audits))
