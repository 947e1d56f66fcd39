"""Whatever anybody tries: the rules are read off the audit trail afterwards, apart from the code that applies them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.catalog import DocumentApproval
from coordinator.lifecycles import Actor, Delegation, Lifecycle, NotAllowedError, TransitionRefusedError
from coordinator.lifecycles.entity import AuditEntry, Kind
from tests.support.flows import START
from tests.support.lifecycles import HOUR, Life, Paper, delegation

PEOPLE = ("ann", "bob", "cid", "dan")
ROLES: dict[type[Lifecycle], tuple[str, ...]] = {
    DocumentApproval: ("author", "approver", "head_of_department"),
    Paper: ("author", "editor", "chief"),
}


@dataclass(frozen=True)
class Attempt:
    """Somebody tries something after some hours."""

    hours: int
    transition: str
    user: str
    roles: frozenset[str]
    acting_for: str | None
    comment: str


def attempts(cls: type[Lifecycle]) -> st.SearchStrategy[list[Attempt]]:
    roles = st.frozensets(st.sampled_from(ROLES[cls]), min_size=1)
    people = st.sampled_from(PEOPLE)
    one = st.builds(
        Attempt,
        hours=st.sampled_from([0, 0, 1, 30, 80]),
        transition=st.sampled_from(sorted(cls.definition.transitions)),
        user=people,
        roles=roles,
        acting_for=st.none() | people,
        comment=st.sampled_from(["", "because"]),
    )
    return st.lists(one, min_size=10, max_size=40)


@st.composite
def delegations(draw: st.DrawFn, cls: type[Lifecycle]) -> list[Delegation]:
    pairs = st.tuples(st.sampled_from(PEOPLE), st.sampled_from(PEOPLE)).filter(lambda pair: pair[0] != pair[1])
    made = []
    for from_user, to_user in draw(st.lists(pairs, max_size=4)):
        starts_at = START + timedelta(hours=draw(st.sampled_from([0, 0, 24])))
        ends_at = starts_at + timedelta(hours=draw(st.sampled_from([2, 1000])))
        role = draw(st.sampled_from(ROLES[cls]))
        made.append(delegation(from_user, to_user, role, starts_at=starts_at, ends_at=ends_at))
    return made


def lived(data: Lifecycle, tried: Sequence[Attempt], given_away: list[Delegation]) -> Life:
    """What comes of it, with all that was refused left out."""
    life = Life(data, delegations=given_away).create(Actor("ann", {"author"}))
    for each in tried:
        while life.passes(each.hours * HOUR):
            each = Attempt(0, each.transition, each.user, each.roles, each.acting_for, each.comment)  # noqa: PLW2901  # the hours are over
        before = life.entity
        try:
            by = Actor(each.user, each.roles, each.acting_for)
            life.act(each.transition, by, each.comment)
        except (NotAllowedError, TransitionRefusedError):
            assert life.entity is before
    return life


def check_roles(life: Life, escalating_to: str) -> None:
    """Each act had a role of its transition, or the one it was escalated to in this very stay in the state."""
    transitions = life.data.definition.transitions
    escalated = False
    for entry in [each.entry for each in life.moves[1:]]:
        if entry.kind is Kind.ESCALATED:
            escalated = True
        if entry.by is None or entry.transition is None:
            continue
        rules = transitions[entry.transition]
        assert entry.role in rules.roles or (escalated and rules.by is None and entry.role == escalating_to)
        if entry.by.acting_for is None:
            assert entry.role in entry.by.roles
        else:
            assert any(
                (held.from_user, held.to_user, held.role) == (entry.by.acting_for, entry.by.user, entry.role)
                and held.starts_at <= entry.at < held.ends_at
                for held in life.delegations
            )
        if rules.by is not None:
            assert getattr(life.data, rules.by) == entry.by.persons[-1]
        assert entry.comment or not rules.comment
        if entry.kind is Kind.MOVED:
            escalated = False


def check_four_eyes(life: Life, deciding: str, preparing: tuple[str, ...]) -> None:
    """Who decides is not the author, has not prepared it, and stood in for neither, before or now."""
    entries: list[AuditEntry] = []
    for entry in (each.entry for each in life.moves):
        if entry.transition == deciding and entry.by is not None:
            excluded = {"ann"} | {
                person for each in entries if each.transition in preparing and each.by for person in each.by.persons
            }
            stood_in = {each.by.user for each in entries if each.by is not None and each.by.acting_for in excluded}
            stand_in = {
                held.to_user
                for held in life.delegations
                if held.from_user in excluded and held.starts_at <= entry.at < held.ends_at
            }
            assert not {*entry.by.persons} & (excluded | stood_in | stand_in)
        entries.append(entry)


def check_trail(life: Life) -> None:
    """There is an entry for each revision, and each begins where the one before has ended."""
    at = None
    for revision, moved in enumerate(life.moves, 1):
        assert moved.entity.revision == revision
        assert moved.entry.from_state == at
        assert moved.entry.to_state == moved.entity.state
        at = moved.entity.state


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_document_goes_from_rejected_to_approved_without_a_review_between(data: st.DataObject) -> None:
    document = DocumentApproval(document_id="d-1", author="ann", title="Plan", digest="abc")
    life = lived(document, data.draw(attempts(DocumentApproval)), data.draw(delegations(DocumentApproval)))
    states = [each.entity.state for each in life.moves]
    for place, reached in enumerate(states):
        if reached == "approved":
            since = max((earlier for earlier in range(place) if states[earlier] == "rejected"), default=0)
            assert "pending_approval" in states[since:place]
    check_trail(life)
    check_roles(life, "head_of_department")
    check_four_eyes(life, "approve", ("revise", "submit"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_two_persons_who_are_not_the_author_have_accepted_whatever_is_out(data: st.DataObject) -> None:
    paper = Paper(number="p-1", author="ann", title="Tides")
    life = lived(paper, data.draw(attempts(Paper)), data.draw(delegations(Paper)))
    check_trail(life)
    check_roles(life, "chief")
    check_four_eyes(life, "accept", ("submit",))
    votes: list[Any] = []
    for entry in (each.entry for each in life.moves):
        if entry.kind in (Kind.VOTED, Kind.MOVED) and entry.transition == "accept" and entry.by:
            votes.append(entry.by.persons)
        if entry.kind is Kind.MOVED:
            if entry.to_state == "out":
                first, second = votes
                assert not {*first} & {*second}
            votes.clear()


@pytest.mark.parametrize("cls", [DocumentApproval, Paper])
def test_every_state_is_reached_by_somebody(cls: type[Lifecycle]) -> None:
    """The properties above would hold of nothing at all, too."""
    paths: dict[type[Lifecycle], list[tuple[str, str, str]]] = {
        DocumentApproval: [("submit", "ann", "author"), ("approve", "bob", "approver")],
        Paper: [("submit", "ann", "author"), ("accept", "bob", "editor"), ("accept", "cid", "editor")],
    }
    fields = {"title": "x", "author": "ann", cls.definition.key_field: "1"}
    more = {"digest": "abc"} if cls is DocumentApproval else {}
    tried = [Attempt(0, name, user, frozenset({role}), None, "") for name, user, role in paths[cls]]
    assert lived(cls.model_validate({**fields, **more}), tried, []).entity.state in ("approved", "out")
