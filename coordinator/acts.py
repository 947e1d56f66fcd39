"""What an operator does to a saga: retry, skip, compensate, cancel, move a deadline. Pure, like all of the core.

Every act says who and why, and is part of the history. One that makes no sense where the saga stands is refused with
what could be done instead; nothing is changed then.
"""

from coordinator.decision import Acted, Verb
from coordinator.draft import Draft
from coordinator.instance import Status, StepState, StepStatus, step_and_item
from coordinator.requests import send, try_anew, undo
from coordinator.steps import Step
from coordinator.walk import walk
from events.envelope import Direction
from events.errors import CoordinatorError


class NotPossibleError(CoordinatorError):
    """An operator asked for what makes no sense where the saga stands."""

    code = "not_possible"


def act(draft: Draft, given: Acted) -> None:
    """Do what `given` asks for.

    Raises:
        NotPossibleError: it makes no sense here; the draft is not to be used.
    """
    if given.revision not in (None, draft.before.revision):
        raise NotPossibleError(
            f"the saga has moved on: it is at revision {draft.before.revision}, not {given.revision}; look at it again"
        )
    match given.verb:
        case Verb.CANCEL:
            _cancel(draft, given)
        case Verb.COMPENSATE:
            _compensate(draft, given)
        case Verb.RETRY:
            name, at = _begun(draft, given)
            _retry(draft, _step(draft, name), name, at)
        case Verb.SKIP:
            _skip(draft, *_begun(draft, given))
        case Verb.MOVE_DEADLINE:
            _move(draft, given, *_begun(draft, given))
    walk(draft)


def _cancel(draft: Draft, given: Acted) -> None:
    if draft.status is not Status.RUNNING:
        raise NotPossibleError(f"only a running saga can be cancelled; this one is {draft.status}")
    _refuse_past_pivot(draft)
    draft.turn_back(f"cancelled by {given.by}: {given.why}")


def _compensate(draft: Draft, given: Acted) -> None:
    """Undo everything: also what could not be undone before."""
    if draft.status not in (Status.RUNNING, Status.NEEDS_ATTENTION):
        raise NotPossibleError(f"the saga is {draft.status}; there is nothing to compensate")
    _refuse_past_pivot(draft)
    for name, at in list(draft.steps.items()):
        if at.status is StepStatus.UNDO_FAILED:
            draft.settle(name, StepStatus.UNKNOWN)
    draft.turn_back(f"compensated by {given.by}: {given.why}")


def _retry(draft: Draft, step: Step, name: str, at: StepState) -> None:
    """Send the step's command again: the outstanding one as it is, one that has failed as a new attempt."""
    match at.status:
        case StepStatus.RUNNING if at.fan is None:
            send(draft, step, name, Direction.DO, at.attempt, at.sends + 1)
        case StepStatus.UNDOING if at.fan is None:
            send(draft, step, name, Direction.UNDO, at.undo_attempt, at.sends + 1)
        case StepStatus.RETRYING:
            try_anew(draft, step, name)
        case StepStatus.UNDO_RETRYING:
            undo(draft, step, name)
        case StepStatus.UNDO_FAILED if at.fan is None:
            draft.reopen(name)
            undo(draft, step, name)
        case _ if _is_stuck(draft, at):
            draft.status = Status.RUNNING
            try_anew(draft, step, name)
        case _:
            raise NotPossibleError(f"step {name} is {at.status}; there is nothing to retry")


def _skip(draft: Draft, name: str, at: StepState) -> None:
    """Count what has failed as done: somebody has seen to it by hand, or it is not needed; also what is waited for."""
    if at.status in (StepStatus.UNDO_FAILED, StepStatus.UNDO_RETRYING) and at.fan is None:
        draft.settle(name, StepStatus.UNDONE)
        draft.reopen(name)
    elif at.status in (StepStatus.RETRYING, StepStatus.WAITING) or _is_stuck(draft, at):
        draft.settle(name, StepStatus.SUCCEEDED)
        draft.status = Status.RUNNING
    else:
        raise NotPossibleError(f"step {name} is {at.status}; only what has failed for good, or waits, can be skipped")


def _move(draft: Draft, given: Acted, name: str, at: StepState) -> None:
    if not at.status.pending or at.due_at is None or not draft.status.in_flight:
        raise NotPossibleError(f"step {name} is {at.status}; it has no deadline that could be moved")
    if given.until is None or given.until <= given.now:
        raise NotPossibleError("a deadline is moved to a time to come")
    draft.set(name, due_at=given.until)


def _is_stuck(draft: Draft, at: StepState) -> bool:
    """Say whether a step is why a saga goes neither on nor back."""
    failed = at.status in (StepStatus.UNKNOWN, StepStatus.DECLINED)
    return failed and draft.status is Status.NEEDS_ATTENTION and draft.is_past_pivot


def _refuse_past_pivot(draft: Draft) -> None:
    if draft.is_past_pivot:
        raise NotPossibleError("its pivot has begun: there is no way back; retry or skip the step that is stuck")


def _begun(draft: Draft, given: Acted) -> tuple[str, StepState]:
    name = given.step or ""
    at = draft.steps.get(name)
    if at is None or step_and_item(name)[0] not in draft.definition.by_name:
        begun = ", ".join(name for name in draft.steps if name in draft.definition.by_name) or "none"
        raise NotPossibleError(f"the saga has begun no step {given.step!r}; it has begun: {begun}")
    return name, at


def _step(draft: Draft, name: str) -> Step:
    step = draft.definition.step_of(name)
    if step is None:
        raise NotPossibleError(f"{name} waits; there is nothing to retry. It can be skipped, or its deadline moved")
    return step
