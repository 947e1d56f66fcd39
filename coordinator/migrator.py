"""Taking all instances of a saga over into another version: in a rehearsal, or for good."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from coordinator.definition import SagaDefinition
from coordinator.engine import Engine
from coordinator.instance import UNFINISHED, Instance
from coordinator.sagas import Sagas, UnknownSagaError
from coordinator.search import Query
from coordinator.store import Store
from coordinator.transfer import NotTransferableError, transfer
from events.database import is_transient
from events.errors import ConfigurationError
from events.service import is_cancelled

_BATCH = 200

Reasons = dict[UUID, str]


@dataclass(slots=True)
class Report:
    """What became of the instances, or would.

    Attributes:
        moved: how many have the new version.
        stay: those that stay as they are, by reason.
    """

    moved: int = 0
    stay: dict[str, list[UUID]] = field(default_factory=dict)


class Migrator:
    """Takes instances over, beside the processes that run them: whoever is faster, the other decides again.

    Args:
        sagas: all versions that the application has the code of.
        store: where the instances are.
    """

    def __init__(self, sagas: Sagas, store: Store) -> None:
        self._sagas = sagas
        self._store = store

    async def rehearse(self, saga: str, to: int, *, limit: int | None = None) -> Report:
        """Say what `migrate` would do with every instance that has not ended; nothing is written.

        Raises:
            ConfigurationError: the application has no such version.
        """
        definition = self._definition(saga, to)

        async def try_all(instances: Sequence[Instance]) -> Reasons:
            return {each.id: reason for each in instances if (reason := self._refusal(each, definition))}

        return await self._each(definition, try_all, limit)

    async def migrate(
        self, engine: Engine, saga: str, to: int, *, by: str, why: str, limit: int | None = None
    ) -> Report:
        """Take every instance that has not ended over into the version `to`, some at a time.

        Each either has the new version with a row in its history, or is as it was: a crash leaves nothing half done,
        and the same call goes on with the rest.

        Args:
            engine: writes what follows.
            saga: the name of the saga.
            to: the version.
            by: who does this.
            why: the reason, for the history.
            limit: how many instances to look at, the oldest first.

        Raises:
            ConfigurationError: the application has no such version.
        """
        definition = self._definition(saga, to)

        async def move_all(instances: Sequence[Instance]) -> Reasons:
            ids = [each.id for each in instances]
            try:
                return await engine.transfer(ids, definition, by=by, why=why)
            except Exception as error:
                if is_cancelled() or is_transient(error):
                    raise
                if len(instances) == 1:
                    return {ids[0]: f"what follows cannot be stored: {error!r}"}
            stay: Reasons = {}
            for each in instances:  # one of them spoils the others
                stay |= await move_all([each])
            return stay

        return await self._each(definition, move_all, limit)

    def _definition(self, saga: str, version: int) -> SagaDefinition:
        definition = self._sagas.by_version.get((saga, version))
        if definition is None:
            known = ", ".join(f"{name} {number}" for name, number in sorted(self._sagas.by_version)) or "none"
            raise ConfigurationError(f"this application has no saga {saga} version {version}; it has: {known}")
        return definition

    def _refusal(self, instance: Instance, to: SagaDefinition) -> str | None:
        now = self._store.clock.now()
        try:
            transfer(self._sagas.of(instance), to, instance, by="", why="", now=now)
        except (NotTransferableError, UnknownSagaError) as error:
            return str(error)
        return None

    async def _each(
        self, to: SagaDefinition, act: Callable[[Sequence[Instance]], Awaitable[Reasons]], limit: int | None
    ) -> Report:
        report, after, left = Report(), UUID(int=0), limit
        while left is None or left > 0:
            page = await self._store.page(Query(to.name, UNFINISHED), after=after, limit=_BATCH)
            if not page:
                break
            found = [each for each in page if each.version != to.version][:left]
            reasons = await act(found) if found else {}
            for identity, reason in reasons.items():
                report.stay.setdefault(reason, []).append(identity)
            report.moved += len(found) - len(reasons)
            after = page[-1].id
            left = None if left is None else left - len(found)
        return report
