"""What a handler is: a coroutine function, the message it receives, and the policy around it."""

import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from sqlalchemy.ext.asyncio import AsyncSession

from events.bus import Address, Exchange, Queue
from events.errors import DefinitionError
from events.message import Command, Event, Message
from handlers.context import Context

_name_pattern = re.compile(r"[a-z][a-z0-9_]{0,99}")

HandlerFunction = Callable[..., Awaitable[Event | Any | None]]


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a technical failure is tried again in process, with exponential backoff and full jitter.

    Attributes:
        attempts: tries in all, the first one included.
        first: upper bound in seconds of the wait before the second try.
        factor: by what each further bound is larger.
        most: the largest bound in seconds.
    """

    attempts: int = 3
    first: float = 0.1
    factor: float = 2.0
    most: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first < 0 or self.factor < 1 or self.most < 0:
            raise DefinitionError(f"{self}: attempts and factor count from 1, waits are not negative")

    def bound(self, attempt: int) -> float:
        """Return the longest wait in seconds after the given attempt."""
        try:
            return min(self.most, self.first * self.factor ** (attempt - 1))
        except OverflowError:
            return self.most


@dataclass(frozen=True, slots=True)
class Handler:
    """A handler with its policy. Made by `@handles`."""

    name: str
    function: HandlerFunction
    message: type[Message]
    retry: Retry
    timeout: float
    concurrency: int
    message_parameter: str
    context_parameter: str | None
    session_parameter: str | None
    resources: tuple[tuple[str, Any], ...]

    @property
    def queue(self) -> Queue:
        """The queue that this handler consumes: its own, bound to its message type."""
        exchange = Exchange.COMMANDS if issubclass(self.message, Command) else Exchange.EVENTS
        return Queue(f"handler.{self.name}", (Address(exchange, self.message.message_type),))


def handles(
    message: type[Event | Command],
    *,
    name: str | None = None,
    retry: Retry | None = None,
    timeout: float = 30.0,
    concurrency: int = 16,
) -> Callable[[HandlerFunction], Handler]:
    """Make a coroutine function the handler of one message type.

    Its parameters are filled in by annotation: the message, a `Context`, an `AsyncSession` (the transaction in
    which this message is recorded: for work in the database only), and anything that the application's dishka
    providers make. It returns None, a `Reply`, or an `Event` (which then goes to everybody, too).

    Args:
        message: the event or command to handle.
        name: the name of its queue; by default the function's. A handler keeps its queue as long as its name.
        retry: tries in process after a technical failure.
        timeout: seconds for one try; then it is cancelled, which is a technical failure.
        concurrency: how many run at a time in one process.

    Raises:
        DefinitionError: the signature or the policy cannot work.
    """

    def decorate(function: HandlerFunction) -> Handler:
        return _define(
            function, message, name or str(getattr(function, "__name__", "")), retry or Retry(), timeout, concurrency
        )

    return decorate


def _define(
    function: HandlerFunction, message: type[Message], name: str, retry: Retry, timeout: float, concurrency: int
) -> Handler:
    if not inspect.iscoroutinefunction(function):
        raise DefinitionError(f"handler {name}: write `async def`")
    if not _name_pattern.fullmatch(name):
        raise DefinitionError(f"handler {name!r}: a name is lower case letters, digits and underscores, 100 at most")
    if not issubclass(message, Event | Command):
        raise DefinitionError(f"handler {name}: {message.__name__} is neither an Event nor a Command")
    if timeout <= 0 or concurrency < 1:
        raise DefinitionError(f"handler {name}: timeout must be positive and concurrency at least 1")
    hints = get_type_hints(function, include_extras=True)
    by_type: dict[Any, str] = {}
    resources: list[tuple[str, Any]] = []
    for parameter in inspect.signature(function).parameters:
        if parameter not in hints:
            raise DefinitionError(f"handler {name}: annotate the parameter `{parameter}`")
        hint = hints[parameter]
        if hint in (message, Context, AsyncSession):
            if hint in by_type:
                raise DefinitionError(f"handler {name}: two parameters of type {hint.__name__}")
            by_type[hint] = parameter
        else:
            resources.append((parameter, hint))
    if message not in by_type:
        raise DefinitionError(f"handler {name}: no parameter is annotated with {message.__name__}")
    return Handler(
        name=name,
        function=function,
        message=message,
        retry=retry,
        timeout=timeout,
        concurrency=concurrency,
        message_parameter=by_type[message],
        context_parameter=by_type.get(Context),
        session_parameter=by_type.get(AsyncSession),
        resources=tuple(resources),
    )
