"""Shards as Postgres databases: the engine of the cluster behind shared/db/port.py.

A transaction is three kinds of round trips: BEGIN together with its admission, the caller's
statements, COMMIT. Whose a bucket is, is read inside: by tenfold_enter for a write, in the
statement itself for a read. The map in this process is a hint; a shard that refuses a bucket
makes us ask all of them who has it.

A commit whose answer was lost is looked up, not guessed: the server's process behind it is
ended, then its idempotency or outbox row is there or not. We do not ask pg_xact_status: after
a crash Postgres may give the number of a lost transaction to another one.
"""

import asyncio
import hashlib
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from contextvars import Context
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeGuard, TypeVar
from uuid import UUID

from shared import causal, deadline
from shared.clock import CLOCKS_APART_US, Clock, to_us
from shared.db import limits
from shared.db import once as once_rules
from shared.db.causal_reader import CausalReader
from shared.db.crash_points import AFTER_COMMIT, BEFORE_COMMIT, CLAIMED_NOT_EFFECTED
from shared.db.errors import BucketElsewhere, DatabaseRefused
from shared.db.following import BucketsParted, Following
from shared.db.growing import Growth, run_learning
from shared.db.ids import bucket_of, new_id
from shared.db.limits import RETRY_AFTER_S, bounded
from shared.db.load import LoadMeter, run_telling
from shared.db.move.mover import Tools
from shared.db.move.place import settle_left
from shared.db.move.port import LEASE_US_MAX, MoveFailed
from shared.db.move.postgres_place import PostgresPlace
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
from shared.db.postgres_connection import (
    ERRORS,
    GRACE_S,
    Connection,
    Server,
    ShardUnreachable,
)
from shared.db.postgres_gate import Gate
from shared.db.postgres_pool import Pool
from shared.db.postgres_primary import Primary
from shared.db.postgres_recorded import SELECT_RECORDED, further_servers
from shared.db.postgres_replicas import Host, LagGuard, LogEnd, Replicas
from shared.db.postgres_shards import Plan, prepare
from shared.db.shards import BucketMap
from shared.db.sql import OWNED_STATES, STATEMENTS_CACHED_MAX
from shared.db.tenancy import TenantCheck
from shared.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    IdempotencyInFlight,
    TenfoldError,
    Unavailable,
)

# Per process and shard. Apart, so that a transaction that reads never waits for its own kind.
WRITERS_MAX = 4
READERS_MAX = 4
# Short: a caller whose time is over waits for this, too.
UNDO_S_MAX = 0.1
RESOLVE_S_MAX = 5.0
RESOLVE_PAUSE_S = 0.03
# Callers of a shard that is down do not keep the others busy with where its buckets may be.
LOOK_PAUSE_S = 0.1
_TRIES_ON_LOST_CONNECTION = 2

_OWNED = f"SELECT bucket, epoch FROM tenfold_bucket WHERE state IN {OWNED_STATES}"  # noqa: S608
_OWNS = f"SELECT 1 AS owns FROM tenfold_bucket WHERE bucket = $1 AND state IN {OWNED_STATES}"  # noqa: S608
_IS_LEFT = """
SELECT 1 AS is_left FROM tenfold_control.bucket_move
WHERE bucket = coalesce($1, bucket) AND phase NOT IN ('DONE', 'ABORTED')
    AND (lease_until_us <= $2 OR lease_until_us > $3)
"""
# A fenced bucket's rows are the newest there are until the fence's own time is over.
_READABLE = """
SELECT state IN ('ACTIVE', 'MOVING') OR (state = 'FENCED'
    AND fence_until_us > extract(epoch FROM clock_timestamp()) * 1000000)
FROM tenfold_bucket WHERE bucket = ${}
"""
_END_BACKEND = """
SELECT pg_terminate_backend(pid) AS ended FROM pg_stat_activity
WHERE pid = $1 AND backend_start = $2
"""
# What is seen may not be on the synchronous standby yet: the wait for it may be what was cut
# short. A commit of our own comes after it, and is answered when both are there.
_COMMIT_AFTER = "SELECT pg_logical_emit_message(true, 'tenfold', '')"
_OUTBOX_ROW = "SELECT 1 AS there FROM outbox WHERE event_id = $1"
_UNKNOWN = "the answer to a commit was lost, and its outcome is not known; repeat the request"
_UNDONE = "the connection was lost before the commit; nothing has happened"
_DECIDES = "inside a transaction nothing may rest on a replica's answer: read through it"

Answer = TypeVar("Answer")


@lru_cache(STATEMENTS_CACHED_MAX)
def owned_read(sql: str, argument_count: int) -> str:
    """The statement with one more column, tenfold_readable, judged in the same snapshot.

    There is always a row, so "nothing found" and "not mine" differ. The rows keep their order:
    a left join without a condition walks its right side as it comes.

    Args:
        sql: a SELECT.
        argument_count: of the statement; the bucket is bound after them.
    """
    readable = _READABLE.format(argument_count + 1)
    return (
        f"SELECT ({readable}) AS tenfold_readable, found.* FROM (VALUES (0)) AS one "  # noqa: S608
        f"LEFT JOIN (SELECT TRUE AS tenfold_found, read.* FROM ({sql.rstrip().rstrip(';')}\n) "
        "AS read) AS found ON TRUE"
    )


@dataclass(frozen=True)
class Evidence:
    """A row that a transaction writes: there afterwards if it has committed, else not."""

    sql: str
    arguments: tuple[object, ...]


class PostgresTransaction:
    """See Transaction."""

    def __init__(self, connection: Connection, bucket: int, shard: "PostgresShard") -> None:
        self.connection = connection
        self.memory: once_rules.Memory | None = None
        self.evidence: Evidence | None = None
        self.has_outbox = False
        self.is_over = False
        self._bucket = bucket
        self._shard = shard
        self._broken = ""

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
        return only(await self.fetch_all(sql, *arguments))

    async def fetch_all(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See Transaction.fetch_all."""
        self.require_whole()
        try:
            return await self.connection.fetch(sql, arguments)
        except BaseException as error:
            self._broken = type(error).__name__
            raise

    async def execute(self, sql: str, *arguments: object) -> int:
        """See Transaction.execute."""
        self.require_whole()
        try:
            return await self.connection.execute(sql, arguments)
        except BaseException as error:
            self._broken = type(error).__name__
            raise

    async def append_outbox(self, row: OutboxRow) -> None:
        """See Transaction.append_outbox."""
        shard, event_id = self._shard, new_id(max(self._bucket, 0))
        await insert_outbox_row(
            self, row, service=shard.service, event_id=event_id, now_us=shard.now_us()
        )
        self.has_outbox = True
        self.evidence = self.evidence or Evidence(_OUTBOX_ROW, (event_id,))

    def wake_relay(self) -> None:
        """See Transaction.wake_relay."""
        self.has_outbox = True

    async def answer_with(self, payload: bytes) -> None:
        """See Transaction.answer_with."""
        if self.memory is not None:
            self.memory.answer = payload

    def require_whole(self) -> None:
        """Refuse to go on after a failure: Postgres has undone everything."""
        if self.is_over:
            raise ValueError("this transaction is over")
        if self._broken:
            raise ValueError(f"this transaction failed earlier ({self._broken})")


@dataclass
class PostgresShard:
    """See Shard. One database: connections that write, connections that read.

    Attributes:
        replicas: may answer causal reads; None where there are none, or none may.
    """

    index: int
    primary: Primary
    service: str
    clock: Clock
    writers: Pool
    readers: Pool
    on_outbox: asyncio.Event
    replicas: Replicas | None = None
    log_end: LogEnd = field(default_factory=LogEnd)
    holders: set["asyncio.Task[object] | None"] = field(default_factory=set)

    def now_us(self) -> int:
        """The current moment, as tables store it."""
        return to_us(self.clock.now())

    async def fetch_one(self, sql: str, *arguments: object) -> Row | None:
        """See Reader.fetch_one."""
        return only(await self.fetch_all(sql, *arguments))

    async def fetch_all(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See Reader.fetch_all."""
        return await self._fetch(sql, *arguments)

    async def _fetch(self, sql: str, *arguments: object) -> list[dict[str, Any]]:
        try:
            return await self._fetch_once(sql, *arguments)
        except ShardUnreachable:
            if not await self.follow():
                raise
        except Unavailable:
            # The connection was lost, perhaps long ago, when the server restarted: ask again.
            await self.follow()
        return await self._fetch_once(sql, *arguments)

    async def _fetch_once(self, sql: str, *arguments: object) -> list[dict[str, Any]]:
        connection = await self.readers.take()
        try:
            left_s = deadline.timeout_s(limits.STATEMENT_S_MAX + GRACE_S)
            return await connection.fetch(sql, arguments, timeout_s=left_s)
        finally:
            self.readers.give_back(connection)

    async def fetch_owned(self, bucket: int, sql: str, *arguments: object) -> Sequence[Row]:
        """Rows of a statement on one bucket, if this shard may speak for it.

        Raises:
            BucketElsewhere: it may not.
        """
        found = await self._fetch(owned_read(sql, len(arguments)), *arguments, bucket)
        return _rows_of(found, bucket)

    async def fetch_covered(self, sql: str, *arguments: object, is_causal: bool = False) -> Covered:
        """See Shard.fetch_covered."""
        if is_causal:
            answered = await self.answer_of_replica(lambda lent: _covered(lent, sql, arguments))
            if answered is not None:
                return answered
        async with (
            self.spilling() if is_causal else nullcontext(),
            self.readers.lend() as connection,
        ):
            return await _covered(connection, sql, arguments)

    async def answer_of_replica(
        self, ask: Callable[[Connection], Awaitable[Answer]]
    ) -> Answer | None:
        """What a replica answers to this call; None where the primary must be asked."""
        if asyncio.current_task() in self.holders:
            raise ValueError(_DECIDES)
        seen = causal.current()
        if self.replicas is None or not _may_lag(seen):
            return None
        return await self.replicas.answer(seen, ask)

    def spilling(self) -> AbstractAsyncContextManager[None]:
        """What such a read is at the primary; see Replicas.spilling."""
        if self.replicas is None or not _may_lag(causal.current()):
            return nullcontext()
        return self.replicas.spilling()

    def transaction(self) -> "Turn":
        """See Shard.transaction."""
        return Turn(self, "SELECT tenfold_enter_every()", EVERY_BUCKET)

    async def commit(self, tx: PostgresTransaction) -> None:
        """Commit, or say that it did not happen, or that nobody can say."""
        BEFORE_COMMIT.visit()
        try:
            await tx.connection.commit()
        except ERRORS as error:
            translated = tx.connection.told(error)
            if not isinstance(translated, Unavailable | DeadlineExceeded):
                raise translated from error  # the server's own refusal: all is undone
            tx.connection.terminate()
            await self._resolve(tx, error)
        AFTER_COMMIT.visit()
        if tx.has_outbox:
            self.on_outbox.set()
        seen = causal.current()
        if self.replicas is not None and seen is not None:
            seen.note(self.replicas.place, await self.log_end.after_commit(tx.connection))

    async def _resolve(self, tx: PostgresTransaction, lost: BaseException) -> None:
        """Return if the transaction has committed.

        Raises:
            Unavailable: it has not, or nobody can say; the sentence tells which.
        """
        if tx.answered:
            return  # it had no effect
        backend, evidence = tx.connection.backend, tx.evidence
        if evidence is None:
            raise Unavailable(_UNKNOWN, retry_after_s=RETRY_AFTER_S) from lost
        try:
            async with bounded(RESOLVE_S_MAX, _UNKNOWN):
                while await self._is_alive(backend.pid, backend.started):
                    await _pause()
                is_there = await self.fetch_all(evidence.sql, *evidence.arguments)
                if is_there:
                    await self.fetch_all(_COMMIT_AFTER)
        except TenfoldError as error:
            raise Unavailable(_UNKNOWN, retry_after_s=RETRY_AFTER_S) from error
        if not is_there:
            raise Unavailable(_UNDONE, retry_after_s=RETRY_AFTER_S) from lost

    async def _is_alive(self, pid: int, started: object) -> bool:
        """Whether the server's process is still there; it is told to end."""
        try:
            return bool(await self.fetch_all(_END_BACKEND, pid, started))
        except Unavailable:
            await self.follow()
            return True  # ask again until the time is over

    async def follow(self) -> bool:
        """Connect anew, to whichever host is the primary now; whether that is another one."""
        is_other = len(self.primary.server.hosts) > 1 and await self.primary.find()
        self.writers.expire(is_other=is_other)
        self.readers.expire(is_other=is_other)
        return is_other

    async def close(self) -> None:
        """Close every connection; safe to repeat."""
        await self.writers.close()
        await self.readers.close()
        if self.replicas is not None:
            await self.replicas.close()


class Turn:
    """One transaction of one shard, from BEGIN to COMMIT; one block.

    Written out rather than as a generator in generators: it is the path of every write.

    Raises:
        BucketElsewhere: the admission was refused; the block is not entered.
    """

    def __init__(self, shard: PostgresShard, admission: str, bucket: int) -> None:
        self._shard = shard
        self._admission = admission
        self._bucket = bucket
        self._task: asyncio.Task[object] | None = None
        self._tx: PostgresTransaction
        self._limit: asyncio.Timeout

    async def __aenter__(self) -> PostgresTransaction:
        """Take a connection, begin, be admitted."""
        shard, task = self._shard, asyncio.current_task()
        if task in shard.holders:
            raise ValueError("a transaction inside a transaction of the same shard may wait for it")
        timeout_s = deadline.timeout_s(limits.TURN_S_MAX)
        connection = await shard.writers.take()
        shard.holders.add(task)
        self._task, self._limit = task, asyncio.timeout(timeout_s)
        self._tx = PostgresTransaction(connection, self._bucket, shard)
        await self._limit.__aenter__()
        try:
            await connection.run(f"BEGIN; {self._admission}")
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self._tx

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit, or roll back; the connection goes back whatever happens."""
        tx, is_whole = self._tx, False
        try:
            await self._end_in_time(kind, error, trace)
            if error is None:
                tx.require_whole()
                await self._shard.commit(tx)
                is_whole = True
        finally:
            tx.is_over = True
            self._shard.holders.discard(self._task)
            try:
                if not is_whole:
                    await _undo(tx.connection)
            finally:
                self._shard.writers.give_back(tx.connection)

    async def _end_in_time(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise DeadlineExceeded(limits.TURN_TOO_LONG) from late
        if self._limit.expired():  # the block went on regardless
            raise DeadlineExceeded(limits.TURN_TOO_LONG)


@dataclass(frozen=True)
class PostgresBucket:
    """See Bucket."""

    shards: "PostgresShards"
    number: int

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
            shard = self.shards.shard_of(self.number)
            try:
                rows = await shard.fetch_owned(self.number, sql, *arguments)
                self.shards.meter.add((self.number,), time.monotonic() - begun_s)
                return rows
            except BucketElsewhere as elsewhere:
                if self.shards.shard_of(self.number) is shard:  # else another call has found it
                    await following.step(elsewhere)
            except ShardUnreachable:
                if not await self.shards.has_gone(self.number):
                    raise

    async def fetch_causally(self, sql: str, *arguments: object) -> Sequence[Row]:
        """See CausalBucket.fetch_causally."""
        shard = self.shards.shard_of(self.number)

        async def ask(lent: Connection) -> Sequence[Row]:
            owned = owned_read(sql, len(arguments))
            return _rows_of(await lent.fetch(owned, (*arguments, self.number)), self.number)

        answered = await shard.answer_of_replica(ask)
        if answered is not None:
            return answered
        async with shard.spilling():
            return await self.fetch_all(sql, *arguments)

    def transaction(
        self, once: Once | None = None, *, also: Collection[int] = ()
    ) -> AbstractAsyncContextManager[Transaction]:
        """See Bucket.transaction."""
        if once is None or not once.request_id:
            return BucketTurn(self, also)
        return self._once(once, also)

    @asynccontextmanager
    async def _once(self, once: Once, also: Collection[int]) -> AsyncIterator[Transaction]:
        self.require_one_shard(also)
        home = once_rules.home_bucket(once, self.shards.secret)
        refusal: FailedPrecondition | None = None
        try:
            async with AsyncExitStack() as stack:
                tx, is_joined = await self._begin(stack, once, home, also)
                try:
                    yield tx
                except FailedPrecondition as error:
                    refusal = None if tx.answered else error
                    raise
        except FailedPrecondition as error:
            if error is not refusal:
                raise
        if refusal is not None:
            await self._remember_refusal(refusal, once, home, is_joined, also)
            raise refusal

    async def _begin(
        self, stack: AsyncExitStack, once: Once, home: int, also: Collection[int]
    ) -> tuple[PostgresTransaction, bool]:
        """Claim the key where its home is elsewhere; the map may be old, and say so too late."""
        while True:
            is_joined = self.shards.shard_of(home) is self.shards.shard_of(self.number)
            if not is_joined:
                await self._claim(once, home)
                CLAIMED_NOT_EFFECTED.visit()
            try:
                remembering = self._remembering(once, home, is_joined, also)
                return await stack.enter_async_context(remembering), is_joined
            except BucketsParted:
                if not is_joined:
                    raise

    @asynccontextmanager
    async def _remembering(
        self, once: Once, home: int, is_joined: bool, also: Collection[int]
    ) -> AsyncIterator[PostgresTransaction]:
        async with BucketTurn(self, {*also, home} if is_joined else also, once) as tx:
            memory = once_rules.Memory(tx, once, home, is_joined, self._now_us())
            await memory.recall()
            tx.memory = memory
            tx.evidence = Evidence(once_rules.SELECT, (tx.bucket, once.scope, once.request_id))
            yield tx
            await memory.remember_answer()

    async def _remember_refusal(
        self,
        refusal: FailedPrecondition,
        once: Once,
        home: int,
        is_joined: bool,
        also: Collection[int],
    ) -> None:
        """In a transaction of its own: the first has undone all, what it began included."""
        async with BucketTurn(self, {*also, home} if is_joined else also, once) as tx:
            memory = once_rules.Memory(tx, once, home, is_joined, self._now_us())
            await memory.recall()
            if memory.answered:
                raise Aborted("the same request has just passed; repeat it for its answer")
            await memory.remember_refusal(refusal)

    async def _claim(self, once: Once, home: int) -> None:
        async with BucketTurn(PostgresBucket(self.shards, home), (), once) as tx:
            await once_rules.claim_at_home(
                tx, once, home=home, target_bucket=self.number, now_us=self._now_us()
            )

    def require_one_shard(self, also: Collection[int]) -> None:
        """Refuse buckets that live elsewhere: a ValueError."""
        for bucket in self.parted(also):
            raise ValueError(f"buckets {self.number} and {bucket} are on different shards")

    def parted(self, also: Collection[int]) -> Collection[int]:
        """Those of these buckets that live on other shards than this one."""
        own = self.shards.shard_of(self.number)
        return [bucket for bucket in also if self.shards.shard_of(bucket) is not own]

    def _now_us(self) -> int:
        return self.shards.shard_of(self.number).now_us()


class BucketTurn:
    """A Turn on whatever shard has these buckets now.

    Args:
        bucket: the transaction's own.
        also: further ones.
        key: the request that must be alone with its key, if there is one.
    """

    def __init__(
        self, bucket: PostgresBucket, also: Collection[int], key: Once | None = None
    ) -> None:
        self._bucket = bucket
        self._also = also
        self._key = key
        self._turn: Turn
        self._begun_s = 0.0

    async def __aenter__(self) -> PostgresTransaction:
        """Follow the bucket to where it can be entered."""
        bucket = self._bucket
        bucket.require_one_shard(self._also)
        admission = admission_of({bucket.number, *self._also}, self._key)
        following, tries_left = Following(bucket.shards), _TRIES_ON_LOST_CONNECTION
        while True:
            shard = bucket.shards.shard_of(bucket.number)
            self._turn = Turn(shard, admission, bucket.number)
            try:
                entered = await self._turn.__aenter__()
                self._begun_s = time.monotonic()
                return entered
            except BucketElsewhere as elsewhere:
                if bucket.shards.shard_of(bucket.number) is shard:  # else another call has found it
                    await following.step(elsewhere)
                if bucket.parted(self._also):
                    raise BucketsParted from elsewhere
            except Aborted as error:
                if self._key is None:
                    raise
                raise IdempotencyInFlight(
                    "the first request under this id is still running", retry_after_s=RETRY_AFTER_S
                ) from error
            except Unavailable as error:
                # Nothing has begun, so it may be begun again.
                tries_left -= 1
                is_other = await shard.follow()
                if isinstance(error, ShardUnreachable) and not is_other:
                    if not await bucket.shards.has_gone(bucket.number):
                        raise
                elif not tries_left:
                    raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """See Turn."""
        try:
            await self._turn.__aexit__(kind, error, trace)
        finally:
            buckets = (self._bucket.number, *self._also)
            self._bucket.shards.meter.add(buckets, time.monotonic() - self._begun_s)


def admission_of(buckets: Collection[int], key: Once | None) -> str:
    """What a transaction begins with; numbers of our own may stand in the text.

    Requests under one key take turns: the second then reads what the first has written.
    """
    listed = ",".join(str(int(bucket)) for bucket in sorted(buckets))
    is_one = len(buckets) == 1
    admission = (
        f"CALL tenfold_enter_one({listed})" if is_one else f"SELECT tenfold_enter('{{{listed}}}')"
    )
    if key is None:
        return admission
    content = f"{key.scope}\0{key.request_id}".encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)
    return f"{admission}; SELECT pg_advisory_xact_lock({number})"


@dataclass
class PostgresShards:
    """See Shards. The databases of one service."""

    shards: list[PostgresShard]
    bucket_map: BucketMap
    secret: bytes
    on_outbox: asyncio.Event
    place: PostgresPlace
    maker: "ShardMaker"
    meter: LoadMeter = field(default_factory=LoadMeter)
    settling: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked_s: float = -math.inf
    learning: asyncio.Lock = field(default_factory=asyncio.Lock)
    growth: Growth = field(default_factory=Growth)

    def holding(self, key: UUID) -> Bucket:
        """See Shards.holding."""
        return self.bucket(bucket_of(key))

    def bucket(self, number: int) -> Bucket:
        """See Shards.bucket."""
        self.bucket_map.shard_index(number)  # a number that is none is a bug of the caller's
        return PostgresBucket(self, number)

    def shard_of(self, bucket: int) -> PostgresShard:
        """Where a bucket lives, as far as we know."""
        return self.shards[self.bucket_map.shard_index(bucket)]

    @property
    def engine(self) -> Literal["postgres", "sqlite"]:
        """See Shards.engine."""
        return "postgres"

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
            with suppress(TenfoldError):  # Control is away: the next time, perhaps
                rows = await self.shards[0].fetch_all(SELECT_RECORDED, len(self.shards))
                for server in further_servers(rows, self.maker.servers):
                    await self._open_further(server)
        return len(self.shards) > known_count

    async def _open_further(self, server: Server) -> None:
        primary = Primary(server)
        await primary.find()  # which one that is can be found out later, too
        self.maker.servers.append(server)
        self.shards.append(self.maker.make(len(self.shards), primary))
        self.growth.tell()

    async def wait_for_more(self, count: int) -> None:
        """See Shards.wait_for_more."""
        while len(self.shards) <= count:
            await self.growth.wait()

    async def locate(self, bucket: int) -> bool:
        """Ask every shard who owns a bucket; True if the map has changed by it.

        If nobody can write it because its mover has died, this process settles the move.
        """
        owners = await self._owners_of(bucket)
        if not owners and await self.learn():
            owners = await self._owners_of(bucket)
        if len(owners) != 1 or owners[0] == self.bucket_map.shard_index(bucket):
            await self._settle_left(bucket)
            return False
        self.bucket_map = self.bucket_map.moved(bucket, owners[0])
        return True

    async def _owners_of(self, bucket: int) -> list[int]:
        async def owned(shard: PostgresShard) -> bool:
            try:
                return bool(await shard.fetch_all(_OWNS, bucket))
            except TenfoldError:
                return False  # a shard that is down owns nothing that can be used now

        asked = list(self.shards)
        answers = await asyncio.gather(*map(owned, asked))
        return [shard.index for shard, is_owner in zip(asked, answers, strict=True) if is_owner]

    async def _settle_left(self, bucket: int | None) -> None:
        if self.settling.locked():
            return
        async with self.settling:
            with suppress(TenfoldError, MoveFailed, DatabaseRefused):
                now_us = self.shards[0].now_us()
                latest_us = now_us + LEASE_US_MAX + CLOCKS_APART_US
                if await self.shards[0].fetch_all(_IS_LEFT, bucket, now_us, latest_us):
                    tools = Tools(clock=self.shards[0].clock, collects=False)
                    await settle_left(self.place, bucket, tools)

    async def settle_moves(self) -> None:
        """See Shards.settle_moves."""
        await self._settle_left(None)

    async def has_gone(self, bucket: int) -> bool:
        """Whether a bucket of a shard that is down is found elsewhere; asked now and then."""
        if time.monotonic() - self.asked_s < LOOK_PAUSE_S:
            return False
        self.asked_s = time.monotonic()
        return await self.locate(bucket)

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
async def open_postgres_shards(
    servers: Sequence[Server],
    *,
    migrations: Path,
    owned_by_first: bool = False,
    secret: bytes,
    clock: Clock,
    service: str = "",
    lag_guard: LagGuard | None = None,
) -> AsyncIterator[Shards]:
    """Open a service's shards, migrating them as needed.

    Args:
        servers: 1 to 64, in the order in which they were made; a new one starts empty.
        migrations: the service's SQL files.
        owned_by_first: give all buckets of new shards to the first.
        secret: 32 bytes or more that never change for this data.
        clock: dates what is written.
        service: names the subjects of events; the migrations' parent folder by default.
        lag_guard: lets replicas answer causal reads; None reads from primaries alone.

    Raises:
        DatabaseRefused: a shard is down, newer than this code, or does not fit; named.
    """
    service = service or migrations.parent.name
    prepared = await prepare(Plan(servers, service, migrations, owned_by_first))
    on_outbox = asyncio.Event()
    tenants = TenantCheck(prepared.tenant_tables)
    known = [primary.server for primary in prepared.primaries]
    maker = ShardMaker(service, clock, tenants, on_outbox, lag_guard, known)
    shards = [maker.make(index, primary) for index, primary in enumerate(prepared.primaries)]
    try:
        place = PostgresPlace(known, imports=False)
        opened = PostgresShards(shards, prepared.bucket_map, secret, on_outbox, place, maker)
        maker.watch(run_learning(opened), f"shards-of-{service}")
        maker.watch(run_telling(opened.meter, place.control, clock), f"load-of-{service}")
        yield opened
    finally:
        await asyncio.shield(_close_all(shards, maker.watching))


@dataclass
class ShardMaker:
    """Makes a service's shards, at the start and whenever one was added.

    Attributes:
        servers: all that are known; it grows with them, and so does what was given it.
        watching: what runs beside them until they are closed.
    """

    service: str
    clock: Clock
    tenants: TenantCheck
    on_outbox: asyncio.Event
    lag_guard: LagGuard | None
    servers: list[Server]
    watching: "list[asyncio.Task[None]]" = field(default_factory=list)

    def make(self, index: int, primary: Primary) -> PostgresShard:
        """One shard; it connects when it is first asked."""
        place, gate = f"{self.service}.{index}", Gate(self.servers, index)
        replicas = _replicas(place, primary.server, self.tenants, self.lag_guard)
        if replicas is not None:
            self.watch(replicas.run(), f"replicas-{place}")
        return PostgresShard(
            index=index,
            primary=primary,
            service=self.service,
            clock=self.clock,
            writers=Pool(primary, self.tenants, WRITERS_MAX, gate.enter),
            readers=Pool(primary, self.tenants, READERS_MAX, gate.enter),
            on_outbox=self.on_outbox,
            replicas=replicas,
        )

    def watch(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run this until the shards are closed; not as a part of the call that needs it now."""
        self.watching.append(asyncio.create_task(work, name=name, context=Context()))


def _replicas(
    place: str, server: Server, tenants: TenantCheck, guard: LagGuard | None
) -> Replicas | None:
    if guard is None or len(server.hosts) < 2:
        return None
    return Replicas(place, [Host(server.at(dsn), tenants) for dsn in server.hosts], guard)


async def _close_all(
    shards: Sequence[PostgresShard], watching: "Sequence[asyncio.Task[None]]"
) -> None:
    for task in watching:
        task.cancel()
    if watching:
        await asyncio.wait(watching)
    for shard in shards:
        await shard.close()


async def _covered(connection: Connection, sql: str, arguments: tuple[object, ...]) -> Covered:
    """Rows, and what is owned, in one snapshot."""
    try:
        await connection.run("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        owned = await connection.fetch(_OWNED, ())
        rows = await connection.fetch(sql, arguments)
        await connection.run("COMMIT")
    except BaseException:
        await _undo(connection)
        raise
    return Covered(rows, {row["bucket"]: row["epoch"] for row in owned})


def _may_lag(seen: causal.Seen | None) -> TypeGuard[causal.Seen]:
    return seen is not None and seen.may_lag


def _rows_of(found: list[dict[str, Any]], bucket: int) -> Sequence[Row]:
    """The rows of an owned_read.

    Raises:
        BucketElsewhere: the shard may not speak for the bucket.
    """
    if not found[0]["tenfold_readable"]:
        raise BucketElsewhere(bucket, "not readable here", None)
    if len(found) == 1 and not found[0]["tenfold_found"]:
        return []
    return [_without_marks(row) for row in found]


async def _undo(connection: Connection) -> None:
    """Roll back what is open; a connection that cannot even do that is closed."""
    if connection.is_usable or connection.raw.is_closed():
        return
    try:
        async with asyncio.timeout(UNDO_S_MAX):
            await connection.run("ROLLBACK")
    except BaseException as error:
        connection.terminate()
        if not isinstance(error, Exception):
            raise


async def _pause() -> None:
    await asyncio.sleep(RESOLVE_PAUSE_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter


def _without_marks(row: dict[str, Any]) -> Row:
    del row["tenfold_readable"], row["tenfold_found"]
    return row
