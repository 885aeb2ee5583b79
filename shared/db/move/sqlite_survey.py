"""What a folder's shards say of themselves, read and never changed."""

import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path

from shared.db.errors import DatabaseRefused
from shared.db.move.protocol import State
from shared.db.move.sqlite_shapes import bucketed_tables
from shared.db.move.survey import STRAYS, Survey

SAMPLE_ROWS = 200


def survey_folder(folder: Path) -> list[Survey]:
    """Every shard of a folder, by index. Blocking.

    Raises:
        DatabaseRefused: a file cannot be read; named.
    """
    control = folder / "control.sqlite"
    if not control.is_file():
        raise DatabaseRefused(f"{folder} holds no shards: there is no file control.sqlite")
    count = _read(control, "SELECT count(*) FROM shard WHERE state = 'ACTIVE'")[0][0]
    return [_survey(folder / f"shard-{index}.sqlite", index) for index in range(count)]


def measure_file(path: Path) -> dict[int, int]:
    """About how many bytes of rows each bucket has in a shard. Blocking.

    Rows are counted in the index that every table has by bucket, and weighed by the mean of a few
    of them: no page of a large table is read for it.

    Raises:
        DatabaseRefused: the file cannot be read; named.
    """
    sizes: dict[int, int] = defaultdict(int)
    try:
        with closing(_open(path)) as connection:
            for table in bucketed_tables(connection):
                row_bytes = _row_bytes(connection, table)
                sql = f"SELECT bucket, count(*) FROM {table} GROUP BY bucket"  # noqa: S608
                for bucket, count in connection.execute(sql):
                    sizes[bucket] += int(count * row_bytes)
    except sqlite3.Error as error:
        raise DatabaseRefused(f"cannot read {path}: {error}") from error
    return sizes


def _row_bytes(connection: sqlite3.Connection, table: str) -> float:
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    row_bytes = " + ".join(f"coalesce(length(CAST({name} AS blob)), 0)" for name in columns)
    sql = f"SELECT avg({row_bytes}) FROM (SELECT * FROM {table} LIMIT {SAMPLE_ROWS})"  # noqa: S608
    return float(connection.execute(sql).fetchone()[0] or 0.0)


def _survey(path: Path, index: int) -> Survey:
    with closing(_open(path)) as connection:
        rows = connection.execute("SELECT bucket, state, epoch FROM tenfold_bucket").fetchall()
        states = {bucket: (State(state), epoch) for bucket, state, epoch in rows}
        counts = {
            table: connection.execute(STRAYS.format(table=table)).fetchone()[0]
            for table in bucketed_tables(connection)
        }
    strays = {table: count for table, count in counts.items() if count}
    return Survey(index, str(path), path.stat().st_size, states, strays)


def _read(path: Path, sql: str) -> list[tuple[int]]:
    with closing(_open(path)) as connection:
        return connection.execute(sql).fetchall()


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        connection.execute("PRAGMA busy_timeout = 5000")
    except sqlite3.Error as error:
        raise DatabaseRefused(f"cannot read {path}: {error}") from error
    return connection
