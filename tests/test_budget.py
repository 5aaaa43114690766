"""The byte budget that stores share: a hard limit, a low watermark, and what is given up first."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from agentmesh.sharing.budget import Budget, Worth


@dataclass
class Shelf:
    """A store of entries of one byte, each of some worth."""

    held: dict[Worth, int]
    asked: list[tuple[Worth, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(self.held.values())

    def evict(self, wanted: int, worth: Worth) -> int:
        freed = min(wanted, self.held.get(worth, 0))
        self.held[worth] = self.held.get(worth, 0) - freed
        self.asked.append((worth, freed))
        return freed


def shelves(limit: int, low: float, *held: dict[Worth, int]) -> tuple[Budget, list[Shelf]]:
    budget, found = Budget(limit, low), [Shelf(one) for one in held]
    for shelf in found:
        budget.join(shelf)
    return budget, found


def test_nothing_is_given_up_before_the_limit_would_be_passed() -> None:
    budget, (shelf,) = shelves(100, 0.5, {Worth.IDLE: 90})

    assert budget.room(10)
    assert not shelf.asked
    assert not budget.room(101), "more than the limit never fits"
    assert not shelf.asked


@pytest.mark.parametrize("worth", [Worth.IDLE, Worth.LATER])
def test_eviction_goes_down_to_the_low_watermark(worth: Worth) -> None:
    budget, (shelf,) = shelves(100, 0.9, {worth: 100})

    assert budget.room(1)
    assert shelf.nbytes == 89, "with the byte that comes it is the watermark"


def test_of_what_is_awaited_no_more_is_given_up_than_has_to_be() -> None:
    budget, (shelf,) = shelves(100, 0.9, {Worth.AWAITED: 100})

    assert budget.room(1)
    assert shelf.nbytes == 99


def test_what_is_worth_less_goes_first_in_every_store_and_nothing_that_is_worth_too_much() -> None:
    budget, (first, second) = shelves(100, 1.0, {Worth.AWAITED: 40, Worth.IDLE: 10}, {Worth.LATER: 30, Worth.IDLE: 20})

    assert budget.room(35)
    assert (first.held[Worth.IDLE], second.held[Worth.IDLE], second.held[Worth.LATER]) == (0, 0, 25)
    assert first.held[Worth.AWAITED] == 40
    assert not budget.room(80, most=Worth.LATER)
    assert first.held[Worth.AWAITED] == 40
    assert budget.room(80)
    assert budget.used == 20


def test_a_store_that_joins_first_gives_up_first_what_is_worth_the_same() -> None:
    budget, (passages,) = shelves(100, 1.0, {Worth.IDLE: 60})
    spare = Shelf({Worth.IDLE: 40})
    budget.join(spare, first=True)

    assert budget.room(30)
    assert (spare.held[Worth.IDLE], passages.held[Worth.IDLE]) == (10, 60)
