"""Life cycles of entities: named states, transitions by role, four eyes, delegation, reminders, an audit trail."""

from coordinator.lifecycles.definition import Lifecycle
from coordinator.lifecycles.entity import (
    Act,
    Actor,
    Delegation,
    Due,
    Entity,
    Kind,
    MovedOnError,
    NotAllowedError,
    TransitionRefusedError,
)
from coordinator.lifecycles.rules import deadlines, transition
from coordinator.lifecycles.service import AlreadyThereError, Lifecycles, NoSuchEntityError

__all__ = [
    "Act",
    "Actor",
    "AlreadyThereError",
    "Delegation",
    "Due",
    "Entity",
    "Kind",
    "Lifecycle",
    "Lifecycles",
    "MovedOnError",
    "NoSuchEntityError",
    "NotAllowedError",
    "TransitionRefusedError",
    "deadlines",
    "transition",
]
