"""Random flows in a random world, with operators who step in and parents that turn back.

What must hold while a saga runs is written down in tests/support/flow_world.py, what must hold in the end, here. The
number of runs comes from SAGA_EXAMPLES; with it set they are drawn at random, otherwise they are the same every time.
"""

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.flow import Each, Leaf, Node, Parallel, Sequence, When, nodes
from coordinator.instance import Status, StepState, StepStatus, step_and_item
from coordinator.steps import Step
from events.envelope import Direction, Result
from tests.support.drawn_flows import DrawnFlow, Tape
from tests.support.flow_world import OPS, World

EXAMPLES = os.environ.get("SAGA_EXAMPLES")
DO, UNDO = Direction.DO, Direction.UNDO


class Outcome:
    """What the flow demands of a world in which nothing is under way any more."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.states = world.states
        self.effects = set(world.effects)

    def check(self) -> None:
        world, instance = self.world, self.world.at
        assert len(world.effects) == len(self.effects)  # I2
        if instance.status is Status.COMPLETED:
            self.is_done(world.definition.flow)
        else:
            assert instance.status is Status.COMPENSATED
            self.is_undone(world.definition.flow)
        for name, direction in world.effects:
            if direction is UNDO:  # nothing is undone that was not done
                assert world.effects.index((name, DO)) < world.effects.index((name, UNDO))
        assert instance.status in world.ended
        if world.is_child:
            self.check_told()

    def check_told(self) -> None:
        """The parent has heard what it needs to know, and the last word is true."""
        world, status = self.world, self.world.at.status
        told = [(each.direction, each.result) for each in world.told]
        if not world.recalls:
            result = Result.SUCCEEDED if status is Status.COMPLETED else Result.DECLINED
            assert told[-1] == (DO, result)
        elif status is Status.COMPENSATED:
            assert (UNDO, world.recalls, Result.SUCCEEDED) in [(e.direction, e.attempt, e.result) for e in world.told]
        else:  # there was no way back
            assert (UNDO, world.recalls, Result.FAILED) in [(e.direction, e.attempt, e.result) for e in world.told]

    def is_done(self, node: Node) -> None:
        match node:
            case Parallel() if node.may_fail:
                self.enough_are_done(node)
            case Sequence(parts) | Parallel(parts):
                for part in parts:
                    self.is_done(part)
            case When():
                ways = (node.then, node.otherwise)
                taken, other = ways if self.world.drawn.truths[node.condition.name] else reversed(ways)
                if taken is not None:
                    self.is_done(taken)
                if other is not None:
                    assert not [part for part in nodes(other) if isinstance(part, Leaf) and part.name in self.states]
            case Each():
                self.items_are_done(node)
            case Step():
                self.step_is_done(node.name)
            case _:
                assert self.states[node.name].status.done

    def enough_are_done(self, node: Parallel) -> None:
        branches = self.world.definition.branches[node]
        succeeded = [each for each in branches if self.states[each.name].status is StepStatus.SUCCEEDED]
        assert len(succeeded) >= node.needed
        for branch in branches:
            if branch in succeeded:
                self.is_done(branch.part)
            else:
                assert self.states[branch.name].status is StepStatus.UNDONE
                self.is_undone(branch.part)

    def items_are_done(self, node: Each) -> None:
        fan = self.states[node.name].fan
        assert fan is not None
        assert fan.begun == fan.total
        failed = 0
        for number in range(fan.total):
            name = f"{node.name}[{number}]"
            if self.states[name].status is StepStatus.SUCCEEDED:
                self.step_is_done(name)
            else:
                failed += 1
                assert node.collect
                self.step_is_undone(name)
        assert not node.collect or fan.failed == failed

    def step_is_done(self, name: str) -> None:
        assert self.states[name].status is StepStatus.SUCCEEDED
        assert (name, DO) in self.effects or name in self.world.excused
        assert (name, UNDO) not in self.effects

    def is_undone(self, node: Node) -> None:
        names = {part.name for part in nodes(node) if isinstance(part, Leaf)}
        for name, at in self.states.items():
            if step_and_item(name)[0] in names:
                assert not at.status.pending
                assert at.status is not StepStatus.UNDO_FAILED
                self.step_is_undone(name)

    def step_is_undone(self, name: str) -> None:
        at: StepState = self.states[name]
        step = self.world.definition.step_of(name)
        if step is None or at.fan is not None:
            return
        if step.undo is None:
            assert (name, UNDO) not in self.effects or name in self.world.by_hand
        elif (name, DO) in self.effects:
            assert (name, UNDO) in self.effects, f"{name} is left"


@settings(
    max_examples=int(EXAMPLES or 3000),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    flow=st.binary(max_size=40) | st.binary(min_size=30, max_size=60),
    answers=st.binary(max_size=16),
    schedule=st.binary(max_size=16) | st.binary(min_size=20, max_size=60),
    fenced=st.booleans(),
    is_child=st.sampled_from([False, False, True]),
)
def test_whatever_happens_any_flow_ends_as_it_says(
    *, flow: bytes, answers: bytes, schedule: bytes, fenced: bool, is_child: bool
) -> None:
    world = World(DrawnFlow(Tape.of(flow)), Tape.of(answers), fenced=fenced, is_child=is_child)
    tape = Tape.of(schedule)
    for byte in tape.rest:
        number, op = divmod(byte, len(OPS))
        OPS[op](world, number, tape)
    world.settle()
    Outcome(world).check()
