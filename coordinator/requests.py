"""Commands to the handlers: what a step asks for, what undoes it, each as attempts with a deadline. Pure."""

from datetime import timedelta

from coordinator.decision import Request
from coordinator.draft import Draft
from coordinator.instance import StepStatus, step_and_item
from coordinator.steps import Deadline, Hook, Step
from events.derive import derive_id
from events.envelope import Direction, Result
from events.message import Command


def undo(draft: Draft, step: Step, name: str) -> None:
    """Send the compensation of a step, or of one of its items, as a new attempt; `name` is that of its state."""
    at = draft.steps[name]
    attempt = at.undo_attempt + 1
    # From now on only this tells a success that comes a second time from one that comes late.
    answer = Result.SUCCEEDED if at.status is StepStatus.SUCCEEDED else at.answer
    alone = _go_on_with(draft, name)
    draft.set(name, status=StepStatus.UNDOING, answer=answer, undo_attempt=attempt, sends=0, made_of=None, alone=alone)
    send(draft, step, name, Direction.UNDO, attempt, 1)


def _go_on_with(draft: Draft, name: str) -> bool:
    """Let the step whose item is undone be under way, if it was over; say whether the other items go on."""
    step, number = step_and_item(name)
    if number is None:
        return False
    goes_on = draft.steps[step].status in (StepStatus.RUNNING, StepStatus.SUCCEEDED)
    draft.set(step, status=StepStatus.RUNNING if goes_on else StepStatus.UNDOING)
    return goes_on


def try_anew(draft: Draft, step: Step, name: str) -> None:
    """Send the command of a step, or of one of its items, as a new attempt."""
    attempt = draft.steps[name].attempt + 1
    draft.set(name, status=StepStatus.RUNNING, attempt=attempt, sends=0)
    send(draft, step, name, Direction.DO, attempt, 1)


def send(draft: Draft, step: Step, name: str, direction: Direction, attempt: int, sends: int) -> None:
    """Ask the saga for the command and send it; if the saga cannot make it, nothing was done."""
    hook: Hook | None = step if direction is Direction.DO else step.undo
    deadline: Deadline = step.deadline if direction is Direction.DO else step.undo_deadline
    command, error = draft.ask_for(hook, name)
    if error is None and not isinstance(command, Command):
        error = f"it must return a Command, not {type(command).__name__}"
    if error is not None:
        if direction is Direction.DO:
            never_sent = draft.steps[name].sends == 0 and attempt == 1
            draft.settle(name, StepStatus.DECLINED if never_sent else StepStatus.UNKNOWN)
            draft.fail(name, f"{name} could not be asked for: {error}")
        else:
            draft.settle(name, StepStatus.UNDO_FAILED)
            draft.explain(f"{name} could not be undone: {error}")
        return
    due_at = draft.now + timedelta(seconds=deadline.wait(sends))
    identity = derive_id(draft.before.id, name, direction.value, attempt)
    if direction is Direction.DO:
        named = command.message_type if step.undo is not None else None
        draft.set(name, sends=sends, due_at=due_at, command=named)
        draft.requests.append(Request(identity, command, name, direction, attempt))
        return
    draft.set(name, sends=sends, due_at=due_at)
    at = draft.steps[name]
    undoes = derive_id(draft.before.id, name, Direction.DO.value, at.attempt) if at.command else None
    draft.requests.append(Request(identity, command, name, direction, attempt, undoes, at.command))
