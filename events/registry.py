"""Which message classes this process knows, by type and version."""

from collections.abc import Iterable, Iterator

from pydantic import ValidationError

from events.envelope import Envelope
from events.errors import DefinitionError, InvalidMessageError, NewerVersionError, UnknownTypeError
from events.message import Message

_MAX_DETAIL = 2000


class Registry:
    """Maps a type on the wire to the class that reads it. Types are looked up, never imported."""

    def __init__(self, classes: Iterable[type[Message]] = ()) -> None:
        self._classes: dict[str, type[Message]] = {}
        for cls in classes:
            self.add(cls)

    def add(self, cls: type[Message]) -> None:
        """Make `cls` known. Adding it twice is fine.

        Raises:
            DefinitionError: another class has the same type.
        """
        known = self._classes.setdefault(cls.message_type, cls)
        if known is not cls:
            raise DefinitionError(
                f"{cls.__module__}.{cls.__qualname__} and {known.__module__}.{known.__qualname__} both have the type"
                f" {cls.message_type!r}; give one of them another with `type=`"
            )

    def __iter__(self) -> Iterator[type[Message]]:
        return iter(self._classes.values())

    def read(self, envelope: Envelope) -> Message:
        """Return the message in `envelope`, upcast to the version that this process knows.

        Raises:
            UnknownTypeError: no class has this type.
            NewerVersionError: the sender's version is newer than ours.
            InvalidMessageError: the data does not fit, or a version has no upcaster.
        """
        cls = self._classes.get(envelope.type)
        if cls is None:
            raise UnknownTypeError(f"nobody here knows the type {envelope.type!r}")
        if envelope.version > cls.message_version:
            raise NewerVersionError(
                f"{envelope.type} has version {envelope.version}, this code knows up to {cls.message_version}"
            )
        try:
            return cls.from_data(envelope.data, envelope.version)
        except ValidationError as error:
            raise InvalidMessageError(explain(error)) from error
        except InvalidMessageError:
            raise
        except Exception as error:  # an upcaster is user code: whatever it raises spoils its own message only
            # Its text may hold values.
            raise InvalidMessageError(f"{envelope.type}: an upcaster raised {type(error).__name__}") from error


def explain(error: ValidationError) -> str:
    """Name the fields that do not fit, without their values: they may be secret."""
    lines = (
        f"{'.'.join(map(str, e['loc'])) or 'data'}: {_without_tag(e['type'], e['msg'])}"
        for e in error.errors(include_url=False, include_input=False)
    )
    return f"{error.title}: {'; '.join(lines)}"[:_MAX_DETAIL]


def _without_tag(kind: str, message: str) -> str:
    """The one text of pydantic's that repeats the input is that of an unknown tag of a union."""
    return "no such tag" if kind == "union_tag_invalid" else message
