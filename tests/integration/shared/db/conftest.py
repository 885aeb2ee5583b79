import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID

import asyncpg
import pytest

from shared.clock import SystemClock
from shared.db.ids import new_id
from shared.db.port import Once, Shards, Transaction
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_shards import parse_servers
from shared.db.sqlite import open_sqlite_shards
from shared.identity import Principal, PrincipalKind
from tests.databases import PostgresServer

MIGRATIONS = Path(__file__).parent / "migrations"
SECRET = b"a secret of thirty-two bytes...!"
NEAR, NEAR_TOO, FAR = 77, 78, 3000
"""Buckets: the first two share a shard of four, the third is on another."""

INSERT_THING = """
INSERT INTO thing (bucket, id, tenant, owner, label) VALUES ($1, $2, $3, $4, $5)
"""
LIST_LABELS = "SELECT label FROM thing WHERE tenant = $1 ORDER BY label"


class Engine(Protocol):
    """One implementation of the port, and what only its operator can do."""

    def open(self) -> AbstractAsyncContextManager[Shards]: ...

    async def run_raw(self, shard_index: int, sql: str, *, admitted: int | None = None) -> None:
        """What an operator types into the database's own shell, perhaps admitted to a bucket."""

    def literal(self, key: UUID) -> str:
        """An id as it is typed there."""

    @property
    def place(self) -> str:
        """Where another process finds it."""


@dataclass
class SqliteEngine:
    """See Engine."""

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

    async def run_raw(self, shard_index: int, sql: str, *, admitted: int | None = None) -> None:
        connection = sqlite3.connect(self.folder / f"shard-{shard_index}.sqlite", timeout=5)
        try:
            with connection:
                connection.execute(sql)
        finally:
            connection.close()

    def literal(self, key: UUID) -> str:
        return f"x'{key.hex}'"

    @property
    def place(self) -> str:
        return str(self.folder)


@dataclass
class PostgresEngine:
    """See Engine."""

    databases: str

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Shards]:
        async with open_postgres_shards(
            parse_servers(self.databases, service="things"),
            migrations=MIGRATIONS,
            secret=SECRET,
            clock=SystemClock(),
            service="things",
        ) as shards:
            yield shards

    async def run_raw(self, shard_index: int, sql: str, *, admitted: int | None = None) -> None:
        connection = await asyncpg.connect(self.databases.split(",")[shard_index])
        try:
            async with connection.transaction():
                if admitted is not None:
                    await connection.execute(f"SELECT tenfold_enter(ARRAY[{admitted}])")
                await connection.execute(sql)
        finally:
            await connection.close()

    def literal(self, key: UUID) -> str:
        return f"'{key}'"

    @property
    def place(self) -> str:
        return self.databases


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> SqliteEngine:
    return SqliteEngine(tmp_path / "data")


@pytest.fixture
async def postgres_engine(postgres_server: PostgresServer) -> AsyncIterator[PostgresEngine]:
    async with postgres_server.shards(4, migrations=MIGRATIONS, service="things") as databases:
        yield PostgresEngine(databases)


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn: both must pass the same tests."""
    return request.getfixturevalue(f"{request.param}_engine")


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
