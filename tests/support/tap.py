"""A tap on the wire to RabbitMQ: evidence of what was said when, from outside of the code under test.

It checks two sentences at the moment at which they could be broken, by asking the database over a connection of its
own before the frame is passed on. I6: a delivery is acknowledged only after something is committed that accounts for
each of its events. I7: an event leaves the outbox only after RabbitMQ has confirmed a publish of it.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from sqlalchemy import Engine, select
from yarl import URL

from coordinator.tables import saga_history
from events.envelope import Envelope
from events.tables import dead_letter, outbox
from handlers.tables import inbox, retry
from tests.support.flows import envelopes
from tests.support.proxy import Proxy, Watch, Way

_HEADER = 7  # bytes of a frame before its payload: type, channel, size

Content = commands.Basic.Publish | commands.Basic.Deliver | commands.Basic.Return


@dataclass
class Message:
    """A method that carries a message, and the message as its frames come in."""

    method: Content
    message_id: str = ""
    size: int = 0
    body: bytes = b""

    @property
    def events(self) -> list[Envelope]:
        return envelopes(self.body)


@dataclass
class Channel:
    """What has been said on a channel and is not settled yet."""

    published: dict[int, Message] = field(default_factory=dict)
    delivered: dict[int, Message] = field(default_factory=dict)
    returned: set[str] = field(default_factory=set)
    publishes: int = 0
    coming: dict[Way, Message] = field(default_factory=dict)


class Tap:
    """Reads along, and notes what it finds wrong.

    Attributes:
        found: sentences that name the invariant that was broken.
        confirmed: the type of each event, by its id, whose publish RabbitMQ has confirmed and not returned.
        acknowledged: the same for events whose delivery was acknowledged.
    """

    def __init__(self, database: Engine) -> None:
        self._database = database
        self.found: list[str] = []
        self.confirmed: dict[str, str] = {}
        self.acknowledged: dict[str, str] = {}

    @property
    def types(self) -> Counter[str]:
        """How many different events of each type were confirmed."""
        return Counter(self.confirmed.values())

    @contextmanager
    def on(self, broker: str) -> Iterator[str]:
        """The URL of the broker with the tap on it, in a thread of its own."""
        url = ""
        loop = asyncio.new_event_loop()
        is_up, over = threading.Event(), asyncio.Event()

        async def serve() -> None:
            nonlocal url
            async with Proxy(URL(broker), self.watch).running() as proxied:
                url = proxied
                is_up.set()
                await over.wait()

        def run() -> None:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(serve())

        thread = threading.Thread(target=run)
        thread.start()
        is_up.wait()
        try:
            yield url
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join()

    def watch(self) -> Watch:
        """Read along on one more connection."""
        conversation = _Conversation(self)

        def see(way: Way, data: bytes) -> None:
            try:
                conversation.see(way, data)
            except Exception as error:  # noqa: BLE001  # whatever it is, it must not pass for an innocent wire
                self.found.append(f"the tap has failed: {error!r}")

        return see

    def acknowledge(self, messages: Iterable[Message]) -> None:
        """Check that all that follows from these deliveries is committed."""
        events = [event for message in messages for event in message.events]
        if not events:
            return
        known = self._accounted_for(events)
        for event in events:
            self.acknowledged[event.id] = event.type
            if event.id not in known:
                self.found.append(f"I6: {event.type} {event.id} is acknowledged, and nothing of it is committed")

    def confirm(self, messages: Iterable[Message]) -> None:
        """Check that what is confirmed for the first time still is in the outbox."""
        events = {event.id: event.type for message in messages for event in message.events}
        new = {each: of for each, of in events.items() if each not in self.confirmed}
        if not new:
            return
        kept = self._in_outbox()
        for event_id, event_type in new.items():
            self.confirmed[event_id] = event_type
            if event_id not in kept:
                self.found.append(f"I7: {event_type} {event_id} has left the outbox before it was confirmed")

    def _accounted_for(self, events: list[Envelope]) -> set[str]:
        ids, keys = [event.id for event in events], {event.key: event.id for event in events}
        with self._database.connect() as connection:
            by_key = {
                *connection.scalars(select(inbox.c.message_key).where(inbox.c.message_key.in_(keys))),
                *connection.scalars(select(retry.c.message_key).where(retry.c.message_key.in_(keys))),
            }
            return {keys[key] for key in by_key} | {
                *connection.scalars(select(saga_history.c.message_id).where(saga_history.c.message_id.in_(ids))),
                *connection.scalars(select(dead_letter.c.message_id).where(dead_letter.c.message_id.in_(ids))),
            }

    def _in_outbox(self) -> set[str]:
        with self._database.connect() as connection:
            return {json.loads(body)["id"] for body in connection.scalars(select(outbox.c.body))}


class _Conversation:
    """Takes the bytes of one connection apart."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._unread: dict[Way, bytes] = dict.fromkeys(Way, b"")
        self._channels: dict[int, Channel] = {}

    def see(self, way: Way, data: bytes) -> None:
        unread = self._unread[way] + data
        while size := _size_of_first(unread):
            _, number, content = frame.unmarshal(unread[:size])
            unread = unread[size:]
            self._take(way, self._channels.setdefault(number, Channel()), content, number)
        self._unread[way] = unread

    def _take(self, way: Way, channel: Channel, content: object, number: int) -> None:
        match content:
            case commands.Channel.Open():  # its number may have been another channel's
                self._channels[number] = Channel()
            case commands.Basic.Publish() | commands.Basic.Deliver() | commands.Basic.Return():
                channel.coming[way] = Message(content)
            case ContentHeader():
                message = channel.coming[way]
                message.message_id, message.size = content.properties.message_id or "", content.body_size
                self._complete(way, channel)
            case ContentBody():
                channel.coming[way].body += content.value
                self._complete(way, channel)
            case commands.Basic.Ack() if way is Way.TO_CLIENT:
                settled = _settled(channel.published, content.delivery_tag, several=content.multiple)
                self._tap.confirm([message for message in settled if message.message_id not in channel.returned])
            case commands.Basic.Nack() if way is Way.TO_CLIENT:
                _settled(channel.published, content.delivery_tag, several=content.multiple)
            case commands.Basic.Ack():
                self._tap.acknowledge(_settled(channel.delivered, content.delivery_tag, several=content.multiple))
            case commands.Basic.Nack():
                _settled(channel.delivered, content.delivery_tag, several=content.multiple)
            case commands.Basic.Reject():
                _settled(channel.delivered, content.delivery_tag, several=False)

    def _complete(self, way: Way, channel: Channel) -> None:
        message = channel.coming[way]
        if len(message.body) < message.size:
            return
        del channel.coming[way]
        match message.method:
            case commands.Basic.Publish():
                channel.publishes += 1
                channel.published[channel.publishes] = message
            case commands.Basic.Deliver():
                channel.delivered[message.method.delivery_tag or 0] = message
            case commands.Basic.Return():
                channel.returned.add(message.message_id)


def _settled(open_: dict[int, Message], tag: int | None, *, several: bool) -> list[Message]:
    """Take out what an answer with this tag settles; 0 is everything."""
    tag = tag or 0
    tags = [each for each in open_ if each <= tag or tag == 0] if several else [tag]
    return [open_.pop(each) for each in tags if each in open_]


def _size_of_first(data: bytes) -> int:
    """Return the bytes that the first frame takes, 0 if it is not complete."""
    if data.startswith(b"AMQP"):
        size = 8
    elif len(data) < _HEADER:
        return 0
    else:
        size = _HEADER + int.from_bytes(data[3:7], "big") + 1
    return size if len(data) >= size else 0
