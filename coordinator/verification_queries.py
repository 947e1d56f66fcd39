"""What a check asks a database: which rows of history do not follow from each other, which instances not from them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Integer,
    LargeBinary,
    Over,
    Select,
    Text,
    Uuid,
    and_,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from coordinator.chain import COLUMNS, GENESIS
from coordinator.instance import Status, StepStatus
from coordinator.invariants import FOLLOWS, WAKING
from coordinator.tables import saga_history, saga_instance, saga_lock
from events.tables import JsonText, Timestamp

_PLAIN = ("started", "reply")
_ENDED = tuple(each.value for each in Status if each.ended)


@dataclass(frozen=True, slots=True)
class Page:
    """Sagas that are checked at a time: those behind `after` up to `last`, if they have moved `since`."""

    after: UUID | None
    last: UUID | None
    since: datetime | None

    def _among(self, ids: Column[UUID]) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = [ids > self.after] if self.after is not None else []
        return [*found, ids <= self.last] if self.last is not None else found

    @property
    def of_instances(self) -> ColumnElement[bool]:
        moved = [saga_instance.c.updated_at >= self.since] if self.since is not None else []
        kept = saga_instance.c.status != Status.ARCHIVED.value  # of the others there is nothing to be checked
        return and_(kept, *self._among(saga_instance.c.id), *moved)

    @property
    def of_history(self) -> ColumnElement[bool]:
        ids = saga_history.c.saga_id
        if self.since is None:  # then also rows whose instance is gone
            return and_(True, *self._among(ids))
        return and_(True, *self._among(ids), ids.in_(select(saga_instance.c.id).where(self.of_instances)))


def broken(page: Page) -> Select[Any]:
    """Ask for rows that do not follow from the one before, and for last rows that are not what the instance is."""
    columns = saga_history.c

    def along(function: FunctionElement[Any]) -> Over[Any]:
        return function.over(partition_by=columns.saga_id, order_by=columns.revision)

    rows = (
        select(
            *(
                (type_coerce(each, Text) if isinstance(each.type, JsonText) else each).label(each.name)
                for each in columns
            ),
            along(func.row_number()).label("number"),
            along(func.lag(columns.hash)).label("hash_before"),
            along(func.lag(columns.status)).label("status_before"),
            along(func.lead(columns.revision)).label("next"),
        )
        .where(page.of_history)
        .subquery("rows")
    )
    row, instance = rows.c, saga_instance.c
    digest_of_row = _Digest(func.coalesce(row.hash_before, literal(GENESIS)), *(row[name] for name in COLUMNS))
    may_follow = [f"{before}>{after}" for before, all_after in FOLLOWS.items() for after in (before, *all_after)]
    wrong = {
        "gap": row.number != row.revision,
        "chain": row.hash != digest_of_row,
        "begin": and_(row.number == 1, row.kind != "started"),
        "path": or_(
            (row.status_before + ">" + row.status).not_in(may_follow),
            and_(row.status_before.in_(_ENDED), row.status != row.status_before, row.kind.not_in(WAKING)),
        ),
        "gone": and_(row.next.is_(None), instance.id.is_(None)),
        "head": and_(row.next.is_(None), or_(instance.head != row.hash, instance.revision != row.revision)),
        "status": and_(row.next.is_(None), instance.status != row.status),
        "reason": and_(row.next.is_(None), instance.id.is_not(None), instance.reason.is_distinct_from(row.reason)),
        "time": and_(row.next.is_(None), instance.updated_at != row.at),
    }
    flags = (case((condition, 1), else_=0).label(name) for name, condition in wrong.items())
    return (
        select(row.saga_id, row.revision, row.status_before, row.status.label("now"), *flags)
        .select_from(rows.outerjoin(saga_instance, instance.id == row.saga_id))
        .where(or_(*wrong.values()))
    )


def repeated(page: Page) -> Select[Any]:
    """Ask for steps that have succeeded twice."""
    columns = saga_history.c
    return (
        select(columns.saga_id, columns.step, func.count().label("times"))
        .where(page.of_history, columns.kind.in_(("reply", "late_success")), columns.direction == "do")
        .where(columns.result == "succeeded")
        .group_by(columns.saga_id, columns.step)
        .having(func.count() > 1)
    )


def out_of_line(page: Page) -> Select[Any]:
    """Ask for instances that have begun although another one holds their business key, or that wait in no line."""
    mine, earlier, instance = saga_lock, saga_lock.alias(), saga_instance.c
    is_behind = select(earlier.c.position).where(earlier.c.key == mine.c.key, earlier.c.position < mine.c.position)
    waits = instance.status == Status.WAITING.value
    return (
        select(instance.id.label("saga_id"), instance.status)
        .select_from(saga_instance.outerjoin(saga_lock, mine.c.saga_id == instance.id))
        .where(page.of_instances, or_(and_(waits, mine.c.key.is_(None)), and_(~waits, is_behind.exists())))
    )


def ended_in_vain(page: Page) -> Select[Any]:
    """Ask for instances that are ended while an answer is outstanding."""
    instance = saga_instance.c
    pending = [each.value for each in StepStatus if each.pending]
    return select(instance.id.label("saga_id"), instance.status).where(
        page.of_instances, instance.status.in_(_ENDED), _AnyStepIs(instance.steps, *pending)
    )


def bare(page: Page) -> Select[Any]:
    """Ask for instances without any history."""
    instance = saga_instance.c
    has_rows = select(literal(1)).where(saga_history.c.saga_id == instance.id).exists()
    return select(instance.id.label("saga_id")).where(page.of_instances, ~has_rows)


def unusual(page: Page) -> Select[Any]:
    """Ask for the sagas that are not completed, or in which not all went well on the way."""
    strange = or_(saga_history.c.kind.not_in(_PLAIN), saga_history.c.result != "succeeded")
    with_strange = select(saga_history.c.saga_id).where(page.of_history, strange)
    instance = saga_instance.c
    unended = instance.status != Status.COMPLETED.value
    return select(instance.id).where(page.of_instances, or_(unended, instance.id.in_(with_strange)))


def completed(page: Page) -> Select[Any]:
    """Ask for completed sagas: the state, the steps, and what each row has changed, as a list in JSON text."""
    rows = select(
        saga_history.c.saga_id, saga_history.c.revision, type_coerce(saga_history.c.change, Text).label("change")
    )
    # In order for SQLite, whose aggregates have no order of their own; it merges no such query with another.
    row = rows.where(page.of_history).order_by(saga_history.c.saga_id, saga_history.c.revision).subquery("rows").c
    changes = _Joined(row.change, row.revision)
    told = select(row.saga_id, changes.label("changes")).group_by(row.saga_id).subquery("told")
    instance = saga_instance.c
    state, steps = (cast(instance[name], Text) for name in ("state", "steps"))
    document = literal("[") + state + literal(",") + steps + literal(",") + told.c.changes + literal("]")
    joined = saga_instance.join(told, told.c.saga_id == instance.id)
    return (
        select(instance.id, document)
        .select_from(joined)
        .where(page.of_instances, instance.status == Status.COMPLETED.value)
    )


class _Joined(FunctionElement[str]):
    """The texts of a group with commas between them, in the order of the second argument."""

    inherit_cache = True
    type = Text()


@compiles(_Joined, "postgresql")
def _joined_on_postgresql(element: _Joined, compiler: SQLCompiler, **options: Any) -> str:
    texts, order = (compiler.process(each, **options) for each in element.clauses)
    return f"string_agg({texts}, ',' ORDER BY {order})"


@compiles(_Joined, "sqlite")
def _joined_on_sqlite(element: _Joined, compiler: SQLCompiler, **options: Any) -> str:
    texts, _ = (compiler.process(each, **options) for each in element.clauses)
    return f"group_concat({texts}, ',')"


class _Digest(FunctionElement[bytes]):
    """The hash of a row, as `coordinator.chain` defines it: of the hash before it, and its columns."""

    inherit_cache = True
    type = LargeBinary()


@compiles(_Digest, "postgresql")
def _digest_on_postgresql(element: _Digest, compiler: SQLCompiler, **options: Any) -> str:
    head, *columns = (compiler.process(each, **options) for each in element.clauses)
    texts = [f"encode({head}, 'hex')"]
    for name, column in zip(COLUMNS, columns, strict=True):
        match saga_history.c[name].type:
            case Uuid():
                texts.append(f"replace(CAST({column} AS text), '-', '')")
            case Timestamp():
                texts.append(f"CAST(CAST(extract(epoch FROM {column}) * 1000000 AS bigint) AS text)")
            case Integer():
                texts.append(f"CAST({column} AS text)")
            case _:
                texts.append(column)
    return f"sha256(convert_to(CAST(array_to_json(ARRAY[{', '.join(texts)}]) AS text), 'UTF8'))"


@compiles(_Digest, "sqlite")
def _digest_on_sqlite(element: _Digest, compiler: SQLCompiler, **options: Any) -> str:
    return f"saga_digest({', '.join(compiler.process(each, **options) for each in element.clauses)})"


class _AnyStepIs(FunctionElement[bool]):
    """Whether a step has one of these statuses. A branch is none: it is over when its steps are."""

    inherit_cache = True
    type = Boolean()


@compiles(_AnyStepIs, "postgresql")
def _any_step_on_postgresql(element: _AnyStepIs, compiler: SQLCompiler, **options: Any) -> str:
    steps, *statuses = (compiler.process(each, **options) for each in element.clauses)
    status = "one.key NOT LIKE 'branch_%' AND one.value ->> 'status'"
    return f"EXISTS (SELECT 1 FROM jsonb_each({steps}) AS one WHERE {status} IN ({', '.join(statuses)}))"  # noqa: S608  # all is bound


@compiles(_AnyStepIs, "sqlite")
def _any_step_on_sqlite(element: _AnyStepIs, compiler: SQLCompiler, **options: Any) -> str:
    steps, *statuses = (compiler.process(each, **options) for each in element.clauses)
    status = "one.key NOT LIKE 'branch_%' AND json_extract(one.value, '$.status')"
    return f"EXISTS (SELECT 1 FROM json_each({steps}) AS one WHERE {status} IN ({', '.join(statuses)}))"  # noqa: S608  # as above
