"""What is answered to a message that is not run: to duplicates, and to what cannot or must not be tried."""

import logging
from uuid import UUID

from events import tracing
from events.bus import Address, Exchange
from events.codec import Readable
from events.dead_letters import CONFLICT, DeadLetter, storable
from events.derive import derive_id
from events.envelope import Envelope, Result, SagaLink, wrap
from events.errors import RejectedError
from events.intake import Item
from events.message import Event, Failed, Refused, Reply, Succeeded
from events.outbox import Outbound, recorded_reply
from handlers.definition import Handler
from handlers.fence import is_barred
from handlers.inbox import Known, Recorded
from handlers.outcome import Outcome
from handlers.policy import Retry
from handlers.retries import Waiting, row_of
from handlers.tools import Tools

logger = logging.getLogger(__name__)

_MAX_REASON = 500


class Answers:
    """Makes the outcomes of messages that one handler does not run, and the replies of all.

    Args:
        handler: the handler.
        source: who speaks, in replies.
        tools: what the handlers of a process share.
    """

    def __init__(self, handler: Handler, *, source: str, tools: Tools) -> None:
        self._handler = handler
        self.source = source
        self._clock = tools.clock
        self._retries = tools.retries
        self._fence = tools.fence

    def to_known(self, item: Item, envelope: Envelope, known: Known) -> Outcome | None:
        """Return the outcome of a message that was handled before, or waits to be tried again; None for others."""
        recorded = known.recorded.get(envelope.key)
        waiting = known.waiting.get(envelope.key) if row_of(item) is None else None
        if (entry := recorded or waiting) and entry.contradicts(envelope):
            return self.bury_other(item, envelope, entry)
        if recorded and is_barred(recorded):
            return self.doubt(item, envelope) if _was_tried(item) else self.refuse(item, envelope)
        if recorded:
            return self.repeat(item, envelope, recorded)
        return Outcome(item, None, Result.SUCCEEDED) if waiting else None  # it will be tried when it is due

    def without_run(self, item: Item, part: Readable, known: Known, retry: Retry) -> Outcome | None:
        """Return the outcome of a message that must not be tried now; None for one that is to be."""
        envelope, row = part.envelope, row_of(item)
        if row is None and item.alone:
            return self.park(item, part)
        if self._fence.has_nothing_to_undo(envelope, known):
            command = self._fence.undone_by(envelope)
            return self.undo_nothing(item, envelope, None if command in known.recorded else command)
        if row is not None and row.crashes >= retry.crashes:
            return self.bury_crashed(item, envelope, row)
        return None

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
        row = row_of(item)
        return self.fail(item, envelope, error.code, str(error), attempts=row.attempts - 1 if row else 0)

    def fail(
        self,
        item: Item,
        envelope: Envelope | None,
        code: str,
        detail: str,
        *,
        attempts: int,
        error_type: str | None = None,
    ) -> Outcome:
        """Return the outcome of a message that was given up on: a dead letter and, for a saga, a failed reply."""
        outcome = Outcome(item, envelope, Result.FAILED)
        detail = storable(detail)
        row = row_of(item)
        outcome.dead = DeadLetter(
            item,
            self._handler.name,
            code,
            detail,
            attempts,
            error_type,
            first_at=row.first_at if row else None,
            reopens=row.dead_letter_id if row else None,
        )
        if envelope is not None:
            failure = Failed(code=code, reason=_told(detail, error_type), attempts=attempts)
            span = tracing.current_span()
            self.reply(outcome, envelope, failure, tracing.traceparent_of(span), tracing.tracestate_of(span))
        return outcome

    def park(self, item: Item, part: Readable) -> Outcome:
        """Return the outcome of a message that came a second time: it waits, to be counted before it is tried."""
        outcome = Outcome(item, part.envelope, Result.FAILED)
        outcome.again = self.waiting(item, part)
        return outcome

    def bury_crashed(self, item: Item, envelope: Envelope, row: Waiting) -> Outcome:
        """Return the outcome of a message that has ended its process too often: a dead letter."""
        logger.error(
            "%s gave up on %s: %d times a try of it has begun and not ended",
            self._handler.name,
            envelope.id,
            row.crashes,
            extra={"action": "handler.crashed", "handler": self._handler.name, "message_id": envelope.id},
        )
        detail = f"{row.crashes} times a try has begun and not ended: the process was killed, or hung"
        return self.fail(item, envelope, "crashed", detail, attempts=row.attempts - 1)

    def bury_other(self, item: Item, envelope: Envelope, known: Recorded) -> Outcome:
        """Return the outcome of a message whose id belongs to one with other content: a dead letter.

        Who asks again is answered what he was answered before: only the first content counts.
        """
        logger.error(
            "%s has another message %s, with other content; this one is a dead letter now",
            self._handler.name,
            envelope.id,
            extra={"action": "handler.conflict", "handler": self._handler.name, "message_id": envelope.id},
        )
        outcome = Outcome(item, None, Result.FAILED)
        detail = f"a message with the id {envelope.id} and other content was there first; only that one is handled"
        outcome.dead = DeadLetter(item, self._handler.name, CONFLICT, detail, attempts=0)
        if known.reply is not None and known.reply_to is not None:
            outcome.messages.append(recorded_reply(known.reply, known.reply_to))
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
        self.reply(outcome, envelope, Succeeded(), envelope.traceparent, envelope.tracestate)
        return outcome

    def refuse(self, item: Item, envelope: Envelope) -> Outcome:
        """Return the outcome of a command whose compensation came before any try. Nothing more is recorded of it."""
        logger.info(
            "%s does not run %s: its compensation was there first",
            self._handler.name,
            envelope.id,
            extra={"action": "handler.barred", "handler": self._handler.name, "message_id": envelope.id},
        )
        outcome = Outcome(item, None, Result.DECLINED)
        refused = Refused(reason="its compensation was there first")
        self.reply(outcome, envelope, refused, envelope.traceparent, envelope.tracestate)
        return outcome

    def doubt(self, item: Item, envelope: Envelope) -> Outcome:
        """Return the outcome of a command that has been tried, and whose compensation came meanwhile.

        It may have been done, and after its compensation: it fails, so that its saga undoes it once more.
        """
        logger.warning(
            "%s does not try %s again: its compensation came meanwhile; its saga is told to undo it once more",
            self._handler.name,
            envelope.id,
            extra={"action": "handler.overtaken", "handler": self._handler.name, "message_id": envelope.id},
        )
        outcome = Outcome(item, None, Result.FAILED, doubts=envelope.key)
        row = row_of(item)
        reason = "its compensation came while it was tried; nobody knows whether it was done"
        failed = Failed(code="overtaken", reason=reason, attempts=max(1, row.attempts - 1) if row else 1)
        self.reply(outcome, envelope, failed, envelope.traceparent, envelope.tracestate)
        return outcome

    def repeat(self, item: Item, envelope: Envelope, known: Recorded) -> Outcome:
        """Answer a duplicate with the recorded reply."""
        logger.info(
            "%s has handled %s before; its reply is sent again",
            self._handler.name,
            envelope.id,
            extra={"action": "handler.duplicate", "handler": self._handler.name, "message_id": envelope.id},
        )
        outcome = Outcome(item, None, Result.SUCCEEDED)
        if known.reply is not None and known.reply_to is not None:
            outcome.messages.append(recorded_reply(known.reply, known.reply_to))
        return outcome

    def waiting(self, item: Item, part: Readable) -> Waiting:
        """Return a new row for a message that is to be tried again."""
        now = self._retries.clock.now()
        return Waiting.of(item, part, id=self._retries.new_id(), consumer=self._handler.name, now=now)

    def reply(
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
            source=self.source,
            time=self._clock.now(),
            correlation_id=envelope.correlation_id,
            causation_id=envelope.id,
            traceparent=traceparent,
            tracestate=tracestate,
            saga=SagaLink(saga.saga_id, saga.step, saga.direction, saga.attempt, outcome.result),
        )
        outcome.reply = Outbound(reply, Address(Exchange.REPLIES, envelope.reply_to))
        outcome.messages.append(outcome.reply)


def _was_tried(item: Item) -> bool:
    """Say whether a try of a message may have begun: here, before it came to wait, or in a process that has died."""
    return item.begun or item.alone or row_of(item) is not None


def _told(detail: str, error_type: str | None) -> str:
    """Return what a saga, and whoever hears of its end, is told: the error, and not the stack of the dead letter."""
    begin = detail.rfind(f"\n{error_type}") if error_type else -1
    return detail[-_MAX_REASON:] if begin < 0 else detail[begin + 1 :].strip()[:_MAX_REASON]
