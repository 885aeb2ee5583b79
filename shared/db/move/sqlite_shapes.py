"""A SQLite file's tables as a move sees them, and the triggers that mark what is written."""

import sqlite3
from collections.abc import Iterator

from shared.db.move.port import MoveRefused, Shape
from shared.db.move.shapes import shape_from

_CAPTURE = """CREATE TRIGGER {name} AFTER {operation} ON {table}
WHEN (SELECT state FROM tenfold_bucket WHERE bucket = {row}.bucket) = 'MOVING'
BEGIN
    INSERT INTO tenfold_dirty (bucket, tbl, pk) VALUES ({row}.bucket, '{table}', {key});{more}
END"""
_MORE = """
    INSERT INTO tenfold_dirty (bucket, tbl, pk)
    SELECT OLD.bucket, '{table}', {key} WHERE {key} <> {new_key};"""


def list_shapes(connection: sqlite3.Connection) -> list[Shape]:
    """Every table with a bucket.

    Raises:
        MoveRefused: one of them has no key that means the same on another shard.
    """
    shapes = []
    for table in bucketed_tables(connection):
        shape = shape_of(connection, table)
        if shape is None:
            raise MoveRefused(f"{table} has no key within its bucket: its rows cannot be moved")
        _refuse_references_out(connection, table)
        shapes.append(shape)
    return shapes


def bucketed_tables(connection: sqlite3.Connection) -> list[str]:
    """Tables whose rows belong to a bucket; not the framework's own books of it."""
    names = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' "
        "ESCAPE '~' AND name NOT LIKE 'tenfold~_%' ESCAPE '~' ORDER BY name"
    ).fetchall()
    return [
        name
        for (name,) in names
        if any(column[1] == "bucket" for column in _columns_of(connection, name))
    ]


def shape_of(connection: sqlite3.Connection, table: str) -> Shape | None:
    """A table's Shape, or None if no key of it would mean the same on another shard."""
    columns = _columns_of(connection, table)
    kinds = {column[1]: column[2].lower() for column in columns}
    primary = [
        column[1] for column in sorted(columns, key=lambda column: column[5]) if column[5] > 0
    ]
    is_numbered = len(primary) == 1 and kinds[primary[0]] == "integer"
    other_key = _other_key(connection, table) if is_numbered else ()
    return shape_from(table, kinds, primary, other_key)


def _columns_of(
    connection: sqlite3.Connection, table: str
) -> list[tuple[int, str, str, int, object, int]]:
    return connection.execute(f"PRAGMA table_info({table})").fetchall()


def _other_key(connection: sqlite3.Connection, table: str) -> tuple[str, ...]:
    for index in connection.execute(f"PRAGMA index_list({table})").fetchall():
        name, is_unique, is_partial = index[1], index[2], index[4]
        parts = [part[2] for part in connection.execute(f"PRAGMA index_info({name})").fetchall()]
        if is_unique and not is_partial and len(parts) == 1:
            return tuple(parts)
    return ()


def _refuse_references_out(connection: sqlite3.Connection, table: str) -> None:
    """A row that refers to another bucket's would be torn from it."""
    references: dict[int, list[tuple[str, str]]] = {}
    for row in connection.execute(f"PRAGMA foreign_key_list({table})").fetchall():
        references.setdefault(row[0], []).append((row[3], row[4]))
    for pairs in references.values():
        if ("bucket", "bucket") not in pairs:
            columns = ", ".join(column for column, _ in pairs)
            raise MoveRefused(
                f"{table} ({columns}) refers to rows of other buckets: they must stay on one shard"
            )


def capture_triggers(shape: Shape) -> Iterator[tuple[str, str]]:
    """Triggers that mark every row written while its bucket is MOVING; (name, SQL)."""
    new_key, old_key = _key_sql(shape, "NEW"), _key_sql(shape, "OLD")
    more = _MORE.format(table=shape.name, key=old_key, new_key=new_key)
    for operation, row, key, also in (
        ("INSERT", "NEW", new_key, ""),
        ("UPDATE", "NEW", new_key, more),
        ("DELETE", "OLD", old_key, ""),
    ):
        name = f"tenfold_capture_{shape.name}_{operation.lower()}"
        yield (
            name,
            _CAPTURE.format(
                name=name, operation=operation, table=shape.name, row=row, key=key, more=also
            ),
        )


def _key_sql(shape: Shape, row: str) -> str:
    return " || ',' || ".join(f"hex({row}.{column})" for column in shape.key)
