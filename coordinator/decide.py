"""The functional core: what follows from an input. No clock, no randomness, no input or output.

`decide` takes an instance and one input and returns a `Decision`: the next instance, the messages to send,
and the history entry. Every change of an instance goes through here.
"""

from dataclasses import replace
from datetime import datetime

from coordinator.acts import act, told
from coordinator.concern import without_others
from coordinator.decision import (
    Acted,
    Asked,
    Decision,
    Granted,
    Happened,
    HistoryEntry,
    Input,
    Recalled,
    Replied,
    Started,
    Verb,
)
from coordinator.definition import SagaDefinition
from coordinator.draft import MAX_REASON, Draft
from coordinator.instance import Instance, Status, StepState, StepStatus
from coordinator.requests import send, try_anew, undo
from coordinator.steps import Step
from coordinator.waits import Delay, Wait
from coordinator.walk import BUT, walk
from events.envelope import Direction, Result
from events.message import Failed, Message

_GIVEN_UP = (
    StepStatus.UNKNOWN,
    StepStatus.UNDOING,
    StepStatus.UNDO_RETRYING,
    StepStatus.UNDONE,
    StepStatus.UNDO_FAILED,
)


def decide(definition: SagaDefinition, instance: Instance | None, given: Input) -> Decision | None:
    """Return what follows from `given`, None if nothing does.

    Raises:
        NotPossibleError: an operator asks for what makes no sense here.
        Exception: whatever the saga's start method raises; every other method's error is an outcome.
    """
    if isinstance(given, Started):
        return start(definition, given)
    if instance is None:
        raise ValueError("only a start event needs no instance")
    decision = _follow(Draft(definition, without_others(definition, instance, given), given.now), given)
    if decision is None or not definition.fans:
        return decision
    steps = instance.steps | decision.instance.steps
    return replace(decision, instance=replace(decision.instance, steps=steps))


def _follow(draft: Draft, given: Input) -> Decision | None:
    decision: Decision | None
    match given:
        case Replied():
            decision = _reply(draft, given)
        case Happened():
            decision = _happen(draft, given)
        case Asked():
            decision = _ask_again(draft, given)
        case Recalled():
            decision = _recall(draft, given)
        case Granted():
            decision = _begin(draft)
        case Acted(verb=Verb.RESOLVE):
            decision = _resolve(draft, given)
        case Acted():
            act(draft, given)
            decision = draft.finish(given.verb.value, step=given.step, actor=given.by, why=given.why)
        case _:
            decision = _elapse(draft)
    return decision


def give_up(instance: Instance, reason: str, now: datetime) -> Decision:
    """Return the decision about an instance that cannot be decided on: a person must look at it.

    Its steps keep their deadlines, for when it goes on.
    """
    stuck = replace(
        instance,
        status=Status.NEEDS_ATTENTION,
        revision=instance.revision + 1,
        due_at=None,
        reason=reason[:MAX_REASON],
        updated_at=now,
    )
    return Decision(stuck, (), (), HistoryEntry("given_up", now, stuck.status, reason=stuck.reason))


def start(definition: SagaDefinition, given: Started) -> Decision:
    """Return what follows from what starts a saga.

    Raises:
        Exception: whatever the saga's start method raises.
    """
    method = definition.start_for(given.event.message_type)
    saga = method.__get__(None, definition.cls)(given.event)
    if not isinstance(saga, definition.cls):
        name = definition.cls.__name__
        raise TypeError(f"{name}.{method.name} must return a {name}, not {saga!r}")
    lock = definition.lock_of(saga)
    instance = Instance(
        id=given.saga_id,
        saga=definition.name,
        version=definition.version,
        key=definition.key_of(method, saga),
        status=Status.RUNNING if lock is None else Status.WAITING,
        state=saga.to_state(),
        traceparent=given.traceparent,
        created_at=given.now,
        origin=given.origin,
        deadline=definition.deadline_of(given.now) if lock is None else None,
    )
    draft = Draft(definition, instance, given.now)
    walk(draft)
    decision = draft.finish("started", message_id=given.message_id, attempt=given.origin and given.origin.attempt)
    entry = replace(decision.entry, change={**decision.entry.change, "state": instance.state})
    return replace(decision, entry=entry, lock=lock)


def _begin(draft: Draft) -> Decision | None:
    """Begin the work of a saga that has waited for its turn. Its deadline counts from now, unless somebody set one."""
    if draft.status is not Status.WAITING:
        return None
    draft.status = Status.RUNNING
    if draft.limit is None:
        draft.limit = draft.definition.deadline_of(draft.now)
    walk(draft)
    return draft.finish("granted")


def _reply(draft: Draft, given: Replied) -> Decision:
    about = {
        "step": given.step,
        "direction": given.direction,
        "attempt": given.attempt,
        "result": given.result,
        "message_id": given.message_id,
    }
    at = draft.steps.get(given.step)
    step = draft.definition.step_of(given.step)
    if at is None or step is None:
        return draft.finish("late_reply", **about)
    if at.awaits(given.direction, given.attempt) or _is_recovered(at, given):
        if given.direction is Direction.DO:
            _done(draft, step, given)
        else:
            _undone(draft, step, given)
        walk(draft)
        return draft.finish("reply", **about)
    if _is_late_effect(at, given):
        _late_effect(draft, step, given)
        return draft.finish("late_success" if given.result is Result.SUCCEEDED else "late_failure", **about)
    if _is_late_undo(at, given):
        _late_undo(draft, given.step)
        return draft.finish("late_undo", **about)
    return draft.finish("late_reply", **about)


def _done(draft: Draft, step: Step, given: Replied) -> None:
    """Take in the outcome of a step."""
    name, outcome = given.step, () if given.outcome is None else (given.outcome,)
    match given.result:
        case Result.SUCCEEDED:
            draft.settle(name, StepStatus.SUCCEEDED)
            if error := draft.apply(step.on_succeeded if outcome else None, *outcome, name=name):
                draft.turn_back(f"{name} succeeded, but {error}", name)
        case Result.DECLINED:
            draft.settle(name, StepStatus.DECLINED)
            error = draft.apply(step.on_declined if outcome else None, *outcome, name=name)
            draft.fail(name, f"{name} declined: {given.detail}" + (f"; {error}" if error else ""))
        case Result.FAILED:
            # Tried in vain is not the same as not done: a call may have been answered too late to be seen.
            _not_known(draft, step, name, f"{name} failed: {given.detail}", Result.FAILED)


def _undone(draft: Draft, step: Step, given: Replied) -> None:
    """Take in the outcome of a compensation."""
    if given.result is Result.SUCCEEDED:
        draft.settle(given.step, StepStatus.UNDONE)
    else:
        _not_undone(draft, step, given.step, f"{given.step} could not be undone: {given.detail}")


def _not_known(draft: Draft, step: Step, name: str, reason: str, answer: Result | None = None) -> None:
    """Nobody knows whether a step has happened: turn back, or where that cannot be, try it anew."""
    at = draft.steps[name]
    if draft.is_past_pivot and draft.branch_turned_back(name) is None and at.attempt < step.recovery.attempts:
        draft.wait(name, StepStatus.RETRYING, step.recovery.wait(at.attempt))
        return
    draft.settle(name, StepStatus.UNKNOWN, answer=answer)
    draft.fail(name, reason)


def _not_undone(draft: Draft, step: Step, name: str, reason: str) -> None:
    """A compensation has failed: it is asked for anew, or a person must look once the others are done."""
    at = draft.steps[name]
    if at.undo_attempt < step.undo_retry.attempts:
        draft.wait(name, StepStatus.UNDO_RETRYING, step.undo_retry.wait(at.undo_attempt))
    else:
        draft.settle(name, StepStatus.UNDO_FAILED)
        draft.explain(reason)


def _is_recovered(at: StepState, given: Replied) -> bool:
    """Say whether what is to be tried anew, or was already, has succeeded the time before."""
    if given.result is not Result.SUCCEEDED:
        return False
    if given.direction is Direction.UNDO:  # an attempt before the last one may have found nothing to undo yet
        return at.status is StepStatus.UNDO_RETRYING and given.attempt == at.undo_attempt
    return at.status in (StepStatus.RUNNING, StepStatus.RETRYING) and given.attempt <= at.attempt


def _is_late_effect(at: StepState, given: Replied) -> bool:
    """Say whether a step has, or may have, happened since it was given up on, and nobody has said so before."""
    given_up = at.status in _GIVEN_UP
    given_up = given_up or (at.status is StepStatus.DECLINED and at.answer is not None)  # a person said so, and may err
    if given.direction is not Direction.DO or given.attempt > at.attempt or not given_up:
        return False
    if given.result is Result.FAILED:
        return at.answer is None and given.attempt == at.attempt
    return given.result is Result.SUCCEEDED and at.answer is not Result.SUCCEEDED


def _late_effect(draft: Draft, step: Step, given: Replied) -> None:
    """Undo what has happened after all, now that it is known what there is to undo.

    A compensation that was sent before may have found nothing to undo, so it is sent again as a new attempt.
    Its idempotency key is the same, so what was undone already is not undone twice.
    """
    name = given.step
    has_happened = given.result is Result.SUCCEEDED
    error = None
    if has_happened and given.outcome is not None:
        error = draft.apply(step.on_succeeded, given.outcome, name=name)
    if error:
        draft.explain(f"{name} succeeded late, but {error}")
    branch, undoing = draft.branch_turned_back(name), draft.steps[name].status is StepStatus.UNDOING
    is_given_up = draft.steps[name].status in (StepStatus.UNKNOWN, StepStatus.DECLINED)
    if is_given_up and not (draft.turned_back or branch):  # there is only the way on
        if has_happened:
            draft.settle(name, StepStatus.SUCCEEDED, answer=given.result)
            if not error:
                draft.resume()
                draft.clear()
            walk(draft)
        return
    draft.settle(name, StepStatus.SUCCEEDED if has_happened else StepStatus.UNKNOWN, answer=given.result)
    if step.undo is None:
        if step.pivot and has_happened and draft.turned_back:  # somebody has said that it was not done
            because = (draft.reason or "").partition(BUT)[0][: MAX_REASON // 2]
            draft.reason = f"{because}{BUT}{name} has succeeded, and nothing undoes it"
            draft.status = Status.NEEDS_ATTENTION
        return
    if draft.turned_back:
        draft.status = Status.COMPENSATING
    else:  # a branch alone, or an item
        draft.reopen_branches(name)
        draft.status = Status.RUNNING
    if undoing or not (draft.turned_back or branch):
        undo(draft, step, name)
    walk(draft)


def _is_late_undo(at: StepState, given: Replied) -> bool:
    """Say whether a compensation that was given up on has succeeded after all: an operator has replayed it."""
    undone = given.direction is Direction.UNDO and given.result is Result.SUCCEEDED
    return undone and at.status is StepStatus.UNDO_FAILED and given.attempt == at.undo_attempt


def _late_undo(draft: Draft, name: str) -> None:
    """Count a compensation as done; if nothing else is left to be undone, nobody need look at the saga any more."""
    draft.settle(name, StepStatus.UNDONE)
    draft.recount(name)
    left = draft.is_pending or draft.has_stuck
    if draft.status is Status.NEEDS_ATTENTION and not left:
        draft.resume()
        walk(draft)


def _resolve(draft: Draft, given: Acted) -> Decision:
    """Take what an operator says of a step like what its handler would have said."""
    step, said = told(draft, given)
    name = said.step
    was = draft.steps[name].status
    if said.direction is Direction.UNDO:
        known = Result.SUCCEEDED if was is StepStatus.SUCCEEDED else draft.steps[name].answer
        draft.settle(name, StepStatus.UNDONE, answer=known)  # a success that comes a second time is no news
    elif was in (StepStatus.RUNNING, StepStatus.RETRYING) or draft.is_why_stuck(name):
        if said.result is Result.SUCCEEDED:
            draft.resume()
        _done(draft, step, said)
        draft.clear()
    elif said.result is Result.SUCCEEDED:
        _late_effect(draft, step, said)
    else:
        if said.outcome is not None:
            draft.apply(step.on_declined, said.outcome, name=name)
        draft.settle(name, StepStatus.DECLINED)
    if said.result is Result.DECLINED:  # a handler does not say so and succeed later; who looks from outside may err
        draft.set(name, answer=Result.DECLINED)
    elif said.result is Result.FAILED:
        draft.set(name, answer=None)  # its handler may still say so: that is news
    draft.recount(name)
    if was is StepStatus.UNDO_FAILED:
        draft.reopen(name)
    walk(draft)
    about = {"step": name, "direction": said.direction, "attempt": said.attempt, "result": said.result}
    return draft.finish(given.verb.value, **about, actor=given.by, why=given.why)


def _elapse(draft: Draft) -> Decision | None:
    due = [name for name, at in draft.steps.items() if at.due_at is not None and at.due_at <= draft.now]
    too_late = draft.deadline is not None and draft.deadline <= draft.now
    if not due and not too_late:
        return None  # somebody was faster: the deadline was met or moved
    if too_late:
        draft.turn_back(f"it was not done by {draft.deadline:%Y-%m-%d %H:%M:%S %Z}")
    for name in due:
        if (step := draft.definition.step_of(name)) is not None and draft.steps[name].fan is None:
            _overdue(draft, step, name)
        else:
            _time_is_up(draft, name)
    walk(draft)
    return draft.finish("deadline", step=due[0] if due else None)


def _overdue(draft: Draft, step: Step, name: str) -> None:
    """The answer to a command has not come, or the time of its next attempt has."""
    at = draft.steps[name]
    if at.status is StepStatus.RUNNING:
        if at.sends <= step.deadline.resends and draft.goes_on(name):
            send(draft, step, name, Direction.DO, at.attempt, at.sends + 1)
        else:
            _not_known(draft, step, name, f"{name} gave no answer in time")
    elif at.status is StepStatus.RETRYING and draft.goes_on(name):
        try_anew(draft, step, name)
    elif at.status is StepStatus.RETRYING:
        draft.settle(name, StepStatus.UNKNOWN)
    elif at.status is StepStatus.UNDO_RETRYING:
        undo(draft, step, name)
    elif at.status is StepStatus.UNDOING:
        if at.sends <= step.undo_deadline.resends:
            send(draft, step, name, Direction.UNDO, at.undo_attempt, at.sends + 1)
        else:
            _not_undone(draft, step, name, f"undoing {name} gave no answer in time")


def _time_is_up(draft: Draft, name: str) -> None:
    """A delay is over, no event has come in time, or a step for several items wants its next ones."""
    node, at = draft.definition.by_name[name], draft.steps[name]
    if at.status is not StepStatus.WAITING:
        draft.set(name, due_at=None)
    elif isinstance(node, Delay):
        draft.settle(name, StepStatus.SUCCEEDED)
    elif isinstance(node, Wait) and node.on_expired is not None:
        draft.settle(name, StepStatus.EXPIRED)
        if error := draft.apply(node.on_expired, name=name):
            draft.turn_back(f"{name} got no event in time, and {error}", name)
    else:
        draft.settle(name, StepStatus.DECLINED)
        draft.turn_back(f"{name} got no event in time", name)


# Events of the business, and parents


def _happen(draft: Draft, given: Happened) -> Decision | None:
    """Take in an event that the saga waits for; one that comes too late is noted, one that comes too early is not."""
    about = {"step": given.step, "message_id": given.message_id}
    node, at = draft.definition.by_name.get(given.step), draft.steps.get(given.step)
    if not isinstance(node, Wait) or (at is None and not draft.status.ended and not draft.turned_back):
        return None
    if at is None or at.status is not StepStatus.WAITING:
        return draft.finish("late_event", **about)
    no = node.on_declined
    if no is not None and isinstance(given.event, no.outcome) and not isinstance(given.event, node.outcome):
        draft.settle(given.step, StepStatus.DECLINED)
        error = draft.apply(no, given.event, name=given.step)
        draft.turn_back(f"{given.step} declined: {describe(given.event)}" + (f"; {error}" if error else ""), given.step)
    else:
        draft.settle(given.step, StepStatus.SUCCEEDED)
        if error := draft.apply(node, given.event, name=given.step):
            draft.turn_back(f"{given.step} has happened, but {error}", given.step)
    walk(draft)
    return draft.finish("event", **about)


def _ask_again(draft: Draft, given: Asked) -> Decision | None:
    """The parent repeats its command, or makes a new attempt: it is told how the child has ended, or will be."""
    origin = draft.origin
    if origin is None or origin.undo_attempt or given.origin.attempt < origin.attempt:
        return None  # it has asked for the contrary since
    if given.origin.attempt == origin.attempt and draft.status.in_flight:
        return None  # its answer is on the way
    draft.origin = replace(given.origin, undo_attempt=origin.undo_attempt)
    draft.answer_as_it_is()
    return draft.finish("asked_again", attempt=given.origin.attempt, message_id=given.message_id)


def _recall(draft: Draft, given: Recalled) -> Decision | None:
    """The parent wants undone what its child has done, or is doing."""
    origin = draft.origin
    if origin is None or given.attempt < origin.undo_attempt:
        return None
    draft.origin = replace(origin, undo_attempt=given.attempt)
    if draft.is_past_pivot:
        message = Failed(code="past_pivot", reason=f"{draft.definition.name} has no way back any more", attempts=1)
        draft.answer(Direction.UNDO, Result.FAILED, message)
    elif not draft.turned_back:
        draft.turn_back("its parent has turned back")
        walk(draft)
    else:
        draft.answer_as_it_is()
    return draft.finish("recalled", attempt=given.attempt, message_id=given.message_id)


def describe(outcome: Message | None) -> str:
    """Return what an outcome says of its reason, in words."""
    if isinstance(outcome, Failed):
        return f"{outcome.code}: {outcome.reason}"
    reason = getattr(outcome, "reason", None)
    if reason is not None:
        return str(reason)
    return outcome.message_type if outcome is not None else ""
