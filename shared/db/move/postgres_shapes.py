"""A Postgres database's tables as a move sees them, and the triggers that mark what is written."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shared.db.move.port import MoveRefused, Shape
from shared.db.move.shapes import shape_from

_COLUMNS = """
SELECT class.relname AS tbl, field.attname AS name,
       format_type(field.atttypid, field.atttypmod) AS kind,
       array_position(key.indkey::int2[], field.attnum) AS key_position
FROM pg_class AS class
JOIN pg_attribute AS field ON field.attrelid = class.oid
LEFT JOIN pg_index AS key ON key.indrelid = class.oid AND key.indisprimary
WHERE class.relnamespace = 'public'::regnamespace AND class.relkind IN ('r', 'p')
    AND field.attnum > 0 AND NOT field.attisdropped AND class.relname NOT LIKE 'tenfold\\_%'
ORDER BY class.relname, field.attnum
"""
_UNIQUE = """
SELECT class.relname AS tbl, pg_get_expr(key.indpred, key.indrelid) AS condition,
       array(SELECT attname FROM unnest(key.indkey::int2[]) WITH ORDINALITY AS part (number, place)
             JOIN pg_attribute ON attrelid = key.indrelid AND attnum = number ORDER BY place
       )::text[] AS columns
FROM pg_index AS key JOIN pg_class AS class ON class.oid = key.indrelid
WHERE class.relnamespace = 'public'::regnamespace AND key.indisunique AND NOT key.indisprimary
    AND key.indexprs IS NULL
ORDER BY key.indexrelid
"""
_REFERENCES = """
SELECT conrelid::regclass::text AS tbl,
       array(SELECT attname FROM unnest(conkey) AS part
             JOIN pg_attribute ON attrelid = conrelid AND attnum = part)::text[] AS columns
FROM pg_constraint WHERE contype = 'f' AND connamespace = 'public'::regnamespace
"""
_OWN_TRIGGERS = """
SELECT tgrelid::regclass::text AS tbl, tgname AS name FROM pg_trigger
WHERE NOT tgisinternal AND tgname NOT LIKE 'tenfold\\_%'
"""
_CAPTURE = """
CREATE OR REPLACE FUNCTION tenfold_capture_{table}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'DELETE' AND tenfold_is_moving(NEW.bucket) THEN
        INSERT INTO tenfold_dirty (bucket, tbl, pk) VALUES (NEW.bucket, '{table}', {new_key});
    END IF;
    IF TG_OP = 'DELETE' AND tenfold_is_moving(OLD.bucket) THEN
        INSERT INTO tenfold_dirty (bucket, tbl, pk) VALUES (OLD.bucket, '{table}', {old_key});
    ELSIF TG_OP = 'UPDATE' AND {old_key} <> {new_key} AND tenfold_is_moving(OLD.bucket) THEN
        INSERT INTO tenfold_dirty (bucket, tbl, pk) VALUES (OLD.bucket, '{table}', {old_key});
    END IF;
    RETURN NULL;
END
$$;
DROP TRIGGER IF EXISTS tenfold_capture ON {table};
CREATE TRIGGER tenfold_capture AFTER INSERT OR UPDATE OR DELETE ON {table} FOR EACH ROW
WHEN (current_setting('tenfold.capture', true) = '1') EXECUTE FUNCTION tenfold_capture_{table}();
"""


@dataclass(frozen=True)
class Unique:
    """A unique index beside the primary key.

    Attributes:
        condition: of a partial one, as SQL; or "".
    """

    columns: Sequence[str]
    condition: str


@dataclass(frozen=True)
class Tables:
    """What is known of a database's bucketed tables."""

    shapes: Sequence[Shape]
    uniques: dict[str, list[Unique]]


async def read_shapes(connection: Any) -> list[Shape]:  # noqa: ANN401 - asyncpg is untyped
    """Every table with a bucket whose rows can be told apart on another shard."""
    tables: dict[str, list[Any]] = defaultdict(list)
    for row in await connection.fetch(_COLUMNS):
        tables[row["tbl"]].append(row)
    uniques = await _read_uniques(connection)
    shapes = []
    for table, rows in tables.items():
        kinds = {row["name"]: row["kind"] for row in rows}
        if "bucket" not in kinds:
            continue
        keyed = [row for row in rows if row["key_position"] is not None]
        primary = [row["name"] for row in sorted(keyed, key=lambda row: row["key_position"])]
        singles = [
            unique.columns
            for unique in uniques[table]
            if len(unique.columns) == 1 and not unique.condition
        ]
        shape = shape_from(table, kinds, primary, singles[0] if singles else ())
        shapes.append(shape or Shape(table, tuple(kinds), (), (), "", kinds))
    return shapes


async def read_tables(connection: Any, *, is_verbatim: bool) -> Tables:  # noqa: ANN401
    """Every table with a bucket, if all of them can be moved.

    Args:
        connection: a raw one.
        is_verbatim: rows can be imported without asking triggers and foreign keys.

    Raises:
        MoveRefused: one cannot be moved; the sentence says why.
    """
    shapes = await read_shapes(connection)
    moved = {shape.name for shape in shapes}
    for shape in shapes:
        if not shape.key:
            raise MoveRefused(
                f"{shape.name} has no key within its bucket: its rows cannot be moved"
            )
    for row in await connection.fetch(_REFERENCES):
        if row["tbl"] in moved and "bucket" not in row["columns"]:
            columns = ", ".join(row["columns"])
            raise MoveRefused(
                f"{row['tbl']} ({columns}) refers to rows of other buckets: they must stay on one "
                "shard"
            )
        if row["tbl"] in moved and not is_verbatim:
            raise MoveRefused(_not_verbatim(f"{row['tbl']} has a foreign key"))
    for row in await connection.fetch(_OWN_TRIGGERS):
        if row["tbl"] in moved and not is_verbatim:
            raise MoveRefused(_not_verbatim(f"{row['tbl']} has the trigger {row['name']}"))
    return Tables(shapes, await _read_uniques(connection))


def _not_verbatim(what: str) -> str:
    return (
        f"{what}, and this role may not import rows past it: as a superuser, GRANT SET ON "
        "PARAMETER session_replication_role to it"
    )


async def _read_uniques(connection: Any) -> dict[str, list[Unique]]:  # noqa: ANN401
    uniques: dict[str, list[Unique]] = defaultdict(list)
    for row in await connection.fetch(_UNIQUE):
        uniques[row["tbl"]].append(Unique(row["columns"], row["condition"] or ""))
    return uniques


def capture_triggers(shapes: Sequence[Shape]) -> Iterator[str]:
    """SQL that makes the triggers which mark every row written while its bucket is MOVING."""
    for shape in shapes:
        if shape.key:
            new_key, old_key = _key_sql(shape, "NEW"), _key_sql(shape, "OLD")
            yield _CAPTURE.format(table=shape.name, new_key=new_key, old_key=old_key)


def _key_sql(shape: Shape, row: str) -> str:
    return " || ',' || ".join(
        f"upper(encode({_bytes_sql(f'{row}.{column}', shape.kinds[column])}, 'hex'))"
        for column in shape.key
    )


def _bytes_sql(column: str, kind: str) -> str:
    if kind == "uuid":
        return f"uuid_send({column})"
    return column if kind == "bytea" else f"convert_to({column}::text, 'UTF8')"
