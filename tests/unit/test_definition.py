"""What a saga, an application and their settings may be, and what is said where they cannot work."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import new_class
from typing import Any, ClassVar, Self, cast

import pytest
from pydantic import SecretStr, ValidationError

from coordinator.app import App
from coordinator.definition import Saga
from coordinator.flow import sequence
from coordinator.loading import load_app
from coordinator.settings import Settings, load_settings
from coordinator.steps import Deadline, Start, Step, compensated, completed, starts_on, step
from events.codec import Limits
from events.errors import ConfigurationError, DefinitionError
from events.message import Command, Event, Reply
from handlers import handles
from tests.support.sagas import FlightBooked, FlightFull, Run, Trip, TripWanted


class Wanted(Event):
    key: str


class WantedTwice(Event):
    key: str


class Do(Command):
    key: str


class Undo(Command):
    key: str


class Done(Reply):
    key: str


def begins(cls: Any, event: Wanted) -> Any:
    return cls(key=event.key)


def does(self: Any) -> Do:
    return Do(key=self.key)


def ends(self: Any, *_: str) -> None:
    assert self


def taking(annotation: Any) -> Callable[..., None]:
    def take(self: Any, outcome: Any) -> None:
        assert self
        assert outcome

    take.__annotations__ = {"outcome": annotation} if annotation else {}
    return take


def one_step(name: str = "only") -> Step:
    made = step(does)
    made.name = name
    return made


def hooked(role: str, function: Callable[..., None]) -> dict[str, Any]:
    """Return parts of a saga whose only step has a method for an outcome."""
    only = one_step()
    getattr(only, role)(function)
    return {"only": only, "flow": sequence(only)}


def make(class_name: str = "Example", *, name: str | None = None, version: int = 1, **parts: Any) -> type[Saga]:
    """Make a saga class that works, but for `parts`; one that is None is left out."""
    only = one_step()
    standard = {"key": str, "begin": starts_on(Wanted)(begins), "only": only, "flow": sequence(only)}
    body = {part: value for part, value in {**standard, **parts}.items() if value is not None}
    body["__annotations__"] = {"key": body.pop("key")} if "key" in body else {}
    body["__module__"] = __name__
    bases = body.pop("bases", (Saga,))
    made = new_class(class_name, bases, {"name": name, "version": version}, lambda namespace: namespace.update(body))
    return cast("type[Saga]", made)


# Sagas that cannot work


STEP = one_step()
OUTCOME = "must take self and the outcome, annotated with an Event or a Reply"


@pytest.mark.parametrize(
    ("about", "demand"),
    [
        ({"name": "Trip"}, "the name 'Trip' must be lower case words, 100 at most"),
        ({"name": "a" * 101}, f"the name '{'a' * 101}' must be lower case words, 100 at most"),
        ({"class_name": "Ж"}, "the name '' must be lower case words, 100 at most"),
        ({"version": 0}, "versions count from 1, not 0"),
        ({"key": None}, "a saga needs at least one field: its business key"),
        ({"begin": None}, "declare how it begins with @starts_on(Event)"),
        ({"begin": classmethod(begins)}, "declare how it begins with @starts_on(Event)"),
        ({"flow": None}, "declare its flow: flow = sequence(first, second, ...)"),
        ({"flow": [STEP]}, "declare its flow: flow = sequence(first, second, ...)"),
        ({"only": STEP, "flow": sequence(STEP, STEP)}, "a step stands twice in its flow"),
        ({"only": STEP, "other": one_step("other"), "flow": sequence(STEP)}, "other is not in its flow"),
        ({"end": completed(ends), "fin": completed(ends)}, "it has two endings of the same kind"),
        ({"end": compensated(ends), "fin": compensated(ends)}, "it has two endings of the same kind"),
        ({"begin": starts_on(Wanted, key="no")(begins)}, "the key 'no' is none of its fields"),
        ({"other": starts_on(Wanted)(begins)}, "two starts have the same event"),
        ({"only": None, "flow": sequence(one_step("Only"))}, "the step name 'Only' must be lower case"),
        (hooked("succeeded", taking(Do)), f"take {OUTCOME}"),
        (hooked("succeeded", taking(None)), f"take {OUTCOME}"),
        (hooked("declined", taking(str)), f"take {OUTCOME}"),
        (hooked("declined", ends), f"ends {OUTCOME}"),
        (hooked("declined", lambda _self: None), f"<lambda> {OUTCOME}"),
    ],
)
def test_a_saga_that_cannot_work_is_refused_with_what_to_change(about: dict[str, Any], demand: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        make(**about)
    assert str(caught.value) == f"saga {about.get('class_name', 'Example')}: {demand}"


def test_two_steps_that_a_factory_has_made_are_both_taken_or_refused() -> None:
    first, second = step(does), step(does)
    try:
        made = make(only=first, other=second, flow=sequence(first, second))
    except DefinitionError:
        return
    run = Run(saga=made, event=Wanted(key="k")).succeeds()
    assert (run.status, len(run.sent)) == ("running", 1)


@pytest.mark.parametrize("role", ["succeeded", "declined", "compensation"])
def test_a_step_has_one_method_for_each_role(role: str) -> None:
    both = one_step("both")

    def first(self: Any, outcome: Done) -> None: ...
    def second(self: Any, outcome: Done) -> None: ...

    getattr(both, role)(first)
    with pytest.raises(DefinitionError, match=r"^step both: first and second have the same role$"):
        getattr(both, role)(second)


@pytest.mark.parametrize("part", [does, "only", None])
def test_a_sequence_is_made_of_steps(part: Any) -> None:
    with pytest.raises(DefinitionError, match=r"sequence takes steps and parts of a flow; .* is none"):
        sequence(STEP, part)


@pytest.mark.parametrize(
    "about",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"resends": -1},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"resends": 101},
    ],
    ids=str,
)
@pytest.mark.parametrize("declare", [step, Step.compensation], ids=["step", "compensation"])
def test_a_deadline_that_cannot_be_met_is_refused(declare: Any, about: dict[str, Any]) -> None:
    declared = declare(**about) if declare is step else declare(one_step(), **about)
    with pytest.raises(DefinitionError, match="a timeout must be positive and resends not negative"):
        declared(does)


# Sagas that work


@pytest.mark.parametrize(
    ("class_name", "name"),
    [("Trip", "trip"), ("PlaceOrder", "place_order"), ("HTTPOrder", "http_order"), ("OrderV2", "order_v2")],
)
def test_a_saga_is_named_after_its_class(class_name: str, name: str) -> None:
    assert make(class_name).definition.name == name


def test_a_name_and_a_version_can_be_given() -> None:
    definition = make(name="of_old", version=7).definition
    assert (definition.name, definition.version) == ("of_old", 7)


def test_what_is_not_said_has_defaults() -> None:
    made = make()
    definition = made.definition
    assert definition.version == 1
    assert definition.cls is made
    assert (definition.on_completed, definition.on_compensated) == (None, None)
    [only] = definition.steps
    assert (only.deadline, only.undo_deadline) == (Deadline(300, 0), Deadline(300, 5))
    assert (only.undo, only.on_succeeded, only.on_declined) == (None, None, None)
    assert definition.by_name == {"only": only}


def test_parts_are_found_by_their_roles() -> None:
    definition = Trip.definition
    assert [each.name for each in definition.steps] == ["hotel", "flight", "payment"]
    hotel, flight, payment = definition.steps
    assert (hotel.deadline, hotel.undo_deadline) == (Deadline(10, 0), Deadline(5, 1))
    assert (flight.deadline, flight.undo_deadline) == (Deadline(20, 2), Deadline(20, 5))
    assert payment.undo is not None
    assert payment.undo.name == "refund"
    assert flight.on_succeeded is not None
    assert flight.on_declined is not None
    assert (flight.on_succeeded.outcome, flight.on_declined.outcome) == (FlightBooked, FlightFull)
    assert definition.on_completed is not None
    assert definition.on_compensated is not None
    assert (definition.on_completed.name, definition.on_compensated.name) == ("ready", "off")


def test_each_wait_is_twice_the_one_before() -> None:
    assert [Deadline(1.5, 3).wait(sends) for sends in (1, 2, 3, 4)] == [1.5, 3, 6, 12]


@pytest.mark.parametrize("function", [begins, classmethod(begins)], ids=["plain", "classmethod"])
def test_a_start_is_a_class_method_with_or_without_saying_so(function: Any) -> None:
    made: Any = make(begin=starts_on(Wanted)(function))
    definition = made.definition
    [start] = definition.starts
    assert isinstance(start, Start)
    assert definition.start_for("wanted") is start
    saga = made.begin(Wanted(key="k-1"))
    assert type(saga) is made
    assert saga.begin(Wanted(key="k-2")).key == "k-2"
    assert definition.key_of(start, saga) == "k-1"


def test_a_saga_may_begin_in_several_ways_each_with_its_key() -> None:
    class Two(Saga):
        key: str
        number: int = 0

        @starts_on(Wanted)
        @classmethod
        def first(cls, event: Wanted) -> Self:
            return cls(key=event.key)

        @starts_on(WantedTwice, key="number")
        @classmethod
        def second(cls, event: WantedTwice) -> Self:
            return cls(key=event.key, number=7)

        @step
        def only(self) -> Do:
            return Do(key=self.key)

        flow = sequence(only)

    assert [Run(saga=Two, event=kind(key="k")).instance.key for kind in (Wanted, WantedTwice)] == ["k", "7"]


def test_an_empty_business_key_is_refused() -> None:
    """All such starts would be duplicates of each other."""
    with pytest.raises(ValueError, match=r"Example\.begins left its business key 'key' empty"):
        Run(saga=make(), event=Wanted(key=""))


def test_on_an_instance_the_parts_are_ordinary_methods() -> None:
    trip = Trip(trip="t-1")
    assert trip.hotel().trip == "t-1"
    trip.booked(FlightBooked(ticket="LH-1"))
    assert trip.cancel_flight().ticket == "LH-1"
    assert trip.off("rain").reason == "rain"
    assert isinstance(Trip.hotel, Step)


def test_a_version_of_a_saga_inherits_what_it_does_not_change() -> None:
    class NewTrip(Trip, name="trip", version=2):
        guests: int = 1

        @completed
        def ready(self) -> None:
            """Nobody is told any more."""

    assert (NewTrip.definition.name, NewTrip.definition.version) == ("trip", 2)
    assert NewTrip.definition.steps == Trip.definition.steps
    assert (Trip.definition.version, Trip.definition.cls) == (1, Trip)
    run = Run(saga=NewTrip, event=TripWanted(trip="t-1"))
    for outcome in (None, FlightBooked(ticket="LH-1"), None):
        run.succeeds(outcome)
    assert (run.status, run.published) == ("completed", [])
    assert run.instance.state["guests"] == 1


def test_a_step_that_is_replaced_must_be_put_into_a_flow_of_its_own() -> None:
    with pytest.raises(DefinitionError, match=r"^saga Cheap: hotel is not in its flow$"):

        class Cheap(Trip):
            @step
            def hotel(self) -> Do:
                return Do(key=self.trip)


def test_parts_may_come_from_a_class_that_is_no_saga() -> None:
    class Beginning:
        begin: ClassVar = starts_on(Wanted)(begins)

    mixed = make(bases=(Beginning, Saga), begin=None)
    assert Run(saga=mixed, event=Wanted(key="k")).instance.key == "k"


def test_state_that_no_field_has_is_refused() -> None:
    assert Trip.from_state(Trip(trip="t-1").to_state()) == Trip(trip="t-1")
    with pytest.raises(ValidationError, match="extra"):
        Trip.from_state({"trip": "t-1", "unknown": 1})


# Applications


def handler_of(message: type[Event | Command], name: str) -> Any:
    async def handle(given: Any) -> None:
        assert given

    handle.__annotations__["given"] = message
    return handles(message, name=name)(handle)


def test_an_application_knows_the_messages_of_its_parts() -> None:
    class Further(Event):
        pass

    app = App("shop", sagas=[Trip], handlers=[handler_of(Do, "do")], messages=[Further])
    assert set(app.registry) == {Further, Do, TripWanted, FlightBooked, FlightFull}
    assert app.source == "/shop"
    assert set(App("empty").registry) == set()


def test_versions_of_a_saga_and_handlers_of_an_event_live_side_by_side() -> None:
    app = App("shop", sagas=[make(), make(version=2)], handlers=[handler_of(Wanted, "one"), handler_of(Wanted, "two")])
    assert set(app.registry) == {Wanted}


class OtherWanted(Event, type="wanted"):
    pass


@pytest.mark.parametrize(
    ("about", "text"),
    [
        (
            {"handlers": [handler_of(Wanted, "greet"), handler_of(WantedTwice, "greet")]},
            "app shop: two handlers are called greet; use `name=`",
        ),
        (
            {"handlers": [handler_of(Do, "one"), handler_of(Do, "two")]},
            "app shop: Do has two handlers; a command has one",
        ),
        (
            {"sagas": [make("Alpha", name="same"), make("Beta", name="same")]},
            "app shop: two sagas have the same name and version: [('same', 1)]",
        ),
        (
            {"sagas": [make()], "messages": [OtherWanted]},
            (
                f"{__name__}.Wanted and {__name__}.OtherWanted both have the type 'wanted';"
                " give one of them another with `type=`"
            ),
        ),
    ],
    ids=["handler names", "command", "sagas", "types"],
)
def test_an_application_that_cannot_work_is_refused(about: dict[str, Any], text: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        App("shop", **about)
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["", "my shop", "shop/eu", "-shop", "s" * 101])
def test_a_name_that_cannot_stand_in_the_name_of_a_queue_is_refused(name: str) -> None:
    with pytest.raises(DefinitionError, match="a name is letters, digits"):
        App(name)


# Settings


PASSWORD = "hunter2"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.upper().startswith("COORDINATOR_")]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.usefixtures("environment")
def test_without_an_environment_everything_stays_in_one_file() -> None:
    settings = load_settings()
    assert settings.broker_url.get_secret_value() == "embedded:"
    assert settings.database_url.get_secret_value() == "sqlite:///coordinator.db"
    assert settings.embedded
    assert settings.limits == Limits(256 * 1024, 16 * 1024) == Limits()
    assert settings.model_dump(exclude={"broker_url", "database_url", "max_body", "max_headers"}) == {
        "secrets": None,
        "namespace": "saga",
        "migrate": True,
        "wait": 60.0,
        "grace": 20.0,
        "max_stall": 60.0,
        "health": "",
        "pool_size": 16,
        "log_level": "INFO",
        "log_format": "text",
    }


GIVEN: dict[str, tuple[str, Any]] = {
    "broker_url": ("amqps://u:p@h/v", SecretStr("amqps://u:p@h/v")),
    "database_url": ("postgresql+asyncpg://u:p@h/n", SecretStr("postgresql+asyncpg://u:p@h/n")),
    "secrets": ("/", Path("/")),
    "namespace": ("shop-1", "shop-1"),
    "migrate": ("false", False),
    "max_body": ("1024", 1024),
    "max_headers": ("256", 256),
    "wait": ("0", 0.0),
    "grace": ("0.5", 0.5),
    "max_stall": ("0", 0.0),
    "health": ("127.0.0.1:8081", "127.0.0.1:8081"),
    "pool_size": ("5", 5),
    "log_level": ("DEBUG", "DEBUG"),
    "log_format": ("json", "json"),
}


def test_each_setting_has_a_variable(environment: pytest.MonkeyPatch) -> None:
    assert set(GIVEN) == set(Settings.model_fields)
    for name, (text, _) in GIVEN.items():
        environment.setenv(f"COORDINATOR_{name.upper()}", text)
    environment.setenv("COORDINATOR_OF_ANOTHER_VERSION", "is left alone")
    settings = load_settings()
    assert {name: getattr(settings, name) for name in GIVEN} == {name: value for name, (_, value) in GIVEN.items()}
    assert not settings.embedded
    assert settings.limits == Limits(1024, 256)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("BROKER_URL", f"http://u:{PASSWORD}@h", "write amqp://..., amqps://... or embedded:"),
        ("BROKER_URL", PASSWORD, "write amqp://..., amqps://... or embedded:"),
        ("DATABASE_URL", f"mysql://u:{PASSWORD}@h/n", "write postgresql://... or sqlite:///file"),
        ("DATABASE_URL", PASSWORD, "write postgresql://... or sqlite:///file"),
        ("NAMESPACE", f"Saga {PASSWORD}", "String should match pattern"),
        ("MIGRATE", PASSWORD, "Input should be a valid boolean"),
        ("MAX_BODY", "1023", "greater than or equal to 1024"),
        ("MAX_HEADERS", PASSWORD, "Input should be a valid integer"),
        ("GRACE", "-1", "greater than or equal to 0"),
        ("GRACE", "nan", "than or equal to"),
        ("POOL_SIZE", "4", "greater than or equal to 5"),
        ("POOL_SIZE", "101", "less than or equal to 100"),
        ("LOG_LEVEL", "LOUD", "String should match pattern"),
        ("LOG_FORMAT", "xml", "String should match pattern"),
    ],
)
def test_a_wrong_setting_is_named_by_its_variable_and_never_shown(
    environment: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    environment.setenv(f"COORDINATOR_{name}", value)
    with pytest.raises(ConfigurationError, match=rf"^COORDINATOR_{name}: .*{re.escape(says)}") as caught:
        load_settings()
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_what_must_not_stand_in_the_environment_is_read_from_files_and_read_again(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "coordinator_broker_url"
    file.write_text(f"amqp://u:{PASSWORD}@h\n")
    environment.setenv("COORDINATOR_SECRETS", str(tmp_path))
    settings = load_settings()
    assert settings.read_broker_url() == settings.broker_url.get_secret_value() == f"amqp://u:{PASSWORD}@h"
    file.write_text("amqp://u:other@h")
    assert settings.read_broker_url() == "amqp://u:other@h"
    file.write_text(f"kafka://u:{PASSWORD}@h")
    with pytest.raises(ConfigurationError, match=r"^COORDINATOR_BROKER_URL: ") as caught:
        settings.read_broker_url()
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_without_a_directory_for_secrets_the_broker_url_stays_as_it_is(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("COORDINATOR_BROKER_URL", "amqp://h")
    settings = load_settings()
    environment.setenv("COORDINATOR_BROKER_URL", "amqp://elsewhere")
    assert settings.read_broker_url() == "amqp://h"


def test_a_directory_for_secrets_that_is_not_there_is_refused(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("COORDINATOR_SECRETS", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"^COORDINATOR_SECRETS: "):
        load_settings()


def test_all_wrong_settings_are_named_at_once(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("COORDINATOR_BROKER_URL", "kafka://h")
    environment.setenv("COORDINATOR_POOL_SIZE", "many")
    with pytest.raises(ConfigurationError, match=r"^COORDINATOR_BROKER_URL: .*; COORDINATOR_POOL_SIZE: "):
        load_settings()


def test_settings_do_not_show_their_secrets(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("COORDINATOR_BROKER_URL", f"amqp://u:{PASSWORD}@h")
    environment.setenv("COORDINATOR_DATABASE_URL", f"postgresql://u:{PASSWORD}@h/n")
    settings = load_settings()
    assert PASSWORD in settings.broker_url.get_secret_value()
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert PASSWORD not in text


def test_settings_that_are_made_by_hand_do_not_show_their_secrets_in_errors(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("COORDINATOR_DATABASE_URL", f"mysql://u:{PASSWORD}@h/n")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert PASSWORD not in str(caught.value)


# Loading


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with modules; what a test imports from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "given_shop.py").write_text("from coordinator.app import App\napp = App('shop')\nother = 7\n")
    (tmp_path / "given_broken.py").write_text("import no_such_library\n")
    (tmp_path / "given_raising.py").write_text("raise ValueError('broken at import')\n")
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("given_"):
            del sys.modules[name]


@pytest.mark.usefixtures("folder")
def test_an_application_is_found_in_the_current_folder_and_among_what_is_installed() -> None:
    assert load_app("given_shop:app").name == "shop"
    assert load_app("given_shop:app") is load_app("given_shop:app")
    assert load_app("coordinator.catalog:app").name == "shop"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("reference", "text"),
    [
        *[
            (wrong, f"{wrong!r} names no application; write module:attribute, for example shop:app")
            for wrong in ("", "given_shop", ":app", "given_shop:", ":")
        ],
        ("given_nothing:app", "there is no module 'given_nothing' here or installed"),
        ("given_nothing.at.all:app", "there is no module 'given_nothing.at.all' here or installed"),
        ("given_shop.py:app", "there is no module 'given_shop.py' here or installed"),
        ("given_shop:nothing", "given_shop:nothing is no App; given_shop must say: nothing = App(...)"),
        ("given_shop:other", "given_shop:other is no App; given_shop must say: other = App(...)"),
        ("given_shop:App", "given_shop:App is no App; given_shop must say: App = App(...)"),
        *[
            (f"{wrong}:app", f"there is no module {wrong!r}; write its name as an import would: shop:app")
            for wrong in ("./given_shop", ".given_shop")
        ],
    ],
)
def test_an_application_that_is_not_there_is_told_in_plain_words(reference: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_app(reference)
    assert str(caught.value) == text


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("module", "error", "text"),
    [
        ("given_broken", ModuleNotFoundError, "no_such_library"),
        ("given_raising", ValueError, "broken at import"),
    ],
)
def test_what_is_wrong_inside_a_module_is_not_taken_for_a_missing_module(
    module: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        load_app(f"{module}:app")
