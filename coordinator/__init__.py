"""Who keeps track: sagas, the pure core that decides, the engine that applies, the store, operations."""

from coordinator.app import App
from coordinator.definition import Saga, compensated, completed, sequence, starts_on, step
from coordinator.instance import Status
from coordinator.settings import Settings

__all__ = ["App", "Saga", "Settings", "Status", "compensated", "completed", "sequence", "starts_on", "step"]
