"""Adds a Postgres database to a service's shards while the service runs.

First Control records where it is, as ADDING: nobody uses it yet. Then its tables are made, by
the owner of the first shard's tables. Then it is ACTIVE, and every process opens it (growing.py).
It owns no bucket until some are moved there. Killed at any point, a repeat goes on.

Control holds no user, no password and no parameter of a connection: those are the first shard's.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from shared.db.errors import DatabaseRefused
from shared.db.limits import CLOSE_S_MAX
from shared.db.migrate import FRAMEWORK_MIGRATIONS, load_migrations
from shared.db.postgres_connection import ERRORS, TIMELINE, Server
from shared.db.postgres_migrate import migrate_postgres
from shared.db.postgres_primary import connect_to_primary
from shared.db.postgres_recorded import all_servers, server_at
from shared.db.postgres_shards import CLAIM_SHARD, COUNT_SHARDS, PLANNING, parse_servers
from shared.db.sqlite_files import require_room, require_schema

# One at a time; the bytes spell "TFAD".
_ADDING = 0x54464144
_SELECT_LEFT = "SELECT dsn FROM tenfold_control.shard WHERE state = 'ADDING'"
_RECORD = """
INSERT INTO tenfold_control.shard (shard_id, weight, state, dsn) VALUES ($1, $2, 'ADDING', $3)
ON CONFLICT (shard_id) DO UPDATE SET weight = excluded.weight, dsn = excluded.dsn
WHERE shard.state = 'ADDING'
"""
_USE = """
UPDATE tenfold_control.shard SET state = 'ACTIVE', is_made = true, timeline = $2
WHERE shard_id = $1
"""
_OWNER = """
SELECT tableowner FROM pg_tables WHERE schemaname = 'public' AND tablename = 'tenfold_shard'
"""
_HAS_ANYTHING = """
SELECT EXISTS (SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace)
"""
_IS_OURS = """
SELECT NOT EXISTS (SELECT FROM tenfold_bucket)
    AND coalesce((SELECT shard_id FROM tenfold_shard), $1) = $1
"""


@dataclass(frozen=True)
class Addition:
    """What is to be added.

    Attributes:
        service: whose.
        migrations: the service's SQL files.
        place: its DSN, without user and password.
        weight: how much it shall carry, relative to the others' 1.
        visit: called with a failpoint's name after each step.
    """

    service: str
    migrations: Path
    place: str
    weight: int
    visit: Callable[[str], None]


async def add_shard(named: Sequence[Server], addition: Addition) -> tuple[int, bool]:
    """Add a database to the shards; returns its index, and False if it was one already.

    Args:
        named: the shards that the service's setting names.
        addition: what is to be added.

    Raises:
        DatabaseRefused: nothing is in use that was not before; the sentence says why.
    """
    known = await all_servers(named)
    server = _checked(addition.place, known)
    for index, other in enumerate(known):
        if _places(server) & _places(other):
            return index, False
    try:
        async with _connected(known[0]) as control, _connected(server) as raw:
            if not await control.fetchval(f"SELECT pg_try_advisory_lock({_ADDING})"):
                raise DatabaseRefused(f"another shard of {addition.service} is just being added")
            index = await _add(control, raw, server, addition)
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError) as error:
        raise DatabaseRefused(
            f"the shards of {addition.service} are of an earlier release: run "
            f"'python -m services migrate {addition.service}' first"
        ) from error
    except ERRORS as error:
        raise DatabaseRefused(f"{server} was not added: {error}") from error
    return index, True


async def _add(control: Any, raw: Any, server: Server, addition: Addition) -> int:  # noqa: ANN401
    every = load_migrations(FRAMEWORK_MIGRATIONS, area="framework", engine="postgres")
    every += load_migrations(addition.migrations, area=addition.service, engine="postgres")
    version = await control.fetchval("SELECT schema_version FROM tenfold_shard")
    require_schema(version, len(every), addition.service)
    index = await control.fetchval(COUNT_SHARDS)
    require_room(index)
    await raw.execute("SELECT set_config('role', $1, false)", await control.fetchval(_OWNER))
    await _require_free(raw, server, index, await control.fetchval(_SELECT_LEFT), addition.place)
    async with control.transaction():
        await control.execute(f"SELECT pg_advisory_xact_lock({PLANNING})")
        tag: str = await control.execute(_RECORD, index, addition.weight, addition.place)
    if not tag.endswith(" 1"):
        raise DatabaseRefused(f"{addition.service} was just given another shard: try again")
    addition.visit("add.recorded")
    await migrate_postgres(raw, str(server), every)
    timeline = await raw.fetchval(f"SELECT {TIMELINE}")
    if await raw.fetchval("SELECT shard_id FROM tenfold_shard") is None:
        await raw.execute(CLAIM_SHARD, index, timeline, len(every))
    addition.visit("add.made")
    await control.execute(_USE, index, timeline)
    addition.visit("add.active")
    return int(index)


async def _require_free(
    raw: Any,  # noqa: ANN401
    server: Server,
    index: int,
    left: str | None,
    place: str,
) -> None:
    """Refuse a database that others use: only what a killed addition of ours left may be in it."""
    if await raw.fetchval("SELECT pg_is_in_recovery()"):
        raise DatabaseRefused(f"{server.address} is a replica: name the primary")
    if not await raw.fetchval(_HAS_ANYTHING):
        return
    is_ours = False
    if left == place:
        with suppress(asyncpg.UndefinedTableError):
            is_ours = await raw.fetchval(_IS_OURS, index)
    if not is_ours:
        raise DatabaseRefused(f"{server.address} is not empty: name a new, empty database")


def _checked(place: str, known: Sequence[Server]) -> Server:
    """The shard to be.

    Raises:
        DatabaseRefused: the place is malformed, or says more than where it is.
    """
    try:
        has_more = urlsplit(place).query or "@" in urlsplit(place).netloc
        parse_servers(place, service="")
    except ValueError:
        raise DatabaseRefused(
            "that is no place of a shard: write it as postgresql://host:port/database"
        ) from None
    if has_more:
        raise DatabaseRefused(
            "leave user, password and parameters out of the DSN: every shard is reached with "
            "those of the first, and Control holds no secrets"
        )
    return server_at(place, known[0], len(known))


def _places(server: Server) -> set[tuple[str | None, int, str]]:
    parts = [urlsplit(dsn) for dsn in server.hosts or (server.dsn,)]
    return {(part.hostname, part.port or 5432, part.path) for part in parts}


@asynccontextmanager
async def _connected(server: Server) -> AsyncIterator[Any]:
    raw = await connect_to_primary(server)
    try:
        yield raw
    finally:
        with suppress(*ERRORS):
            await raw.close(timeout=CLOSE_S_MAX)
