"""What operators do with handlers while they run: pause, resume, set limits; and what they see of them.

Settings are rows that every process reads once a second; who has changed what, when and why is kept.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from math import inf
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, bindparam, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.database import reader, transaction
from events.errors import ConfigurationError, DefinitionError
from events.ids import Ids
from events.tables import Json, Timestamp, dead_letter
from handlers.definition import Handler
from handlers.policy import Retry
from handlers.tables import handler_change, handler_process, handler_setting, retry

logger = logging.getLogger(__name__)

_MOST_AT_A_TIME = 10_000
_ALIVE = timedelta(seconds=5)
_KNOWN = timedelta(minutes=1)  # that a process has died says nothing about its handlers
_SIGN_EVERY = timedelta(seconds=2)
_FORGET_AFTER = timedelta(hours=1)
RETRY_SETTINGS = tuple(each.name for each in fields(Retry) if each.name != "never")

_sign = text(
    "INSERT INTO handler_process (id, host, pid, started_at, seen_at, handlers)"
    " VALUES (:id, :host, :pid, :now, :now, :handlers)"
    " ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at, handlers = excluded.handlers"
).bindparams(
    bindparam("id", type_=handler_process.c.id.type),
    bindparam("now", type_=Timestamp),
    bindparam("handlers", type_=Json),
)
# A change is made of what is set already, so there is one at a time. Who only reads is not held up. SQLite has one
# writer anyway.
_ONE_AT_A_TIME = text("LOCK TABLE handler_setting IN SHARE ROW EXCLUSIVE MODE")
_set = text(
    "INSERT INTO handler_setting (handler, paused, rate, concurrency, retry, changed_at, changed_by, reason)"
    " VALUES (:handler, :paused, :rate, :concurrency, :retry, :changed_at, :changed_by, :reason)"
    " ON CONFLICT (handler) DO UPDATE SET paused = excluded.paused, rate = excluded.rate,"
    " concurrency = excluded.concurrency, retry = excluded.retry, changed_at = excluded.changed_at,"
    " changed_by = excluded.changed_by, reason = excluded.reason"
).bindparams(bindparam("retry", type_=Json), bindparam("changed_at", type_=Timestamp))


@dataclass(frozen=True, slots=True)
class Setting:
    """What an operator has set for a handler; None, or no entry in `retry`, is what its code says."""

    paused: bool = False
    rate: float | None = None
    concurrency: int | None = None
    retry: Mapping[str, Any] = field(default_factory=dict)
    changed_at: datetime | None = None
    changed_by: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate < inf:
            raise ConfigurationError("a rate is more than 0 messages a second; to stop a handler, pause it")
        if self.concurrency is not None and self.concurrency > _MOST_AT_A_TIME:
            raise ConfigurationError(f"a handler runs {_MOST_AT_A_TIME} messages at a time at most, in one process")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigurationError("a handler runs at least one message at a time; to stop it, pause it")
        if strange := set(self.retry) - set(RETRY_SETTINGS):
            raise ConfigurationError(f"there is no retry setting {', '.join(sorted(strange))}")
        try:
            Retry(**self.retry)
        except DefinitionError as error:
            raise ConfigurationError(str(error)) from error

    @classmethod
    def of(cls, row: RowMapping) -> "Setting":
        """Return what a row holds."""
        return cls(**{name: row[name] for name in (each.name for each in fields(cls))})

    @property
    def limits(self) -> dict[str, Any]:
        """What is set, without who has set it."""
        found = {"paused": self.paused, "rate": self.rate, "concurrency": self.concurrency, **self.retry}
        return {name: value for name, value in found.items() if value not in (None, False)}


@dataclass(frozen=True, slots=True)
class InForce:
    """The limits of a handler that are in force: its code's, as an operator has changed them."""

    paused: bool
    rate: float | None
    concurrency: int
    retry: Retry


def effective(handler: Handler, setting: Setting | None) -> InForce:
    """Return the limits in force."""
    if setting is None:
        return InForce(paused=False, rate=handler.rate, concurrency=handler.concurrency, retry=handler.retry)
    return InForce(
        paused=setting.paused,
        rate=setting.rate or handler.rate,
        concurrency=setting.concurrency or handler.concurrency,
        retry=replace(handler.retry, **setting.retry) if setting.retry else handler.retry,
    )


@dataclass(slots=True)
class Presence:
    """A process that runs handlers, as it signs the table; `signed` is what it has written last."""

    id: UUID
    host: str
    pid: int
    signed_at: datetime | None = None
    signed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Overview:
    """A handler as an operator sees it: its settings, its processes' states, what waits, and what was given up on."""

    name: str
    setting: Setting | None
    processes: tuple[Mapping[str, Any], ...]
    waiting: int
    dead: int


class Operations:
    """The settings of handlers in a database.

    Args:
        engine: the database.
        ids: names the entries of the record of changes.
    """

    def __init__(self, engine: AsyncEngine, *, ids: Ids) -> None:
        self._engine = engine
        self._reader = reader(engine)
        self._ids = ids

    # For a running process

    async def follow(
        self, presence: Presence, states: Mapping[str, Any], now: datetime
    ) -> tuple[dict[str, Setting], Counter[str]]:
        """Return all settings, and how many processes run each handler; sign in as one of them now and then."""
        if presence.signed_at is None or states != presence.signed or now - presence.signed_at >= _SIGN_EVERY:
            await self._sign_in(presence, states, now)
        async with self._reader.connect() as connection:
            settings = await self._settings(connection)
            statement = select(handler_process.c.handlers).where(handler_process.c.seen_at > now - _ALIVE)
            running = (await connection.execute(statement)).scalars().all()
        return settings, Counter(name for handlers in running for name in handlers)

    async def _sign_in(self, presence: Presence, states: Mapping[str, Any], now: datetime) -> None:
        values = {"id": presence.id, "host": presence.host, "pid": presence.pid, "now": now, "handlers": dict(states)}
        async with transaction(self._engine) as connection:
            await connection.execute(_sign, values)
        presence.signed_at, presence.signed = now, states

    async def leave(self, presence: Presence) -> None:
        """Sign off, and remove those who never did."""
        gone = handler_process.c.id == presence.id
        if presence.signed_at is not None:
            gone |= handler_process.c.seen_at < presence.signed_at - _FORGET_AFTER
        async with transaction(self._engine) as connection:
            await connection.execute(handler_process.delete().where(gone))

    async def _settings(self, connection: AsyncConnection) -> dict[str, Setting]:
        found: dict[str, Setting] = {}
        for row in (await connection.execute(handler_setting.select())).mappings():
            try:
                found[row["handler"]] = Setting.of(row)
            except (ConfigurationError, TypeError) as error:  # written past us: what the code says holds
                logger.warning(
                    "the settings of %s are of no use: %s",
                    row["handler"],
                    error,
                    extra={"action": "handlers.bad_setting", "handler": row["handler"]},
                )
        return found

    # For operators

    async def change(self, name: str, *, by: str, reason: str, now: datetime, **changes: Any) -> Setting:
        """Change settings of a handler; all processes follow within two seconds.

        Args:
            name: the handler.
            by: who does it.
            reason: why.
            now: when.
            changes: fields of `Setting`; `retry` is merged into what is set already. A None is what the code says.

        Raises:
            ConfigurationError: a value is of no use.
        """
        async with transaction(self._engine) as connection:
            before = await self._before_change(connection, name)
            if "retry" in changes:
                merged = {**before.retry, **changes["retry"]}
                changes["retry"] = {key: value for key, value in merged.items() if value is not None}
            after = replace(before, **changes, changed_at=now, changed_by=by, reason=reason)
            await self._write(connection, name, after, changes)
        return after

    async def reset(self, name: str, *, by: str, reason: str, now: datetime) -> Setting:
        """Remove all settings of a handler, so that what its code says holds; a pause stays."""
        async with transaction(self._engine) as connection:
            before = await self._before_change(connection, name)
            after = Setting(paused=before.paused, changed_at=now, changed_by=by, reason=reason)
            await self._write(connection, name, after, {"rate": None, "concurrency": None, "retry": {}})
        return after

    async def _before_change(self, connection: AsyncConnection, name: str) -> Setting:
        if connection.dialect.name == "postgresql":
            await connection.execute(_ONE_AT_A_TIME)
        return (await self._settings(connection)).get(name) or Setting()

    async def _write(self, connection: AsyncConnection, name: str, after: Setting, changes: Mapping[str, Any]) -> None:
        values = {each.name: getattr(after, each.name) for each in fields(Setting)}
        await connection.execute(_set, {"handler": name, **values, "retry": dict(after.retry)})
        await connection.execute(
            handler_change.insert().values(
                id=self._ids.new(),
                handler=name,
                change=dict(changes),
                changed_at=after.changed_at,
                changed_by=after.changed_by,
                reason=after.reason,
            )
        )

    async def overview(self, now: datetime) -> list[Overview]:
        """Return all handlers that run, are set, or have messages that wait or were given up on."""
        async with self._reader.connect() as connection:
            settings = await self._settings(connection)
            alive = handler_process.select().where(handler_process.c.seen_at > now - _ALIVE)
            processes = (await connection.execute(alive.order_by(handler_process.c.started_at))).mappings().all()
            waiting = await _count(connection, select(retry.c.consumer, func.count()).group_by(retry.c.consumer))
            letters = select(dead_letter.c.consumer, func.count()).where(dead_letter.c.status == "dead")
            dead = await _count(connection, letters.group_by(dead_letter.c.consumer))
        running = {name for process in processes for name in process["handlers"]}
        return [
            Overview(
                name,
                settings.get(name),
                tuple(
                    {"host": process["host"], "pid": process["pid"], **process["handlers"][name]}
                    for process in processes
                    if name in process["handlers"]
                ),
                waiting.get(name, 0),
                dead.get(name, 0),
            )
            for name in sorted(running | settings.keys() | waiting.keys() | dead.keys())
        ]

    async def known(self, now: datetime) -> frozenset[str]:
        """Return the names of the handlers that a process runs, or has run a moment ago without signing off."""
        statement = select(handler_process.c.handlers).where(handler_process.c.seen_at > now - _KNOWN)
        async with self._reader.connect() as connection:
            return frozenset(name for handlers in (await connection.execute(statement)).scalars() for name in handlers)

    async def changes(self, name: str | None = None, limit: int = 50) -> list[RowMapping]:
        """Return who has changed what, newest first."""
        statement = handler_change.select().order_by(handler_change.c.id.desc()).limit(limit)
        if name is not None:
            statement = statement.where(handler_change.c.handler == name)
        async with self._reader.connect() as connection:
            return list((await connection.execute(statement)).mappings().all())


async def _count(connection: AsyncConnection, statement: Any) -> dict[str, int]:
    return {row[0]: row[1] for row in await connection.execute(statement)}
