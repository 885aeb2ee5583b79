"""Databases on the Postgres that the tests share: each test finds its own, and finds them empty."""

import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from deploy.local.address import Address
from deploy.local.postgres import Site, ensure_databases
from shared.db.migrate import FRAMEWORK_MIGRATIONS, load_migrations
from shared.db.postgres_migrate import migrate_postgres

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
