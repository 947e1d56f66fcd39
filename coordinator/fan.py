"""One step for each of several items: begun in order, some at a time, and undone from the last one back. Pure.

Only items that a decision concerns are loaded. Where more are needed, the step asks for another look at once
(`due_at`), for which the next ones are loaded.
"""

from collections.abc import Iterable
from dataclasses import replace

from pydantic_core import from_json, to_json

from coordinator.draft import Draft
from coordinator.flow import MOST_ITEMS, Each
from coordinator.instance import Fan, StepState, StepStatus, item_name, step_and_item
from coordinator.requests import send, undo
from events.envelope import Direction


def fan_out(draft: Draft, node: Each) -> bool:
    """Begin as many items as may be under way; say whether all of them are done."""
    if node.name not in draft.steps:
        list_items(draft, node)
    fan = draft.count_items(node)
    if draft.steps[node.name].status is not StepStatus.RUNNING:
        return draft.steps[node.name].status.done
    if fan.failed and not node.collect:  # there is no way back, and it is in the way
        draft.set(node.name, due_at=None)
        return False
    for name in draft.next_items(node, fan.begun, node.limit - fan.pending):
        draft.set(name, status=StepStatus.RUNNING)
        draft.set(node.name, fan=replace(draft.count_items(node), begun=(step_and_item(name)[1] or 0) + 1))
        send(draft, node.step, name, Direction.DO, 1, 1)
        if not draft.goes_on(node.name):
            return False
    fan = draft.count_items(node)
    if fan.begun == fan.total and not fan.pending:
        draft.settle(node.name, StepStatus.SUCCEEDED)
    else:
        wants_more = fan.begun < fan.total and fan.pending < node.limit
        draft.set(node.name, due_at=draft.now if wants_more else None)
    return draft.steps[node.name].status.done


def undo_failed(draft: Draft) -> None:
    """Undo the items that have failed, and that the others go on without, where nobody knows whether they were done."""
    for name in draft.failed_items:
        draft.recount(name)
        step, is_to_undo = draft.definition.step_of(name), draft.steps[name].status.to_undo
        if step is not None and step.undo is not None and is_to_undo and not draft.goes_back(name):
            undo(draft, step, name)
    draft.failed_items.clear()


def fan_in(draft: Draft, node: Each) -> bool:
    """Undo as many items as may be under way; say whether there is nothing more to do, or to wait for."""
    at = draft.steps.get(node.name)
    if at is None or at.fan is None:
        return True
    fan = draft.count_items(node)
    if at.status in (StepStatus.RUNNING, StepStatus.SUCCEEDED):
        draft.turn(node.name)
    unseen = fan.begun if fan.unseen is None else fan.unseen
    if node.step.undo is None:
        unseen = 0
    # Those that were heard of after their turn.
    done = [name for name, item in draft.items_of(node) if item.status.to_undo]
    _undo(draft, node, (name for name in done if (step_and_item(name)[1] or 0) >= unseen))
    while unseen and draft.count_items(node).pending < node.limit:
        name = item_name(node.name, unseen - 1)
        if name not in draft.steps:
            break
        unseen -= 1
        status = draft.steps[name].status
        _undo(draft, node, [name] if status.to_undo or status is StepStatus.UNDO_FAILED else ())
    fan = replace(draft.count_items(node), unseen=unseen)
    wants_more = unseen > 0 and fan.pending < node.limit
    draft.set(node.name, fan=fan, due_at=draft.now if wants_more else None)
    if unseen or fan.pending:
        draft.set(node.name, status=StepStatus.UNDOING)
        return False
    draft.settle(node.name, StepStatus.UNDO_FAILED if fan.stuck else StepStatus.UNDONE)
    return True


def _undo(draft: Draft, node: Each, names: Iterable[str]) -> None:
    for name in names:
        if node.step.undo is not None:
            undo(draft, node.step, name)


def list_items(draft: Draft, node: Each) -> None:
    """Ask the saga for the items, and write them down."""
    items, error = draft.ask(node.items)
    if error is None and not isinstance(items, list):
        error = f"{node.items.name} must return a list, not {type(items).__name__}"
    elif error is None and len(items) > MOST_ITEMS:
        error = f"{node.items.name} returned {len(items)} items; {MOST_ITEMS} are the most"
    try:
        listed = from_json(to_json(items)) if error is None else []
    except ValueError as broken:
        error, listed = f"{node.items.name} returned what is not JSON: {broken}", []
    draft.steps[node.name] = StepState(StepStatus.RUNNING, fan=Fan(len(listed)))
    draft.steps.update(
        (item_name(node.name, number), StepState(StepStatus.LISTED, item=item)) for number, item in enumerate(listed)
    )
    if error is not None:
        draft.settle(node.name, StepStatus.DECLINED)
        draft.turn_back(f"{node.name} could not be asked for: {error}", node.name)
