"""Which items of its fan-outs an input to a saga concerns. Pure.

A batch may hold hundreds of items of one saga; a decision that looked at all of them for each answer would cost
hundreds of times more than its part.
"""

from collections.abc import Iterator
from dataclasses import replace

from coordinator.decision import Acted, Elapsed, Input, Replied
from coordinator.definition import SagaDefinition
from coordinator.flow import Each
from coordinator.instance import Instance, StepStatus, item_name, step_and_item


def without_others(definition: SagaDefinition, instance: Instance, given: Input) -> Instance:
    """Return the instance with those of its items only that are spoken of, are due, or come next."""
    fans = [each for each in definition.fans if each.name in instance.steps]
    if not fans:
        return instance
    own = {name: instance.steps[name] for name in definition.state_names if name in instance.steps}
    named = _named(instance, given)
    for each in fans:
        answers = sum(step_and_item(name)[0] == each.name for name in named)
        named += _next(instance, each, answers)
    return replace(instance, steps=own | {name: instance.steps[name] for name in named if name in instance.steps})


def _named(instance: Instance, given: Input) -> list[str]:
    match given:
        case Replied(step=name):
            return [name]
        case Acted(step=str(name)):
            return [name]
        case Elapsed(now=now):
            due = ((name, at.due_at) for name, at in instance.steps.items())
            return [name for name, due_at in due if due_at is not None and due_at <= now]
    return []


def _next(instance: Instance, each: Each, answers: int) -> Iterator[str]:
    """Return the loaded items whose turn comes when that many of those under way have ended."""
    at = instance.steps[each.name]
    fan = at.fan
    if fan is None:
        return
    room = each.limit - fan.pending + answers
    if at.status is StepStatus.RUNNING:
        numbers = range(fan.begun, min(fan.total, fan.begun + room))
    else:
        unseen = fan.begun if fan.unseen is None else fan.unseen
        numbers = range(unseen - 1, max(-1, unseen - 1 - room), -1)
    for number in numbers:
        name = item_name(each.name, number)
        if name not in instance.steps:
            return
        yield name
