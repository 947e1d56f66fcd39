"""Deliveries in, batches out."""

import asyncio

import pytest

from events.codec import Limits, Readable, Unreadable
from events.intake import Intake, Item, completed_by, settle
from tests.support.flows import PATIENCE, FakeDelivery


def event(name: str) -> bytes:
    return b'{"specversion":"1.0","id":"%b","source":"/s","type":"t"}' % name.encode()


def delivery(*names: str, redelivered: bool = False) -> FakeDelivery:
    return FakeDelivery(b"[" + b",".join(event(name) for name in names) + b"]", redelivered=redelivered)


def ids(items: list[Item]) -> list[str]:
    return [item.part.envelope.id if isinstance(item.part, Readable) else "unreadable" for item in items]


@pytest.fixture
def intake() -> Intake:
    return Intake(Limits())


async def take(intake: Intake, most: int = 100) -> list[Item]:
    async with asyncio.timeout(PATIENCE):
        return await intake.take(most)


async def test_a_batch_is_all_that_waits_in_order(intake: Intake) -> None:
    intake.deliver(delivery("1", "2"))
    intake.deliver(delivery("3"))
    assert len(intake) == 3
    assert ids(await take(intake)) == ["1", "2", "3"]
    assert len(intake) == 0


async def test_a_batch_has_a_largest_size(intake: Intake) -> None:
    intake.deliver(delivery("1", "2", "3"))
    assert ids(await take(intake, 2)) == ["1", "2"]
    assert ids(await take(intake, 2)) == ["3"]


async def test_the_reader_waits_while_there_is_nothing(intake: Intake) -> None:
    taking = asyncio.create_task(take(intake))
    await asyncio.sleep(0)
    assert not taking.done()
    intake.deliver(delivery("1"))
    assert ids(await taking) == ["1"]


async def test_a_reader_that_is_cancelled_takes_nothing_away(intake: Intake) -> None:
    taking = asyncio.create_task(take(intake))
    await asyncio.sleep(0)
    intake.deliver(delivery("1"))
    taking.cancel()
    await asyncio.wait([taking])
    assert ids(await take(intake)) == ["1"]


async def test_a_part_that_cannot_be_read_is_an_item_like_others(intake: Intake) -> None:
    intake.deliver(FakeDelivery(b"[" + event("1") + b",17]"))
    intake.deliver(FakeDelivery(b"nonsense"))
    items = await take(intake)
    assert ids(items) == ["1", "unreadable", "unreadable"]
    assert [item.part.raw for item in items] == [event("1"), b"17", b"nonsense"]
    assert isinstance(items[2].part, Unreadable)


async def test_limits_are_checked(intake: Intake) -> None:
    small = Intake(Limits(body=10))
    small.deliver(delivery("1"))
    [item] = await take(small)
    assert isinstance(item.part, Unreadable)
    assert item.part.error.code == "too_large"
    assert len(intake) == 0


async def test_what_comes_again_is_tried_alone(intake: Intake) -> None:
    """One of its parts may have killed the process."""
    intake.deliver(delivery("1"))
    intake.deliver(delivery("2", "3", redelivered=True))
    intake.deliver(delivery("4", "5"))
    assert [ids(await take(intake)) for _ in range(4)] == [["1"], ["2"], ["3"], ["4", "5"]]


async def test_what_is_put_back_comes_first_and_in_order(intake: Intake) -> None:
    intake.deliver(delivery("1", "2", "3"))
    items = await take(intake)
    intake.deliver(delivery("4"))
    intake.put_back(items[1:])
    assert ids(await take(intake)) == ["2", "3", "4"]


async def test_putting_back_wakes_the_reader(intake: Intake) -> None:
    intake.deliver(delivery("1"))
    items = await take(intake)
    taking = asyncio.create_task(take(intake))
    await asyncio.sleep(0)
    intake.put_back(items)
    assert ids(await taking) == ["1"]


async def test_what_is_settled_is_not_put_back(intake: Intake) -> None:
    intake.deliver(delivery("1", "2"))
    items = await take(intake)
    await settle(items[:1])
    intake.put_back(items)
    assert ids(await take(intake)) == ["2"]


async def test_a_delivery_is_acknowledged_once_all_of_it_is_settled(intake: Intake) -> None:
    one, other = delivery("1", "2"), delivery("3")
    intake.deliver(one)
    intake.deliver(other)
    first, second, third = await take(intake)
    await settle([first])
    assert (one.acks, other.acks) == (0, 0)
    await settle([third])
    assert (one.acks, other.acks) == (0, 1)
    await settle([second])
    assert (one.acks, other.acks) == (1, 1)


async def test_settling_twice_is_settling_once(intake: Intake) -> None:
    bundle = delivery("1", "2")
    intake.deliver(bundle)
    first, second = await take(intake)
    await settle([first, first])
    await settle([first])
    assert bundle.acks == 0
    await settle([second, first])
    assert bundle.acks == 1


async def test_it_is_known_which_deliveries_some_items_complete(intake: Intake) -> None:
    whole, half = delivery("1", "2"), delivery("3", "4")
    intake.deliver(whole)
    intake.deliver(half)
    items = await take(intake)
    assert completed_by(items[:3]) == [whole]
    assert completed_by(items) == [whole, half]
    assert completed_by([]) == []
    await settle(items[3:])
    assert completed_by(items[:3]) == [whole, half]
