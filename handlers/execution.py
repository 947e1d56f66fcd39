"""Running a handler for one message: from an envelope to an outcome. Nothing is stored here."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from opentelemetry.trace import SpanKind
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from tenacity import AsyncRetrying, retry_if_exception

from events import tracing
from events.codec import Readable
from events.dead_letters import error_type_of, stack_of
from events.derive import derive_id
from events.envelope import Envelope, Result, wrap
from events.errors import CoordinatorError, DefinitionError, RejectedError
from events.intake import Item
from events.message import Event, Message, Reply, Succeeded
from events.outbox import Outbound, route
from events.registry import Registry
from events.service import is_cancelled
from handlers.answers import Answers
from handlers.breaker import Circuit
from handlers.context import Context, Declined
from handlers.definition import Handler
from handlers.outcome import Outcome
from handlers.policy import Again, GiveUp, Ladder
from handlers.retries import Retries, Waiting, row_of
from handlers.timeouts import Timeouts
from handlers.tools import Tools

logger = logging.getLogger(__name__)


class HandlerCancelledError(CoordinatorError):
    """Something inside the handler cancelled it, though nobody here asked for that."""

    code = "cancelled"


class HandlerPanickedError(CoordinatorError):
    """An extension that the handler uses panicked: it raised what is no Exception."""

    code = "panicked"


Once = Callable[[Message, Context], Awaitable[Outcome]]


class Execution:
    """Runs one handler: reads the message, fills in parameters, tries again, and says what came of it.

    Attributes:
        retry: the policy in force; an operator may change it.
        timeouts: ends tries that take too long.
    """

    def __init__(
        self, handler: Handler, registry: Registry, answers: Answers, *, tools: Tools, circuit: Circuit | None = None
    ) -> None:
        self.retry = handler.retry
        self.timeouts = Timeouts(handler.name, handler.timeout)
        self._handler = handler
        self._registry = registry
        self._answers = answers
        self._container = tools.container
        self._clock = tools.clock
        self._random = tools.random
        self._retries = tools.retries
        self._circuit = circuit

    async def run(self, item: Item, envelope: Envelope, once: Once) -> Outcome:
        """Read the message and call `once` until it returns, its next try is due later, or there is none."""
        parent, links = tracing.parent_and_links(envelope.traceparent, envelope.tracestate, item.transport)
        row = row_of(item)
        name = f"process {envelope.type}"
        ladder = Ladder(self.retry, attempt=row.attempts if row else 1)
        attributes = _attributes(self._handler.name, envelope, ladder.attempt) if tracing.is_on() else None
        with tracing.span(name, parent=parent, kind=SpanKind.CONSUMER, links=links, attributes=attributes) as span:
            try:
                message = self._registry.read(envelope)
            except RejectedError as error:
                tracing.mark_failed(span, error.code)
                return self._answers.reject(item, error)
            context = _context(envelope, ladder.attempt)
            begun = self._clock.monotonic() - _age(row, self._retries)
            try:
                return await self._try(ladder, begun, message, context, once)
            except Exception as error:  # noqa: BLE001  # whatever user code raises is a technical failure
                span.record_exception(error)
                tracing.mark_failed(span, repr(error))
                return self._after_failure(item, envelope, ladder, error)

    async def _try(self, ladder: Ladder, begun: float, message: Message, context: Context, once: Once) -> Outcome:
        try:
            return await self._watched(once, message, context)
        except Exception as error:
            if not self._tries_on(ladder, begun, context, error):
                raise
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: self._tries_on(ladder, begun, context, error)),
            wait=lambda _: _pause(ladder),
            sleep=self._clock.sleep,
            reraise=True,
        )
        await self._clock.sleep(_pause(ladder))
        async for attempt in retrying:
            with attempt:
                context.published.clear()
                return await self._watched(once, message, context)
        raise AssertionError("tenacity returns or raises")

    async def _watched(self, once: Once, message: Message, context: Context) -> Outcome:
        """Make one try, and tell the breaker if it went well."""
        outcome = await once(message, context)
        if self._circuit is not None:
            self._circuit.succeeded()
        return outcome

    def _tries_on(self, ladder: Ladder, begun: float, context: Context, error: BaseException) -> bool:
        """Take in a failure; say whether the next try follows in process."""
        if not isinstance(error, Exception):
            return False
        self._log_failure(context, error)
        circuit = self._circuit
        if circuit and not isinstance(error, SQLAlchemyError) and not circuit.failed(error, context.message_id):
            ladder.spare(self._random)
            return False
        verdict = ladder.failed(error, elapsed=self._clock.monotonic() - begun, random=self._random)
        if not isinstance(verdict, Again) or not verdict.in_process:
            return False
        if circuit and not circuit.is_closed:
            return False
        ladder.attempt += 1
        context.attempt = ladder.attempt
        return True

    def _log_failure(self, context: Context, error: BaseException) -> None:
        logger.info(
            "%s failed on %s, attempt %d of %d: %r",
            self._handler.name,
            context.message_id,
            context.attempt,
            self.retry.attempts,
            error,
            extra={"action": "handler.attempt_failed", "handler": self._handler.name, "message_id": context.message_id},
        )

    def _after_failure(self, item: Item, envelope: Envelope, ladder: Ladder, error: Exception) -> Outcome:
        verdict = ladder.verdict
        if isinstance(verdict, GiveUp) or not isinstance(item.part, Readable):
            return self._give_up(item, envelope, ladder, error)
        outcome = Outcome(item, envelope, Result.FAILED)
        row = outcome.again = row_of(item) or self._answers.waiting(item, item.part)
        row.attempts, row.begun_at, row.crashes = ladder.attempt, None, 0
        row.due_at = self._retries.clock.now() + timedelta(seconds=verdict.wait)
        row.reason, row.error_type, row.detail = _code(error), error_type_of(error), stack_of(error)
        logger.info(
            "%s tries %s again in %.1f s, after %d of %d attempts",
            self._handler.name,
            envelope.id,
            verdict.wait,
            ladder.attempt,
            self.retry.attempts,
            extra={"action": "handler.delayed", "handler": self._handler.name, "message_id": envelope.id},
        )
        return outcome

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
            returned = await self._invoke(arguments, context.message_id)
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

    async def _invoke(self, arguments: dict[str, Any], message_id: str) -> Any:
        """Call the handler's function with `arguments` and what the container makes for it, within the timeout."""
        handler = self._handler
        async with self.timeouts.limit(message_id):
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
                source=self._answers.source,
                time=self._clock.now(),
                correlation_id=envelope.correlation_id or envelope.id,
                causation_id=envelope.id,
                traceparent=traceparent,
                tracestate=tracestate,
            )
            outcome.messages.append(Outbound(follow, route(event), event.bundle_limit))
        self._answers.reply(outcome, envelope, returned or Succeeded(), traceparent, tracestate)

    def _give_up(self, item: Item, envelope: Envelope, ladder: Ladder, error: Exception) -> Outcome:
        """Return a dead letter with the reason and, for a saga, a failed reply."""
        why = ladder.verdict.why if isinstance(ladder.verdict, GiveUp) else ""
        logger.error(
            "%s gave up on %s after %d attempts, %s: %r",
            self._handler.name,
            envelope.id,
            ladder.attempt,
            why,
            error,
            exc_info=error,
            extra={"action": "handler.gave_up", "handler": self._handler.name, "message_id": envelope.id},
        )
        return self._answers.fail(
            item, envelope, _code(error), stack_of(error), attempts=ladder.attempt, error_type=error_type_of(error)
        )


def _pause(ladder: Ladder) -> float:
    return ladder.verdict.wait if isinstance(ladder.verdict, Again) else 0.0


def _age(row: Waiting | None, retries: Retries) -> float:
    """Return how many seconds ago the first try began."""
    return (retries.clock.now() - row.first_at).total_seconds() if row else 0.0


def _code(error: Exception) -> str:
    return error.code if isinstance(error, RejectedError) else "failed"


def _context(envelope: Envelope, attempt: int) -> Context:
    saga = envelope.saga
    if saga is None:
        return Context(envelope.id, str(envelope.key), envelope.correlation_id, attempt=attempt)
    return Context(
        message_id=envelope.id,
        idempotency_key=str(derive_id(saga.saga_id, saga.step, saga.direction.value)),
        correlation_id=envelope.correlation_id,
        saga_id=saga.saga_id,
        step=saga.step,
        direction=saga.direction,
        attempt=attempt,
    )


def _attributes(name: str, envelope: Envelope, attempt: int) -> dict[str, Any]:
    """Attributes by the messaging conventions of OpenTelemetry."""
    attributes: dict[str, Any] = {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.id": envelope.id,
        "messaging.consumer.group.name": name,
        "messaging.message.type": envelope.type,
        "messaging.message.delivery_attempt": attempt,
    }
    if envelope.correlation_id:
        attributes["messaging.message.conversation_id"] = envelope.correlation_id
    if envelope.saga:
        attributes["saga.id"] = str(envelope.saga.saga_id)
        attributes["saga.step"] = envelope.saga.step
        attributes["saga.direction"] = envelope.saga.direction.value
    return attributes
