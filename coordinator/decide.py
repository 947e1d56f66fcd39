"""The functional core: what follows from an input. No clock, no randomness, no input or output.

`decide` takes an instance and one input and returns a `Decision`: the next instance, the messages to send,
and the history entry. Every change of an instance goes through here.
"""

from dataclasses import replace
from datetime import datetime, timedelta

from coordinator.acts import act, told
from coordinator.decision import Acted, Decision, HistoryEntry, Input, Replied, Started, Verb
from coordinator.definition import SagaDefinition
from coordinator.draft import MAX_REASON, Draft
from coordinator.instance import Instance, Status, StepState, StepStatus
from coordinator.steps import Step
from coordinator.walk import send, try_anew, undo, walk
from events.envelope import Direction, Result
from events.message import Failed, Message


def decide(definition: SagaDefinition, instance: Instance | None, given: Input) -> Decision | None:
    """Return what follows from `given`, None if nothing does.

    Raises:
        NotPossibleError: an operator asks for what makes no sense here.
        Exception: whatever the saga's start method raises; every other method's error is an outcome.
    """
    if isinstance(given, Started):
        return _start(definition, given)
    if instance is None:
        raise ValueError("only a start event needs no instance")
    draft = Draft(definition, instance, given.now)
    if isinstance(given, Replied):
        return _reply(draft, given)
    if isinstance(given, Acted) and given.verb is Verb.RESOLVE:
        return _resolve(draft, given)
    if isinstance(given, Acted):
        act(draft, given)
        return draft.finish(given.verb.value, step=given.step, actor=given.by, why=given.why)
    return _elapse(draft)


def give_up(instance: Instance, reason: str, now: datetime) -> Decision:
    """Return the decision about an instance that its definition cannot read any more: a person must look at it."""
    steps = {name: replace(at, due_at=None) for name, at in instance.steps.items()}
    stuck = replace(
        instance,
        status=Status.NEEDS_ATTENTION,
        steps=steps,
        revision=instance.revision + 1,
        due_at=None,
        reason=reason[:MAX_REASON],
        updated_at=now,
    )
    return Decision(stuck, (), (), HistoryEntry("given_up", now, stuck.status, reason=stuck.reason))


def _start(definition: SagaDefinition, given: Started) -> Decision:
    start = definition.start_for(given.event.message_type)
    saga = start.__get__(None, definition.cls)(given.event)
    if not isinstance(saga, definition.cls):
        raise TypeError(f"{definition.cls.__name__}.{start.name} must return a {definition.cls.__name__}, not {saga!r}")
    instance = Instance(
        id=given.saga_id,
        saga=definition.name,
        version=definition.version,
        key=definition.key_of(start, saga),
        status=Status.RUNNING,
        state=saga.to_state(),
        traceparent=given.traceparent,
        created_at=given.now,
        deadline=None if definition.deadline is None else given.now + timedelta(seconds=definition.deadline),
    )
    draft = Draft(definition, instance, given.now)
    walk(draft)
    decision = draft.finish("started", message_id=given.message_id)
    return replace(decision, entry=replace(decision.entry, change={**decision.entry.change, "state": instance.state}))


def _reply(draft: Draft, given: Replied) -> Decision:
    about = {
        "step": given.step,
        "direction": given.direction,
        "attempt": given.attempt,
        "result": given.result,
        "message_id": given.message_id,
    }
    at = draft.steps.get(given.step)
    step = draft.definition.by_name.get(given.step)
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
        _late_undo(draft, step)
        return draft.finish("late_undo", **about)
    return draft.finish("late_reply", **about)


def _done(draft: Draft, step: Step, given: Replied) -> None:
    """Take in the outcome of a step."""
    match given.result:
        case Result.SUCCEEDED:
            draft.settle(step.name, StepStatus.SUCCEEDED)
            if error := draft.apply(step.on_succeeded, given.outcome):
                draft.turn_back(f"{step.name} succeeded, but {error}")
        case Result.DECLINED:
            draft.settle(step.name, StepStatus.DECLINED)
            error = draft.apply(step.on_declined, given.outcome)
            draft.turn_back(f"{step.name} declined: {given.detail}" + (f"; {error}" if error else ""))
        case Result.FAILED:
            # Tried in vain is not the same as not done: a call may have been answered too late to be seen.
            _not_known(draft, step, f"{step.name} failed: {given.detail}", Result.FAILED)


def _undone(draft: Draft, step: Step, given: Replied) -> None:
    """Take in the outcome of a compensation."""
    if given.result is Result.SUCCEEDED:
        draft.settle(step.name, StepStatus.UNDONE)
    else:
        _not_undone(draft, step, f"{step.name} could not be undone: {given.detail}")


def _not_known(draft: Draft, step: Step, reason: str, answer: Result | None = None) -> None:
    """Nobody knows whether a step has happened: turn back, or where that cannot be, try it anew."""
    at = draft.steps[step.name]
    if not draft.is_past_pivot:
        draft.settle(step.name, StepStatus.UNKNOWN, answer=answer)
        draft.turn_back(reason)
    elif at.attempt < step.recovery.attempts:
        draft.wait(step.name, StepStatus.RETRYING, step.recovery.wait(at.attempt))
    else:
        draft.settle(step.name, StepStatus.UNKNOWN, answer=answer)
        draft.turn_back(reason)


def _not_undone(draft: Draft, step: Step, reason: str) -> None:
    """A compensation has failed: it is asked for anew, or a person must look once the others are done."""
    at = draft.steps[step.name]
    if at.undo_attempt < step.undo_retry.attempts:
        draft.wait(step.name, StepStatus.UNDO_RETRYING, step.undo_retry.wait(at.undo_attempt))
    else:
        draft.settle(step.name, StepStatus.UNDO_FAILED)
        draft.explain(reason)


def _is_recovered(at: StepState, given: Replied) -> bool:
    """Say whether what is to be tried anew, or was already, has succeeded the time before."""
    if given.result is not Result.SUCCEEDED:
        return False
    if given.direction is Direction.UNDO:
        return at.status is StepStatus.UNDO_RETRYING
    return at.status in (StepStatus.RUNNING, StepStatus.RETRYING) and given.attempt <= at.attempt


def _is_late_effect(at: StepState, given: Replied) -> bool:
    """Say whether a step has, or may have, happened since it was given up on, and nobody has said so before."""
    given_up = at.status in (StepStatus.UNKNOWN, StepStatus.UNDOING, StepStatus.UNDONE, StepStatus.UNDO_FAILED)
    given_up = given_up or (at.status is StepStatus.DECLINED and at.answer is not None)  # a person said so, and may err
    if given.direction is not Direction.DO or given.attempt != at.attempt or not given_up:
        return False
    if at.answer is None:
        return given.result in (Result.SUCCEEDED, Result.FAILED)
    return given.result is Result.SUCCEEDED and at.answer is not Result.SUCCEEDED


def _late_effect(draft: Draft, step: Step, given: Replied) -> None:
    """Undo what has happened after all, now that it is known what there is to undo.

    A compensation that was sent before may have found nothing to undo, so it is sent again as a new attempt.
    Its idempotency key is the same, so what was undone already is not undone twice.
    """
    error = draft.apply(step.on_succeeded, given.outcome if given.result is Result.SUCCEEDED else None)
    if error:
        draft.explain(f"{step.name} succeeded late, but {error}")
    if draft.is_past_pivot:
        if given.result is Result.SUCCEEDED:  # it was given up on, and there is only the way on
            draft.settle(step.name, StepStatus.SUCCEEDED, answer=given.result)
            if not error:
                draft.resume()
                draft.clear()
            walk(draft)
        return
    undoing = draft.steps[step.name].status is StepStatus.UNDOING
    happened = StepStatus.SUCCEEDED if given.result is Result.SUCCEEDED else StepStatus.UNKNOWN
    draft.settle(step.name, happened, answer=given.result)
    if step.undo is None:
        return
    draft.status = Status.COMPENSATING
    if undoing:
        undo(draft, step)
    walk(draft)


def _is_late_undo(at: StepState, given: Replied) -> bool:
    """Say whether a compensation that was given up on has succeeded after all: an operator has replayed it."""
    undone = given.direction is Direction.UNDO and given.result is Result.SUCCEEDED
    return undone and at.status is StepStatus.UNDO_FAILED and given.attempt == at.undo_attempt


def _late_undo(draft: Draft, step: Step) -> None:
    """Count a compensation as done; if nothing else is left to be undone, nobody need look at the saga any more."""
    draft.settle(step.name, StepStatus.UNDONE)
    left = any(at.status is StepStatus.UNDO_FAILED or at.status.pending for at in draft.steps.values())
    if draft.status is Status.NEEDS_ATTENTION and not left:
        draft.status = Status.COMPENSATING
        walk(draft)


def _resolve(draft: Draft, given: Acted) -> Decision:
    """Take what an operator says of a step like what its handler would have said."""
    step, said = told(draft, given)
    was = draft.steps[step.name].status
    if said.direction is Direction.UNDO:
        draft.settle(step.name, StepStatus.UNDONE)
    elif was in (StepStatus.RUNNING, StepStatus.RETRYING) or draft.is_past_pivot:
        if said.result is Result.SUCCEEDED:
            draft.resume()
        _done(draft, step, said)
        draft.clear()
    elif said.result is Result.SUCCEEDED:
        _late_effect(draft, step, said)
    else:
        draft.apply(step.on_declined, said.outcome)
        draft.settle(step.name, StepStatus.DECLINED)
    if said.result is Result.DECLINED:  # a handler does not say so and succeed later; who looks from outside may err
        draft.set(step.name, answer=Result.DECLINED)
    if was is StepStatus.UNDO_FAILED and draft.status is Status.NEEDS_ATTENTION:
        draft.status = Status.COMPENSATING
    walk(draft)
    about = {"step": step.name, "direction": said.direction, "attempt": said.attempt, "result": said.result}
    return draft.finish(given.verb.value, **about, actor=given.by, why=given.why)


def _elapse(draft: Draft) -> Decision | None:
    due = [name for name, at in draft.steps.items() if at.due_at is not None and at.due_at <= draft.now]
    too_late = draft.deadline is not None and draft.deadline <= draft.now
    if not due and not too_late:
        return None  # somebody was faster: the deadline was met or moved
    if too_late:
        draft.turn_back(f"it was not done by {draft.deadline:%Y-%m-%d %H:%M:%S %Z}")
    for name in due:
        step, at = draft.definition.by_name[name], draft.steps[name]
        if at.status is StepStatus.RUNNING:
            if at.sends <= step.deadline.resends and draft.status is Status.RUNNING:
                send(draft, step, Direction.DO, at.attempt, at.sends + 1)
            else:
                _not_known(draft, step, f"{name} gave no answer in time")
        elif at.status is StepStatus.RETRYING:
            try_anew(draft, step)
        elif at.status is StepStatus.UNDO_RETRYING:
            undo(draft, step)
        elif at.status is StepStatus.UNDOING:
            if at.sends <= step.undo_deadline.resends:
                send(draft, step, Direction.UNDO, at.undo_attempt, at.sends + 1)
            else:
                _not_undone(draft, step, f"undoing {name} gave no answer in time")
    walk(draft)
    return draft.finish("deadline", step=due[0] if due else None)


def describe(outcome: Message | None) -> str:
    """Return what an outcome says of its reason, in words."""
    if isinstance(outcome, Failed):
        return f"{outcome.code}: {outcome.reason}"
    reason = getattr(outcome, "reason", None)
    if reason is not None:
        return str(reason)
    return outcome.message_type if outcome is not None else ""
