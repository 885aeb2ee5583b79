"""A service's SQLite files before they are opened: made, migrated, checked, mapped.

Blocking, in one thread, before anything is served. Killed at any point, the next start
goes on: the plan is committed in control.sqlite first, and a shard takes its buckets from
it in the transaction that says which shard it is.
"""

import sqlite3
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from shared.db.errors import DatabaseRefused, MigrationRefused
from shared.db.migrate import (
    FRAMEWORK_MIGRATIONS,
    Migration,
    load_migrations,
    migrate_sqlite,
    sqlite_file,
    tables_made_by,
)
from shared.db.move.sqlite_control import MOVE_TABLE, map_of_rows
from shared.db.shards import SHARD_COUNT_MAX, BucketMap, CoverageBroken
from shared.db.sql import OWNED_STATES
from shared.db.sqlite_connection import Schema, read_schema

Visit = Callable[[str], None]
SQLITE_MIN = (3, 35)
_CONTROL_TABLES = """
CREATE TABLE IF NOT EXISTS shard (
    shard_id bigint PRIMARY KEY, dsn text NOT NULL, weight bigint NOT NULL, state text NOT NULL);
CREATE TABLE IF NOT EXISTS bucket_map (
    bucket smallint PRIMARY KEY, shard_id bigint NOT NULL, epoch bigint NOT NULL);
"""
# Between the two commits that hand a bucket over, no shard owns it: it is where it is going.
_ARRIVING = "SELECT bucket, dst FROM bucket_move WHERE phase NOT IN ('DONE', 'ABORTED')"


@dataclass(frozen=True)
class Plan:
    """What the caller asks for. See open_sqlite_shards."""

    folder: Path
    service: str
    migrations: Path
    shard_count: int
    owned_by_first: bool


@dataclass(frozen=True)
class Prepared:
    """Files that are ready to be opened.

    Attributes:
        paths: by shard index.
        guarded_tables: those with a bucket column.
    """

    paths: list[Path]
    bucket_map: BucketMap
    schema: Schema
    guarded_tables: frozenset[str]


def prepare(plan: Plan) -> Prepared:
    """Make the folder ready.

    Raises:
        DatabaseRefused: a sentence for the operator says what is wrong and what to do.
    """
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        raise DatabaseRefused(
            f"this Python has SQLite {sqlite3.sqlite_version}, and RETURNING needs 3.35: use a "
            "newer Python"
        )
    migrations = load_migrations(FRAMEWORK_MIGRATIONS, area="framework")
    framework_count = len(migrations)
    migrations += load_migrations(plan.migrations, area=plan.service)
    hint = _control(plan)
    paths = [path_of(plan.folder, index) for index in range(_count_shards(plan))]
    owned: dict[int, list[int]] = {}
    _migrate_all(paths, migrations)
    for index, path in enumerate(paths):
        owned[index] = _claim_buckets(path, index, hint.buckets_of(index), migrations)
    _mark_made(plan)
    _add_arriving(plan, owned)
    try:
        bucket_map = BucketMap.of_owners(owned, version=hint.version)
    except CoverageBroken as error:
        raise DatabaseRefused(f"{plan.folder} does not hold every bucket once: {error}") from error
    framework = tables_made_by(migrations[:framework_count])
    schema, guarded = read_schema(paths[0], framework)
    return Prepared(paths, bucket_map, schema, guarded)


def add_shard(folder: Path, service: str, migrations: Path, weight: int, visit: Visit) -> int:
    """Make one more shard while the folder is used; returns its index.

    Killed at any point, a repeat or the service's next start finishes it. Blocking.

    Raises:
        DatabaseRefused: nothing was added; the sentence says why.
    """
    control, every = folder / "control.sqlite", _load_all(service, migrations)
    require_schema(_schema_version(folder), len(every), service)
    with sqlite_file(control, is_checked=True) as connection:
        connection.execute("BEGIN IMMEDIATE")
        index = _record(connection, folder, weight)
        connection.execute("COMMIT")
    visit("add.recorded")
    migrate_sqlite(path_of(folder, index), every)
    _claim_buckets(path_of(folder, index), index, (), every)
    visit("add.made")
    with sqlite_file(control, is_checked=True) as connection:
        connection.execute("UPDATE shard SET state = 'ACTIVE' WHERE shard_id = ?", (index,))
    visit("add.active")
    return index


def _record(connection: sqlite3.Connection, folder: Path, weight: int) -> int:
    left = connection.execute("SELECT shard_id FROM shard WHERE state = 'ADDING'").fetchone()
    if left is not None:
        index: int = left[0]
        connection.execute("UPDATE shard SET weight = ? WHERE shard_id = ?", (weight, index))
        return index
    index = connection.execute("SELECT count(*) FROM shard").fetchone()[0]
    require_room(index)
    path = path_of(folder, index)
    if path.exists():
        raise DatabaseRefused(f"{path} is there already, and is no shard of ours: move it away")
    connection.execute(
        "INSERT INTO shard (shard_id, dsn, weight, state) VALUES (?, ?, ?, 'ADDING')",
        (index, path.name, weight),
    )
    return index


def require_room(count: int) -> None:
    """Refuse a shard too many."""
    if count >= SHARD_COUNT_MAX:
        raise DatabaseRefused(f"there are {count} shards, and there may be no more")


def require_schema(found: int, ours: int, service: str) -> None:
    """Refuse to add a shard of another schema than the others have."""
    if found != ours:
        raise DatabaseRefused(
            f"the shards of {service} have {found} migrations and this release has {ours}: run "
            f"'python -m services migrate {service}' of the newer release first"
        )


def _load_all(service: str, migrations: Path) -> list[Migration]:
    framework = load_migrations(FRAMEWORK_MIGRATIONS, area="framework")
    return framework + load_migrations(migrations, area=service)


def _schema_version(folder: Path) -> int:
    with sqlite_file(path_of(folder, 0), is_checked=True) as connection:
        version: int = connection.execute("SELECT schema_version FROM tenfold_shard").fetchone()[0]
        return version


def path_of(folder: Path, index: int) -> Path:
    """Where a shard is."""
    return folder.absolute() / f"shard-{index}.sqlite"


def _count_shards(plan: Plan) -> int:
    """All that Control knows: those that were added are not in the setting."""
    with sqlite_file(plan.folder / "control.sqlite", is_checked=True) as connection:
        count: int = connection.execute("SELECT count(*) FROM shard").fetchone()[0]
        return count


def _control(plan: Plan) -> BucketMap:
    """The plan of the folder: made now if it is new, else what it was made with."""
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseRefused(f"cannot make the folder {plan.folder}: {error}") from error
    path = plan.folder / "control.sqlite"
    with sqlite_file(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_CONTROL_TABLES + MOVE_TABLE)
        connection.execute("BEGIN IMMEDIATE")
        hint = _plan_buckets(connection, plan)
        connection.execute("COMMIT")
        return hint


def _plan_buckets(connection: sqlite3.Connection, plan: Plan) -> BucketMap:
    rows = connection.execute("SELECT shard_id, epoch FROM bucket_map ORDER BY bucket").fetchall()
    if rows:
        hint = map_of_rows(rows)
    elif plan.owned_by_first:
        hint = BucketMap.first_owns_all()
    else:
        hint = BucketMap.even(plan.shard_count)
    if not rows:
        connection.executemany(
            "INSERT INTO bucket_map (bucket, shard_id, epoch) VALUES (?, ?, 1)",
            list(enumerate(hint.shard_indexes)),
        )
    known = [row[0] for row in connection.execute("SELECT shard_id FROM shard ORDER BY shard_id")]
    for index in range(len(known), plan.shard_count):
        connection.execute(
            "INSERT INTO shard (shard_id, dsn, weight, state) VALUES (?, ?, 1, 'NEW')",
            (index, f"shard-{index}.sqlite"),
        )
    _refuse_lost(connection, plan)
    return hint


def _refuse_lost(connection: sqlite3.Connection, plan: Plan) -> None:
    """Refuse to make a file anew that has been in use: it would hide what the lost one had."""
    rows = connection.execute("SELECT dsn FROM shard WHERE state = 'ACTIVE' ORDER BY shard_id")
    for (name,) in rows.fetchall():
        path = plan.folder / name
        if not path.is_file() or path.stat().st_size == 0:
            raise DatabaseRefused(
                f"{path} is missing or empty, and it has been in use: put it back, or restore "
                "the folder from a backup"
            )


def _migrate_all(paths: list[Path], migrations: list[Migration]) -> None:
    """Every shard, even if one fails: the others are then at the newest schema, each whole."""
    failures: list[str] = []
    first: Exception | None = None
    for path in paths:
        try:
            migrate_sqlite(path, migrations)
        except DatabaseRefused as error:
            failures.append(str(error))
            first = first or error
        except sqlite3.Error as error:
            failures.append(f"{path} was not migrated ({error}); the next start goes on")
            first = first or error
    if isinstance(first, DatabaseRefused) and len(failures) == 1:
        raise first
    if failures:
        raise MigrationRefused("; ".join(failures)) from first


def _mark_made(plan: Plan) -> None:
    with sqlite_file(plan.folder / "control.sqlite", is_checked=True) as connection:
        connection.execute("UPDATE shard SET state = 'ACTIVE' WHERE state <> 'ACTIVE'")


def _add_arriving(plan: Plan, owned: dict[int, list[int]]) -> None:
    known = {bucket for buckets in owned.values() for bucket in buckets}
    with sqlite_file(plan.folder / "control.sqlite", is_checked=True) as connection:
        for bucket, dst in connection.execute(_ARRIVING).fetchall():
            if bucket not in known:
                owned[dst].append(bucket)


def _claim_buckets(
    path: Path, index: int, planned: Collection[int], migrations: list[Migration]
) -> list[int]:
    """Say in a new shard which it is and what it owns; in an old one, read what it owns."""
    with sqlite_file(path, is_checked=True) as connection:
        connection.execute("BEGIN IMMEDIATE")
        row = connection.execute("SELECT shard_id FROM tenfold_shard").fetchone()
        if row is None:
            connection.execute(
                "INSERT INTO tenfold_shard (one, shard_id, timeline, schema_version) "
                "VALUES (1, ?, 1, ?)",
                (index, len(migrations)),
            )
            connection.executemany(
                "INSERT INTO tenfold_bucket (bucket, state, epoch) VALUES (?, 'ACTIVE', 1)",
                [(bucket,) for bucket in planned],
            )
        elif row[0] != index:
            raise DatabaseRefused(f"{path} is shard {row[0]}: files were swapped or renamed")
        connection.execute("UPDATE tenfold_shard SET schema_version = ?", (len(migrations),))
        owned = connection.execute(
            f"SELECT bucket FROM tenfold_bucket WHERE state IN {OWNED_STATES}"  # noqa: S608
        ).fetchall()
        connection.execute("COMMIT")
        return [bucket for (bucket,) in owned]
