"""An approval as a part of a saga: it asks, waits until somebody has decided, and asks no more if the saga turns back.

manager = approval("order_approval", role="manager", remind_after=86_400)

class PlaceOrder(Saga):
...
flow = sequence(reserve, when(is_large, manager.part(key="order_id", requester="clerk", subject=describe)), ship)

app = App("shop", sagas=[PlaceOrder], lifecycles=[manager.lifecycle], handlers=approval_handlers(manager))
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from coordinator.flow import Sequence, sequence
from coordinator.lifecycles import Act, Actor, Due, Lifecycle, deadlines, transition
from coordinator.lifecycles.definition import LifecycleDefinition
from coordinator.lifecycles.moves import create, move
from coordinator.lifecycles.service import Definitions
from coordinator.lifecycles.store import LifecycleStore
from coordinator.steps import step
from coordinator.waits import awaits
from events.catalog.approvals import (
    ApprovalDenied,
    ApprovalGranted,
    ApprovalOverdue,
    ApprovalRequested,
    ApprovalWithdrawn,
    RequestApproval,
    WithdrawApproval,
)
from events.clock import Clock, SystemClock
from events.derive import derive_id
from events.envelope import Direction
from handlers.context import Context, Declined
from handlers.definition import Handler, handles

SAGA = "saga"  # the role of a saga that asks


@dataclass(frozen=True)
class Approval:
    """A kind of approval. Made by `approval`.

    Attributes:
        lifecycle: `pending`, then `granted`, `denied` or `withdrawn`: for the application's `lifecycles`.
        granted, denied: the events of the decision, which the saga waits for.
    """

    lifecycle: type[Lifecycle]
    granted: type[ApprovalGranted]
    denied: type[ApprovalDenied]

    @property
    def name(self) -> str:
        """The name of its life cycle."""
        return self.lifecycle.definition.name

    def part(
        self, *, key: str, requester: str, subject: Callable[[Any], str], timeout: float | None = None
    ) -> Sequence:
        """Return the part of a flow that asks for this approval, and waits for it.

        It is done when the approval is granted. When it is denied, or does not come in time, the saga turns back.
        Whenever the saga turns back, what it has asked for is withdrawn.

        Args:
            key: the field of the saga that is the approval's business key, one for each saga.
            requester: the field that names the person for whom it is asked; he cannot grant it.
            subject: a method of the saga that says what is to be approved, in words.
            timeout: seconds to wait for the decision; for ever by default.
        """
        name = self.name

        def request(saga: Any) -> RequestApproval:
            person, words = _filled(saga, requester), subject(saga)
            return RequestApproval(approval=name, key=_filled(saga, key), requester=person, subject=words)

        def withdraw(saga: Any) -> WithdrawApproval:
            return WithdrawApproval(approval=name, key=_filled(saga, key))

        def decided(_saga: Any, _event: ApprovalGranted | ApprovalDenied) -> None:
            """Nothing is taken into the state: the audit trail has it."""

        request.__name__, withdraw.__name__, decided.__name__ = f"request_{name}", f"withdraw_{name}", name
        asking = step(request)
        asking.compensation(withdraw)
        waiting = awaits(self.granted, by={"key": key}, timeout=timeout)(decided)
        waiting.declined_by(self.denied)(decided)
        return sequence(asking, waiting)


def approval(
    name: str,
    *,
    role: str,
    version: int = 1,
    approvals: int = 1,
    remind_after: float | None = None,
    every: float | None = None,
    escalate_after: float | None = None,
    escalate_to: str | None = None,
) -> Approval:
    """Declare a kind of approval that sagas wait for.

    Args:
        name: the name of its life cycle; its events are called after it.
        role: who may grant and deny it.
        version: of its life cycle.
        approvals: how many different persons must grant it.
        remind_after: seconds to the first reminder.
        every: seconds from one reminder to the next.
        escalate_after: seconds to its escalation.
        escalate_to: the role that may then decide, too.

    Raises:
        DefinitionError: it cannot work so; the text says why.
    """
    prefix = name.replace("_", ".")

    class Granted(ApprovalGranted, type=f"{prefix}.granted"):
        """This approval is granted."""

    class Denied(ApprovalDenied, type=f"{prefix}.denied"):
        """This approval is denied."""

    class Asked(Lifecycle, name=name, version=version):
        """Something that a saga has asked for."""

        key: str
        subject: str
        requester: str

        @transition(to="pending", roles=SAGA)
        def request(self, _: Act) -> ApprovalRequested:
            return ApprovalRequested(
                approval=name, key=self.key, subject=self.subject, requester=self.requester, role=role
            )

        @transition("pending", to="granted", roles=role, four_eyes="requester", approvals=approvals)
        def grant(self, act: Act) -> Granted:
            return Granted(key=self.key, decided_by=str(act.by), comment=act.comment)

        @transition("pending", to="denied", roles=role, comment=True)
        def deny(self, act: Act) -> Denied:
            return Denied(key=self.key, decided_by=str(act.by), reason=act.comment)

        @transition("pending", "granted", to="withdrawn", roles=SAGA, escalates=False)  # the saga would wait for ever
        def withdraw(self, _: Act) -> ApprovalWithdrawn:
            return ApprovalWithdrawn(approval=name, key=self.key)

        if remind_after is not None or escalate_after is not None:

            @deadlines(
                "pending",
                remind_after=remind_after,
                every=every,
                escalate_after=escalate_after,
                escalate_to=escalate_to,
            )
            def overdue(self, due: Due) -> ApprovalOverdue:
                return ApprovalOverdue(
                    approval=name,
                    key=self.key,
                    subject=self.subject,
                    waiting_since=due.entered_at,
                    reminders=due.reminders,
                    escalated_to=due.escalated_to,
                )

    return Approval(Asked, Granted, Denied)


def approval_handlers(*approvals: Approval, clock: Clock | None = None) -> tuple[Handler, Handler]:
    """Return the handlers of `RequestApproval` and `WithdrawApproval`, for an application's `handlers`.

    They work in the transaction in which the command is recorded. The same saga asks once, however often it does.

    Args:
        approvals: those that its sagas wait for.
        clock: the time where the database has none of its own (SQLite).
    """
    desk = _Desk(Definitions(each.lifecycle for each in approvals), clock or SystemClock())

    @handles(RequestApproval)
    async def request_approval(command: RequestApproval, session: AsyncSession, context: Context) -> None:
        await desk.request(command, await session.connection(), context)

    @handles(WithdrawApproval)
    async def withdraw_approval(command: WithdrawApproval, session: AsyncSession, context: Context) -> None:
        await desk.withdraw(command, await session.connection(), context)

    return request_approval, withdraw_approval


class _Desk:
    """Creates and withdraws approvals in the transactions of handlers."""

    def __init__(self, definitions: Definitions, clock: Clock) -> None:
        self._definitions = definitions
        self._clock = clock

    async def request(self, command: RequestApproval, connection: AsyncConnection, context: Context) -> None:
        definition, entity_id = self._definitions.newest(command.approval), _id_of(context)
        data = definition.cls.from_data(command.model_dump(include={"key", "subject", "requester"}))
        act = await self._act(definition.creation.name, connection, context)
        moved = create(definition, data, act, id=entity_id, correlation_id=context.correlation_id)
        store = LifecycleStore(connection.engine, self._clock)
        if await store.insert(connection, moved):
            _publish(context, moved.event)
            return
        known = await store.load(connection, definition.name, command.key)
        if known is None or known.id != entity_id:
            raise Declined(f"somebody else has asked for the {command.approval} {command.key} already")

    async def withdraw(self, command: WithdrawApproval, connection: AsyncConnection, context: Context) -> None:
        store = LifecycleStore(connection.engine, self._clock)
        entity = await store.load(connection, command.approval, command.key)
        if entity is None or entity.id != _id_of(context):
            return  # it was never asked for
        definition: LifecycleDefinition = self._definitions.of(entity)
        if entity.state not in definition.transitions["withdraw"].sources:
            return  # it was denied
        moved = move(definition, entity, await self._act("withdraw", connection, context))
        await store.update(connection, [moved])
        _publish(context, moved.event)

    async def _act(self, transition_name: str, connection: AsyncConnection, context: Context) -> Act:
        by = Actor(f"saga {context.saga_id}", {SAGA})
        return Act(transition_name, by, await self._now(connection), message_id=context.message_id)

    async def _now(self, connection: AsyncConnection) -> datetime:
        if connection.dialect.name != "postgresql":
            return self._clock.now()
        return cast("datetime", (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one())


def _filled(saga: Any, field: str) -> str:
    """Return a field in words; None would be a key for all, and nobody that four eyes could look for."""
    value = getattr(saga, field)
    if value is None or not str(value).strip():
        raise ValueError(f"{field} is empty, and an approval needs it")
    return str(value)


def _id_of(context: Context) -> UUID:
    """Return the id of the approval that a step of a saga asks for: the same in both directions."""
    if context.saga_id is None or context.step is None:
        raise Declined("only a step of a saga asks for an approval")
    return derive_id(context.saga_id, context.step, Direction.DO.value, "approval")


def _publish(context: Context, event: Any) -> None:
    if event is not None:
        context.publish(event)
