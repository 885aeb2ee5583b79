"""What makes a table movable, and how keys are written down; the same on both engines."""

from collections.abc import Mapping, Sequence
from uuid import UUID

from shared.db.move.port import Key, Shape

BINARY_KINDS = frozenset({"uuid", "bytea"})


def shape_from(
    table: str, kinds: Mapping[str, str], primary: Sequence[str], other_key: Sequence[str]
) -> Shape | None:
    """A table's Shape, or None if no key of it would mean the same on another shard.

    Args:
        table: its name.
        kinds: column -> declared type, in the table's order.
        primary: columns of the primary key.
        other_key: another unique column, for a table that each shard numbers by itself.
    """
    if len(primary) > 1 and primary[0] == "bucket":
        return Shape(table, tuple(kinds), tuple(primary[1:]), tuple(primary[1:]), "", kinds)
    if len(primary) == 1 and primary[0] != "bucket" and other_key:
        names = tuple(name for name in kinds if name != primary[0])
        return Shape(table, names, tuple(other_key), tuple(primary), primary[0], kinds)
    return None


def text_of_key(key: Sequence[object]) -> str:
    """A key as marks and cursors hold it: each column's bytes in hexadecimal."""
    return ",".join(_bytes_of(value).hex().upper() for value in key)


def key_of_text(shape: Shape, columns: Sequence[str], text: str) -> Key:
    """The values of these columns from what text_of_key made of them; a uuid as its bytes."""
    parts = [bytes.fromhex(part) for part in text.split(",")]
    return tuple(
        _value_of(part, shape.kinds[column]) for part, column in zip(parts, columns, strict=True)
    )


def _bytes_of(value: object) -> bytes:
    match value:
        case bytes():
            return value
        case UUID():
            return value.bytes
        case _:
            return str(value).encode()


def _value_of(content: bytes, kind: str) -> object:
    if kind in BINARY_KINDS:
        return content
    return content.decode() if kind == "text" else int(content)
