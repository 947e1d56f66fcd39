"""What `coordinator dead-letters` prints."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from coordinator.views import plain, print_json
from events.dead_letters import DEAD
from handlers.replay import Group, Letter, Planned


def print_letters(console: Console, found: Sequence[Letter], *, as_json: bool) -> None:
    """Print letters, one a line."""
    if as_json:
        print_json(console, {"letters": [_document(each) for each in found]})
        return
    table = Table(_id_column(), "handler", "message", "reason", "tries", "dead since", "error")
    for each in found:
        row = (
            each.consumer,
            each.message_type or "",
            each.reason,
            str(each.attempts),
            _time(each.dead_at),
            each.summary,
        )
        table.add_row(str(each.id), *(plain(cell) for cell in row))
    console.print(table)


def print_groups(console: Console, found: Sequence[Group], *, as_json: bool) -> None:
    """Print letters by cause."""
    if as_json:
        print_json(console, {"groups": [_group(each) for each in found]})
        return
    table = Table(
        Column("fingerprint", no_wrap=True),
        "handler",
        "reason",
        Column("letters", justify="right"),
        "from",
        "to",
        "error",
    )
    for each in found:
        first, last = _time(each.first_at), _time(each.last_at)
        row = (each.fingerprint, each.consumer, each.reason, str(each.count), first, last, each.example.summary)
        table.add_row(*(plain(cell) for cell in row))
    console.print(table)


def print_letter(console: Console, letter: Letter, *, as_json: bool) -> None:
    """Print all of a letter."""
    if as_json:
        print_json(console, _document(letter, whole=True))
        return
    facts = {
        "id": str(letter.id),
        "status": letter.status,
        "given up on by": letter.consumer,
        "reason": letter.reason,
        "error": letter.error_type or "",
        "tries": str(letter.attempts),
        "first, last": f"{_time(letter.first_at)}, {_time(letter.dead_at)}",
        "message": f"{letter.message_type or '?'} {letter.message_id or ''}",
        "saga": str(letter.saga_id or ""),
        "trace": (letter.traceparent or "")[3:35],
        "fingerprint": letter.fingerprint,
        "edited" if letter.status == DEAD else letter.status: _settled(letter),
    }
    for name, value in facts.items():
        if value:
            console.print(f"{name}:", _escaped(value), highlight=False)
    for name, value in letter.headers.items():
        console.print("header", _escaped(f"{name}: {value}"), highlight=False)
    console.rule("body")
    _print_lines(console, _pretty(letter.body))
    if letter.edited_body is not None:
        console.rule("edited body, which a replay takes")
        _print_lines(console, _pretty(letter.edited_body))
    console.rule("detail")
    _print_lines(console, letter.detail)


def print_plan(console: Console, done: Sequence[Planned], *, dry_run: bool, as_json: bool) -> None:
    """Print what a replay does, or would do, with each letter."""
    replayed = sum(planned.refused is None for planned in done)
    if as_json:
        letters = [
            {
                "id": str(planned.letter.id),
                "refused": planned.refused,
                "after": planned.after,
                "behind": str(planned.behind) if planned.behind else None,
                "held_by": str(planned.held_by) if planned.held_by else None,
            }
            for planned in done
        ]
        print_json(
            console, {"replayed": replayed, "refused": len(done) - replayed, "dry_run": dry_run, "letters": letters}
        )
        return
    table = Table(_id_column(), "handler", "message", "what happens")
    for planned in done:
        letter = planned.letter
        table.add_row(str(letter.id), plain(letter.consumer), plain(letter.message_type or ""), plain(_said(planned)))
    console.print(table)
    verb = "would be replayed" if dry_run else "replayed"
    console.print(f"{replayed} {verb}, {len(done) - replayed} not", highlight=False)
    if held := sum(planned.held_by is not None for planned in done):
        console.print(f"{held} of them wait until a letter before them is discarded", highlight=False)


def _id_column() -> Column:
    return Column("id", no_wrap=True, min_width=36)


def _said(planned: Planned) -> str:
    if planned.refused is not None:
        return f"not replayed: {planned.refused}"
    said = f"after {planned.after:.1f} s" if planned.after else "at once"
    if planned.behind is not None:
        said += f", but waits behind {planned.behind} of the same saga"
    if planned.held_by is not None:
        said += f", until {planned.held_by} is discarded, which cannot be replayed"
    return said


def _document(letter: Letter, *, whole: bool = False) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": str(letter.id),
        "status": letter.status,
        "consumer": letter.consumer,
        "reason": letter.reason,
        "error_type": letter.error_type,
        "error": letter.summary,
        "attempts": letter.attempts,
        "first_at": _iso(letter.first_at),
        "dead_at": _iso(letter.dead_at),
        "message_id": letter.message_id,
        "message_type": letter.message_type,
        "saga_id": str(letter.saga_id) if letter.saga_id else None,
        "traceparent": letter.traceparent,
        "fingerprint": letter.fingerprint,
        "settled_at": _iso(letter.settled_at),
        "settled_by": letter.settled_by,
        "settled_why": letter.settled_why,
    }
    if whole:
        document |= {"detail": letter.detail, "headers": dict(letter.headers), "content_type": letter.content_type}
        document["body"] = letter.body.decode(errors="backslashreplace")
        document["edited_body"] = letter.edited_body.decode() if letter.edited_body else None
    return document


def _group(group: Group) -> dict[str, Any]:
    return {
        "fingerprint": group.fingerprint,
        "consumer": group.consumer,
        "reason": group.reason,
        "count": group.count,
        "first_at": _iso(group.first_at),
        "last_at": _iso(group.last_at),
        "error_type": group.example.error_type,
        "error": group.example.summary,
    }


def _pretty(body: bytes) -> str:
    text = body.decode(errors="backslashreplace")
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _print_lines(console: Console, text: str) -> None:
    for line in text.splitlines():
        console.print(_escaped(line), soft_wrap=True)


def _escaped(text: str) -> Text:
    """Return text from outside with what is not printable written as escapes: nothing of it is lost, or obeyed."""
    return Text("".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text))


def _settled(letter: Letter) -> str:
    if letter.settled_by is None:
        return ""
    return f"{_time(letter.settled_at)} by {letter.settled_by}" + (
        f": {letter.settled_why}" if letter.settled_why else ""
    )


def _time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}" if moment else ""


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
