"""Databases on the Postgres that the tests share."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import asyncpg

from deploy.local.address import Address
from deploy.local.postgres import Site, ensure_databases


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

    def dsn(self, database: str) -> str:
        """How a service reaches it."""
        return self.site.dsn(self.address, database)

    async def admin(self, database: str = "postgres") -> asyncpg.Connection:
        """An operator's connection; close it."""
        return await asyncpg.connect(self.site.admin_dsn(self.address, database))

    async def make_databases(self, count: int) -> list[str]:
        """New, empty databases; their DSNs."""
        names = [f"t{next(self._numbers)}" for _ in range(count)]
        await ensure_databases(self.site, self.address, names)
        return [self.dsn(name) for name in names]
