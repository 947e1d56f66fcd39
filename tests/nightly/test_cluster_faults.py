"""A broker of three nodes that loses some of them (F19). It takes a minute, and is part of `make test-crash`."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster
from tests.support.rabbitmq import PAYMENTS, opened, under_load, until

pytestmark = pytest.mark.rabbitmq


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        made.start()
        yield made
    finally:
        made.close()


async def test_f19_a_majority_goes_on_a_minority_waits_and_nothing_confirmed_is_lost(cluster: Cluster) -> None:
    """The queue's leader dies, then one more node: two of three confirm, one alone does not, and says so."""
    ours, leader, third = cluster.nodes
    async with opened(leader.url) as bus:
        await bus.declare([PAYMENTS])  # its leader is where it was declared
    async with opened(ours.url, publish_timeout=2) as bus, under_load(bus) as ledger:
        await asyncio.to_thread(leader.kill9)
        await ledger.confirms(500)
        await asyncio.to_thread(third.kill9)
        await until(lambda: bus.problem is not None)
        await asyncio.to_thread(third.start)
        await ledger.confirms(500)
        await until(lambda: bus.problem is None)
        await asyncio.to_thread(leader.start)
        await ledger.confirms(500)
