"""What a life cycle class may say, and what is refused when the class is made."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from coordinator import App
from coordinator.catalog import DocumentApproval
from coordinator.lifecycles import Act, Due, Lifecycle, deadlines, transition
from coordinator.lifecycles.charts import state_diagram
from events.errors import DefinitionError

DAY = 86_400.0


def made(**parts: Any) -> type[Lifecycle]:
    """A life cycle with a key, an author and these parts; it begins in `draft`."""
    kind: Any = type(Lifecycle)
    fields = {"__module__": __name__, "__annotations__": {"number": str, "author": str}}
    given = {name: part(named(name)) for name, part in {"create": transition(to="draft", roles="a"), **parts}.items()}
    cls: type[Lifecycle] = kind("Paper", (Lifecycle,), {**fields, **given})
    return cls


def named(name: str) -> Callable[..., Any]:
    def nothing(self: Any, given: Any) -> None:
        """Say nothing."""

    nothing.__name__ = name
    return nothing


def test_states_are_named_by_the_transitions_in_the_order_in_which_they_are_reached() -> None:
    definition = DocumentApproval.definition
    assert definition.name == "document"
    assert definition.key_field == "document_id"
    assert definition.states == ("draft", "pending_approval", "approved", "rejected", "changes_requested")
    assert [each.name for each in definition.out_of("rejected")] == ["reopen"]
    assert definition.out_of("approved") == []


def test_a_name_is_the_class_name_in_snake_case_unless_one_is_given() -> None:
    class PurchaseOrder(Lifecycle):
        number: str

        @transition(to="open", roles="clerk")
        def enter(self, _: Act) -> None: ...

    assert PurchaseOrder.definition.name == "purchase_order"
    assert PurchaseOrder.definition.version == 1


def test_a_life_cycle_inherits_the_rules_of_its_base_and_adds_its_own() -> None:
    class Contract(DocumentApproval, name="contract", version=2):
        @transition("approved", to="archived", roles="clerk")
        def archive(self, _: Act) -> None: ...

    assert Contract.definition.states[-1] == "archived"
    assert (Contract.definition.name, Contract.definition.version) == ("contract", 2)
    assert "archive" not in DocumentApproval.definition.transitions


def test_data_is_frozen_and_survives_the_store() -> None:
    document = DocumentApproval(document_id="d-1", author="ann", title="Plan")
    assert DocumentApproval.from_data(document.to_data()) == document
    with pytest.raises(ValidationError, match="frozen"):
        document.title = "other"  # type: ignore[misc]  # that is what is tested


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"send": transition("darft", to="sent", roles="a")}, "send leads out of 'darft', which nothing leads to"),
        ({"create": transition("draft", to="draft", roles="a")}, "exactly one transition has no source state"),
        ({"other": transition(to="draft", roles="a")}, "exactly one transition has no source state"),
        ({"send": transition("draft", to="Sent!", roles="a")}, "the state 'Sent!' must be lower case words"),
        ({"send": transition("draft", to="sent", roles=())}, "nobody may send"),
        ({"send": transition("draft", to="sent", roles="a", approvals=0)}, "approvals count from 1, not 0"),
        ({"send": transition("draft", to="sent", roles="a", by="writer")}, "by='writer' is none of its fields"),
        ({"send": transition("draft", to="sent", roles="a", by="author", approvals=2)}, "only one may take it"),
        ({"send": transition("draft", to="sent", roles="a", four_eyes="writer")}, "four_eyes='writer' must be one of"),
        ({"send": transition("draft", to="sent", roles="a", edits="title")}, "edits='title' is none of its fields"),
        ({"send": transition("draft", to="sent", roles="a", edits="number")}, "'number' says who it is or who may act"),
        (
            {
                "send": transition("draft", to="draft", roles="a", edits="author"),
                "approve": transition("draft", to="good", roles="a", four_eyes="author"),
            },
            "send: 'author' says who it is or who may act, so it cannot be edited",
        ),
        (
            {
                "send": transition("draft", to="draft", roles="a", edits="author"),
                "late": deadlines("draft", escalate_after=1, escalate_to="author"),
            },
            "send: 'author' says who it is or who may act, so it cannot be edited",
        ),
        (
            {"send": transition("draft", to="sent", roles="a", approvals=2, edits="author")},
            "what several persons vote on cannot be edited",
        ),
        ({"create": transition(to="draft", roles="a", approvals=2)}, "create creates an entity: it has no votes"),
        ({"late": deadlines("sent", remind_after=1)}, "nothing leads to the state 'sent'; it has: draft"),
        ({"late": deadlines("draft", remind_after=1)}, "'draft' is final: nobody could do what a reminder asks for"),
        (
            {
                "send": transition("draft", to="sent", roles="a"),
                "late": deadlines("draft", remind_after=1),
                "later": deadlines("draft", remind_after=2),
            },
            "a state is declared twice",
        ),
    ],
)
def test_a_definition_that_cannot_work_is_refused_with_what_to_change(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(DefinitionError) as refused:
        made(**parts)
    assert str(refused.value).startswith("life cycle Paper: ")
    assert said in str(refused.value)


def test_a_life_cycle_needs_a_good_name_a_version_and_a_field() -> None:
    with pytest.raises(DefinitionError, match="the name 'No Name' must be lower case words"):

        class Named(Lifecycle, name="No Name"):
            number: str

            @transition(to="draft", roles="a")
            def create(self, _: Act) -> None: ...

    with pytest.raises(DefinitionError, match="versions count from 1, not 0"):

        class Versioned(Lifecycle, version=0):
            number: str

            @transition(to="draft", roles="a")
            def create(self, _: Act) -> None: ...

    with pytest.raises(DefinitionError, match="its business key"):

        class Empty(Lifecycle):
            @transition(to="draft", roles="a")
            def create(self, _: Act) -> None: ...


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({}, "give remind_after, escalate_after or both"),
        ({"remind_after": 0}, "positive"),
        ({"remind_after": 1e12}, "at most"),
        ({"every": 1}, "give that, too"),
        ({"escalate_after": 1}, "belong together"),
        ({"remind_after": 1, "escalate_to": "head"}, "belong together"),
    ],
)
def test_times_that_make_no_sense_are_refused(times: dict[str, Any], said: str) -> None:
    with pytest.raises(DefinitionError, match=said):
        deadlines("draft", **times)(named("late"))


def test_a_second_guard_is_refused() -> None:
    send = transition("draft", to="sent", roles="a")(named("send"))
    send.guard(named("first"))
    with pytest.raises(DefinitionError, match="send: first and second are both its guard"):
        send.guard(named("second"))


def test_an_application_refuses_two_life_cycles_of_one_name_and_version() -> None:
    with pytest.raises(DefinitionError, match=r"two life cycles have the same name and version: \[\('document', 1\)\]"):
        App("shop", lifecycles=[DocumentApproval, DocumentApproval])


def test_a_life_cycle_is_drawn_as_a_state_diagram() -> None:
    class Invoice(Lifecycle):
        number: str
        clerk: str

        @transition(to="open", roles="clerk", by="clerk")
        def enter(self, _: Act) -> None: ...

        @transition("open", to="paid", roles=("cfo", "manager"), four_eyes="clerk", approvals=2)
        def pay(self, _: Act) -> None: ...

        @transition("open", to="refused", roles="manager", comment=True)
        def refuse(self, _: Act) -> None: ...

        @deadlines("open", remind_after=90, every=7200, escalate_after=3 * DAY, escalate_to="cfo")
        def waits(self, _: Due) -> None: ...

    assert state_diagram(Invoice.definition).splitlines() == [
        "stateDiagram-v2",
        "    [*] --> open: enter (clerk, only clerk)",
        "    open --> paid: pay (cfo or manager, 2 persons, not clerk)",
        "    open --> refused: refuse (manager, with a comment)",
        "    paid --> [*]",
        "    refused --> [*]",
        "    note right of open",
        "        reminder after 90 s, then every 2 h",
        "        after 3 d also cfo",
        "    end note",
    ]
