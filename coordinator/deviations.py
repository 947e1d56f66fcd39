"""Where code would decide otherwise than was decided: what differs between two transitions, in words."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic_core import from_json, to_json

from coordinator.redaction import redacted
from events.envelope import Direction
from events.outbox import Outbound

Document = Mapping[str, Any]

# Deadlines are policy, and what a command was made of is seen in the command.
_NOT_COMPARED = frozenset({"due_at", "made_of", "before_turn", "alone"})


class Weight(StrEnum):
    """What a deviation means for an instance."""

    BREAKS = "breaks"  # it would go another way, or contradict itself
    DIFFERS = "differs"  # it would go the same way, and what is over would have been said otherwise


@dataclass(frozen=True, slots=True)
class Deviation:
    """Where an instance would go another way than it has gone, or say something else on it.

    Attributes:
        id: the instance,
        saga: its saga,
        version: the version that it had then,
        key: and its business key.
        revision: the transition that would be another one,
        kind: and what kind of transition it was.
        what: what would happen instead.
        weight: what that means.
    """

    id: str
    saga: str
    version: int
    key: str
    revision: int
    kind: str
    what: str
    weight: Weight


def other_way(then: Document, now: Document) -> str | None:
    """Return in words how a transition leads elsewhere than another one, None if it does not."""
    if now["status"] != then["status"]:
        because = f" ({now['reason']})" if now["reason"] else ""
        return f"the saga would be {now['status']}{because}, not {then['status']}"
    sent_then, sent_now = sorted(map(_named, then["sent"])), sorted(map(_named, now["sent"]))
    if sent_then != sent_now:
        return f"it would send {_list(sent_now)}, not {_list(sent_then)}"
    if now["kind"] != then["kind"]:
        return f"it would be taken as {now['kind']}, not as {then['kind']}"
    for part in ("state", "steps"):
        before, after = _compared(then["change"].get(part, {})), _compared(now["change"].get(part, {}))
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                return f"{part[:5]} {name} would be {_shown(after.get(name))}, not {_shown(before.get(name))}"
    return None


def other_words(then: Document, now: Document, messages: Iterable[Outbound]) -> str | None:
    """Return in words what would be said otherwise where nothing else differs, None if nothing would, or nobody knows.

    Args:
        then: the transition as it was,
        now: and as it would be.
        messages: what would be sent.
    """
    said = {each["id"]: each.get("crc32") for each in then["sent"]}
    data = {message.envelope.id: message.envelope.data for message in messages}
    for each in now["sent"]:
        if said.get(each["id"]) not in (None, each["crc32"]):
            return f"it would send {_named(each)} with {shown(data[each['id']])}, and has sent something else"
    return None


def shown(data: bytes) -> str:
    """Return the data of a message for a person: what is nobody's business is masked."""
    return to_json(redacted(from_json(data))).decode()


def _named(sent: Document) -> str:
    if "result" in sent:
        return f"{sent['type']} as {sent['result']}"
    if "step" not in sent:
        return str(sent["type"])
    return f"{sent['type']} {'to undo' if sent['direction'] == Direction.UNDO else 'for'} {sent['step']}"


def _list(sent: list[str]) -> str:
    return ", ".join(sent) or "nothing"


def _shown(value: Any) -> str:
    return "as it was" if value is None else to_json(value).decode()


def _compared(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: value for key, value in at.items() if key not in _NOT_COMPARED} if isinstance(at, dict) else at
        for name, at in parts.items()
    }
