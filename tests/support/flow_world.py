"""The world around a saga with any flow: a store that loads few items, a bus, handlers, an operator, and a parent.

What must hold of every decision is written down in `check_decision`; of every commit, in `check_rows`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from coordinator.acts import NotPossibleError
from coordinator.decide import decide
from coordinator.decision import (
    Acted,
    Answer,
    Asked,
    Decision,
    Elapsed,
    Happened,
    Input,
    Recalled,
    Replied,
    Request,
    Resolution,
    Started,
    Verb,
)
from coordinator.flow import Each, Leaf, Node, Sequence, nodes
from coordinator.instance import Instance, Origin, Status, StepState, StepStatus, step_and_item
from coordinator.items import next_items
from coordinator.testing import PARENT_ID
from coordinator.waits import Wait
from events.derive import derive_id
from events.envelope import Direction, Result
from events.message import Event
from tests.support.drawn_flows import Begun, DrawnFlow, No, Tape, Told, Yes
from tests.support.sagas import SAGA_ID, START

DO, UNDO = Direction.DO, Direction.UNDO
LOOK = 2  # items that the store reads at once where it does not know which of them matter: here few
GONE = (StepStatus.UNDOING, StepStatus.UNDONE)

LEGAL = {
    Status.RUNNING: set(Status),
    Status.COMPENSATING: {Status.COMPENSATING, Status.COMPENSATED, Status.NEEDS_ATTENTION},
    # A parent recalls it; or what a branch was given up on has happened after all.
    Status.COMPLETED: set(Status),
    Status.COMPENSATED: {Status.COMPENSATED, Status.COMPENSATING, Status.NEEDS_ATTENTION},
    Status.NEEDS_ATTENTION: set(Status),
}


@dataclass
class World:
    """A saga with what is around it.

    Handlers record the commands that they have answered, and answer a duplicate with the same words; their effects
    happen once for each idempotency key. A fenced handler also refuses a command whose compensation it has seen; where
    handlers are not fenced, no message is lost for good and no dead letter is replayed. The operator knows what has
    happened, and sees to things by hand before saying so.
    """

    drawn: DrawnFlow
    answers: Tape
    fenced: bool
    is_child: bool
    instance: Instance | None = None
    rows: dict[str, StepState] = field(default_factory=dict)
    now: datetime = START
    commands: list[Request] = field(default_factory=list)
    replies: list[Replied] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    inbox: dict[UUID, Result] = field(default_factory=dict)
    effects: list[tuple[str, Direction]] = field(default_factory=list)
    declined: dict[str, int] = field(default_factory=dict)
    barred: set[UUID] = field(default_factory=set)
    standing: set[str] = field(default_factory=set)
    parked: dict[str, Event] = field(default_factory=dict)
    told: list[Answer] = field(default_factory=list)
    announced: list[UUID] = field(default_factory=list)
    ended: set[Status] = field(default_factory=set)
    excused: set[str] = field(default_factory=set)
    by_hand: set[str] = field(default_factory=set)
    lifted: set[str] = field(default_factory=set)
    recalls: int = 0
    messages: int = 0

    def __post_init__(self) -> None:
        self.definition = self.drawn.definition()
        self.paths: dict[str, tuple[tuple[Node, int], ...]] = {}
        self._note_paths(self.definition.flow, ())
        self.fans = [node for node in self.definition.by_name.values() if isinstance(node, Each)]
        origin = Origin(PARENT_ID, "child", 1, "tests") if self.is_child else None
        self.take(Started(SAGA_ID, Begun(sizes=()), "start", START, origin=origin))

    @property
    def at(self) -> Instance:
        assert self.instance is not None
        return self.instance

    @property
    def states(self) -> dict[str, StepState]:
        """All steps and all items, as they are stored."""
        return {**self.at.steps, **self.rows}

    @property
    def due_at(self) -> datetime | None:
        """When the coordinator looks at the saga next."""
        if not self.at.status.in_flight:
            return None
        due = [at.due_at for at in self.rows.values() if at.due_at is not None]
        return min([*due, *([self.at.due_at] if self.at.due_at else [])], default=None)

    # What the coordinator does

    def take(self, *inputs: Input) -> list[Decision]:
        """Decide on a batch: what it may need is loaded once, and written once."""
        loaded = current = None if self.instance is None else self._load(inputs)
        decisions = []
        for given in inputs:
            decision = decide(self.definition, current, given)
            assert decision == decide(self.definition, current, given)  # I18
            if decision is None:
                continue
            self.check_decision(current, decision, given)
            decisions.append(decision)
            current = decision.instance
            self._send(decision)
        if decisions and current is not None:
            self._write(loaded, current)
            self.check_rows()
        return decisions

    def _load(self, inputs: Iterable[Input]) -> Instance:
        names = [given.step for given in inputs if isinstance(given, Replied | Acted) and given.step in self.rows]
        found = {str(name): self.rows[str(name)] for name in names}
        is_due = any(isinstance(given, Elapsed) for given in inputs)
        for node in self.fans:
            at = self.at.steps.get(node.name)
            if at is None or at.fan is None or not self.at.status.in_flight:
                continue
            answers = len({name for name in names if step_and_item(str(name))[0] == node.name})
            if is_due and at.fan.pending:
                own = [(each.due_at, name) for name, each in self.rows.items() if step_and_item(name)[0] == node.name]
                due = sorted((due_at, name) for due_at, name in own if due_at is not None and due_at <= self.now)
                found |= {name: self.rows[name] for _, name in due[:LOOK]}
            numbers = next_items(self.at, node, answers, on_time=is_due, look=LOOK)
            found |= {f"{node.name}[{number}]": self.rows[f"{node.name}[{number}]"] for number in numbers}
        return replace(self.at, steps={**self.at.steps, **found})

    def _write(self, loaded: Instance | None, instance: Instance) -> None:
        before = loaded.steps if loaded else {}
        steps = {}
        for name, at in instance.steps.items():
            stored = StepState.from_json(at.to_json())
            assert stored == at
            if step_and_item(name)[1] is None:
                steps[name] = stored
            elif before.get(name) != at:
                self.rows[name] = stored
        self.instance = replace(instance, steps=steps)

    def _send(self, decision: Decision) -> None:
        self.asked += decision.requests
        self.announced += [each.id for each in decision.announcements]
        assert len(set(self.announced)) == len(self.announced), "an end is announced twice"
        self.commands += decision.requests
        self.told += decision.answers
        self.standing |= {each.step for each in decision.waits}
        self.standing -= set(decision.over)
        if decision.announcements:
            self.ended.add(decision.instance.status)

    def tick(self) -> None:
        """Let the next deadline pass."""
        if (due_at := self.due_at) is not None:
            self.now = max(self.now, due_at)
        self.take(Elapsed(self.now))

    def wait_in_vain(self) -> None:
        """Look at the deadlines too early."""
        if (due_at := self.due_at) is not None and due_at > self.now:
            assert self.take(Elapsed(due_at - timedelta.resolution)) == []  # I12

    # What the bus does; a number says to which message

    def deliver_command(self, number: int, *, keep: bool = False) -> None:
        if self.commands:
            at = number % len(self.commands)
            self.handle(self.commands[at] if keep else self.commands.pop(at))

    def deliver_reply(self, number: int) -> None:
        if self.replies:
            self.take(replace(self.replies.pop(number % len(self.replies)), now=self.now))

    def deliver_replies(self, number: int) -> None:
        """Deliver several in one batch."""
        batch = [replace(reply, now=self.now) for reply in self.replies[: 2 + number % 3]]
        del self.replies[: len(batch)]
        if batch:
            self.take(*batch)

    def deliver_twice(self, number: int) -> None:
        """I2: what is said a second time changes nothing."""
        if self.replies:
            reply = replace(self.replies.pop(number % len(self.replies)), now=self.now)
            self.take(reply)
            states = self.states
            [decision] = self.take(reply)
            assert (decision.requests, decision.announcements, decision.answers) == ((), (), ())
            assert self.states == states

    def lose_command(self, number: int) -> None:
        if self.commands and self.fenced:
            self.commands.pop(number % len(self.commands))

    def lose_reply(self, number: int) -> None:
        """Replies to attempts that were given up on come late, but they come: nobody would ask for them again."""
        if self.replies and self.fenced:
            at = number % len(self.replies)
            lost, of_step = self.replies[at], self.states.get(self.replies[at].step)
            if of_step is not None and lost.attempt >= (of_step.attempt if lost.direction is DO else 0):
                self.replies.pop(at)

    # What the handlers do

    def handle(self, request: Request) -> None:
        result = self.inbox.get(request.id)
        if result is None:
            result = self._execute(request)
            if result is not Result.FAILED or not self.fenced:  # a dead letter may be replayed, and runs again
                self.inbox[request.id] = result
        self.messages += 1
        told = Told(step=request.step)
        message_id = f"m-{self.messages}"
        self.replies.append(
            Replied(request.step, request.direction, request.attempt, result, told, "no", message_id, self.now)
        )

    def _execute(self, request: Request) -> Result:
        name, direction = request.step, request.direction
        answer = self.answers.one_of(0, 0, 1, 0, 2, 0, 3, 0)
        if direction is DO and request.id in self.barred:
            return Result.DECLINED
        if direction is DO and request.attempt < self.declined.get(name, 0):
            return Result.DECLINED  # a no is meant for what was asked before, too
        if answer == 1 and (name, direction) not in self.effects and direction is DO:
            self.declined[name] = request.attempt
            return Result.DECLINED
        if answer == 2:
            return Result.FAILED
        self._have_effect(request)
        return Result.FAILED if answer == 3 else Result.SUCCEEDED  # done, and then broken before anybody heard of it

    def _have_effect(self, request: Request) -> None:
        effect = (request.step, request.direction)
        if effect not in self.effects and (request.direction is DO or (request.step, DO) in self.effects):
            self.effects.append(effect)
        if request.direction is UNDO and self.fenced and request.undoes is not None:
            self.barred.add(request.undoes)

    # What happens in the business, and what the parent wants

    def happen(self, number: int) -> None:
        """Let something happen that the saga waits for, did, or will."""
        if waits := self.definition.waits:
            wait = waits[number % len(waits)]
            self._hand_over(wait, No() if number // 4 % 4 == 1 else Yes())

    def _hand_over(self, wait: Wait, event: Event) -> None:
        waited, states = wait.name in self.standing, self.states
        if not self.take(Happened(wait.name, event, "event", self.now)):
            assert not waited
            self.parked.setdefault(wait.name, event)
        elif not waited:
            assert self.states == states

    def look_for_parked(self) -> bool:
        """Hand over what has come early and is waited for now; say whether there was anything."""
        for wait in self.definition.waits:
            if wait.name in self.standing and wait.name in self.parked:
                self._hand_over(wait, self.parked.pop(wait.name))
                return True
        return False

    def recall(self, number: int) -> None:
        """The parent turns back; it repeats that, or makes another attempt of it."""
        if self.is_child:
            self.recalls = self.recalls + 1 if number % 2 else max(1, self.recalls)
            self.take(Recalled(self.recalls, "recall", self.now))

    def ask_again(self, number: int) -> None:
        origin = self.at.origin
        if origin is not None:
            self.take(Asked(replace(origin, attempt=origin.attempt + number % 2, undo_attempt=0), "again", self.now))

    # What the operator does

    def act(self, number: int, tape: Tape) -> None:
        """Try anything; what makes no sense is refused, and changes nothing."""
        names = sorted(self.states)
        name = names[number % len(names)] if names else None
        verb: Verb = tape.one_of(*Verb)
        if verb in (Verb.CANCEL, Verb.COMPENSATE):
            self.try_act(verb, None)
        elif verb is Verb.RESOLVE:
            resolution: Resolution = tape.one_of(*Resolution)
            if name is not None and self._is_true(name, resolution):
                self.try_act(verb, name, resolution=resolution)
        elif verb is Verb.MOVE_DEADLINE:
            until = self.now + timedelta(seconds=tape.one_of(1, 20, 100))
            self.try_act(verb, tape.one_of(name, name, None), until=until)
        else:
            self.try_act(verb, name)

    def try_act(self, verb: Verb, name: str | None, **said: Any) -> bool:
        before, status = self.at.revision, self.states[name].status if name in self.states else None
        given = Acted(verb, "ada", "a test", self.now, name, revision=before, **said)
        if verb is Verb.CANCEL_DEADLINE:
            self.lifted.add(str(name))
        try:
            self.take(given)
        except NotPossibleError:
            assert self.at.revision == before
            return False
        if (verb is Verb.SKIP and status in (StepStatus.UNDO_FAILED, StepStatus.UNDO_RETRYING)) or (
            said.get("resolution") is Resolution.UNDONE
        ):
            self._undo_by_hand(str(name))
        elif verb is Verb.SKIP:
            self.excused.add(str(name))
        elif said.get("resolution") is Resolution.DECLINED:
            self._bar(str(name))
        return True

    def _is_true(self, name: str, resolution: Resolution) -> bool:
        done = (name, DO) in self.effects
        return {Resolution.SUCCEEDED: done, Resolution.DECLINED: not done}.get(resolution, True)

    def _undo_by_hand(self, name: str) -> None:
        self.by_hand.add(name)
        if (name, DO) in self.effects and (name, UNDO) not in self.effects:
            self.effects.append((name, UNDO))
        self._bar(name)

    def _bar(self, name: str) -> None:
        self.barred |= {each.id for each in self.asked if each.step == name and each.direction is DO}

    # What must hold after every decision

    def check_decision(self, before: Instance | None, decision: Decision, given: Input) -> None:
        instance, entry = decision.instance, decision.entry
        # I10: revisions without a gap, on a legal path, each with what changed and what was sent
        assert instance.revision == (before.revision if before else 0) + 1
        assert entry.status is instance.status
        if before is not None:
            assert instance.status in LEGAL[before.status]
            assert not (before.turned_back and instance.status in (Status.RUNNING, Status.COMPLETED))
            assert instance.state == {**before.state, **entry.change.get("state", {})}
        steps = {name: at.to_history() for name, at in (before.steps if before else {}).items()}
        assert {name: at.to_history() for name, at in instance.steps.items()} == {
            **steps,
            **entry.change.get("steps", {}),
        }
        assert len(entry.sent) == len(decision.requests) + len(decision.announcements) + len(decision.answers)
        assert (instance.due_at is None) or instance.status.in_flight
        if decision.announcements:
            assert instance.status in (Status.COMPLETED, Status.COMPENSATED)
        if instance.status is Status.NEEDS_ATTENTION:
            assert instance.reason
        for number, request in enumerate(decision.requests):
            self._check_request(before, decision, request, [*self.asked, *decision.requests[:number]], given)

    def _check_request(
        self, before: Instance | None, decision: Decision, request: Request, asked: list[Request], given: Input
    ) -> None:
        name = request.step
        assert request.id == derive_id(SAGA_ID, name, request.direction.value, request.attempt)
        same = [each for each in asked if each.id == request.id]
        if same:
            assert isinstance(given, Elapsed | Acted)
            assert all(each == request for each in same)
            return
        of_step = [each.attempt for each in asked if (each.step, each.direction) == (name, request.direction)]
        assert request.attempt == max(of_step, default=0) + 1
        if request.direction is DO:
            # I4: nothing begins where all is undone
            assert not decision.instance.turned_back
            if before is not None:
                around = [before.steps[each.name] for each in self.definition.around(name) if each.name in before.steps]
                assert not [branch for branch in around if branch.status in GONE]
            self._check_limit(decision.instance, name)
        else:
            assert [each for each in asked if (each.step, each.direction) == (name, DO)]
            was, node = before and before.steps.get(name), self.definition.by_name[step_and_item(name)[0]]
            has_failed = was and was.status in (StepStatus.RUNNING, StepStatus.RETRYING)
            is_alone = isinstance(node, Each) and node.collect and has_failed  # even if its branch turns back as well
            if request.attempt == 1 and not is_alone:
                self._check_order(decision.instance, name)

    def _check_limit(self, instance: Instance, name: str) -> None:
        node = self.definition.by_name[step_and_item(name)[0]]
        if isinstance(node, Each):
            items = {**self.rows, **instance.steps}
            own = [at for each, at in items.items() if step_and_item(each)[0] == node.name and each != node.name]
            assert sum(at.status.pending for at in own) <= node.limit

    def _check_order(self, instance: Instance, name: str) -> None:
        """I3: what comes later in a sequence is undone by now."""
        step, number = step_and_item(name)
        path = self.paths[step]
        gone = [each for each in self.definition.around(name) if instance.steps[each.name].status in GONE]
        if gone:  # undone alone, apart from what is around it
            inside = {part for part in nodes(gone[0].part) if not isinstance(part, Leaf)}
            path = tuple((node, at) for node, at in path if node in inside)
        elif not instance.turned_back:
            return  # an item alone
        states = {**self.rows, **instance.steps}
        for node, at in path:
            if isinstance(node, Sequence) and not node.side_by_side:
                later = {part.name for each in node.parts[at + 1 :] for part in nodes(each) if isinstance(part, Leaf)}
                self._check_undone({each: state for each, state in states.items() if step_and_item(each)[0] in later})
        if number is not None:
            last = {each: state for each, state in states.items() if step_and_item(each)[0] == step}
            self._check_undone(
                {each: at for each, at in last.items() if (step_and_item(each)[1] or -1) > number}, pending=False
            )

    def _check_undone(self, states: dict[str, StepState], *, pending: bool = True) -> None:
        for name, at in states.items():
            step = self.definition.step_of(name)
            assert not (pending and at.status.pending), f"{name} is {at.status}"
            if step is not None and step.undo is not None and at.fan is None:
                assert not at.status.to_undo, f"{name} is {at.status}"

    def check_rows(self) -> None:
        instance, states = self.at, self.states
        for node in self.fans:
            if node.name in instance.steps:
                self._check_fan(node, instance.steps[node.name])
        waiting = {each.name for each in self.definition.waits if each.name in states}
        assert self.standing == {name for name in waiting if states[name].status is StepStatus.WAITING}
        if not instance.status.in_flight:
            return
        # I1: what is in flight waits for something that comes, by itself at last
        leaves = {name: at for name, at in states.items() if step_and_item(name)[0] in self.definition.by_name}
        pending = [name for name, at in leaves.items() if at.status.pending and at.fan is None]
        assert pending or any(at.fan is not None and at.due_at is not None for at in leaves.values())
        for name in pending:
            assert leaves[name].due_at is not None or name in self.lifted | waiting, f"{name} waits for ever"

    def _check_fan(self, node: Each, at: StepState) -> None:
        fan = at.fan
        assert fan is not None
        own = [self.rows[f"{node.name}[{number}]"].status for number in range(fan.total)]
        assert len(own) == self.drawn.sizes[node.name]
        assert fan.begun == sum(status is not StepStatus.LISTED for status in own)
        assert StepStatus.LISTED not in own[: fan.begun]
        assert fan.pending == sum(status.pending for status in own)
        assert fan.stuck == sum(status is StepStatus.UNDO_FAILED for status in own)

    # Until nothing is under way any more

    def drain(self) -> None:
        """Let everything arrive and every deadline pass."""
        for _ in range(3000):
            if self.commands:
                self.deliver_command(0)
            elif self.replies:
                self.deliver_reply(0)
            elif self.look_for_parked():
                pass
            elif self.due_at is not None:
                self.tick()
            elif self.at.status.in_flight:
                self._go_on_without_deadline()
            else:
                return
        raise AssertionError(f"it does not come to an end: {self.at}")

    def _go_on_without_deadline(self) -> None:
        """What has no deadline is waited for as long as it takes; somebody sees to it."""
        for name, at in self.states.items():
            if name in self.standing:
                self.happen([each.name for each in self.definition.waits].index(name))
                return
            if name in self.lifted and at.status.pending and self.try_act(Verb.RETRY, name):
                return
        raise AssertionError(f"it is {self.at.status}, and waits for nothing: {self.states}")

    def settle(self) -> None:
        """Let an operator see to everything that needs attention, until nothing does."""
        self.drain()
        for _ in range(100):
            if self.at.status is not Status.NEEDS_ATTENTION:
                return
            assert self._see_to_one(), f"nobody can help: {self.at.reason}: {self.states}"
            self.drain()
        raise AssertionError(f"it needs attention for ever: {self.at.reason}: {self.states}")

    def _see_to_one(self) -> bool:
        stuck = (StepStatus.UNDO_FAILED, StepStatus.UNKNOWN, StepStatus.DECLINED, StepStatus.RUNNING)
        names = [name for name, at in self.states.items() if at.status in stuck and at.fan is None]
        return any(self.try_act(verb, name) for verb in (Verb.RETRY, Verb.SKIP) for name in names)

    def _note_paths(self, node: Node, path: tuple[tuple[Node, int], ...]) -> None:
        if isinstance(node, Leaf):
            self.paths[node.name] = path
            return
        for number, part in enumerate(node.parts):
            self._note_paths(part, (*path, (node, number)))


Op = Callable[[World, int, Tape], None]
OPS: tuple[Op, ...] = (
    *(lambda world, number, _: world.deliver_command(number),) * 4,
    *(lambda world, number, _: world.deliver_reply(number),) * 4,
    lambda world, number, _: world.deliver_replies(number),
    lambda world, number, _: world.deliver_twice(number),
    lambda world, number, _: world.deliver_command(number, keep=True),
    lambda world, _, __: world.tick(),
    lambda world, _, __: world.tick(),
    lambda world, _, __: world.wait_in_vain(),
    lambda world, number, _: world.lose_command(number),
    lambda world, number, _: world.lose_reply(number),
    lambda world, number, _: world.happen(number),
    lambda world, _, __: world.look_for_parked() and None,
    lambda world, number, tape: world.act(number, tape),
    lambda world, number, tape: world.act(number, tape),
    lambda world, number, _: world.recall(number) if number % 4 == 1 else None,
    lambda world, number, _: world.ask_again(number),
)
