"""Every error that this project raises on purpose: one root, flat, each saying what to do.

The docstring of a class is its default text. `code` is stable: user interfaces, dead letters and
documentation refer to it.
"""

from typing import ClassVar


class CoordinatorError(Exception):
    """Something went wrong in the saga coordinator."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class ConfigurationError(CoordinatorError):
    """The configuration is wrong; the text names the setting or definition to change."""

    code = "configuration"


class DefinitionError(CoordinatorError):
    """A message, handler or saga is defined in a way that cannot work; the text says what to change."""

    code = "definition"


class RejectedError(CoordinatorError):
    """A received message cannot be taken; it is kept whole as a dead letter with this code as its reason."""

    code = "rejected"


class MalformedError(RejectedError):
    """The bytes are not a CloudEvent that can be read."""

    code = "malformed"


class TooLargeError(RejectedError):
    """The message is larger than the limit; send a reference to the data instead."""

    code = "too_large"


class UnknownTypeError(RejectedError):
    """Nobody here knows this message type; deploy the code that does, then replay the dead letter."""

    code = "unknown_type"


class NewerVersionError(RejectedError):
    """The message's version is newer than this code; deploy the newer code, then replay the dead letter."""

    code = "newer_version"


class InvalidMessageError(RejectedError):
    """The data does not fit the schema of its type."""

    code = "invalid"


class PublishError(CoordinatorError):
    """The bus did not confirm the message; it may or may not have arrived, publish it again."""

    code = "publish"


class UnroutableError(PublishError):
    """No queue takes this message; start the service whose handler receives it."""

    code = "unroutable"


class BusClosedError(CoordinatorError):
    """The bus is not open; call `open()` first, or wait until the connection is back."""

    code = "bus_closed"


class DatabaseInUseError(CoordinatorError):
    """Another process works on this SQLite file; stop it, or move to PostgreSQL to run several processes."""

    code = "database_in_use"


class StaleRowError(CoordinatorError):
    """Somebody else has changed a row meanwhile; load it again and decide again."""

    code = "stale_row"
