from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from shared.db.ids import new_id
from shared.db.port import Once, Shards, Transaction
from shared.identity import Principal, PrincipalKind
from tests.databases import Place, Places

MIGRATIONS = Path(__file__).parent / "migrations"
NEAR, NEAR_TOO, FAR = 77, 78, 3000
"""Buckets: the first two share a shard of four, the third is on another."""

INSERT_THING = """
INSERT INTO thing (bucket, id, tenant, owner, label) VALUES ($1, $2, $3, $4, $5)
"""
LIST_LABELS = "SELECT label FROM thing WHERE tenant = $1 ORDER BY label"


@pytest.fixture
async def engine(places: Places) -> Place:
    """Each engine in turn: both must pass the same tests."""
    return await places.make(MIGRATIONS, service="things")


@pytest.fixture
async def shards(engine: Place) -> AsyncIterator[Shards]:
    async with engine.open() as opened:
        yield opened


def user(bucket: int = NEAR, tenant: str = "default") -> Principal:
    return Principal(PrincipalKind.USER, str(new_id(bucket)), tenant)


def once(principal: Principal, key: str = "key-1", body: bytes = b"body", **options) -> Once:
    return Once(principal, "/things.Things/Make", key, body.ljust(32, b"."), **options)


async def add_thing(tx: Transaction, label: str, *, tenant: str = "default") -> UUID:
    thing_id = new_id(tx.bucket)
    await tx.execute(INSERT_THING, tx.bucket, thing_id, tenant, thing_id, label)
    return thing_id


async def labels(shards: Shards, *, tenant: str = "default") -> list[str]:
    found = []
    for shard in shards.all():
        found += [row["label"] for row in await shard.fetch_all(LIST_LABELS, tenant)]
    return sorted(found)
