"""Entities on both databases: what is committed together, who loses a race, reminders that come once."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from coordinator import schema
from coordinator.lifecycles import (
    Actor,
    AlreadyThereError,
    Delegation,
    Entity,
    Lifecycle,
    Lifecycles,
    MovedOnError,
    NoSuchEntityError,
    NotAllowedError,
    TransitionRefusedError,
)
from coordinator.lifecycles.service import ADMINISTRATOR
from coordinator.lifecycles.store import LifecycleStore
from coordinator.lifecycles.tables import lifecycle_entity
from coordinator.lifecycles.timers import EVERY, LifecycleTimers
from events.codec import Limits
from events.database import open_database, transaction
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds
from events.sqlite import without_foreign_keys
from events.tables import outbox
from tests.support.flows import START, FakeBus, ManualClock, envelopes, make_relay, until
from tests.support.lifecycles import HOUR, Paper, PaperOut, PaperWaits, actor

ANN, BOB, CID = actor("ann", "author"), actor("bob", "editor"), actor("cid", "editor")
ADA = actor("ada", ADMINISTRATOR)
TRICKY = "Zoë 😀 中文 \u2028 \x01 \x7f ' \" \\ \\u0000 $1 %s :name ?"


class Desk:
    """The papers of one database, and what is sent of them."""

    def __init__(self, url: str, clock: ManualClock, lifecycles: Sequence[type[Lifecycle]] = (Paper,)) -> None:
        self.clock = clock
        self.engine = open_database(url)
        self.bus = FakeBus()
        self.relay = make_relay(self.engine, self.bus, clock)
        self.store = LifecycleStore(self.engine, clock)
        self.papers = Lifecycles(
            lifecycles,
            source="/tests",
            store=self.store,
            outbox=self.relay,
            clock=clock,
            ids=TimeOrderedIds(),
            limits=Limits(),
        )
        self.timers = LifecycleTimers(self.papers, clock)

    async def create(self, number: str = "p-1", **fields: Any) -> Entity:
        """A paper of Ann's that waits for a review."""
        data = {"number": number, "author": "ann", "title": "Tides", **fields}
        await self.papers.create(Paper.model_validate(data), by=ANN)
        return await self.act("submit", ANN, number=number)

    async def act(self, transition_name: str, by: Actor, number: str = "p-1", **about: Any) -> Entity:
        return await self.papers.act("paper", number, transition_name, by=by, **about)

    async def trail(self, number: str = "p-1") -> list[tuple[int, str, str | None, str | None, str]]:
        rows = await self.store.history((await self.papers.find("paper", number)).id)
        return [(row.revision, row.kind, row.transition, row.actor, row.to_state) for row in rows]

    async def sent(self) -> list[Any]:
        """What is in the outbox, in order."""
        async with transaction(self.engine) as connection:
            rows = await connection.execute(select(outbox.c.body).order_by(outbox.c.id))
            found = [each for row in rows for each in envelopes(b"[%b]" % row.body)]
        kinds = {kind.message_type: kind for kind in (PaperOut, PaperWaits)}
        return [kinds[each.type].model_validate_json(each.data) for each in found]

    async def pass_time(self, hours: float) -> int:
        """Let the database's time pass, and do what is due."""
        self.clock.advance(hours * HOUR)
        return await self.timers.fire()

    async def make_due(self) -> None:
        """Let all reminders be due, whatever the time."""
        async with transaction(self.engine) as connection:
            await connection.execute(lifecycle_entity.update().values(due_at=START, remind_at=START))


@pytest.fixture
async def desk(database_url: str) -> AsyncIterator[Desk]:
    opened = Desk(database_url, ManualClock())
    await schema.upgrade(opened.engine)
    await opened.store.clock.calibrate()
    yield opened
    await opened.engine.dispose()


@pytest.fixture
async def desks(pg_url: str) -> AsyncIterator[list[Desk]]:
    """Two processes on one database."""
    opened = [Desk(pg_url, ManualClock()) for _ in range(2)]
    await schema.upgrade(opened[0].engine)
    for each in opened:
        await each.store.clock.calibrate()
    yield opened
    for each in opened:
        await each.engine.dispose()


async def test_each_transition_is_committed_with_its_audit_entry_and_its_event(desk: Desk) -> None:
    await desk.create()
    await desk.act("accept", BOB, comment=TRICKY)
    accepted = await desk.act("accept", CID)
    assert (accepted.state, accepted.revision) == ("out", 4)
    assert await desk.papers.find("paper", "p-1") == accepted
    assert await desk.trail() == [
        (1, "created", "create", "ann", "draft"),
        (2, "moved", "submit", "ann", "review"),
        (3, "voted", "accept", "bob", "review"),
        (4, "moved", "accept", "cid", "out"),
    ]
    rows = await desk.store.history(accepted.id)
    assert [row.comment for row in rows] == ["", "", TRICKY, ""]
    assert [row.votes for row in rows] == [[], [], [["bob", None]], [["bob", None], ["cid", None]]]
    assert rows[0].change == {"number": "p-1", "author": "ann", "title": "Tides", "faults": []}
    assert await desk.sent() == [PaperOut(number="p-1", by="cid")]


async def test_what_is_refused_leaves_nothing_behind(desk: Desk) -> None:
    before = await desk.create()
    for by, error in ((ANN, NotAllowedError), (actor("ann", "editor"), NotAllowedError)):
        with pytest.raises(error):
            await desk.act("accept", by)
    with pytest.raises(TransitionRefusedError):
        await desk.act("submit", ANN)
    with pytest.raises(MovedOnError):
        await desk.act("accept", BOB, revision=1)
    await desk.create("p-2", faults=("accept",))
    voted = await desk.act("accept", BOB, "p-2")
    with pytest.raises(RuntimeError, match="accept is broken"):
        await desk.act("accept", CID, "p-2")
    assert await desk.papers.find("paper", "p-1") == before
    assert await desk.papers.find("paper", "p-2") == voted
    assert await desk.sent() == []


async def test_a_key_is_taken_once(desk: Desk) -> None:
    first = await desk.create()
    with pytest.raises(AlreadyThereError, match="there is a paper with the key 'p-1' already"):
        await desk.papers.create(Paper(number="p-1", author="eve"), by=actor("eve", "author"))
    assert await desk.papers.find("paper", "p-1") == first
    assert len(await desk.trail()) == 2


async def test_what_is_not_there_is_said(desk: Desk) -> None:
    with pytest.raises(NoSuchEntityError, match="there is no paper with the key 'p-9'"):
        await desk.act("submit", ANN, "p-9")
    with pytest.raises(NoSuchEntityError, match="there is no paper with the key 'p-9'"):
        await desk.papers.find("paper", "p-9")


async def test_an_entity_of_a_version_that_is_not_deployed_is_left_alone(desk: Desk, database_url: str) -> None:
    await desk.create()

    class Other(Paper, name="paper", version=2):
        """The same, later."""

    other = Desk(database_url, desk.clock, [Other])
    with pytest.raises(ConfigurationError, match="paper version 1 is not part of this application"):
        await other.act("accept", BOB)
    with pytest.raises(ConfigurationError, match="paper version 1 is not part of this application"):
        await other.papers.create(Paper(number="p-2", author="ann"), by=ANN)
    assert await other.pass_time(1) == 0
    await other.engine.dispose()
    assert len(await desk.trail()) == 2


async def test_who_decides_at_the_same_moment_decides_one_after_the_other(desk: Desk) -> None:
    """Both looked at the same revision: one is told to look again, and nothing is decided twice."""
    for number in range(5):
        seen = await desk.create(f"p-{number}")
        results = await asyncio.gather(
            desk.act("accept", BOB, f"p-{number}", revision=seen.revision),
            desk.act("refuse", CID, f"p-{number}", revision=seen.revision, comment="no"),
            return_exceptions=True,
        )
        assert sorted(type(each).__name__ for each in results) == ["Entity", "MovedOnError"]
        assert len(await desk.trail(f"p-{number}")) == 3


async def test_one_person_who_clicks_twice_has_one_vote(desk: Desk) -> None:
    await desk.create()
    results = await asyncio.gather(desk.act("accept", BOB), desk.act("accept", BOB), return_exceptions=True)
    assert sorted(type(each).__name__ for each in results) == ["Entity", "NotAllowedError"]
    assert (await desk.papers.find("paper", "p-1")).state == "review"


async def test_entities_are_listed_newest_first_and_what_waits_oldest_first(desk: Desk) -> None:
    for number in ("p-1", "p-2", "p-3"):
        await desk.create(number)
        desk.clock.advance(1)
    await desk.act("refuse", BOB, "p-2", comment="no")
    assert [each.key for each in await desk.store.list()] == ["p-3", "p-2", "p-1"]
    assert [each.key for each in await desk.store.list(lifecycle="paper", state="review", limit=1)] == ["p-3"]
    assert [each.key for each in await desk.store.list(lifecycle="other")] == []
    assert [each.key for each in await desk.papers.waiting_for(BOB)] == ["p-1", "p-3"]
    assert [each.key for each in await desk.papers.waiting_for(actor("zoe", "chief"))] == []


# Delegations


async def delegated(desk: Desk, **more: Any) -> Delegation:
    about = {"by": BOB, "ends_at": desk.store.clock.now() + timedelta(days=7), "why": "holiday", **more}
    return await desk.papers.delegate("bob", "dan", "editor", **about)


async def test_a_delegate_decides_until_it_is_taken_back(desk: Desk) -> None:
    await desk.create("p-1")
    await desk.create("p-2")
    made = await delegated(desk, lifecycle="paper")
    dan = actor("dan", acting_for="bob")
    await desk.act("accept", dan)
    [*_, row] = await desk.store.history((await desk.papers.find("paper", "p-1")).id)
    assert (row.actor, row.acting_for, row.role, row.roles, row.delegation_id) == ("dan", "bob", "editor", [], made.id)
    with pytest.raises(NotAllowedError, match="eve may not take back what bob has delegated to dan"):
        await desk.papers.revoke(made.id, by=actor("eve"))
    await desk.papers.revoke(made.id, by=BOB)
    with pytest.raises(NotAllowedError, match="has not delegated"):
        await desk.act("accept", dan, "p-2")
    [kept] = await desk.store.delegations(user="dan")
    assert (kept.id, kept.revoked_by, kept.why) == (made.id, "bob", "holiday")
    with pytest.raises(ConfigurationError, match="that could be taken back"):
        await desk.papers.revoke(made.id, by=BOB)


async def test_an_administrator_delegates_and_takes_back_for_others(desk: Desk) -> None:
    made = await delegated(desk, by=ADA)
    assert (made.made_by, made.from_user) == ("ada", "bob")
    await desk.papers.revoke(made.id, by=ADA)
    assert await desk.store.delegations(user="nobody") == []


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"by": CID}, NotAllowedError, "that takes bob, with the role, or an administrator"),
        ({"by": actor("bob", "author")}, NotAllowedError, "that takes bob, with the role"),
        ({"by": actor("bob", "editor", acting_for="cid")}, NotAllowedError, "that takes bob, with the role"),
        ({"by": actor("ada", ADMINISTRATOR, acting_for="cid")}, NotAllowedError, "that takes bob, with the role"),
        ({"why": " "}, ConfigurationError, "say why the role is delegated"),
        ({"ends_at": START}, ConfigurationError, "would never hold"),
        ({"lifecycle": "letter"}, ConfigurationError, "no life cycle called letter; it has: paper"),
    ],
)
async def test_a_delegation_that_may_not_be_or_makes_no_sense_is_refused(
    desk: Desk, more: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        await delegated(desk, **more)
    assert await desk.store.delegations() == []


async def test_a_role_that_nobody_can_have_is_not_delegated(desk: Desk) -> None:
    with pytest.raises(NotAllowedError, match="' editor' names no person and no role"):
        await desk.papers.delegate(
            "bob", "dan", " editor", by=ADA, ends_at=desk.store.clock.now() + timedelta(days=1), why="x"
        )


async def test_an_authors_delegate_is_known_however_his_name_is_spelt(desk: Desk) -> None:
    await desk.create()
    end = desk.store.clock.now() + timedelta(days=7)
    made = await desk.papers.delegate("ann", "dan", "editor", by=actor("ann", "editor"), ends_at=end, why="holiday")
    with pytest.raises(NotAllowedError, match="it takes somebody else than author and who stands in for him"):
        await desk.act("accept", actor("Dan", "editor"))
    await desk.papers.revoke(made.id, by=ANN)
    assert (await desk.act("accept", actor("Dan", "editor"))).votes == {"accept": [("Dan", None)]}


async def test_nobody_delegates_to_himself(desk: Desk) -> None:
    with pytest.raises(NotAllowedError, match="Bob needs nobody to stand in for him"):
        await desk.papers.delegate(
            "bob", "Bob", "editor", by=BOB, ends_at=desk.store.clock.now() + timedelta(days=1), why="x"
        )


# Deadlines


async def test_reminders_and_the_escalation_are_sent_and_in_the_audit_trail(desk: Desk) -> None:
    await desk.create()
    assert await desk.pass_time(0.9) == 0
    assert await desk.pass_time(0.1) == 1
    assert await desk.pass_time(2) == 1
    assert await desk.pass_time(1) == 1
    assert await desk.timers.fire() == 0
    assert await desk.sent() == [
        PaperWaits(number="p-1", kind="reminded", reminders=1, escalated_to=None),
        PaperWaits(number="p-1", kind="reminded", reminders=2, escalated_to=None),
        PaperWaits(number="p-1", kind="escalated", reminders=2, escalated_to="chief"),
    ]
    assert [row[1] for row in await desk.trail()] == ["created", "moved", "reminded", "reminded", "escalated"]
    assert [each.key for each in await desk.papers.waiting_for(actor("zoe", "chief"))] == ["p-1"]
    await desk.act("accept", actor("zoe", "chief"))
    await desk.act("accept", BOB)
    assert await desk.pass_time(100) == 0


async def test_one_entity_that_cannot_be_reminded_of_does_not_hold_up_the_others(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    await desk.create("p-1", faults=("waits",))
    await desk.create("p-2", faults=("too long",))
    await desk.create("p-3")
    assert await desk.pass_time(1) == 3
    assert [each.number for each in await desk.sent()] == ["p-3"]
    for number, said in (("p-1", "could not be made: RuntimeError"), ("p-2", "could not be sent: paper.waits")):
        [*_, row] = await desk.store.history((await desk.papers.find("paper", number)).id)
        assert said in row.comment
        assert any(number in each.getMessage() and each.levelname == "ERROR" for each in caplog.records)


async def test_two_processes_remind_once(desks: list[Desk]) -> None:
    one, other = desks
    for number in range(50):
        await one.create(f"p-{number}")
    await one.make_due()
    fired = await asyncio.gather(*(each.timers.fire() for each in desks for _ in range(3)))
    assert sum(fired) == 50
    assert len(await other.sent()) == 50


async def test_timers_run_in_the_background_until_they_are_stopped(desk: Desk) -> None:
    async def is_reminded(times: int) -> bool:
        return (await desk.papers.find("paper", "p-1")).reminders == times

    await desk.create()
    await desk.timers.start()
    for number in (1, 2):
        await desk.make_due()
        await desk.clock.pass_sleep(EVERY)
        await until(partial(is_reminded, number))
    assert desk.timers.failing == frozenset()
    await desk.timers.stop()


async def test_the_audit_trail_is_found_by_person_time_and_entity(desk: Desk) -> None:
    await desk.create("p-1")
    await desk.create("p-2")
    await delegated(desk)
    await desk.act("accept", actor("dan", acting_for="bob"), "p-1")
    now = desk.store.clock.now()

    async def found(**among: Any) -> list[tuple[str, str | None]]:
        return [(row.key, row.transition) for row in await desk.store.audit(**among)]

    assert await found(user="bob") == await found(user="dan") == [("p-1", "accept")]
    assert await found(key="p-2", lifecycle="paper") == [("p-2", "submit"), ("p-2", "create")]
    assert await found(lifecycle="letter") == []
    assert len(await found(until=now + timedelta(hours=1), limit=3)) == 3
    assert await found(since=now + timedelta(hours=1)) == []


async def verified(desk: Desk, **meant: str) -> dict[str, str | None]:
    return {key: problem async for _, key, problem in desk.store.verify(**meant)}


async def test_an_audit_trail_that_is_whole_is_found_to_be(desk: Desk) -> None:
    assert await verified(desk) == {}
    for number in ("p-1", "p-2", "p-3"):
        await desk.create(number, title=TRICKY)
    await delegated(desk)
    await desk.act("accept", actor("dan", "a", "b", acting_for="bob"), "p-1", comment=TRICKY)
    await desk.act("withdraw", ANN, "p-2")
    await desk.act("write", ANN, "p-2", edits={"title": "Tides"})
    await desk.pass_time(4)
    assert await verified(desk) == {"p-1": None, "p-2": None, "p-3": None}
    assert await verified(desk, lifecycle="paper", key="p-2") == {"p-2": None}
    assert await verified(desk, lifecycle="letter") == {}


@pytest.mark.parametrize(
    ("done", "said"),
    [
        ("UPDATE lifecycle_history SET actor = 'eve' WHERE revision = 3", "entry 3 is not as it was written"),
        ("UPDATE lifecycle_history SET comment = '' WHERE revision = 3", "entry 3 is not as it was written"),
        ("UPDATE lifecycle_history SET change = '{}' WHERE revision = 1", "entry 1 is not as it was written"),
        ("DELETE FROM lifecycle_history WHERE revision = 2", "entry 2 is missing"),
        ("DELETE FROM lifecycle_history WHERE revision = 4", "it is at revision 4, its audit trail at 3"),
        ("DELETE FROM lifecycle_history", "it is at revision 4, its audit trail at 0"),
        ("UPDATE lifecycle_entity SET state = 'refused'", "it is refused, which its audit trail does not say"),
        ("UPDATE lifecycle_entity SET signatures = '{}'", "its signatures are not what its audit trail says"),
        ('UPDATE lifecycle_entity SET votes = \'{"accept": [["eve", null]]}\'', "its votes are not what its audit"),
        ("UPDATE lifecycle_entity SET escalated_to = 'eve'", "its escalated_to are not what its audit trail says"),
        ('UPDATE lifecycle_entity SET data = \'{"number": "p-1"}\'', "its data are not what its audit trail says"),
    ],
)
async def test_an_audit_trail_that_somebody_has_changed_is_found_out(desk: Desk, done: str, said: str) -> None:
    await desk.create()
    await desk.act("accept", BOB, comment="fine")
    await desk.act("accept", CID)
    assert await verified(desk) == {"p-1": None}
    async with transaction(desk.engine) as connection:
        await connection.exec_driver_sql(done)
    found = await verified(desk)
    assert found["p-1"] is not None
    assert found["p-1"].startswith(said)


async def test_votes_and_an_escalation_are_what_the_audit_trail_says(desk: Desk) -> None:
    await desk.create()
    await desk.pass_time(4)
    await desk.act("accept", BOB)
    waiting = await desk.papers.find("paper", "p-1")
    assert (waiting.votes, waiting.escalated_to) == ({"accept": [("bob", None)]}, "chief")
    assert await verified(desk) == {"p-1": None}
    async with transaction(desk.engine) as connection:
        await connection.execute(lifecycle_entity.update().values(votes={}, escalated_to=None))
    assert await verified(desk) == {"p-1": "its votes and escalated_to are not what its audit trail says"}


@pytest.mark.parametrize(
    "done",
    [
        "UPDATE lifecycle_history SET change = 'nonsense' WHERE revision = 1 AND entity_id IN ({})",
        "UPDATE lifecycle_entity SET votes = '[]' WHERE id IN ({})",
    ],
)
async def test_an_entity_that_cannot_be_read_hides_no_other(desk: Desk, done: str) -> None:
    for number in ("p-1", "p-2", "p-3"):
        await desk.create(number)
    async with transaction(desk.engine) as connection:
        await connection.exec_driver_sql(done.format("SELECT id FROM lifecycle_entity WHERE key = 'p-2'"))
        await connection.exec_driver_sql("UPDATE lifecycle_entity SET state = 'out' WHERE key = 'p-3'")
    found = await verified(desk)
    assert found["p-1"] is None
    assert str(found["p-2"]).startswith("what is stored of it cannot be read: ")
    assert found["p-3"] == "it is out, which its audit trail does not say"


async def test_an_audit_trail_whose_entity_is_gone_is_found(sqlite_url: str) -> None:
    """SQLite asks for no foreign keys where a tool does not."""
    desk = Desk(sqlite_url, ManualClock())
    await schema.upgrade(desk.engine)
    await desk.store.clock.calibrate()
    entity = await desk.create()
    assert await desk.store.lost() == []
    async with desk.engine.connect() as connection, without_foreign_keys(connection):
        await connection.execute(lifecycle_entity.delete())
        await connection.commit()
    assert await desk.store.lost() == [entity.id]
    await desk.engine.dispose()


async def test_every_page_is_checked_to_its_last_entity(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.lifecycles.store._PAGE", 2)
    for number in ("p-1", "p-2", "p-3", "p-4", "p-5"):
        await desk.create(number)
    assert len(await verified(desk)) == 5


async def test_whoever_acts_while_an_audit_trail_is_checked_does_not_break_it(desks: list[Desk]) -> None:
    one, other = desks
    await one.create()

    async def act() -> None:
        for number in range(20):
            await one.act("withdraw", ANN)
            await one.act("write", ANN, edits={"title": f"Tides {number}"})
            await one.act("submit", ANN)

    acting = asyncio.create_task(act())
    checks = 0
    while not acting.done():
        assert await verified(other) == {"p-1": None}
        checks += 1
    await acting
    assert checks


async def test_no_entry_of_the_audit_trail_is_written_twice(desk: Desk) -> None:
    """The database itself refuses a second entry for one revision."""
    entity = await desk.create()
    with pytest.raises(IntegrityError):
        async with transaction(desk.engine) as connection:
            await connection.exec_driver_sql(
                "INSERT INTO lifecycle_history SELECT * FROM lifecycle_history WHERE revision = 1"
            )
    async with transaction(desk.engine) as connection:
        count = await connection.execute(select(func.count()).select_from(lifecycle_entity))
        assert count.scalar_one() == 1
    assert entity.revision == 2
