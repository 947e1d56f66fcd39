"""What must hold of the ledger application after a run, whatever happened (numbers of the list of invariants)."""

from collections import Counter
from collections.abc import Callable, Iterable
from json import loads
from typing import Any
from uuid import UUID

Query = Callable[[str], list[tuple[Any, ...]]]

GAPS = (
    "SELECT i.id FROM saga_instance i JOIN saga_history h ON h.saga_id = i.id GROUP BY i.id, i.revision"
    " HAVING count(*) <> i.revision OR max(h.revision) <> i.revision"
)
"""Sagas whose history is not one row for each revision (I10)."""


def check_ledger(ask: Query, ask_outside: Query, placed: Iterable[UUID]) -> None:
    """Raise an AssertionError that names the invariant that does not hold.

    Args:
        ask: runs a query on the application's database.
        ask_outside: runs a query on the database of the third party.
        placed: the orders.
    """
    found = ask("SELECT key, status, state FROM saga_instance")
    sagas = {key: (status, state if isinstance(state, dict) else loads(state)) for key, status, state in found}
    assert set(sagas) == {str(order) for order in placed}, "I1, I8: nothing lost, nothing invented"
    effects: dict[str, Counter[str]] = {key: Counter() for key in sagas}
    entries = ask("SELECT order_id, what FROM ledger_inside") + ask_outside("SELECT order_id, what FROM ledger_outside")
    for order, what in entries:
        effects[str(UUID(str(order)))][what] += 1
    for key, (status, state) in sagas.items():
        if state["number"] % 5:
            assert status == "completed", f"I1: {key} is {status}"
            assert effects[key] == {"reserve": 1, "charge": 1, "ship": 1}, f"I2: {key}: {effects[key]}"
        else:
            assert status == "compensated", f"I1: {key} is {status}"
            undone = {"reserve": 1, "charge": 1, "refund": 1, "release": 1}
            assert effects[key] == undone, f"I3: {key}: {effects[key]}"
    assert not ask(GAPS), "I10: a history has gaps"
    replied = {name for (name,) in ask("SELECT message_id FROM saga_history WHERE kind = 'reply'")}
    assert len(replied) == sum(5 if state["number"] % 5 == 0 else 3 for _, state in sagas.values()), (
        "I9: one reply a step"
    )
    (handled,) = ask("SELECT count(*) FROM inbox WHERE reply IS NOT NULL")[0]
    assert handled == len(replied), "I9: an inbox row for each reply"
    assert not ask("SELECT reason, detail FROM dead_letter"), "I16: nothing was given up on"
    assert not ask("SELECT reason FROM retry"), "nothing waits any more"


def check_atomic(ask: Query) -> None:
    """I9: an effect and the inbox row of its command, an instance and its latest history row, were committed together.

    On PostgreSQL only, which keeps the transaction that wrote a row.
    """
    apart = ask(
        "SELECT l.order_id, l.what FROM ledger_inside l JOIN saga_instance i ON i.key = l.order_id::text"
        " WHERE NOT EXISTS (SELECT 1 FROM inbox b WHERE b.xmin = l.xmin AND b.reply IS NOT NULL"
        " AND convert_from(b.reply, 'UTF8')::jsonb ->> 'sagaid' = i.id::text)"
    )
    assert not apart, f"I9: an effect in another transaction than its inbox row: {apart}"
    apart = ask(
        "SELECT i.key, h.revision FROM saga_instance i JOIN saga_history h"
        " ON h.saga_id = i.id AND h.revision = i.revision WHERE h.xmin <> i.xmin"
    )
    assert not apart, f"I9: an instance in another transaction than its history: {apart}"
