import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from shared.clock import SystemClock
from shared.db.ids import new_id
from shared.db.move.mover import Pace, Tools
from shared.db.move.sqlite_folder import SqliteFolder
from shared.db.port import Shards, Transaction
from shared.db.sqlite import open_sqlite_shards

MIGRATIONS = Path(__file__).parent / "migrations"
SECRET = b"a secret of thirty-two bytes...!"
BUCKET, NEIGHBOUR = 5, 6
"""Both begin on shard 0 of two."""

# The moves of tests are small and their machine is busy: no lease runs out, no pass is too slow.
PACE = Pace(page_rows=7, marks_max=7, backlog_max=50, pass_s_max=60.0, grace_s=0.0)

INSERT_COUNTER = """
INSERT INTO counter (bucket, id, tenant, owner, value, place) VALUES ($1, $2, 'default', $2, 0, $3)
"""
INSERT_NOTE = """
INSERT INTO note (bucket, id, tenant, owner, counter_id, body)
VALUES ($1, $2, 'default', $3, $3, $4)
"""
ADD_ONE = (
    "UPDATE counter SET value = value + 1 WHERE bucket = $1 AND id = $2 AND tenant = 'default'"
)
TABLES = ("counter", "note", "outbox", "event_counter", "idempotency", "inbox", "todo", "uniq")


@dataclass
class Place:
    """A folder of two shards, and what an operator sees in it."""

    path: Path

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Shards]:
        async with open_sqlite_shards(
            self.path,
            migrations=MIGRATIONS,
            shard_count=2,
            secret=SECRET,
            clock=SystemClock(),
            service="counters",
        ) as shards:
            yield shards

    @property
    def folder(self) -> SqliteFolder:
        return SqliteFolder(self.path)

    def rows(self, shard_index: int, sql: str, *arguments: object) -> list[tuple]:
        with closing(sqlite3.connect(self.path / f"shard-{shard_index}.sqlite")) as connection:
            connection.execute("PRAGMA busy_timeout = 5000")
            found = connection.execute(sql, arguments).fetchall()
            connection.commit()
            return found

    def states(self, bucket: int = BUCKET) -> list[str]:
        """What each shard says of the bucket, by shard."""
        sql = "SELECT state FROM tenfold_bucket WHERE bucket = ?"
        return [(self.rows(index, sql, bucket) or [("ABSENT",)])[0][0] for index in (0, 1)]

    def contents(self, shard_index: int, bucket: int = BUCKET) -> dict[str, list[tuple]]:
        """Rows of the bucket that a move must carry, by table, without a shard's own numbers."""
        found = {}
        for table in TABLES:
            columns = [row[1] for row in self.rows(shard_index, f"PRAGMA table_info({table})")]
            listed = ", ".join(column for column in columns if column != "seq")
            sql = f"SELECT {listed} FROM {table} WHERE bucket = ? ORDER BY {listed}"
            found[table] = self.rows(shard_index, sql, bucket)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "data")


@pytest.fixture
async def shards(place: Place) -> AsyncIterator[Shards]:
    async with place.open() as opened:
        yield opened


def tools(**options) -> Tools:
    return Tools(pace=PACE, **options)


async def add_counter(tx: Transaction, place_number: int) -> UUID:
    counter_id = new_id(tx.bucket)
    await tx.execute(INSERT_COUNTER, tx.bucket, counter_id, place_number)
    return counter_id


async def add_note(tx: Transaction, counter_id: UUID, body: str = "") -> UUID:
    note_id = new_id(tx.bucket)
    await tx.execute(INSERT_NOTE, tx.bucket, note_id, counter_id, body)
    return note_id


async def add_counters(shards: Shards, count: int, *, bucket: int = BUCKET) -> list[UUID]:
    async with shards.bucket(bucket).transaction() as tx:
        return [await add_counter(tx, number) for number in range(count)]
