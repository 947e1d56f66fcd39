"""Life cycles that tests share, and a way to move an entity by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from coordinator.lifecycles import Act, Actor, Delegation, Due, Entity, Kind, Lifecycle, deadlines, transition
from coordinator.lifecycles.entity import Moved
from coordinator.lifecycles.moves import create, elapse, move
from events.message import Event
from tests.support.flows import START

HOUR = 3600.0
ENTITY = UUID("01a20000-0000-7000-8000-000000000001")


class PaperOut(Event):
    number: str
    by: str


class PaperWaits(Event):
    number: str
    kind: Kind
    reminders: int
    escalated_to: str | None


class Paper(Lifecycle, name="paper"):
    """A paper that two editors accept, neither of them its author."""

    number: str
    author: str | None
    title: str = ""
    faults: tuple[str, ...] = ()

    @transition(to="draft", roles="author")
    def create(self, _: Act) -> None: ...

    @transition("draft", to="draft", roles="author", edits=("title", "faults"))
    def write(self, _: Act) -> None: ...

    @transition("draft", to="review", roles="author")
    def submit(self, _: Act) -> None: ...

    @submit.guard
    def has_a_title(self) -> bool | str:
        return bool(self.title) or "it has no title"

    @transition("review", to="out", roles="editor", four_eyes=("author", "submit"), approvals=2)
    def accept(self, act: Act) -> PaperOut:
        if "accept" in self.faults:
            raise RuntimeError("accept is broken")
        return PaperOut(number=self.number, by=str(act.by))

    @transition("review", to="refused", roles="editor", comment=True)
    def refuse(self, _: Act) -> None: ...

    @transition("review", to="draft", roles="author", by="author")
    def withdraw(self, _: Act) -> None: ...

    @deadlines("review", remind_after=HOUR, every=2 * HOUR, escalate_after=4 * HOUR, escalate_to="chief")
    def waits(self, due: Due) -> PaperWaits:
        if "waits" in self.faults:
            raise RuntimeError("waits is broken")
        number = "x" * 300_000 if "too long" in self.faults else self.number
        return PaperWaits(number=number, kind=due.kind, reminders=due.reminders, escalated_to=due.escalated_to)


def actor(user: str, *roles: str, acting_for: str | None = None) -> Actor:
    return Actor(user, frozenset(roles), acting_for)


def delegation(from_user: str, to_user: str, role: str, **more: Any) -> Delegation:
    fields: dict[str, Any] = {
        "id": UUID("01a20000-0000-7000-8000-0000000000d1"),
        "lifecycle": None,
        "starts_at": START,
        "ends_at": START + timedelta(days=7),
        "made_by": from_user,
        "made_at": START,
        "why": "on holiday",
    }
    return Delegation(from_user=from_user, to_user=to_user, role=role, **{**fields, **more})


@dataclass
class Life:
    """One entity, moved by hand, and all that has come of it."""

    data: Lifecycle
    now: datetime = START
    delegations: list[Delegation] = field(default_factory=list)
    moves: list[Moved] = field(default_factory=list)

    @property
    def entity(self) -> Entity:
        return self.moves[-1].entity

    @property
    def last(self) -> Moved:
        return self.moves[-1]

    @property
    def states(self) -> Sequence[str]:
        return [each.entity.state for each in self.moves]

    def create(self, by: Actor, **about: Any) -> "Life":
        act = Act(self.data.definition.creation.name, by, self.now, delegations=self.delegations, **about)
        self.moves.append(create(self.data.definition, self.data, act, id=ENTITY))
        return self

    def act(self, transition_name: str, by: Actor, comment: str = "", **about: Any) -> "Life":
        act = Act(transition_name, by, self.now, comment, delegations=self.delegations, **about)
        self.moves.append(move(self.data.definition, self.entity, act))
        return self

    def passes(self, seconds: float) -> Moved | None:
        self.now += timedelta(seconds=seconds)
        moved = elapse(self.data.definition, self.entity, self.now)
        if moved is not None:
            self.moves.append(moved)
        return moved
