"""What a handler is: a coroutine function, the message it receives, and the policy around it."""

import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, get_type_hints

from sqlalchemy.ext.asyncio import AsyncSession

from events.bus import Address, Exchange, Queue
from events.dead_letters import BUS
from events.errors import DefinitionError
from events.message import Command, Event, Message
from handlers.breaker import Breaker
from handlers.context import Context
from handlers.policy import Retry

_TAKEN = (BUS, "coordinator")  # consumers whose dead letters are no handler's
_name_pattern = re.compile(r"[a-z][a-z0-9_]{0,99}")

HandlerFunction = Callable[..., Awaitable[Event | Any | None]]
Key = str | Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Handler:
    """A handler with its policy. Made by `@handles`."""

    name: str
    function: HandlerFunction
    message: type[Message]
    retry: Retry
    timeout: float
    concurrency: int
    rate: float | None
    key: Callable[[Any], object] | None
    breaker: Breaker | None
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
    rate: float | None = None,
    key: Key | None = None,
    breaker: Breaker | str | None = None,
) -> Callable[[HandlerFunction], Handler]:
    """Make a coroutine function the handler of one message type.

    Its parameters are filled in by annotation: the message, a `Context`, an `AsyncSession` (the transaction in
    which this message is recorded: for work in the database only), and anything that the application's dishka
    providers make. It returns None, a `Reply`, or an `Event` (which then goes to everybody, too).

    Args:
        message: the event or command to handle.
        name: the name of its queue; by default the function's. A handler keeps its queue as long as its name.
        retry: what follows after a technical failure.
        timeout: seconds for one try; then it is cancelled, which is a technical failure.
        concurrency: how many run at a time in one process.
        rate: how many begin a second, at most, in all processes together.
        key: a field of the message, or a function of it: of the messages with one key, one at a time is handled.
        breaker: the dependency that this handler needs, as a `Breaker` or its name.

    Raises:
        DefinitionError: the signature or the policy cannot work.
    """

    def decorate(function: HandlerFunction) -> Handler:
        given = name or str(getattr(function, "__name__", ""))
        _refuse_bad_policy(given, message, timeout, concurrency, rate)
        by_type, resources = _parameters(given, function, message)
        return Handler(
            name=given,
            function=function,
            message=message,
            retry=retry or Retry(),
            timeout=timeout,
            concurrency=concurrency,
            rate=rate,
            key=_key_of(given, message, key),
            breaker=Breaker(breaker) if isinstance(breaker, str) else breaker,
            message_parameter=by_type[message],
            context_parameter=by_type.get(Context),
            session_parameter=by_type.get(AsyncSession),
            resources=resources,
        )

    return decorate


def _refuse_bad_policy(name: str, message: type[Message], timeout: float, concurrency: int, rate: float | None) -> None:
    if not _name_pattern.fullmatch(name):
        raise DefinitionError(f"handler {name!r}: a name is lower case letters, digits and underscores, 100 at most")
    if name in _TAKEN:
        raise DefinitionError(
            f"handler {name}: the coordinator and the bus keep their dead letters under it; use `name=`"
        )
    if not issubclass(message, Event | Command):
        raise DefinitionError(f"handler {name}: {message.__name__} is neither an Event nor a Command")
    if timeout <= 0 or concurrency < 1:
        raise DefinitionError(f"handler {name}: timeout must be positive and concurrency at least 1")
    if rate is not None and rate <= 0:
        raise DefinitionError(f"handler {name}: rate must be positive")


def _key_of(name: str, message: type[Message], key: Key | None) -> Callable[[Any], object] | None:
    if not isinstance(key, str):
        return key
    if key not in message.model_fields:
        raise DefinitionError(f"handler {name}: {message.__name__} has no field {key!r} to be the key")
    return attrgetter(key)


def _parameters(
    name: str, function: HandlerFunction, message: type[Message]
) -> tuple[dict[Any, str], tuple[tuple[str, Any], ...]]:
    """Return the names of the parameters that we fill in, by type, and those that the container makes."""
    if not inspect.iscoroutinefunction(function):
        raise DefinitionError(f"handler {name}: write `async def`")
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
    return by_type, tuple(resources)
