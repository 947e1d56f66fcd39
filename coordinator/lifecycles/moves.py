"""The functional core of life cycles: what follows from an act, and from time. No clock, no input or output.

Every change of an entity goes through `create`, `move` or `elapse`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from pydantic_core import to_json

from coordinator.lifecycles.definition import Lifecycle, LifecycleDefinition
from coordinator.lifecycles.entity import (
    MAX_COMMENT,
    Act,
    Actor,
    AuditEntry,
    Delegation,
    Due,
    Entity,
    Kind,
    Moved,
    MovedOnError,
    NotAllowedError,
    Signature,
    TransitionRefusedError,
    folded,
)
from coordinator.lifecycles.rules import Transition
from coordinator.steps import Hook
from events.errors import DefinitionError
from events.message import Event


@dataclass(frozen=True, slots=True)
class _Right:
    """The role that allows an act, and the delegation that gives it."""

    role: str
    delegation: UUID | None = None


def create(
    definition: LifecycleDefinition, data: Lifecycle, act: Act, *, id: UUID, correlation_id: str | None = None
) -> Moved:
    """Return what follows from the creation of an entity; `act.transition` is the definition's creation.

    Raises:
        NotAllowedError: this person may not create it.
        TransitionRefusedError: its guard refuses it, its key is empty, or a comment is missing.
        Exception: whatever its guard or event raises.
    """
    creation, key = definition.creation, str(getattr(data, definition.key_field))
    if not key.strip():
        raise TransitionRefusedError(f"{definition.key_field} is empty; it is the business key of a {definition.name}")
    right = _right(definition, creation, data, act)
    _check_comment(creation, act)
    _check_texts(data.to_data())
    _ask(creation, data)
    entity = Entity(
        id=id,
        lifecycle=definition.name,
        version=definition.version,
        key=key,
        state=creation.to,
        data=data.to_data(),
        revision=0,
        created_at=act.at,
        updated_at=act.at,
        entered_at=act.at,
        correlation_id=correlation_id,
    )
    entry = AuditEntry(
        Kind.CREATED,
        act.at,
        None,
        creation.to,
        creation.name,
        act.by,
        right.role,
        right.delegation,
        act.comment,
        act.message_id,
        change=entity.data,
    )
    return Moved(_enter(definition, entity, creation, act), entry, _event(creation, data, act))


def move(definition: LifecycleDefinition, entity: Entity, act: Act) -> Moved:
    """Return what follows from an act.

    Raises:
        MovedOnError: the entity has changed since it was looked at.
        NotAllowedError: this person may not do this: for want of the role, or of a second pair of eyes.
        TransitionRefusedError: it is not possible in this state, its guard refuses it, a comment is missing, or a
            field cannot be edited so.
        Exception: whatever its guard or event raises.
    """
    if act.revision not in (None, entity.revision):
        raise MovedOnError(
            f"{_name(entity)} has changed: it is at revision {entity.revision}, not {act.revision}; look at it again"
        )
    transition = _transition(definition, entity, act.transition)
    data = definition.cls.from_data(entity.data)
    right = _right(definition, transition, data, act, entity)
    _check_four_eyes(definition, transition, data, entity, act)
    _check_comment(transition, act)
    data = _edited(definition, transition, data, act)
    _ask(transition, data)
    signature = (act.by.user, act.by.acting_for)
    votes = [*entity.votes.get(transition.name, ()), signature]
    entry = AuditEntry(
        Kind.MOVED,
        act.at,
        entity.state,
        transition.to,
        transition.name,
        act.by,
        right.role,
        right.delegation,
        act.comment,
        act.message_id,
        votes if transition.approvals > 1 else (),
        {name: data.to_data()[name] for name in act.edits},
    )
    if len(votes) < transition.approvals:
        entry = replace(entry, kind=Kind.VOTED, to_state=entity.state)
        voted = replace(_signed(entity, transition, act), votes={**entity.votes, transition.name: votes})
        return Moved(replace(voted, data=data.to_data()), entry)
    after = replace(entity, data=data.to_data(), state=transition.to)
    return Moved(_enter(definition, after, transition, act), entry, _event(transition, data, act))


def elapse(definition: LifecycleDefinition, entity: Entity, now: datetime) -> Moved | None:
    """Return what follows from the time that has passed, None if nothing is due.

    A reminder or an escalation whose event cannot be made happens without it; the audit trail says so.
    """
    if entity.due_at is None or entity.due_at > now:
        return None  # somebody was faster
    after = replace(entity, revision=entity.revision + 1, updated_at=now)
    state = definition.deadlines.get(entity.state)
    if state is None:  # the code has changed since
        entry = AuditEntry(
            Kind.REMINDED, now, entity.state, entity.state, comment="this state has no deadlines any more"
        )
        return Moved(replace(after, remind_at=None, escalate_at=None), entry)
    if entity.escalate_at is not None and entity.escalate_at <= now:
        kind, role = Kind.ESCALATED, state.escalate_to
        to = entity.data.get(role) if role in definition.cls.model_fields else role
        after = replace(after, escalate_at=None, escalated_to=str(to) if to else None)
    else:
        again = None if state.every is None else now + timedelta(seconds=state.every)
        after = replace(after, remind_at=again, reminders=entity.reminders + 1)
        kind, role = Kind.REMINDED, None
    due = Due(kind, entity.state, entity.entered_at, now, after.reminders, after.escalated_to)
    problems, event = [], None
    if kind is Kind.ESCALATED and after.escalated_to is None:
        problems.append(f"{role} names nobody, so it is escalated to nobody")
    try:
        event = _event(state, definition.cls.from_data(entity.data), due)
    except Exception as error:  # noqa: BLE001  # user code; who waits must be found in the audit trail all the same
        problems.append(f"its event could not be made: {error!r}")
    entry = AuditEntry(kind, now, entity.state, entity.state, role=role, comment="; ".join(problems)[:MAX_COMMENT])
    return Moved(after, entry, event)


def _transition(definition: LifecycleDefinition, entity: Entity, name: str) -> Transition:
    possible = ", ".join(each.name for each in definition.out_of(entity.state))
    here = f"{_name(entity)} is {entity.state}; possible is: {possible or 'nothing, this is its end'}"
    transition = definition.transitions.get(name)
    if transition is None:
        raise TransitionRefusedError(f"there is no transition {name!r}; {here}")
    if entity.state not in transition.sources:
        raise TransitionRefusedError(f"{name} is possible in {' and '.join(transition.sources)}; {here}")
    return transition


def _right(
    definition: LifecycleDefinition, transition: Transition, data: Lifecycle, act: Act, entity: Entity | None = None
) -> _Right:
    """Return what allows the act.

    Raises:
        NotAllowedError: nothing does.
    """
    roles, by = set(transition.roles), act.by
    own = set(by.roles)
    if transition.by is not None:
        only = getattr(data, transition.by)
        if only is None or str(only) not in by.persons[-1:]:
            raise NotAllowedError(f"only {transition.by} {only} may {transition.name}, not {by}")
    elif entity is not None and transition.escalates and (escalated_to := _escalated_to(definition, entity, by)):
        roles.add(escalated_to)
        own |= {escalated_to} & definition.cls.model_fields.keys()  # he has this right by his name
    if by.acting_for is None:
        if having := roles & own:
            return _Right(min(having))
        raise NotAllowedError(f"{by} may not {transition.name}: that takes the role {_either(roles)}")
    for each in _holding(act, definition.name):
        if each.to_user == by.user and each.from_user == by.acting_for and each.role in roles:
            return _Right(each.role, each.id)
    raise NotAllowedError(
        f"{by.user} may not {transition.name} for {by.acting_for}, who has not delegated the role {_either(roles)} to"
        " him at this time"
    )


def _escalated_to(definition: LifecycleDefinition, entity: Entity, by: Actor) -> str | None:
    """Return the role that an escalation has added; the field's name where it names the very person who decides."""
    state = definition.deadlines.get(entity.state)
    if entity.escalated_to is None or state is None or state.escalate_to not in definition.cls.model_fields:
        return entity.escalated_to
    return state.escalate_to if by.persons[-1] == entity.escalated_to else None


def _check_four_eyes(
    definition: LifecycleDefinition, transition: Transition, data: Lifecycle, entity: Entity, act: Act
) -> None:
    """Refuse whom the four eyes exclude: in his own name or another's, and whoever stands in, or stood in, for him."""
    persons = {folded(name) for name in act.by.persons}
    stands_in_for = {folded(each.from_user) for each in _holding(act, definition.name)}
    for name in transition.four_eyes:
        excluded = {folded(person) for person in _named(name, data, entity)}
        helpers = {
            folded(user)
            for signatures in entity.signatures.values()
            for user, acting_for in signatures
            if acting_for is not None and folded(acting_for) in excluded
        }
        if persons & (excluded | helpers) or stands_in_for & excluded:
            raise NotAllowedError(
                f"{act.by} may not {transition.name}: it takes somebody else than {name} and who stands in for him"
            )
    for user, acting_for in entity.votes.get(transition.name, ()):
        if persons & {folded(name) for name in (user, acting_for) if name}:
            raise NotAllowedError(
                f"{act.by} may not {transition.name} again: it takes {transition.approvals} different persons"
            )


def _named(name: str, data: Lifecycle, entity: Entity) -> Iterable[str]:
    """Return the persons that a name of `four_eyes` stands for: a field's, or those who took a transition."""
    if name not in type(data).model_fields:
        return [person for signature in entity.signatures.get(name, ()) for person in signature if person]
    value = getattr(data, name)
    if value is None or not folded(str(value)):
        raise NotAllowedError(f"{name} is empty, so nobody can tell who is somebody else")
    return [str(value)]


def _holding(act: Act, lifecycle: str) -> list[Delegation]:
    """Return the delegations that count, of those that were given to the persons of the act."""
    persons = {folded(name) for name in act.by.persons}
    return [each for each in act.delegations if folded(each.to_user) in persons and each.holds(lifecycle, act.at)]


def _check_comment(transition: Transition, act: Act) -> None:
    if transition.comment and not act.comment.strip():
        raise TransitionRefusedError(f"{transition.name} needs a comment")
    if len(act.comment) > MAX_COMMENT:
        raise TransitionRefusedError(f"a comment has {MAX_COMMENT} characters at most")
    _check_texts(act.comment)


def _check_texts(value: Any) -> None:
    """Refuse what PostgreSQL or UTF-8 cannot hold, on all databases alike."""
    match value:
        case str():
            if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
                raise TransitionRefusedError(f"{value[:100]!r} has NUL or half a character in it, which cannot be kept")
        case dict():
            for name, each in value.items():
                _check_texts(name)
                _check_texts(each)
        case list():
            for each in value:
                _check_texts(each)


def _edited(definition: LifecycleDefinition, transition: Transition, data: Lifecycle, act: Act) -> Lifecycle:
    if not act.edits:
        return data
    if strange := sorted(set(act.edits) - transition.edits):
        can = ", ".join(sorted(transition.edits)) or "nothing"
        raise TransitionRefusedError(f"{transition.name} does not edit {', '.join(strange)}; it edits {can}")
    _check_texts(act.edits)
    try:
        return definition.cls.model_validate_json(to_json({**data.to_data(), **act.edits}))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise TransitionRefusedError(f"the edits do not fit: {wrong}") from error


def _ask(transition: Transition, data: Lifecycle) -> None:
    """Ask the guard."""
    if transition.on_guard is None:
        return
    answer = transition.on_guard.function(data)
    if not isinstance(answer, bool | str):
        raise DefinitionError(
            f"the guard {transition.on_guard.name} must return True, False or why not, not {answer!r}"
        )
    if answer is not True:
        raise TransitionRefusedError(
            f"{transition.name} is refused: {answer or f'{transition.on_guard.name} does not hold'}"
        )


def _event(hook: Hook, data: Lifecycle, given: Act | Due) -> Event | None:
    event = hook.function(data, given)
    if event is not None and not isinstance(event, Event):
        raise DefinitionError(f"{hook.name} must return an Event or None, not {event!r}")
    return event


def _enter(definition: LifecycleDefinition, entity: Entity, transition: Transition, act: Act) -> Entity:
    """Return the entity as it enters the state that it has: deadlines and votes begin anew."""
    state = definition.deadlines.get(entity.state)
    return replace(
        _signed(entity, transition, act),
        votes={},
        entered_at=act.at,
        reminders=0,
        remind_at=_after(act.at, state.remind_after if state else None),
        escalate_at=_after(act.at, state.escalate_after if state else None),
        escalated_to=None,
    )


def _signed(entity: Entity, transition: Transition, act: Act) -> Entity:
    """Return the entity one revision later, with the signature of who has acted."""
    signature: Signature = (act.by.user, act.by.acting_for)
    known = entity.signatures.get(transition.name, ())
    signed = {**entity.signatures, transition.name: [*dict.fromkeys((*known, signature))]}
    return replace(entity, revision=entity.revision + 1, updated_at=act.at, signatures=signed)


def _after(at: datetime, seconds: float | None) -> datetime | None:
    return None if seconds is None else at + timedelta(seconds=seconds)


def _name(entity: Entity) -> str:
    return f"{entity.lifecycle} {entity.key}"


def _either(roles: Iterable[str]) -> str:
    return " or ".join(sorted(roles))
