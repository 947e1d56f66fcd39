"""Histories of sagas that were decided on by hand: checked as they are, or written to a database."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace
from uuid import UUID

from pydantic_core import from_json

from coordinator.chain import COLUMNS, GENESIS, HistoryRow, history_row
from coordinator.decision import Decision
from coordinator.instance import Instance
from coordinator.invariants import Finding, check_saga


def chained(decisions: Sequence[Decision], saga_id: UUID, key: str) -> tuple[Instance, list[HistoryRow]]:
    """The instance and its rows, as the coordinator would write them for a saga with this id."""
    head, rows = GENESIS, []
    for decision in decisions:
        row = history_row(saga_id, decision.instance.revision, decision.entry, given=None, head=head)
        rows.append(row)
        head = row[-1]
    return replace(decisions[-1].instance, id=saga_id, key=key, head=head), rows


def findings(decisions: Sequence[Decision], now: datetime) -> list[Finding]:
    """What does not hold of a saga, going by its history."""
    instance, rows = chained(decisions, decisions[-1].instance.id, decisions[-1].instance.key)
    named = [dict(zip(COLUMNS, row, strict=False)) for row in rows]
    parsed = [{**row, "change": from_json(row["change"]), "sent": from_json(row["sent"])} for row in named]
    return check_saga(instance, [SimpleNamespace(**row) for row in parsed], now)[0]
