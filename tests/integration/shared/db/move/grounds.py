"""Where buckets move in tests: a folder of SQLite files, or Postgres databases.

A ground can be named, so that other processes write on it and move its buckets.
"""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import UUID

from shared.clock import SystemClock
from shared.db.ids import new_id
from shared.db.move.mover import Pace, Tools
from shared.db.move.place import Place as MovePlace
from shared.db.move.postgres_place import PostgresPlace
from shared.db.move.sqlite_folder import SqliteFolder
from shared.db.port import Shards, Transaction
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_connection import Server
from shared.db.postgres_primary import connect_to_primary
from shared.db.postgres_shards import parse_servers
from shared.db.sqlite import open_sqlite_shards

T = TypeVar("T")
MIGRATIONS = Path(__file__).parent / "migrations"
SECRET = b"a secret of thirty-two bytes...!"
SERVICE = "counters"
BUCKET, NEIGHBOUR = 5, 6
"""Both begin on shard 0 of two."""

# The moves of tests are small and their machine is busy: no lease runs out, no pass is too slow.
PACE = Pace(page_rows=7, marks_max=7, backlog_max=50, pass_s_max=60.0, grace_s=0.0, rest_share=0)

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
TOUCH = "UPDATE counter SET place = place WHERE bucket = {} AND place = 0"
ENTER = "SELECT tenfold_enter(ARRAY[{}])"
TABLES = ("counter", "note", "outbox", "event_counter", "idempotency", "inbox", "todo", "uniq")


class Ground(Protocol):
    """What a story needs of either engine; it is told from outside, as by an operator."""

    @property
    def name(self) -> str:
        """How another process finds it: see ground_of."""
        ...

    @property
    def shard_count(self) -> int:
        """How many shards it has."""
        ...

    @property
    def moves(self) -> MovePlace:
        """As an operator's mover sees it."""
        ...

    def open(self) -> AbstractAsyncContextManager[Shards]:
        """As the service does."""
        ...

    def read(self, shard_index: int, sql: str) -> list[tuple]:
        """What an operator's SELECT finds in one shard, whatever the state of its buckets."""
        ...

    def touch(self, shard_index: int, bucket: int) -> None:
        """A write that changes no more than a row's version."""
        ...


def states_of(ground: Ground, bucket: int) -> list[str]:
    """What each shard says of the bucket, by shard."""
    sql = f"SELECT state FROM tenfold_bucket WHERE bucket = {bucket}"
    return [(ground.read(index, sql) or [("ABSENT",)])[0][0] for index in range(ground.shard_count)]


def ids_of(ground: Ground, shard_index: int, sql: str) -> set[UUID]:
    """The ids that a SELECT of one column finds; SQLite has them as bytes."""
    found = [value for (value,) in ground.read(shard_index, sql)]
    return {UUID(bytes=value) if isinstance(value, bytes) else value for value in found}


@dataclass
class Place:
    """See Ground. A folder of SQLite shards, and what an operator sees in it."""

    path: Path
    shard_count: int = 2

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Shards]:
        """See Ground.open."""
        async with open_sqlite_shards(
            self.path,
            migrations=MIGRATIONS,
            shard_count=self.shard_count,
            secret=SECRET,
            clock=SystemClock(),
            service=SERVICE,
        ) as shards:
            yield shards

    @property
    def name(self) -> str:
        """See Ground.name."""
        return json.dumps({"path": str(self.path)})

    @property
    def folder(self) -> SqliteFolder:
        """See Ground.moves."""
        return SqliteFolder(self.path)

    moves = folder

    def read(self, shard_index: int, sql: str) -> list[tuple]:
        """See Ground.read."""
        return self.rows(shard_index, sql)

    def touch(self, shard_index: int, bucket: int) -> None:
        """See Ground.touch."""
        self.rows(shard_index, TOUCH.format(bucket))

    def rows(self, shard_index: int, sql: str, *arguments: object) -> list[tuple]:
        """What a statement finds in one shard."""
        with closing(sqlite3.connect(self.path / f"shard-{shard_index}.sqlite")) as connection:
            connection.execute("PRAGMA busy_timeout = 5000")
            found = connection.execute(sql, arguments).fetchall()
            connection.commit()
            return found

    def states(self, bucket: int = BUCKET) -> list[str]:
        """See states_of."""
        return states_of(self, bucket)

    def contents(self, shard_index: int, bucket: int = BUCKET) -> dict[str, list[tuple]]:
        """Rows of the bucket that a move must carry, by table, without a shard's own numbers."""
        found = {}
        for table in TABLES:
            columns = [row[1] for row in self.rows(shard_index, f"PRAGMA table_info({table})")]
            listed = ", ".join(column for column in columns if column != "seq")
            sql = f"SELECT {listed} FROM {table} WHERE bucket = ? ORDER BY {listed}"
            found[table] = self.rows(shard_index, sql, bucket)
        return found


@dataclass
class Databases:
    """See Ground. Postgres shards, and what an operator sees in them.

    Attributes:
        service: as the service's setting names them.
        operator: the DSNs of one who may do anything, by shard.
    """

    service: str
    operator: Sequence[str]
    servers: list[Server] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """The same hosts, for us."""
        self.servers = parse_servers(",".join(self.operator), service=SERVICE)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Shards]:
        """See Ground.open."""
        async with open_postgres_shards(
            parse_servers(self.service, service=SERVICE),
            migrations=MIGRATIONS,
            secret=SECRET,
            clock=SystemClock(),
            service=SERVICE,
        ) as shards:
            yield shards

    @property
    def name(self) -> str:
        """See Ground.name."""
        return json.dumps({"service": self.service, "operator": list(self.operator)})

    @property
    def shard_count(self) -> int:
        """See Ground.shard_count."""
        return len(self.servers)

    @property
    def place(self) -> PostgresPlace:
        """See Ground.moves."""
        return PostgresPlace(self.servers)

    moves = place

    def read(self, shard_index: int, sql: str) -> list[tuple]:
        """See Ground.read."""
        return meanwhile(self.rows, shard_index, sql)

    def touch(self, shard_index: int, bucket: int) -> None:
        """See Ground.touch."""
        enter = ENTER.format(bucket)
        meanwhile(self.rows, shard_index, TOUCH.format(bucket), prefix=enter)

    async def rows(self, shard_index: int, sql: str, *, prefix: str = "") -> list[tuple]:
        """What a statement finds in one shard, after others in the same transaction."""
        connection = await connect_to_primary(self.servers[shard_index])
        try:
            async with connection.transaction():
                if prefix:
                    await connection.execute(prefix)
                return [tuple(row) for row in await connection.fetch(sql)]
        finally:
            await connection.close()

    async def states(self) -> list[str]:
        """See states_of."""
        return await asyncio.to_thread(states_of, self, BUCKET)

    async def contents(self, shard_index: int) -> dict[str, list[tuple]]:
        """See Place.contents."""
        found = {}
        for table in TABLES:
            columns = await self.rows(
                shard_index,
                "SELECT attname FROM pg_attribute WHERE attnum > 0 AND attname <> 'seq' "
                f"AND attrelid = '{table}'::regclass ORDER BY attnum",
            )
            listed = ", ".join(column for (column,) in columns)
            sql = f"SELECT {listed} FROM {table} WHERE bucket = {BUCKET} ORDER BY {listed}"
            found[table] = await self.rows(shard_index, sql)
        return found

    async def write(self, sql: str) -> None:
        """What an operator writes into the bucket, on its first shard."""
        await self.rows(0, sql, prefix=ENTER.format(BUCKET))


def ground_of(name: str) -> Ground:
    """The ground that another process calls by this name."""
    told = json.loads(name)
    return Place(Path(told["path"])) if "path" in told else Databases(**told)


def meanwhile(work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **options: Any) -> T:
    """Run a coroutine function to its end, as another process would; this one stands still."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work(*arguments, **options))).result()


def tools(**options: Any) -> Tools:
    """What a mover of a test has."""
    return Tools(pace=PACE, **options)


async def add_counter(tx: Transaction, place_number: int) -> UUID:
    """A new counter at zero."""
    counter_id = new_id(tx.bucket)
    await tx.execute(INSERT_COUNTER, tx.bucket, counter_id, place_number)
    return counter_id


async def add_note(
    tx: Transaction, counter_id: UUID, body: str = "", *, note_id: UUID | None = None
) -> UUID:
    """A new note of a counter."""
    note_id = note_id or new_id(tx.bucket)
    await tx.execute(INSERT_NOTE, tx.bucket, note_id, counter_id, body)
    return note_id


async def add_counters(shards: Shards, count: int, *, bucket: int = BUCKET) -> list[UUID]:
    """New counters of one bucket, their places from 0 on."""
    async with shards.bucket(bucket).transaction() as tx:
        return [await add_counter(tx, number) for number in range(count)]
