"""An instance in the making: what a decision changes of it, and what it asks the saga's methods."""

from copy import deepcopy
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from pydantic_core import from_json, to_json

from coordinator.decision import Announcement, Answer, Decision, HistoryEntry, Request, Standing
from coordinator.definition import Branch, Saga, SagaDefinition
from coordinator.flow import Each, Leaf, Node, nodes
from coordinator.instance import Fan, Instance, Status, StepState, StepStatus, item_name, step_and_item
from coordinator.steps import Hook
from coordinator.waits import Wait
from events.derive import derive_id
from events.envelope import Direction, Result
from events.message import Message, Refused, Succeeded

MAX_REASON = 1000
_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit)


class Draft:
    """An instance in the making: the only thing that changes here, and it lives for one decision."""

    def __init__(self, definition: SagaDefinition, instance: Instance, now: datetime) -> None:
        self.definition = definition
        self.before = instance
        self.now = now
        self.saga: Saga = definition.cls.from_state(instance.state)
        # As the class writes it: a database may write the same number otherwise.
        self.state = self.found = self.saga.to_state()
        self.steps = dict(instance.steps)
        self.status = instance.status
        self.reason = instance.reason
        self.turned_back = instance.turned_back
        self.origin = instance.origin
        self.announced = instance.announced
        self.limit = instance.deadline
        self.requests: list[Request] = []
        self.announcements: list[Announcement] = []
        self.answers: list[Answer] = []
        self.waits: list[Standing] = []
        self.failed_items: list[str] = []  # which the others go on without
        self._counted = {name: at.status for name, at in instance.steps.items()}
        self._touched: set[str] = set()

    def set(self, step: str, **changes: Any) -> None:
        self.steps[step] = replace(self.steps[step], **changes)
        if step_and_item(step)[1] is not None:
            self._touched.add(step)

    def settle(self, step: str, status: StepStatus, **changes: Any) -> None:
        """Set the status of a step from which no answer is awaited any more."""
        self.set(step, status=status, due_at=None, made_of=None, before_turn=None, alone=False, **changes)

    def turn(self, step: str) -> None:
        """Let a step for several items go back. What is sent again of before says what it said: keep what that was."""
        at = self.steps[step]
        under_way = at.fan is not None and at.fan.pending
        before = (self.state if at.made_of is None else at.made_of) if under_way else None
        self.settle(step, StepStatus.UNDOING)
        self.set(step, before_turn=before)

    def change(self, saga: Saga, state: dict[str, Any]) -> None:
        """Give the saga another state. A command that is sent again says what it said before: keep what that was."""
        for name, at in self.steps.items():
            if at.status.outstanding and at.made_of is None and step_and_item(name)[1] is None:
                self.set(name, made_of=self.state)
        self.saga, self.state = saga, state

    def explain(self, reason: str) -> None:
        """Keep the first reason: what comes later follows from it."""
        if self.reason is None:
            self.reason = reason[:MAX_REASON]

    @property
    def is_past_pivot(self) -> bool:
        """Whether there is no way back: a pivot has begun, and has not been declined. Until it answers nobody knows."""
        begun = (step.name for step in self.definition.steps if step.pivot and step.name in self.steps)
        return any(self.steps[name].status is not StepStatus.DECLINED for name in begun)

    @property
    def is_pending(self) -> bool:
        """Whether an answer, an event or a time is awaited anywhere."""
        own = (at for name, at in self.steps.items() if name in self.definition.by_name)
        return any((at.fan.pending or at.due_at) if at.fan else at.status.pending for at in own)

    @property
    def has_stuck(self) -> bool:
        """Whether something could not be undone."""
        return any(at.status is StepStatus.UNDO_FAILED or (at.fan and at.fan.stuck) for at in self.steps.values())

    def recount(self, name: str) -> None:
        """Take the change of an item into the count of its step, where somebody looks before the walk does."""
        node = self.definition.by_name.get(step_and_item(name)[0])
        if isinstance(node, Each) and step_and_item(name)[1] is not None:
            fan = self.count_items(node)
            if self.steps[node.name].status is StepStatus.UNDO_FAILED and not fan.stuck:
                self.settle(node.name, StepStatus.UNDONE)

    def turn_back(self, reason: str, part: str | None = None) -> None:
        """Begin to undo what was done: all of it, or the branch with the failed `part` where others are enough.

        Where there is no way back a person must look.
        """
        for branch in reversed(self.definition.around(part) if part else ()):
            if self.steps[branch.name].status is not StepStatus.RUNNING:
                return  # it is undone already
            enough = self._others_are_enough(branch)
            if enough or not self.is_past_pivot:  # else it is needed, and somebody has to help it on
                self.turn_branch_back(branch)
            if enough:
                return
        self.explain(reason)
        if self.is_past_pivot:
            self.status = Status.NEEDS_ATTENTION
            return
        self.status = Status.COMPENSATING
        self.turned_back = True
        self._call_off(self.definition.flow)

    def fail(self, name: str, reason: str) -> None:
        """A step, or one item of it, has failed: turn back, unless the other items go on without it."""
        step, number = step_and_item(name)
        node = self.definition.by_name[step]
        if number is None or not isinstance(node, Each) or not node.collect or self.goes_back(step):
            self.turn_back(reason, name)
        else:
            self.failed_items.append(name)

    def goes_on(self, part: str) -> bool:
        """Whether the saga, with the branches around `part`, goes on."""
        return self.status is Status.RUNNING and self.branch_turned_back(part) is None

    def goes_back(self, part: str) -> bool:
        """Whether the saga, or a branch around `part`, turns back, or has; it may need attention in between."""
        return self.turned_back or self.branch_turned_back(part) is not None

    def turn_branch_back(self, branch: Branch) -> None:
        """Begin to undo a branch alone."""
        self.set(branch.name, status=StepStatus.UNDOING)
        self._call_off(branch.part)

    def branch_turned_back(self, part: str) -> Branch | None:
        """Return the innermost branch around `part` that is undone alone, or was."""
        gone = (StepStatus.UNDOING, StepStatus.UNDONE)
        around = reversed(self.definition.around(part))
        return next((branch for branch in around if self.steps[branch.name].status in gone), None)

    def resume(self) -> None:
        """Let a saga that needed attention go on in its direction."""
        if self.status is Status.NEEDS_ATTENTION:
            self.status = Status.COMPENSATING if self.turned_back else Status.RUNNING

    def reopen(self, name: str) -> None:
        """Go on undoing where `name` could not be undone: the whole saga, or the branch that it is in."""
        if not self.turned_back:
            self.reopen_branches(name)
        self.resume()

    def reopen_branches(self, name: str) -> None:
        """Let branches around `name` that are undone be undone once more."""
        for branch in self.definition.around(name):
            if self.steps[branch.name].status is StepStatus.UNDONE:
                self.set(branch.name, status=StepStatus.UNDOING)

    def _others_are_enough(self, branch: Branch) -> bool:
        others = [each for each in self.definition.branches[branch.parallel] if each is not branch]
        states = [self.steps.get(each.name) for each in others]
        left = [at for at in states if at is None or at.status in (StepStatus.RUNNING, StepStatus.SUCCEEDED)]
        return len(left) >= branch.parallel.needed

    def _call_off(self, node: Node) -> None:
        """Wait no more in `node`; what goes back waits for nothing but its compensations, and tries nothing anew."""
        for name in (part.name for part in nodes(node) if isinstance(part, Leaf) and part.name in self.steps):
            if self.steps[name].status is StepStatus.WAITING:
                self.settle(name, StepStatus.CALLED_OFF)
            elif self.steps[name].status is StepStatus.RETRYING:
                self.settle(name, StepStatus.UNKNOWN)

    @property
    def is_stuck(self) -> bool:
        """Whether there is no way back, and a step is why there is no way on either."""
        if not self.is_past_pivot or self.turned_back:
            return False
        begun = [node for node in self.definition.fans if node.name in self.steps and not node.collect]
        failed = [node for node in begun if self.count_items(node).failed]  # of which not all are loaded
        return any(self.is_why_stuck(name) for name in self.steps) or any(
            self.branch_turned_back(node.name) is None for node in failed
        )

    def is_why_stuck(self, name: str) -> bool:
        """Whether a step that has failed stands in the way of a saga that cannot go back."""
        node = self.definition.by_name.get(step_and_item(name)[0])
        failed = self.steps[name].status in (StepStatus.UNKNOWN, StepStatus.DECLINED)
        if node is None or not failed or not self.is_past_pivot or self.goes_back(name):
            return False
        return step_and_item(name)[1] is None or not (isinstance(node, Each) and node.collect)

    def clear(self) -> None:
        """Forget why a saga needed attention that goes on, once its last stuck step does."""
        if self.status is Status.RUNNING and not self.is_stuck:
            self.reason = None

    def wait(self, step: str, status: StepStatus, seconds: float) -> None:
        """Let a step wait for its next attempt."""
        self.settle(step, status)
        self.set(step, due_at=self.now + timedelta(seconds=seconds))

    @property
    def may_turn_back(self) -> bool:
        """Whether the saga as a whole goes on, or will when a person has looked at it, and can still turn back."""
        goes_on = self.status in (Status.WAITING, Status.RUNNING, Status.NEEDS_ATTENTION) and not self.turned_back
        return goes_on and not self.is_past_pivot

    @property
    def deadline(self) -> datetime | None:
        """When the saga as a whole turns back; None if it never does, or cannot any more."""
        return self.limit if self.may_turn_back else None

    # Items

    def count_items(self, each: Each) -> Fan:
        """Take what has become of the loaded items of a step into its count of them; return that."""
        fan = self.steps[each.name].fan
        if fan is None:
            raise ValueError(f"{each.name} was not begun")
        touched = [name for name in self._touched if step_and_item(name)[0] == each.name]
        for name in touched:
            self._touched.discard(name)
            at, before = self.steps[name], self._counted.get(name, StepStatus.LISTED)
            failed = (StepStatus.DECLINED, StepStatus.UNKNOWN)
            anew = at.status in failed and before in (StepStatus.RUNNING, StepStatus.RETRYING)
            is_over = at.status is StepStatus.SUCCEEDED if each.collect else at.status not in failed
            no_more = before in failed and is_over
            fan = replace(
                fan,
                pending=fan.pending + at.status.pending - before.pending,
                failed=fan.failed + anew - no_more,
                stuck=fan.stuck + (at.status is StepStatus.UNDO_FAILED) - (before is StepStatus.UNDO_FAILED),
            )
            self._counted[name] = at.status
        self.set(each.name, fan=fan)
        return fan

    def _count(self) -> None:
        """Count the items whose step the walk did not come to; those that are to be undone are looked at again."""
        for name in [name for name, at in self.steps.items() if self.before.steps.get(name) != at]:
            step, number = step_and_item(name)
            node = self.definition.by_name.get(step)
            if number is None or not isinstance(node, Each):
                continue
            fan = self.count_items(node)
            is_late = fan.unseen is not None and number >= fan.unseen and self.steps[name].status.to_undo
            if is_late and node.step.undo is not None:
                self.set(step, fan=replace(fan, unseen=number + 1))

    def items_of(self, each: Each) -> list[tuple[str, StepState]]:
        """Return the items of a step that are loaded and begun, the first ones first."""
        found = [(step_and_item(name), name) for name in self.steps]
        numbered = sorted((number, name) for (step, number), name in found if step == each.name and number is not None)
        return [(name, self.steps[name]) for _, name in numbered]

    def next_items(self, each: Each, first: int, most: int) -> list[str]:
        """Return the names of loaded items from number `first` on, `most` at most, up to one that is not loaded."""
        names: list[str] = []
        while len(names) < most and item_name(each.name, first + len(names)) in self.steps:
            names.append(item_name(each.name, first + len(names)))
        return names

    # The end

    def answer(self, direction: Direction, result: Result, message: Message) -> None:
        """Tell the parent, if this is a child."""
        if self.origin is None:
            return
        attempt = self.origin.attempt if direction is Direction.DO else self.origin.undo_attempt
        identity = derive_id(self.before.id, "answer", direction.value, attempt)
        self.answers.append(Answer(identity, self.origin, direction, attempt, result, message))

    def answer_as_it_is(self) -> None:
        """Tell the parent how it has ended, if it has."""
        if self.origin is None:
            return
        if self.status is Status.COMPLETED and not self.origin.undo_attempt:
            said = next((each.event for each in self.announcements), None) or self._say_completed()
            self.answer(Direction.DO, Result.SUCCEEDED, said)
        elif self.status is Status.COMPENSATED and not self.origin.undo_attempt:
            self.answer(Direction.DO, Result.DECLINED, Refused(reason=self.reason or ""))
        elif self.status is Status.COMPENSATED:
            self.answer(Direction.UNDO, Result.SUCCEEDED, Succeeded())

    def _say_completed(self) -> Message:
        event, _ = self.ask(self.definition.on_completed)
        return event if isinstance(event, Message) else Succeeded()

    def finish(self, kind: str, **about: Any) -> Decision:
        self._count()
        before, state = self.before, self.state
        change: dict[str, Any] = {}
        found, stored = self.found, before.state  # a class may have got a field since, which is stored from now on
        if changed_state := {k: v for k, v in state.items() if k not in stored or found.get(k) != v}:
            change["state"] = changed_state
        changed = {name: at for name, at in self.steps.items() if before.steps.get(name) != at}
        if changed:
            change["steps"] = {name: at.to_history() for name, at in changed.items()}
        deadline = self.deadline  # one that is over is not kept: whoever looks need not know of pivots
        if deadline != before.deadline:
            change["deadline"] = deadline and deadline.isoformat()
        due = [
            at.due_at
            for name, at in self.steps.items()
            if at.due_at is not None and self.status.in_flight and step_and_item(name)[1] is None
        ]
        if deadline is not None and self.status is not Status.NEEDS_ATTENTION:
            due.append(deadline)
        instance = replace(
            before,
            status=self.status,
            state=state,
            steps=self.steps,
            revision=before.revision + 1,
            due_at=min(due) if due else None,
            reason=self.reason,
            updated_at=self.now,
            turned_back=self.turned_back,
            origin=self.origin,
            announced=self.announced,
            deadline=deadline,
        )
        sent = [
            {"id": str(r.id), "type": r.command.message_type, "step": r.step, "direction": r.direction.value}
            for r in self.requests
        ]
        sent += [{"id": str(a.id), "type": a.event.message_type} for a in self.announcements]
        sent += [{"id": str(a.id), "type": a.message.message_type, "result": a.result.value} for a in self.answers]
        entry = HistoryEntry(kind, self.now, self.status, reason=self.reason, change=change, sent=tuple(sent), **about)
        waiting = {name for name, at in self.steps.items() if at.status is StepStatus.WAITING}
        over = tuple(
            name
            for name, at in before.steps.items()
            if at.status is StepStatus.WAITING
            and name not in waiting
            and isinstance(self.definition.by_name.get(name), Wait)
        )
        return Decision(
            instance,
            tuple(self.requests),
            tuple(self.announcements),
            entry,
            tuple(each for each in self.waits if each.step in waiting),
            over,
            tuple(self.answers),
        )

    # What the saga's methods say

    def apply(self, hook: Hook | None, *outcome: Message, name: str) -> str | None:
        """Let the saga take an outcome into its state; return what went wrong, and then leave the state as it was.

        Of one item of a step (`name` is that of its state) the method gets the item, too, and may return it changed.
        """
        if hook is None:
            return None
        is_item = step_and_item(name)[1] is not None
        about = (deepcopy(self.steps[name].item),) if is_item else ()
        what = "raised"
        try:
            returned = hook.function(self.saga, *about, *outcome)
            if is_item and returned is not None:
                what = "returned what is not JSON:"
                self.set(name, item=from_json(to_json(returned)))
            what = "left a broken state:"
            state = self.saga.to_state()
            if state != self.state:  # what it assigned must be readable again
                self.change(self.definition.cls.from_state(state), state)
        except _NOT_OURS:
            raise
        except BaseException as error:  # noqa: BLE001  # user code raises what it likes, Rust extensions panic
            self.saga = self.definition.cls.from_state(self.state)
            return f"{hook.name} {what} {_shown(error)}"
        return None

    def ask_for(self, hook: Hook | None, name: str) -> tuple[Any, Any]:
        """Ask for the command of a step or of one of its items; `name` is that of its state.

        All items of a step see the state as it was when the first was begun; once it has turned back, when the first
        was undone.
        """
        at, (step, number) = self.steps[name], step_and_item(name)
        if number is None:
            return self.ask(hook, state=at.made_of)
        of_step = self.steps[step]
        before = of_step.before_turn if at.status is StepStatus.RUNNING or at.alone else None
        return self.ask(hook, deepcopy(at.item), state=of_step.made_of if before is None else before)

    def ask(self, hook: Hook | None, *arguments: Any, state: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Ask the saga, as it is now or as it was in `state`; return its answer, or None and what went wrong."""
        if hook is None:
            return None, "there is no method for it"
        saga, before = self.saga, self.state
        if state is not None:
            saga = self.definition.cls.from_state(state)
            before = saga.to_state()
        try:
            message = hook.function(saga, *arguments)
            if _is_unchanged(saga, before):
                return message, None
            error = f"{hook.name} changed the saga, which only a method for an outcome may"
        except _NOT_OURS:
            raise
        except BaseException as broken:  # noqa: BLE001  # user code raises what it likes, Rust extensions panic
            error = f"{hook.name} raised {_shown(broken)}"
        self.saga = self.definition.cls.from_state(self.state)
        return None, error


def _is_unchanged(saga: Saga, state: dict[str, Any]) -> bool:
    try:
        return saga.to_state() == state
    except ValueError:  # it holds what cannot be stored, which the state did not
        return False


def _shown(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:  # noqa: BLE001  # an error that cannot even be shown
        return type(error).__name__
