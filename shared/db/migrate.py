"""Applies numbered SQL files, each once, forward only; then guards the tables they made.

A file is `0001_what.sql` for both engines, or `0001_what.sqlite.sql` and
`0001_what.postgres.sql` where triggers differ. What has been applied is remembered with
its SHA-256: a file that was changed or removed later is refused, and so is a data folder
that a newer version wrote.

Three kinds of triggers are generated for every table, so that no hand-written SQL can
forget them: a table with a `bucket` takes writes only while the shard may write that
bucket, what is written of a bucket on the move is marked, and the `version` of a row grows
by one with each update.
"""

import hashlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.db.crash_points import MIGRATED_NOT_COMMITTED
from shared.db.errors import DatabaseDamaged, DatabaseRefused, MigrationRefused
from shared.db.move.sqlite_shapes import capture_triggers, shape_of
from shared.db.sql import WRITABLE_STATES, to_sqlite

Engine = Literal["sqlite", "postgres"]
FRAMEWORK_MIGRATIONS = Path(__file__).parent / "migrations"
_FILE_NAME = re.compile(r"(?P<number>\d{4})_(?P<what>[a-z0-9_]+)(?:\.(?P<engine>sqlite|postgres))?")
UNGUARDED_PREFIX = "tenfold_"
# What is wrong around the file, not in it: locked, full, forbidden, gone.
_OUTSIDE_CODES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
    }
)
CREATE_MIGRATION_TABLE = """
CREATE TABLE IF NOT EXISTS tenfold_migration (
    area text NOT NULL, number bigint NOT NULL, name text NOT NULL, sha256 text NOT NULL,
    PRIMARY KEY (area, number))
"""


SELECT_APPLIED = "SELECT area, number, name, sha256 FROM tenfold_migration ORDER BY area, number"


@dataclass(frozen=True)
class Migration:
    """One file.

    Attributes:
        area: "framework", or the service's name.
        number: 1 and up, without a gap.
        name: the file's name without its extension.
        sha256: of the file's bytes, as hex.
        text: its SQL.
    """

    area: str
    number: int
    name: str
    sha256: str
    text: str


def load_migrations(folder: Path, *, area: str, engine: Engine = "sqlite") -> list[Migration]:
    """The files of one folder for one engine, by number.

    Raises:
        MigrationRefused: a name is malformed, a number is missing or taken twice.
    """
    found: list[Migration] = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.stem)
        if match is None:
            raise MigrationRefused(f"{path} is not named like 0001_what.sql")
        if match["engine"] not in {None, engine}:
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        found.append(Migration(area, int(match["number"]), path.stem, digest, content.decode()))
    for expected, migration in enumerate(found, start=1):
        if migration.number != expected:
            raise MigrationRefused(
                f"{folder} has {migration.name} where number {expected:04} belongs"
            )
    return found


def tables_made_by(migrations: Sequence[Migration]) -> frozenset[str]:
    """The tables that these files create, and the one that remembers them."""
    made: set[str] = {"tenfold_migration"}
    for migration in migrations:
        for line in migration.text.splitlines():
            if line.startswith("CREATE TABLE "):
                made.add(line.split()[2])
    return frozenset(made)


def migrate_sqlite(path: Path, migrations: Sequence[Migration]) -> None:
    """Bring one file to the newest schema, creating it if there is none.

    Blocking: call it in a thread. Killed at any point it leaves whole migrations only.

    Args:
        path: the database file.
        migrations: of every area, in the order in which to apply them.

    Raises:
        DatabaseDamaged: the file is not sound; nothing has been changed.
        MigrationRefused: it does not fit these migrations; nothing has been changed.
    """
    with sqlite_file(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(CREATE_MIGRATION_TABLE)
        applied = connection.execute(SELECT_APPLIED).fetchall()
        refuse_misfit(applied, str(path), migrations)
        for migration in migrations:
            _apply(connection, migration)
        _refresh_triggers(connection)


@contextmanager
def sqlite_file(path: Path, *, is_checked: bool = False) -> Iterator[sqlite3.Connection]:
    """Open a file for set-up, once it has been found sound. Blocking.

    Args:
        path: made if there is none.
        is_checked: the file has just been found sound; the check reads every page.

    Raises:
        DatabaseDamaged: it is not sound; it has not been changed.
        DatabaseRefused: it cannot be opened or written.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    except sqlite3.Error as error:
        raise DatabaseRefused(f"cannot open {path}: {error}") from error
    try:
        if not is_checked:
            _refuse_damage(connection, path)
        connection.execute("PRAGMA synchronous = FULL")
        yield connection
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in _OUTSIDE_CODES:
            raise DatabaseRefused(f"cannot open or write {path}: {error}") from error
        raise  # a migration is wrong: our bug, with its traceback
    finally:
        connection.close()


def _refuse_damage(connection: sqlite3.Connection, path: Path) -> None:
    try:
        findings = connection.execute("PRAGMA quick_check(1)").fetchall()
        finding = str(findings[0][0])
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in _OUTSIDE_CODES:
            raise
        finding = str(error)
    if finding != "ok":
        raise DatabaseDamaged(
            f"{path} is damaged ({' '.join(finding.split())}); it was left as it is. Restore it "
            f"from a backup, or save what can be read with: sqlite3 {path.name} .recover"
        )


def refuse_misfit(
    applied: Iterable[Sequence[Any]], place: str, migrations: Sequence[Migration]
) -> None:
    """Compare what a shard has applied with the files.

    Args:
        applied: rows of SELECT_APPLIED.
        place: names the shard to the operator.
        migrations: of every area.

    Raises:
        MigrationRefused: a newer version was there, or a file was changed or removed.
    """
    known = {(migration.area, migration.number): migration for migration in migrations}
    newest = {migration.area: migration.number for migration in migrations}
    for area, number, name, sha256 in applied:
        migration = known.get((area, number))
        if area not in newest and len(newest) > 1:
            raise MigrationRefused(
                f"{place} holds the data of {area}: it is another service's, name the right one"
            )
        if migration is None and number > newest.get(area, 0):
            raise MigrationRefused(
                f"{place} was written by a newer version (migration {name} of {area} is unknown "
                "here): start that version or a later one"
            )
        if migration is None:
            raise MigrationRefused(f"{place} has migration {name} of {area}, whose file is missing")
        if migration.sha256 != sha256:
            raise MigrationRefused(
                f"migration {migration.name} of {area} was changed after {place} applied it: "
                "put it back and write a new one"
            )


def _apply(connection: sqlite3.Connection, migration: Migration) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Asked inside the transaction: another process may have applied it meanwhile.
        known = "SELECT 1 FROM tenfold_migration WHERE area = ? AND number = ?"
        if connection.execute(known, (migration.area, migration.number)).fetchone() is None:
            for statement in statements_of(to_sqlite(migration.text)):
                connection.execute(statement)
            connection.execute(
                "INSERT INTO tenfold_migration (area, number, name, sha256) VALUES (?, ?, ?, ?)",
                (migration.area, migration.number, migration.name, migration.sha256),
            )
            MIGRATED_NOT_COMMITTED.visit()
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def statements_of(script: str) -> Iterator[str]:
    """The statements of a script; a trigger's body, semicolons and all, is one."""
    statement = ""
    for piece in re.split(r"(?<=;)", script):
        statement += piece
        if statement.strip() and sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip() and not _is_comment(statement):
        raise MigrationRefused(f"a statement has no end: {statement.strip()[:60]!r}")


def _is_comment(text: str) -> bool:
    return all(not line.strip() or line.strip().startswith("--") for line in text.splitlines())


# Generated triggers ---------------------------------------------------------------------


def _refresh_triggers(connection: sqlite3.Connection) -> None:
    wanted = dict(_triggers(connection))
    connection.execute("BEGIN IMMEDIATE")
    present = dict(
        connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'tenfold~_%' "
            "ESCAPE '~'"
        ).fetchall()
    )
    for name, sql in present.items():
        if sql != wanted.get(name):
            connection.execute(f'DROP TRIGGER "{name}"')
    for name, sql in wanted.items():
        if present.get(name) != sql:
            connection.execute(sql)
    connection.execute("COMMIT")


def _triggers(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' "
        "ESCAPE '~' ORDER BY name"
    )
    for (table,) in tables.fetchall():
        if table.startswith(UNGUARDED_PREFIX):
            continue
        columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
        names = {column[1] for column in columns}
        if "bucket" in names:
            yield from _guard_triggers(table)
            shape = shape_of(connection, table)
            if shape is not None:
                yield from capture_triggers(shape)
        if "version" in names:
            key = [column[1] for column in columns if column[5] > 0]
            yield from _version_triggers(table, key)


def _guard_triggers(table: str) -> Iterator[tuple[str, str]]:
    for operation, rows in (("INSERT", ("NEW",)), ("UPDATE", ("NEW", "OLD")), ("DELETE", ("OLD",))):
        # Without the coalesce an unknown bucket would pass: NULL NOT IN (...) is NULL.
        refused = " OR ".join(
            f"coalesce((SELECT state FROM tenfold_bucket WHERE bucket = {row}.bucket), 'ABSENT') "  # noqa: S608
            f"NOT IN {WRITABLE_STATES}"
            for row in rows
        )
        name = f"tenfold_guard_{table}_{operation.lower()}"
        yield (
            name,
            (
                f"CREATE TRIGGER {name} BEFORE {operation} ON {table} WHEN {refused} "
                "BEGIN SELECT RAISE(ABORT, 'bucket_not_admitted'); END"
            ),
        )


def _version_triggers(table: str, key: Sequence[str]) -> Iterator[tuple[str, str]]:
    same_row = " AND ".join(f"{column} = NEW.{column}" for column in key)
    name = f"tenfold_version_{table}_grows"
    yield (
        name,
        (
            f"CREATE TRIGGER {name} BEFORE UPDATE ON {table} "
            "WHEN NEW.version IS NOT OLD.version AND NEW.version IS NOT OLD.version + 1 "
            "BEGIN SELECT RAISE(ABORT, 'version_only_grows_by_one'); END"
        ),
    )
    # SQLite cannot change NEW before the write, hence a second write after it.
    name = f"tenfold_version_{table}_next"
    following = f"UPDATE {table} SET version = OLD.version + 1 WHERE {same_row}"  # noqa: S608
    yield (
        name,
        (
            f"CREATE TRIGGER {name} AFTER UPDATE ON {table} WHEN NEW.version = OLD.version "
            f"BEGIN {following}; END"
        ),
    )
