"""What `coordinator lifecycles` prints: tables for people, JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.table import Column, Table
from sqlalchemy import Row

from coordinator.lifecycles.entity import Delegation, Entity
from coordinator.views import plain, print_json, print_table


def print_entities(console: Console, found: Sequence[Entity], *, as_json: bool) -> None:
    """Print entities, one a line."""
    if as_json:
        print_json(console, {"entities": [_document(each) for each in found]})
        return
    table = Table("life cycle", Column("key", overflow="fold"), "state", "since", "reminders", "escalated to", "rev")
    for each in found:
        table.add_row(
            f"{each.lifecycle} v{each.version}",
            plain(each.key),
            each.state,
            _time(each.entered_at),
            str(each.reminders or ""),
            plain(each.escalated_to or ""),
            str(each.revision),
        )
    print_table(console, table)


def print_entity(console: Console, entity: Entity, history: Sequence[Row[Any]], *, as_json: bool) -> None:
    """Print where an entity stands, and all that has happened to it."""
    if as_json:
        print_json(console, {**_document(entity), "history": [_row(each) for each in history]})
        return
    head = Table.grid(padding=(0, 2))
    head.add_row("life cycle", f"{entity.lifecycle} version {entity.version}")
    head.add_row("key", plain(entity.key))
    head.add_row("state", entity.state)
    head.add_row("since", _time(entity.entered_at))
    head.add_row("revision", str(entity.revision))
    head.add_row("escalated to", plain(entity.escalated_to or ""))
    head.add_row("due", _time(entity.due_at))
    head.add_row("data", plain(json.dumps(entity.data, ensure_ascii=False)))
    console.print(head)
    print_audit(console, history, as_json=False)


def print_audit(console: Console, rows: Sequence[Row[Any]], *, as_json: bool) -> None:
    """Print entries of the audit trail; those of several entities say whose they are."""
    if as_json:
        print_json(console, {"entries": [_row(each) for each in rows]})
        return
    several = bool(rows) and "key" in rows[0]._fields
    columns = ["rev", "at", "what", "transition", "from", "to", "by", "as", "comment"]
    table = Table(*(["life cycle", "key"] if several else []), *columns)
    for row in rows:
        who = f"{row.actor} for {row.acting_for}" if row.acting_for else row.actor or ""
        table.add_row(
            *([row.lifecycle, plain(row.key)] if several else []),
            str(row.revision),
            _time(row.at),
            row.kind,
            row.transition or "",
            row.from_state or "",
            row.to_state,
            plain(who),
            plain(row.role or ""),
            plain(row.comment),
        )
    print_table(console, table)


def print_verified(
    console: Console, good: int, found: Sequence[tuple[str, str, str]], lost: Sequence[UUID], *, as_json: bool
) -> None:
    """Print how many entities are as their audit trail says, what is wrong with others, and which ones are `lost`."""
    if as_json:
        broken = [{"lifecycle": of, "key": key, "problem": problem} for of, key, problem in found]
        print_json(console, {"good": good, "broken": broken, "lost": [str(each) for each in lost]})
        return
    for of, key, problem in found:
        console.print(plain(f"{of} {key}: {problem}"), soft_wrap=True)
    for identity in lost:
        console.print(f"{identity}: it is gone, and its audit trail is there", highlight=False, soft_wrap=True)
    console.print(f"{good} as their audit trail says, {len(found) + len(lost)} not", highlight=False)


def print_delegations(console: Console, found: Sequence[Delegation], *, as_json: bool) -> None:
    """Print delegations, one a line."""
    if as_json:
        print_json(console, {"delegations": [_plain(asdict(each)) for each in found]})
        return
    table = Table(
        Column("id", no_wrap=True, min_width=36), "from", "to", "role", "in", "holds", "made by", "why", "revoked"
    )
    for each in found:
        table.add_row(
            str(each.id),
            plain(each.from_user),
            plain(each.to_user),
            plain(each.role),
            each.lifecycle or "all",
            f"{_time(each.starts_at)} to {_time(each.ends_at)}",
            plain(each.made_by),
            plain(each.why),
            plain(f"{_time(each.revoked_at)} by {each.revoked_by}" if each.revoked_at else ""),
        )
    print_table(console, table)


def _document(entity: Entity) -> dict[str, Any]:
    return {**_plain({name: getattr(entity, name) for name in Entity.__slots__}), "due_at": _plain(entity.due_at)}


def _row(row: Row[Any]) -> dict[str, Any]:
    document: dict[str, Any] = _plain(dict(row._mapping))  # noqa: SLF001  # SQLAlchemy's name for it is public
    return document


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, UUID) else value


def _time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}" if moment else ""
