"""The one writer of a SQLite file: turns, savepoints, group commit.

SQLite lets one connection write at a time, and a durable commit costs a disk flush. So
callers queue for turns; a turn runs in a savepoint of its own, and turns that wait
together share one transaction and one commit. Nobody is released before that commit.

The writer's own task begins, rolls back and commits; a caller only says how its turn
ended. A cancelled caller therefore cannot leave a transaction open (spec F16).
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from shared.db import limits
from shared.db.crash_points import AFTER_COMMIT, BEFORE_COMMIT
from shared.db.limits import CLOSE_S_MAX, RETRY_AFTER_S, bounded
from shared.db.port import Row
from shared.db.sqlite_connection import Connection, unavailable
from shared.errors import DeadlineExceeded, Overloaded, TenfoldError, Unavailable

# Turns that share one commit, and how long the first of them may wait for the others.
GROUP_TURNS_MAX = 64
GROUP_S_MAX = 0.020
# How long a turn is waited for by a caller that has no deadline.
WAIT_S_MAX = 30.0
WAITING_MAX = 4096

_SAVEPOINT = "SAVEPOINT turn"
_RELEASE = "RELEASE turn"
_ROLLBACK_TO = "ROLLBACK TO turn"


@dataclass(eq=False)
class Turn:
    """One caller's time on the writer connection.

    Attributes:
        given: resolved with None when the turn begins, or with the error that prevents it.
        ended: resolved by the caller: whether to keep the effects.
        settled: resolved with None once they are durable, or with the error that undid them.
        has_outbox: whether relays have something to do after the commit.
        broken: what made further statements pointless, or "".
    """

    connection: Connection
    admitted: set[int]
    given: "asyncio.Future[Exception | None]" = field(default_factory=asyncio.Future)
    ended: "asyncio.Future[bool]" = field(default_factory=asyncio.Future)
    settled: "asyncio.Future[Exception | None]" = field(default_factory=asyncio.Future)
    has_outbox: bool = False
    broken: str = ""

    def end(self, *, keep: bool) -> None:
        """Say how it ended; the first word counts."""
        if not self.ended.done():
            self.ended.set_result(keep)

    def admit(self, buckets: Collection[int]) -> None:
        """Let this turn write these buckets; their state has been read in it."""
        self.admitted.update(buckets)

    async def fetch(self, sql: str, arguments: tuple[object, ...]) -> list[Row]:
        """Every row of a statement."""
        self.require_whole()
        try:
            return await self.connection.fetch(sql, arguments)
        except BaseException as error:
            self.broken = type(error).__name__
            raise

    async def execute(self, sql: str, arguments: tuple[object, ...]) -> int:
        """The number of rows that a statement changed."""
        self.require_whole()
        try:
            return await self.connection.execute(sql, arguments)
        except BaseException as error:
            self.broken = type(error).__name__
            raise

    async def undo(self) -> None:
        """Take back every effect of this turn, and go on with it."""
        if not self.connection.in_transaction or self.ended.done():
            raise unavailable()
        await self.connection.run(_ROLLBACK_TO)
        self.has_outbox, self.broken = False, ""

    def require_whole(self) -> None:
        """Refuse to go on, or to keep anything, after a failure: as Postgres does."""
        if self.ended.done():
            raise ValueError("this transaction is over")
        if self.broken:
            raise ValueError(f"this transaction failed earlier ({self.broken})")


class Writer:
    """Gives turns on one connection, one at a time, in order of asking.

    Args:
        connection: nobody else writes with it.
        on_outbox: called after a commit that leaves relays something to publish.
    """

    def __init__(self, connection: Connection, on_outbox: "asyncio.Event") -> None:
        self._connection = connection
        self._on_outbox = on_outbox
        self._waiting: asyncio.Queue[Turn] = asyncio.Queue(WAITING_MAX)
        self._admitted: set[int] = set()
        self._holder: asyncio.Task[object] | None = None
        self._is_closed = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.commit_count = 0
        self.turn_count = 0

    @property
    def is_ours(self) -> bool:
        """Whether the task that asks holds the turn."""
        return self._holder is not None and self._holder is asyncio.current_task()

    def is_admitted(self, bucket: int) -> bool:
        """Whether the turn that runs now may write this bucket; the guard triggers ask it."""
        return bucket in self._admitted

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Wait for a turn and hold it; the effects are durable when the block has been left.

        Raises:
            Overloaded: too many are waiting.
            Unavailable: the database cannot be written, or lost the group's commit.
            DeadlineExceeded: the caller's deadline passed, waiting or inside.
        """
        turn = self._queue_up()
        try:
            await self._wait_for(turn)
            async with (
                self._held(),
                bounded(limits.TURN_S_MAX, limits.TURN_TOO_LONG),
            ):
                yield turn
            turn.require_whole()
        except BaseException as error:
            turn.end(keep=False)
            is_refusal = isinstance(error, TenfoldError) and not isinstance(error, Unavailable)
            if is_refusal and turn.given.done():
                # What it was refused for may have been a neighbour's effect, still uncommitted.
                await self._settle(turn)
            raise
        turn.end(keep=True)
        await self._settle(turn)
        if not turn.ended.result():
            # The block went on after its time was up; the writer had given up on it.
            raise DeadlineExceeded(limits.TURN_TOO_LONG)

    @asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        self._holder = asyncio.current_task()
        try:
            yield
        finally:
            if self._holder is asyncio.current_task():
                self._holder = None

    def _queue_up(self) -> Turn:
        if self._holder is asyncio.current_task():
            raise ValueError("a transaction inside a transaction of the same file waits for ever")
        if self._is_closed:
            raise Unavailable("the database is closing", retry_after_s=RETRY_AFTER_S)
        turn = Turn(self._connection, self._admitted)
        try:
            self._waiting.put_nowait(turn)
        except asyncio.QueueFull:
            raise Overloaded("too many writes are waiting", retry_after_s=RETRY_AFTER_S) from None
        return turn

    async def _wait_for(self, turn: Turn) -> None:
        async with bounded(WAIT_S_MAX, "the time was spent waiting for the writer"):
            error = await asyncio.shield(turn.given)
        if error is not None:
            raise error

    async def _settle(self, turn: Turn) -> None:
        # The commit goes on if this caller is cancelled: it shares it with others.
        error = await asyncio.shield(turn.settled)
        if error is not None:
            raise error

    async def run(self) -> None:
        """Serve turns until cancelled."""
        while True:
            first = await self._waiting.get()
            self._is_idle.clear()
            await self._serve_group(first)
            self._is_idle.set()

    async def close(self) -> None:
        """Refuse new turns, fail those that wait, let the group that runs commit."""
        self._is_closed = True
        error = Unavailable("the database is closing", retry_after_s=RETRY_AFTER_S)
        while not self._waiting.empty():
            turn = self._waiting.get_nowait()
            _resolve(turn.given, error)
            _resolve(turn.settled, error)
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S_MAX):
                await self._is_idle.wait()

    async def _serve_group(self, first: Turn) -> None:
        kept: list[Turn] = []
        served: list[Turn] = []
        failure: Exception | None = Unavailable(
            "the database is closing", retry_after_s=RETRY_AFTER_S
        )
        try:
            await self._connection.run("BEGIN IMMEDIATE")
            await self._serve_turns(first, served, kept)
            await self._commit(kept)
            failure = None
        except sqlite3.Error as error:
            failure = unavailable()
            failure.__cause__ = error
        except Exception as error:  # the boundary: a group's failure is its members' answer
            failure = error
        finally:
            if failure is not None:
                served = served or [first]
                await self._abandon()
            for turn in served:
                _resolve(turn.given, failure)
                _resolve(turn.settled, failure)
            if failure is None and any(turn.has_outbox for turn in kept):
                self._on_outbox.set()

    async def _serve_turns(self, first: Turn, served: list[Turn], kept: list[Turn]) -> None:
        loop = asyncio.get_running_loop()
        closes_at = loop.time() + GROUP_S_MAX
        turn: Turn | None = first
        while turn is not None:
            served.append(turn)
            if not turn.ended.done() and await self._serve(turn):
                kept.append(turn)
            has_room = len(served) < GROUP_TURNS_MAX and loop.time() < closes_at
            turn = self._waiting.get_nowait() if has_room and not self._waiting.empty() else None

    async def _serve(self, turn: Turn) -> bool:
        await self._connection.run(_SAVEPOINT)
        self.turn_count += 1
        _resolve(turn.given, None)
        try:
            # The caller's own limit comes first; this one is for a caller that swallowed it.
            async with asyncio.timeout(limits.TURN_S_MAX * 1.5):
                keep = await asyncio.shield(turn.ended)
        except TimeoutError:
            turn.end(keep=False)
            keep = False
        self._admitted.clear()
        self._holder = None
        if not self._connection.in_transaction:
            # An interrupt or a full disk rolls back everything, neighbours included.
            raise unavailable()
        if not keep:
            await self._connection.run(_ROLLBACK_TO)
        await self._connection.run(_RELEASE)
        return keep

    async def _commit(self, kept: list[Turn]) -> None:
        if not kept:
            await self._connection.run("ROLLBACK")
            return
        BEFORE_COMMIT.visit()
        await self._connection.run("COMMIT")
        AFTER_COMMIT.visit()
        self.commit_count += 1

    async def _abandon(self) -> None:
        self._admitted.clear()
        self._holder = None
        with suppress(Exception):
            if self._connection.in_transaction:
                await self._connection.run("ROLLBACK")


def _resolve(future: "asyncio.Future[Exception | None]", value: Exception | None) -> None:
    if not future.done():
        future.set_result(value)
