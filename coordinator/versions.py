"""The versions of sagas that a database knows: what each was like when it was first run, and what is left of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, func, not_, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.definition import SagaDefinition
from coordinator.fingerprints import Structure, differences, fingerprint, structure
from coordinator.instance import Status
from coordinator.tables import IN_FLIGHT, saga_instance, saga_version
from events.bulk import Bulk
from events.database import reader, transaction
from events.errors import ConfigurationError

_ENDED = tuple(each.value for each in Status if each.ended)
_insert = Bulk(saga_version, "saga", "version", "fingerprint", "structure", "first_seen")

Key = tuple[str, int]


class ChangedVersionError(ConfigurationError):
    """A saga was changed under an old version number; raise it, or put the old definition back."""

    code = "changed_version"


@dataclass(frozen=True, slots=True)
class VersionCount:
    """A version of a saga, and how many instances of it there are.

    Attributes:
        first_seen: when a process ran this version first; None if none did since it was forgotten.
        in_flight: instances that go on by themselves.
        stuck: instances that need attention.
        ended: instances that have ended.
    """

    saga: str
    version: int
    first_seen: datetime | None
    in_flight: int = 0
    stuck: int = 0
    ended: int = 0


class Versions:
    """The versions of sagas that one database knows."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._reader = reader(engine)

    async def register(self, definitions: Iterable[SagaDefinition], now: datetime) -> None:
        """Keep what versions are like that were not known yet, and compare the others.

        Raises:
            ChangedVersionError: a definition is not what was run under its number before.
        """
        found = {(each.name, each.version): structure(each) for each in definitions}
        rows = [(*key, fingerprint(like), like, now) for key, like in sorted(found.items())]
        async with transaction(self._engine) as connection:
            known = await _known(connection, found)
            if missing := [row for row in rows if row[:2] not in known]:
                await _insert.insert(connection, missing, unless=("saga", "version"))
                known = await _known(connection, found)  # of two processes that come at once one was faster
            _compare(found, known)

    async def check(self, definitions: Iterable[SagaDefinition]) -> None:
        """Compare definitions with those that were run under their numbers before; nothing is written.

        Raises:
            ChangedVersionError: one of them is another one.
        """
        found = {(each.name, each.version): structure(each) for each in definitions}
        async with self._reader.connect() as connection:
            _compare(found, await _known(connection, found))

    async def count(self) -> list[VersionCount]:
        """Return all versions that were run or have instances, with how many there are."""
        instances = (saga_instance.c.saga, saga_instance.c.version, saga_instance.c.status)
        async with self._reader.connect() as connection:
            known = (await connection.execute(select(saga_version))).all()
            counted = (await connection.execute(select(*instances, func.count()).group_by(*instances))).all()
        counts: dict[Key, dict[str, int]] = {(row.saga, row.version): {} for row in known}
        for saga, version, status, number in counted:
            counts.setdefault((saga, version), {})[status] = number
        first_seen = {(row.saga, row.version): row.first_seen for row in known}
        return [_counted(key, first_seen.get(key), counts[key]) for key in sorted(counts)]

    async def in_flight(self) -> set[Key]:
        """Return the versions that have instances in flight; cheap whatever the number of those that have ended."""
        query = select(saga_instance.c.saga, saga_instance.c.version).where(text(IN_FLIGHT)).distinct()
        async with self._reader.connect() as connection:
            return {(saga, version) for saga, version in await connection.execute(query)}

    async def forget(self, saga: str, version: int) -> None:
        """Forget what a version was like, so that it may become another one.

        Raises:
            ConfigurationError: nobody knows it, or instances of it have not ended.
        """
        is_it = (saga_version.c.saga == saga, saga_version.c.version == version)
        left = select(saga_instance.c.id).where(
            saga_instance.c.saga == saga, saga_instance.c.version == version, saga_instance.c.status.not_in(_ENDED)
        )
        async with transaction(self._engine) as connection:
            done = await connection.execute(delete(saga_version).where(*is_it, not_(left.exists())))
            if done.rowcount:
                return
            if (await connection.execute(select(saga_version.c.saga).where(*is_it))).first() is None:
                raise ConfigurationError(f"no version {version} of a saga {saga} was ever run on this database")
        raise ConfigurationError(
            f"version {version} of {saga} has instances that have not ended: let them end, or migrate them;"
            " `coordinator sagas versions` counts them"
        )


async def _known(connection: AsyncConnection, keys: Iterable[Key]) -> dict[Key, Row[Any]]:
    among = tuple_(saga_version.c.saga, saga_version.c.version).in_(list(keys))
    rows = await connection.execute(select(saga_version).where(among))
    return {(row.saga, row.version): row for row in rows}


def _compare(found: Mapping[Key, Structure], known: Mapping[Key, Row[Any]]) -> None:
    for (saga, version), like in found.items():
        row = known.get((saga, version))
        if row is not None and row.fingerprint != fingerprint(like):
            raise ChangedVersionError(
                f"saga {saga} version {version} is not what was run under this number before:"
                f" {'; '.join(differences(row.structure, like))}. Give the class version={version + 1} and keep the old"
                " one in App(retired=[...]) until its instances have ended; or, if it has none in flight,"
                f" run `coordinator sagas forget-version {saga} {version}`"
            )


def _counted(key: Key, first_seen: datetime | None, by_status: Mapping[str, int]) -> VersionCount:
    stuck = by_status.get(Status.NEEDS_ATTENTION.value, 0)
    ended = sum(by_status.get(status, 0) for status in _ENDED)
    return VersionCount(*key, first_seen, sum(by_status.values()) - stuck - ended, stuck, ended)
