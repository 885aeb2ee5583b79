"""A service's Postgres databases before they are served: migrated, checked, mapped.

Killed at any point, the next start goes on: the plan of who gets which bucket is committed in
the first shard's schema `tenfold_control` before any shard takes its buckets from it.
"""

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import asyncpg

from shared.db.errors import DatabaseRefused, MigrationRefused
from shared.db.limits import CLOSE_S_MAX
from shared.db.migrate import FRAMEWORK_MIGRATIONS, Migration, load_migrations, tables_made_by
from shared.db.move.postgres_control import MOVE_TABLE
from shared.db.postgres_connection import ERRORS, TIMELINE, Server, connect
from shared.db.postgres_gate import pass_gate
from shared.db.postgres_migrate import migrate_postgres, own_tables
from shared.db.postgres_primary import Primary, is_behind_gate
from shared.db.postgres_recorded import all_servers
from shared.db.shards import SHARD_COUNT_MAX, BucketMap, CoverageBroken
from shared.db.sql import OWNED_STATES

# One process plans at a time; the bytes spell "TFPL".
PLANNING = 0x5446504C
_CONTROL_TABLES = """
CREATE SCHEMA IF NOT EXISTS tenfold_control;
CREATE TABLE IF NOT EXISTS tenfold_control.shard (
    shard_id bigint PRIMARY KEY, weight bigint NOT NULL, state text NOT NULL);
ALTER TABLE tenfold_control.shard ADD COLUMN IF NOT EXISTS timeline bigint NOT NULL DEFAULT 0;
ALTER TABLE tenfold_control.shard ADD COLUMN IF NOT EXISTS is_made boolean NOT NULL DEFAULT false;
ALTER TABLE tenfold_control.shard ADD COLUMN IF NOT EXISTS dsn text NOT NULL DEFAULT '';
CREATE TABLE IF NOT EXISTS tenfold_control.bucket_map (
    bucket smallint PRIMARY KEY, shard_id bigint NOT NULL, epoch bigint NOT NULL);
CREATE TABLE IF NOT EXISTS tenfold_control.bucket_busy (
    bucket smallint PRIMARY KEY, busy_us double precision NOT NULL, at_us bigint NOT NULL);
"""
# Between the two commits that hand a bucket over, no shard owns it: it is where it is going.
_ARRIVING = """
SELECT bucket, dst FROM tenfold_control.bucket_move WHERE phase NOT IN ('DONE', 'ABORTED')
"""
_INSERT_MAP = """
INSERT INTO tenfold_control.bucket_map (bucket, shard_id, epoch)
SELECT number - 1, shard_id, 1 FROM unnest($1::bigint[]) WITH ORDINALITY AS all_ (shard_id, number)
"""
_INSERT_SHARD = """
INSERT INTO tenfold_control.shard (shard_id, weight, state) VALUES ($1, 1, 'ACTIVE')
ON CONFLICT (shard_id) DO UPDATE SET state = 'ACTIVE', dsn = ''
"""
COUNT_SHARDS = "SELECT count(*) FROM tenfold_control.shard WHERE state <> 'ADDING'"
# A shard that has been made is never made again: an empty database in its place is a wrong one.
_SELECT_MADE = "SELECT shard_id FROM tenfold_control.shard WHERE is_made"
_SET_MADE = "UPDATE tenfold_control.shard SET is_made = true WHERE shard_id < $1 AND NOT is_made"
_SET_TIMELINE = "UPDATE tenfold_control.shard SET timeline = $2 WHERE shard_id = $1"
CLAIM_SHARD = """
INSERT INTO tenfold_shard (one, shard_id, timeline, schema_version) VALUES (1, $1, $2, $3)
"""
_CLAIM_BUCKETS = """
INSERT INTO tenfold_bucket (bucket, state, epoch)
SELECT number, 'ACTIVE', 1 FROM unnest($1::int[]) AS number
"""
_BETWEEN_SHARDS = re.compile(r",\s*(?=[a-z]+://)")
_OWNED = f"SELECT bucket FROM tenfold_bucket WHERE state IN {OWNED_STATES}"  # noqa: S608


@dataclass(frozen=True)
class Plan:
    """What the caller asks for. See open_postgres_shards."""

    servers: Sequence[Server]
    service: str
    migrations: Path
    owned_by_first: bool


@dataclass(frozen=True)
class Prepared:
    """Databases that are ready to be served.

    Attributes:
        primaries: by shard index.
        tenant_tables: which no statement may use without tenant.
    """

    primaries: Sequence[Primary]
    bucket_map: BucketMap
    tenant_tables: frozenset[str]


def parse_servers(text: str, *, service: str) -> list[Server]:
    """The shards that a setting names, in order.

    Args:
        text: a DSN for each shard, separated by commas: "postgresql://user:password@host/db"; its
            hosts, if it has several, too: "postgresql://user:password@host1:5432,host2:5432/db".
        service: whose.

    Raises:
        ValueError: one is malformed or named twice; the sentence says which, and no password.
    """
    dsns = [dsn.strip() for dsn in _BETWEEN_SHARDS.split(text) if dsn.strip(" ,")]
    if not 1 <= len(dsns) <= SHARD_COUNT_MAX:
        raise ValueError(f"it names {len(dsns)} shards: it must be 1 to {SHARD_COUNT_MAX}")
    shards = [_hosts_of(dsn, index) for index, dsn in enumerate(dsns)]
    places = [urlsplit(dsn)._replace(query="").geturl() for hosts in shards for dsn in hosts]
    if len(set(places)) < len(places):
        raise ValueError("it names one database twice")
    return [
        Server(hosts[0], f"shard {index} of {service}", f"tenfold-{service}", hosts)
        for index, hosts in enumerate(shards)
    ]


def _hosts_of(dsn: str, index: int) -> tuple[str, ...]:
    """One DSN for each host: asyncpg's own way with several gives up at the first that starts."""
    try:
        parts = urlsplit(dsn)
    except ValueError:
        parts = urlsplit("")
    credentials, at, hosts = parts.netloc.rpartition("@")
    found = [parts._replace(netloc=f"{credentials}{at}{host}") for host in hosts.split(",")]
    if parts.scheme not in {"postgresql", "postgres"} or not all(map(_is_whole, found)):
        raise ValueError(f"shard {index}: it must be postgresql://user:password@host:port/database")
    return tuple(one.geturl() for one in found)


def _is_whole(parts: SplitResult) -> bool:
    try:
        return bool(parts.hostname and parts.path.strip("/")) and parts.port != 0
    except ValueError:
        return False


async def prepare(plan: Plan) -> Prepared:
    """Migrate every shard and give each its buckets.

    Raises:
        DatabaseRefused: a sentence for the operator says which shard, what is wrong, what to do.
    """
    migrations = load_migrations(FRAMEWORK_MIGRATIONS, area="framework", engine="postgres")
    framework = tables_made_by(migrations)
    migrations += load_migrations(plan.migrations, area=plan.service, engine="postgres")
    primaries = [Primary(server) for server in await _all_servers(plan.servers)]
    await asyncio.gather(*(primary.find() for primary in primaries))
    servers = [primary.server for primary in primaries]
    connections = await _connect_all(servers)
    try:
        await _refuse_emptied(servers, connections)
        await _migrate_all(servers, connections, migrations)
        hint = await _planned(plan, connections[0], primaries)
        owned = {
            index: await _claim(servers[index], connection, index, hint, len(migrations))
            for index, connection in enumerate(connections)
        }
        await connections[0].execute(_SET_MADE, len(servers))
        await _add_arriving(connections[0], owned)
        tenant_tables = await own_tables(connections[0], framework)
    except ERRORS as error:
        raise DatabaseRefused(f"the shards of {plan.service} failed: {error}") from error
    finally:
        await _close_all(connections)
    try:
        bucket_map = BucketMap.of_owners(owned, version=hint.version)
    except CoverageBroken as error:
        raise DatabaseRefused(
            f"the shards of {plan.service} do not hold every bucket once: {error}. Name all of "
            "them, in the order in which they were made"
        ) from error
    return Prepared(primaries, bucket_map, tenant_tables)


async def _all_servers(named: Sequence[Server]) -> Sequence[Server]:
    try:
        return await all_servers(named)
    except DatabaseRefused:
        return named  # what is wrong with the first is told below, with what is wrong with others


async def _add_arriving(control: Any, owned: dict[int, list[int]]) -> None:  # noqa: ANN401
    known = {bucket for buckets in owned.values() for bucket in buckets}
    for row in await control.fetch(_ARRIVING):
        if row["bucket"] not in known:
            owned[row["dst"]].append(row["bucket"])


async def _connect_all(servers: Sequence[Server]) -> list[Any]:
    results = await asyncio.gather(*(connect(server) for server in servers), return_exceptions=True)
    failures = []
    for server, result in zip(servers, results, strict=True):
        if isinstance(result, ERRORS):
            reason = str(result) or type(result).__name__
            failures.append(f"{server} cannot be used ({reason})")
    if failures:
        await _close_all([result for result in results if not isinstance(result, BaseException)])
        raise DatabaseRefused(f"{'; '.join(failures)}: start it, or correct its DSN")
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)


async def _close_all(connections: Sequence[Any]) -> None:
    for connection in connections:
        with suppress(*ERRORS):
            await connection.close(timeout=CLOSE_S_MAX)


async def _refuse_emptied(servers: Sequence[Server], connections: Sequence[Any]) -> None:
    """Refuse an empty database where a shard was: made anew, it would hide what it had.

    Read in this order, another process that makes the shards meanwhile is no reason: it makes
    the first one first, and says last that they are made.
    """
    made = await _shard_ids(connections[0], _SELECT_MADE)
    said = [
        await _shard_ids(one, "SELECT shard_id FROM tenfold_shard") for one in connections[::-1]
    ]
    is_empty = [not ids for ids in reversed(said)]
    if is_empty[0] and not all(is_empty):
        made = [0]  # Control is in the first
    for index in made:
        if index < len(servers) and is_empty[index]:
            raise DatabaseRefused(
                f"{servers[index]} is empty, and it has been in use: correct its DSN, or restore "
                "it from a backup"
            )


async def _shard_ids(connection: Any, sql: str) -> list[int]:  # noqa: ANN401
    try:
        return [int(row["shard_id"]) for row in await connection.fetch(sql)]
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
        return []


async def _migrate_all(
    servers: Sequence[Server], connections: Sequence[Any], migrations: Sequence[Migration]
) -> None:
    """Every shard, even if one fails: the others are then at the newest schema, each whole."""

    async def migrate(index: int, server: Server, connection: Any) -> str:  # noqa: ANN401
        try:
            if await connection.fetchval("SELECT pg_is_in_recovery()"):
                return f"{server} is a replica: name the primary"
            if await is_behind_gate(connection):
                await pass_gate(servers, index)
            await migrate_postgres(connection, str(server), migrations)
        except DatabaseRefused as error:
            return str(error)
        except ERRORS as error:
            return f"{server} was not migrated ({error}); the next start goes on"
        return ""

    results = await asyncio.gather(
        *(
            migrate(index, server, one)
            for index, (server, one) in enumerate(zip(servers, connections, strict=True))
        )
    )
    if failures := [failure for failure in results if failure]:
        raise MigrationRefused("; ".join(failures))


async def _planned(
    plan: Plan,
    control: Any,  # noqa: ANN401
    primaries: Sequence[Primary],
) -> BucketMap:
    """The plan of these shards: made now if they are new, else what they were made with."""
    async with control.transaction():
        await control.execute(f"SELECT pg_advisory_xact_lock({PLANNING})")
        # Opening a relation makes this session hear of what another has made while we waited:
        # it remembers that there was no such schema.
        await control.execute("SELECT FROM pg_namespace LIMIT 1")
        await control.execute(_CONTROL_TABLES + MOVE_TABLE)
        rows = await control.fetch(
            "SELECT shard_id FROM tenfold_control.bucket_map ORDER BY bucket"
        )
        if rows:
            hint = BucketMap(1, tuple(int(row["shard_id"]) for row in rows))
        else:
            count = len(primaries)
            hint = BucketMap.first_owns_all() if plan.owned_by_first else BucketMap.even(count)
            await control.execute(_INSERT_MAP, list(hint.shard_indexes))
        known = await control.fetchval(COUNT_SHARDS)
        if known > len(primaries):
            raise DatabaseRefused(
                f"{plan.service} has {known} shards and {len(primaries)} were named: name all"
            )
        for index in range(known, len(primaries)):
            await control.execute(_INSERT_SHARD, index)
        await _remember_timelines(control, primaries)
    return hint


async def _remember_timelines(control: Any, primaries: Sequence[Primary]) -> None:  # noqa: ANN401
    """What a process that starts anew knows of promotions, if only the old primary answers it."""
    rows = await control.fetch(
        "SELECT shard_id, timeline FROM tenfold_control.shard WHERE state <> 'ADDING'"
    )
    seen = {row["shard_id"]: row["timeline"] for row in rows}
    for index, primary in enumerate(primaries):
        if primary.timeline < seen[index]:
            raise DatabaseRefused(
                f"{primary.server} is a primary of the past (timeline {primary.timeline}, and "
                f"{seen[index]} was promoted): stop it, and start the one that was promoted"
            )
        await control.execute(_SET_TIMELINE, index, primary.timeline)


async def _claim(
    server: Server,
    connection: Any,  # noqa: ANN401
    index: int,
    hint: BucketMap,
    schema_version: int,
) -> list[int]:
    """Say in a new shard which it is and what it owns; in an old one, read what it owns."""
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({PLANNING})")
        shard_id = await connection.fetchval("SELECT shard_id FROM tenfold_shard")
        if shard_id is None:
            timeline = await connection.fetchval(f"SELECT {TIMELINE}")
            await connection.execute(CLAIM_SHARD, index, timeline, schema_version)
            await connection.execute(_CLAIM_BUCKETS, hint.buckets_of(index))
        elif shard_id != index:
            raise DatabaseRefused(
                f"{server} is shard {shard_id}: name the shards in the order they were made"
            )
        await connection.execute("UPDATE tenfold_shard SET schema_version = $1", schema_version)
        return [row["bucket"] for row in await connection.fetch(_OWNED)]
