"""The sagas of an application, as its coordinator looks them up."""

from collections.abc import Iterable

from coordinator.definition import SagaDefinition
from coordinator.instance import Instance, Status
from coordinator.steps import Start
from events.bus import Address, Exchange, Queue
from events.dead_letters import COORDINATOR
from events.envelope import Envelope
from events.errors import DefinitionError, RejectedError
from events.message import Command, Failed, Refused
from events.registry import Registry

SagaKey = tuple[str, int]  # a saga's name and version

CONSUMER = COORDINATOR


class UnknownSagaError(RejectedError):
    """No saga instance or definition here has this name; deploy its code or restore its row, then replay."""

    code = "unknown_saga"


class ArchivedSagaError(RejectedError):
    """This saga has ended long ago, and was archived: see by hand whether it matters what the message says."""

    code = "archived"


class Sagas:
    """The saga definitions of an application, as its coordinator looks them up; `retired` ones start nothing.

    Attributes:
        reply_address: where answers to their commands go: to this application, whoever else is on the broker.
        by_version: all of them.
        missing: versions that messages have come for in vain.
        starts: by the type of an event: the newest versions that it starts.
        children: by the type of a command: the newest version that it starts.
        undoing: the types of commands that undo children, those of old versions as well.
        awaited: by the type of an event: all that wait for it somewhere.
        registry: all messages that are read here.
    """

    def __init__(
        self, definitions: Iterable[SagaDefinition], retired: Iterable[SagaDefinition] = (), *, application: str
    ) -> None:
        starting = list(definitions)
        self.reply_address = f"{CONSUMER}.{application}"
        self.by_version = {(each.name, each.version): each for each in (*starting, *retired)}
        self.missing: set[SagaKey] = set()
        self.starts: dict[str, list[SagaDefinition]] = {}
        self.children: dict[str, SagaDefinition] = {}
        self.undoing: set[str] = set()
        self.awaited: dict[str, list[SagaDefinition]] = {}
        self.registry = Registry([Failed, Refused])
        for definition in _newest(starting):
            for start in definition.starts:
                self._add_start(definition, start)
        for definition in self.by_version.values():
            for undo in (start.undone_by for start in definition.starts if start.undone_by is not None):
                self.undoing.add(undo.message_type)
                self.registry.add(undo)
            for step in definition.steps:
                for hook in (step.on_succeeded, step.on_declined):
                    if hook is not None:
                        self.registry.add(hook.outcome)
            for event in {event for wait in definition.waits for event in wait.events}:
                self.awaited.setdefault(event.message_type, []).append(definition)
                self.registry.add(event)

    @property
    def with_lock(self) -> list[SagaKey]:
        """The sagas that wait for business keys."""
        return [key for key, each in self.by_version.items() if each.lock is not None]

    @property
    def queues(self) -> list[Queue]:
        """The queues that a coordinator of these sagas consumes: events, replies, and commands to children."""
        if not self.by_version:
            return []
        events = tuple(Address(Exchange.EVENTS, each) for each in sorted(self.starts.keys() | self.awaited.keys()))
        replies = (Address(Exchange.REPLIES, self.reply_address),)
        queues = [Queue(f"{self.reply_address}.events", events), Queue(f"{self.reply_address}.replies", replies)]
        if commands := sorted(self.children.keys() | self.undoing):
            to_children = tuple(Address(Exchange.COMMANDS, each) for each in commands)
            queues.append(Queue(f"{self.reply_address}.commands", to_children))
        return queues

    @property
    def have_fans(self) -> bool:
        """Whether any of them has a step for each of several items."""
        return any(each.fans for each in self.by_version.values())

    def is_for_child(self, envelope: Envelope) -> bool:
        """Whether a message asks for a child saga, or for one to be undone."""
        return envelope.type in self.children or envelope.type in self.undoing

    def of(self, instance: Instance) -> SagaDefinition:
        """Return the definition that `instance` was started with.

        Raises:
            ArchivedSagaError: it is over for good.
            UnknownSagaError: it is not part of this application.
        """
        if instance.status is Status.ARCHIVED:
            raise ArchivedSagaError
        definition = self.by_version.get((instance.saga, instance.version))
        if definition is None:
            raise UnknownSagaError(
                f"the saga {instance.saga} version {instance.version} is not part of this application"
            )
        return definition

    def has_version(self, instance: Instance) -> bool:
        """Say whether somebody else must decide on `instance`: nobody has to on an archived one."""
        return instance.status is Status.ARCHIVED or (instance.saga, instance.version) in self.by_version

    def _add_start(self, definition: SagaDefinition, start: Start) -> None:
        self.registry.add(start.event)
        if not issubclass(start.event, Command):
            self.starts.setdefault(start.event.message_type, []).append(definition)
            return
        known = self.children.setdefault(start.event.message_type, definition)
        if known is not definition:
            raise DefinitionError(
                f"{start.event.__name__} starts {known.name} and {definition.name}; a command has one receiver"
            )


def holding(saga: str, version: int) -> str:
    """Return the consumer for whom messages to instances of a version are held."""
    return f"{CONSUMER}.{saga}.{version}"


def _newest(definitions: Iterable[SagaDefinition]) -> list[SagaDefinition]:
    newest: dict[str, SagaDefinition] = {}
    for definition in definitions:
        known = newest.get(definition.name)
        if known is None or known.version < definition.version:
            newest[definition.name] = definition
    return list(newest.values())
