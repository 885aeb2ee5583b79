"""Shards as SQLite files: the embedded engine behind shared/db/port.py.

Each shard is one file in WAL mode with one writer (shared/db/sqlite_writer.py) and a few
readers that are opened when first needed. `control.sqlite` remembers how many shards there
are and which buckets each was given when it was made; who owns a bucket now is in each
shard's `tenfold_bucket`.

There is no replica of a file: causal reads ask the file itself, by the same rules, and a commit
leaves a position in the caller's token as it does on Postgres.

Money is opened with synchronous FULL. NORMAL survives a killed process; a power cut may
take the last commits.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import UUID

from shared import causal, deadline
from shared.clock import Clock, to_us
from shared.db import once as once_rules
from shared.db import sqlite_files
from shared.db.causal_reader import CausalReader
from shared.db.crash_points import CLAIMED_NOT_EFFECTED
from shared.db.errors import BucketElsewhere, DatabaseRefused
from shared.db.following import Following, moving
from shared.db.growing import Growth, run_learning
from shared.db.ids import BUCKET_COUNT, bucket_of, new_id
from shared.db.limits import RETRY_AFTER_S
from shared.db.load import LoadMeter, run_telling
from shared.db.move.mover import Tools
from shared.db.move.place import settle_left
from shared.db.move.port import MoveFailed
from shared.db.move.sqlite_folder import SqliteFolder
from shared.db.outbox_rows import EVERY_BUCKET, insert_outbox_row
from shared.db.port import (
    Bucket,
    Covered,
    Once,
    OutboxRow,
    Reader,
    Row,
    Shard,
    Shards,
    Transaction,
    only,
)
from shared.db.shards import BucketMap
from shared.db.sql import OWNED_STATES, WRITABLE_STATES
from shared.db.sqlite_connection import (
    Connection,
    Schema,
    Synchronous,
    open_connection,
    operational,
)
from shared.db.sqlite_writer import Turn, Writer
from shared.errors import DeadlineExceeded, FailedPrecondition, Overloaded

READERS_MAX = 4
READS_WAITING_MAX = 1024
READ_S_MAX = 10.0
_OWNED = f"SELECT bucket, epoch FROM tenfold_bucket WHERE state IN {OWNED_STATES}"  # noqa: S608
_WRITABLE = f"SELECT bucket FROM tenfold_bucket WHERE state IN {WRITABLE_STATES}"  # noqa: S608
_OWNS = f"SELECT 1 AS owns FROM tenfold_bucket WHERE bucket = $1 AND state IN {OWNED_STATES}"  # noqa: S608
_HELD = "SELECT state, peer FROM tenfold_bucket WHERE bucket = $1"
_DECIDES = "inside a transaction nothing may rest on a replica's answer: read through it"
_GUARD = """
CREATE TEMP TRIGGER admitted_{table}_{operation} BEFORE {operation} ON main.{table}
WHEN NOT tenfold_is_admitted({row}.bucket)
BEGIN SELECT RAISE(ABORT, 'bucket_not_admitted: {table}'); END
"""


class SqliteTransaction:
    """See Transaction."""

    def __init__(self, turn: Turn, bucket: int, shard: "SqliteShard") -> None:
        self._turn = turn
        self._bucket = bucket
        self._shard = shard
        self.memory: once_rules.Memory | None = None

    @property
    def bucket(self) -> int:
        """See Transaction.bucket."""
        return self._bucket

    @property
    def answered(self) -> bool:
        """See Transaction.answered."""
        return self.memory is not None and self.memory.answered

    @property
    def answer(self) -> bytes:
        """See Transaction.answer."""
        return self.memory.answer if self.memory is not None else b""

    async def fetch_one(self, sql: str, *arguments: object) -> Row | None:
        """See Transaction.fetch_one."""
        return only(await self._turn.fetch(sql, arguments))

    async def fetch_all(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See Transaction.fetch_all."""
        return await self._turn.fetch(sql, arguments)

    async def execute(self, sql: str, *arguments: object) -> int:
        """See Transaction.execute."""
        return await self._turn.execute(sql, arguments)

    async def append_outbox(self, row: OutboxRow) -> None:
        """See Transaction.append_outbox."""
        now_us, event_id = self._shard.now_us(), new_id(max(self._bucket, 0))
        service = self._shard.service
        await insert_outbox_row(self, row, service=service, event_id=event_id, now_us=now_us)
        self._turn.has_outbox = True

    def wake_relay(self) -> None:
        """See Transaction.wake_relay."""
        self._turn.has_outbox = True

    async def answer_with(self, payload: bytes) -> None:
        """See Transaction.answer_with."""
        if self.memory is not None:
            self.memory.answer = payload


@dataclass
class SqliteShard:
    """See Shard. One file: its writer and its readers.

    Attributes:
        causal_reads: whether commits leave positions.
    """

    index: int
    path: Path
    service: str
    schema: Schema
    clock: Clock
    writer: Writer
    causal_reads: bool = False
    readers: list[Connection] = field(default_factory=list)
    idle: list[Connection] = field(default_factory=list)
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(READERS_MAX))
    reads_waiting: int = 0

    def now_us(self) -> int:
        """The current moment, as tables store it."""
        return to_us(self.clock.now())

    async def fetch_one(self, sql: str, *arguments: object) -> Row | None:
        """See Reader.fetch_one."""
        return only(await self.fetch_all(sql, *arguments))

    async def fetch_all(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See Reader.fetch_all."""
        async with self.reading() as reader:
            return await reader.fetch(sql, arguments)

    async def fetch_owned(self, bucket: int, sql: str, *arguments: object) -> Sequence[Row]:
        """Rows of a statement on one bucket.

        Raises:
            BucketElsewhere: this shard may not speak for it.
        """
        async with self.reading() as reader:
            return await reader.fetch_owned(bucket, sql, arguments, now_us=self.now_us())

    async def fetch_covered(self, sql: str, *arguments: object, is_causal: bool = False) -> Covered:
        """See Shard.fetch_covered."""
        if is_causal:
            self.require_no_decision()
        async with self.reading() as reader:
            await reader.run("BEGIN")
            owned = await reader.fetch(_OWNED, ())
            rows = await reader.fetch(sql, arguments)
            await reader.run("ROLLBACK")  # after an error, reading() does it
        return Covered(rows, {row["bucket"]: row["epoch"] for row in owned})

    def require_no_decision(self) -> None:
        """Refuse what on Postgres a replica might answer, inside a transaction: a ValueError."""
        if self.writer.is_ours:
            raise ValueError(_DECIDES)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Connection]:
        """Borrow a reader; a read that failed leaves it as if it had never been.

        A cancelled one is interrupted, so that the next need not wait for it.
        """
        if self.reads_waiting >= READS_WAITING_MAX:
            raise Overloaded("too many reads are waiting", retry_after_s=RETRY_AFTER_S)
        self.reads_waiting += 1
        try:
            async with asyncio.timeout(deadline.timeout_s(READ_S_MAX)):
                await self.free.acquire()
        except TimeoutError:
            raise DeadlineExceeded("the time was spent waiting for a reader") from None
        finally:
            self.reads_waiting -= 1
        try:
            reader = self.idle.pop() if self.idle else await self._open_reader()
            try:
                yield reader
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError):
                    await reader.interrupt()
                await reader.leave_transaction()
                raise
            finally:
                self.idle.append(reader)
        finally:
            self.free.release()

    async def _open_reader(self) -> Connection:
        try:
            reader = await open_connection(
                self.path, self.schema, read_only=True, synchronous="NORMAL"
            )
        except sqlite3.OperationalError as error:
            raise operational(error, self.path) from error
        self.readers.append(reader)
        return reader

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """See Shard.transaction."""
        async with self.writer.turn() as turn:
            turn.admit([row["bucket"] for row in await turn.fetch(_WRITABLE, ())])
            yield SqliteTransaction(turn, EVERY_BUCKET, self)

    @asynccontextmanager
    async def admitted(
        self, bucket: int, also: Collection[int]
    ) -> AsyncIterator[tuple[Turn, SqliteTransaction]]:
        """A turn that may write these buckets, once their state has been read in it.

        Raises:
            BucketElsewhere: this shard does not take writes of one of them.
        """
        async with self.writer.turn() as turn:
            wanted = sorted({bucket, *also})
            listed = ", ".join(str(int(number)) for number in wanted)
            rows = await turn.fetch(f"{_WRITABLE} AND bucket IN ({listed})", ())
            if len(rows) != len(wanted):
                missing = min(set(wanted) - {row["bucket"] for row in rows})
                held = await turn.fetch(_HELD, (missing,))
                state, peer = (held[0]["state"], held[0]["peer"]) if held else ("ABSENT", None)
                raise BucketElsewhere(missing, state, None if peer is None else int(peer))
            turn.admit(wanted)
            yield turn, SqliteTransaction(turn, bucket, self)
        seen = causal.current()
        if self.causal_reads and seen is not None:
            position = causal.Position(1, self.writer.commit_count, time.time())
            seen.note(f"{self.service}.{self.index}", position)

    async def close(self) -> None:
        """Close every connection; safe to repeat."""
        await self.writer.close()
        while self.readers:
            reader = self.readers.pop()
            await reader.interrupt()
            await reader.close()


@dataclass(frozen=True)
class SqliteBucket:
    """See Bucket."""

    shards: "SqliteShards"
    number: int

    @property
    def shard(self) -> SqliteShard:
        """Where it is, as far as we know."""
        return self.shards.shard_of(self.number)

    @property
    def causal(self) -> Reader:
        """See Bucket.causal."""
        return CausalReader(self)

    async def fetch_one(self, sql: str, *arguments: object) -> Row | None:
        """See Reader.fetch_one."""
        return only(await self.fetch_all(sql, *arguments))

    async def fetch_all(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See Reader.fetch_all."""
        following, begun_s = Following(self.shards), time.monotonic()
        while True:
            try:
                rows = await self.shard.fetch_owned(self.number, sql, *arguments)
                self.shards.meter.add((self.number,), time.monotonic() - begun_s)
                return rows
            except BucketElsewhere as elsewhere:
                await following.step(elsewhere)

    async def fetch_causally(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See CausalBucket.fetch_causally."""
        self.shard.require_no_decision()
        return await self.fetch_all(sql, *arguments)

    @asynccontextmanager
    async def transaction(
        self, once: Once | None = None, *, also: Collection[int] = ()
    ) -> AsyncIterator[Transaction]:
        """See Bucket.transaction."""
        self._require_one_shard(also)
        if once is None or not once.request_id:
            async with self._entered(also) as (_, tx):
                yield tx
            return
        home = once_rules.home_bucket(once, self.shards.secret)
        is_joined = self.shards.shard_of(home) is self.shard
        if not is_joined:
            await self._claim(once, home)
            CLAIMED_NOT_EFFECTED.visit()
        async with self._entered(also, home if is_joined else None) as (turn, tx):
            memory = once_rules.Memory(tx, once, home, is_joined, self.shard.now_us())
            await memory.recall()
            tx.memory = memory
            refusal: FailedPrecondition | None = None
            try:
                yield tx
            except FailedPrecondition as error:
                if memory.answered:
                    raise
                refusal = error
            if refusal is None:
                await memory.remember_answer()
            else:
                await turn.undo()
                await memory.remember_refusal(refusal)
        if refusal is not None:
            raise refusal

    @asynccontextmanager
    async def _entered(
        self, also: Collection[int], home: int | None = None
    ) -> AsyncIterator[tuple[Turn, SqliteTransaction]]:
        """A turn on whatever shard has the bucket now.

        Args:
            also: further buckets, on the same shard for as long as the service is.
            home: joins as those in `also` do, but may be on another shard by now.
        """
        following = Following(self.shards)
        async with AsyncExitStack() as stack:
            while True:
                self._require_one_shard(also)
                if home is not None and self.shards.shard_of(home) is not self.shard:
                    raise moving(home)
                joined = also if home is None else {*also, home}
                turn = self.shard.admitted(self.number, joined)
                try:
                    entered = await stack.enter_async_context(turn)
                    break
                except BucketElsewhere as elsewhere:
                    await following.step(elsewhere)
            begun_s = time.monotonic()
            try:
                yield entered
            finally:
                self.shards.meter.add((self.number, *also), time.monotonic() - begun_s)

    async def _claim(self, once: Once, home: int) -> None:
        async with SqliteBucket(self.shards, home)._entered(()) as (_, tx):
            now_us = self.shard.now_us()
            await once_rules.claim_at_home(
                tx, once, home=home, target_bucket=self.number, now_us=now_us
            )

    def _require_one_shard(self, also: Collection[int]) -> None:
        for bucket in also:
            if self.shards.shard_of(bucket) is not self.shard:
                raise ValueError(f"buckets {self.number} and {bucket} are on different shards")


@dataclass
class SqliteShards:
    """See Shards. The files of one service."""

    shards: list[SqliteShard]
    bucket_map: BucketMap
    folder: SqliteFolder
    secret: bytes
    on_outbox: asyncio.Event
    open_shard: Callable[[int], Awaitable[SqliteShard]]
    meter: LoadMeter = field(default_factory=LoadMeter)
    settling: asyncio.Lock = field(default_factory=asyncio.Lock)
    learning: asyncio.Lock = field(default_factory=asyncio.Lock)
    growth: Growth = field(default_factory=Growth)

    def holding(self, key: UUID) -> Bucket:
        """See Shards.holding."""
        return self.bucket(bucket_of(key))

    def bucket(self, number: int) -> Bucket:
        """See Shards.bucket."""
        self.bucket_map.shard_index(number)  # a number that is none is a bug of the caller's
        return SqliteBucket(self, number)

    def shard_of(self, bucket: int) -> SqliteShard:
        """Where a bucket lives."""
        return self.shards[self.bucket_map.shard_index(bucket)]

    @property
    def engine(self) -> Literal["postgres", "sqlite"]:
        """See Shards.engine."""
        return "sqlite"

    def shard_index(self, bucket: int) -> int:
        """See Shards.shard_index."""
        return self.bucket_map.shard_index(bucket)

    def all(self) -> Sequence[Shard]:
        """See Shards.all."""
        return list(self.shards)

    async def learn(self) -> bool:
        """See Shards.learn."""
        known_count = len(self.shards)
        async with self.learning:
            with suppress(MoveFailed, DatabaseRefused):  # the next time, perhaps
                for recorded in await self.folder.control.list_shards():
                    if recorded.index == len(self.shards) and recorded.is_active:
                        self.shards.append(await self.open_shard(recorded.index))
                        self.growth.tell()
        return len(self.shards) > known_count

    async def wait_for_more(self, count: int) -> None:
        """See Shards.wait_for_more."""
        while len(self.shards) <= count:
            await self.growth.wait()

    async def locate(self, bucket: int) -> bool:
        """Find a bucket: Control's newer map is a better hint, the shards' word is the truth.

        If nobody can write it because its mover has died, this process settles the move.
        """
        before = self.bucket_map.shard_index(bucket)
        with suppress(MoveFailed, DatabaseRefused):
            known = await self.folder.control.read_map()
            if not self._has_all(known):
                await self.learn()
            if known.version > self.bucket_map.version and self._has_all(known):
                self.bucket_map = known
        if self.bucket_map.shard_index(bucket) == before:
            owners = [shard.index for shard in self.shards if await shard.fetch_all(_OWNS, bucket)]
            if owners and before not in owners:
                self.bucket_map = self.bucket_map.moved(bucket, owners[0])
            else:
                await self._settle_left(bucket)
        return self.bucket_map.shard_index(bucket) != before

    def _has_all(self, bucket_map: BucketMap) -> bool:
        return max(bucket_map.shard_indexes) < len(self.shards)

    async def settle_moves(self) -> None:
        """See Shards.settle_moves."""
        await self._settle_left(None)

    async def _settle_left(self, bucket: int | None) -> None:
        if self.settling.locked():
            return
        async with self.settling:
            tools = Tools(clock=self.shards[0].clock, collects=False)
            with suppress(MoveFailed, DatabaseRefused):
                await settle_left(self.folder, bucket, tools)

    async def wait_for_outbox(self, timeout_s: float) -> bool:
        """See Shards.wait_for_outbox."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.on_outbox.wait()
        except TimeoutError:
            return False
        self.on_outbox.clear()
        return True


@asynccontextmanager
async def open_sqlite_shards(
    folder: Path,
    *,
    migrations: Path,
    shard_count: int = 4,
    owned_by_first: bool = False,
    synchronous: Synchronous = "NORMAL",
    secret: bytes,
    clock: Clock,
    service: str = "",
    causal_reads: bool = False,
) -> AsyncIterator[Shards]:
    """Open a service's shards, creating and migrating them as needed.

    Args:
        folder: made if missing; holds control.sqlite and shard-<n>.sqlite.
        migrations: the service's SQL files.
        shard_count: 1 to 64; more than the folder has adds empty shards.
        owned_by_first: give a new folder's buckets all to the first shard.
        synchronous: FULL for what a power cut must not take.
        secret: 32 bytes or more that never change for this data.
        clock: dates what is written.
        service: names the subjects of events; the migrations' parent folder by default.
        causal_reads: whether commits leave positions in their callers' tokens.

    Raises:
        DatabaseRefused: a file is damaged, newer than this code, or does not fit.
    """
    service = service or migrations.parent.name
    plan = sqlite_files.Plan(folder, service, migrations, shard_count, owned_by_first)
    opened = await asyncio.to_thread(sqlite_files.prepare, plan)
    on_outbox = asyncio.Event()
    async with AsyncExitStack() as stack:

        async def open_shard(index: int) -> SqliteShard:
            shard = _open_shard(
                index,
                opened=opened,
                service=service,
                synchronous=synchronous,
                clock=clock,
                on_outbox=on_outbox,
                causal_reads=causal_reads,
            )
            return await stack.enter_async_context(shard)

        made = [await open_shard(index) for index in range(len(opened.paths))]
        place = SqliteFolder(opened.paths[0].parent)
        shards = SqliteShards(made, opened.bucket_map, place, secret, on_outbox, open_shard)
        beside = [
            asyncio.create_task(run_learning(shards), name=f"shards-of-{service}"),
            asyncio.create_task(
                run_telling(shards.meter, place.control, clock), name=f"load-of-{service}"
            ),
        ]
        try:
            yield shards
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)


@asynccontextmanager
async def _open_shard(
    index: int,
    *,
    opened: sqlite_files.Prepared,
    service: str,
    synchronous: Synchronous,
    clock: Clock,
    on_outbox: asyncio.Event,
    causal_reads: bool,
) -> AsyncIterator[SqliteShard]:
    path, schema = sqlite_files.path_of(opened.paths[0].parent, index), opened.schema
    connection = await open_connection(path, schema, read_only=False, synchronous=synchronous)
    try:
        writer = Writer(connection, on_outbox)
        await _guard(connection, opened.guarded_tables, writer)
        shard = SqliteShard(index, path, service, schema, clock, writer, causal_reads)
        # Not as a part of the call that may have asked for it.
        serving = asyncio.create_task(
            writer.run(), name=f"{service}-writer-{index}", context=Context()
        )
        try:
            yield shard
        finally:
            await asyncio.shield(_close(shard, serving))
    finally:
        await connection.close()


async def _close(shard: SqliteShard, serving: "asyncio.Task[None]") -> None:
    await shard.close()
    serving.cancel()
    await asyncio.wait([serving])


async def _guard(connection: Connection, tables: Collection[str], writer: Writer) -> None:
    """Let the writer connection refuse buckets that its present turn was not opened for.

    The file's own triggers cannot know the turn. These live in the connection, so that a
    forgotten `also` fails here as it will on Postgres.
    """
    await connection.raw.create_function("tenfold_is_admitted", 1, writer.is_admitted)
    for table in sorted(tables):
        for operation, row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD")):
            await connection.run(_GUARD.format(table=table, operation=operation, row=row))


assert BUCKET_COUNT == 4096  # CHECKs in migrations say so too
