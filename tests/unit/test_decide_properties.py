"""Random sagas in a random world: messages are lost, repeated, late and out of order, handlers say no or break.

What must hold of every run is written down in `World.check_*` and `World.check_end`. The number of runs comes from
SAGA_EXAMPLES; with it set they are drawn at random, otherwise they are the same every time.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.decide import decide
from coordinator.decision import Decision, Elapsed, Input, Replied, Request, Started
from coordinator.definition import Saga, SagaDefinition
from coordinator.flow import Sequence, sequence
from coordinator.instance import Instance, Status, StepStatus
from coordinator.steps import Deadline, Ending, Hook, OutcomeHook, Start, Step, starts_on, step
from events.derive import derive_id
from events.envelope import Direction, Result
from events.message import Command, Event, Reply
from tests.support.histories import findings
from tests.support.sagas import SAGA_ID, START

EXAMPLES = os.environ.get("SAGA_EXAMPLES")
NAMES = ("a", "b", "c", "d", "e", "f")
DO, UNDO = Direction.DO, Direction.UNDO

LEGAL = {
    Status.RUNNING: {Status.RUNNING, Status.COMPENSATING, Status.COMPLETED, Status.COMPENSATED, Status.NEEDS_ATTENTION},
    Status.COMPENSATING: {Status.COMPENSATING, Status.COMPENSATED, Status.NEEDS_ATTENTION},
    Status.COMPLETED: {Status.COMPLETED},
    # What is heard late wakes a saga that was over.
    Status.COMPENSATED: {Status.COMPENSATED, Status.COMPENSATING, Status.NEEDS_ATTENTION},
    Status.NEEDS_ATTENTION: {Status.NEEDS_ATTENTION, Status.COMPENSATING, Status.COMPENSATED},
}


class Begun(Event):
    faults: tuple[str, ...]


class Act(Command):
    step: str
    direction: Direction
    known: tuple[str, ...]


class Told(Reply):
    step: str


class Ended(Event):
    how: str


class Drawn(Saga):
    """The state of every drawn saga; its steps are made by `make`."""

    faults: tuple[str, ...]
    known: tuple[str, ...] = ()
    key: str = "k"

    @starts_on(Begun, key="key")
    def begun(cls, event: Begun) -> "Drawn":
        return Drawn(faults=event.faults)

    @step
    def unused(self) -> Act:
        raise NotImplementedError

    flow = sequence(unused)

    def stumble(self, name: str) -> None:
        """Raise where told to: always, or from the success of the step on."""
        if name in self.faults or (name[-1] in self.known and f"{name} known" in self.faults):
            self.known = (*self.known, "?")
            raise RuntimeError(name)


@dataclass(frozen=True)
class Plan:
    """One step of a drawn saga."""

    compensable: bool
    hooked: bool
    timeout: float
    resends: int
    undo_resends: int


@dataclass(frozen=True)
class Shape:
    """A drawn saga, the methods of it that raise, and what its handlers answer, in order."""

    plans: tuple[Plan, ...]
    faults: tuple[str, ...]
    answers: tuple[int, ...]
    fenced: bool


def make(shape: Shape) -> SagaDefinition:
    steps = tuple(_make_step(name, plan) for name, plan in zip(NAMES, shape.plans, strict=False))
    return SagaDefinition(
        "drawn",
        1,
        Drawn,
        (Start(Drawn.begun, Begun, "key"),),
        Sequence(steps),
        Ending(_named("completed", lambda saga: _ended(saga, "completed")), compensated=False),
        Ending(_named("compensated", lambda saga, _: _ended(saga, "compensated")), compensated=True),
    )


def _make_step(name: str, plan: Plan) -> Step:
    def act(direction: Direction) -> Callable[[Drawn], Act]:
        def command(saga: Drawn) -> Act:
            saga.stumble(f"{direction} {name}")
            return Act(step=name, direction=direction, known=saga.known)

        return command

    def learn(saga: Drawn, outcome: Told) -> None:
        saga.known = (*saga.known, outcome.step)
        saga.stumble(f"learn {name}")

    made = Step(_named(name, act(DO)), Deadline(plan.timeout, plan.resends))
    made.undo_deadline = Deadline(plan.timeout, plan.undo_resends)
    if plan.compensable:
        made.undo = Hook(_named(f"undo_{name}", act(UNDO)))
    if plan.hooked:
        made.on_succeeded = OutcomeHook(_named(f"learn_{name}", learn))
        made.on_declined = OutcomeHook(_named(f"learn_no_{name}", learn))
    return made


def _ended(saga: Drawn, how: str) -> Ended:
    saga.stumble(how)
    return Ended(how=how)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = name
    return function


@dataclass
class World:
    """A saga with what is around it: the commands and replies under way, and the handlers with what they have done.

    Handlers record the commands that they have answered and answer a duplicate with the same words; their effects
    happen once for each idempotency key. A fenced handler also refuses a command whose compensation it has seen;
    where handlers are not fenced, no message is lost for good and no dead letter is replayed.
    """

    shape: Shape
    instance: Instance | None = None
    commands: list[Request] = field(default_factory=list)
    replies: list[Replied] = field(default_factory=list)
    inbox: dict[UUID, Result] = field(default_factory=dict)
    effects: list[UUID] = field(default_factory=list)
    refused: set[UUID] = field(default_factory=set)
    asked: list[Request] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)
    in_time: set[str] = field(default_factory=set)
    announced: dict[UUID, Event] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.definition = make(self.shape)
        self.answers: Iterator[int] = iter(self.shape.answers)
        self.now = START
        self.messages = 0

    # What the coordinator does

    def take(self, given: Input) -> None:
        before = self.instance
        decision = decide(self.definition, before, given)
        assert decision == decide(self.definition, before, given)
        if decision is None:
            assert isinstance(given, Elapsed)
            return
        self.check_decision(before, decision, given)
        self.decisions.append(decision)
        if isinstance(given, Replied) and (
            decision.entry.kind,
            given.direction,
            given.result,
        ) == ("reply", DO, Result.SUCCEEDED):
            self.in_time.add(given.step)
        self.instance = decision.instance
        self.asked += decision.requests
        self.commands += decision.requests
        for announcement in decision.announcements:
            assert announcement.id not in self.announced, "said twice"
            self.announced[announcement.id] = announcement.event

    def start(self) -> None:
        self.take(Started(SAGA_ID, Begun(faults=self.shape.faults), "start", START))

    def tick(self) -> None:
        """Let the next deadline pass."""
        if self.instance and self.instance.due_at:
            self.now = max(self.now, self.instance.due_at)
        self.take(Elapsed(self.now))

    def wait_in_vain(self) -> None:
        """Look at the deadlines too early."""
        if self.instance and self.instance.due_at and self.instance.due_at > self.now:
            revision = self.instance.revision
            self.take(Elapsed(min(self.now + timedelta(seconds=0.1), self.instance.due_at - timedelta.resolution)))
            assert self.instance.revision == revision

    # What the bus does; a number says to which message

    def deliver_command(self, number: int, *, keep: bool = False) -> None:
        if self.commands:
            at = number % len(self.commands)
            self.handle(self.commands[at] if keep else self.commands.pop(at))

    def deliver_reply(self, number: int, *, keep: bool = False) -> None:
        if self.replies:
            at = number % len(self.replies)
            reply = self.replies[at] if keep else self.replies.pop(at)
            if reply.result is Result.SUCCEEDED and reply.direction is DO:
                self.accepted.add(reply.step)
            self.take(replace(reply, now=self.now))

    def lose(self, messages: list[Any], number: int) -> None:
        if messages and self.shape.fenced:
            messages.pop(number % len(messages))

    # What the handlers do

    def handle(self, request: Request) -> None:
        result = self.inbox.get(request.id)
        if result is None:
            result = self.execute(request)
            if result is not Result.FAILED or not self.shape.fenced:  # a dead letter may be replayed, and runs again
                self.inbox[request.id] = result
        self.messages += 1
        told = Told(step=request.step)
        message_id = f"m-{self.messages}"
        self.replies.append(
            Replied(request.step, request.direction, request.attempt, result, told, "no", message_id, self.now)
        )

    def execute(self, request: Request) -> Result:
        key, undo_key = (derive_id(SAGA_ID, request.step, direction.value) for direction in (request.direction, UNDO))
        if request.direction is DO and undo_key in self.refused:
            return Result.DECLINED
        answer = next(self.answers, 0)
        if answer == 1 and key in self.effects:  # the third party knows the key: it is done, so nobody says no
            answer = 0
        if answer in (2, 3) or (answer == 1 and request.direction is DO):
            if answer == 3:  # done, and then broken before anybody heard of it
                self.have_effect(request, key)
            return Result.DECLINED if answer == 1 else Result.FAILED
        self.have_effect(request, key)
        return Result.SUCCEEDED

    def have_effect(self, request: Request, key: UUID) -> None:
        done = derive_id(SAGA_ID, request.step, "do") in self.effects
        if key not in self.effects and (request.direction is DO or done):
            self.effects.append(key)
        if request.direction is UNDO and self.shape.fenced:
            self.refused.add(key)

    # What must hold after every decision

    def check_decision(self, before: Instance | None, decision: Decision, given: Input) -> None:
        instance, entry = decision.instance, decision.entry
        # I1: what is in flight has a deadline, the earliest of its steps
        due = [at.due_at for at in instance.steps.values() if at.due_at is not None]
        assert instance.due_at == min(due, default=None)
        assert (instance.due_at is not None) is instance.status.in_flight
        outstanding = [name for name, at in instance.steps.items() if at.status.outstanding]
        assert len(outstanding) == (1 if instance.status.in_flight else 0)
        # I10: revisions without a gap, on a legal path, each with what changed and what was sent
        assert instance.revision == (before.revision if before else 0) + 1
        assert entry.status is instance.status
        if before is not None:
            assert instance.status in LEGAL[before.status]
            assert instance.state == {**before.state, **entry.change.get("state", {})}
        steps = {name: at.to_history() for name, at in (before.steps if before else {}).items()}
        assert {name: at.to_history() for name, at in instance.steps.items()} == {
            **steps,
            **entry.change.get("steps", {}),
        }
        assert len(entry.sent) == len(decision.requests) + len(decision.announcements)
        for request in decision.requests:
            self.check_request(request, given)
        if decision.announcements:
            assert instance.status in (Status.COMPLETED, Status.COMPENSATED)

    def check_request(self, request: Request, given: Input) -> None:
        assert request.id == derive_id(SAGA_ID, request.step, request.direction.value, request.attempt)
        same = [each for each in self.asked if each.id == request.id]
        asked = [each for each in self.asked if each.step == request.step]
        if same:
            assert isinstance(given, Elapsed)
            assert all(each.command == request.command for each in same)
        if request.direction is DO:
            # I4: nothing is done after its undo was asked for
            assert not [each for each in self.asked if each.direction is UNDO]
            # I15: the step before has succeeded, and that was heard
            at = NAMES.index(request.step)
            assert request.attempt == 1
            assert at == 0 or NAMES[at - 1] in self.accepted
        else:
            assert [each for each in asked if each.direction is DO]
            last = max((each.attempt for each in asked if each.direction is UNDO), default=0)
            assert request.attempt == last + (0 if same else 1)
            # Only what is heard late asks for another compensation: a failure once, a success once.
            assert request.attempt <= (1 if request.step in self.in_time else 3)

    # What must hold when nothing is under way any more

    def drain(self) -> None:
        """Let everything arrive and every deadline pass."""
        for _ in range(2000):
            if self.commands:
                self.deliver_command(0)
            elif self.replies:
                self.deliver_reply(0)
            elif self.instance and self.instance.due_at:
                self.tick()
            else:
                return
        raise AssertionError(f"it does not come to an end: {self.instance}")

    def check_end(self) -> None:
        assert self.instance is not None
        instance, steps = self.instance, self.instance.steps
        assert not instance.status.in_flight  # I1
        done = [name for name in NAMES if derive_id(SAGA_ID, name, "do") in self.effects]
        undone = [name for name in NAMES if derive_id(SAGA_ID, name, "undo") in self.effects]
        compensable = [each.name for each in self.definition.steps if each.undo is not None]
        if instance.status is Status.COMPLETED:  # I2
            assert (done, undone) == (list(NAMES[: len(self.shape.plans)]), [])
            assert not [each for each in self.asked if each.direction is UNDO]
        if instance.status is Status.COMPENSATED:  # I3
            assert undone == [name for name in done if name in compensable]
            assert not [at for at in steps.values() if at.status is StepStatus.UNDO_FAILED]
        for name, at in steps.items():
            if at.status is StepStatus.UNDONE and name in done:
                assert name in undone
            if at.status is StepStatus.DECLINED:
                assert name not in [each.step for each in self.asked if each.direction is UNDO]
        firsts = list(dict.fromkeys(each.step for each in self.asked if each.direction is UNDO))
        if not self.shape.faults:
            assert firsts == sorted(firsts, reverse=True)
        if instance.status is Status.NEEDS_ATTENTION:
            assert instance.reason
            assert self.shape.faults or [at for at in steps.values() if at.status is StepStatus.UNDO_FAILED]
        assert findings(self.decisions, self.now) == []
        assert len(self.announced) <= 1
        assert all(event == Ended(how=event.how) for event in self.announced.values() if isinstance(event, Ended))


plans = st.builds(
    Plan,
    compensable=st.sampled_from([True, True, True, False]),
    hooked=st.booleans(),
    timeout=st.sampled_from([1.0, 5.0, 30.0]),
    resends=st.integers(0, 2),
    undo_resends=st.integers(0, 2),
)
faults = st.sampled_from(
    [
        *(f"{what} {name}" for what in ("do", "undo", "learn") for name in NAMES[:4]),
        *(f"{what} {name} known" for what in ("do", "undo") for name in NAMES[:4]),
        "completed",
        "compensated",
    ]
)
shapes = st.builds(
    Shape,
    plans=st.lists(plans, min_size=1, max_size=6).map(tuple),
    faults=st.one_of(st.just(()), st.just(()), st.lists(faults, max_size=2, unique=True).map(tuple)),
    answers=st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 3]), max_size=12).map(tuple),
    fenced=st.booleans(),
)
ACTS: tuple[Callable[[World, int], None], ...] = (
    lambda world, number: world.deliver_command(number),
    lambda world, number: world.deliver_reply(number),
    lambda world, number: world.deliver_command(number),
    lambda world, number: world.deliver_reply(number),
    lambda world, number: world.deliver_command(number, keep=True),
    lambda world, number: world.deliver_reply(number, keep=True),
    lambda world, _: world.tick(),
    lambda world, _: world.tick(),
    lambda world, _: world.wait_in_vain(),
    lambda world, number: world.lose(world.commands, number),
    lambda world, number: world.lose(world.replies, number),
)
# A byte of the schedule is an act and the number of a message: one draw for a whole run.
schedules = st.one_of(st.binary(max_size=12), st.binary(min_size=20, max_size=48), st.binary(min_size=20, max_size=48))


@settings(
    max_examples=int(EXAMPLES or 3000),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(shapes, schedules)
def test_whatever_happens_a_saga_ends_and_exactly_what_was_done_is_undone(shape: Shape, schedule: bytes) -> None:
    world = World(shape)
    world.start()
    for byte in schedule:
        number, act = divmod(byte, len(ACTS))
        ACTS[act](world, number)
    world.drain()
    world.check_end()
