"""One SQL text for two engines: what is written in stores, as SQLite reads it.

Stores write the subset of shared/db/port.py. Three words are macros:

    tenfold_bucket_of(x)  the bucket that the uuid x carries
    tenfold_owned(x)      whether this shard owns bucket x in this snapshot
    tenfold_identity      a growing integer primary key
"""

import re
from functools import lru_cache
from uuid import UUID

SqliteValue = int | str | bytes | None

# A string literal, a quoted name or a comment is left alone; what follows it is not.
_OPAQUE = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/"
_TOKENS = re.compile(
    rf"(?P<opaque>{_OPAQUE})"
    r"|\$(?P<parameter>\d+)"
    r"|\bFOR\s+UPDATE(?:\s+SKIP\s+LOCKED)?\s*(?=;?\s*\Z)"
    r"|\btenfold_bucket_of\((?P<bucket_of>[\w.]+)\)"
    r"|\btenfold_owned\((?P<owned>[\w.]+)\)"
    r"|\b(?P<identity>tenfold_identity)\b",
    re.IGNORECASE | re.DOTALL,
)
OWNED_STATES = "('ACTIVE', 'MOVING', 'FENCED')"
WRITABLE_STATES = "('ACTIVE', 'MOVING')"
STATEMENTS_CACHED_MAX = 2048


def _hex_digit(column: str, position: int) -> str:
    return f"(instr('0123456789ABCDEF', substr(hex(substr({column}, 7, 2)), {position}, 1)) - 1)"


def bucket_expression(column: str) -> str:
    """Plain SQLite SQL for the bucket in a 16-byte uuid: bytes 7 and 8 less the version."""
    digits = [_hex_digit(column, position) for position in (2, 3, 4)]
    return f"({digits[0]} * 256 + {digits[1]} * 16 + {digits[2]})"


def _replace(match: re.Match[str]) -> str:
    if match["opaque"] is not None:
        return match["opaque"]
    if match["parameter"] is not None:
        return f"?{match['parameter']}"
    if match["bucket_of"] is not None:
        return bucket_expression(match["bucket_of"])
    if match["owned"] is not None:
        owned = f"SELECT bucket FROM tenfold_bucket WHERE state IN {OWNED_STATES}"  # noqa: S608
        return f"{match['owned']} IN ({owned})"
    if match["identity"] is not None:
        return "INTEGER PRIMARY KEY AUTOINCREMENT"
    return ""  # FOR UPDATE: the writer is alone


@lru_cache(STATEMENTS_CACHED_MAX)
def to_sqlite(sql: str) -> str:
    """The statement as SQLite reads it: $1 as ?1, macros expanded, FOR UPDATE dropped."""
    return _TOKENS.sub(_replace, sql)


def to_sqlite_value(value: object) -> SqliteValue:
    """A bound argument as SQLite stores it: a uuid as its 16 bytes.

    Raises:
        TypeError: a type outside the shared subset; a moment is bound as to_us(moment).
    """
    match value:
        case UUID():
            return value.bytes
        case bool():
            return int(value)
        case None | int() | str() | bytes():
            return value
    raise TypeError(f"cannot bind {type(value).__name__}; use uuid, int, str, bytes, bool or None")
