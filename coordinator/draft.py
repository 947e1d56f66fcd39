"""An instance in the making: what a decision changes of it, and what it asks the saga's methods."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from coordinator.decision import Announcement, Decision, HistoryEntry, Request
from coordinator.definition import Saga, SagaDefinition
from coordinator.instance import Instance, Status, StepStatus
from coordinator.steps import Hook, OutcomeHook
from events.message import Message

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
        self.limit = instance.deadline
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
            self.reason = reason[:MAX_REASON]

    @property
    def is_past_pivot(self) -> bool:
        """Whether there is no way back: a pivot has begun, and has not been declined. Until it answers nobody knows."""
        begun = (step.name for step in self.definition.steps if step.pivot and step.name in self.steps)
        return any(self.steps[name].status is not StepStatus.DECLINED for name in begun)

    def turn_back(self, reason: str) -> None:
        """Begin to undo what was done; where there is no way back a person must look."""
        self.explain(reason)
        self.status = Status.NEEDS_ATTENTION if self.is_past_pivot else Status.COMPENSATING

    @property
    def is_stuck(self) -> bool:
        """Whether there is no way back, and a step is why there is no way on either."""
        failed = (at.status in (StepStatus.UNKNOWN, StepStatus.DECLINED) for at in self.steps.values())
        return self.is_past_pivot and any(failed)

    def resume(self) -> None:
        """Let a saga go on that is past its pivot and needed attention."""
        if self.is_past_pivot and self.status is Status.NEEDS_ATTENTION:
            self.status = Status.RUNNING

    def clear(self) -> None:
        """Forget why a saga needed attention that goes on, once its last stuck step does."""
        if self.status is Status.RUNNING and not self.is_stuck:
            self.reason = None

    def wait(self, step: str, status: StepStatus, seconds: float) -> None:
        """Let a step wait for its next attempt."""
        self.settle(step, status)
        self.set(step, due_at=self.now + timedelta(seconds=seconds))

    @property
    def deadline(self) -> datetime | None:
        """When the saga as a whole turns back; None if it never does, or cannot any more."""
        return None if self.status is not Status.RUNNING or self.is_past_pivot else self.limit

    def finish(self, kind: str, **about: Any) -> Decision:
        before, state = self.before, self.state
        change: dict[str, Any] = {}
        if state != self.found:
            change["state"] = {name: value for name, value in state.items() if self.found.get(name) != value}
        if changed := {name: at for name, at in self.steps.items() if before.steps.get(name) != at}:
            change["steps"] = {name: at.to_json() for name, at in changed.items()}
        deadline = self.deadline  # one that is over is not kept: whoever looks need not know of pivots
        if deadline != before.deadline:
            change["deadline"] = deadline and deadline.isoformat()
        due = [at.due_at for at in self.steps.values() if at.due_at is not None and self.status.in_flight]
        if deadline is not None:
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
            deadline=deadline,
        )
        sent = [
            {"id": str(r.id), "type": r.command.message_type, "step": r.step, "direction": r.direction.value}
            for r in self.requests
        ] + [{"id": str(a.id), "type": a.event.message_type} for a in self.announcements]
        entry = HistoryEntry(kind, self.now, self.status, reason=self.reason, change=change, sent=tuple(sent), **about)
        return Decision(instance, tuple(self.requests), tuple(self.announcements), entry)

    # What the saga's methods say

    def apply(self, hook: OutcomeHook | None, outcome: Message | None) -> str | None:
        """Let the saga take an outcome into its state; return what went wrong, and then leave the state as it was."""
        if hook is None or outcome is None:
            return None
        what = "raised"
        try:
            hook.function(self.saga, outcome)
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
