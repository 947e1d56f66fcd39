"""Versions side by side: what a database knows of them, and what is refused."""

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator import App, Settings, Status, sequence, step
from coordinator.node import Node
from coordinator.operator import open_operator
from coordinator.tables import saga_instance
from coordinator.versions import ChangedVersionError, VersionCount, Versions
from events.database import transaction
from events.errors import ConfigurationError, DefinitionError
from events.ids import TimeOrderedIds
from tests.support.flows import START, open_store
from tests.support.sagas import BookFlight, NewTrip, Trip


class Changed(NewTrip, name="trip", version=2):
    @step
    def flight(self) -> BookFlight:
        return BookFlight(trip=self.trip)

    flow = sequence(NewTrip.flow, flight)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    async with open_store(database_url) as opened:
        yield opened


async def add_instance(engine: AsyncEngine, saga: str, version: int, status: Status) -> None:
    identity = TimeOrderedIds().new()
    values = {"state": {}, "steps": {}, "revision": 1, "created_at": START, "updated_at": START, "head": b""}
    async with transaction(engine) as connection:
        await connection.execute(
            saga_instance.insert().values(
                id=identity, saga=saga, version=version, key=str(identity), status=status.value, **values
            )
        )


async def test_a_definition_that_was_changed_under_its_number_is_refused_with_what_changed(engine: AsyncEngine) -> None:
    versions = Versions(engine)
    await versions.register([Trip.definition, NewTrip.definition], START)
    await versions.register([NewTrip.definition], START + timedelta(days=1))
    for refused in (versions.register([Changed.definition], START), versions.check([Changed.definition])):
        with pytest.raises(
            ChangedVersionError, match=r"saga trip version 2 .* step flight is new; .*version=3"
        ) as found:
            await refused
        assert "coordinator sagas forget-version trip 2" in str(found.value)
    assert [(each.version, each.first_seen) for each in await versions.count()] == [(1, START), (2, START)]


async def test_a_check_leaves_nothing_behind(engine: AsyncEngine) -> None:
    await Versions(engine).check([Trip.definition])
    assert await Versions(engine).count() == []


async def test_processes_that_come_at_once_agree(engine: AsyncEngine) -> None:
    versions = Versions(engine)
    both = [versions.register([each.definition], START) for each in (NewTrip, Changed) for _ in range(4)]
    results = await asyncio.gather(*both, return_exceptions=True)
    assert sorted(type(each).__name__ for each in results if each) == ["ChangedVersionError"] * 4


async def test_a_version_is_forgotten_once_all_of_its_instances_have_ended(engine: AsyncEngine) -> None:
    versions = Versions(engine)
    with pytest.raises(ConfigurationError, match="no version 2 of a saga trip"):
        await versions.forget("trip", 2)
    await versions.register([NewTrip.definition], START)
    await add_instance(engine, "trip", 2, Status.COMPLETED)
    await add_instance(engine, "trip", 2, Status.NEEDS_ATTENTION)
    with pytest.raises(ConfigurationError, match="instances that have not ended"):
        await versions.forget("trip", 2)
    async with transaction(engine) as connection:
        await connection.execute(saga_instance.update().values(status="compensated"))
    await versions.forget("trip", 2)
    await versions.register([Changed.definition], START)


async def test_instances_are_counted_for_each_version(engine: AsyncEngine) -> None:
    versions = Versions(engine)
    await versions.register([Trip.definition, NewTrip.definition], START)
    for status in (*Status, Status.RUNNING):
        await add_instance(engine, "trip", 1, status)
    await add_instance(engine, "other", 3, Status.COMPENSATING)
    assert await versions.count() == [
        VersionCount("other", 3, None, in_flight=1),
        VersionCount("trip", 1, START, in_flight=4, stuck=1, ended=3),
        VersionCount("trip", 2, START),
    ]
    assert await versions.in_flight() == {("other", 3), ("trip", 1)}


async def test_a_process_refuses_a_changed_saga_and_names_the_versions_that_it_leaves_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(database_url=f"sqlite:///{tmp_path / 'test.db'}")
    async with Node(App("shop", sagas=[Trip, NewTrip]), settings) as node:
        await add_instance(node.engine, "trip", 2, Status.RUNNING)
    with caplog.at_level(logging.WARNING):
        async with Node(App("shop", sagas=[Trip]), settings):
            assert [getattr(each, "action", "") for each in caplog.records] == ["saga.unknown_version"]
    changed = App("shop", sagas=[Trip], retired=[Changed])
    with pytest.raises(ChangedVersionError):
        async with Node(changed, settings):
            pytest.fail("it runs")
    with pytest.raises(ChangedVersionError):
        async with open_operator(changed, settings):
            pytest.fail("it acts")
    async with Node(changed, settings, coordinator=False):
        pass  # handlers do not care


def test_a_version_is_either_retired_or_not() -> None:
    with pytest.raises(DefinitionError, match="two sagas have the same name and version"):
        App("shop", sagas=[Trip], retired=[Trip])
