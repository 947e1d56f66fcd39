"""`coordinator lifecycles`: entities with a life cycle are created, moved and looked at; people stand in for others."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

import typer
from pydantic import ValidationError
from pydantic_core import from_json
from rich.console import Console

from coordinator import process
from coordinator.durations import utc, utc_if_any
from coordinator.lifecycle_views import print_audit, print_delegations, print_entities, print_entity, print_verified
from coordinator.lifecycles import Actor, Lifecycle, Lifecycles, NoSuchEntityError
from coordinator.lifecycles.charts import state_diagram
from coordinator.lifecycles.opening import open_lifecycles
from coordinator.lifecycles.service import Definitions
from coordinator.lifecycles.store import LifecycleStore
from coordinator.loading import load_app
from coordinator.node import open_reading
from coordinator.settings import load_settings
from events.clock import SystemClock
from events.errors import ConfigurationError

lifecycles = typer.Typer(help="Documents and other things with a life cycle, and who decides.", no_args_is_help=True)

AnswerT = TypeVar("AnswerT")

out = Console()

AppReference = Annotated[str, typer.Argument(metavar="APP", help="the application as module:attribute")]
Name = Annotated[str, typer.Argument(metavar="LIFECYCLE", help="the name of a life cycle")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="the business key of an entity")]
By = Annotated[str | None, typer.Option(help="who does it; by default the user's login")]
Role = Annotated[list[str] | None, typer.Option(help="a role that he has; may be repeated")]
For = Annotated[str | None, typer.Option("--for", metavar="USER", help="whom he stands in for")]
Comment = Annotated[str, typer.Option(help="why, for the audit trail")]
Data = Annotated[str, typer.Option(metavar="JSON", help="fields, as a JSON object")]
Limit = Annotated[int, typer.Option(min=1, max=10_000, help="how many")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


@lifecycles.command("create")
def create_entity(
    app: AppReference,
    lifecycle: Name,
    data: Data,
    by: By = None,
    role: Role = None,
    acting_for: For = None,
    comment: Comment = "",
    as_json: AsJson = False,
) -> None:
    """Create an entity."""
    who, fields = _actor(by, role, acting_for), _fields(data)

    async def work(opened: Lifecycles) -> None:
        made = _read(opened.definitions.newest(lifecycle).cls, fields)
        entity = await opened.create(made, by=who, comment=comment)
        print_entity(out, entity, await opened.store.history(entity.id), as_json=as_json)

    _with_app(app, work)


@lifecycles.command("act")
def take_transition(
    app: AppReference,
    lifecycle: Name,
    key: Key,
    transition: Annotated[str, typer.Argument(metavar="TRANSITION", help="what is done: approve, reject and so on")],
    by: By = None,
    role: Role = None,
    acting_for: For = None,
    comment: Comment = "",
    data: Data = "{}",
    revision: Annotated[
        int | None, typer.Option(help="the revision that you looked at: refuse if the entity has changed since")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take a transition: approve, reject, and so on."""
    who, fields = _actor(by, role, acting_for), _fields(data)

    async def work(opened: Lifecycles) -> None:
        entity = await opened.act(lifecycle, key, transition, by=who, comment=comment, revision=revision, edits=fields)
        print_entity(out, entity, await opened.store.history(entity.id), as_json=as_json)

    _with_app(app, work)


@lifecycles.command("show")
def show_entity(lifecycle: Name, key: Key, as_json: AsJson = False) -> None:
    """Show where an entity stands, and its audit trail."""

    async def work(store: LifecycleStore) -> None:
        entity = await store.find(lifecycle, key)
        if entity is None:
            raise NoSuchEntityError(f"there is no {lifecycle} with the key {key!r}")
        print_entity(out, entity, await store.history(entity.id), as_json=as_json)

    _with_store(work)


@lifecycles.command("list")
def list_entities(
    lifecycle: Annotated[str | None, typer.Argument(metavar="LIFECYCLE", help="of this life cycle only")] = None,
    state: Annotated[str | None, typer.Option(help="in this state only")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List entities, newest first."""

    async def work(store: LifecycleStore) -> None:
        print_entities(out, await store.list(lifecycle=lifecycle, state=state, limit=limit), as_json=as_json)

    _with_store(work)


@lifecycles.command("waiting")
def list_waiting(
    app: AppReference,
    role: Role = None,
    user: Annotated[str | None, typer.Option(help="also what was escalated to this person")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List what waits for somebody with these roles, what has waited for longest first."""
    names = [*(role or ()), *([user] if user else ())]
    states = Definitions(load_app(app).lifecycles).waiting_for(role or ())

    async def work(store: LifecycleStore) -> None:
        print_entities(out, await store.waiting(states, names, limit), as_json=as_json)

    _with_store(work)


@lifecycles.command("audit")
def list_audit(
    lifecycle: Annotated[str | None, typer.Argument(metavar="LIFECYCLE", help="of this life cycle only")] = None,
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="of this entity only")] = None,
    user: Annotated[str | None, typer.Option(help="what this person did, or somebody for him")] = None,
    since: Annotated[datetime | None, typer.Option(metavar="TIME", help="from this time on (UTC)")] = None,
    until: Annotated[datetime | None, typer.Option(metavar="TIME", help="before this time (UTC)")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """Print the audit trail, newest first."""
    among: dict[str, Any] = {
        "lifecycle": lifecycle,
        "key": key,
        "user": user,
        "since": utc_if_any(since),
        "until": utc_if_any(until),
    }

    async def work(store: LifecycleStore) -> None:
        print_audit(out, await store.audit(**among, limit=limit), as_json=as_json)

    _with_store(work)


@lifecycles.command("verify")
def verify_audit(
    lifecycle: Annotated[str | None, typer.Argument(metavar="LIFECYCLE", help="of this life cycle only")] = None,
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="of this entity only")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that no entry of the audit trail was changed or removed, and that entities are what it says."""

    async def work(store: LifecycleStore) -> bool:
        good, found = 0, []
        async for of, named, problem in store.verify(lifecycle=lifecycle, key=key):
            if problem is None:
                good += 1
            else:
                found.append((of, named, problem))
        if key is not None and not good and not found:
            raise NoSuchEntityError(f"there is no {lifecycle} with the key {key!r}")
        lost = await store.lost() if lifecycle is None else []
        print_verified(out, good, found, lost, as_json=as_json)
        return not found and not lost

    if not _with_store(work):
        raise typer.Exit(1)


@lifecycles.command("delegate")
def delegate_role(
    app: AppReference,
    from_user: Annotated[str, typer.Argument(metavar="FROM", help="whose role it is")],
    to_user: Annotated[str, typer.Argument(metavar="TO", help="who stands in")],
    delegated: Annotated[str, typer.Argument(metavar="ROLE", help="the role that is delegated")],
    until: Annotated[datetime, typer.Option(metavar="TIME", help="until when (UTC)")],
    why: Annotated[str, typer.Option(help="why, for the record")],
    since: Annotated[datetime | None, typer.Option(metavar="TIME", help="from when (UTC); by default from now")] = None,
    lifecycle: Annotated[str | None, typer.Option(help="in this life cycle only")] = None,
    by: By = None,
    role: Role = None,
    as_json: AsJson = False,
) -> None:
    """Let somebody act for somebody else in one role, for a time."""
    who, ends_at = _actor(by, role), utc(until)

    async def work(opened: Lifecycles) -> None:
        made = await opened.delegate(
            from_user,
            to_user,
            delegated,
            by=who,
            starts_at=utc_if_any(since),
            ends_at=ends_at,
            why=why,
            lifecycle=lifecycle,
        )
        print_delegations(out, [made], as_json=as_json)

    _with_app(app, work)


@lifecycles.command("revoke")
def revoke_delegation(
    app: AppReference,
    delegation: Annotated[UUID, typer.Argument(metavar="ID", help="the delegation")],
    by: By = None,
    role: Role = None,
) -> None:
    """Take a delegation back, from now on."""
    who = _actor(by, role)

    async def work(opened: Lifecycles) -> None:
        await opened.revoke(delegation, by=who)

    _with_app(app, work)
    out.print(f"delegation {delegation} is taken back", highlight=False)


@lifecycles.command("delegations")
def list_delegations(
    user: Annotated[str | None, typer.Option(help="from or to this person only")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List delegations, newest first, those that are over included."""

    async def work(store: LifecycleStore) -> None:
        print_delegations(out, await store.delegations(user=user, limit=limit), as_json=as_json)

    _with_store(work)


@lifecycles.command("chart")
def chart_lifecycle(
    app: AppReference,
    lifecycle: Name,
    of: Annotated[str | None, typer.Option(metavar="KEY", help="colour the way that this entity has gone")] = None,
) -> None:
    """Print a life cycle as a Mermaid state diagram."""
    definitions = Definitions(load_app(app).lifecycles)
    if of is None:
        out.file.write(state_diagram(definitions.newest(lifecycle)))
        return

    async def work(store: LifecycleStore) -> None:
        entity = await store.find(lifecycle, of)
        if entity is None:
            raise NoSuchEntityError(f"there is no {lifecycle} with the key {of!r}")
        been = {row.to_state for row in await store.history(entity.id)}
        out.file.write(state_diagram(definitions.of(entity), entity, been))

    _with_store(work)


def _actor(by: str | None, roles: list[str] | None, acting_for: str | None = None) -> Actor:
    return Actor(by or process.login(), frozenset(roles or ()), acting_for)


def _fields(given: str) -> dict[str, Any]:
    try:
        found = from_json(given)
    except ValueError as error:
        raise ConfigurationError(f"--data is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError("--data takes a JSON object")
    return found


def _read(cls: type[Lifecycle], fields: dict[str, Any]) -> Lifecycle:
    try:
        return cls.from_data(fields)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigurationError(f"this is no {cls.definition.name}: {wrong}") from error


def _with_app(app: str, work: Callable[[Lifecycles], Awaitable[None]]) -> None:
    """Let `work` change entities; an SQLite file must not be in use by another process."""
    loaded, settings = load_app(app), load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def working() -> None:
        async with open_lifecycles(loaded, settings) as opened:
            await work(opened)

    process.run(working())


def _with_store(work: Callable[[LifecycleStore], Awaitable[AnswerT]]) -> AnswerT:
    """Let `work` look; an SQLite file may be in use by another process meanwhile."""
    settings = load_settings()

    async def looking() -> AnswerT:
        async with open_reading(settings) as engine:
            return await work(LifecycleStore(engine, SystemClock()))

    return process.run(looking())
