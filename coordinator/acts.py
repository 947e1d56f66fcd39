"""What an operator does to a saga: retry, skip, resolve, compensate, cancel, move or cancel a deadline. Pure.

Every act says who and why, and is part of the history. One that makes no sense where the saga stands is refused with
what could be done instead; nothing is changed then.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from coordinator.decision import Acted, Replied, Resolution, Verb
from coordinator.draft import Draft
from coordinator.fan import list_items
from coordinator.flow import Each
from coordinator.instance import Status, StepState, StepStatus, step_and_item
from coordinator.requests import send, try_anew, undo
from coordinator.steps import OutcomeHook, Step
from coordinator.waits import Wait
from coordinator.walk import walk
from events.envelope import Direction, Result
from events.errors import CoordinatorError
from events.message import Message
from events.registry import explain

_RESULTS = {
    Resolution.SUCCEEDED: Result.SUCCEEDED,
    Resolution.DECLINED: Result.DECLINED,
    Resolution.FAILED: Result.FAILED,
    Resolution.UNDONE: Result.SUCCEEDED,
}
_OPEN = (StepStatus.RUNNING, StepStatus.RETRYING)
_ON_THE_WAY_BACK = (StepStatus.UNKNOWN, StepStatus.UNDOING, StepStatus.UNDO_RETRYING, StepStatus.UNDO_FAILED)


class NotPossibleError(CoordinatorError):
    """An operator asked for what makes no sense where the saga stands."""

    code = "not_possible"


def act(draft: Draft, given: Acted) -> None:
    """Do what `given` asks for.

    Raises:
        NotPossibleError: it makes no sense here; the draft is not to be used.
    """
    _refuse_stale(draft, given)
    match given.verb:
        case Verb.CANCEL:
            _cancel(draft, given)
        case Verb.COMPENSATE:
            _compensate(draft, given)
        case Verb.RETRY:
            _retry(draft, *_begun(draft, given))
        case Verb.SKIP:
            _skip(draft, *_begun(draft, given))
        case Verb.MOVE_DEADLINE:
            _move(draft, given)
        case Verb.CANCEL_DEADLINE:
            _lift(draft, given)
        case Verb.RESOLVE:
            raise ValueError("what an operator says of a step is taken like an answer")
    walk(draft)


def told(draft: Draft, given: Acted) -> tuple[Step, Replied]:
    """Return what an operator says of a step as the answer that its handler would have given.

    Raises:
        NotPossibleError: it contradicts what is known, or its data is not what the handler would have said.
    """
    _refuse_stale(draft, given)
    name, at = _begun(draft, given)
    step = _step(draft, name)
    if given.resolution is None:
        raise NotPossibleError(f"say how {name} has ended: {', '.join(Resolution)}")
    if at.fan is not None:
        raise NotPossibleError(f"{name} is taken for several items; say which one has ended, as in {name}[0]")
    if not _is_open_to(draft, name, at, given.resolution):
        raise NotPossibleError(f"step {name} is {at.status}, and the saga {draft.status}: {_advice(given)}")
    hook = {Resolution.SUCCEEDED: step.on_succeeded, Resolution.DECLINED: step.on_declined}.get(given.resolution)
    outcome = _outcome(step, given.resolution, hook, given.data)
    undone = given.resolution is Resolution.UNDONE
    direction, attempt = (Direction.UNDO, at.undo_attempt) if undone else (Direction.DO, at.attempt)
    detail = f"{given.by}: {given.why}"
    return step, Replied(name, direction, attempt, _RESULTS[given.resolution], outcome, detail, "", given.now)


def _is_open_to(draft: Draft, name: str, at: StepState, resolution: Resolution) -> bool:
    """Say whether a step may have ended like that, as far as is known."""
    stuck, back = draft.is_past_pivot, at.status in _ON_THE_WAY_BACK
    match resolution:
        case Resolution.SUCCEEDED:
            return at.status in _OPEN or draft.is_why_stuck(name) or back or at.status is StepStatus.UNDONE
        case Resolution.DECLINED:
            return at.status in _OPEN or back
        case Resolution.FAILED:
            return at.status is StepStatus.RUNNING
        case Resolution.UNDONE:
            turned = draft.status in (Status.COMPENSATING, Status.NEEDS_ATTENTION) and not stuck
            return turned and (back or (at.status is StepStatus.SUCCEEDED and draft.turned_back))


def _advice(given: Acted) -> str:
    if given.resolution is Resolution.UNDONE:
        return "only what is being undone can be resolved as undone; cancel or compensate the saga first"
    return f"it cannot have {given.resolution} now"


def _outcome(
    step: Step, resolution: Resolution, hook: OutcomeHook | None, data: Mapping[str, Any] | None
) -> Message | None:
    """Return the message that the saga's method takes, made of what the operator has given."""
    if hook is None:
        if data:
            raise NotPossibleError(f"{step.name} takes no data where it has {resolution}; leave it out")
        return None
    cls = hook.outcome
    known = {name for field, info in cls.model_fields.items() for name in (field, info.alias) if name}
    if strange := ", ".join(sorted(set(data or {}) - known)):
        raise NotPossibleError(f"{cls.message_type} has no {strange}; it has: {', '.join(cls.model_fields)}")
    try:
        return cls.from_data(to_json(data or {}), cls.message_version)
    except ValidationError as error:
        raise NotPossibleError(f"{step.name} {resolution} with {cls.message_type}: {explain(error)}") from error


def _refuse_stale(draft: Draft, given: Acted) -> None:
    if given.revision not in (None, draft.before.revision):
        raise NotPossibleError(
            f"the saga has moved on: it is at revision {draft.before.revision}, not {given.revision}; look at it again"
        )


def _cancel(draft: Draft, given: Acted) -> None:
    if draft.status not in (Status.WAITING, Status.RUNNING):
        raise NotPossibleError(f"only a running saga can be cancelled; this one is {draft.status}")
    _refuse_past_pivot(draft)
    draft.turn_back(f"cancelled by {given.by}: {given.why}")


def _compensate(draft: Draft, given: Acted) -> None:
    """Undo everything: also what could not be undone before."""
    if draft.status not in (Status.RUNNING, Status.NEEDS_ATTENTION):
        raise NotPossibleError(f"the saga is {draft.status}; there is nothing to compensate")
    _refuse_past_pivot(draft)
    for name, at in list(draft.steps.items()):
        if at.fan is not None and at.fan.stuck:
            if at.status is not StepStatus.UNDOING:
                draft.turn(name)
            draft.set(name, fan=replace(at.fan, unseen=at.fan.begun))
        elif at.status is StepStatus.UNDO_FAILED and at.fan is None:
            draft.settle(name, StepStatus.UNKNOWN)
    draft.turn_back(f"compensated by {given.by}: {given.why}")


def _retry(draft: Draft, name: str, at: StepState) -> None:
    """Try a step again, and let a saga go on that nothing in it holds any more."""
    needs_nobody = draft.status is Status.NEEDS_ATTENTION and not (draft.is_stuck or draft.has_stuck)
    if needs_nobody:  # it was given up on, or a method of its own has failed
        draft.resume()
        draft.clear()
    if not _try_again(draft, name, at) and not needs_nobody:
        _step(draft, name)
        raise NotPossibleError(f"step {name} is {at.status}; there is nothing to retry")


def _try_again(draft: Draft, name: str, at: StepState) -> bool:
    """Send the step's command again: the outstanding one as it is, one that has failed as a new attempt."""
    step = draft.definition.step_of(name)
    if step is None:
        return False
    match at.status:
        case StepStatus.RUNNING if at.fan is None:
            send(draft, step, name, Direction.DO, at.attempt, at.sends + 1)
        case StepStatus.UNDOING if at.fan is None:
            send(draft, step, name, Direction.UNDO, at.undo_attempt, at.sends + 1)
        case StepStatus.RETRYING if draft.goes_on(name):
            try_anew(draft, step, name)
        case StepStatus.UNDO_RETRYING:
            undo(draft, step, name)
        case StepStatus.UNDO_FAILED if at.fan is None:
            draft.reopen(name)
            undo(draft, step, name)
        case _ if draft.is_why_stuck(name):
            draft.resume()
            node = draft.definition.by_name[step_and_item(name)[0]]
            if isinstance(node, Each) and at.fan is not None:  # its items could not be listed
                list_items(draft, node)
            else:
                try_anew(draft, step, name)
            draft.clear()
        case _:
            return False
    return True


def _skip(draft: Draft, name: str, at: StepState) -> None:
    """Count what has failed as done: somebody has seen to it by hand, or it is not needed; also what is waited for."""
    if at.status in (StepStatus.UNDO_FAILED, StepStatus.UNDO_RETRYING) and at.fan is None:
        draft.settle(name, StepStatus.UNDONE)
        draft.recount(name)
        draft.reopen(name)
    elif at.status in (StepStatus.RETRYING, StepStatus.WAITING) or draft.is_why_stuck(name):
        draft.settle(name, StepStatus.SUCCEEDED)
        draft.resume()
        draft.clear()
    else:
        raise NotPossibleError(f"step {name} is {at.status}; only what has failed for good, or waits, can be skipped")


def _move(draft: Draft, given: Acted) -> None:
    if given.until is None or given.until <= given.now:
        raise NotPossibleError("a deadline is moved to a time to come")
    if given.step is None:
        _refuse_without_own(draft)
        draft.limit = given.until
        return
    name, at = _begun(draft, given)
    if not at.status.pending or not draft.status.in_flight or at.fan is not None:
        raise NotPossibleError(f"step {name} is {at.status}; it has no deadline that could be moved")
    draft.set(name, due_at=given.until)


def _lift(draft: Draft, given: Acted) -> None:
    """Let an answer, or the end of the saga, take as long as it takes."""
    if given.step is None:
        _refuse_without_own(draft)
        if draft.limit is None:
            raise NotPossibleError("the saga has no deadline of its own")
        draft.limit = None
        return
    name, at = _begun(draft, given)
    is_wait = isinstance(draft.definition.by_name.get(name), Wait)
    if at.status.pending and not at.status.outstanding and not is_wait:
        raise NotPossibleError(f"step {name} would never be tried again; move the deadline, retry or skip it")
    if at.due_at is None or not draft.status.in_flight or at.fan is not None:
        raise NotPossibleError(f"step {name} is {at.status}; it has no deadline that could be cancelled")
    draft.set(name, due_at=None)


def _refuse_without_own(draft: Draft) -> None:
    """The saga's own deadline is when it turns back: there is none once it cannot, or has."""
    if not draft.may_turn_back:
        past = " and past its pivot" if draft.is_past_pivot else ""
        raise NotPossibleError(f"the saga is {draft.status}{past}; it has no deadline of its own any more")


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
        raise NotPossibleError(f"{name} waits: it can be skipped, or its deadline moved")
    return step
