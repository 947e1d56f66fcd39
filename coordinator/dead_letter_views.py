"""What `coordinator dead-letters` prints."""

import base64
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console

from coordinator.redaction import escaped, redacted, redacted_text
from coordinator.views import print_json
from handlers.letters import Change, Group, Letter, Replay
from handlers.replay_plan import Planned

_NOTHING = "there is no such dead letter"


def print_letters(console: Console, found: Sequence[Letter], *, as_json: bool) -> None:
    """Print letters, one a line."""
    if as_json:
        print_json(console, {"letters": [_document(each) for each in found]})
        return
    rows = [
        (
            str(each.id),
            each.consumer,
            each.message_type or "?",
            each.reason,
            str(each.attempts),
            _time(each.dead_at),
            redacted_text(each.summary),
        )
        for each in found
    ]
    _print_columns(console, ("id", "handler", "message", "reason", "tries", "dead since", "error"), rows)


def print_groups(console: Console, found: Sequence[Group], *, as_json: bool) -> None:
    """Print letters by cause."""
    if as_json:
        print_json(console, {"groups": [_group(each) for each in found]})
        return
    rows = [
        (
            each.fingerprint,
            each.consumer,
            each.reason,
            str(each.count),
            _time(each.first_at),
            _time(each.last_at),
            redacted_text(each.example.summary),
        )
        for each in found
    ]
    _print_columns(console, ("fingerprint", "handler", "reason", "letters", "from", "to", "error"), rows)


def _print_columns(console: Console, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows one a line, however wide the terminal is: what is cut off an error or an id is of no use."""
    if not rows:
        console.print(_NOTHING, highlight=False)
        return
    shown = [names, *([escaped(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in shown) for at in range(len(names) - 1)]
    for row in shown:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        _print_line(console, "  ".join((*cells, row[-1])))


def print_letter(
    console: Console,
    letter: Letter,
    changes: Sequence[Change],
    replay: Replay | None,
    *,
    reveal: bool,
    as_json: bool,
) -> None:
    """Print all of a letter, what was done with it, and the try that it waits for; secrets only if asked for."""
    if as_json:
        print_json(console, _whole_document(letter, changes, replay, reveal=reveal))
        return
    shown: Callable[[str], str] = str if reveal else redacted_text
    facts = {
        "id": str(letter.id),
        "status": letter.status + (f", {_awaited(replay)}" if replay else ""),
        "given up on by": letter.consumer,
        "reason": letter.reason,
        "error": letter.error_type or "",
        "tries": str(letter.attempts),
        "first, last": f"{_time(letter.first_at)}, {_time(letter.dead_at)}",
        "message": f"{letter.message_type or '?'} {letter.message_id or ''}",
        "saga": str(letter.saga_id or ""),
        "trace": (letter.traceparent or "")[3:35],
        "fingerprint": letter.fingerprint,
        "content type": letter.content_type or "",
    }
    for name, value in facts.items():
        if value:
            _print_line(console, f"{name}: {value}")
    for change in changes:
        _print_line(console, f"{change.act}: {_time(change.changed_at)} by {change.changed_by}: {change.reason}")
    for name, value in _headers(letter, reveal=reveal).items():
        _print_line(console, f"header {name}: {value}")
    console.rule("body")
    _print_lines(console, _pretty(letter.body, reveal=reveal))
    if letter.edited_body is not None:
        console.rule("edited body, which a replay takes")
        _print_lines(console, _pretty(letter.edited_body, reveal=reveal))
    console.rule("detail")
    _print_lines(console, shown(letter.detail))


class PlanPrinter:
    """Prints what a replay does, or would do, with each letter while it is at it: there may be very many.

    Args:
        console: where to.
        dry_run: whether nothing is done.
        as_json: print one JSON document.
    """

    def __init__(self, console: Console, *, dry_run: bool, as_json: bool) -> None:
        self._console = console
        self._dry_run = dry_run
        self._as_json = as_json
        self._replayed = 0
        self._held = 0
        self.refused = 0

    def add(self, planned: Planned) -> None:
        """Print a letter."""
        first = self._replayed + self.refused == 0
        self._replayed += planned.refused is None
        self.refused += planned.refused is not None
        self._held += planned.held_by is not None
        if self._as_json:
            self._console.file.write(('{"letters": [' if first else ", ") + json.dumps(_plan_document(planned)))
            return
        letter = planned.letter
        line = f"{letter.id}  {letter.consumer}  {letter.message_type or '?'}  {_said(planned)}"
        _print_line(self._console, line)

    def end(self) -> None:
        """Print the totals."""
        if self._as_json:
            begin = '{"letters": [' if self._replayed + self.refused == 0 else ""
            totals = {"replayed": self._replayed, "refused": self.refused, "dry_run": self._dry_run}
            self._console.file.write(f"{begin}], {json.dumps(totals)[1:]}\n")
            return
        if self._replayed + self.refused == 0:
            self._console.print(_NOTHING, highlight=False)
        verb = "would be replayed" if self._dry_run else "replayed"
        self._console.print(f"{self._replayed} {verb}, {self.refused} not", highlight=False)
        if self._held:
            self._console.print(
                f"{self._held} of them wait until a letter before them is replayed or discarded", highlight=False
            )


def _plan_document(planned: Planned) -> dict[str, Any]:
    return {
        "id": str(planned.letter.id),
        "refused": planned.refused,
        "after": planned.after,
        "behind": str(planned.behind) if planned.behind else None,
        "held_by": str(planned.held_by) if planned.held_by else None,
    }


def _said(planned: Planned) -> str:
    if planned.refused is not None:
        return f"not replayed: {planned.refused}"
    said = f"after {planned.after:.1f} s" if planned.after else "at once"
    if planned.behind is not None:
        said += f", but waits behind {planned.behind} of the same saga"
    if planned.held_by is not None:
        said += f", until {planned.held_by} is discarded, which cannot be replayed as it is"
    return said


def _awaited(replay: Replay) -> str:
    if replay.begun_at is not None:
        return "is being tried"
    return f"waits to be tried, due {_time(replay.due_at)}"


def _document(letter: Letter) -> dict[str, Any]:
    return {
        "id": str(letter.id),
        "status": letter.status,
        "consumer": letter.consumer,
        "reason": letter.reason,
        "error_type": letter.error_type,
        "error": redacted_text(letter.summary),
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


def _whole_document(
    letter: Letter, changes: Sequence[Change], replay: Replay | None, *, reveal: bool
) -> dict[str, Any]:
    edited = letter.edited_body
    document = _document(letter) | {
        "detail": letter.detail if reveal else redacted_text(letter.detail),
        "content_type": letter.content_type,
        "headers": _headers(letter, reveal=reveal),
        "body": _shown(letter.body, reveal=reveal),
        "edited_body": None if edited is None else _shown(edited, reveal=reveal),
        "changes": [
            {
                "act": change.act,
                "at": _iso(change.changed_at),
                "by": change.changed_by,
                "why": change.reason,
                "body": None if change.body is None else _shown(change.body, reveal=reveal),
            }
            for change in changes
        ],
        "waits": replay
        and {"due_at": _iso(replay.due_at), "begun_at": _iso(replay.begun_at), "tries": replay.attempts},
    }
    if reveal:
        document["body_base64"] = base64.b64encode(letter.body).decode()
    return document


def _headers(letter: Letter, *, reveal: bool) -> dict[str, Any]:
    headers = dict(letter.headers)
    return headers if reveal else redacted(headers)


def _group(group: Group) -> dict[str, Any]:
    return {
        "fingerprint": group.fingerprint,
        "consumer": group.consumer,
        "reason": group.reason,
        "count": group.count,
        "first_at": _iso(group.first_at),
        "last_at": _iso(group.last_at),
        "error_type": group.example.error_type,
        "error": redacted_text(group.example.summary),
    }


def _shown(body: bytes, *, reveal: bool) -> str:
    """Return a body as text: as it came, or with its secrets masked."""
    text = body.decode(errors="backslashreplace")
    if reveal:
        return text
    document = _parsed(text)
    return redacted_text(text) if document is None else json.dumps(redacted(document), ensure_ascii=False)


def _pretty(body: bytes, *, reveal: bool) -> str:
    text = _shown(body, reveal=reveal)
    document = _parsed(text)
    return text if document is None else json.dumps(document, indent=2, ensure_ascii=False)


def _parsed(text: str) -> Any:
    """Return what a JSON text says; None for all else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _print_lines(console: Console, text: str) -> None:
    for line in text.splitlines():
        _print_line(console, line)


def _print_line(console: Console, text: str) -> None:
    console.file.write(f"{escaped(text)}\n")  # rich would take longer than all else for a letter


def _time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}" if moment else ""


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
