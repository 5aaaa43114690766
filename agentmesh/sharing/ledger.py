"""What links have learned, in versions: a run sees one version from its first call to its last.

Findings are committed when a run ends, in the order of the runs, whichever ends first. So what a run sees depends on
which runs were committed when it began; a run that says which (``sees``) gets the same version under any concurrency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

COMMITTED_AT_ONCE = 2
"""Runs that are committed when one ends, as long as others go on: committing takes time that theirs would wait for."""

State = TypeVar("State")
Finding = TypeVar("Finding")


@dataclass
class _Active(Generic[State, Finding]):
    order: int
    states: dict[str, State]
    findings: list[tuple[str, Finding]] = field(default_factory=list)


@dataclass
class Ledger(Generic[State, Finding]):
    """States by name, and the findings of runs that have not been committed.

    Args:
        learn: a name, its state (``None`` where there is none yet) and a finding → the new state; ``None`` to keep
            none.
        show: what a run needs to see of a state; the state itself, or something smaller.
        states: what is committed now.
        fixed: whether nothing will be taught any more.
        changes: how often what it holds has changed.
    """

    learn: Callable[[str, State | None, Finding], State | None]
    show: Callable[[State], State]
    states: dict[str, State] = field(default_factory=dict)
    fixed: bool = False
    changes: int = 0
    _active: dict[str, _Active[State, Finding]] = field(default_factory=dict)
    _ended: dict[int, _Active[State, Finding]] = field(default_factory=dict)
    _versions: dict[int, dict[str, State]] = field(default_factory=dict)
    _reach: int = 0
    _base: dict[str, State] | None = None
    _spoilt: int | None = None
    _committing: int | None = None

    def view(self, run: str, order: int, sees: int | None) -> Mapping[str, State]:
        """The states that a run sees; its first call begins it."""
        if run not in self._active:
            self.changes += 1
            self._reach = max(self._reach, 0 if sees is None else order - sees)
            self._active[run] = _Active(order, dict(self._version(sees)))
        return self._active[run].states

    def held(self) -> Iterator[State]:
        """Every state that is committed, or that some run sees or may see later, once."""
        yield from {id(state): state for version in self._all() for state in version.values()}.values()

    def seen(self, name: str) -> Iterator[State]:
        """A state as some run sees it, or may see it later."""
        return (version[name] for version in self._all()[1:] if name in version)

    def change(self, name: str, changed: Callable[[State], State]) -> None:
        """Change a state in every version that there is."""
        self.changes += 1
        for version in self._all():
            if name in version:
                version[name] = changed(version[name])

    def _all(self) -> list[dict[str, State]]:
        base = [] if self._base is None else [self._base]
        return [self.states, *base, *self._versions.values(), *(active.states for active in self._active.values())]

    def _shown(self) -> dict[str, State]:
        return {name: self.show(state) for name, state in self.states.items()}

    def _version(self, sees: int | None) -> dict[str, State]:
        """What is committed now, or what was when a run had been committed."""
        if sees is None:
            return self._shown()
        if self._base is None:
            self._base = self._shown()
        earlier = [version for version in self._versions if version <= sees]
        return self._versions[max(earlier)] if earlier else self._base

    def spoil(self, order: int | None = None) -> None:
        """Note that states are not what they would be with more memory, from a run on.

        Args:
            order: of that run; without one, the run that is being committed, or all of them.
        """
        found = order if order is not None else -1 if self._committing is None else self._committing
        self._spoilt = found if self._spoilt is None else min(self._spoilt, found)

    def missed(self, order: int) -> None:
        """Note that a run could not teach all that it would have taught with more memory."""
        if not self.fixed:
            self.spoil(order)

    def is_spoilt(self, sees: int) -> bool:
        """Whether a run that sees what was there when another one had been committed sees something spoilt."""
        return self._spoilt is not None and sees >= self._spoilt

    def adopt(self, other: Ledger[State, Finding]) -> None:
        """Begin with what another one has committed; what is spoilt there is so here for all runs."""
        self.changes += 1
        self.states = dict(other.states)
        if other._spoilt is not None:
            self.spoil(-1)

    def note(self, run: str, name: str, finding: Finding) -> None:
        """Keep a finding until its run is committed."""
        self.changes += 1
        self._active[run].findings.append((name, finding))

    def noted(self, run: str) -> Iterator[Finding]:
        """What a run has taught so far."""
        return (finding for _, finding in self._active[run].findings)

    def pending(self) -> Iterator[Finding]:
        """Findings that are not committed."""
        for active in (*self._active.values(), *self._ended.values()):
            for _, finding in active.findings:
                yield finding

    def forget(self, which: Callable[[Finding], bool]) -> int:
        """Forget such findings of the last run that has taught any; how many. None where runs see fixed versions."""
        runs = sorted((*self._active.values(), *self._ended.values()), key=lambda one: one.order, reverse=True)
        for one in runs if not self._reach else ():
            left = [(name, finding) for name, finding in one.findings if not which(finding)]
            forgotten = len(one.findings) - len(left)
            if forgotten:
                self.changes += 1
                one.findings = left
                return forgotten
        return 0

    def end(self, run: str) -> None:
        """Commit a run as soon as every run before it has ended.

        Where many have waited for one, the next ends commit the rest, but for runs that see fixed versions: what they
        see may not depend on who ended when.
        """
        active = self._active.pop(run, None)
        if active is None:
            return
        self.changes += 1
        active.states = {}
        self._ended[active.order] = active
        earliest = min((other.order for other in self._active.values()), default=None)
        ready = sorted(order for order in self._ended if earliest is None or order < earliest)
        at_most = len(ready) if self._reach or not self._active else COMMITTED_AT_ONCE
        for order in ready[:at_most]:
            self._commit(order, self._ended.pop(order))

    def _commit(self, order: int, ended: _Active[State, Finding]) -> None:
        self._committing = order
        self.changes += 1
        try:
            for name, finding in ended.findings:
                state = self.learn(name, self.states.get(name), finding)
                if state is not None:
                    self.changes += 1
                    self.states[name] = state
        finally:
            self._committing = None
        if self._reach:
            self._versions[order] = self._shown()
            for old in sorted(version for version in self._versions if version <= order - 2 * self._reach)[:-1]:
                del self._versions[old]
                self._base = {}  # the version that is left serves who sees so early a one
