"""One at a time per key, within a process and between processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import text

from events.clock import SystemClock
from events.database import open_database, transaction
from events.ids import system_random
from handlers.keys import KeyLocks

PATIENCE = 30


@pytest.fixture
async def processes(database_url: str) -> AsyncIterator[list[KeyLocks]]:
    """As many processes as the database allows: two on PostgreSQL, one on SQLite."""
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(2 if database_url.startswith("postgresql") else 1):
            engine = open_database(database_url, pool_size=2)
            stack.push_async_callback(engine.dispose)
            locks = KeyLocks(engine, clock=SystemClock(), random=system_random())
            stack.push_async_callback(locks.close)
            found.append(locks)
        yield found


async def test_one_key_is_in_work_once_and_others_do_not_wait_for_it(processes: list[KeyLocks]) -> None:
    running: dict[str, int] = {}
    most: dict[str, int] = {}
    both = asyncio.Barrier(2)

    async def work(locks: KeyLocks, key: str) -> None:
        async with locks.of(key):
            running[key] = running.get(key, 0) + 1
            most[key] = max(most.get(key, 0), running[key])
            await asyncio.sleep(0.001)
            running[key] -= 1

    async def meet(locks: KeyLocks, key: str) -> None:
        async with locks.of(key), asyncio.timeout(PATIENCE):
            await both.wait()

    await asyncio.gather(meet(processes[0], "a"), meet(processes[-1], "b"))
    await asyncio.gather(*(work(locks, key) for locks in processes for key in "ab" * 20))
    assert most == {"a": 1, "b": 1}


@pytest.mark.postgres
async def test_the_keys_of_a_process_that_is_gone_are_free(pg_url: str) -> None:
    dying, living = open_database(pg_url), open_database(pg_url)
    first, second = (KeyLocks(each, clock=SystemClock(), random=system_random()) for each in (dying, living))
    held, got = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with first.of("a"):
            held.set()
            await asyncio.Event().wait()

    async def take() -> None:
        async with second.of("a"):
            got.set()

    holder = asyncio.create_task(hold())
    async with asyncio.timeout(PATIENCE):
        await held.wait()
        taker = asyncio.create_task(take())
        async with transaction(living) as connection:
            await connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")
            )
        await got.wait()
        await taker
    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)  # giving up a key whose session is lost is only logged
    assert holder.cancelled()
    for locks, engine in ((first, dying), (second, living)):
        await locks.close()
        await engine.dispose()
