"""Places for a service's shards, on each engine: what runs on one must run on the other.

Databases on the shared Postgres are used again: each test finds its own, and finds them empty.
"""

import itertools
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import asyncpg

from deploy.local.address import Address
from deploy.local.postgres import Site, ensure_databases
from shared.clock import Clock, SystemClock
from shared.db.migrate import FRAMEWORK_MIGRATIONS, load_migrations
from shared.db.port import Shards
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_migrate import migrate_postgres
from shared.db.postgres_replicas import LagGuard
from shared.db.postgres_shards import parse_servers
from shared.db.sqlite import open_sqlite_shards

TABLES = """
SELECT relname AS name FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    AND relname NOT IN ('tenfold_migration', 'tenfold_generated')
"""
END_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@dataclass
class PostgresServer:
    """A running primary.

    Attributes:
        site: its place and passwords.
        address: where it answers.
    """

    site: Site
    address: Address
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _free: dict[tuple[Path, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def dsn(self, database: str) -> str:
        """How a service reaches it."""
        return self.site.dsn(self.address, database)

    @asynccontextmanager
    async def admin(self, database: str = "postgres") -> AsyncIterator[Any]:
        """An operator's connection."""
        connection = await asyncpg.connect(self.site.admin_dsn(self.address, database))
        try:
            yield connection
        finally:
            await connection.close()

    async def make_databases(self, count: int) -> list[str]:
        """New, empty databases; their DSNs."""
        names = [f"t{next(self._numbers)}" for _ in range(count)]
        await ensure_databases(self.site, self.address, names)
        return [self.dsn(name) for name in names]

    async def drop_databases(self, dsns: Collection[str]) -> None:
        """What make_databases made."""
        async with self.admin() as admin:
            for dsn in dsns:
                await admin.execute(f"DROP DATABASE {dsn.rpartition('/')[2]} WITH (FORCE)")

    @asynccontextmanager
    async def shards(self, count: int, *, migrations: Path, service: str) -> AsyncIterator[str]:
        """Migrated databases without a row for one service, as its setting names them.

        Used again after a test: to empty one takes a tenth of the time of making one.
        """
        free = self._free[migrations, service]
        while len(free) < count:
            free.append(await self._make_migrated(migrations, service))
        names = [free.pop() for _ in range(count)]
        yield ",".join(self.dsn(name) for name in names)
        for name in names:
            await self._empty(name)
            free.append(name)

    async def _make_migrated(self, migrations: Path, service: str) -> str:
        [dsn] = await self.make_databases(1)
        files = load_migrations(FRAMEWORK_MIGRATIONS, area="framework", engine="postgres")
        files += load_migrations(migrations, area=service, engine="postgres")
        connection = await asyncpg.connect(dsn)
        try:
            await migrate_postgres(connection, service, files)
        finally:
            await connection.close()
        return dsn.rpartition("/")[2]

    async def _empty(self, database: str) -> None:
        async with self.admin(database) as admin:
            await admin.execute(END_OTHERS)
            tables = await admin.fetch(TABLES)
            deletes = "; ".join(f"DELETE FROM {table['name']}" for table in tables)
            await admin.execute(
                "DROP SCHEMA IF EXISTS tenfold_control CASCADE;"
                f"SET session_replication_role = replica; {deletes}"
            )


SECRET = b"a secret of thirty-two bytes...!"


class Place(Protocol):
    """Where one service's shards are, and what only its operator can do there."""

    @property
    def name(self) -> str:
        """How another process finds it."""
        ...

    def open(self, *, clock: Clock | None = None) -> AbstractAsyncContextManager[Shards]:
        """Serve it; what was there before is found again."""
        ...

    async def run_raw(
        self, shard_index: int, *statements: str, admitted: Collection[int] = ()
    ) -> None:
        """What an operator types into a shard's own shell, as one transaction.

        Args:
            shard_index: which shard.
            statements: without arguments.
            admitted: buckets that the transaction first asks to enter, where it must.
        """
        ...

    async def run_unguarded(self, shard_index: int, statement: str) -> None:
        """As if the data itself were damaged: without triggers and foreign keys."""
        ...

    def literal(self, key: UUID) -> str:
        """An id as it is typed there."""
        ...


@dataclass(frozen=True)
class Contents:
    """Whose shards they are, and how many."""

    migrations: Path
    service: str
    shard_count: int = 4
    owned_by_first: bool = False


@dataclass(frozen=True)
class SqlitePlace:
    """See Place."""

    folder: Path
    contents: Contents

    @property
    def name(self) -> str:
        """See Place.name."""
        return str(self.folder)

    def open(self, *, clock: Clock | None = None) -> AbstractAsyncContextManager[Shards]:
        """See Place.open."""
        return open_sqlite_shards(
            self.folder,
            migrations=self.contents.migrations,
            shard_count=self.contents.shard_count,
            owned_by_first=self.contents.owned_by_first,
            service=self.contents.service,
            secret=SECRET,
            clock=clock or SystemClock(),
            causal_reads=True,
        )

    async def run_raw(
        self, shard_index: int, *statements: str, admitted: Collection[int] = ()
    ) -> None:
        """See Place.run_raw."""
        path = self.folder / f"shard-{shard_index}.sqlite"
        connection = sqlite3.connect(path, timeout=5, isolation_level=None)
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN IMMEDIATE")
            for statement in statements:
                connection.execute(statement)
            connection.execute("COMMIT")
        finally:
            connection.close()

    async def run_unguarded(self, shard_index: int, statement: str) -> None:
        """See Place.run_unguarded."""
        connection = sqlite3.connect(self.folder / f"shard-{shard_index}.sqlite", timeout=5)
        try:
            with connection:
                triggers = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
                for (name,) in connection.execute(triggers).fetchall():
                    connection.execute(f"DROP TRIGGER {name}")
                connection.execute(statement)
        finally:
            connection.close()

    def literal(self, key: UUID) -> str:
        """See Place.literal."""
        return f"x'{key.hex}'"


@dataclass(frozen=True)
class PostgresPlace:
    """See Place."""

    name: str
    contents: Contents
    server: PostgresServer | None = None

    def open(self, *, clock: Clock | None = None) -> AbstractAsyncContextManager[Shards]:
        """See Place.open."""
        return open_postgres_shards(
            parse_servers(self.name, service=self.contents.service),
            migrations=self.contents.migrations,
            owned_by_first=self.contents.owned_by_first,
            service=self.contents.service,
            secret=SECRET,
            clock=clock or SystemClock(),
            lag_guard=LagGuard(),
        )

    async def run_raw(
        self, shard_index: int, *statements: str, admitted: Collection[int] = ()
    ) -> None:
        """See Place.run_raw."""
        connection = await asyncpg.connect(self.name.split(",")[shard_index])
        try:
            async with connection.transaction():
                if admitted:
                    await connection.execute(f"SELECT tenfold_enter(ARRAY{list(admitted)})")
                for statement in statements:
                    await connection.execute(statement)
        finally:
            await connection.close()

    async def run_unguarded(self, shard_index: int, statement: str) -> None:
        """See Place.run_unguarded."""
        assert self.server is not None, "another process's place has no operator"
        database = self.name.split(",")[shard_index].rpartition("/")[2]
        async with self.server.admin(database) as admin:
            await admin.execute(f"SET session_replication_role = replica; {statement}")

    def literal(self, key: UUID) -> str:
        """See Place.literal."""
        return f"'{key}'"


class Places(Protocol):
    """Makes places on one engine."""

    engine: str

    async def make(
        self,
        migrations: Path,
        *,
        service: str = "",
        shard_count: int = 4,
        owned_by_first: bool = False,
    ) -> Place:
        """A new place; the service is the migrations' parent folder by default."""
        ...


@dataclass
class SqlitePlaces:
    """See Places."""

    folder: Path
    engine: str = "sqlite"
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def make(
        self,
        migrations: Path,
        *,
        service: str = "",
        shard_count: int = 4,
        owned_by_first: bool = False,
    ) -> Place:
        """See Places.make."""
        service = service or migrations.parent.name
        contents = Contents(migrations, service, shard_count, owned_by_first)
        return SqlitePlace(self.folder / f"shards-{next(self._numbers)}", contents)


@dataclass
class PostgresPlaces:
    """See Places."""

    server: PostgresServer
    stack: AsyncExitStack
    engine: str = "postgres"

    async def make(
        self,
        migrations: Path,
        *,
        service: str = "",
        shard_count: int = 4,
        owned_by_first: bool = False,
    ) -> Place:
        """See Places.make."""
        service = service or migrations.parent.name
        databases = self.server.shards(shard_count, migrations=migrations, service=service)
        name = await self.stack.enter_async_context(databases)
        contents = Contents(migrations, service, shard_count, owned_by_first)
        return PostgresPlace(name, contents, self.server)
