"""Which engine serves a service's shards: Postgres if its setting names databases, else SQLite."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shared.clock import Clock
from shared.config import ConfigError
from shared.db.port import Shards

if TYPE_CHECKING:
    from shared.db.postgres_connection import Server

DATABASE_SETTING: dict[str, Any] = {
    "help": "shards on Postgres, one DSN each, comma-separated in the order they were made; "
    "empty for SQLite in the data folder",
    "secret": True,
}
"""What every service says of its setting `database`."""


@dataclass(frozen=True)
class ShardSettings:
    """What a service's shards are made of, on either engine.

    Attributes:
        service: its name.
        database: its setting of that name.
        folder: where SQLite keeps its files.
        migrations: the service's SQL files.
        shard_count: of SQLite's; Postgres has as many as are named.
        owned_by_first: give all buckets of new shards to the first.
        causal_reads: whether replicas may answer what calls read that their contracts mark so,
            and only where a store asks for it (Bucket.causal). Never for money.
        synchronous: SQLite's FULL for what a power cut must not take; Postgres always is.
    """

    service: str
    database: str
    folder: Path
    migrations: Path
    shard_count: int = 4
    owned_by_first: bool = False
    causal_reads: bool = False
    synchronous: Literal["FULL", "NORMAL"] = "NORMAL"


def open_shards(
    settings: ShardSettings, *, secret: bytes, clock: Clock
) -> AbstractAsyncContextManager[Shards]:
    """Open a service's shards, creating and migrating them as needed.

    Args:
        settings: which, and where.
        secret: 32 bytes or more that never change for this data.
        clock: dates what is written.

    Raises:
        ConfigError: the setting is malformed; the sentence names it, and no password.
        DatabaseRefused: from the block, if a shard cannot be served.
    """
    # Each engine is loaded only where it is used: a process has one of them.
    servers = servers_of(settings)
    if not servers:
        from shared.db.sqlite import open_sqlite_shards

        return open_sqlite_shards(
            settings.folder,
            migrations=settings.migrations,
            shard_count=settings.shard_count,
            owned_by_first=settings.owned_by_first,
            synchronous=settings.synchronous,
            secret=secret,
            clock=clock,
            service=settings.service,
            causal_reads=settings.causal_reads,
        )
    from shared.db.postgres import open_postgres_shards
    from shared.db.postgres_replicas import LagGuard

    return open_postgres_shards(
        servers,
        migrations=settings.migrations,
        owned_by_first=settings.owned_by_first,
        secret=secret,
        clock=clock,
        service=settings.service,
        lag_guard=LagGuard() if settings.causal_reads else None,
    )


async def migrate_shards(settings: ShardSettings) -> int:
    """Bring every shard to the newest schema and serve none; returns how many there are.

    Safe to repeat, and to run while the service runs.

    Raises:
        ConfigError: the setting is malformed.
        DatabaseRefused: a shard was not migrated; the sentence names it. The others were.
    """
    service, migrations = settings.service, settings.migrations
    if servers := servers_of(settings):
        from shared.db import postgres_shards

        prepared = await postgres_shards.prepare(
            postgres_shards.Plan(servers, service, migrations, settings.owned_by_first)
        )
        return len(prepared.primaries)
    from shared.db import sqlite_files

    plan = sqlite_files.Plan(
        settings.folder, service, migrations, settings.shard_count, settings.owned_by_first
    )
    return len((await asyncio.to_thread(sqlite_files.prepare, plan)).paths)


def servers_of(settings: ShardSettings) -> "Sequence[Server]":
    """The shards on Postgres that the setting names; none means SQLite.

    Raises:
        ConfigError: it is malformed; the sentence names it, and no password.
    """
    if not settings.database:
        return ()
    from shared.db.postgres_shards import parse_servers

    try:
        return parse_servers(settings.database, service=settings.service)
    except ValueError as error:
        variable = f"TENFOLD_{settings.service.upper()}_DATABASE"
        raise ConfigError(f"{variable} is not allowed: {error}.") from error
