"""What the command line prints: tables for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator import schema
from coordinator.bulk_acts import Outcome
from coordinator.instance import Fan, Instance, Origin, Status, StepState
from coordinator.lines import Place
from coordinator.timers import Timer

_WIDEST = 100_000  # columns of a line
COLOURS = {
    Status.WAITING: "cyan",
    Status.RUNNING: "blue",
    Status.COMPENSATING: "yellow",
    Status.COMPLETED: "green",
    Status.COMPENSATED: "magenta",
    Status.ARCHIVED: "dim",
    Status.NEEDS_ATTENTION: "red",
}


def print_list(
    console: Console, found: Sequence[Instance], counts: Mapping[tuple[str, Status], int], *, as_json: bool
) -> None:
    """Print instances and how many there are of each kind."""
    if as_json:
        print_json(console, {"sagas": [_document(each) for each in found], "counts": _counts(counts)})
        return
    id_column, status_column = Column("id", no_wrap=True, min_width=36), Column("status", no_wrap=True)
    table = Table(id_column, "saga", Column("key", overflow="fold"), status_column, "reason")
    for each in found:
        table.add_row(
            str(each.id),
            f"{each.saga} v{each.version}",
            plain(each.key),
            _status(each.status),
            plain(each.reason or ""),
        )
    print_table(console, table)
    print_counts(console, counts)


def print_counts(console: Console, counts: Mapping[tuple[str, Status], int]) -> None:
    """Print a table of sagas by status; a status that none has is left out."""
    statuses = [status for status in Status if any(each is status for _, each in counts)]
    columns = [Column(_status(status), justify="right") for status in statuses]
    table = Table("saga", *columns, Column("all", justify="right"))
    for saga in sorted({saga for saga, _ in counts}):
        numbers = [counts.get((saga, status), 0) for status in statuses]
        table.add_row(saga, *(str(number) if number else "" for number in numbers), str(sum(numbers)))
    print_table(console, table)


def print_instance(
    console: Console,
    instance: Instance,
    history: Sequence[Row[Any]],
    *,
    place: Place | None = None,
    items: Mapping[str, StepState] | None = None,
    as_json: bool,
) -> None:
    """Print where an instance stands, its steps with the `items` that are not over, and its history."""
    if as_json:
        line = None if place is None else {"key": place.key, "behind": place.behind}
        print_json(console, {**document_of(instance, history), "line": line, "items": _plain_value(dict(items or {}))})
        return
    head = Table.grid(padding=(0, 2))
    head.add_row("saga", f"{instance.saga} version {instance.version}")
    head.add_row("id", str(instance.id))
    head.add_row("key", plain(instance.key))
    head.add_row("status", _status(instance.status))
    head.add_row("reason", plain(instance.reason or ""))
    if place is not None:
        said = f"waits behind {place.behind} for " if place.behind else "holds "
        head.add_row("line", Text(said).append_text(plain(place.key)))
    head.add_row("due", str(instance.due_at or ""))
    head.add_row("trace", instance.traceparent[3:35] if instance.traceparent else "")
    head.add_row("state", plain(json.dumps(instance.state, ensure_ascii=False)))
    console.print(head)
    steps = Table("step", "status", "attempt", "undo attempt", "due")
    for name, at in {**instance.steps, **(items or {})}.items():
        status = f"{at.status.value}{_count(at.fan)}"
        steps.add_row(name, status, str(at.attempt), str(at.undo_attempt or ""), str(at.due_at or ""))
    print_table(console, steps)
    table = Table("rev", "at", "what", "step", "result", "status", "sent", "because of")
    for row in history:
        sent = ", ".join(each["type"] for each in row.sent)
        step = f"{row.step} ({row.direction})" if row.direction else row.step or ""
        table.add_row(
            str(row.revision),
            f"{row.at:%H:%M:%S.%f}"[:-3],
            row.kind,
            step,
            row.result or "",
            row.status,
            sent,
            plain(row.message_id or (f"{row.actor}: {row.why}" if row.actor else "")),
        )
    print_table(console, table)


def _count(fan: Fan | None) -> str:
    """Return in words how far a step for several items has come."""
    if fan is None:
        return ""
    numbers = {"under way": fan.pending, "failed": fan.failed, "could not be undone": fan.stuck}
    said = [f"{fan.begun} of {fan.total} begun", *(f"{number} {what}" for what, number in numbers.items() if number)]
    return f" ({', '.join(said)})"


def print_outcome(console: Console, outcome: Outcome, *, as_json: bool) -> None:
    """Print what became of one of many sagas, in one line."""
    before, after = outcome.before, outcome.after
    if as_json:
        document = {"id": str(after.id), "saga": after.saga, "key": after.key, "status": after.status.value}
        refused = None if outcome.refused is None else str(outcome.refused)
        print_json(console, {**document, "revision": after.revision, "refused": refused})
        return
    line = Text.assemble(
        "refused " if outcome.refused else "done    ", str(after.id), f" {after.saga} ", plain(after.key)
    )
    if outcome.refused:
        line.append(": ").append(plain(str(outcome.refused)))
    elif before.status is not after.status:
        line.append_text(Text.assemble(": ", _status(before.status), " -> ", _status(after.status)))
    console.print(line, soft_wrap=True)


def print_sum(console: Console, counts: Mapping[str, int], *, dry_run: bool, as_json: bool) -> None:
    """Print how many of many sagas were acted on."""
    if as_json:
        print_json(console, {**counts, "stopped": bool(counts["stopped"]), "dry_run": dry_run})
        return
    done = "would be done, nothing was changed" if dry_run else "done"
    stopped = "; stopped before the end: run it again to go on" if counts["stopped"] else ""
    console.print(f"{counts['done']} {done}; {counts['refused']} refused{stopped}", highlight=False)


def print_timers(console: Console, found: Sequence[Timer], *, as_json: bool) -> None:
    """Print what is due, one timer a line."""
    if as_json:
        print_json(console, {"timers": [_timer(each) for each in found]})
        return
    table = Table(
        "due (UTC)", "what", "step", "saga", Column("key", overflow="fold"), Column("id", no_wrap=True, min_width=36)
    )
    for each in found:
        key, of = plain(each.saga.key), f"{each.saga.saga} v{each.saga.version}"
        table.add_row(f"{each.due_at:%Y-%m-%d %H:%M:%S}", each.what, each.step or "", of, key, str(each.saga.id))
    print_table(console, table)


def _timer(timer: Timer) -> dict[str, Any]:
    saga = timer.saga
    about = {"id": str(saga.id), "saga": saga.saga, "key": saga.key, "revision": saga.revision}
    return {**about, "step": timer.step, "what": timer.what, "due_at": timer.due_at.isoformat()}


async def print_revision(console: Console, engine: AsyncEngine, *, as_json: bool) -> None:
    """Print the revision of the schema and the one that is needed."""
    current, needed = await schema.current(engine), schema.head()
    if as_json:
        print_json(console, {"current": current, "needed": needed})
    else:
        console.print(f"schema {current or 'nothing'}, needed {needed}", highlight=False)


def print_table(console: Console, table: Table) -> None:
    """Print a table; if the terminal has no room for it, or what reads it is none, in lines that nothing is cut off.

    Squeezed into 80 columns, a key or a reason would stand there in pieces of a few letters, and `grep` find none.
    """
    if console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum <= console.width:
        console.print(table)
        return
    table.box, table.pad_edge = None, False
    lines = Console(file=StringIO(), width=_WIDEST)
    with lines.capture() as printed:
        lines.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))


def plain(text: str) -> Text:
    """Return text from outside without control characters or markup: it must not steer the terminal."""
    return Text("".join(character if character.isprintable() else "�" for character in text))


def _status(status: Status) -> Text:
    return Text(status.value, COLOURS[status])


def document_of(instance: Instance, history: Sequence[Row[Any]]) -> dict[str, Any]:
    """Return an instance with its history as plain JSON data."""
    return {**_document(instance), "history": plain_rows(history)}


def plain_rows(rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
    """Return rows as plain JSON data."""
    return [{name: _plain_value(value) for name, value in row._mapping.items()} for row in rows]  # noqa: SLF001


def _document(instance: Instance) -> dict[str, Any]:
    document = {name: getattr(instance, name) for name in Instance.__slots__}
    return {name: _plain_value(value) for name, value in document.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, StepState | Origin):
        return value.to_json()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: _plain_value(each) for name, each in value.items()}
    if isinstance(value, str | int | float | bool | list | None):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _counts(counts: Mapping[tuple[str, Status], int]) -> list[dict[str, Any]]:
    return [
        {"saga": saga, "status": status.value, "count": number} for (saga, status), number in sorted(counts.items())
    ]


def print_json(console: Console, document: Any) -> None:
    console.file.write(json.dumps(document, ensure_ascii=True) + "\n")
