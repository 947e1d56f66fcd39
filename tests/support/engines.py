"""Coordinators over one database, decided on by hand: what tests of the engine share."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator.definition import Saga
from coordinator.engine import Engine
from coordinator.instance import Instance
from coordinator.sagas import Sagas
from coordinator.store import Store
from coordinator.tables import saga_instance
from coordinator.verification import Verification
from events.codec import Limits, bundle_body
from events.database import open_database, transaction
from events.envelope import Direction, Envelope, Result, SagaLink, wrap
from events.ids import TimeOrderedIds
from events.message import Message, Succeeded
from events.tables import dead_letter, outbox
from tests.support.flows import (
    PATIENCE,
    START,
    FakeBus,
    FakeDelivery,
    ManualClock,
    envelopes,
    make_relay,
    open_store,
    until,
)
from tests.support.sagas import Trip, TripWanted

APPLICATION = "tests"
BY_HAND = 1e6  # seconds between looks for deadlines: the tests look themselves
DATABASE_PAUSE = 0.5
SMALL = Limits(body=4000)  # what the outbox takes

_numbers = count()


class Coordinator:
    """An engine with a bus and an outbox of its own; what it sends stays in the outbox's table."""

    def __init__(
        self,
        engine: AsyncEngine,
        clock: ManualClock,
        sagas: Iterable[type[Saga]],
        timer_every: float,
        retired: Iterable[type[Saga]] = (),
    ) -> None:
        self.bus = FakeBus()
        self.clock = clock
        self.timer_every = timer_every
        self.store = Store(engine, clock)
        self.engine = Engine(
            Sagas([saga.definition for saga in sagas], [saga.definition for saga in retired], application=APPLICATION),
            source="/tests/coordinator",
            engine=engine,
            store=self.store,
            bus=self.bus,
            outbox=make_relay(engine, self.bus, clock, limits=SMALL),
            clock=clock,
            ids=TimeOrderedIds(),
            limits=Limits(),
            timer_every=self.timer_every,
        )

    async def start(self) -> None:
        await self.bus.declare(self.engine.queues)
        await self.engine.start()
        await self.clock.asleep(self.timer_every)  # the first look for deadlines is over

    def give(self, *messages: Envelope | bytes, redelivered: bool = False) -> FakeDelivery:
        """Deliver a bundle; all that is given before the next await is one batch."""
        parts = [each.encode() if isinstance(each, Envelope) else each for each in messages]
        delivery = FakeDelivery(bundle_body(parts), redelivered=redelivered)
        self.bus.put(f"coordinator.{APPLICATION}.events", delivery)
        return delivery

    async def take(self, *messages: Envelope | bytes) -> None:
        """Deliver a bundle and wait until it is acknowledged."""
        self.give(*messages)
        await self.settled()

    async def settled(self) -> None:
        async def all_acknowledged() -> bool:
            return all(delivery.acks for delivery in self.bus.deliveries)

        await until(all_acknowledged)


class World:
    """A database and what the coordinators on it have written."""

    def __init__(self, url: str, engine: AsyncEngine, stack: AsyncExitStack) -> None:
        self.url = url
        self.engine = engine
        self.clock = ManualClock()
        self._stack = stack
        self._tampered: set[UUID] = set()

    async def coordinator(
        self,
        *sagas: type[Saga],
        apart: bool = False,
        timer_every: float | None = None,
        retired: Iterable[type[Saga]] = (),
    ) -> Coordinator:
        """A running coordinator of `Trip` by default; with `apart` it has its own connections."""
        engine = open_database(self.url) if apart else self.engine
        self._stack.push_async_callback(engine.dispose)
        made = Coordinator(engine, self.clock, sagas or [Trip], timer_every or BY_HAND + next(_numbers), retired)
        self._stack.push_async_callback(made.engine.stop)
        await made.start()
        return made

    async def instance(self, key: str = "t-1") -> Instance:
        [found] = await Store(self.engine, self.clock).find(key)
        return found

    async def history(self, key: str = "t-1") -> list[str]:
        """The kinds of all transitions of an instance."""
        return [row.kind for row in await Store(self.engine, self.clock).history((await self.instance(key)).id)]

    async def sent(self, type: str | None = None) -> list[Envelope]:
        async with transaction(self.engine) as connection:
            bodies = (await connection.execute(outbox.select())).all()
        found = [envelope for row in bodies for envelope in envelopes(bundle_body([row.body]))]
        return [envelope for envelope in found if type in (None, envelope.type)]

    async def dead(self) -> dict[bytes, str]:
        """The reasons of all dead letters, by their bytes."""
        async with transaction(self.engine) as connection:
            rows = (await connection.execute(dead_letter.select())).all()
        assert all(row.consumer == "coordinator" for row in rows)
        assert len({row.body for row in rows}) == len(rows)
        return {row.body: row.reason for row in rows}

    async def verify(self) -> None:
        """Whatever a test has done, histories are whole and the invariants hold; only deadlines may have passed."""
        found = [each async for each in Verification(self.engine, self.clock).findings()]
        left = [each for each in found if "nobody has acted" not in each.detail and each.saga_id not in self._tampered]
        assert left == []

    def tamper(self, saga_id: UUID) -> None:
        """Take note that a saga is not what any coordinator has written."""
        self._tampered.add(saga_id)

    async def set_state(self, key: str, state: dict[str, Any]) -> None:
        """Write a state that no version of the saga has written."""
        self.tamper((await self.instance(key)).id)
        async with transaction(self.engine) as connection:
            await connection.execute(saga_instance.update().where(saga_instance.c.key == key).values(state=state))


@asynccontextmanager
async def open_world(url: str) -> AsyncIterator[World]:
    """A database for coordinators, which end with it."""
    async with open_store(url) as engine:
        async with AsyncExitStack() as stack:
            made = World(url, engine, stack)
            yield made
        await made.verify()


def envelope_of(message: Message, saga: SagaLink | None = None) -> Envelope:
    return wrap(message, id=f"m-{next(_numbers)}", source="/tests", time=START, saga=saga)


def wanted(trip: str = "t-1", *faults: str) -> Envelope:
    return envelope_of(TripWanted(trip=trip, faults=faults))


def reply(
    saga_id: UUID,
    step_name: str,
    outcome: Message | None = None,
    result: Result | None = Result.SUCCEEDED,
    direction: Direction = Direction.DO,
) -> Envelope:
    return envelope_of(outcome or Succeeded(), SagaLink(saga_id, step_name, direction, 1, result))


def actions(caplog: pytest.LogCaptureFixture, level: int = logging.NOTSET) -> list[str]:
    return [getattr(record, "action", "") for record in caplog.records if record.levelno >= level]


def failing(*errors: Exception) -> Callable[[], Awaitable[None]]:
    """What a fail point does that raises these errors, one each time."""
    left = list(errors)

    async def act() -> None:
        if left:
            raise left.pop(0)

    return act


class Hold:
    """What a fail point does that stands still: until the test lets go, or its task is cancelled."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._released = asyncio.Event()

    async def __call__(self) -> None:
        self._reached.set()
        await self._released.wait()

    async def reached(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._reached.wait()

    def release(self) -> None:
        self._released.set()


# Batches
