"""Finding sagas, on both databases."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from coordinator import schema
from coordinator.instance import Instance, Status, StepState, StepStatus
from coordinator.search import Query, matching
from coordinator.search_options import query_of
from coordinator.store import Store
from events.database import open_database, transaction
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds
from tests.support.flows import START, ManualClock

_ids = TimeOrderedIds()


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    engine = open_database(database_url)
    await schema.upgrade(engine)
    yield Store(engine, ManualClock())
    await engine.dispose()


def made(key: str, **fields: Any) -> Instance:
    plain = Instance(_ids.new(), "trip", 1, key, Status.RUNNING, {}, revision=1, created_at=START, updated_at=START)
    return replace(plain, **fields)


async def insert(store: Store, *instances: Instance) -> None:
    async with transaction(store.engine) as connection:
        await store.insert(connection, instances)


async def found(store: Store, query: Query) -> set[str]:
    """Return the keys of what is found, which is the same in both ways to ask."""
    listed = await store.list(query)
    async with transaction(store.engine) as connection:
        ids = set((await connection.execute(matching(query))).scalars())
    assert ids == {each.id for each in listed}
    return {each.key for each in listed}


async def test_sagas_are_found_by_name_status_and_key(store: Store) -> None:
    await insert(
        store,
        *(made(f"trip {status}", status=status) for status in Status),
        *(made(f"order {status}", saga="order", status=status) for status in Status),
        made("same"),
        made("same", saga="order"),
    )
    assert len(await store.list(Query())) == 2 * len(Status) + 2
    assert await found(store, Query("order")) == {*(f"order {status}" for status in Status), "same"}
    for status in Status:
        assert await found(store, Query("trip", (status,))) - {"same"} == {f"trip {status}"}
    both = Query("order", (Status.COMPLETED, Status.RUNNING))
    assert await found(store, both) == {"order completed", "order running", "same"}
    in_flight = Query("order", (Status.RUNNING, Status.COMPENSATING))
    assert await found(store, in_flight) == {"order running", "order compensating", "same"}
    assert {each.saga for each in await store.list(Query(key="same"))} == {"order", "trip"}
    assert await found(store, Query("journey")) == set()


async def test_sagas_are_found_by_a_step_and_where_it_stands(store: Store) -> None:
    await insert(
        store,
        made("none"),
        made("runs", steps={"hotel": StepState(StepStatus.SUCCEEDED), "flight": StepState(StepStatus.RUNNING)}),
        made("stuck", steps={"hotel": StepState(StepStatus.UNDO_FAILED)}),
    )
    assert await found(store, Query(step="hotel")) == {"runs", "stuck"}
    assert await found(store, Query(step="flight")) == {"runs"}
    assert await found(store, Query(step="hotel", step_status=StepStatus.UNDO_FAILED)) == {"stuck"}
    assert await found(store, Query(step="payment")) == set()


async def test_sagas_are_found_by_when_they_were_started(store: Store) -> None:
    """From `since` on, and before `until`."""
    day = timedelta(days=1)
    await insert(store, *(made(f"{number}", created_at=START + number * day) for number in range(4)))
    assert await found(store, Query(since=START + day)) == {"1", "2", "3"}
    assert await found(store, Query(until=START + day)) == {"0"}
    assert await found(store, Query(since=START + day, until=START + 3 * day)) == {"1", "2"}


STATES: dict[str, dict[str, Any]] = {
    "text": {"field": "7"},
    "number": {"field": 7},
    "float": {"field": 7.0},
    "half": {"field": 7.5},
    "true": {"field": True},
    "one": {"field": 1},
    "null": {"field": None},
    "word": {"field": "null"},
    "missing": {"other": 7},
    "deep": {"field": {"city": "Zürich 😀 'x' \\ % \"q\""}},
    "list": {"field": [1, 2]},
}


@pytest.mark.parametrize(
    ("path", "value", "keys"),
    [
        ("field", "7", {"text", "number", "float"}),
        ("field", "7.5", {"half"}),
        ("field", "true", {"true"}),
        ("field", "1", {"one"}),
        ("field", "null", {"null", "word"}),
        ("field", '"7"', {"text"}),
        ("field", "[1,2]", {"list"}),
        ("field.city", "Zürich 😀 'x' \\ % \"q\"", {"deep"}),
        ("field.city", "Zürich", set()),
        ("other", "7", {"missing"}),
        ("nosuch.field", "7", set()),
        ("field", "NaN", set()),
        ("field", '"\\u0000"', set()),
        ("field", "' OR 1=1 --", set()),
    ],
)
async def test_sagas_are_found_by_fields_of_their_state(store: Store, path: str, value: str, keys: set[str]) -> None:
    await insert(store, *(made(key, state=state) for key, state in STATES.items()))
    assert await found(store, Query(where=((path, value),))) == keys


async def test_all_that_is_asked_for_must_hold(store: Store) -> None:
    await insert(store, made("both", state={"a": 1, "b": "x"}), made("one", state={"a": 1, "b": "y"}))
    assert await found(store, Query(where=(("a", "1"), ("b", "x")))) == {"both"}
    assert await found(store, Query(key="one", where=(("a", "1"), ("b", "x")))) == set()


async def test_what_is_in_flight_is_found_with_its_index(store: Store) -> None:
    """However many sagas are finished: by an index that has none of them."""
    finished = [made(f"{number}", status=Status.COMPLETED) for number in range(3000)]
    await insert(store, *finished, made("running"))
    explained = "EXPLAIN" if store.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    wanted = matching(Query(statuses=(Status.RUNNING,)))
    async with transaction(store.engine) as connection:
        await connection.execute(text("ANALYZE saga_instance"))
        options = {"literal_binds": True, "render_postcompile": True}
        sql = str(wanted.compile(connection.sync_connection, compile_kwargs=options))
        plan = " ".join(str(row) for row in await connection.execute(text(f"{explained} {sql}")))
    assert "ix_saga_instance_in_flight" in plan


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"step": "hotel=sleeping"}, "a step is running, succeeded,"),
        ({"step": "=running"}, "needs the step's name"),
        ({"step": 'x"y'}, "is no name of a step"),
        ({"where": ["field"]}, "--where takes FIELD=VALUE, not 'field'"),
        ({"where": ["=7"]}, "'' is no field"),
        ({"where": ['a"b=7']}, "is no field"),
        ({"where": ["a\\.b=7"]}, "is no field"),
        ({"where": ["a=\udc80"]}, "it is no text"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused_with_what_to_write(options: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = dict.fromkeys(("saga", "status", "key", "step", "since", "until", "where"))
    with pytest.raises(ConfigurationError) as refused:
        query_of(**{**given, **options})
    assert says in str(refused.value)


def test_a_query_knows_whether_it_leaves_anything_out() -> None:
    assert not Query().is_narrow
    assert Query(key="x").is_narrow
    assert Query(statuses=(Status.RUNNING,)).is_narrow
