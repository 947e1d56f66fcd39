"""A saga with a lock waits for its turn before it begins."""

from typing import Self

import pytest

from coordinator import Saga, Status, Verb, completed, sequence, starts_on, step
from coordinator.acts import NotPossibleError
from coordinator.testing import SagaRun
from events import Command, Event
from events.errors import DefinitionError


class Wanted(Event):
    transfer: str
    account: str = "a-1"


class Order(Command):
    transfer: str


class Done(Event):
    transfer: str


class Transfer(Saga, lock="account", deadline=60):
    transfer: str
    account: str

    @starts_on(Wanted)
    @classmethod
    def wanted(cls, event: Wanted) -> Self:
        return cls(transfer=event.transfer, account=event.account)

    @step
    def order(self) -> Order:
        return Order(transfer=self.transfer)

    flow = sequence(order)

    @completed
    def done(self) -> Done:
        return Done(transfer=self.transfer)


def waiting() -> SagaRun:
    return SagaRun(Transfer, Wanted(transfer="t-1"), waiting=True)


def test_it_begins_nothing_before_its_turn() -> None:
    run = waiting()
    assert (run.status, run.sent, run.instance.due_at, run.last.lock) == (Status.WAITING, [], None, "account=a-1")
    run.passes(1000)
    assert run.is_granted().sent == [Order(transfer="t-1")]
    assert run.instance.deadline is not None
    assert (run.instance.deadline - run.now).total_seconds() == 60, "it counts from now"
    assert run.succeeds().published == [Done(transfer="t-1")]


def test_a_turn_that_comes_twice_changes_nothing() -> None:
    run = waiting().is_granted()
    before = run.instance
    assert run.is_granted().instance == before


def test_a_run_by_hand_begins_at_once() -> None:
    assert SagaRun(Transfer, Wanted(transfer="t-1")).sent == [Order(transfer="t-1")]


def test_it_is_cancelled_while_it_waits_and_nothing_is_undone() -> None:
    run = waiting().acts(Verb.CANCEL)
    assert (run.status, run.sent) == (Status.COMPENSATED, [])
    assert run.is_granted().status is Status.COMPENSATED
    with pytest.raises(NotPossibleError, match="the saga is waiting; there is nothing to compensate"):
        waiting().acts(Verb.COMPENSATE)
    with pytest.raises(NotPossibleError, match="the saga has begun no step 'order'"):
        waiting().acts(Verb.SKIP, "order")


def test_a_start_without_its_key_is_an_error() -> None:
    for account in ("", "x" * 501):
        with pytest.raises(ValueError, match="transfer must know its 'account' when it starts, 500 letters at most"):
            SagaRun(Transfer, Wanted(transfer="t-1", account=account))


def test_a_lock_that_cannot_work_is_refused() -> None:
    with pytest.raises(DefinitionError, match="the lock 'acount' is none of its fields"):

        class Misspelt(Transfer, lock="acount"):
            pass

    class Child(Saga):
        transfer: str

        @starts_on(Order)
        @classmethod
        def ordered(cls, command: Order) -> Self:
            return cls(transfer=command.transfer)

        @step
        def order(self) -> Order:
            return Order(transfer=self.transfer)

        flow = sequence(order)

    with pytest.raises(DefinitionError, match="a child has no lock: it might wait for its parent"):

        class Locked(Child, lock="transfer"):
            pass
