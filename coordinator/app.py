"""An application: its sagas, handlers and resources under one name."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dishka import Provider
from sqlalchemy import MetaData

from coordinator.definition import Saga, SagaDefinition
from coordinator.lifecycles.definition import Lifecycle
from coordinator.sagas import Sagas
from events.bus import Queue
from events.errors import DefinitionError
from events.message import Command, Message
from events.registry import Registry
from handlers.breaker import Breaker
from handlers.definition import Handler

_name_pattern = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class App:
    """What one deployment runs. `coordinator run module:app` starts it.

    Attributes:
        name: the name of the application. The CloudEvents `source` of its messages is `/name`, and the queue of its
            dead letters on the broker is named after it.
        sagas: the saga classes; several versions of one saga run side by side, and the highest one starts new
            instances.
        retired: versions that start no new instances, and are there to finish theirs.
        handlers: what `@handles` made.
        resources: dishka providers of what handlers ask for.
        tables: tables of the application's own that are created at start where they are missing. For
            development; in production keep migrations of your own.
        messages: further message classes that `coordinator publish` shall know.
        lifecycles: the life cycle classes of its entities; several versions of one side by side.
    """

    name: str
    sagas: Sequence[type[Saga]] = ()
    retired: Sequence[type[Saga]] = ()
    handlers: Sequence[Handler] = ()
    resources: Sequence[Provider] = ()
    tables: Sequence[MetaData] = ()
    messages: Sequence[type[Message]] = ()
    lifecycles: Sequence[type[Lifecycle]] = ()

    def __post_init__(self) -> None:
        if not _name_pattern.fullmatch(self.name):
            raise DefinitionError(
                f"app {self.name!r}: a name is letters, digits, dots, dashes and underscores, 100 at most"
            )
        names = [handler.name for handler in self.handlers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DefinitionError(f"app {self.name}: two handlers are called {', '.join(sorted(twice))}; use `name=`")
        commands = [handler.message for handler in self.handlers if issubclass(handler.message, Command)]
        if twice := {command.__name__ for command in commands if commands.count(command) > 1}:
            raise DefinitionError(f"app {self.name}: {', '.join(sorted(twice))} has two handlers; a command has one")
        children = self.coordinated
        for command in commands:
            if command.message_type in children.children or command.message_type in children.undoing:
                raise DefinitionError(
                    f"app {self.name}: {command.__name__} has a handler and a saga; a command has one receiver"
                )
        sagas = [(each.name, each.version) for each in self.definitions]
        if doubled := {saga for saga in sagas if sagas.count(saga) > 1}:
            raise DefinitionError(f"app {self.name}: two sagas have the same name and version: {sorted(doubled)}")
        lifecycles = [(each.definition.name, each.definition.version) for each in self.lifecycles]
        if repeated := {each for each in lifecycles if lifecycles.count(each) > 1}:
            raise DefinitionError(
                f"app {self.name}: two life cycles have the same name and version: {sorted(repeated)}"
            )
        breakers: dict[str, Breaker] = {}
        for breaker in (handler.breaker for handler in self.handlers if handler.breaker is not None):
            if breakers.setdefault(breaker.name, breaker) != breaker:
                raise DefinitionError(f"app {self.name}: two breakers called {breaker.name} have different policies")
        self.registry  # noqa: B018  # refuses two classes with one type, now rather than later

    @property
    def source(self) -> str:
        """The CloudEvents source of what this application says."""
        return f"/{self.name}"

    @property
    def definitions(self) -> list[SagaDefinition]:
        """All versions of all sagas, the retired ones, too."""
        return [saga.definition for saga in (*self.sagas, *self.retired)]

    @property
    def coordinated(self) -> Sagas:
        """All sagas, as a coordinator looks them up."""
        retired = (saga.definition for saga in self.retired)
        return Sagas((saga.definition for saga in self.sagas), retired, application=self.name)

    @property
    def queues(self) -> list[Queue]:
        """All queues that its processes consume: those of its handlers, and those of its coordinator."""
        return [handler.queue for handler in self.handlers] + self.coordinated.queues

    @property
    def registry(self) -> Registry:
        """All message classes that can be read off the application."""
        return Registry(self._message_classes())

    def _message_classes(self) -> Iterator[type[Message]]:
        yield from self.messages
        for handler in self.handlers:
            yield handler.message
        for definition in self.definitions:
            for start in definition.starts:
                yield start.event
                if start.undone_by is not None:
                    yield start.undone_by
            for wait in definition.waits:
                yield from wait.events
            for step in definition.steps:
                for hook in (step.on_succeeded, step.on_declined):
                    if hook is not None:
                        yield hook.outcome
