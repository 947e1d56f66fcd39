"""Flows drawn from bytes: every kind of part, nested; and the saga that has such a flow."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from coordinator.definition import Saga, SagaDefinition
from coordinator.flow import Each, Node, Parallel, Sequence, Stragglers, When, sequence
from coordinator.steps import Backoff, Deadline, Ending, Hook, OutcomeHook, Start, Step, starts_on, step
from coordinator.waits import DEFAULT_KEEP, Delay, Early, Wait
from events.envelope import Direction
from events.message import Command, Event, Reply

DO, UNDO = Direction.DO, Direction.UNDO
MOST_PARTS = 7


class Begun(Event):
    sizes: tuple[int, ...]


class Act(Command):
    """What handlers are asked for; `known` is what the saga had heard of by then."""

    step: str
    item: int | None
    direction: Direction
    known: tuple[str, ...]


class Told(Reply):
    step: str


class Yes(Event):
    key: str = "k"


class No(Event):
    key: str = "k"


class Ended(Event):
    how: str


class Drawn(Saga):
    """The state of every drawn saga; its flow is made by `draw_flow`."""

    sizes: tuple[int, ...]
    known: tuple[str, ...] = ()
    key: str = "k"

    @starts_on(Begun, key="key")
    def begun(cls, event: Begun) -> "Drawn":
        return Drawn(sizes=event.sizes)

    @step
    def unused(self) -> Act:
        raise NotImplementedError

    flow = sequence(unused)


@dataclass
class Tape:
    """Bytes as decisions; where they end, always the first choice."""

    rest: Iterator[int]

    @classmethod
    def of(cls, drawn: bytes) -> "Tape":
        return cls(iter(drawn))

    def below(self, most: int) -> int:
        return next(self.rest, 0) % most

    def one_of(self, *choices: Any) -> Any:
        return choices[self.below(len(choices))]


@dataclass
class DrawnFlow:
    """A definition in the making.

    Attributes:
        tape: what it is drawn from.
        truths: what the conditions say, by name.
        sizes: how many items each fan-out has.
    """

    tape: Tape
    truths: dict[str, bool] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    parts: int = 0

    def definition(self) -> SagaDefinition:
        flow = self._composed(self.tape.one_of("sequence", "sequence", "parallel"), 0, beside=False)
        return SagaDefinition(
            "drawn",
            1,
            Drawn,
            (Start(Drawn.begun, Begun, "key"),),
            flow,
            Ending(_named("completed", lambda _: Ended(how="completed")), compensated=False),
            Ending(_named("compensated", lambda _, __: Ended(how="compensated")), compensated=True),
            self.tape.one_of(None, None, 40.0),
        )

    def _node(self, depth: int, *, beside: bool) -> Node:
        """Draw a part; where it stands beside others there can be no pivot."""
        leaves = ("step", "step", "step", "each", "step", "wait", "delay", "step")
        composed = ("sequence", "parallel", "some", "when", "each", "some", "parallel", "sequence")
        kind = self.tape.one_of(*leaves, *(composed if depth < 3 and self.parts < MOST_PARTS else ()))
        made: Node
        match kind:
            case "step":
                made = self._step(self._name("s"), of_item=False, may_be_pivot=not beside)
            case "wait":
                made = self._wait()
            case "delay":
                seconds = self.tape.one_of(0, 5.0)
                made = Delay(_named(self._name("d"), lambda _: seconds))
            case "each":
                made = self._each()
            case "when":
                made = self._when(depth, beside=beside)
            case _:
                made = self._composed(kind, depth, beside=beside)
        return made

    def _composed(self, kind: str, depth: int, *, beside: bool) -> Node:
        parts = tuple(
            self._node(depth + 1, beside=beside or kind != "sequence") for _ in range(self.tape.one_of(2, 3, 1))
        )
        if kind == "sequence":
            return Sequence(parts, self.tape.one_of(False, False, False, True))
        if kind == "parallel":
            return Parallel(parts, len(parts))
        return Parallel(parts, 1 + self.tape.below(len(parts)), self.tape.one_of(*Stragglers))

    def _when(self, depth: int, *, beside: bool) -> When:
        name = self._name("c")
        truth = self.truths[name] = self.tape.one_of(True, False)
        then = self._node(depth + 1, beside=beside)
        otherwise = self._node(depth + 1, beside=beside) if self.tape.below(2) else None
        return When(Hook(_named(name, lambda _: truth)), then, otherwise)

    def _each(self) -> Each:
        name = self._name("e")
        size = self.sizes[name] = self.tape.one_of(3, 2, 5, 0, 1, 7)
        items = Hook(_named(f"items_of_{name}", lambda _: list(range(size))))
        taken = self._step(name, of_item=True, may_be_pivot=False)
        return Each(items, taken, self.tape.one_of(2, 1, 3, 100), self.tape.one_of(False, True))

    def _wait(self) -> Wait:
        name = self._name("w")
        made = Wait(
            _named(name, _learn_event(name)),
            Yes,
            by={"key": "key"},
            timeout=self.tape.one_of(10.0, None),
            early=Early.PARK,
            keep=DEFAULT_KEEP,
        )
        if self.tape.below(2):
            made.on_expired = Hook(_named(f"{name}_expired", lambda _: None))
        made.on_declined = OutcomeHook(_named(f"{name}_declined", _learn_event(name)))
        made.on_declined.outcome = No
        return made

    def _step(self, name: str, *, of_item: bool, may_be_pivot: bool) -> Step:
        tape = self.tape
        timeout, pivot = tape.one_of(5.0, 1.0, 30.0), may_be_pivot and tape.below(8) == 1
        recovery = Backoff(tape.one_of(2, 1, 3), first=7)
        made = Step(
            _named(name, _command(name, DO, of_item=of_item)),
            Deadline(timeout, tape.one_of(0, 1)),
            pivot=pivot,
            recovery=recovery,
        )
        made.undo_deadline = Deadline(timeout, tape.one_of(0, 1))
        made.undo_retry = Backoff(tape.one_of(1, 2), first=3)
        if not pivot and tape.below(5) != 1:
            made.undo = Hook(_named(f"undo_{name}", _command(name, UNDO, of_item=of_item)))
        if tape.below(2):
            made.on_succeeded = OutcomeHook(_named(f"learn_{name}", _learn_item if of_item else _learn))
            made.on_succeeded.outcome = Told
        return made

    def _name(self, letter: str) -> str:
        self.parts += 1
        return f"{letter}{self.parts}"


def _command(name: str, direction: Direction, *, of_item: bool) -> Callable[..., Act]:
    def of_step(saga: Drawn) -> Act:
        return Act(step=name, item=None, direction=direction, known=saga.known)

    def of_one(saga: Drawn, item: int) -> Act:
        return Act(step=name, item=item, direction=direction, known=saga.known)

    return of_one if of_item else of_step


def _learn(saga: Drawn, outcome: Told) -> None:
    saga.known = (*saga.known, outcome.step)


def _learn_item(saga: Drawn, _: int, outcome: Told) -> None:
    saga.known = (*saga.known, outcome.step)


def _learn_event(name: str) -> Callable[[Drawn, Event], None]:
    def learn(saga: Drawn, _: Event) -> None:
        saga.known = (*saga.known, name)

    return learn


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def named(*arguments: Any) -> Any:
        return function(*arguments)

    named.__name__ = name
    return named
