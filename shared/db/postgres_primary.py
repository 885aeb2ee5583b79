"""Which of a shard's hosts is its primary now.

Every host is asked at once, each within a second. Of those that take writes the one on the
newest timeline is it: a promotion begins a new one, so a primary of the past that comes back
is known by its older timeline and is left alone.
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from shared.db.errors import DatabaseRefused
from shared.db.postgres_connection import ERRORS, TIMELINE, Server, connect

ASK_S_MAX = 1.0
# All who notice a failure together share one question.
ANSWER_FRESH_S = 0.1
# A replica is on no timeline of its own.
NO_PRIMARY = 0
_ASK = f"SELECT CASE WHEN pg_is_in_recovery() THEN {NO_PRIMARY} ELSE {TIMELINE} END"

_HAS_RECEIVED = """
SELECT pg_is_in_recovery() AND pg_last_wal_receive_lsn() >= $2::text::pg_lsn
    AND timeline = $1::bigint FROM tenfold_shard
"""
_IS_BEHIND_GATE = f"SELECT timeline <> {TIMELINE} FROM tenfold_shard"  # noqa: S608


@dataclass
class Primary:
    """A shard's primary, as far as we know.

    Attributes:
        server: the shard at the host that took writes when last asked.
        timeline: the newest that was ever seen; older ones are of the past.
    """

    server: Server
    timeline: int = NO_PRIMARY
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _answered_s: float = 0.0

    async def find(self) -> bool:
        """Ask every host; whether it is another one than before."""
        before = self.server
        async with self._asking:
            if time.monotonic() - self._answered_s > ANSWER_FRESH_S:
                await self._ask_all()
        return self.server is not before

    async def _ask_all(self) -> None:
        hosts = self.server.hosts
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(timeline_of(self.server.at(dsn))) for dsn in hosts]
        newest, dsn = max(zip((task.result() for task in asked), hosts, strict=True))
        if newest > NO_PRIMARY and newest >= self.timeline:
            self.timeline = newest
            if self.server.dsn != dsn:
                self.server = self.server.at(dsn)
        self._answered_s = time.monotonic()


async def connect_to_primary(server: Server) -> Any:  # noqa: ANN401 - asyncpg is untyped
    """A raw connection to the shard's primary, wherever that is now.

    Raises:
        DatabaseRefused: it cannot be reached; named.
    """
    primary = Primary(server)
    if len(server.hosts) > 1:
        await primary.find()
    try:
        return await connect(primary.server)
    except ERRORS as error:
        raise DatabaseRefused(f"{server} cannot be reached: {error}") from error


async def is_behind_gate(raw: Any) -> bool:  # noqa: ANN401 - asyncpg is untyped
    """Whether this primary was promoted and must not be used yet; see postgres_gate."""
    try:
        return bool(await raw.fetchval(_IS_BEHIND_GATE))
    except asyncpg.UndefinedTableError:
        return False  # a new database


async def timeline_of(server: Server) -> int:
    """The timeline of a host that takes writes; NO_PRIMARY for any other."""
    told = await _answer(server, _ASK)
    return told if isinstance(told, int) else NO_PRIMARY


async def has_received(server: Server, timeline: int, lsn: str) -> bool:
    """Whether a host is a replica that has written the primary's log to its disk so far."""
    return bool(await _answer(server, _HAS_RECEIVED, timeline, lsn))


async def _answer(server: Server, sql: str, *arguments: object) -> object:
    """What a host says within a second; None from one that does not answer."""
    with suppress(*ERRORS):
        async with asyncio.timeout(ASK_S_MAX):
            raw = await connect(server)
            try:
                return await raw.fetchval(sql, *arguments)
            finally:
                raw.terminate()
    return None
