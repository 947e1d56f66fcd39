"""Each defence on its own: it is enough, and where it is taken away the checks say what is broken.

Nothing else may hide a bug here: no step sends its command again, and the watchdog looks NEVER where it is not the
defence. The defences of a process that crashes are taken away in test_crash_matrix.py, the fence in test_fence.py.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
from aio_pika.abc import AbstractRobustChannel, AbstractRobustQueue
from pamqp.commands import Basic
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from yarl import URL

from coordinator import store
from events.bus import Address, Delivery, Exchange, Outgoing, Queue
from events.database import transaction
from events.failpoints import armed
from events.rabbitmq import RabbitMQBus
from events.rabbitmq_topology import Topology
from events.tables import outbox
from tests.support.engines import open_world, reply, wanted
from tests.support.flows import Mailbox, count_rows, envelopes, open_store, until
from tests.support.invariants import GAPS
from tests.support.proxy import Proxy, Way
from tests.support.rabbitmq import CHARGE, NEVER, PAYMENTS, Received, opened, publish_until_confirmed, wire
from tests.support.rabbitmq import until as until_seen
from tests.support.relays import Load, leave_behind, relaying
from tests.support.servers import RabbitMQ

MESSAGES = 20
SEND = Address(Exchange.COMMANDS, "send.mail")
MAIL = Queue("mail", (SEND,))
LOOKING = {"watch_every": 0.05, "reconcile_every": 0.1}  # a watchdog that looks often

with_and_without = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "taken away"])


@contextmanager
def defended(*, in_place: bool, by: AbstractContextManager[object] | None = None, missed: str) -> Iterator[None]:
    """Let the block go well; or take a defence away, and let the checks of the block say which invariant is broken.

    Args:
        in_place: whether the defence is there.
        by: what takes it away, for as long as it is entered; None if the block does that itself.
        missed: the number of the invariant.
    """
    if in_place:
        yield
        return
    with by or nullcontext(), pytest.raises(AssertionError, match=f"^{missed}: "):
        yield


@contextmanager
def all_confirmed() -> Iterator[None]:
    """Take every publish for confirmed, whatever has become of it."""
    publish = RabbitMQBus._publish

    async def trust(self: RabbitMQBus, message: Outgoing, *, traced: bool) -> None:
        await publish(self, message, traced=traced)

    with patch.object(RabbitMQBus, "_publish", trust):
        yield


@pytest.fixture
async def engine(sqlite_url: str) -> AsyncIterator[AsyncEngine]:
    async with open_store(sqlite_url) as made:
        yield made


# What an outbox may forget


@with_and_without
async def test_f21_only_the_mandatory_flag_keeps_what_no_queue_takes(
    amqp_url: str, engine: AsyncEngine, in_place: bool
) -> None:
    """RabbitMQ confirms what it routes nowhere."""
    with defended(in_place=in_place, by=patch.object(Exchange, "mandatory", False), missed="I7"):
        async with opened(amqp_url, watch_every=NEVER) as bus, relaying(engine, bus) as relay, wire(amqp_url) as wired:
            await bus.declare([PAYMENTS])
            mailbox = Mailbox()
            await bus.consume(PAYMENTS.name, mailbox, prefetch=50)
            queue = await wired.get_queue("saga.payments")
            await queue.unbind("saga.commands", CHARGE.key)
            load = Load(engine, relay)
            missing = await load.commit()

            async def are_looked_at() -> bool:
                return await load.refused() == await count_rows(engine, outbox)

            await until(are_looked_at)
            assert await load.refused("unroutable") in (0, len(missing))
            await queue.bind("saga.commands", CHARGE.key)
            assert await load.lost(bus, mailbox) == set(), "I7: the outbox has forgotten what nobody got"


@with_and_without
async def test_f9_only_a_confirm_of_its_own_settles_a_message_that_was_in_flight(
    amqp_url: str, engine: AsyncEngine, in_place: bool
) -> None:
    """The connection ends half-way: what was in flight on it counts as confirmed, or does not."""
    proxy = Proxy(URL(amqp_url))
    with defended(in_place=in_place, by=all_confirmed(), missed="I7"):
        async with (
            opened(amqp_url, watch_every=NEVER) as elsewhere,
            proxy.running() as url,
            opened(url, watch_every=NEVER) as bus,
            relaying(engine, bus) as relay,
        ):
            for each in (elsewhere, bus):
                await each.declare([PAYMENTS])
            mailbox = Mailbox()
            await elsewhere.consume(PAYMENTS.name, mailbox, prefetch=50)
            load = Load(engine, relay)
            cuts = iter([True])

            async def cut_half_way() -> None:
                if next(cuts, False):
                    proxy.cut_after(MESSAGES * 1000 // 2, Way.TO_BROKER)

            with armed("relay.before_publish", cut_half_way):
                await load.commit(MESSAGES, data=b'{"text": "%s"}' % (b"x" * 1000))
                lost = await load.lost(elsewhere, mailbox)
                assert len(lost) < MESSAGES, "a part has arrived before the end"
                assert lost == set(), "I7: the outbox has forgotten what nobody got"
            assert next(cuts, None) is None


@with_and_without
async def test_f25_only_a_confirm_of_its_own_settles_what_a_full_queue_refuses(
    amqp_url: str, engine: AsyncEngine, in_place: bool
) -> None:
    with defended(in_place=in_place, by=all_confirmed(), missed="I7"):
        async with opened(amqp_url, watch_every=NEVER) as bus, relaying(engine, bus) as relay, wire(amqp_url) as wired:
            limits: Any = {"x-max-length": 2, "x-overflow": "reject-publish"}
            queue = await wired.declare_queue("full", durable=True, arguments=limits)
            await queue.bind("saga.commands", CHARGE.key)
            load = Load(engine, relay)
            await load.commit(MESSAGES)

            async def is_full() -> bool:
                return await load.refused() > 0 or await count_rows(engine, outbox) == 0

            await until(is_full)
            arrived: set[str] = set()
            async with asyncio.timeout(60):
                while True:
                    waiting = await count_rows(engine, outbox)
                    message = await queue.get(fail=False, no_ack=True)
                    if message:
                        arrived |= {each.id for each in envelopes(message.body)}
                    elif not waiting:
                        break
            assert arrived == set(load.ids), "I7: the outbox has forgotten what nobody got"


@with_and_without
async def test_f20_only_a_look_at_the_alarm_keeps_the_relay_from_claiming_in_vain(
    private_rabbitmq: RabbitMQ, private_amqp_url: str, engine: AsyncEngine, in_place: bool
) -> None:
    unseen = patch("events.rabbitmq.is_blocked", lambda _: False)
    async with opened(private_amqp_url, publish_timeout=0.5, watch_every=NEVER) as bus, relaying(engine, bus) as relay:
        await bus.declare([PAYMENTS])
        load = Load(engine, relay)
        await asyncio.to_thread(private_rabbitmq.control, "set_vm_memory_high_watermark", "0")
        try:
            await bus.publish([Outgoing(CHARGE, b"[1]")])  # RabbitMQ tells only those who publish
            await until_seen(lambda: "blocked publishing" in (bus.problem or ""))
            with defended(in_place=in_place, by=unseen, missed="I22"):
                await leave_behind(engine)
                for _ in range(4):  # the time that this takes is that of many sweeps
                    await bus.publish([Outgoing(CHARGE, b"[2]")])
                if not in_place:

                    async def is_refused() -> bool:
                        return await load.refused() > 0

                    await until(is_refused)
                assert await load.refused() == 0, "I22: it has claimed what could not be published"
        finally:
            await asyncio.to_thread(private_rabbitmq.control, "set_vm_memory_high_watermark", "absolute", "512MB")


REVISION, KEY = "the revision", "the key of the history"


@pytest.mark.parametrize("defences", [(REVISION, KEY), (REVISION,), (KEY,), ()], ids=" and ".join)
async def test_f10_either_the_revision_or_the_key_of_the_history_keeps_two_coordinators_apart(
    pg_url: str, defences: tuple[str, ...]
) -> None:
    """One of them hides that the other is missing. Without both, a revision is decided on twice."""
    async with open_world(pg_url) as world:
        one, two = await world.coordinator(apart=True), await world.coordinator(apart=True)
        await one.take(wanted())
        saga = (await world.instance()).id
        answer = reply(saga, "hotel")
        if KEY not in defences:
            async with transaction(world.engine) as connection:
                await connection.execute(text("ALTER TABLE saga_history DROP CONSTRAINT pk_saga_history"))
        first_commit = iter([True])

        async def wait_for_the_other() -> None:
            if next(first_commit, False):
                await two.take(answer)

        without = nullcontext() if REVISION in defences else patch.object(store._update, "update", overwriting())
        with without, armed("engine.before_commit", wait_for_the_other):
            await one.take(answer)
        assert next(first_commit, None) is None
        if not defences:
            world.tamper(saga)
        with defended(in_place=bool(defences), missed="I10"):
            async with transaction(world.engine) as connection:
                gaps = (await connection.execute(text(GAPS))).all()
            assert gaps == [], "I10: a history has gaps, or a revision twice"


def overwriting() -> Callable[..., Awaitable[None]]:
    """What writes instances over whatever is there."""
    update = store._update.update

    async def overwrite(connection: AsyncConnection, rows: Sequence[Any], *, key: str, **_: object) -> None:
        await update(connection, rows, key=key)

    return overwrite


# Nobody listens any more


@with_and_without
async def test_f23_only_the_watchdog_finds_a_consumer_that_was_dropped(amqp_url: str, in_place: bool) -> None:
    """In the time in which another process finds out twice about its own."""
    looks = LOOKING if in_place else {"watch_every": NEVER}
    async with opened(amqp_url, **looks) as bus, opened(amqp_url, **LOOKING) as other, wire(amqp_url) as wired:
        await bus.declare([PAYMENTS])
        await other.declare([MAIL])
        received, theirs = Received(), Received()
        consumer: Any = await bus.consume(PAYMENTS.name, received, prefetch=5)
        their_consumer: Any = await other.consume(MAIL.name, theirs, prefetch=5)
        await drop(consumer)
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        for _ in range(2):
            await drop(their_consumer)
            await publish_until_confirmed(other, Outgoing(SEND, b"[2]"))
            await (await theirs.next()).ack()
        with defended(in_place=in_place, missed="I1"):
            if in_place:
                await (await received.next()).ack()
            queue = await wired.declare_queue("saga.payments", passive=True)
            assert queue.declaration_result.consumer_count == 1, "I1: nobody takes what waits"
        if not in_place:
            assert bus.problem is None
            assert not await consumer.is_deaf()
            for restart in await bus._reconcile():  # a look by hand mends it: there is nothing else to it
                await restart()
            await (await received.next()).ack()


async def drop(consumer: Any) -> None:
    """Let RabbitMQ forget a consumer, which is not told."""
    channel = await consumer._channel.get_underlay_channel()
    await channel.rpc(Basic.Cancel(consumer_tag=consumer._tag, nowait=True))
    await consumer._channel.set_qos(5)  # it has got here


@with_and_without
async def test_f18_only_the_heartbeat_finds_a_connection_that_is_open_in_one_direction(
    amqp_url: str, in_place: bool
) -> None:
    """In the time in which another process finds out about its own."""
    proxy = Proxy(URL(amqp_url))
    async with (
        proxy.running() as url,
        opened(f"{url}?heartbeat={int(in_place)}", publish_timeout=0.5, watch_every=NEVER) as bus,
        opened(f"{url}?heartbeat=1", publish_timeout=0.5, watch_every=NEVER) as other,
    ):
        for each in (bus, other):
            await each.declare([PAYMENTS])
            await publish_until_confirmed(each, Outgoing(CHARGE, b"[1]"))
        proxy.swallow(Way.TO_CLIENT)
        await publish_until_confirmed(other, Outgoing(CHARGE, b"[2]"))
        with defended(in_place=in_place, missed="I1"):
            if in_place:
                await publish_until_confirmed(bus, Outgoing(CHARGE, b"[3]"))
            assert await bus.publish([Outgoing(CHARGE, b"[4]")]) == [None], "I1: it waits for ever"


@with_and_without
async def test_f27_only_a_url_that_is_read_again_brings_a_bus_back_after_a_change_of_the_password(
    private_rabbitmq: RabbitMQ, private_amqp_url: str, in_place: bool
) -> None:
    """In the time in which another process comes back."""
    vhost = URL(private_amqp_url).path.removeprefix("/")

    def rotate(password: str) -> str:
        private_rabbitmq.manage("PUT", "users/rotating", {"password": password, "tags": ""})
        return str(URL(private_amqp_url).with_user("rotating").with_password(password))

    url = await asyncio.to_thread(rotate, "first-word")
    permissions = {"configure": ".*", "write": ".*", "read": ".*"}
    await asyncio.to_thread(private_rabbitmq.manage, "PUT", f"permissions/{vhost}/rotating", permissions)
    async with (
        opened(url, read_url=(lambda: url) if in_place else None, watch_every=0.1) as bus,
        opened(url, read_url=lambda: url, watch_every=0.1) as other,
    ):
        for each in (bus, other):
            await each.declare([PAYMENTS])
        url = await asyncio.to_thread(rotate, "second-word")
        await asyncio.to_thread(private_rabbitmq.control, "close_all_user_connections", "rotating", "revoked")
        await until_seen(lambda: None not in (bus.problem, other.problem))
        await publish_until_confirmed(other, Outgoing(CHARGE, b"[1]"))
        with defended(in_place=in_place, missed="I1"):
            if in_place:
                await publish_until_confirmed(bus, Outgoing(CHARGE, b"[2]"))
            assert bus.problem is None, f"I1: it does not come back: {bus.problem}"


# Dead letters


class Refusing:
    """Refuses poison, and counts how often; takes everything else."""

    def __init__(self) -> None:
        self.refusals = 0
        self.taken = Received()

    def __call__(self, delivery: Delivery) -> None:
        if delivery.body.startswith(b'["poison'):
            self.refusals += 1
            raise ValueError("poison")
        self.taken(delivery)


@with_and_without
async def test_f25_only_the_delivery_limit_ends_what_comes_back_for_ever(amqp_url: str, in_place: bool) -> None:
    limit = 2 if in_place else 2**31 - 1
    async with opened(amqp_url, delivery_limit=limit, watch_every=NEVER) as bus, wire(amqp_url) as wired:
        await bus.declare([PAYMENTS])
        refusing = Refusing()
        await bus.consume(PAYMENTS.name, refusing, prefetch=5)
        await publish_until_confirmed(bus, Outgoing(CHARGE, b'["poison"]'))
        letters = await wired.get_queue("saga.dead-letters.tests")
        async with asyncio.timeout(60):
            with defended(in_place=in_place, missed="I16"):
                while await letters.get(fail=False, no_ack=True) is None:
                    assert refusing.refusals < 50, "I16: it comes back for ever"


@with_and_without
async def test_f26_only_dead_letters_that_are_passed_on_at_least_once_outlive_a_missing_queue(
    impatient_rabbitmq: RabbitMQ, private_amqp_url: str, in_place: bool
) -> None:
    assert impatient_rabbitmq.running
    poison = {PAYMENTS: b'["poison for payments"]', MAIL: b'["poison for mail"]'}
    with defended(in_place=in_place, by=at_most_once(PAYMENTS), missed="I16"):
        async with (
            opened(private_amqp_url, delivery_limit=1, watch_every=NEVER) as bus,
            wire(private_amqp_url) as wired,
        ):
            await bus.declare([*poison])
            await wired.queue_delete("saga.dead-letters.tests")
            for queue, body in poison.items():
                refusing = Refusing()
                await bus.consume(queue.name, refusing, prefetch=1)
                for each in (body, b"[1]"):
                    await publish_until_confirmed(bus, Outgoing(queue.bindings[0], each))
                await (await refusing.taken.next()).ack()  # there is room for it: the poison has left the queue
                assert refusing.refusals == 2, "one more than the limit"
            assert await bus._reconcile() == {}
            letters = await wired.get_queue("saga.dead-letters.tests")
            expected = {*poison.values()} if in_place else {poison[MAIL]}  # the latter are passed on in any case
            arrived: set[bytes] = set()
            async with asyncio.timeout(60):
                while not expected <= arrived:
                    if message := await letters.get(fail=False, no_ack=True):
                        arrived.add(message.body)
            assert arrived == {*poison.values()}, "I16: a message was dropped"


def at_most_once(queue: Queue) -> AbstractContextManager[object]:
    """Let RabbitMQ pass the dead letters of a queue on without waiting for a confirm."""
    declare = Topology._declare_queue

    async def declare_weakly(
        self: Topology, channel: AbstractRobustChannel, part: str, arguments: dict[str, Any]
    ) -> AbstractRobustQueue:
        left_out = "x-dead-letter-strategy" if part == queue.name else ""
        return await declare(self, channel, part, {name: arguments[name] for name in arguments if name != left_out})

    return patch.object(Topology, "_declare_queue", declare_weakly)
