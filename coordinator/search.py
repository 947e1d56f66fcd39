"""Which sagas are meant: by saga, status, key, step, time of start and fields of the state, on both databases."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic_core import from_json, to_json
from sqlalchemy import (
    BindParameter,
    Boolean,
    Column,
    ColumnElement,
    Select,
    and_,
    bindparam,
    literal,
    or_,
    select,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from coordinator.instance import Status, StepStatus
from coordinator.tables import IN_FLIGHT, STUCK, saga_instance
from events.dead_letters import storable
from events.errors import ConfigurationError

_name = re.compile(r"\w[\w-]*")
_path = re.compile(rf"{_name.pattern}(\.{_name.pattern})*")


@dataclass(frozen=True, slots=True)
class Query:
    """Which sagas are meant; what is empty or None is any.

    Attributes:
        saga: the name of their definition.
        statuses: where they stand: one of these.
        key: their business key.
        step: a step that they have begun,
        step_status: and where that stands.
        since: they were started then or later,
        until: and before this.
        where: fields of their state, as a path such as `order_id` or `address.city`, and the value as text. The text
            `7` is the number and the string, `null` an empty field and the string.

    Raises:
        ConfigurationError: it makes no sense; the text says what to write.
    """

    saga: str | None = None
    statuses: tuple[Status, ...] = ()
    key: str | None = None
    step: str | None = None
    step_status: StepStatus | None = None
    since: datetime | None = None
    until: datetime | None = None
    where: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.step is None and self.step_status is not None:
            raise ConfigurationError("the status of a step needs the step's name")
        if self.step is not None and not _name.fullmatch(self.step):
            raise ConfigurationError(f"{self.step!r} is no name of a step")
        for path, value in self.where:
            if not _path.fullmatch(path):
                raise ConfigurationError(f"{path!r} is no field: write its name, or names with dots between them")
            if value != storable(value):
                raise ConfigurationError(f"{path} cannot hold {value!r}: it is no text")

    @property
    def is_narrow(self) -> bool:
        """Whether it leaves anything out."""
        return any(getattr(self, each.name) for each in fields(self))

    def condition(self) -> ColumnElement[bool]:
        """Return this as a condition on the table of instances."""
        columns = saga_instance.c
        found: list[ColumnElement[bool]] = []
        if self.saga is not None:
            found.append(columns.saga == self.saga)
        if self.statuses:
            found += _stands_at(self.statuses)
        if self.key is not None:
            found.append(columns.key == self.key)
        if self.step is not None and self.step_status is None:
            found.append(columns.steps[self.step].as_string().is_not(None))
        if self.step is not None and self.step_status is not None:
            found.append(columns.steps[self.step, "status"].as_string() == self.step_status.value)
        if self.since is not None:
            found.append(columns.created_at >= self.since)
        if self.until is not None:
            found.append(columns.created_at < self.until)
        found += [_holds(columns.state, path.split("."), value) for path, value in self.where]
        return and_(True, *found)  # SQLAlchemy's way to begin with nothing


def matching(query: Query) -> Select[tuple[UUID]]:
    """Return the ids of the sagas that are meant, in no order; ids grow with the time of the start."""
    return select(saga_instance.c.id).where(query.condition())


def _stands_at(statuses: Sequence[Status]) -> list[ColumnElement[bool]]:
    # As literals: only then a database knows that a partial index will do, and SQLite only by its very words.
    values: BindParameter[Any] = bindparam(
        "statuses", [each.value for each in statuses], expanding=True, literal_execute=True
    )
    found: list[ColumnElement[bool]] = [saga_instance.c.status.in_(values)]
    words = IN_FLIGHT if all(each.in_flight for each in statuses) else None
    if set(statuses) == {Status.NEEDS_ATTENTION}:
        words = STUCK
    if words is not None:
        found.append(text(words))  # type: ignore[arg-type]  # a text is a condition, too
    return found


def _holds(column: Column[Any], path: Sequence[str], value: str) -> ColumnElement[bool]:
    """Whether the field is the string `value`, or what `value` is as JSON."""
    candidates = [to_json(value).decode()]
    with suppress(ValueError):  # only a string then
        if "\\u0000" not in to_json(from_json(value, allow_inf_nan=False)).decode():  # PostgreSQL has no NUL
            candidates.append(value)
    return or_(*(_JsonIs(column, literal(each), *map(literal, path)) for each in candidates))


class _JsonIs(FunctionElement[bool]):
    """Whether the value at a path of a JSON column is one that is given as JSON text."""

    inherit_cache = True
    type = Boolean()


@compiles(_JsonIs, "postgresql")
def _json_is_on_postgresql(element: _JsonIs, compiler: SQLCompiler, **options: Any) -> str:
    column, value, *path = (compiler.process(each, **options) for each in element.clauses)
    return f"jsonb_extract_path({', '.join((column, *path))}) = CAST({value} AS jsonb)"


@compiles(_JsonIs, "sqlite")
def _json_is_on_sqlite(element: _JsonIs, compiler: SQLCompiler, **options: Any) -> str:
    """Compare types as well: to SQLite true is 1, and null is what is not there."""
    column, value, *path = (compiler.process(each, **options) for each in element.clauses)
    at = " || ".join(["'$'", *(f"""'."' || {name} || '"'""" for name in path)])
    kinds = "CASE json_type({}) WHEN 'real' THEN 'integer' ELSE json_type({}) END"
    mine, given = (kinds.format(each, each) for each in (f"{column}, {at}", value))
    return f"({mine} = {given} AND json_extract({column}, {at}) IS json_extract({value}, '$'))"
