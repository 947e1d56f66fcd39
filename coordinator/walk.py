"""Walking through the flow of a saga: what is begun next, what is undone next, and the end."""

from datetime import timedelta

from coordinator.decision import Announcement, Standing
from coordinator.draft import MAX_REASON, Draft
from coordinator.fan import fan_in, fan_out, undo_failed
from coordinator.flow import Each, Leaf, Node, Parallel, Sequence, Stragglers, When, nodes
from coordinator.instance import Status, StepState, StepStatus
from coordinator.requests import send, undo
from coordinator.steps import Step
from coordinator.waits import Delay, Wait, seconds_of
from events.derive import derive_id
from events.envelope import Direction
from events.message import Event

BUT = "; compensated, but "  # between why a saga has turned back and why a person must look all the same
_TURNED = (StepStatus.UNDOING, StepStatus.UNDONE)


def walk(draft: Draft) -> None:
    """Send what comes next in the saga's direction, or end it: one walk for both ways."""
    undo_failed(draft)
    while draft.status.in_flight:
        direction = draft.status
        over = _advance(draft, draft.definition.flow, None) if direction is Status.RUNNING else _retreat(draft)
        if draft.status is not direction:
            continue
        if draft.is_pending:
            return
        if over:
            _end(draft)
        else:  # of several stuck steps one went on, and another has not
            draft.explain("something in it has failed for good")
            draft.status = Status.NEEDS_ATTENTION


def _advance(draft: Draft, node: Node, branch: str | None) -> bool:
    """Begin what can be begun of `node`; say whether the flow goes on after it."""
    if draft.status is not Status.RUNNING or (branch and draft.steps[branch].status in _TURNED):
        return False
    match node:
        case Sequence(parts):
            return all(_advance(draft, part, branch) for part in parts)
        case Parallel() if node.may_fail:
            return _advance_enough(draft, node)
        case Parallel(parts):
            done = [_advance(draft, part, branch) for part in parts]
            return all(done)
        case When():
            chosen = _choose(draft, node)
            return chosen is not None and all(_advance(draft, part, branch) for part in chosen)
    return _advance_leaf(draft, node)


def _advance_leaf(draft: Draft, node: Leaf) -> bool:
    if isinstance(node, Each):
        return fan_out(draft, node)
    if node.name not in draft.steps:
        _begin(draft, node)
    return draft.steps[node.name].status.done


def _advance_enough(draft: Draft, node: Parallel) -> bool:
    """Go on in all branches that have not failed; say whether enough of them are done."""
    branches = draft.definition.branches[node]
    for branch in branches:
        draft.steps.setdefault(branch.name, StepState(StepStatus.RUNNING))
    for branch in branches:  # in one that has succeeded others may still be under way, or undone
        if _advance(draft, branch.part, branch.name) and draft.steps[branch.name].status is StepStatus.RUNNING:
            draft.settle(branch.name, StepStatus.SUCCEEDED)
    states = [draft.steps[branch.name].status for branch in branches]
    enough = states.count(StepStatus.SUCCEEDED) >= node.needed
    if enough and node.stragglers is Stragglers.UNDO:
        for branch in branches:
            if draft.steps[branch.name].status is StepStatus.RUNNING:
                draft.turn_branch_back(branch)
    for branch in branches:
        if draft.steps[branch.name].status is StepStatus.UNDOING and _go_back(draft, branch.part):
            draft.settle(branch.name, StepStatus.UNDONE)
    waiting = any(draft.steps[branch.name].status.pending for branch in branches)
    return enough and not (waiting and node.stragglers is Stragglers.WAIT)


def _begin(draft: Draft, node: Step | Wait | Delay) -> None:
    draft.steps[node.name] = StepState(StepStatus.RUNNING)
    match node:
        case Step():
            send(draft, node, node.name, Direction.DO, 1, 1)
        case Wait():
            _begin_to_wait(draft, node)
        case Delay():
            _let_pass(draft, node)


def _begin_to_wait(draft: Draft, node: Wait) -> None:
    try:
        values = node.values_of(draft.saga, of_event=False)
    except ValueError as error:
        draft.settle(node.name, StepStatus.DECLINED)
        draft.turn_back(f"{node.name} cannot be waited for: {error}", node.name)
        return
    due_at = None if node.timeout is None else draft.now + timedelta(seconds=node.timeout)
    draft.set(node.name, status=StepStatus.WAITING, due_at=due_at)
    draft.waits.append(Standing(node.name, values))


def _let_pass(draft: Draft, node: Delay) -> None:
    answer, error = draft.ask(node)
    seconds = 0.0
    if error is None:
        try:
            seconds = seconds_of(answer)
        except ValueError as wrong:
            error = str(wrong)
    if error is not None:
        draft.settle(node.name, StepStatus.DECLINED)
        draft.turn_back(f"{node.name} cannot be waited for: {error}", node.name)
    elif seconds:
        draft.set(node.name, status=StepStatus.WAITING, due_at=draft.now + timedelta(seconds=seconds))
    else:
        draft.settle(node.name, StepStatus.SUCCEEDED)


def _retreat(draft: Draft) -> bool:
    return _go_back(draft, draft.definition.flow)


def _go_back(draft: Draft, node: Node) -> bool:
    """Undo what can be undone of `node`; say whether there is nothing more to do, or to wait for."""
    match node:
        case Sequence(parts, side_by_side=False):
            return _go_back_in_reverse(draft, parts)
        case Sequence(parts) | Parallel(parts):
            done = [_go_back(draft, part) for part in reversed(parts)]
            return all(done)
        case When(parts=parts):  # only what was begun has a state
            return all(_go_back(draft, part) for part in reversed(parts))
        case Each():
            return fan_in(draft, node)
    at = draft.steps.get(node.name)
    if isinstance(node, Step) and at is not None and at.status.to_undo and node.undo is not None:
        undo(draft, node, node.name)
    return not (at and draft.steps[node.name].status.pending)


def _go_back_in_reverse(draft: Draft, parts: tuple[Node, ...]) -> bool:
    """Undo the last part in which something is left; those before it, which may still be under way, have to wait."""
    for number, part in reversed(list(enumerate(parts))):
        its_turn = _is_busy(draft, part) or not _is_left(draft, part)
        if not its_turn and any(_is_busy(draft, before) for before in parts[:number]):
            return False  # it was heard of late, or a branch that was kept is still under way
        if not _go_back(draft, part):
            return False
    return True


def _is_busy(draft: Draft, part: Node) -> bool:
    """Say whether an answer or a next attempt is awaited in `part`."""
    begun = [node for node in nodes(part) if isinstance(node, Leaf) and node.name in draft.steps]
    fans = [draft.count_items(node) for node in begun if isinstance(node, Each)]
    pending = [draft.steps[node.name].status.pending for node in begun if not isinstance(node, Each)]
    return any(fan.pending for fan in fans) or any(pending)


def _is_left(draft: Draft, part: Node) -> bool:
    """Say whether anything in `part` is under way, or is to be undone."""
    for node in nodes(part):
        if not isinstance(node, Leaf) or node.name not in draft.steps:
            continue
        at = draft.steps[node.name]
        if at.status.pending or (at.fan is not None and (at.fan.unseen or at.status is StepStatus.SUCCEEDED)):
            return True
        if isinstance(node, Step) and node.undo is not None and at.status.to_undo:
            return True
    return False


def _choose(draft: Draft, node: When) -> tuple[Node, ...] | None:
    """Return the part to take, in a tuple, or an empty one; None if the condition cannot be asked."""
    name = node.condition.name
    if name not in draft.steps:
        holds, error = draft.ask(node.condition)
        if error is None and not isinstance(holds, bool):
            error = f"it must return True or False, not {type(holds).__name__}"
        if error is not None:
            draft.turn_back(f"{name} could not be told: {error}", name)
            return None
        draft.steps[name] = StepState(StepStatus.TAKEN if holds else StepStatus.NOT_TAKEN)
    taken = node.then if draft.steps[name].status is StepStatus.TAKEN else node.otherwise
    return () if taken is None else (taken,)


def _end(draft: Draft) -> None:
    """All steps are done, or all that can be undone is: say so."""
    arguments: tuple[str, ...] = ()
    if draft.has_stuck:
        draft.explain("something could not be undone")
        draft.status = Status.NEEDS_ATTENTION
        return
    if draft.status is Status.RUNNING:
        draft.status, ending = Status.COMPLETED, draft.definition.on_completed
    else:
        draft.status, ending = Status.COMPENSATED, draft.definition.on_compensated
        if draft.reason is not None:  # at a second try: what the first one came to is no reason
            draft.reason = draft.reason.partition(BUT)[0]
        arguments = (draft.reason or "",)
    if ending is None:
        draft.answer_as_it_is()
        return
    event, error = draft.ask(ending, *arguments)
    if error is None and event is not None and not isinstance(event, Event):
        error = f"it must return an Event or None, not {type(event).__name__}"
    if error is not None:
        what = f"{ending.name} failed: {error}"
        if draft.status is Status.COMPENSATED:
            draft.reason = f"{(draft.reason or '')[: MAX_REASON // 2]}{BUT}{what}"[:MAX_REASON]
        else:
            draft.reason = f"completed, but {what}"[:MAX_REASON]
        draft.status = Status.NEEDS_ATTENTION
    elif event is not None and draft.announced is not draft.status:
        draft.announced = draft.status
        draft.announcements.append(Announcement(derive_id(draft.before.id, "announce", draft.status.value), event))
    draft.answer_as_it_is()
