"""What was learned of each link, whether a slot may be shared, and the breaker that stops it (docs/method.md, 6).

What is known of links are frozen values in a ledger, so a run sees one version of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agentmesh.communicator.linkstate import (
    AUDITS_KEPT,
    Audited,
    Checked,
    Finding,
    LinkState,
    Observed,
    Taught,
    bytes_of,
    link,
    split_link,
    too_far,
)
from agentmesh.config.presets import CommunicatorSpec, Picking, choices
from agentmesh.errors import InputError
from agentmesh.kv.values import KV
from agentmesh.metering import Audit
from agentmesh.prompt.segments import Reader
from agentmesh.reasons import Reason
from agentmesh.sharing.budget import Budget, Worth
from agentmesh.sharing.ledger import Ledger
from agentmesh.sharing.matching import Match
from agentmesh.sharing.realigner import Realigner

LEARNED_SHARE = 0.875
"""Of the budget, what statistics may hold: they are never given up, and live sequences need the rest."""

PENDING_SHARE = 0.5
"""Of the budget, what findings of deterministic runs may hold until they are committed, the same part for each run."""


def pending_part(budget: Budget, overlapping: int) -> float:
    """Bytes of findings that each of some deterministic runs may hold that overlap."""
    return PENDING_SHARE * budget.limit / overlapping


@dataclass(frozen=True)
class Verdict:
    """Whether a match may be placed: with which realigner, or why not."""

    realigner: Realigner[Any] | None
    reason: Reason | None = None

    @property
    def cold(self) -> bool:
        """Whether the slot has to be observed before it can be shared."""
        return self.reason in (Reason.NOT_WARM, Reason.BREAKER_OPEN)


class Archive(Protocol):
    """Where what links have learned outlives a process."""

    def of_tenant(self, tenant: str, fresh: LinkState) -> dict[str, LinkState]:
        """What a tenant's links have learned, by name; nothing when asked again.

        Args:
            tenant: whose links.
            fresh: a link of this model that has learned nothing.
        """

    def keep(self, states: Mapping[str, LinkState], warmup: int, *, all_of_them: bool = False) -> None:
        """Keep links that have changed, all of them or those that have changed enough.

        Args:
            states: all links by name.
            warmup: observations that a link needs before it shares.
            all_of_them: whether a small change is enough.
        """


class Learner:
    """Owns what links have learned.

    Args:
        spec: warm-up and limits.
        empty: makes a realigner that has learned nothing.
        budget: where its statistics count.

    While ``observing`` is set, no slot counts as warm, but inside ``rehearsing``. Once ``frozen``, nothing is learned
    any more. An ``archive`` keeps what is learned beyond the process.
    """

    def __init__(self, spec: CommunicatorSpec, empty: Callable[[], Realigner[Any]], budget: Budget) -> None:
        self._spec = spec
        self._empty = empty
        self._budget = budget
        self.fresh = LinkState(empty(), empty())
        self._given: Mapping[str, LinkState] = {}
        self.observing = False
        self.frozen = False
        self.archive: Archive | None = None
        self.ledger: Ledger[LinkState, Finding] = Ledger(self._learn, self._shown)
        budget.join(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all statistics, also of older ones that runs still see, and of findings whose run has not ended."""
        waiting = sum(isinstance(finding, Observed) for finding in self.ledger.pending())
        states = (*self.ledger.states.values(), *self._given.values())
        held = [one for state in states for one in (state.exact, state.deep)]
        for name, mine in self.ledger.states.items():
            for state in self.ledger.seen(name):
                pairs = ((state.exact, mine.exact), (state.deep, mine.deep))
                held += [seen for seen, known in pairs if seen.observations != known.observations]
        found = {id(one): one.nbytes for one in held if one.observations}
        return sum(found.values()) + waiting * self.fresh.exact.nbytes

    def evict(self, wanted: int, worth: Worth) -> int:
        """Give up what was observed and is not learned yet, the last runs' first; statistics never."""
        freed, one = 0, self.fresh.exact.nbytes
        while worth is Worth.TAUGHT and one and freed < wanted:
            forgotten = self.ledger.forget(lambda finding: isinstance(finding, Observed))
            if not forgotten:
                break
            freed += forgotten * one
        return freed

    def begin_with(self, states: Mapping[str, LinkState], origin: str) -> None:
        """Begin with links that were learned before, for all tenants.

        Raises:
            InputError: they do not fit the budget.
        """
        need = sum(bytes_of(state) for state in states.values())
        if not self._holds(need) or not self._budget.room(need):
            raise InputError(
                f"{origin} holds {need / 2**20:.1f} MiB of realigners, but communicator.budget is "
                f"{self._budget.limit / 2**20:.1f} MiB; raise it to at least twice that, so that KV has room, too"
            )
        self.ledger.states.update(states)
        self._given = dict(states)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Inside, slots are as they will be when nothing is only observed any more."""
        self.observing = False
        try:
            yield
        finally:
            self.observing = True

    def verdict(self, reader: Reader, match: Match) -> Verdict:
        """Whether a match may be placed now."""
        state = self._state(reader, link(reader, match))
        realigner = state.realigner(match.depth, self._spec.warmup)
        if self.observing:
            return Verdict(None, Reason.NOT_WARM)
        if state.wait:
            return Verdict(None, Reason.BREAKER_OPEN)
        if realigner.needs_warmup and realigner.observations < self._spec.warmup:
            short = self._short or (reader.sees is None and not self._holds(self.fresh.exact.nbytes))
            full = short and not realigner.observations
            return Verdict(None, Reason.NO_ROOM if full else Reason.NOT_WARM)
        if state.predicted_kl(realigner.residual) > self._spec.max_kl:
            return Verdict(None, Reason.PREDICTED_ERROR)
        return Verdict(realigner)

    def observe(self, reader: Reader, match: Match, base: KV, truth: KV, numbers: Sequence[int]) -> None:
        """Learn from tokens of a block, by their numbers in it, whose truth is exact.

        Where many runs overlap their findings fill the budget; more are not taken then. In deterministic runs what is
        learned may not depend on what else is in memory: each takes as many as it may have if all do that may overlap.
        """
        if self.frozen:
            return
        name, deep = link(reader, match), match.depth > 0
        state = self._state(reader, name)
        realigner = state.deep if deep else state.exact
        if not self._takes(reader, state, realigner):
            return
        finding = realigner.study(base, truth, numbers)
        self.ledger.note(reader.run, name, Observed(deep, finding))

    def audited(
        self, reader: Reader, placed: Iterable[tuple[Match, Realigner[Any]]], kl: float, *, flip: bool
    ) -> Audit:
        """Note an audit for every slot that was placed, with its realigner, unless nothing is learned any more.

        Returns:
            What it found, links whose audits pass the limits with it, and those whose breaker it opens.
        """
        residuals: dict[str, float] = {}
        for match, realigner in placed:
            name = link(reader, match)
            residuals[name] = max(residuals.get(name, 0.0), realigner.residual)
        above = []
        for name, residual in sorted(residuals.items()):
            state, found = self._state(reader, name), Audited(kl, flip, residual)
            if not self.frozen:
                self.ledger.note(reader.run, name, Checked(state.opened, found))
            if not state.wait and too_far((*state.audits, found), self._spec):
                above.append(name)
        return Audit(kl=kl, flip=flip, opened=() if self.frozen else tuple(above), above=tuple(above))

    def collect(self) -> list[Taught]:
        """Learn nothing from now on, but note what would be learned in the list that is returned, run by run."""
        found: list[Taught] = []

        def note(name: str, state: LinkState | None, finding: Finding) -> LinkState | None:
            found.append((name, finding))
            return state

        self.ledger.learn = note
        return found

    def learn(self, taught: Iterable[Taught]) -> None:
        """Learn what others have collected, in their order: the same as if all of it had been learned here."""
        for name, finding in taught:
            state = self._learn(name, self.ledger.states.get(name), finding)
            if state is not None:
                self.ledger.states[name] = state

    def begin(self, reader: Reader) -> None:
        """Fix what a run sees; a tenant's first run brings back what its earlier ones have learned."""
        if self.archive is not None:
            self._take_up(self.archive.of_tenant(reader.tenant, self.fresh))
        self._view(reader)

    def freeze(self) -> None:
        """Learn nothing from now on."""
        self.frozen = self.ledger.fixed = True
        self._prepare()

    def end(self, run: str) -> None:
        """Commit what a run taught; what a later plan needs of it is worked out now, outside anybody's TTFT."""
        self.ledger.end(run)
        self._prepare()
        if self.archive is not None:
            self.archive.keep(self.ledger.states, self._spec.warmup)

    def settle(self) -> None:
        """Keep beyond the process what was learned, however little."""
        if self.archive is not None:
            self.archive.keep(self.ledger.states, self._spec.warmup, all_of_them=True)

    def _take_up(self, states: Mapping[str, LinkState]) -> None:
        """Go on from links that earlier processes have kept: those that know more, or whose breaker is open."""
        for name, state in states.items():
            mine = self.ledger.states.get(name) or self._at_first(name)
            better = state.wait or state.observations > mine.observations
            need = bytes_of(state)
            if better and self._holds(need - bytes_of(mine)) and self._budget.room(need):
                self.ledger.states[name] = state
        if states:
            self._prepare()

    def _prepare(self) -> None:
        for state in self.ledger.states.values():
            for realigner in (state.exact, state.deep):
                if realigner.observations >= self._spec.warmup:
                    realigner.prepare()

    def _view(self, reader: Reader) -> Mapping[str, LinkState]:
        return self.ledger.view(reader.run, reader.order, reader.sees)

    def _state(self, reader: Reader, name: str) -> LinkState:
        """What a run knows of a link."""
        return self._view(reader).get(name) or self._at_first(name)

    def _at_first(self, name: str) -> LinkState:
        """What is known of a link before a tenant has taught anything: what the mesh was given, else nothing."""
        return self._given.get(split_link(name)[0], self.fresh)

    def _learn(self, name: str, state: LinkState | None, finding: Finding) -> LinkState | None:
        state = state or self._at_first(name)
        if isinstance(finding, Checked):
            if finding.opened != state.opened:
                return state  # it is of what was known before the breaker opened
            audits = (*state.audits, finding.audited)[-AUDITS_KEPT:]
            if state.wait or not too_far(audits, self._spec):
                return replace(state, audits=audits)
            return replace(self.fresh, wait=self._spec.warmup, opened=state.opened + 1)
        old = state.deep if finding.deep else state.exact
        fits = bool(old.observations) or self._holds(old.nbytes)
        if self._grows(name, old) and not (fits and self._budget.room(old.nbytes, most=Worth.LATER)):
            self.ledger.spoil()
            return None
        new = old.learn(finding.finding)
        wait = max(state.wait - 1, 0)
        return replace(state, deep=new, wait=wait) if finding.deep else replace(state, exact=new, wait=wait)

    def _takes(self, reader: Reader, state: LinkState, realigner: Realigner[Any]) -> bool:
        """Whether a run may note one finding more. Of a deterministic run's part half is for what is not warm yet."""
        one = self.fresh.exact.nbytes
        if self._short and not state.observations:
            return False
        if reader.sees is None:
            fits = bool(state.observations) or self._holds(one)
            return fits and self._budget.room(one, most=Worth.LATER)
        noted = sum(isinstance(finding, Observed) for finding in self.ledger.noted(reader.run))
        part = pending_part(self._budget, reader.order - reader.sees)
        cold = realigner.observations < self._spec.warmup
        return (noted + 1) * one <= (part if cold else part / 2) or (cold and not noted)

    @property
    def _short(self) -> bool:
        """Whether the budget cannot hold what one link has learned and what it learns next."""
        return self._budget.limit < 2 * self.fresh.exact.nbytes

    def _holds(self, more: int) -> bool:
        """Whether statistics may hold so many bytes more."""
        held = sum(bytes_of(state) for state in self.ledger.states.values())
        return held + more <= LEARNED_SHARE * self._budget.limit

    def _grows(self, name: str, old: Realigner[Any]) -> bool:
        """Whether one observation more takes up memory: the first one, and those of a state that runs still see."""
        seen = (one for state in self.ledger.seen(name) for one in (state.exact, state.deep))
        shown = old.observations >= self._spec.warmup and any(one.observations == old.observations for one in seen)
        return old.nbytes > 0 and (not old.observations or shown)

    def _shown(self, state: LinkState) -> LinkState:
        return state.shown(self._spec.warmup, sums=choices(self._spec).recompute.by is Picking.LEVERAGE)
