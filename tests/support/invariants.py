"""What must hold of the ledger application after a run, whatever happened (numbers of the list of invariants)."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from json import loads
from typing import Any, NamedTuple
from uuid import UUID

from events.derive import identify

Query = Callable[[str], list[tuple[Any, ...]]]
Step = tuple[str, str]  # its name, and do or undo


class Fate(NamedTuple):
    """What becomes of an order."""

    status: str
    replies: tuple[tuple[str, str, str], ...]
    effects: tuple[str, ...]
    witnessed: str


_SHIPPED = (("reserve_goods", "do", "succeeded"), ("charge_card", "do", "succeeded"))
_UNDONE = (("charge_card", "undo", "succeeded"), ("reserve_goods", "undo", "succeeded"))
_UNDONE_EFFECTS = ("reserve", "charge", "refund", "release")
COMPLETED = Fate("completed", (*_SHIPPED, ("ship_goods", "do", "succeeded")), ("reserve", "charge", "ship"), "done")
REFUSED = Fate("compensated", (*_SHIPPED, ("ship_goods", "do", "declined"), *_UNDONE), _UNDONE_EFFECTS, "undone")
FAILED = Fate("compensated", (*_SHIPPED, ("ship_goods", "do", "failed"), *_UNDONE), _UNDONE_EFFECTS, "undone")
_EFFECT_OF = {("reserve_goods", "do"): "reserve", ("reserve_goods", "undo"): "release", ("ship_goods", "do"): "ship"}


def fate(number: int) -> Fate:
    """Say what becomes of the order with this number."""
    if number % 5 == 0:
        return REFUSED
    return FAILED if number < 0 else COMPLETED


def check_ledger(ask: Query, ask_outside: Query, placed: Iterable[UUID], *, witnessed: bool, xids: bool) -> None:
    """Raise an AssertionError that names the invariant that does not hold.

    Args:
        ask: runs a query on the application's database.
        ask_outside: runs a query on the database of the third party.
        placed: the orders.
        witnessed: the application has handlers that take down how each order ended.
        xids: the database is PostgreSQL, which knows by which transaction a row was written.
    """
    found = ask("SELECT id, key, status, state FROM saga_instance")
    orders = {UUID(key): fate(_json(state)["number"]) for _, key, _, state in found}
    order_of = {_uuid(saga): UUID(key) for saga, key, _, _ in found}
    assert set(orders) == set(placed), "I1, I8: nothing lost, nothing invented"
    for _, key, status, _ in found:
        assert status == orders[UUID(key)].status, f"I1: {key} is {status}"

    effects: dict[UUID, Counter[str]] = defaultdict(Counter)
    for order, what in ask("SELECT order_id, what FROM ledger_inside"):
        effects[_uuid(order)][what] += 1
    for order, what in ask_outside("SELECT order_id, what FROM ledger_outside"):
        effects[_uuid(order)][what] += 1
    for order, expected in orders.items():
        names = (*expected.effects, expected.witnessed) if witnessed else expected.effects
        assert effects[order] == Counter(names), f"I2, I3, I8: {order} must be {names}, not {effects[order]}"

    gaps = ask(
        "SELECT i.id FROM saga_instance i JOIN saga_history h ON h.saga_id = i.id GROUP BY i.id, i.revision"
        " HAVING count(*) <> i.revision OR max(h.revision) <> i.revision"
    )
    assert not gaps, f"I10: the history of {gaps} has gaps"

    replies: dict[UUID, list[tuple[str, str, str]]] = defaultdict(list)
    heard: dict[str, str] = {}
    commands: dict[UUID, tuple[UUID, Step]] = {}
    rows = ask(
        "SELECT saga_id, kind, step, direction, result, message_id, sent FROM saga_history ORDER BY saga_id, revision"
    )
    for saga, kind, step, direction, result, message_id, sent in rows:
        order = order_of[_uuid(saga)]
        assert kind in {"started", "reply", "late_reply"}, f"I2: {order} has a {kind}, though no deadline has passed"
        if kind == "reply":
            replies[order].append((step, direction, result))
            heard[message_id] = f"{step} {direction} of {order}"
        for each in _json(sent):
            if "step" in each:
                key = identify("", each["id"])
                assert key not in commands, f"I2: {order} sends {each} twice"
                commands[key] = (order, (each["step"], each["direction"]))
    for order, expected in orders.items():
        assert tuple(replies[order]) == expected.replies, f"I3: {order} took the way {replies[order]}"

    recorded = {_uuid(key): bytes(reply) for key, reply in ask("SELECT message_key, reply FROM inbox") if reply}
    assert recorded.keys() == commands.keys(), "I9: what is sent is handled, and nothing else"
    answers = {loads(reply)["id"] for reply in recorded.values()}
    assert answers == heard.keys(), "I9: the recorded replies are those that the sagas have heard"
    events = ask("SELECT count(*) FROM inbox WHERE reply IS NULL")
    assert events == [(len(orders) if witnessed else 0,)], f"I8: {events} events were handled"

    letters = Counter(row[0] for row in ask("SELECT reason FROM dead_letter"))
    failed = sum(expected is FAILED for expected in orders.values())
    assert letters == ({"failed": failed} if failed else {}), f"I16: {letters} were given up on"
    if xids:
        _check_transactions(ask, commands)


def _check_transactions(ask: Query, commands: dict[UUID, tuple[UUID, Step]]) -> None:
    """Each effect was committed by the transaction that has recorded its command as handled."""
    effects = {(_uuid(order), what): xid for order, what, xid in ask("SELECT order_id, what, xmin FROM ledger_inside")}
    handled = {_uuid(key): xid for key, xid in ask("SELECT message_key, xmin FROM inbox WHERE reply IS NOT NULL")}
    for key, (order, step) in commands.items():
        what = _EFFECT_OF.get(step)
        if what is not None and (order, what) in effects:
            assert handled[key] == effects[order, what], f"I9: {what} of {order} was committed apart from its record"


def check_overdue(ask: Query, placed: Iterable[UUID]) -> None:
    """Check orders of which the first step was not answered in time: each deadline counts once, all is undone."""
    found = {UUID(key): status for key, status in ask("SELECT key, status FROM saga_instance")}
    assert found == dict.fromkeys(placed, "compensated"), f"I1: {Counter(found.values())}"
    gaps = ask(
        "SELECT i.id FROM saga_instance i JOIN saga_history h ON h.saga_id = i.id GROUP BY i.id, i.revision"
        " HAVING count(*) <> i.revision OR max(h.revision) <> i.revision"
    )
    assert not gaps, f"I10: the history of {gaps} has gaps"
    first = ask("SELECT saga_id FROM saga_history WHERE revision = 2 AND kind = 'deadline' AND status = 'compensating'")
    assert len(first) == len(found), f"I12: {len(first)} of {len(found)} sagas were turned back by their deadline"
    effects: dict[UUID, Counter[str]] = defaultdict(Counter)
    for order, what in ask("SELECT order_id, what FROM ledger_inside"):
        effects[_uuid(order)][what] += 1
    for order in found:
        done = effects[order]
        assert done.keys() <= {"reserve", "release", "undone"}, f"I4: {order} went on: {done}"
        assert done["reserve"] <= 1, f"I2: {order}: {done}"
        assert done["reserve"] <= done["release"], f"I3: {order}: {done}"
        assert done["undone"] == 1, f"I8: {order}: {done}"
    assert not ask("SELECT reason FROM dead_letter"), "I16: nothing was given up on"


def _uuid(value: Any) -> UUID:
    return value if isinstance(value, UUID) else UUID(str(value))


def _json(value: Any) -> Any:
    return loads(value) if isinstance(value, str | bytes) else value
