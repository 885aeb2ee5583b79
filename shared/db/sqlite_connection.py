"""One aiosqlite connection with its traps disarmed, and SQLite's errors in our words.

The traps (each has a test): a cancelled statement goes on in its thread, so it is
interrupted or waited out; connecting is shielded, or a cancelled caller would leave a
thread behind; threads are not daemons, so every connection is closed on the way out.
"""

import asyncio
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import aiosqlite
import structlog

from shared.db import limits
from shared.db.errors import (
    BucketElsewhere,
    BucketNotAdmitted,
    ConstraintViolation,
    UniqueViolation,
)
from shared.db.limits import CLOSE_S_MAX, RETRY_AFTER_S, no_room
from shared.db.port import Row
from shared.db.sql import to_sqlite, to_sqlite_value
from shared.db.tenancy import TenantCheck
from shared.errors import DeadlineExceeded, TenfoldError, Unavailable

Synchronous = Literal["FULL", "NORMAL"]
BUSY_TIMEOUT_MS = 5000
_UUID_BYTES = 16
_log = structlog.get_logger(__name__)
# A fenced bucket's rows are the newest there are until the fence's own time is over.
_READABLE = """
SELECT state, peer, state IN ('ACTIVE', 'MOVING')
    OR (state = 'FENCED' AND coalesce(fence_until_us, 0) > ?2) AS is_readable
FROM tenfold_bucket WHERE bucket = ?1
"""

sqlite3.register_converter("uuid", lambda content: UUID(bytes=content))
sqlite3.register_converter("boolean", lambda content: content != b"0")


@dataclass(frozen=True)
class Schema:
    """What must be known about a file's tables to speak with it.

    Attributes:
        uuid_columns: names that are uuid wherever they are used as a column.
        tenant_tables: the service's own tables, which no statement may use without tenant.
        unique_names: constraint names by the columns SQLite names in its message.
    """

    uuid_columns: frozenset[str]
    tenant_tables: frozenset[str]
    unique_names: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """What a statement did."""

    rows: Sequence[Row]
    changed: int


class Connection:
    """One open connection; statements run one after the other, in its own thread."""

    def __init__(self, connection: aiosqlite.Connection, schema: Schema, path: Path) -> None:
        self.raw = connection
        self._path = path
        self.schema = schema
        self._tenants = TenantCheck(schema.tenant_tables)

    @property
    def in_transaction(self) -> bool:
        """Whether a BEGIN has not met its COMMIT or ROLLBACK yet."""
        return self.raw.in_transaction

    async def run(self, sql: str) -> None:
        """Run one statement of our own without arguments: BEGIN, SAVEPOINT, PRAGMA."""
        await self._bounded(sql, ())

    async def fetch(self, sql: str, arguments: Sequence[object]) -> list[Row]:
        """Every row of a statement."""
        cursor = await self._bounded(sql, arguments, fetch=True)
        return self._rows(cursor)

    async def fetch_owned(
        self, bucket: int, sql: str, arguments: Sequence[object], *, now_us: int
    ) -> list[Row]:
        """Every row of a statement, if this file may speak for the bucket in that snapshot.

        Raises:
            BucketElsewhere: it may not.
        """
        rows = await self._bounded(sql, arguments, owned=(bucket, now_us))
        return self._rows(rows)

    async def execute(self, sql: str, arguments: Sequence[object]) -> int:
        """The number of rows that the statement changed."""
        cursor = await self._bounded(sql, arguments)
        return max(int(cursor.rowcount), 0)

    async def interrupt(self) -> None:
        """Stop what is running now; inside a transaction that rolls all of it back."""
        with suppress(ValueError):  # closed meanwhile
            await self.raw.interrupt()

    async def leave_transaction(self) -> None:
        """End what BEGIN may have begun.

        It waits in line behind a statement that was given up, so it also ends a BEGIN that
        is still to run; and it runs, however this call ends.
        """
        with suppress(sqlite3.Error, TenfoldError, ValueError):  # none is open; it is closed
            await self.run("ROLLBACK")

    async def close(self) -> None:
        """Close, and end the thread; safe to repeat."""
        with suppress(sqlite3.Error):
            await self.raw.close()

    async def _bounded(
        self,
        sql: str,
        arguments: Sequence[object],
        *,
        fetch: bool = False,
        owned: tuple[int, int] | None = None,
    ) -> Any:  # noqa: ANN401 - a cursor, or rows
        self._tenants.require(sql)
        text, values = to_sqlite(sql), [to_sqlite_value(argument) for argument in arguments]
        call = self.raw.execute_fetchall if fetch else self.raw.execute
        try:
            async with asyncio.timeout(limits.STATEMENT_S_MAX):
                if owned is not None:
                    # One visit to the connection's thread for the snapshot and all that it shows.
                    visit: Any = self.raw._execute  # untyped
                    return await visit(self._read_owned, owned, text, values)
                return await call(text, values)
        except TimeoutError:
            await self.interrupt()
            raise DeadlineExceeded(
                f"a statement ran longer than {limits.STATEMENT_S_MAX:g} s"
            ) from None
        except sqlite3.Error as error:
            raise self.translate(error) from error

    def _read_owned(
        self, owned: tuple[int, int], sql: str, values: Sequence[object]
    ) -> list[sqlite3.Row]:
        (bucket, now_us), raw = owned, self.raw._conn
        raw.execute("BEGIN")
        try:
            held = raw.execute(_READABLE, (bucket, now_us)).fetchone()
            if held is None or not held["is_readable"]:
                state, peer = (held["state"], held["peer"]) if held else ("ABSENT", None)
                raise BucketElsewhere(bucket, state, None if peer is None else int(peer))
            return raw.execute(sql, values).fetchall()
        finally:
            if raw.in_transaction:
                raw.execute("ROLLBACK")

    def _rows(self, rows: Sequence[sqlite3.Row]) -> list[Row]:
        if not rows:
            return []
        names = rows[0].keys()
        result: list[Row] = []
        for row in rows:
            values = dict(zip(names, row, strict=True))
            for name in self.schema.uuid_columns.intersection(values):
                # Aggregates carry no declared type, so the converter has not seen them.
                value = values[name]
                if type(value) is bytes and len(value) == _UUID_BYTES:
                    values[name] = UUID(bytes=value)
            result.append(values)
        return result

    def translate(self, error: sqlite3.Error) -> Exception:
        """SQLite's error as the port names it; errors that mean a bug stay as they are."""
        text = str(error)
        if isinstance(error, sqlite3.IntegrityError):
            return self._violation(text)
        if isinstance(error, sqlite3.OperationalError):
            return operational(error, self._path)
        return error

    def _violation(self, text: str) -> ConstraintViolation:
        kind, separator, what = text.partition(" constraint failed: ")
        if kind == "UNIQUE" and separator:
            name = what.removeprefix("index '").removesuffix("'")
            return UniqueViolation(self.schema.unique_names.get(what, name))
        if kind == "NOT NULL" and separator:
            return ConstraintViolation(f"not_null:{what}")
        if kind == "FOREIGN KEY constraint failed":
            return ConstraintViolation("foreign_key")
        if text.startswith("bucket_not_admitted"):
            return BucketNotAdmitted(text)
        return ConstraintViolation(what if separator else text)


_UNAVAILABLE_CODES = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_NOMEM,
    }
)


def operational(error: sqlite3.OperationalError, path: Path) -> Exception:
    """What is not the statement's fault, as the port names it; the rest stays as it is."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code
    if code == sqlite3.SQLITE_INTERRUPT:
        return Unavailable("the statement was interrupted", retry_after_s=RETRY_AFTER_S)
    if code in _UNAVAILABLE_CODES:
        # The caller is told no more than that; which of SQLite's many reasons it was is said here.
        _log.warning("shard.refuses", file=str(path), sqlite=error.sqlite_errorname)
        return no_room(path.stem) if code == sqlite3.SQLITE_FULL else unavailable()
    if "integer overflow" in str(error):
        return ConstraintViolation("integer_overflow")
    return error


def unavailable() -> TenfoldError:
    """The database cannot take this now; nothing has happened."""
    return Unavailable("the database cannot be written now", retry_after_s=RETRY_AFTER_S)


async def connect(path: Path, *, read_only: bool) -> aiosqlite.Connection:
    """Open a connection; a cancelled caller leaves no thread behind."""
    mode = "ro" if read_only else "rw"
    opening = asyncio.ensure_future(_open(f"{path.as_uri()}?mode={mode}"))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        with suppress(Exception):
            connection = await asyncio.wait_for(opening, CLOSE_S_MAX)
            await connection.close()
        raise


async def _open(uri: str) -> aiosqlite.Connection:
    connection = await aiosqlite.connect(
        uri, uri=True, isolation_level=None, detect_types=sqlite3.PARSE_DECLTYPES
    )
    connection.row_factory = sqlite3.Row
    return connection


async def open_connection(
    path: Path, schema: Schema, *, read_only: bool, synchronous: Synchronous
) -> Connection:
    """Open a connection with our settings: SQLite's defaults are wrong for a server."""
    connection = await connect(path, read_only=read_only)
    settings = [
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "foreign_keys = ON",
        "temp_store = MEMORY",
        f"synchronous = {synchronous}",
        "query_only = ON" if read_only else "journal_mode = WAL",
    ]
    try:
        for setting in settings:
            await connection.execute_fetchall(f"PRAGMA {setting}")
    except BaseException:
        await connection.close()
        raise
    return Connection(connection, schema, path)


def read_schema(path: Path, framework_tables: frozenset[str]) -> tuple[Schema, frozenset[str]]:
    """Read a migrated file's Schema, and the tables that have a bucket. Blocking.

    Args:
        path: the file.
        framework_tables: all other tables are the service's own.
    """
    connection = sqlite3.connect(path)
    try:
        return _read_schema(connection, framework_tables)
    finally:
        connection.close()


def _read_schema(
    connection: sqlite3.Connection, framework_tables: frozenset[str]
) -> tuple[Schema, frozenset[str]]:
    uuids: set[str] = set()
    others: set[str] = set()
    tenant_tables: set[str] = set()
    guarded: set[str] = set()
    unique_names: dict[str, str] = {}
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (table,) in tables:
        columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
        names = {column[1] for column in columns}
        for column in columns:
            (uuids if column[2].lower() == "uuid" else others).add(column[1])
        if "tenant" in names and table not in framework_tables:
            tenant_tables.add(table)
        if "bucket" in names and not table.startswith("tenfold_"):
            guarded.add(table)
        unique_names.update(_unique_names(connection, table, columns))
    schema = Schema(frozenset(uuids - others), frozenset(tenant_tables), unique_names)
    return schema, frozenset(guarded)


def _unique_names(
    connection: sqlite3.Connection, table: str, columns: Sequence[tuple[Any, ...]]
) -> dict[str, str]:
    """Constraint names as Postgres gives them, by what SQLite says: "t.a, t.b"."""
    key = sorted((column for column in columns if column[5] > 0), key=lambda column: column[5])
    names = {", ".join(f"{table}.{column[1]}" for column in key): f"{table}_pkey"} if key else {}
    for index in connection.execute(f"PRAGMA index_list({table})").fetchall():
        name, is_unique, origin = index[1], index[2], index[3]
        if not is_unique or origin == "pk":
            continue
        parts = connection.execute(f"PRAGMA index_info({name})").fetchall()
        fields = [part[2] for part in parts]
        if origin == "u":
            name = "_".join([table, *fields, "key"])
        names[", ".join(f"{table}.{field}" for field in fields)] = name
    return names
