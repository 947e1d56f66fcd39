"""What operators write wrongly, or others on purpose, is no traceback, and what they read is readable."""

import json
import sqlite3
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from typer.testing import CliRunner

from coordinator.chain import COLUMNS
from coordinator.cli import cli, main
from coordinator.durations import age, ago, utc
from coordinator.exports import read
from coordinator.lifecycle_views import print_entities, print_entity
from coordinator.lifecycles import Act, Due, Lifecycle, deadlines, transition
from coordinator.search_options import query_of
from coordinator.settings import load_settings
from coordinator.views import print_table
from events.errors import ConfigurationError, DefinitionError
from handlers import Retry
from handlers.operations import Setting
from tests.support.lifecycles import HOUR, Life, PaperWaits, actor


class Superior(Lifecycle):
    """Waits for the person whom a field names."""

    number: str
    boss: str

    @transition(to="open", roles="author")
    def ask(self, _: Act) -> None: ...

    @transition("open", to="done", roles="editor")
    def do(self, _: Act) -> None: ...

    @deadlines("open", escalate_after=HOUR, escalate_to="boss")
    def overdue(self, _: Due) -> PaperWaits | None: ...


NOW = datetime(2026, 11, 26, 9, tzinfo=UTC)


def said_by_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", ["coordinator", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("sagas", "show", "\udcff"),
        ("sagas", "list", "--key", "\udcff"),
        ("handlers", "pause", "x", "--why", "\udcff"),
        ("lifecycles", "show", "paper", "\udcff"),
    ],
)
def test_an_argument_that_is_no_utf_8_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    expected = (1, "error: '\\udcff' is no text in UTF-8; write it anew\n")
    assert said_by_main(monkeypatch, capsys, *arguments) == expected


def test_a_file_that_cannot_be_opened_is_no_server_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "nowhere" / "saga.db"
    monkeypatch.setenv("COORDINATOR_DATABASE_URL", f"sqlite:///{file}")
    expected = (1, f"error: {file}.lock cannot be opened: No such file or directory\n")
    assert said_by_main(monkeypatch, capsys, "db", "upgrade") == expected


def test_an_old_schema_is_named_and_how_to_bring_it_up_to_date(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "saga.db")) as connection:
        connection.execute("CREATE TABLE saga_instance (id CHAR(32) PRIMARY KEY)")
    monkeypatch.setenv("COORDINATOR_DATABASE_URL", f"sqlite:///{tmp_path / 'saga.db'}")
    code, said = said_by_main(monkeypatch, capsys, "sagas", "list")
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("error: the database has no schema yet, or an old one; run `coordinator db upgrade`")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DATABASE_URL", "postgresql://127.0.0.1:abc/x", "COORDINATOR_DATABASE_URL: it cannot be read"),
        ("HEALTH", "127.0.0.1:65536", "COORDINATOR_HEALTH: ports end at 65535"),
        ("GRACE", "inf", "COORDINATOR_GRACE: Input should be less"),
        ("MAX_STALL", "inf", "COORDINATOR_MAX_STALL: Input should be less"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"COORDINATOR_{name}", value)
    with pytest.raises(ConfigurationError, match=said):
        load_settings()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (datetime(2026, 11, 26, 9), NOW),  # noqa: DTZ001  # as people write it
        (datetime.fromisoformat("2026-11-26T11:00+02:00"), NOW),
        (NOW, NOW),
    ],
)
def test_a_time_is_in_utc_unless_it_says_where(given: datetime, meant: datetime) -> None:
    assert (utc(given), utc(given).tzinfo) == (meant, UTC)


@pytest.mark.parametrize("given", ["0001-01-01T00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_time_that_no_calendar_has_is_refused(given: str) -> None:
    """Stored, it could not be read again: not its saga, nor any list with it."""
    with pytest.raises(ConfigurationError, match="is before the year 1 or after the year 9999 in UTC"):
        utc(datetime.fromisoformat(given))


def test_the_zone_of_a_time_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("coordinator.cli.query_of", lambda *given: seen.append(given))
    monkeypatch.setattr("coordinator.cli._with_store", lambda _: None)
    CliRunner().invoke(cli, ["sagas", "list", "--since", "2026-11-26T11:00+02:00"], catch_exceptions=False)
    assert query_of(*seen[0]).since == NOW


def test_an_age_is_a_number_and_a_unit_and_within_the_calendar() -> None:
    assert (age("30d"), age("12h"), ago(age("1d"), NOW)) == (timedelta(30), timedelta(hours=12), NOW - timedelta(1))
    with pytest.raises(ConfigurationError, match="an age is a number and d, h, m or s: 30d, not '30'"):
        age("30")
    with pytest.raises(ConfigurationError, match="999999 days ago is before the year 1"):
        ago(age("999999d"), NOW)


@pytest.mark.parametrize(
    "given",
    [{"first": float("nan")}, {"most": float("inf")}, {"factor": float("inf")}, {"budget": 1e300}, {"attempts": 10**9}],
)
def test_a_retry_that_no_process_could_count_with_is_refused(given: dict[str, Any]) -> None:
    """An operator can set it for running processes: each failure would then be another one."""
    with pytest.raises(DefinitionError, match="at most"):
        Retry(**given)


@pytest.mark.parametrize("given", [{"rate": float("inf")}, {"concurrency": 10**18}, {"retry": {"first": float("nan")}}])
def test_a_limit_that_no_process_could_work_with_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Setting(**given)


def test_an_export_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sagas.jsonl"
    file.write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(ConfigurationError, match="no text in UTF-8"), file.open(encoding="utf-8") as lines:
        list(read(lines))
    with pytest.raises(ConfigurationError, match="line 1 is no JSON"):
        list(read(["[" * 100_000]))
    saga = {
        "id": "01a20000-0000-7000-8000-000000000001",
        "saga": "order",
        "version": 1,
        "key": "1",
        "created_at": "2026-11-26T09:00:00+00:00",
        "state": {},
        "history": [dict.fromkeys(COLUMNS)],
    }
    assert list(read([json.dumps(saga)])) == [saga]
    wrongs: list[dict[str, Any]] = [
        {"id": 1},
        {"id": "x"},
        {"version": "a"},
        {"history": None},
        {"history": []},
        {"history": [{}]},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigurationError, match="line 1 is no saga; write the file with"):
            list(read([json.dumps({**saga, **wrong})]))


def test_what_an_entity_is_escalated_to_is_no_markup() -> None:
    """It may be the value of a field, as anybody has written it."""
    life = Life(Superior(number="1", boss="[/x] \x1b[31mboss")).create(actor("ann", "author"))
    life.passes(HOUR)
    console = Console(file=StringIO(), width=200)
    print_entities(console, [life.entity], as_json=False)
    print_entity(console, life.entity, [], as_json=False)
    printed = console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
    assert printed.count("[/x] \ufffd[31mboss") == 2
    assert "\x1b" not in printed


@pytest.mark.parametrize("width", [20, 80])
def test_a_table_for_which_there_is_no_room_is_lines_that_nothing_is_cut_off(width: int) -> None:
    table = Table("id", Column("key", overflow="fold"), "reason")
    table.add_row("01a20000-0000-7000-8000-000000000001", "order 1", Text("the card was reported stolen"))
    table.add_row("01a20000-0000-7000-8000-000000000002", "order 20", "")
    console = Console(file=StringIO(), width=width)
    print_table(console, table)
    assert console.file.getvalue() == (  # type: ignore[attr-defined]  # it is a StringIO
        "id                                    key       reason\n"
        "01a20000-0000-7000-8000-000000000001  order 1   the card was reported stolen\n"
        "01a20000-0000-7000-8000-000000000002  order 20\n"
    )


def test_a_table_for_which_there_is_room_has_a_frame() -> None:
    table = Table("id", "key")
    table.add_row("1", "order 1")
    console = Console(file=StringIO(), width=80)
    print_table(console, table)
    assert "│ 1  │ order 1 │\n" in console.file.getvalue()  # type: ignore[attr-defined]  # as above
