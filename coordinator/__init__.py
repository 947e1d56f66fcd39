"""Who keeps track: sagas, the pure core that decides, the engine that applies, the store, operations."""

from coordinator.app import App
from coordinator.decision import Resolution, Verb
from coordinator.definition import Saga
from coordinator.flow import each, parallel, sequence, when
from coordinator.instance import Status
from coordinator.operator import open_operator
from coordinator.search import Query
from coordinator.settings import Settings
from coordinator.steps import Backoff, compensated, completed, migrates, starts_on, step
from coordinator.waits import awaits, delay

__all__ = [
    "App",
    "Backoff",
    "Query",
    "Resolution",
    "Saga",
    "Settings",
    "Status",
    "Verb",
    "awaits",
    "compensated",
    "completed",
    "delay",
    "each",
    "migrates",
    "open_operator",
    "parallel",
    "sequence",
    "starts_on",
    "step",
    "when",
]
