"""Running a handler for one message: from an envelope to an outcome. Nothing is stored here."""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from uuid import UUID

from dishka import AsyncContainer
from opentelemetry.trace import SpanKind
from sqlalchemy.ext.asyncio import AsyncSession
from tenacity import AsyncRetrying, RetryCallState, stop_after_attempt

from events import tracing
from events.bus import Address, Exchange
from events.clock import Clock
from events.codec import Readable
from events.dead_letters import DeadLetter, storable
from events.derive import derive_id
from events.envelope import Envelope, Result, SagaLink, wrap
from events.errors import CoordinatorError, DefinitionError, RejectedError
from events.ids import Random
from events.intake import Item
from events.message import Event, Failed, Message, Refused, Reply, Succeeded
from events.outbox import Outbound, route
from events.registry import Registry
from events.service import is_cancelled
from handlers.context import Context, Declined
from handlers.definition import Handler

logger = logging.getLogger(__name__)

_MAX_REASON = 500


class Progress(Enum):
    """How far an outcome has come."""

    PENDING = "to be committed with others"
    COMMITTED = "committed with the handler's own work"
    LOST = "somebody else has handled the message meanwhile"


@dataclass(slots=True)
class Outcome:
    """What came of one message, ready to be committed. `bars` is the key of a command that must not run any more."""

    item: Item
    envelope: Envelope | None
    result: Result
    messages: list[Outbound] = field(default_factory=list)
    reply: Outbound | None = None
    dead: DeadLetter | None = None
    bars: UUID | None = None
    progress: Progress = Progress.PENDING


class HandlerCancelledError(CoordinatorError):
    """Something inside the handler cancelled it, though nobody here asked for that."""

    code = "cancelled"


class HandlerPanickedError(CoordinatorError):
    """An extension that the handler uses panicked: it raised what is no Exception."""

    code = "panicked"


Once = Callable[[Message, Context], Awaitable[Outcome]]


class Execution:
    """Runs one handler: reads the message, fills in parameters, tries again, and says what came of it."""

    def __init__(
        self,
        handler: Handler,
        registry: Registry,
        *,
        source: str,
        container: AsyncContainer | None,
        clock: Clock,
        random: Random,
    ) -> None:
        self._handler = handler
        self._registry = registry
        self._source = source
        self._container = container
        self._clock = clock
        self._random = random

    def reject(self, item: Item, error: RejectedError) -> Outcome:
        """Return the outcome of a message that cannot be read: a dead letter and, for a saga, a failed reply."""
        envelope = item.part.envelope if isinstance(item.part, Readable) else None
        logger.warning(
            "%s cannot take a message: %s: %s",
            self._handler.name,
            error.code,
            error,
            extra={"action": "handler.rejected", "handler": self._handler.name, "reason": error.code},
        )
        return self.fail(item, envelope, error.code, str(error), attempts=0)

    def fail(self, item: Item, envelope: Envelope | None, code: str, detail: str, *, attempts: int) -> Outcome:
        """Return the outcome of a message that was given up on: a dead letter and, for a saga, a failed reply."""
        outcome = Outcome(item, envelope, Result.FAILED)
        detail = storable(detail)
        outcome.dead = DeadLetter(item, self._handler.name, code, detail, attempts)
        if envelope is not None:
            failure = Failed(code=code, reason=detail[-_MAX_REASON:], attempts=attempts)
            span = tracing.current_span()
            self._reply(outcome, envelope, failure, tracing.traceparent_of(span), tracing.tracestate_of(span))
        return outcome

    def undo_nothing(self, item: Item, envelope: Envelope, bars: UUID | None) -> Outcome:
        """Return the outcome of a compensation whose command has not run here, and never will."""
        logger.info(
            "%s has nothing to undo: the command of %s has not run, and is barred from now on",
            self._handler.name,
            envelope.id,
            extra={"action": "handler.nothing_to_undo", "handler": self._handler.name, "message_id": envelope.id},
        )
        outcome = Outcome(item, envelope, Result.SUCCEEDED, bars=bars)
        self._reply(outcome, envelope, Succeeded(), envelope.traceparent, envelope.tracestate)
        return outcome

    def refuse(self, item: Item, envelope: Envelope) -> Outcome:
        """Return the outcome of a command whose compensation was there first. Nothing more is recorded of it."""
        logger.info(
            "%s does not run %s: its compensation was there first",
            self._handler.name,
            envelope.id,
            extra={"action": "handler.barred", "handler": self._handler.name, "message_id": envelope.id},
        )
        outcome = Outcome(item, None, Result.DECLINED)
        refused = Refused(reason="its compensation was there first")
        self._reply(outcome, envelope, refused, envelope.traceparent, envelope.tracestate)
        return outcome

    async def run(self, item: Item, envelope: Envelope, once: Once) -> Outcome:
        """Read the message and call `once` until it returns or the attempts are used up."""
        parent, links = tracing.parent_and_links(envelope.traceparent, envelope.tracestate, item.transport)
        name = f"process {envelope.type}"
        attributes = _attributes(self._handler.name, envelope) if tracing.is_on() else None
        with tracing.span(name, parent=parent, kind=SpanKind.CONSUMER, links=links, attributes=attributes) as span:
            try:
                message = self._registry.read(envelope)
            except RejectedError as error:
                tracing.mark_failed(span, error.code)
                return self.reject(item, error)
            context = _context(envelope)
            try:
                return await self._try(message, context, once)
            except Exception as error:  # noqa: BLE001  # whatever user code raises is a technical failure
                span.record_exception(error)
                tracing.mark_failed(span, repr(error))
                return self._give_up(item, envelope, context, error)

    async def _try(self, message: Message, context: Context, once: Once) -> Outcome:
        try:
            return await once(message, context)
        except Exception as error:
            if self._handler.retry.attempts == 1:
                raise
            self._log_failure(context, error)
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._handler.retry.attempts - 1),
            wait=self._jitter,
            sleep=self._clock.sleep,
            after=lambda state: self._log_failure(context, state.outcome.exception() if state.outcome else None),
            reraise=True,
        )
        await self._clock.sleep(self._random.uniform(0, self._handler.retry.bound(1)))
        async for attempt in retrying:
            with attempt:
                context.attempt = attempt.retry_state.attempt_number + 1
                context.published.clear()
                return await once(message, context)
        raise AssertionError("tenacity returns or raises")

    def _jitter(self, state: RetryCallState) -> float:
        """Full jitter (Brooker, "Exponential Backoff And Jitter", 2015): spreads what failed together."""
        return self._random.uniform(0, self._handler.retry.bound(state.attempt_number + 1))

    def _log_failure(self, context: Context, error: BaseException | None) -> None:
        logger.info(
            "%s failed on %s, attempt %d of %d: %r",
            self._handler.name,
            context.message_id,
            context.attempt,
            self._handler.retry.attempts,
            error,
            extra={"action": "handler.attempt_failed", "handler": self._handler.name, "message_id": context.message_id},
        )

    async def call(
        self, item: Item, envelope: Envelope, message: Message, context: Context, session: AsyncSession | None
    ) -> Outcome:
        """Call the handler's function once and turn what it returns or declines into an outcome."""
        handler = self._handler
        arguments: dict[str, Any] = {handler.message_parameter: message}
        if handler.context_parameter:
            arguments[handler.context_parameter] = context
        if handler.session_parameter:
            arguments[handler.session_parameter] = session
        result, returned = Result.SUCCEEDED, None
        try:
            returned = await self._invoke(arguments)
        except Declined as declined:
            result, returned = Result.DECLINED, declined.outcome
        except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            raise HandlerCancelledError from error  # a library that lost its connection, not our own cancel
        except BaseException as error:
            raise HandlerPanickedError from error
        if returned is not None and not isinstance(returned, Event | Reply):
            raise DefinitionError(
                f"handler {handler.name} returned {type(returned).__name__}; return an Event, a Reply or None"
            )
        outcome = Outcome(item, envelope, result)
        self._add_messages(outcome, envelope, context, returned)
        return outcome

    async def _invoke(self, arguments: dict[str, Any]) -> Any:
        """Call the handler's function with `arguments` and what the container makes for it, within the timeout."""
        handler = self._handler
        async with asyncio.timeout(handler.timeout):
            if not handler.resources or self._container is None:
                return await handler.function(**arguments)
            async with self._container() as scope:
                for parameter, wanted in handler.resources:
                    arguments[parameter] = await scope.get(wanted)
                return await handler.function(**arguments)

    def _add_messages(
        self, outcome: Outcome, envelope: Envelope, context: Context, returned: Event | Reply | None
    ) -> None:
        span = tracing.current_span()
        traceparent, tracestate = tracing.traceparent_of(span), tracing.tracestate_of(span)
        events = [*context.published]
        if isinstance(returned, Event):
            events.append(returned)
        for number, event in enumerate(events):
            follow = wrap(
                event,
                id=str(derive_id(envelope.key, self._handler.name, "event", number)),
                source=self._source,
                time=self._clock.now(),
                correlation_id=envelope.correlation_id or envelope.id,
                causation_id=envelope.id,
                traceparent=traceparent,
                tracestate=tracestate,
            )
            outcome.messages.append(Outbound(follow, route(event), event.bundle_limit))
        self._reply(outcome, envelope, returned or Succeeded(), traceparent, tracestate)

    def _reply(
        self,
        outcome: Outcome,
        envelope: Envelope,
        message: Event | Reply,
        traceparent: str | None,
        tracestate: str | None,
    ) -> None:
        """Add the reply to the saga that sent the command; other messages have none."""
        saga = envelope.saga
        if saga is None or envelope.reply_to is None:
            return
        reply = wrap(
            message,
            id=str(derive_id(envelope.key, self._handler.name, "reply")),
            source=self._source,
            time=self._clock.now(),
            correlation_id=envelope.correlation_id,
            causation_id=envelope.id,
            traceparent=traceparent,
            tracestate=tracestate,
            saga=SagaLink(saga.saga_id, saga.step, saga.direction, saga.attempt, outcome.result),
        )
        outcome.reply = Outbound(reply, Address(Exchange.REPLIES, envelope.reply_to))
        outcome.messages.append(outcome.reply)

    def _give_up(self, item: Item, envelope: Envelope, context: Context, error: Exception) -> Outcome:
        """Return a dead letter with the reason and, for a saga, a failed reply."""
        logger.error(
            "%s gave up on %s after %d attempts: %r",
            self._handler.name,
            envelope.id,
            context.attempt,
            error,
            exc_info=error,
            extra={"action": "handler.gave_up", "handler": self._handler.name, "message_id": envelope.id},
        )
        detail = "".join(traceback.format_exception(error))
        code = error.code if isinstance(error, RejectedError) else "failed"
        return self.fail(item, envelope, code, detail, attempts=context.attempt)


def _context(envelope: Envelope) -> Context:
    saga = envelope.saga
    if saga is None:
        return Context(envelope.id, str(envelope.key), envelope.correlation_id)
    return Context(
        message_id=envelope.id,
        idempotency_key=str(derive_id(saga.saga_id, saga.step, saga.direction.value)),
        correlation_id=envelope.correlation_id,
        saga_id=saga.saga_id,
        step=saga.step,
        direction=saga.direction,
    )


def _attributes(name: str, envelope: Envelope) -> dict[str, Any]:
    """Attributes by the messaging conventions of OpenTelemetry."""
    attributes: dict[str, Any] = {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.id": envelope.id,
        "messaging.consumer.group.name": name,
        "messaging.message.type": envelope.type,
    }
    if envelope.correlation_id:
        attributes["messaging.message.conversation_id"] = envelope.correlation_id
    if envelope.saga:
        attributes["saga.id"] = str(envelope.saga.saga_id)
        attributes["saga.step"] = envelope.saga.step
        attributes["saga.direction"] = envelope.saga.direction.value
    return attributes
