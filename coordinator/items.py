"""Where the items of fan-outs are kept: one row each, loaded only for decisions that concern them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Select, and_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.definition import SagaDefinition
from coordinator.flow import Each
from coordinator.instance import Instance, StepState, StepStatus, item_name, step_and_item
from coordinator.tables import saga_item
from events.bulk import Bulk, Lookup
from events.derive import derive_id

_COLUMNS = ("id", "saga_id", "step", "number", "status", "state", "due_at")
_insert = Bulk(saga_item, *_COLUMNS)
_update = Bulk(saga_item, "id", "status", "state", "due_at")
_named = Lookup(saga_item, "saga_id", "step", "number", "state", key="id")
LOOK = 200  # rows that are read at once where it is not known which of them matter


def id_of(saga_id: UUID, name: str) -> UUID:
    """Return the id of the row of an item, by the name of its state."""
    return derive_id(saga_id, "item", name)


class Items:
    """The items of the fan-outs of one database."""

    async def load(
        self,
        connection: AsyncConnection,
        loaded: Mapping[UUID, Instance],
        definitions: Mapping[UUID, SagaDefinition],
        named: Iterable[tuple[UUID, str]] = (),
        *,
        due: datetime | None = None,
    ) -> dict[UUID, Instance]:
        """Return the instances with the items that a decision may concern.

        Args:
            connection: where to read.
            loaded: the instances.
            definitions: theirs.
            named: items that are spoken of, by instance and name of their state.
            due: load items whose deadline has passed by then, too.
        """
        asked = {(saga_id, name) for saga_id, name in named if step_and_item(name)[1] is not None and saga_id in loaded}
        found: dict[UUID, dict[str, StepState]] = {}
        if asked:
            _collect(found, await _named.find(connection, [id_of(*each) for each in asked]))
        answers = Counter((saga_id, step_and_item(name)[0]) for saga_id, name in asked)
        for saga_id, instance in loaded.items():
            if (definition := definitions.get(saga_id)) is None:
                continue
            for node in fans_of(definition, instance):
                for query in _wanted(instance, node, answers[saga_id, node.name], due):
                    _collect(found, (await connection.execute(query)).all())
        return {
            saga_id: replace(instance, steps={**instance.steps, **found[saga_id]}) if saga_id in found else instance
            for saga_id, instance in loaded.items()
        }

    async def write(
        self, connection: AsyncConnection, instances: Sequence[Instance], loaded: Mapping[UUID, Instance]
    ) -> None:
        """Write the items that have changed. May stand in a block of `together`."""
        new, changed = [], []
        for instance in instances:
            before = loaded[instance.id].steps if instance.id in loaded else {}
            for name, at in instance.steps.items():
                step, number = step_and_item(name)
                if number is None or before.get(name) == at:
                    continue
                identity, document = id_of(instance.id, name), at.to_json()
                # One that needs attention may go on, with the deadlines that it has then.
                due_at = None if instance.status.ended else at.due_at
                if name in before:
                    changed.append((identity, at.status.value, document, due_at))
                else:
                    new.append((identity, instance.id, step, number, at.status.value, document, due_at))
        await _insert.insert(connection, new)
        await _update.update(connection, changed, key="id")


def fans_of(definition: SagaDefinition, instance: Instance) -> list[Each]:
    """Return the fan-outs of a saga that have begun."""
    named = (definition.by_name.get(name) for name, at in instance.steps.items() if at.fan is not None)
    return [node for node in named if isinstance(node, Each)]


def next_items(instance: Instance, node: Each, answers: int, *, on_time: bool, look: int = LOOK) -> range:
    """Return the numbers of the items that come next, after as many answers, or also when deadlines have passed."""
    at = instance.steps[node.name]
    fan = at.fan
    if fan is None or not instance.status.in_flight:
        return range(0)
    room = node.limit - fan.pending + answers + (look if on_time and fan.pending else 0)
    if at.status is StepStatus.RUNNING and room > 0:
        return range(fan.begun, min(fan.total, fan.begun + room))
    if at.status is StepStatus.UNDOING and room > 0:
        unseen = fan.begun if fan.unseen is None else fan.unseen
        return range(max(0, unseen - max(room, look)), unseen)
    return range(0)


def _wanted(instance: Instance, node: Each, answers: int, due: datetime | None) -> list[Select[Any]]:
    """Return queries for the items that come next, after as many answers, and for those whose deadline has passed."""
    fan = instance.steps[node.name].fan
    of_step = and_(saga_item.c.saga_id == instance.id, saga_item.c.step == node.name)
    query = select(saga_item.c.saga_id, saga_item.c.step, saga_item.c.number, saga_item.c.state).where(of_step)
    queries = []
    if due is not None and fan is not None and fan.pending and instance.status.in_flight:
        queries.append(query.where(saga_item.c.due_at <= due).order_by(saga_item.c.due_at).limit(LOOK))
    if numbers := next_items(instance, node, answers, on_time=due is not None):
        number = saga_item.c.number
        queries.append(query.where(number >= numbers.start, number < numbers.stop))
    return queries


def _collect(found: dict[UUID, dict[str, StepState]], rows: Iterable[Any]) -> None:
    for saga_id, step, number, state in rows:
        found.setdefault(saga_id, {})[item_name(step, number)] = StepState.from_json(state)
