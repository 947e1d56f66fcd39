"""A saga that others start and undo as a step of theirs."""

from typing import Self

from coordinator.definition import Saga
from coordinator.flow import sequence
from coordinator.steps import compensated, completed, starts_on, step
from events.message import Command, Event


class Pick(Command):
    order: str


class PutBack(Command):
    order: str


class Pack(Command):
    order: str


class Unpack(Command):
    order: str


class Packed(Event):
    order: str


class Unpacked(Event):
    order: str
    reason: str


class Packing(Saga):
    """A child."""

    order: str

    @starts_on(Pack, undone_by=Unpack)
    @classmethod
    def asked(cls, command: Pack) -> Self:
        return cls(order=command.order)

    @step
    def pick(self) -> Pick:
        return Pick(order=self.order)

    @pick.compensation
    def put_back(self) -> PutBack:
        return PutBack(order=self.order)

    flow = sequence(pick)

    @completed
    def packed(self) -> Packed:
        return Packed(order=self.order)

    @compensated
    def unpacked(self, reason: str) -> Unpacked:
        return Unpacked(order=self.order, reason=reason)
