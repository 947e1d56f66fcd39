"""What `coordinator handlers` prints."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from sqlalchemy import RowMapping

from coordinator.views import plain, print_json, print_table
from handlers.operations import Overview, Setting


def print_overview(console: Console, found: Sequence[Overview], *, as_json: bool) -> None:
    """Print handlers: processes, what runs and waits, breakers, settings."""
    if as_json:
        print_json(console, {"handlers": [_document(each) for each in found]})
        return
    numbers = [Column(name, justify="right") for name in ("processes", "running", "waiting", "dead")]
    table = Table(Column("handler", no_wrap=True), "state", *numbers, "breaker", "set by an operator")
    for each in found:
        running = sum(process["running"] for process in each.processes)
        table.add_row(
            plain(each.name),
            _state(each),
            str(len(each.processes)),
            str(running),
            str(each.waiting),
            str(each.dead),
            plain(_breakers(each.processes)),
            plain(_limits(each.setting)),
        )
    print_table(console, table)


def print_setting(console: Console, name: str, setting: Setting) -> None:
    """Print what holds for a handler from now on."""
    said = _limits(setting) or "the limits of its code"
    console.print(f"{plain(name)}: {plain(said)}; all processes follow within two seconds", highlight=False)


def print_changes(console: Console, found: Sequence[RowMapping], *, as_json: bool) -> None:
    """Print who has changed what."""
    if as_json:
        print_json(
            console,
            {"changes": [{**row, "id": str(row["id"]), "changed_at": _iso(row["changed_at"])} for row in found]},
        )
        return
    table = Table(Column("at", no_wrap=True), "handler", "by", "change", "why")
    for row in found:
        table.add_row(
            f"{row['changed_at']:%Y-%m-%d %H:%M:%S}",
            plain(row["handler"]),
            plain(row["changed_by"]),
            plain(_shown(row["change"])),
            plain(row["reason"]),
        )
    print_table(console, table)


def _document(each: Overview) -> dict[str, Any]:
    setting = each.setting
    return {
        "name": each.name,
        "state": _state(each),
        "processes": list(each.processes),
        "waiting": each.waiting,
        "dead": each.dead,
        "set": setting.limits if setting else {},
        "changed_by": setting.changed_by if setting else None,
        "changed_at": _iso(setting.changed_at) if setting else None,
        "reason": setting.reason if setting else None,
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _state(each: Overview) -> str:
    if each.setting and each.setting.paused:
        return "paused"
    return "running" if each.processes else "stopped"


def _breakers(processes: Sequence[Mapping[str, Any]]) -> str:
    phases = {(process["breaker"], process["phase"]) for process in processes if "breaker" in process}
    return ", ".join(f"{name}: {phase}" for name, phase in sorted(phases))


def _limits(setting: Setting | None) -> str:
    return _shown(setting.limits) if setting else ""


def _shown(values: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return ", ".join(f"{name}={'-' if value is None else value}" for name, value in flat.items())
