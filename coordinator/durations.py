"""Times in words, for people, and as people write them. Pure."""

import re
from datetime import UTC, datetime, timedelta

from events.errors import ConfigurationError

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))
_SPANS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_span = re.compile(r"(\d{1,9})([dhms])", re.ASCII)


def lasting(seconds: float) -> str:
    """Return a time in the largest unit of which it is a whole number: `90 s`, `2 h`, `3 d`."""
    for size, unit in _UNITS:
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.12g} s"


def moment(at: datetime) -> str:
    """Return a time in UTC, to the second."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def utc(given: datetime) -> datetime:
    """Return the time that somebody has written: in UTC, unless he says in which zone.

    Raises:
        ConfigurationError: no calendar has it.
    """
    try:
        return given.astimezone(UTC) if given.tzinfo else given.replace(tzinfo=UTC)
    except OverflowError:
        raise ConfigurationError(f"{given.isoformat()} is before the year 1 or after the year 9999 in UTC") from None


def utc_if_any(given: datetime | None) -> datetime | None:
    """Return the same of a time that may be left out."""
    return None if given is None else utc(given)


def age(given: str) -> timedelta:
    """Return an age that somebody has written: `30d`, `12h`, `5m` or `10s`.

    Raises:
        ConfigurationError: it is none.
    """
    found = _span.fullmatch(given)
    if found is None:
        raise ConfigurationError(f"an age is a number and d, h, m or s: 30d, not {given!r}")
    return timedelta(**{_SPANS[found[2]]: int(found[1])})


def ago(span: timedelta, now: datetime) -> datetime:
    """Return the time so long before now.

    Raises:
        ConfigurationError: no calendar has it.
    """
    try:
        return now - span
    except OverflowError:
        raise ConfigurationError(f"{span.days} days ago is before the year 1; give a shorter age") from None
