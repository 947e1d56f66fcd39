"""Walking through the flow of a saga: what is begun next, what is undone next, and the end."""

from datetime import timedelta

from coordinator.decision import Announcement, Request
from coordinator.draft import MAX_REASON, Draft
from coordinator.flow import Node, Parallel, Sequence, When, nodes
from coordinator.instance import Status, StepState, StepStatus
from coordinator.steps import Deadline, Hook, Step
from events.derive import derive_id
from events.envelope import Direction, Result
from events.message import Command, Event


def walk(draft: Draft) -> None:
    """Send what comes next in the saga's direction, or end it: one walk for both ways."""
    while draft.status.in_flight:
        direction = draft.status
        go = _advance if direction is Status.RUNNING else _retreat
        if go(draft, draft.definition.flow):
            _end(draft)
        elif draft.status is direction:
            if draft.is_stuck and not any(at.status.pending for at in draft.steps.values()):
                draft.status = Status.NEEDS_ATTENTION  # of several stuck steps one went on, and another has not
            return  # answers are outstanding


def _advance(draft: Draft, node: Node) -> bool:
    """Begin what can be begun of `node`; say whether all of it is done."""
    if draft.status is not Status.RUNNING:
        return False
    match node:
        case Sequence(parts):
            return all(_advance(draft, part) for part in parts)
        case Parallel(parts):
            done = [_advance(draft, part) for part in parts]
            return all(done)
        case When():
            chosen = _choose(draft, node)
            return chosen is not None and all(_advance(draft, part) for part in chosen)
    if node.name not in draft.steps:
        draft.steps[node.name] = StepState(StepStatus.RUNNING)
        send(draft, node, Direction.DO, 1, 1)
    return draft.steps[node.name].status is StepStatus.SUCCEEDED


def _retreat(draft: Draft, node: Node) -> bool:
    """Undo what can be undone of `node`; say whether there is nothing more to do, or to wait for."""
    match node:
        case Sequence(parts):
            busy = [part for part in parts if _is_busy(draft, part)]  # a late success waits for its turn
            return all(_retreat(draft, part) for part in busy or reversed(parts)) and not busy
        case Parallel(parts):
            done = [_retreat(draft, part) for part in reversed(parts)]
            return all(done)
        case When(parts=parts):  # only what was begun has a state
            return all(_retreat(draft, part) for part in reversed(parts))
    at = draft.steps.get(node.name)
    if at is not None and at.status.to_undo and node.undo is not None:
        undo(draft, node)
    return not (at and draft.steps[node.name].status.pending)


def _is_busy(draft: Draft, part: Node) -> bool:
    """Say whether an answer or a next attempt is awaited in `part`."""
    names = (node.name for node in nodes(part) if isinstance(node, Step))
    return any(name in draft.steps and draft.steps[name].status.pending for name in names)


def _choose(draft: Draft, node: When) -> tuple[Node, ...] | None:
    """Return the part to take, in a tuple, or an empty one; None if the condition cannot be asked."""
    name = node.condition.name
    if name not in draft.steps:
        holds, error = draft.ask(node.condition)
        if error is None and not isinstance(holds, bool):
            error = f"it must return True or False, not {type(holds).__name__}"
        if error is not None:
            draft.turn_back(f"{name} could not be told: {error}")
            return None
        draft.steps[name] = StepState(StepStatus.TAKEN if holds else StepStatus.NOT_TAKEN)
    taken = node.then if draft.steps[name].status is StepStatus.TAKEN else node.otherwise
    return () if taken is None else (taken,)


def undo(draft: Draft, step: Step) -> None:
    """Send the compensation of a step as a new attempt."""
    at = draft.steps[step.name]
    attempt = at.undo_attempt + 1
    # From now on only this tells a success that comes a second time from one that comes late.
    answer = Result.SUCCEEDED if at.status is StepStatus.SUCCEEDED else at.answer
    draft.set(step.name, status=StepStatus.UNDOING, answer=answer, undo_attempt=attempt, sends=0, made_of=None)
    send(draft, step, Direction.UNDO, attempt, 1)


def try_anew(draft: Draft, step: Step) -> None:
    """Send the command of a step as a new attempt."""
    attempt = draft.steps[step.name].attempt + 1
    draft.set(step.name, status=StepStatus.RUNNING, attempt=attempt, sends=0)
    send(draft, step, Direction.DO, attempt, 1)


def send(draft: Draft, step: Step, direction: Direction, attempt: int, sends: int) -> None:
    """Ask the saga for the command and send it; if the saga cannot make it, nothing was done."""
    hook: Hook | None = step if direction is Direction.DO else step.undo
    deadline: Deadline = step.deadline if direction is Direction.DO else step.undo_deadline
    command, error = draft.ask(hook, state=draft.steps[step.name].made_of)
    if error is None and not isinstance(command, Command):
        error = f"it must return a Command, not {type(command).__name__}"
    if error is not None:
        if direction is Direction.DO:
            never_sent = draft.steps[step.name].sends == 0 and attempt == 1
            draft.settle(step.name, StepStatus.DECLINED if never_sent else StepStatus.UNKNOWN)
            draft.turn_back(f"{step.name} could not be asked for: {error}")
        else:
            draft.settle(step.name, StepStatus.UNDO_FAILED)
            draft.explain(f"{step.name} could not be undone: {error}")
        return
    due_at = draft.now + timedelta(seconds=deadline.wait(sends))
    identity = derive_id(draft.before.id, step.name, direction.value, attempt)
    if direction is Direction.DO:
        named = command.message_type if step.undo is not None else None
        draft.set(step.name, sends=sends, due_at=due_at, command=named)
        draft.requests.append(Request(identity, command, step.name, direction, attempt))
        return
    draft.set(step.name, sends=sends, due_at=due_at)
    at = draft.steps[step.name]
    undoes = derive_id(draft.before.id, step.name, Direction.DO.value, at.attempt) if at.command else None
    draft.requests.append(Request(identity, command, step.name, direction, attempt, undoes, at.command))


def _end(draft: Draft) -> None:
    """All steps are done, or all that can be undone is: say so."""
    arguments: tuple[str, ...] = ()
    if draft.status is Status.RUNNING:
        draft.status, ending = Status.COMPLETED, draft.definition.on_completed
    elif any(at.status is StepStatus.UNDO_FAILED for at in draft.steps.values()):
        draft.status = Status.NEEDS_ATTENTION
        return
    else:
        draft.status, ending, arguments = Status.COMPENSATED, draft.definition.on_compensated, (draft.reason or "",)
    if ending is None:
        return
    event, error = draft.ask(ending, *arguments)
    if error is None and event is not None and not isinstance(event, Event):
        error = f"it must return an Event or None, not {type(event).__name__}"
    if error is not None:
        draft.reason = f"{draft.status.value}, but {ending.name} failed: {error}"[:MAX_REASON]
        draft.status = Status.NEEDS_ATTENTION
    elif event is not None:
        draft.announcements.append(Announcement(derive_id(draft.before.id, "announce", draft.status.value), event))
