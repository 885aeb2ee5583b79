import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from shared.clock import SystemClock
from shared.db.ids import new_id
from shared.db.port import Once, Shards, Transaction
from shared.db.sqlite import open_sqlite_shards
from shared.identity import Principal, PrincipalKind

MIGRATIONS = Path(__file__).parent / "migrations"
SECRET = b"a secret of thirty-two bytes...!"
NEAR, NEAR_TOO, FAR = 77, 78, 3000
"""Buckets: the first two share a shard of four, the third is on another."""

INSERT_THING = """
INSERT INTO thing (bucket, id, tenant, owner, label) VALUES ($1, $2, $3, $4, $5)
"""
LIST_LABELS = "SELECT label FROM thing WHERE tenant = $1 ORDER BY label"

OpenShards = Callable[[], AbstractAsyncContextManager[Shards]]


@dataclass
class Engine:
    """One implementation of the port, and what only its operator can do."""

    folder: Path
    shard_count: int = 4

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Shards]:
        async with open_sqlite_shards(
            self.folder,
            migrations=MIGRATIONS,
            shard_count=self.shard_count,
            secret=SECRET,
            clock=SystemClock(),
            service="things",
        ) as shards:
            yield shards

    def run_raw(self, shard_index: int, sql: str) -> list[tuple]:
        """What an operator types into the database's own shell."""
        connection = sqlite3.connect(self.folder / f"shard-{shard_index}.sqlite", timeout=5)
        try:
            with connection:
                return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def commit_count(self, shards: Shards) -> int:
        return sum(shard.writer.commit_count for shard in shards.all())


# Postgres joins here and must pass the same tests.
@pytest.fixture(params=["sqlite"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    return Engine(tmp_path / "data")


@pytest.fixture
async def shards(engine: Engine) -> AsyncIterator[Shards]:
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
