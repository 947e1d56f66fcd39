"""Messages: events, commands and replies, each with a type name and an integer version."""

import re
from collections.abc import Callable
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json, to_json

from events.errors import DefinitionError, InvalidMessageError

type_name_pattern = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
MAX_TYPE_LENGTH = 200  # an AMQP routing key holds 255 bytes
DEFAULT_BUNDLE = 64
MAX_BUNDLE = 2**15 - 1  # what a SMALLINT holds

_words = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9_]+|[A-Z0-9_]+|[^\x00-\x7f]")

Data = dict[str, Any]
Upcaster = Callable[[Data], Data]


class _Upcast:
    """Marks a static method as the upcaster from one version to the next."""

    def __init__(self, from_version: int, function: Upcaster) -> None:
        self.from_version = from_version
        self.function = function


def upcast(from_version: int) -> Callable[[Upcaster], Any]:
    """Declare how data of `from_version` becomes data of the next version.

    The function receives and returns plain data (the JSON object) and must be pure:

        class UserRegistered(Event, version=2):
            full_name: str

            @upcast(from_version=1)
            def _join_names(data):
                return {**data, "full_name": f"{data.pop('first')} {data.pop('last')}"}
    """
    return lambda function: _Upcast(from_version, function)


def dotted(class_name: str) -> str:
    """Return a class name in dotted lower case: `UserRegistered` becomes `user.registered`."""
    return ".".join(_words.findall(class_name)).lower()


class Message(BaseModel):
    """What is said: immutable data under a type name and a version.

    Class arguments:
        type: the name on the wire; default is the class name in dotted lower case.
        version: the version that this class describes; older ones arrive through upcasters.
        bundle: how many of this type may share one AMQP message; 1 for slow work.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore", ignored_types=(_Upcast,))

    message_type: ClassVar[str] = ""
    message_version: ClassVar[int] = 1
    bundle_limit: ClassVar[int] = DEFAULT_BUNDLE
    upcasters: ClassVar[dict[int, Upcaster]] = {}

    @classmethod
    def __pydantic_init_subclass__(
        cls, *, type: str | None = None, version: int = 1, bundle: int = DEFAULT_BUNDLE, **kwargs: Any
    ) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.message_type = type or dotted(cls.__name__)
        cls.message_version = version
        cls.bundle_limit = bundle
        marked = [value for value in vars(cls).values() if isinstance(value, _Upcast)]
        cls.upcasters = {each.from_version: each.function for each in marked}
        if len(cls.upcasters) < len(marked):
            raise DefinitionError(f"{cls.__name__}: two upcasters from one version; which of them counts?")
        cls._refuse_bad_definition()

    def __init_subclass__(cls, *, type: str | None = None, version: int = 1, bundle: int = 0, **kwargs: Any) -> None:
        """Take the class arguments; pydantic hands them to `__pydantic_init_subclass__` as well."""
        super().__init_subclass__(**kwargs)

    @classmethod
    def _refuse_bad_definition(cls) -> None:
        name, version = cls.message_type, cls.message_version
        if not type_name_pattern.fullmatch(name) or len(name) > MAX_TYPE_LENGTH:
            raise DefinitionError(f"{cls.__name__}: type {name!r} must be dotted lower case, {MAX_TYPE_LENGTH} at most")
        if version < 1:
            raise DefinitionError(f"{cls.__name__}: versions count from 1, not {version}")
        if not 1 <= cls.bundle_limit <= MAX_BUNDLE:
            raise DefinitionError(f"{cls.__name__}: bundle counts from 1 to {MAX_BUNDLE}, not {cls.bundle_limit}")
        if strange := [number for number in cls.upcasters if not 1 <= number < version]:
            raise DefinitionError(f"{cls.__name__}: upcasters from {strange} lead to no version below {version}")

    @classmethod
    def from_data(cls, data: bytes, version: int) -> Self:
        """Read JSON data of `version`, upcast it to this class's version and validate it.

        Raises:
            pydantic.ValidationError: the data does not fit.
            InvalidMessageError: no upcaster leads from `version` to this class's version.
        """
        if version == cls.message_version:
            return cls.model_validate_json(data)
        document = from_json(data)
        for number in range(version, cls.message_version):
            if (upcaster := cls.upcasters.get(number)) is None:
                raise InvalidMessageError(f"{cls.message_type}: no upcaster from version {number}")
            document = upcaster(document)
        return cls.model_validate_json(to_json(document))

    def to_data(self) -> bytes:
        """Return the JSON data that goes on the wire."""
        return self.__pydantic_serializer__.to_json(self)


class Event(Message):
    """A fact in the past tense; any number of receivers."""


class Command(Message):
    """An order in the imperative; exactly one receiver."""


class Reply(Message):
    """The outcome of a command, for the saga that sent it and nobody else."""


class Succeeded(Reply):
    """The reply of a handler that has nothing to tell."""


class Refused(Reply):
    """The reply of a handler that declined in words only."""

    reason: str


class Failed(Reply):
    """The reply when a command was given up on for technical reasons."""

    code: str
    reason: str
    attempts: int
