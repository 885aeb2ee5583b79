"""Connections to one host of a shard: few, opened when needed, waited for within bounds.

asyncpg's own pool waits without a limit and spends a round trip on resetting each connection
that comes back. Ours has nothing to reset: all that we set ends with its transaction.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from shared import deadline
from shared.db.limits import CLOSE_S_MAX, RETRY_AFTER_S
from shared.db.postgres_connection import (
    BehindGate,
    Connection,
    Server,
    ShardUnreachable,
    open_connection,
)
from shared.db.tenancy import TenantCheck
from shared.errors import DeadlineExceeded, Overloaded, Unavailable

WAITING_MAX = 1024
# A caller without a deadline of its own is told to come back after this.
WAIT_S_MAX = 10.0
# Connections are made anew now and then: memory that a server's process collects is given back.
AGE_S_MAX = 600.0
# After a refused connection the next attempt waits, or every caller would try its own.
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 0.3


class Target(Protocol):
    """Where a pool's connections go: a shard's primary, wherever that is, or one host."""

    @property
    def server(self) -> Server:
        """The shard at that host."""
        ...

    @property
    def timeline(self) -> int | None:
        """The oldest that its primary may be on; None takes a replica as well."""
        ...


@dataclass
class Pool:
    """Lends connections, the last returned first.

    Attributes:
        target: says where to.
        tenants: checks each statement.
        size_max: open at once.
        gate: lets us into a primary that has been promoted, or raises why not now.
    """

    target: Target
    tenants: TenantCheck
    size_max: int
    gate: Callable[[], Awaitable[None]] | None = None
    _idle: list[Connection] = field(default_factory=list)
    _lent: set[Connection] = field(default_factory=set)
    _opening: "set[asyncio.Task[Connection]]" = field(default_factory=set)
    _waiting: int = 0
    _refused_until_s: float = 0.0
    _is_closed: bool = False

    def __post_init__(self) -> None:
        """The slots are as many as connections may be open."""
        self._slots = asyncio.Semaphore(self.size_max)

    @property
    def open_count(self) -> int:
        """Connections that are open now."""
        return len(self._idle) + len(self._lent)

    @property
    def lent_count(self) -> int:
        """Connections that are in use now."""
        return len(self._lent)

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Connection]:
        """Borrow a connection. See take."""
        connection = await self.take()
        try:
            yield connection
        finally:
            self.give_back(connection)

    async def take(self) -> Connection:
        """Borrow a connection; give it back.

        Raises:
            Overloaded: too many wait, or have waited too long.
            DeadlineExceeded: the caller's time was spent waiting.
            ShardUnreachable: nobody takes connections there.
        """
        if self._is_closed:
            raise Unavailable("the database is closing", retry_after_s=RETRY_AFTER_S)
        if self._slots.locked():
            await self._wait_for_slot()
        else:
            await self._slots.acquire()  # at once: a timer would cost more than it
        connection = self._take_idle() or await self._connect()
        self._lent.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """End a loan; what comes back broken or inside a transaction is closed."""
        self._lent.discard(connection)
        if connection.is_usable and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.terminate()
        self._slots.release()

    async def _wait_for_slot(self) -> None:
        if self._waiting >= WAITING_MAX:
            raise Overloaded("too many wait for the database", retry_after_s=RETRY_AFTER_S)
        self._waiting += 1
        left_s = deadline.timeout_s(WAIT_S_MAX)
        try:
            async with asyncio.timeout(left_s):
                await self._slots.acquire()
        except TimeoutError:
            if left_s < WAIT_S_MAX:
                raise DeadlineExceeded("the time was spent waiting for the database") from None
            raise Overloaded("the database is busy", retry_after_s=RETRY_AFTER_S) from None
        finally:
            self._waiting -= 1

    def _take_idle(self) -> Connection | None:
        now_s = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable and now_s < connection.dies_at_s:
                return connection
            connection.terminate()
        return None

    async def _connect(self) -> Connection:
        """Open a connection for a slot that has been taken; gives the slot back on failure."""
        if time.monotonic() < self._refused_until_s:
            self._slots.release()
            name = self.target.server.name
            raise ShardUnreachable(f"{name} cannot be reached", retry_after_s=RETRY_AFTER_S)
        # A task of its own: asyncpg leaves things behind when it is cancelled while connecting.
        opening = asyncio.create_task(self._open())
        self._opening.add(opening)
        limit = asyncio.timeout(deadline.remaining_s())
        try:
            async with limit:
                connection = await asyncio.shield(opening)
        except BaseException as error:
            opening.add_done_callback(self._adopt)
            if limit.expired() and isinstance(error, TimeoutError):
                raise DeadlineExceeded("the time was spent connecting to the database") from None
            raise
        self._opening.discard(opening)
        connection.dies_at_s = _end_of_life_s()
        return connection

    async def _open(self) -> Connection:
        target = self.target
        try:
            return await open_connection(target.server, self.tenants, timeline_min=target.timeline)
        except BehindGate:
            if self.gate is None:
                raise
        await self.gate()
        return await open_connection(target.server, self.tenants, timeline_min=target.timeline)

    def _adopt(self, opening: "asyncio.Task[Connection]") -> None:
        """Keep what was opened for a caller that has left; it is the next one's."""
        self._opening.discard(opening)
        self._slots.release()
        if opening.cancelled() or opening.exception() is not None:
            pause_s = random.uniform(PAUSE_S_MIN, PAUSE_S_MAX)  # noqa: S311 - jitter, no secret
            self._refused_until_s = time.monotonic() + pause_s
        elif self._is_closed:
            opening.result().terminate()
        else:
            opening.result().dies_at_s = _end_of_life_s()
            self._idle.append(opening.result())

    def expire(self, *, is_other: bool = False) -> None:
        """Close what is idle: the server behind it has gone, or another is the primary now."""
        if is_other:
            self._refused_until_s = 0.0
        while self._idle:
            self._idle.pop().terminate()

    async def close(self) -> None:
        """Close every connection; safe to repeat."""
        self._is_closed = True
        if self._opening:
            await asyncio.wait(self._opening, timeout=CLOSE_S_MAX)
        for opening in self._opening:
            opening.cancel()
        while self._idle:
            await self._idle.pop().close()
        for connection in self._lent:
            connection.terminate()


def _end_of_life_s() -> float:
    age_s = AGE_S_MAX * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, no secret
    return time.monotonic() + age_s
