"""What is said: messages, their envelope and versions, the bus that carries them, the outbox."""

from events.envelope import Envelope
from events.errors import CoordinatorError, PublishError, TooLargeError, UnroutableError
from events.message import Command, Event, Failed, Message, Refused, Reply, Succeeded, upcast
from events.outbox import ServiceOutbox
from events.publisher import Publisher
from events.registry import Registry
from events.relay import Relay

__all__ = [
    "Command",
    "CoordinatorError",
    "Envelope",
    "Event",
    "Failed",
    "Message",
    "PublishError",
    "Publisher",
    "Refused",
    "Registry",
    "Relay",
    "Reply",
    "ServiceOutbox",
    "Succeeded",
    "TooLargeError",
    "UnroutableError",
    "upcast",
]
