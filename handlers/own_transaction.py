"""Runs a handler that asks for a session: its effect and what is recorded of it are one transaction."""

from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from events.database import is_refused, transaction
from events.envelope import Envelope, Result
from events.failpoints import failpoint
from events.intake import Item, settle
from events.message import Message
from handlers.context import Context
from handlers.execution import Execution
from handlers.inbox import Inbox
from handlers.outcome import Outcome, Progress
from handlers.recording import Recorder
from handlers.tools import Tools

_LOST_IN_A_ROW = 4  # so often a try is made anew whose connection was lost


class _LostRaceError(Exception):
    """Another process has recorded the message meanwhile: what was done here must be rolled back."""


class _HandlersOwnError(Exception):
    """Not the database's: a third party that is away, or a lock that somebody holds, burns an attempt like others."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class OwnTransaction:
    """Tries messages of one handler, each in a transaction of its own.

    Args:
        handler: the handler's name.
        execution: runs it.
        inbox, recorder: what has been handled.
        tools: the database, and how many may hold a connection at a time.
    """

    def __init__(self, handler: str, *, execution: Execution, inbox: Inbox, recorder: Recorder, tools: Tools) -> None:
        self._handler = handler
        self._execution = execution
        self._inbox = inbox
        self._recorder = recorder
        self._tools = tools

    async def run(self, item: Item, envelope: Envelope, message: Message, context: Context) -> Outcome:
        """Try a message once, and commit; again where only the answer of the database was lost.

        The outcome is `LOST` if another process has recorded the message meanwhile.
        """
        begun = 0

        def begin() -> None:
            nonlocal begun
            begun += 1

        async def work() -> Outcome:
            if begun and (await self._inbox.find([envelope.key])).recorded:  # only the answer to the commit was lost
                return Outcome(item, envelope, Result.SUCCEEDED, progress=Progress.LOST)
            before = begun
            try:
                return await self._transact(item, envelope, message, context, begin)
            except _HandlersOwnError:
                raise
            except Exception as error:
                # Where each try loses its connection, though the database answers in between, the handler does it.
                if begun > before and (is_refused(error) or begun > _LOST_IN_A_ROW):
                    raise _HandlersOwnError(error) from error
                raise

        try:
            return await self._tools.until_database_answers(self._handler, work)
        except _HandlersOwnError as own:
            error = own.error
        raise error

    async def _transact(
        self, item: Item, envelope: Envelope, message: Message, context: Context, begin: Callable[[], None]
    ) -> Outcome:
        context.published.clear()
        try:
            async with self._tools.sessions.one(), transaction(self._tools.engine) as connection:
                begin()
                async with AsyncSession(bind=connection, expire_on_commit=False) as session:
                    outcome = await self._call(item, envelope, message, context, session)
                    await session.flush()
                    kept, after_commit = await self._recorder.store(connection, [outcome], has_run=False)
                if not kept:
                    raise _LostRaceError  # noqa: TRY301  # it must pass the transaction to roll it back
                await failpoint("handler.before_commit")
        except _LostRaceError:
            return Outcome(item, envelope, Result.SUCCEEDED, progress=Progress.LOST)
        await failpoint("handler.after_commit")
        after_commit()
        await settle([item])
        await failpoint("handler.after_ack")
        outcome.progress = Progress.COMMITTED
        return outcome

    async def _call(
        self, item: Item, envelope: Envelope, message: Message, context: Context, session: AsyncSession
    ) -> Outcome:
        try:
            return await self._execution.call(item, envelope, message, context, session)
        except SQLAlchemyError:
            raise
        except Exception as error:
            raise _HandlersOwnError(error) from error
