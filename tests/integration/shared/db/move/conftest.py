from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.db.port import Shards
from tests.integration.shared.db.move.arena import made_databases
from tests.integration.shared.db.move.grounds import Databases, Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "data")


@pytest.fixture
async def shards(place: Place) -> AsyncIterator[Shards]:
    async with place.open() as opened:
        yield opened


@pytest.fixture
async def databases(postgres_server) -> AsyncIterator[Databases]:
    async with made_databases(postgres_server) as made:
        yield made
