"""What of a dead letter reaches a terminal or a program: no secret by accident, and nothing that is obeyed."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import pytest
from rich.console import Console

from coordinator import dead_letter_views as views
from handlers.letters import Change, Group, Letter, Replay
from handlers.replay_plan import Planned

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ID = UUID(int=7)
STEERS = "\x1b]0;owned\x07\x1b[2J\u202e"
BODY = json.dumps({"id": STEERS, "data": {"api_key": "hunter2", "order": "7"}}).encode() + b" "

LETTER = Letter(
    id=ID,
    consumer=f"work{STEERS}",
    reason="failed",
    detail=f"Traceback\nValueError: {STEERS} amqp://ada:hunter2@host\n",
    body=BODY,
    content_type=f"text/plain{STEERS}",
    headers={"authorization": "Bearer hunter2", STEERS: STEERS},
    message_id=STEERS,
    message_type=f"work{STEERS}",
    saga_id=None,
    traceparent=None,
    attempts=3,
    dead_at=NOW,
    error_type="ValueError",
    first_at=NOW,
    fingerprint="f",
    status="replayed",
    settled_at=NOW,
    settled_by=f"ada{STEERS}",
    settled_why=f"why\nstatus: dead{STEERS}",
    edited_body=BODY,
)
CHANGE = Change(UUID(int=8), ID, "edited", NOW, f"ada{STEERS}", f"why\nstatus: dead{STEERS}", BODY)
REPLAY = Replay(NOW, None, 0)


def printed(work: Callable[[Console], None]) -> str:
    file = io.StringIO()
    work(Console(file=file, width=200, force_terminal=False))
    return file.getvalue()


def plan(console: Console, *planned: Planned, as_json: bool, dry_run: bool = True) -> None:
    printer = views.PlanPrinter(console, dry_run=dry_run, as_json=as_json)
    for each in planned:
        printer.add(each)
    printer.end()


def show(console: Console, *, as_json: bool, reveal: bool = False) -> None:
    views.print_letter(console, LETTER, [CHANGE], REPLAY, reveal=reveal, as_json=as_json)


@pytest.mark.parametrize("as_json", [False, True])
def test_neither_secrets_nor_control_characters_are_printed(as_json: bool) -> None:
    group = Group(LETTER.consumer, LETTER.reason, LETTER.fingerprint, 1, NOW, NOW, LETTER)
    outputs = [
        printed(lambda console: views.print_letters(console, [LETTER], as_json=as_json)),
        printed(lambda console: views.print_groups(console, [group], as_json=as_json)),
        printed(lambda console: show(console, as_json=as_json)),
        printed(lambda console: plan(console, Planned(LETTER), as_json=as_json)),
    ]
    for output in outputs:
        assert output.strip()
        assert "hunter2" not in output
        assert all(each.isprintable() or each == "\n" for each in output)


def test_lists_are_not_cut_off_to_fit_a_terminal_and_say_when_there_is_nothing() -> None:
    file = io.StringIO()
    other = replace(LETTER, id=UUID(int=9), consumer="a" * 90, detail="ValueError: " + "x" * 200)
    views.print_letters(Console(file=file, width=40), [LETTER, other], as_json=False)
    head, *lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line[head.index("message") :].startswith("work") for line in lines)
    assert lines[1].endswith("x" * 200)
    assert printed(lambda console: views.print_groups(console, [], as_json=False)) == "there is no such dead letter\n"


def test_a_reason_cannot_pass_for_another_line() -> None:
    lines = printed(lambda console: show(console, as_json=False)).splitlines()
    assert [line for line in lines if line.startswith("status:")] == [
        "status: replayed, waits to be tried, due 2026-01-01 00:00:00"
    ]
    assert any(line.startswith("edited: 2026-01-01 00:00:00 by ada") for line in lines)


def test_who_asks_for_secrets_gets_them_and_the_bytes_as_they_came() -> None:
    assert "hunter2" in printed(lambda console: show(console, as_json=False, reveal=True))
    document = json.loads(printed(lambda console: show(console, as_json=True, reveal=True)))
    assert base64.b64decode(document["body_base64"]) == BODY
    assert document["headers"]["authorization"] == "Bearer hunter2"
    masked = json.loads(printed(lambda console: show(console, as_json=True)))
    assert json.loads(masked["body"])["data"] == {"api_key": "***", "order": "7"}
    assert (masked["headers"]["authorization"], masked["changes"][0]["act"]) == ("***", "edited")
    assert masked["waits"] == {"due_at": NOW.isoformat(), "begun_at": None, "tries": 0}
    assert "body_base64" not in masked


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_plan_is_one_json_document_however_many_letters_there_are(count: int) -> None:
    planned = [Planned(LETTER), Planned(LETTER, "no", behind=ID, held_by=ID)][:count]
    document = json.loads(printed(lambda console: plan(console, *planned, as_json=True)))
    assert len(document["letters"]) == count
    assert (document["replayed"], document["refused"]) == (min(count, 1), max(count - 1, 0))
    assert document["dry_run"] is True
    text = printed(lambda console: plan(console, *planned, as_json=False))
    assert text.count(str(ID)) >= count
    assert ("there is no such dead letter" in text) is (count == 0)
