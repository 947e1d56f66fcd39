"""What follows from an act and from time: states, roles, four eyes, delegations, votes, deadlines."""

from datetime import timedelta
from typing import Any, cast

import pytest

from coordinator.catalog import DocumentApproval
from coordinator.catalog.approvals import SAGA, approval
from coordinator.lifecycles import (
    Act,
    Actor,
    Due,
    Kind,
    Lifecycle,
    MovedOnError,
    NotAllowedError,
    TransitionRefusedError,
    deadlines,
    transition,
)
from coordinator.lifecycles.entity import MAX_COMMENT
from coordinator.lifecycles.moves import elapse
from events.catalog.documents import DocumentApproved, DocumentRejected, DocumentSubmitted
from events.errors import DefinitionError
from events.message import Event
from tests.support.flows import START
from tests.support.lifecycles import HOUR, Life, Paper, PaperOut, PaperWaits, actor, delegation

ANN, BOB, CID = actor("ann", "author"), actor("bob", "editor"), actor("cid", "editor")
APPROVER = actor("bob", "approver")


def paper(**fields: Any) -> Life:
    """A paper of Ann's, in draft."""
    return Life(Paper.model_validate({"number": "p-1", "author": "ann", "title": "Tides", **fields})).create(ANN)


def in_review(**fields: Any) -> Life:
    return paper(**fields).act("submit", ANN)


def document() -> Life:
    data = DocumentApproval(document_id="d-1", author="ann", title="Plan", digest="abc")
    return Life(data).create(ANN)


# States


def test_a_document_is_approved_by_somebody_else_and_the_world_is_told() -> None:
    life = document().act("submit", ANN).act("approve", APPROVER, "well done")
    assert life.states == ["draft", "pending_approval", "approved"]
    assert [each.event for each in life.moves] == [
        None,
        DocumentSubmitted(document_id="d-1", title="Plan", author="ann"),
        DocumentApproved(document_id="d-1", digest="abc", approved_by="bob"),
    ]
    entry = life.last.entry
    assert (entry.kind, entry.from_state, entry.to_state) == (Kind.MOVED, "pending_approval", "approved")
    assert (entry.by, entry.role, entry.comment, entry.at) == (APPROVER, "approver", "well done", START)
    assert [each.entity.revision for each in life.moves] == [1, 2, 3]


def test_a_rejected_document_is_approved_only_after_a_new_review() -> None:
    life = document().act("submit", ANN).act("reject", APPROVER, "too long")
    assert life.last.event == DocumentRejected(document_id="d-1", rejected_by="bob", reason="too long")
    with pytest.raises(TransitionRefusedError, match="approve is possible in pending_approval; document d-1 is reject"):
        life.act("approve", APPROVER)
    life.act("reopen", ANN).act("submit", ANN).act("approve", APPROVER)
    assert life.states[2:] == ["rejected", "draft", "pending_approval", "approved"]


def test_requested_changes_are_made_and_submitted_again() -> None:
    life = document().act("submit", ANN).act("request_changes", APPROVER, "shorter")
    life.act("revise", ANN, edits={"title": "Short plan", "digest": "def"})
    assert life.last.entry.change == {"title": "Short plan", "digest": "def"}
    life.act("submit", ANN).act("approve", APPROVER)
    assert cast("DocumentApproved", life.last.event).digest == "def"


def test_what_is_not_possible_is_refused_with_what_is() -> None:
    life = document()
    with pytest.raises(TransitionRefusedError, match="no transition 'aprove'; document d-1 is draft; possible is: rev"):
        life.act("aprove", APPROVER)
    life.act("submit", ANN).act("approve", APPROVER)
    with pytest.raises(TransitionRefusedError, match="possible is: nothing, this is its end"):
        life.act("reject", APPROVER, "no")


def test_an_act_on_a_revision_that_has_passed_is_refused() -> None:
    life = document().act("submit", ANN, revision=1)
    with pytest.raises(MovedOnError, match="it is at revision 2, not 1"):
        life.act("approve", APPROVER, revision=1)


def test_a_guard_says_why_not() -> None:
    with pytest.raises(TransitionRefusedError, match="submit is refused: it has no title"):
        paper(title="").act("submit", ANN)


def test_a_guard_without_words_is_named_and_one_that_says_nonsense_is_an_error() -> None:
    def checked(answer: Any) -> Life:
        class Slip(Lifecycle):
            number: str

            @transition(to="open", roles="author")
            def create(self, _: Act) -> None: ...

            @transition("open", to="closed", roles="author")
            def close(self, _: Act) -> None: ...

            @close.guard
            def is_paid(self) -> bool | str:
                return cast("bool", answer)

        return Life(Slip(number="1")).create(ANN)

    assert checked(answer=True).act("close", ANN).entity.state == "closed"
    with pytest.raises(TransitionRefusedError, match="close is refused: is_paid does not hold"):
        checked(answer=False).act("close", ANN)
    with pytest.raises(DefinitionError, match="the guard is_paid must return True, False or why not, not None"):
        checked(answer=None).act("close", ANN)


def test_an_event_that_cannot_be_made_stops_the_transition() -> None:
    life = in_review(faults=("accept",)).act("accept", BOB)
    with pytest.raises(RuntimeError, match="accept is broken"):
        life.act("accept", CID)


def test_an_event_hook_returns_an_event() -> None:
    class Slip(Lifecycle):
        number: str

        @transition(to="open", roles="author")
        def create(self, _: Act) -> Event:
            return cast("Event", "opened")

    with pytest.raises(DefinitionError, match="create must return an Event or None, not 'opened'"):
        Life(Slip(number="1")).create(ANN)


@pytest.mark.parametrize(
    ("comment", "said"),
    [
        ("", "needs a comment"),
        (" \n", "needs a comment"),
        ("x" * (MAX_COMMENT + 1), "at most"),
        ("a\0b", "has NUL or half a character"),
        ("\ud800", "has NUL or half a character"),
    ],
)
def test_a_comment_is_demanded_and_limited(comment: str, said: str) -> None:
    with pytest.raises(TransitionRefusedError, match=said):
        in_review().act("refuse", BOB, comment)


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"author": "bob"}, "write does not edit author; it edits faults, title"),
        ({"nonsense": 1}, "write does not edit nonsense"),
        ({"title": 7}, "the edits do not fit: title: Input should be a valid string"),
    ],
)
def test_edits_are_those_of_the_transition_and_fit_the_fields(edits: dict[str, Any], said: str) -> None:
    life = paper()
    with pytest.raises(TransitionRefusedError, match=said):
        life.act("write", ANN, edits=edits)
    assert life.entity.data["author"] == "ann"


@pytest.mark.parametrize("text", ["a\0b", "\udfff"])
def test_what_no_database_keeps_is_refused_before_it_gets_there(text: str) -> None:
    with pytest.raises(TransitionRefusedError, match="has NUL or half a character in it, which cannot be kept"):
        paper().act("write", ANN, edits={"faults": ["fine", text]})


def test_an_entity_with_what_no_database_keeps_is_refused() -> None:
    with pytest.raises(TransitionRefusedError, match="has NUL or half a character in it, which cannot be kept"):
        paper(title="a\0b")


def test_an_entity_without_a_key_is_refused() -> None:
    with pytest.raises(TransitionRefusedError, match="number is empty; it is the business key of a paper"):
        Life(Paper(number=" ", author="ann")).create(ANN)


# Who may


def test_a_role_is_needed() -> None:
    with pytest.raises(NotAllowedError, match="ann may not create: that takes the role author"):
        Life(Paper(number="p-1", author="ann")).create(actor("ann", "reader"))
    with pytest.raises(NotAllowedError, match="dan may not accept: that takes the role editor"):
        in_review().act("accept", actor("dan"))


def test_what_is_one_persons_takes_that_person_and_the_role() -> None:
    with pytest.raises(NotAllowedError, match="only author ann may withdraw, not eve"):
        in_review().act("withdraw", actor("eve", "author"))
    with pytest.raises(NotAllowedError, match="ann may not withdraw: that takes the role author"):
        in_review().act("withdraw", actor("ann", "editor"))
    assert in_review().act("withdraw", ANN).entity.state == "draft"
    with pytest.raises(NotAllowedError, match="only author None may withdraw"):
        in_review(author=None).act("withdraw", actor("None", "author"))


@pytest.mark.parametrize("name", ["", " ", " ann", "a\nb", "a\0", "x" * 201])
def test_nobody_is_called_nothing(name: str) -> None:
    for given in ({"user": name}, {"user": "bob", "acting_for": name}, {"user": "bob", "roles": {name}}):
        with pytest.raises(NotAllowedError, match="names no person and no role"):
            Actor(**given)


# Four eyes


@pytest.mark.parametrize("name", ["ann", "Ann", "ANN", "\uff21nn"])
def test_an_author_cannot_accept_his_own_however_it_is_spelt(name: str) -> None:
    with pytest.raises(NotAllowedError, match="it takes somebody else than author and who stands in for him"):
        in_review().act("accept", actor(name, "editor"))


@pytest.mark.parametrize("author", ["ann ", " Ann", "an\u200bn", "ann\n", "\u202eann"], ids=ascii)
def test_what_nobody_sees_in_a_field_makes_no_other_person(author: str) -> None:
    with pytest.raises(NotAllowedError, match="it takes somebody else than author"):
        in_review(author=author).act("accept", actor("ann", "editor"))


def test_who_has_submitted_cannot_accept() -> None:
    life = paper().act("submit", actor("eve", "author"))
    with pytest.raises(NotAllowedError, match="it takes somebody else than submit"):
        life.act("accept", actor("eve", "editor"))


def test_who_had_a_hand_in_it_long_ago_still_cannot_accept() -> None:
    life = paper().act("submit", actor("eve", "author")).act("withdraw", ANN).act("submit", ANN)
    with pytest.raises(NotAllowedError, match="it takes somebody else than submit"):
        life.act("accept", actor("eve", "editor"))


def test_where_nobody_is_named_nobody_can_be_somebody_else() -> None:
    for nobody in (None, " ", "\u200b"):
        with pytest.raises(NotAllowedError, match="author is empty"):
            in_review(author=nobody).act("accept", BOB)


def test_two_different_persons_are_needed_and_each_vote_is_kept() -> None:
    life = in_review().act("accept", BOB, "fine")
    assert (life.entity.state, life.entity.revision, life.last.event) == ("review", 3, None)
    assert (life.last.entry.kind, life.last.entry.to_state, life.last.entry.comment) == (Kind.VOTED, "review", "fine")
    for again in (BOB, actor("BOB", "editor")):
        with pytest.raises(NotAllowedError, match="it takes 2 different persons"):
            life.act("accept", again)
    life.act("accept", CID)
    assert life.entity.state == "out"
    assert life.last.entry.votes == [("bob", None), ("cid", None)]
    assert life.last.event == PaperOut(number="p-1", by="cid")
    assert life.entity.votes == {}


def test_votes_are_void_once_the_state_was_left() -> None:
    life = in_review().act("accept", BOB).act("withdraw", ANN).act("submit", ANN).act("accept", CID)
    assert life.entity.state == "review"
    assert life.act("accept", BOB).entity.state == "out"


def test_who_has_voted_may_change_his_mind() -> None:
    assert in_review().act("accept", BOB).act("refuse", BOB, "I was wrong").entity.state == "refused"


# Delegations


def test_a_delegate_acts_for_somebody_with_the_delegated_role_only() -> None:
    life = in_review()
    life.delegations = [delegation("bob", "dan", "editor")]
    life.act("accept", actor("dan", acting_for="bob"))
    entry = life.last.entry
    assert (str(entry.by), entry.role, entry.delegation) == ("dan for bob", "editor", life.delegations[0].id)
    with pytest.raises(NotAllowedError, match="dan may not accept: that takes the role editor"):
        life.act("accept", actor("dan"))


def test_own_roles_do_not_count_for_who_acts_for_somebody() -> None:
    with pytest.raises(NotAllowedError, match="dan may not accept for bob, who has not delegated the role editor to"):
        in_review().act("accept", actor("dan", "editor", acting_for="bob"))


@pytest.mark.parametrize(
    "given",
    [
        delegation("bob", "eve", "editor"),
        delegation("cid", "dan", "editor"),
        delegation("bob", "dan", "author"),
        delegation("bob", "dan", "editor", lifecycle="document"),
        delegation("bob", "dan", "editor", starts_at=START + timedelta(seconds=1)),
        delegation("bob", "dan", "editor", ends_at=START),
        delegation("bob", "dan", "editor", revoked_at=START, revoked_by="bob"),
    ],
    ids=["to another", "from another", "another role", "another life cycle", "not yet", "no longer", "revoked"],
)
def test_a_delegation_counts_for_its_persons_role_life_cycle_and_time(given: Any) -> None:
    life = in_review()
    life.delegations = [given]
    with pytest.raises(NotAllowedError, match="has not delegated"):
        life.act("accept", actor("dan", acting_for="bob"))


def test_a_delegate_takes_what_is_one_persons() -> None:
    life = in_review()
    life.delegations = [delegation("ann", "dan", "author", lifecycle="paper")]
    assert life.act("withdraw", actor("dan", acting_for="ann")).entity.state == "draft"


@pytest.mark.parametrize(
    "by",
    [
        actor("dan", acting_for="ann"),
        actor("dan", "editor"),
        actor("dan", acting_for="bob"),
        actor("ann", acting_for="bob"),
    ],
    ids=str,
)
def test_an_authors_delegate_accepts_nothing_of_the_authors_nor_does_the_author_as_a_delegate(by: Actor) -> None:
    life = in_review()
    life.delegations = [
        delegation("ann", "dan", "editor"),
        delegation("bob", "dan", "editor"),
        delegation("bob", "ann", "editor"),
    ]
    with pytest.raises(NotAllowedError, match="it takes somebody else than author and who stands in for him"):
        life.act("accept", by)


def test_who_delegated_to_somebody_that_stands_in_for_the_author_is_not_reached_through_him() -> None:
    """Bob stands in for Ann; Dan, who stands in for Bob, is as near to her as he is."""
    life = in_review()
    life.delegations = [delegation("ann", "bob", "author"), delegation("bob", "dan", "editor")]
    with pytest.raises(NotAllowedError, match="it takes somebody else than author"):
        life.act("accept", actor("dan", acting_for="bob"))


def test_who_has_acted_for_the_author_before_does_not_accept_after_his_delegation_has_ended() -> None:
    life = paper()
    life.delegations = [delegation("ann", "dan", "author")]
    life.act("write", actor("dan", acting_for="ann"), edits={"title": "Tides"})
    life.delegations = []
    life.act("submit", ANN)
    with pytest.raises(NotAllowedError, match="it takes somebody else than author"):
        life.act("accept", actor("dan", "editor"))


def test_one_person_does_not_vote_twice_through_a_delegate() -> None:
    life = in_review()
    life.delegations = [delegation("bob", "dan", "editor"), delegation("cid", "dan", "editor")]
    life.act("accept", actor("dan", acting_for="bob"))
    for again in (BOB, actor("dan", "editor"), actor("dan", acting_for="cid")):
        with pytest.raises(NotAllowedError, match="it takes 2 different persons"):
            life.act("accept", again)
    assert life.act("accept", CID).entity.state == "out"


# Deadlines


def test_reminders_come_by_deadline_and_are_in_the_audit_trail() -> None:
    life = in_review()
    assert life.passes(HOUR - 1) is None
    first = life.passes(1)
    assert first is not None
    assert first.event == PaperWaits(number="p-1", kind=Kind.REMINDED, reminders=1, escalated_to=None)
    assert (first.entry.kind, first.entry.by, first.entity.revision) == (Kind.REMINDED, None, 3)
    assert life.passes(2 * HOUR - 1) is None
    second = life.passes(1)
    assert second is not None
    assert second.entity.reminders == 2


def test_an_escalation_lets_another_role_decide_from_then_on() -> None:
    life, chief = in_review(), actor("zoe", "chief")
    with pytest.raises(NotAllowedError, match="that takes the role editor"):
        life.act("accept", chief)
    escalated = life.passes(4 * HOUR)
    assert escalated is not None
    assert (escalated.entry.kind, escalated.entry.role) == (Kind.ESCALATED, "chief")
    assert escalated.event == PaperWaits(number="p-1", kind=Kind.ESCALATED, reminders=0, escalated_to="chief")
    reminded = life.passes(0)
    assert reminded is not None
    assert reminded.event == PaperWaits(number="p-1", kind=Kind.REMINDED, reminders=1, escalated_to="chief")
    assert life.passes(0) is None
    with pytest.raises(NotAllowedError, match="only author ann may withdraw"):
        life.act("withdraw", chief)
    assert life.act("accept", chief).last.entry.role == "chief"
    assert life.act("accept", BOB).entity.state == "out"


def test_an_escalation_does_not_open_what_only_a_saga_may_take_back() -> None:
    """Withdrawn by a person, its saga would wait for a decision that nobody could take any more."""
    kind = approval("big_order", role="manager", escalate_after=HOUR, escalate_to="director").lifecycle
    saga, director = actor("saga 1", SAGA), actor("zoe", "director")
    life = Life(kind.model_validate({"key": "1", "subject": "order 1", "requester": "ann"})).create(saga)
    life.passes(HOUR)
    with pytest.raises(NotAllowedError, match="zoe may not withdraw: that takes the role saga"):
        life.act("withdraw", director)
    assert life.act("grant", director).entity.state == "granted"


class Leave(Lifecycle):
    """A request for leave that the superior of who asks may decide after a day, if nobody of the staff office has."""

    number: str
    person: str
    superior: str | None

    @transition(to="open", roles="staff")
    def ask(self, _: Act) -> None: ...

    @transition("open", to="granted", roles="office", four_eyes="person")
    def grant(self, _: Act) -> None: ...

    @deadlines("open", escalate_after=24 * HOUR, escalate_to="superior")
    def overdue(self, due: Due) -> PaperWaits:
        return PaperWaits(number=self.number, kind=due.kind, reminders=0, escalated_to=due.escalated_to)


def leave(superior: str | None = "zoe") -> Life:
    """A request of Ann's that has waited for a day."""
    life = Life(Leave(number="1", person="ann", superior=superior)).create(actor("ann", "staff"))
    with pytest.raises(NotAllowedError, match="that takes the role office"):
        life.act("grant", actor("zoe"))
    life.passes(24 * HOUR)
    return life


def test_an_escalation_lets_the_person_whom_a_field_names_decide_and_nobody_else() -> None:
    life = leave()
    assert life.last.event == PaperWaits(number="1", kind=Kind.ESCALATED, reminders=0, escalated_to="zoe")
    for other in (actor("eve"), actor("eve", "superior"), actor("eve", "zoe"), actor("dan", acting_for="zoe")):
        with pytest.raises(NotAllowedError):
            life.act("grant", other)
    life.act("grant", actor("zoe"))
    assert (life.entity.state, life.last.entry.role) == ("granted", "superior")


def test_whom_it_was_escalated_to_delegates_his_right_by_the_name_of_the_field() -> None:
    life = leave()
    life.delegations = [delegation("zoe", "dan", "superior"), delegation("eve", "eli", "superior")]
    with pytest.raises(NotAllowedError):
        life.act("grant", actor("eli", acting_for="eve"))
    assert life.act("grant", actor("dan", acting_for="zoe")).entity.state == "granted"


def test_four_eyes_hold_for_the_person_whom_it_was_escalated_to() -> None:
    with pytest.raises(NotAllowedError, match="it takes somebody else than person"):
        leave(superior="ann").act("grant", actor("ann"))


def test_an_escalation_to_nobody_is_in_the_audit_trail() -> None:
    life = leave(superior=None)
    assert life.entity.escalated_to is None
    assert life.last.entry.comment == "superior names nobody, so it is escalated to nobody"
    assert life.act("grant", actor("bob", "office")).entity.state == "granted"


def test_four_eyes_hold_for_whom_it_was_escalated_to() -> None:
    life = in_review()
    life.passes(4 * HOUR)
    with pytest.raises(NotAllowedError, match="it takes somebody else than author"):
        life.act("accept", actor("ann", "chief"))


def test_deadlines_and_escalation_end_with_the_state_and_begin_anew_with_it() -> None:
    life = in_review()
    life.passes(4 * HOUR)
    life.act("withdraw", ANN)
    assert (life.entity.due_at, life.entity.escalated_to, life.passes(100 * HOUR)) == (None, None, None)
    life.act("submit", ANN)
    assert life.entity.due_at == life.now + timedelta(hours=1)
    with pytest.raises(NotAllowedError, match="that takes the role editor"):
        life.act("accept", actor("zoe", "chief"))


def test_a_reminder_whose_event_cannot_be_made_happens_without_it() -> None:
    life = in_review(faults=("waits",))
    reminded = life.passes(HOUR)
    assert reminded is not None
    assert (reminded.event, reminded.entity.reminders) == (None, 1)
    assert reminded.entry.comment == "its event could not be made: RuntimeError('waits is broken')"


def test_a_deadline_that_the_code_no_longer_knows_ends() -> None:
    class Calm(Lifecycle, name="paper"):
        number: str

        @transition(to="review", roles="author")
        def create(self, _: Act) -> None: ...

        @transition("review", to="out", roles="editor")
        def accept(self, _: Act) -> None: ...

    ended = elapse(Calm.definition, in_review().entity, START + timedelta(hours=1))
    assert ended is not None
    assert ended.entity.due_at is None
    assert ended.entry.comment == "this state has no deadlines any more"


def test_a_single_reminder_is_not_repeated() -> None:
    class Once(Lifecycle):
        number: str

        @transition(to="open", roles="author")
        def create(self, _: Act) -> None: ...

        @transition("open", to="closed", roles="author")
        def close(self, _: Act) -> None: ...

        @deadlines("open", remind_after=HOUR)
        def waits(self, _: Due) -> None: ...

    life = Life(Once(number="1")).create(ANN)
    reminded = life.passes(HOUR)
    assert reminded is not None
    assert (reminded.entity.due_at, reminded.event, reminded.entry.comment) == (None, None, "")
