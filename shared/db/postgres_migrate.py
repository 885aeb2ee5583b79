"""Brings Postgres shards to the newest schema: whole migrations, each once, then the guards.

A killed run leaves whole migrations only, and the next one goes on. Two processes that start
at once take turns by an advisory lock. DDL waits for a lock at most a few seconds, so that a
migration under traffic gives up rather than stall every writer behind it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.db.crash_points import MIGRATED_NOT_COMMITTED
from shared.db.migrate import (
    CREATE_MIGRATION_TABLE,
    SELECT_APPLIED,
    UNGUARDED_PREFIX,
    Migration,
    refuse_misfit,
)
from shared.db.move.postgres_shapes import capture_triggers, read_shapes
from shared.db.sql import to_postgres

FUNCTIONS = Path(__file__).with_name("postgres_functions.sql")
# Of the advisory locks that we use; the bytes spell "TFMG" (granules: "TEFN").
_MIGRATING = 0x54464D47
STATEMENT_S_MAX = 600
LOCK_S_MAX = 5

_SETTINGS = f"""
SET statement_timeout = '{STATEMENT_S_MAX}s';
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = '{STATEMENT_S_MAX}s';
SET client_min_messages = warning;
"""
_TABLES = """
SELECT class.relname AS name,
       bool_or(field.attname = 'bucket') AS has_bucket,
       bool_or(field.attname = 'version') AS has_version,
       bool_or(field.attname = 'tenant') AS has_tenant
FROM pg_class AS class JOIN pg_attribute AS field ON field.attrelid = class.oid
WHERE class.relnamespace = 'public'::regnamespace AND class.relkind IN ('r', 'p')
    AND field.attnum > 0 AND NOT field.attisdropped
GROUP BY class.relname ORDER BY class.relname
"""
# Built-in functions alone, with their casts written out: a trigger's condition is made ready
# anew for each statement, and an operator that is an SQL function below would be parsed again.
_ADMITTED = (
    "(strpos(coalesce(current_setting('tenfold.buckets', true), ''), "
    "',' || {row}.bucket::text || ',') > 0 OR "
    "strpos(coalesce(current_setting('tenfold.granule_' || ({row}.bucket & 63)::text, true), ''), "
    "',' || {row}.bucket::text || ',') > 0)"
)
_KNOWN = "SELECT sha256 FROM tenfold_generated WHERE what = $1"
_REMEMBER = """
INSERT INTO tenfold_generated (what, sha256) VALUES ($1, $2)
ON CONFLICT (what) DO UPDATE SET sha256 = excluded.sha256
"""
_CREATE_GENERATED_TABLE = """
CREATE TABLE IF NOT EXISTS tenfold_generated (what text PRIMARY KEY, sha256 text NOT NULL)
"""


async def migrate_postgres(
    connection: Any,  # noqa: ANN401 - asyncpg is untyped
    place: str,
    migrations: Sequence[Migration],
) -> None:
    """Bring one database to the newest schema.

    Args:
        connection: a raw one, of the tables' owner; its settings are changed.
        place: names the shard to the operator.
        migrations: of every area, in the order in which to apply them.

    Raises:
        MigrationRefused: the database does not fit these migrations; nothing has been changed.
    """
    await connection.execute(_SETTINGS)
    await connection.execute(f"SELECT pg_advisory_lock({_MIGRATING})")
    await connection.execute(f"SET lock_timeout = '{LOCK_S_MAX}s'")
    try:
        await connection.execute(CREATE_MIGRATION_TABLE + ";" + _CREATE_GENERATED_TABLE)
        applied = [tuple(row) for row in await connection.fetch(SELECT_APPLIED)]
        refuse_misfit(applied, place, migrations)
        await _generate(connection, "functions", FUNCTIONS.read_text())
        known = {(area, number) for area, number, _, _ in applied}
        for migration in migrations:
            if (migration.area, migration.number) not in known:
                await _apply(connection, migration)
        tables = await connection.fetch(_TABLES)
        captures = capture_triggers(await read_shapes(connection))
        await _generate(connection, "triggers", "\n".join([*_triggers(tables), *captures]))
    finally:
        await connection.execute(f"SELECT pg_advisory_unlock({_MIGRATING})")


async def own_tables(connection: Any, made_by_us: frozenset[str]) -> frozenset[str]:  # noqa: ANN401
    """The service's own tables that have a tenant: all but the framework's."""
    rows = await connection.fetch(_TABLES)
    return frozenset(row["name"] for row in rows if row["has_tenant"]) - made_by_us


async def _apply(connection: Any, migration: Migration) -> None:  # noqa: ANN401
    async with connection.transaction():
        await connection.execute("SELECT tenfold_enter_every()")  # it may change rows
        await connection.execute(to_postgres(migration.text))
        await connection.execute(
            "INSERT INTO tenfold_migration (area, number, name, sha256) VALUES ($1, $2, $3, $4)",
            *(migration.area, migration.number, migration.name, migration.sha256),
        )
        MIGRATED_NOT_COMMITTED.visit()


async def _generate(connection: Any, what: str, script: str) -> None:  # noqa: ANN401
    """Run a script unless it is what ran last: replacing functions locks their users out."""
    digest = hashlib.sha256(script.encode()).hexdigest()
    if await connection.fetchval(_KNOWN, what) == digest:
        return
    async with connection.transaction():
        await connection.execute(script)
        await connection.execute(_REMEMBER, what, digest)


def _triggers(tables: Sequence[Any]) -> Iterator[str]:
    for table in tables:
        if table["name"].startswith(UNGUARDED_PREFIX):
            continue
        if table["has_bucket"]:
            yield from _guard_triggers(table["name"])
        if table["has_version"]:
            yield _trigger(
                table["name"],
                "version",
                "BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION tenfold_next_version()",
            )


def _guard_triggers(table: str) -> Iterator[str]:
    for operation, rows in (("INSERT", ("NEW",)), ("UPDATE", ("NEW", "OLD")), ("DELETE", ("OLD",))):
        admitted = " AND ".join(_ADMITTED.format(row=row) for row in rows)
        yield _trigger(
            table,
            f"guard_{operation.lower()}",
            f"BEFORE {operation} ON {{table}} FOR EACH ROW WHEN (NOT ({admitted})) "
            "EXECUTE FUNCTION tenfold_refuse_unadmitted()",
        )
    yield _trigger(
        table,
        "guard_truncate",
        "BEFORE TRUNCATE ON {table} EXECUTE FUNCTION tenfold_refuse_truncate()",
    )


def _trigger(table: str, what: str, body: str) -> str:
    name = f"tenfold_{what}"
    return (
        f"DROP TRIGGER IF EXISTS {name} ON {table}; "
        f"CREATE TRIGGER {name} {body.format(table=table)};"
    )
