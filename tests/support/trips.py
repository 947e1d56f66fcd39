"""Trips with any flow, for tests of what a flow does."""

from typing import Any, cast

from coordinator import Backoff, Saga, starts_on, step
from coordinator.flow import Node, nodes
from coordinator.steps import Step
from coordinator.testing import SagaRun
from coordinator.waits import Wait
from events import Command, Event


class TripWanted(Event):
    trip: str
    far: bool = False


class Book(Command):
    what: str


class Cancel(Command):
    what: str


def booking(name: str, *, undone: bool = True, retry: Backoff | None = None, **options: Any) -> Step:
    def book(self: Any) -> Book:
        assert self.trip
        return Book(what=name)

    def cancel(self: Any) -> Cancel:
        assert self.trip
        return Cancel(what=name)

    book.__name__, cancel.__name__ = name, f"cancel_{name}"
    made = step(**options)(book)
    if undone:
        made.compensation(retry=retry)(cancel)
    return made


def wanted(cls: Any, event: TripWanted) -> Any:
    return cls(trip=event.trip, far=event.far)


def saga(flow: Node, deadline: float | None = None) -> type[Saga]:
    """A saga with this flow."""
    steps = {node.name: node for node in nodes(flow) if isinstance(node, Step | Wait)}
    fields = {"__annotations__": {"trip": str, "far": bool}, "far": False}
    namespace = {"__module__": __name__, **fields, "wanted": starts_on(TripWanted)(wanted), **steps, "flow": flow}
    made: Any = type(Saga)
    return cast("type[Saga]", made("Trip", (Saga,), namespace, deadline=deadline))


def is_far(self: Any) -> bool:
    return bool(self.far)


def run(flow: Node, *, far: bool = False, deadline: float | None = None) -> SagaRun:
    return SagaRun(saga(flow, deadline), TripWanted(trip="1", far=far))


def names(commands: list[Command]) -> list[str]:
    return [f"{type(each).__name__.lower()} {each.what}" for each in commands if isinstance(each, Book | Cancel)]
