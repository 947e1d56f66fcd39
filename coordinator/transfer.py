"""Taking an instance over into another version of its saga: what becomes of it, or why it must stay. Pure.

Nothing that has happened may get lost, and nothing may happen twice: what has begun keeps its place under its name,
what is still to be undone has a compensation, and a command that is under way says the same when it is sent again.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from coordinator.decision import Decision
from coordinator.definition import Saga, SagaDefinition
from coordinator.draft import Draft
from coordinator.flow import Each, Leaf, Node, Parallel, Sequence, When, nodes
from coordinator.instance import Fan, Instance, Status, StepState, StepStatus, step_and_item
from coordinator.steps import Hook, Migration, Step
from coordinator.waits import Delay, Wait
from coordinator.walk import walk
from events.errors import CoordinatorError

States = dict[str, StepState]

_WITHOUT_EFFECT = (StepStatus.DECLINED, StepStatus.UNDONE, StepStatus.TAKEN, StepStatus.NOT_TAKEN)
_ANSWERS = (StepStatus.TAKEN, StepStatus.NOT_TAKEN)


class NotTransferableError(CoordinatorError):
    """An instance cannot be taken over into another version where it stands; it goes on with the one that it has."""

    code = "not_transferable"


def transfer(
    old: SagaDefinition, new: SagaDefinition, instance: Instance, *, by: str, why: str, now: datetime
) -> Decision:
    """Return the decision that takes `instance` over from the version `old` to the version `new`.

    Raises:
        NotTransferableError: it must stay; the text says why.
    """
    migration = new.migrations.get(old.version)
    if migration is None:
        raise NotTransferableError(f"version {new.version} has no method with @migrates(from_={old.version})")
    if instance.status.ended:
        raise NotTransferableError("it has ended")
    saga = _made(migration, old, new, instance)
    steps = _Position(old, new, migration, instance).steps()
    for name, at in steps.items():
        if at.status.outstanding and isinstance(new.by_name.get(name), Step):
            _refuse_other_words(old, new, instance, name, saga)
            steps[name] = replace(at, made_of=None)
    state = saga.to_state()
    draft = Draft(new, replace(instance, version=new.version, state=state, steps=steps), now)
    walk(draft)
    if draft.status is not instance.status and draft.status is not Status.COMPLETED:
        raise NotTransferableError(f"version {new.version} could not go on with it: {draft.reason}")
    decision = draft.finish("migrated", actor=by, why=why)
    after = decision.instance
    steps_now = {name: at.to_json() for name, at in after.steps.items()}
    whole = {"state": after.state, "steps": steps_now, "turned_back": after.turned_back}
    if after.announced is not None:
        whole["announced"] = after.announced.value
    change = {**decision.entry.change, "version": [old.version, new.version], **whole}
    return replace(decision, entry=replace(decision.entry, change=change))


def _made(migration: Migration, old: SagaDefinition, new: SagaDefinition, instance: Instance) -> Saga:
    """Let the migration make the new saga, as it will be read again."""
    try:
        before = old.cls.from_state(instance.state)
        saga = migration.__get__(None, new.cls)(before)
        if isinstance(saga, new.cls):
            saga = new.cls.from_state(saga.to_state())
    except Exception as error:
        raise NotTransferableError(f"{migration.name} raised {error!r}") from error
    if not isinstance(saga, new.cls):
        raise NotTransferableError(f"{migration.name} must return a {new.cls.__name__}, not a {type(saga).__name__}")
    return saga


class _Position:
    """Where an instance stands in the new flow, by where it stood in the old one."""

    def __init__(self, old: SagaDefinition, new: SagaDefinition, migration: Migration, instance: Instance) -> None:
        self._old = old
        self._new = new
        self._migration = migration
        self._instance = instance
        self._steps: States = {}

    def steps(self) -> States:
        """Return the states of all parts of the new flow that have begun.

        Raises:
            NotTransferableError: something that has begun has no place there.
        """
        if self._old.lock is not None and self._new.lock != self._old.lock:
            raise NotTransferableError(f"it holds {self._old.lock}, or waits for it, until it has ended")
        if self._old.lock != self._new.lock:
            raise NotTransferableError(f"it does not hold {self._new.lock}, without which others would run beside it")
        conditions = {node.condition.name for node in nodes(self._new.flow) if isinstance(node, When)}
        branches = {branch.name for each in self._new.branches.values() for branch in each}
        for name, at in self._instance.steps.items():
            step, number = step_and_item(name)
            after = self._migration.renamed.get(step, step)
            if after in self._steps:
                raise NotTransferableError(f"{name} and another part are both {after} in version {self._new.version}")
            if number is not None:  # an item goes where its step goes
                self._steps[name] = at
            elif after in self._new.by_name:
                self._refuse_other_part(name, after, at)
                self._steps[after] = at
            elif (after in conditions and at.status in _ANSWERS) or after in branches:
                self._steps[after] = at
            elif at.status.pending or (name in self._old.by_name and self._has_effect(name, at)):
                raise NotTransferableError(f"{name} is {at.status}, and has no place in version {self._new.version}")
        self._settle_conditions(self._new.flow)
        if self._instance.status is not Status.COMPENSATING:  # then nothing new begins
            self._pass(self._new.flow)
        return self._steps

    def _has_effect(self, name: str, at: StepState) -> bool:
        return self._old.step_of(name) is not None and at.status not in _WITHOUT_EFFECT

    def _refuse_other_part(self, name: str, after: str, at: StepState) -> None:
        """See that what has begun is the same kind of part in the new version, and within the same branches."""
        before, now = self._old.by_name.get(name), self._new.by_name[after]
        if type(before) is not type(now):
            raise NotTransferableError(f"{name} has begun, and is another kind of part in version {self._new.version}")
        if _branches(self._old, name) != _branches(self._new, after):
            raise NotTransferableError(f"{name} has begun, and stands in another branch in version {self._new.version}")
        if isinstance(before, Each) and at.status.pending:
            raise NotTransferableError(f"items of {name} are under way: wait until all of them are over")
        if isinstance(before, Wait) and at.status.pending and name != after:
            raise NotTransferableError(f"{name} waits for an event, which finds it by that name: it must keep it")
        if isinstance(before, Wait | Delay) and at.status.pending and _awaited(before) != _awaited(now):
            raise NotTransferableError(f"{name} waits for something else in version {self._new.version}")
        was, step = self._old.step_of(name), self._new.step_of(after)
        if was is not None and step is not None:
            self._refuse_other_step(was, step, at)

    def _refuse_other_step(self, before: Step, now: Step, at: StepState) -> None:
        """See that a step that has begun can be ended, and undone, by the new version."""
        after = now.name
        is_undone_by_none = now.undo is None and not now.pivot
        if before.name != after and (at.status.pending or before.undo is not None or now.undo is not None):
            raise NotTransferableError(f"{before.name} is {at.status} and may have to be undone: it must keep its name")
        if before.undo is not None and at.status not in _WITHOUT_EFFECT and is_undone_by_none:
            raise NotTransferableError(f"{after} is {at.status}, and has no compensation any more")
        if before.pivot and not now.pivot and at.status is not StepStatus.DECLINED:
            raise NotTransferableError(f"{after} has begun, and there is no way back: it must stay a pivot")
        if now.pivot and not before.pivot and self._instance.status is not Status.RUNNING:
            raise NotTransferableError(f"{after} has become a pivot, and the saga is {self._instance.status}")
        hooks = ((before.on_succeeded, now.on_succeeded), (before.on_declined, now.on_declined))
        for took, takes in hooks:
            if at.status.pending and took is not None and takes is not None and took.outcome is not takes.outcome:
                raise NotTransferableError(f"{after} is {at.status}, and takes another outcome now")

    def _settle_conditions(self, flow: Node) -> None:
        """See that the answers to conditions are those that what has begun in them tells."""
        for node in nodes(flow):
            if not isinstance(node, When):
                continue
            name = node.condition.name
            then, otherwise = self._has_begun(node.then), node.otherwise is not None and self._has_begun(node.otherwise)
            if name not in self._steps and then is not otherwise:
                self._steps[name] = StepState(StepStatus.TAKEN if then else StepStatus.NOT_TAKEN)
            at = self._steps.get(name)
            holds = at is not None and at.status is StepStatus.TAKEN
            if (then and not holds) or (otherwise and (holds or at is None)):
                raise NotTransferableError(f"what has begun is not what the answer to {name} leads to")

    def _pass(self, flow: Node) -> None:
        """Count as done what the instance is past, where the migration says so."""
        for node in nodes(flow):
            if not isinstance(node, Sequence):
                continue
            begun = [number for number, part in enumerate(node.parts) if self._has_begun(part)]
            for part in node.parts[: max(begun, default=0)]:
                for name in list(self._left_in(part)):
                    self._pass_one(name)

    def _pass_one(self, name: str) -> None:
        node, step = self._new.by_name.get(name), self._new.step_of(name)
        if name not in self._migration.passed:
            raise NotTransferableError(
                f"{name} stands before what has begun already: let {self._migration.name} count it as passed, or wait"
            )
        if node is None:
            self._steps[name] = StepState(StepStatus.NOT_TAKEN)
        elif step is None or (step.undo is None and not step.pivot):
            fan = Fan(0) if isinstance(node, Each) else None
            self._steps[name] = StepState(StepStatus.SUCCEEDED, attempt=0, fan=fan)
        else:
            raise NotTransferableError(f"{name} cannot be passed: it would be undone, or is a pivot")

    def _has_begun(self, node: Node) -> bool:
        return any(name in self._steps for name in _names(node))

    def _left_in(self, node: Node) -> Iterator[str]:
        """Return the names of what would still begin in a part."""
        match node:
            case When(condition, then, otherwise):
                at = self._steps.get(condition.name)
                if at is None:
                    yield condition.name
                elif (taken := then if at.status is StepStatus.TAKEN else otherwise) is not None:
                    yield from self._left_in(taken)
            case Parallel() if any(branch.name in self._steps for branch in self._new.branches.get(node, ())):
                return  # as many branches as were needed are done: what has not begun in others never does
            case Sequence(parts) | Parallel(parts):
                for part in parts:
                    yield from self._left_in(part)
            case _ if node.name not in self._steps:
                yield node.name


def _names(node: Node) -> Iterator[str]:
    for part in nodes(node):
        if isinstance(part, Leaf):
            yield part.name
        elif isinstance(part, When):
            yield part.condition.name


def _branches(definition: SagaDefinition, name: str) -> list[tuple[str, frozenset[str]]]:
    """Return the branches around a part that may fail alone, by name, with all that is in them."""
    return [(branch.name, frozenset(_names(branch.part))) for branch in definition.around(name)]


def _awaited(node: Leaf) -> Any:
    """Return what a part waits for, in a form that can be compared."""
    if isinstance(node, Wait):
        return sorted(each.message_type for each in node.events), dict(node.by)
    return None  # for a time, which is known by now


def _refuse_other_words(old: SagaDefinition, new: SagaDefinition, instance: Instance, name: str, saga: Saga) -> None:
    """See that a command that is under way is the same when the new version sends it again: it has the same id."""
    at = instance.steps[name]
    before, now = old.step_of(name), new.step_of(name)
    if before is None or now is None:
        raise NotTransferableError(f"{name} is no step in both versions")
    hooks: tuple[Hook | None, Hook | None] = (before, now)
    if at.status is StepStatus.UNDOING:
        hooks = (before.undo, now.undo)
    said = _said(hooks[0], old.cls.from_state(instance.state if at.made_of is None else at.made_of))
    if said is None or said != _said(hooks[1], saga):
        raise NotTransferableError(
            f"{name} is {at.status}, and version {new.version} would say something else when it sends it again:"
            " wait for its answer"
        )


def _said(hook: Hook | None, saga: Saga) -> Any:
    """Return what a method of a saga says, in a form that can be compared; None if it says nothing."""
    if hook is None:
        return None
    try:
        command = hook.function(saga)
        return command.message_type, command.message_version, command.to_data()
    except Exception:  # noqa: BLE001  # user code raises what it likes; what cannot be asked for cannot be the same
        return None
