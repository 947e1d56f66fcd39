"""Messages that are committed to an outbox, and what becomes of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncEngine

from events.bus import Address, Bus, Outgoing
from events.clock import SystemClock
from events.codec import Limits, bundle_body
from events.database import transaction
from events.envelope import Envelope
from events.ids import TimeOrderedIds, system_random
from events.outbox import Outbound
from events.rabbitmq import RabbitMQBus
from events.relay import Entry, Relay, RelayOptions, insert_entries
from events.tables import outbox
from tests.support.flows import START, Mailbox, count_rows
from tests.support.rabbitmq import CHARGE, publish_until_confirmed

QUICK = RelayOptions(lease=5, sweep_every=0.1, backoff_first=0.1, backoff_most=0.3, share=1)
_LAST = "the last one"


@asynccontextmanager
async def relaying(engine: AsyncEngine, bus: Bus) -> AsyncIterator[Relay]:
    relay = Relay(
        engine,
        bus,
        clock=SystemClock(),
        ids=TimeOrderedIds(),
        random=system_random(),
        limits=Limits(),
        options=QUICK,
    )
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()


class Load:
    """Commits numbered messages to the outbox."""

    def __init__(self, engine: AsyncEngine, relay: Relay, address: Address = CHARGE) -> None:
        self._engine = engine
        self._relay = relay
        self._address = address
        self.ids: list[str] = []

    async def commit(self, count: int = 5, *, data: bytes = b"{}") -> list[str]:
        ids = [str(len(self.ids) + n) for n in range(count)]
        async with transaction(self._engine) as connection:
            messages = [Outbound(self._envelope(each, data), self._address, 1) for each in ids]
            after_commit = await self._relay.write(connection, messages)
        after_commit()
        self.ids += ids
        return ids

    async def everything_arrives(self, mailbox: Mailbox) -> list[str]:
        """Return the ids of all that arrived, in order."""
        arrived: list[str] = []
        while not set(self.ids) <= set(arrived):
            arrived.append((await mailbox.next()).id)
        return arrived

    async def is_published(self) -> None:
        """Return when the outbox is empty."""
        async with asyncio.timeout(30):
            while await count_rows(self._engine, outbox):  # noqa: ASYNC110  # a database tells nobody
                await asyncio.sleep(0.02)

    async def refused(self, code: str = "") -> int:
        """Count what waits in the outbox because the bus did not take it, for this reason."""
        async with transaction(self._engine) as connection:
            rows = (await connection.execute(outbox.select())).all()
        return sum(row.error is not None and row.error.startswith(code) for row in rows)

    async def lost(self, bus: RabbitMQBus, mailbox: Mailbox) -> set[str]:
        """Wait until the outbox is empty; return what does not arrive all the same.

        What was confirmed stands in the queue before what is published now.
        """
        await self.is_published()
        last = bundle_body([self._envelope(_LAST).encode()])
        await publish_until_confirmed(bus, Outgoing(self._address, last))
        arrived: set[str] = set()
        while _LAST not in arrived:
            arrived.add((await mailbox.next()).id)
        return set(self.ids) - arrived

    def _envelope(self, name: str, data: bytes = b"{}") -> Envelope:
        return Envelope(id=name, source="/test", type=self._address.key, version=1, data=data)


async def leave_behind(engine: AsyncEngine) -> list[str]:
    """Put rows into the outbox that are due: a process has died with its lease."""
    ids = [f"behind {n}" for n in range(5)]
    entries = [
        Entry(
            uuid4(),
            CHARGE,
            1,
            Envelope(id=each, source="/behind", type=CHARGE.key, version=1, data=b"{}").encode(),
            None,
            None,
        )
        for each in ids
    ]
    async with transaction(engine) as connection:
        await insert_entries(connection, entries, due_at=START)
    return ids
