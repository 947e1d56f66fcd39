"""What an operator puts in the place of a dead letter's body: a whole structured event that its handler can take."""

from collections.abc import Mapping

from pydantic_core import from_json, to_json

from events.codec import STRUCTURED_TYPE, Limits, Readable, attributes_of, read_body
from events.errors import ConfigurationError, RejectedError
from events.registry import Registry
from handlers.letters import Letter

Consumers = Mapping[str, Registry]  # what each consumer of an application can read
_SAME = ("id", "source", "type", "saga", "reply_to")


def with_data(letter: Letter, data: bytes, limits: Limits) -> Readable:
    """Return the message of a letter with other data; all else of it stays as it is.

    Raises:
        ConfigurationError: the data are no JSON object, or the letter is nothing that has data.
    """
    try:
        given = from_json(data)
    except ValueError as error:
        raise ConfigurationError(f"this is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigurationError("the data of an event are a JSON object")
    part = _only(letter)
    if part is None:
        raise ConfigurationError(f"dead letter {letter.id} has no envelope that can be kept; give the whole event")
    attributes = attributes_of(part, content_type=letter.type_to_send, headers=letter.headers)
    # The data as they were given: read and written anew, a number could become another one.
    body = b'%b,"data":%b}' % (to_json(attributes)[:-1], data.strip())
    return _readable(body, STRUCTURED_TYPE, limits)


def whole_event(event: bytes, limits: Limits) -> Readable:
    """Return an event that an operator gives; in a batch it may stand alone.

    Raises:
        ConfigurationError: it is no CloudEvent, or there are several.
    """
    return _readable(event, None, limits)


def check(letter: Letter, edited: Readable, consumers: Consumers) -> None:
    """Refuse what is another message than the letter's, or what its handler cannot take.

    Raises:
        ConfigurationError: the text says what is wrong.
    """
    original = _only(letter)
    if original is not None:
        for name in _SAME:
            if getattr(edited.envelope, name) != getattr(original.envelope, name):
                raise ConfigurationError(f"the event's {name} must stay as it was: it is the same message")
    registry = consumers.get(letter.consumer)
    if registry is None:
        raise ConfigurationError(
            f"the application has no handler {letter.consumer}, which has given this up; name the one that has it"
        )
    try:
        registry.read(edited.envelope)
    except RejectedError as error:
        raise ConfigurationError(f"{letter.consumer} could not take that: {error}") from error


def _only(letter: Letter) -> Readable | None:
    """Return the message of a letter, if it can be read."""
    # However large: it is there already.
    parts = letter.read(Limits(body=2**31, headers=2**31))
    return parts[0] if len(parts) == 1 and isinstance(parts[0], Readable) else None


def _readable(body: bytes, content_type: str | None, limits: Limits) -> Readable:
    parts = read_body(body, content_type=content_type, headers={}, encoding=None, limits=limits)
    if len(parts) > 1:
        raise ConfigurationError("these are several events; a letter is one")
    part = parts[0]
    if not isinstance(part, Readable):
        raise ConfigurationError(f"nobody could read that: {part.error}")
    return part
