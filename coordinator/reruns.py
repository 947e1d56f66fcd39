"""Deciding again on what the history has recorded, with the code at hand: does it still say what it said then?

Inputs go through the same `Batch` as at work, but nothing is written. Deadlines are policy: one that has passed then
passes again, whatever the code says of its length now.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID
from zlib import crc32

from pydantic_core import from_json, to_json

from coordinator.arrivals import Arrivals
from coordinator.batch import Batch, Ports
from coordinator.chain import COLUMNS
from coordinator.decision import Acted, Resolution, Verb
from coordinator.definition import SagaDefinition
from coordinator.deviations import Deviation, Document, Weight, other_way, other_words, shown
from coordinator.facts import Facts
from coordinator.instance import Instance, Origin, Status, StepState, StepStatus, item_name, step_and_item
from coordinator.items import LOOK, fans_of, next_items
from coordinator.sagas import Sagas
from coordinator.waiting import correlation_id
from coordinator.waits import Wait
from events.codec import BATCH_TYPE, Limits, bundle_body
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from events.errors import CoordinatorError, RejectedError
from events.intake import Intake
from events.message import Event

_ANSWERS = frozenset({"reply", "late_reply", "late_success", "late_failure", "late_undo"})
_EVENTS = frozenset({"event", "late_event"})
_OF_PARENTS = frozenset({"started", "asked_again", "recalled"})
_MESSAGES = _ANSWERS | _EVENTS | _OF_PARENTS
_VERBS = frozenset(verb.value for verb in Verb)
_UNLIMITED = Limits(2**31, 2**31)


class UnclearError(Exception):
    """The history of an instance lacks what it takes to decide on it again."""


@dataclass(slots=True)
class _Delivery:
    """A recorded message, as a bus would deliver it."""

    body: bytes
    content_type: str | None = BATCH_TYPE
    content_encoding: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    redelivered: bool = False

    async def ack(self) -> None:
        """There is nobody to tell."""

    async def requeue(self) -> None:
        """There is no queue."""


@dataclass(frozen=True, slots=True)
class _OneId:
    """Names a new instance as it was named then."""

    id: UUID

    def new(self) -> UUID:
        """Return the id."""
        return self.id


def rerun(definitions: Iterable[SagaDefinition], document: Document) -> Deviation | None:
    """Return where an instance would go another way than it has gone, else where it would say something else.

    Args:
        definitions: all versions of all sagas that the code has.
        document: the instance with its history, as `coordinator sagas export` writes it.

    Raises:
        UnclearError: its history was not recorded in full.
    """
    return _Rerun(definitions, document).run()


@dataclass(slots=True)
class Verdict:
    """What deciding again has come to.

    Attributes:
        same: how many instances would go the way that they have gone, with the same words.
        broken: those that would not go it.
        differing: those that would, with other words.
        unclear: how many cannot be told, by reason.
    """

    same: int = 0
    broken: list[Deviation] = field(default_factory=list)
    differing: list[Deviation] = field(default_factory=list)
    unclear: dict[str, int] = field(default_factory=dict)

    def take(self, definitions: Iterable[SagaDefinition], document: Document) -> None:
        """Decide again on one instance."""
        try:
            found = rerun(definitions, document)
        except UnclearError as error:
            self.unclear[str(error)] = self.unclear.get(str(error), 0) + 1
            return
        if found is None:
            self.same += 1
        elif found.weight is Weight.BREAKS:
            self.broken.append(found)
        else:
            self.differing.append(found)


class _Rerun:
    def __init__(self, definitions: Iterable[SagaDefinition], document: Document) -> None:
        self._definitions = {(each.name, each.version): each for each in definitions}
        self._document = document
        self._id = UUID(document["id"])
        self._version: int = document["version"]
        self._instance: Instance | None = None
        self._differing: Deviation | None = None  # the first time that it would say something else
        self._items: dict[str, StepState] = {}  # of fan-outs: at work they are loaded when they are needed

    def run(self) -> Deviation | None:
        rows = self._document["history"]
        migrated = [number for number, row in enumerate(rows) if row["kind"] == "migrated"]
        if migrated:  # it tells everything, and what was before it concerns another version
            self._note_items(rows[: migrated[-1]])
            self._stand(rows[: migrated[-1]], rows[migrated[-1]])
            rows = rows[migrated[-1] + 1 :]
        definition = self._definitions.get((self._document["saga"], self._version))
        last = self._document["history"][-1]
        if definition is None:
            return self._broken(last, f"version {self._version} is not part of this application")
        sagas = Sagas([definition], application="rerun")
        for row in rows:
            try:
                what = self._again(sagas, row)
            except RejectedError as error:
                what = f"it could not be read: {error}"
            if what:
                return self._broken(row, what)
        try:
            definition.cls.from_state(self._document["state"])
        except ValueError as error:
            return self._broken(last, f"its state cannot be read: {error}")
        return self._send_again(sagas) or self._differing

    def _broken(self, row: Document, what: str) -> Deviation:
        return self._deviation(row, what, Weight.BREAKS)

    def _deviation(self, row: Document, what: str, weight: Weight) -> Deviation:
        about = self._document
        where = row["revision"], row["kind"]
        return Deviation(about["id"], about["saga"], self._version, about["key"], *where, what, weight)

    def _note_items(self, rows: Iterable[Document]) -> None:
        for row in rows:
            steps = row["change"].get("steps", {})
            self._items |= {name: StepState.from_json(at) for name, at in steps.items() if _is_item(name)}

    def _stand(self, before: Sequence[Document], row: Document) -> None:
        """Put the instance where a migration has put it, after the rows `before`."""
        change = row["change"]
        self._instance = Instance(
            id=self._id,
            saga=self._document["saga"],
            version=self._version,
            key=self._document["key"],
            status=Status(row["status"]),
            state=change["state"],
            steps={name: StepState.from_json(at) for name, at in change["steps"].items()},
            revision=row["revision"],
            reason=row["reason"],
            created_at=datetime.fromisoformat(self._document["created_at"]),
            deadline=_time(self._document.get("deadline")),
            turned_back=change["turned_back"],
            origin=self._origin_after(before),
            announced=Status(announced) if (announced := change.get("announced")) else None,
        )

    def _again(self, sagas: Sagas, row: Document) -> str | None:
        """Decide on the input of a row again; return in words how what follows differs from what did."""
        at = datetime.fromisoformat(row["at"])
        kind, envelope = row["kind"], self._message(row)
        batch = Batch(sagas, self._ports(at), self._facts(sagas, row, envelope))
        if envelope is not None:
            [item] = Intake(_UNLIMITED).read(_Delivery(bundle_body([envelope.encode()])))
            Arrivals(batch).take(item)
        elif self._instance is None:
            raise UnclearError(f"its history begins with {kind}")
        elif kind in _VERBS:
            refused = batch.act(self._id, _act(row, at))
            if isinstance(refused, CoordinatorError):
                return f"it would be refused: {refused}"
        else:
            self._go_on(batch, row)
        if batch.letters:
            letter = batch.letters[0]
            return f"it could not be taken: {letter.reason}: {letter.detail}"
        if not batch.history:
            return "nothing would follow from it"
        [after] = batch.new.values() if self._instance is None else [batch.current[self._id]]
        if after.key != self._document["key"]:
            return f"its business key would be {after.key!r}"
        self._instance = self._with_times(after, row)
        columns = dict(zip((*COLUMNS, "hash"), batch.history[0], strict=True))
        now = {**columns, "change": from_json(columns["change"]), "sent": from_json(columns["sent"])}
        if what := other_way(row, now):
            return what
        if self._differing is None and (what := other_words(row, now, (message for _, message in batch.messages))):
            self._differing = self._deviation(row, what, Weight.DIFFERS)
        return None

    def _send_again(self, sagas: Sagas) -> Deviation | None:
        """Return where a command was sent that is under way, and would say something else when it is sent again."""
        instance = self._instance
        if instance is None or instance.status.ended:
            return None
        definition, history = sagas.of(instance), self._document["history"]
        sent = {each["id"]: (row, each.get("crc32")) for row in reversed(history) for each in row["sent"]}
        for name, at in {**instance.steps, **self._items}.items():
            if not at.status.outstanding or at.fan is not None or definition.step_of(name) is None:
                continue
            back = at.status is StepStatus.UNDOING
            direction, attempt = (Direction.UNDO, at.undo_attempt) if back else (Direction.DO, at.attempt)
            identity = str(derive_id(self._id, name, direction.value, attempt))
            row, crc = sent.get(identity, (None, None))
            if row is None or crc is None:
                continue
            loaded = replace(instance, steps={**instance.steps, name: at})
            if what := self._other_words_of(sagas, loaded, name, identity, crc):
                return self._broken(row, f"{name} is under way, and {what}")
        return None

    def _other_words_of(self, sagas: Sagas, loaded: Instance, name: str, identity: str, crc: int) -> str | None:
        """Return in words how a command would differ if it were sent again now, None if it would be the same."""
        at = datetime.fromisoformat(self._document["history"][-1]["at"])
        batch = Batch(sagas, self._ports(at), Facts({self._id: loaded}))
        after = batch.act(self._id, Acted(Verb.RETRY, "check", "check", at, name))
        for _, message in batch.messages:
            if message.envelope.id == identity:
                data = message.envelope.data
                return None if crc32(data) == crc else f"would say {shown(data)} when it is sent again, and has not"
        return f"could not be sent again: {after.reason if isinstance(after, Instance) else after}"

    def _ports(self, at: datetime) -> Ports:
        return Ports("/rerun", lambda: at, lambda: at, _OneId(self._id))

    def _go_on(self, batch: Batch, row: Document) -> None:
        """Let what is neither a message nor an act happen again."""
        match row["kind"]:
            case "deadline":
                batch.elapse(batch.loaded[self._id], datetime.fromisoformat(row["at"]))
            case "granted":
                batch.grant(self._id)
            case "given_up":
                batch.stop(batch.loaded[self._id], row["reason"])
            case kind:
                raise UnclearError(f"nobody here knows how to decide on {kind} again")

    def _message(self, row: Document) -> Envelope | None:
        """Return the message that was decided on, as it came; None where it was none."""
        kind, given = row["kind"], row["input"]
        if kind not in _MESSAGES:
            return None
        if given is None:
            raise UnclearError(f"what was decided on in revision {row['revision']} was not recorded")
        envelope = Envelope(row["message_id"], given["source"], given["type"], given["version"], to_json(given["data"]))
        if kind in _ANSWERS:
            about = Direction(row["direction"]), row["attempt"], Result(row["result"])
            envelope.saga = SagaLink(self._id, row["step"], *about)
        elif kind in _OF_PARENTS and self._origin is not None:
            direction = Direction.UNDO if kind == "recalled" else Direction.DO
            envelope.saga = SagaLink(self._origin.saga_id, self._origin.step, direction, self._attempt_of(row))
            envelope.reply_to = self._origin.reply_to
        return envelope

    @property
    def _origin(self) -> Origin | None:
        """Who has asked for a child, as is known in the end: the attempts are those of that time."""
        origin = self._document.get("origin")
        return Origin.from_json(origin) if origin else None

    def _attempt_of(self, row: Document) -> int:
        """Return which attempt of its parent's step a child heard of."""
        if row["attempt"] is None and any(each["kind"] == "asked_again" for each in self._document["history"]):
            raise UnclearError(f"which attempt of its parent it was {row['kind']} by was not recorded")
        return int(row["attempt"] or self._document["origin"]["attempt"])

    def _origin_after(self, rows: Sequence[Document]) -> Origin | None:
        """Return who had asked for a child after so many rows, and what for."""
        if self._origin is None:
            return None
        asked = [self._attempt_of(row) for row in rows if row["kind"] in ("started", "asked_again")]
        recalled = [self._attempt_of(row) for row in rows if row["kind"] == "recalled"]
        return replace(self._origin, attempt=asked[-1], undo_attempt=recalled[-1] if recalled else 0)

    def _facts(self, sagas: Sagas, row: Document, envelope: Envelope | None) -> Facts:
        loaded = {} if self._instance is None else {self._id: self._with_items(self._instance, sagas, row)}
        if envelope is None or row["kind"] not in _EVENTS:
            return Facts(loaded)
        event = sagas.registry.read(envelope)
        if not isinstance(event, Event):
            raise UnclearError(f"{envelope.type} is no event")
        definition = self._definitions[self._document["saga"], self._version]
        wait = definition.by_name.get(row["step"])
        if not isinstance(wait, Wait):
            return Facts(loaded)
        values = wait.values_of(event, of_event=True)
        return Facts(loaded, {correlation_id(definition.name, event.message_type, values): [(self._id, wait.name)]})

    def _with_times(self, instance: Instance, row: Document) -> Instance:
        """Return the instance with the deadlines that it had then."""
        recorded = row["change"].get("steps", {})
        steps = {
            name: replace(at, due_at=_time(recorded[name].get("due_at"))) if name in recorded else at
            for name, at in instance.steps.items()
        }
        moved = any("deadline" in each["change"] for each in self._document["history"])
        deadline = instance.deadline if moved else _time(self._document.get("deadline"))
        self._items |= {name: at for name, at in steps.items() if _is_item(name)}
        kept = {name: at for name, at in steps.items() if not _is_item(name)}
        return replace(instance, steps=kept, due_at=None, deadline=deadline)

    def _with_items(self, instance: Instance, sagas: Sagas, row: Document) -> Instance:
        """Return the instance with the items that it had at hand then: which ones has a say in what follows."""
        on_time, named = row["kind"] == "deadline", row["step"] or ""
        names = [named] if _is_item(named) else []
        for node in fans_of(sagas.of(instance), instance):
            answers = len(names) if step_and_item(named)[0] == node.name else 0
            names += [item_name(node.name, each) for each in next_items(instance, node, answers, on_time=on_time)]
            if on_time:
                names += self._overdue(node.name, datetime.fromisoformat(row["at"]))
        loaded = {name: self._items[name] for name in names if name in self._items}
        return replace(instance, steps={**instance.steps, **loaded})

    def _overdue(self, step: str, now: datetime) -> list[str]:
        due = [
            (at.due_at, name)
            for name, at in self._items.items()
            if step_and_item(name)[0] == step and at.due_at is not None and at.due_at <= now
        ]
        return [name for _, name in sorted(due)[:LOOK]]


def _is_item(name: str) -> bool:
    return step_and_item(name)[1] is not None


def _act(row: Document, at: datetime) -> Acted:
    said = dict(row["input"] or {})
    until, resolution = _time(said.pop("until", None)), said.pop("resolution", None)
    resolved = Resolution(resolution) if resolution else None
    return Acted(Verb(row["kind"]), row["actor"], row["why"], at, row["step"], until, resolution=resolved, **said)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
