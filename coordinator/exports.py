"""Instances with their recorded inputs, one JSON object a line: to look at, and to decide on again elsewhere."""

import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID

from coordinator.chain import COLUMNS
from coordinator.instance import UNFINISHED
from coordinator.search import Query
from coordinator.store import Store
from coordinator.views import document_of
from events.errors import ConfigurationError

_PAGE = 200
_PARTS = {"id": str, "saga": str, "version": int, "key": str, "created_at": str, "state": dict, "history": list}
_OF_ROW = frozenset(COLUMNS) - {"saga_id"}
_id = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def export(store: Store, query: Query) -> AsyncIterator[dict[str, Any]]:
    """Return the instances that are meant, with their histories, oldest first; by default those that have not ended.

    An instance that goes on meanwhile is as it was at one moment, or its history is a little longer than it.
    """
    if not query.statuses:
        query = replace(query, statuses=UNFINISHED)
    after = UUID(int=0)
    while page := await store.page(query, limit=_PAGE, after=after):
        histories = await store.histories([instance.id for instance in page])
        for instance in page:
            yield document_of(instance, histories[instance.id])
        after = page[-1].id


def read(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read what `export` wrote, a line each.

    Raises:
        ConfigurationError: a line is none of it.
    """
    for number, line in enumerate(_texts(lines), 1):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"line {number} is no JSON: {error}") from error
        if not _is_saga(document):
            raise ConfigurationError(f"line {number} is no saga; write the file with `coordinator sagas export`")
        yield document


def _texts(lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"this is no text in UTF-8: {error}; an archive is to be unpacked first") from error


def _is_saga(document: Any) -> bool:
    if not isinstance(document, dict) or not _PARTS.keys() <= document.keys():
        return False
    rows = document["history"]
    return (
        all(isinstance(document[name], kind) for name, kind in _PARTS.items())
        and _id.fullmatch(document["id"]) is not None
        and bool(rows)
        and all(isinstance(row, dict) and row.keys() >= _OF_ROW for row in rows)
    )
