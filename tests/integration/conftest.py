"""Databases with coordinators."""

from collections.abc import AsyncIterator

import pytest

from tests.support.engines import World, open_world


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with open_world(database_url) as opened:
        yield opened


@pytest.fixture
async def shared(pg_url: str) -> AsyncIterator[World]:
    """For several coordinators at once."""
    async with open_world(pg_url) as opened:
        yield opened
