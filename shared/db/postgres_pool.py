"""Connections to one host: few, opened when needed, waited for within bounds.

asyncpg's own pool waits without a limit and spends a round trip on resetting each connection
that comes back. Ours has nothing to reset: all that we set ends with its transaction.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from shared import deadline
from shared.db.limits import RETRY_AFTER_S
from shared.db.postgres_connection import Connection, Server, open_connection
from shared.db.tenancy import TenantCheck
from shared.errors import DeadlineExceeded, Overloaded, TenfoldError, Unavailable

WAITING_MAX = 1024
# A caller without a deadline of its own is told to come back after this.
WAIT_S_MAX = 10.0
# Connections are made anew now and then: memory that a server's process collects is given back.
AGE_S_MAX = 600.0
# After a refused connection the next attempt waits, or every caller would try its own.
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 0.3


@dataclass(eq=False)
class _Held:
    connection: Connection
    dies_at_s: float


@dataclass
class Pool:
    """Lends connections, the last returned first.

    Attributes:
        server: where to.
        tenants: checks each statement.
        size_max: open at once.
    """

    server: Server
    tenants: TenantCheck
    size_max: int
    _idle: list[_Held] = field(default_factory=list)
    _lent: set[_Held] = field(default_factory=set)
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

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Connection]:
        """Borrow a connection. One that comes back inside a transaction, or broken, is closed.

        Raises:
            Overloaded: too many wait, or have waited too long.
            DeadlineExceeded: the caller's time was spent waiting.
            Unavailable: the server cannot be reached.
        """
        await self._take_slot()
        try:
            held = await self._take()
            self._lent.add(held)
            try:
                yield held.connection
            finally:
                self._lent.discard(held)
                self._give_back(held)
        finally:
            self._slots.release()

    async def _take_slot(self) -> None:
        if self._is_closed:
            raise Unavailable("the database is closing", retry_after_s=RETRY_AFTER_S)
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

    async def _take(self) -> _Held:
        now_s = asyncio.get_running_loop().time()
        while self._idle:
            held = self._idle.pop()
            if held.connection.is_usable and now_s < held.dies_at_s:
                return held
            held.connection.terminate()
        if now_s < self._refused_until_s:
            raise Unavailable(f"{self.server.name} cannot be reached", retry_after_s=RETRY_AFTER_S)
        try:
            async with asyncio.timeout(deadline.timeout_s(WAIT_S_MAX)):
                connection = await open_connection(self.server, self.tenants)
        except (TenfoldError, TimeoutError) as error:
            pause_s = random.uniform(PAUSE_S_MIN, PAUSE_S_MAX)  # noqa: S311 - jitter, no secret
            self._refused_until_s = asyncio.get_running_loop().time() + pause_s
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the time was spent connecting to the database") from None
            raise
        age_s = AGE_S_MAX * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, no secret
        return _Held(connection, asyncio.get_running_loop().time() + age_s)

    def _give_back(self, held: _Held) -> None:
        if held.connection.is_usable and not self._is_closed:
            self._idle.append(held)
        else:
            held.connection.terminate()

    def expire(self) -> None:
        """Close what is idle: the server behind it has gone or changed its role."""
        while self._idle:
            self._idle.pop().connection.terminate()

    async def close(self) -> None:
        """Close every connection; safe to repeat."""
        self._is_closed = True
        while self._idle:
            await self._idle.pop().connection.close()
        for held in self._lent:
            held.connection.terminate()
