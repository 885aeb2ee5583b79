"""What a folder's shards say of themselves, read and never changed."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shared.db.errors import DatabaseRefused
from shared.db.ids import BUCKET_COUNT
from shared.db.move.protocol import OWNING, State
from shared.db.move.sqlite_shapes import bucketed_tables
from shared.db.shards import BucketMap

_STRAYS = """
SELECT count(*) FROM {table} WHERE bucket NOT IN (
    SELECT bucket FROM tenfold_bucket WHERE state NOT IN ('ABSENT', 'ABORTED'))
"""


@dataclass(frozen=True)
class Survey:
    """One shard.

    Attributes:
        size_bytes: of its file, without the log beside it.
        states: of every bucket that it knows, with its epoch.
        strays: by table, rows of buckets that the shard neither owns nor is sending or taking.
    """

    index: int
    path: Path
    size_bytes: int
    states: Mapping[int, tuple[State, int]]
    strays: Mapping[str, int]

    @property
    def owned(self) -> list[int]:
        """The buckets that it owns, ascending."""
        return sorted(bucket for bucket, (state, _) in self.states.items() if state in OWNING)


def survey_folder(folder: Path) -> list[Survey]:
    """Every shard of a folder, by index. Blocking.

    Raises:
        DatabaseRefused: a file cannot be read; named.
    """
    control = folder / "control.sqlite"
    if not control.is_file():
        raise DatabaseRefused(f"{folder} holds no shards: there is no file control.sqlite")
    count = _read(control, "SELECT count(*) FROM shard")[0][0]
    return [_survey(folder / f"shard-{index}.sqlite", index) for index in range(count)]


def disagreements(surveys: Sequence[Survey], bucket_map: BucketMap) -> Iterator[str]:
    """What is not as it must be, a sentence each.

    Buckets between two shards are among them: their move is to be settled.
    """
    for bucket in range(BUCKET_COUNT):
        owners = [
            survey.index
            for survey in surveys
            if bucket in survey.states and survey.states[bucket][0] in OWNING
        ]
        known = bucket_map.shard_index(bucket)
        if len(owners) > 1:
            yield f"bucket {bucket} is owned by shards {owners}: stop all writers and ask for help"
        elif not owners:
            yield f"bucket {bucket} is owned by no shard: settle its move"
        elif owners != [known]:
            yield f"bucket {bucket} is on shard {owners[0]}, the map says {known}: settle its move"
    for survey in surveys:
        for table, count in survey.strays.items():
            yield f"shard {survey.index} holds {count} rows of {table} of buckets it does not know"


def _survey(path: Path, index: int) -> Survey:
    with closing(_open(path)) as connection:
        rows = connection.execute("SELECT bucket, state, epoch FROM tenfold_bucket").fetchall()
        states = {bucket: (State(state), epoch) for bucket, state, epoch in rows}
        counts = {
            table: connection.execute(_STRAYS.format(table=table)).fetchone()[0]
            for table in bucketed_tables(connection)
        }
    strays = {table: count for table, count in counts.items() if count}
    return Survey(index, path, path.stat().st_size, states, strays)


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
