"""The functional core: what follows from an input. No clock, no randomness, no input or output.

`decide` takes an instance and one input and returns a `Decision`: the next instance, the messages to send,
and the history entry. Every change of an instance goes through here.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from coordinator.decision import Announcement, Decision, HistoryEntry, Input, Replied, Request, Started
from coordinator.definition import Deadline, Hook, OutcomeHook, Saga, SagaDefinition, Step
from coordinator.instance import Instance, Status, StepState, StepStatus
from events.derive import derive_id
from events.envelope import Direction, Result
from events.message import Command, Event, Failed, Message

_MAX_REASON = 1000
_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def decide(definition: SagaDefinition, instance: Instance | None, given: Input) -> Decision | None:
    """Return what follows from `given`, None if nothing does.

    Raises:
        Exception: whatever the saga's start method raises; every other method's error is an outcome.
    """
    if isinstance(given, Started):
        return _start(definition, given)
    if instance is None:
        raise ValueError("only a start event needs no instance")
    draft = _Draft(definition, instance, given.now)
    if isinstance(given, Replied):
        return _reply(draft, given)
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
        reason=reason[:_MAX_REASON],
        updated_at=now,
    )
    return Decision(stuck, (), (), HistoryEntry("given_up", now, stuck.status, reason=stuck.reason))


class _Draft:
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
        self.requests: list[Request] = []
        self.announcements: list[Announcement] = []

    def set(self, step: str, **changes: Any) -> None:
        self.steps[step] = replace(self.steps[step], **changes)

    def settle(self, step: str, status: StepStatus, **changes: Any) -> None:
        """Set the status of a step from which no answer is awaited any more."""
        self.set(step, status=status, due_at=None, made_of=None, **changes)

    def change(self, saga: Saga, state: dict[str, Any]) -> None:
        """Give the saga another state. A command that is sent again says what it said before: keep what that was."""
        for name, at in self.steps.items():
            if at.status.outstanding and at.made_of is None:
                self.set(name, made_of=self.state)
        self.saga, self.state = saga, state

    def explain(self, reason: str) -> None:
        """Keep the first reason: what comes later follows from it."""
        if self.reason is None:
            self.reason = reason[:_MAX_REASON]

    def finish(self, kind: str, **about: Any) -> Decision:
        before, state = self.before, self.state
        change: dict[str, Any] = {}
        if state != self.found:
            change["state"] = {name: value for name, value in state.items() if self.found.get(name) != value}
        if changed := {name: at for name, at in self.steps.items() if before.steps.get(name) != at}:
            change["steps"] = {name: at.to_json() for name, at in changed.items()}
        due = [at.due_at for at in self.steps.values() if at.due_at is not None]
        instance = replace(
            before,
            status=self.status,
            state=state,
            steps=self.steps,
            revision=before.revision + 1,
            due_at=min(due) if due else None,
            reason=self.reason,
            updated_at=self.now,
        )
        sent = [
            {"id": str(r.id), "type": r.command.message_type, "step": r.step, "direction": r.direction.value}
            for r in self.requests
        ] + [{"id": str(a.id), "type": a.event.message_type} for a in self.announcements]
        entry = HistoryEntry(kind, self.now, self.status, reason=self.reason, change=change, sent=tuple(sent), **about)
        return Decision(instance, tuple(self.requests), tuple(self.announcements), entry)


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
    )
    draft = _Draft(definition, instance, given.now)
    _walk(draft)
    decision = draft.finish("started", message_id=given.message_id)
    return replace(decision, entry=replace(decision.entry, change={**decision.entry.change, "state": instance.state}))


def _reply(draft: _Draft, given: Replied) -> Decision:
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
    if at.awaits(given.direction, given.attempt):
        if given.direction is Direction.DO:
            _done(draft, step, given)
        else:
            _undone(draft, step, given)
        _walk(draft)
        return draft.finish("reply", **about)
    if _is_late_effect(at, given):
        _late_effect(draft, step, given)
        return draft.finish("late_success" if given.result is Result.SUCCEEDED else "late_failure", **about)
    if _is_late_undo(at, given):
        _late_undo(draft, step)
        return draft.finish("late_undo", **about)
    return draft.finish("late_reply", **about)


def _done(draft: _Draft, step: Step, given: Replied) -> None:
    """Take in the outcome of a step."""
    match given.result:
        case Result.SUCCEEDED:
            draft.settle(step.name, StepStatus.SUCCEEDED)
            if error := _apply(draft, step.on_succeeded, given.outcome):
                _turn_back(draft, f"{step.name} succeeded, but {error}")
        case Result.DECLINED:
            draft.settle(step.name, StepStatus.DECLINED)
            error = _apply(draft, step.on_declined, given.outcome)
            _turn_back(draft, f"{step.name} declined: {given.detail}" + (f"; {error}" if error else ""))
        case Result.FAILED:
            # Tried in vain is not the same as not done: a call may have been answered too late to be seen.
            draft.settle(step.name, StepStatus.UNKNOWN, answer=Result.FAILED)
            _turn_back(draft, f"{step.name} failed: {given.detail}")


def _undone(draft: _Draft, step: Step, given: Replied) -> None:
    """Take in the outcome of a compensation."""
    if given.result is Result.SUCCEEDED:
        draft.settle(step.name, StepStatus.UNDONE)
    else:
        draft.settle(step.name, StepStatus.UNDO_FAILED)
        draft.explain(f"{step.name} could not be undone: {given.detail}")


def _is_late_effect(at: StepState, given: Replied) -> bool:
    """Say whether a step has, or may have, happened since it was given up on, and nobody has said so before."""
    given_up = at.status in (StepStatus.UNKNOWN, StepStatus.UNDOING, StepStatus.UNDONE, StepStatus.UNDO_FAILED)
    if given.direction is not Direction.DO or given.attempt != at.attempt or not given_up:
        return False
    if at.answer is None:
        return given.result in (Result.SUCCEEDED, Result.FAILED)
    return given.result is Result.SUCCEEDED and at.answer is not Result.SUCCEEDED


def _late_effect(draft: _Draft, step: Step, given: Replied) -> None:
    """Undo what has happened after all, now that it is known what there is to undo.

    A compensation that was sent before may have found nothing to undo, so it is sent again as a new attempt.
    Its idempotency key is the same, so what was undone already is not undone twice.
    """
    if error := _apply(draft, step.on_succeeded, given.outcome if given.result is Result.SUCCEEDED else None):
        draft.explain(f"{step.name} succeeded late, but {error}")
    undoing = draft.steps[step.name].status is StepStatus.UNDOING
    happened = StepStatus.SUCCEEDED if given.result is Result.SUCCEEDED else StepStatus.UNKNOWN
    draft.settle(step.name, happened, answer=given.result)
    if step.undo is None:
        return
    draft.status = Status.COMPENSATING
    if undoing:
        _undo(draft, step)
    if not any(at.status.outstanding for at in draft.steps.values()):
        _walk(draft)


def _is_late_undo(at: StepState, given: Replied) -> bool:
    """Say whether a compensation that was given up on has succeeded after all: an operator has replayed it."""
    undone = given.direction is Direction.UNDO and given.result is Result.SUCCEEDED
    return undone and at.status is StepStatus.UNDO_FAILED and given.attempt == at.undo_attempt


def _late_undo(draft: _Draft, step: Step) -> None:
    """Count a compensation as done; if nothing else is left to be undone, nobody need look at the saga any more."""
    draft.settle(step.name, StepStatus.UNDONE)
    left = any(at.status is StepStatus.UNDO_FAILED or at.status.outstanding for at in draft.steps.values())
    if draft.status is Status.NEEDS_ATTENTION and not left:
        draft.status = Status.COMPENSATING
        _walk(draft)


def _elapse(draft: _Draft) -> Decision | None:
    due = [name for name, at in draft.steps.items() if at.due_at is not None and at.due_at <= draft.now]
    if not due:
        return None  # somebody was faster: the deadline was met or moved
    for name in due:
        step, at = draft.definition.by_name[name], draft.steps[name]
        if at.status is StepStatus.RUNNING:
            if at.sends <= step.deadline.resends:
                _send(draft, step, Direction.DO, at.attempt, at.sends + 1)
            else:
                draft.settle(name, StepStatus.UNKNOWN)
                _turn_back(draft, f"{name} gave no answer in time")
        elif at.status is StepStatus.UNDOING:
            if at.sends <= step.undo_deadline.resends:
                _send(draft, step, Direction.UNDO, at.undo_attempt, at.sends + 1)
            else:
                draft.settle(name, StepStatus.UNDO_FAILED)
                draft.explain(f"undoing {name} gave no answer in time")
    if not draft.requests:
        _walk(draft)
    return draft.finish("deadline", step=due[0])


def _turn_back(draft: _Draft, reason: str) -> None:
    draft.status = Status.COMPENSATING
    draft.explain(reason)


def _walk(draft: _Draft) -> None:
    """Send what comes next in the saga's direction, or end it: one walk for both ways."""
    while draft.status.in_flight:
        step = _next(draft)
        if step is None:
            _end(draft)
        elif draft.status is Status.RUNNING:
            draft.steps[step.name] = StepState(StepStatus.RUNNING)
            _send(draft, step, Direction.DO, 1, 1)
        else:
            _undo(draft, step)
        if draft.requests:
            return


def _next(draft: _Draft) -> Step | None:
    steps = draft.definition.steps
    if draft.status is Status.RUNNING:
        return next((step for step in steps if step.name not in draft.steps), None)
    return next(
        (
            step
            for step in reversed(steps)
            if step.undo is not None and step.name in draft.steps and draft.steps[step.name].status.to_undo
        ),
        None,
    )


def _undo(draft: _Draft, step: Step) -> None:
    at = draft.steps[step.name]
    attempt = at.undo_attempt + 1
    # From now on only this tells a success that comes a second time from one that comes late.
    answer = Result.SUCCEEDED if at.status is StepStatus.SUCCEEDED else at.answer
    draft.set(step.name, status=StepStatus.UNDOING, answer=answer, undo_attempt=attempt, sends=0, made_of=None)
    _send(draft, step, Direction.UNDO, attempt, 1)


def _send(draft: _Draft, step: Step, direction: Direction, attempt: int, sends: int) -> None:
    """Ask the saga for the command and send it; if the saga cannot make it, nothing was done."""
    hook: Hook | None = step if direction is Direction.DO else step.undo
    deadline: Deadline = step.deadline if direction is Direction.DO else step.undo_deadline
    command, error = _ask(draft, hook, state=draft.steps[step.name].made_of)
    if error is None and not isinstance(command, Command):
        error = f"it must return a Command, not {type(command).__name__}"
    if error is not None:
        if direction is Direction.DO:
            never_sent = draft.steps[step.name].sends == 0
            draft.settle(step.name, StepStatus.DECLINED if never_sent else StepStatus.UNKNOWN)
            _turn_back(draft, f"{step.name} could not be asked for: {error}")
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


def _end(draft: _Draft) -> None:
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
    event, error = _ask(draft, ending, *arguments)
    if error is None and event is not None and not isinstance(event, Event):
        error = f"it must return an Event or None, not {type(event).__name__}"
    if error is not None:
        draft.reason = f"{draft.status.value}, but {ending.name} failed: {error}"[:_MAX_REASON]
        draft.status = Status.NEEDS_ATTENTION
    elif event is not None:
        draft.announcements.append(Announcement(derive_id(draft.before.id, "announce", draft.status.value), event))


def _apply(draft: _Draft, hook: OutcomeHook | None, outcome: Message | None) -> str | None:
    """Let the saga take an outcome into its state; return what went wrong, and then leave the state as it was."""
    if hook is None or outcome is None:
        return None
    what = "raised"
    try:
        hook.function(draft.saga, outcome)
        what = "left a broken state:"
        state = draft.saga.to_state()
        if state != draft.state:  # what it assigned must be readable again
            draft.change(draft.definition.cls.from_state(state), state)
    except _NOT_OURS:
        raise
    except BaseException as error:  # noqa: BLE001  # user code raises what it likes, Rust extensions panic
        draft.saga = draft.definition.cls.from_state(draft.state)
        return f"{hook.name} {what} {_shown(error)}"
    return None


def _ask(draft: _Draft, hook: Hook | None, *arguments: Any, state: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Ask the saga, as it is now or as it was in `state`, for a message; return that, or None and what went wrong."""
    if hook is None:
        return None, "there is no method for it"
    saga, before = draft.saga, draft.state
    if state is not None:
        saga = draft.definition.cls.from_state(state)
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
    draft.saga = draft.definition.cls.from_state(draft.state)
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


def describe(outcome: Message | None) -> str:
    """Return what an outcome says of its reason, in words."""
    if isinstance(outcome, Failed):
        return f"{outcome.code}: {outcome.reason}"
    reason = getattr(outcome, "reason", None)
    if reason is not None:
        return str(reason)
    return outcome.message_type if outcome is not None else ""
