"""Reads of one shard that its replicas answer, and what each of them has.

A watcher asks every host ten times a second: the primary how far its log is, a replica how far
it has replayed it. A replica is as new as the last moment at which the primary's log was no
further; so no clocks are compared, nothing is written to measure lag, and an idle primary makes
no replica look old. One that is older than the lag guard allows does not answer. When nobody
has read for a while, nobody watches.

Which call may be answered, and what a replica must have for it: see shared/causal.py. A replica
tells its timeline by the row of tenfold_shard, which a promotion writes last (postgres_gate.py), so
one that still follows a primary of the past is never taken for a new one. A token of an older
timeline sends its reader to the primary.
"""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shared import deadline
from shared.causal import NEVER_REPLAYED, Needed, Position, Seen
from shared.db.errors import BucketElsewhere
from shared.db.limits import RETRY_AFTER_S, STATEMENT_S_MAX, bounded
from shared.db.postgres_connection import ERRORS, TIMELINE, Connection, Server, connect
from shared.db.postgres_pool import Pool
from shared.db.tenancy import TenantCheck
from shared.errors import DeadlineExceeded, Overloaded, RaceLost, TenfoldError, Unavailable

READERS_OF_REPLICA_MAX = 4
ASK_S_MAX = 1.0
# After a host did not answer.
PAUSE_S = 1.0
# How long after the last read the watcher goes on.
WATCHED_S = 5.0
# A replica that has not replayed a position yet is asked again so many times; if that was in
# vain, not at all for a while: it is further behind than a caller can wait.
WAITS_S = (0.005, 0.01)
IN_VAIN_S = 0.25
# Reads that go to the primary in place of a replica: half of its connections for reading at
# once, and so many more that wait. Without it, replicas that lag would take the primary along.
SPILLED_CONNECTIONS_MAX = 2
SPILLED_MAX = 64
SPILLED_WAIT_S_MAX = 5.0
# Of a host's time to answer: how much the last answer counts, and when half is forgotten.
LATENCY_WEIGHT = 0.2
LATENCY_HALF_LIFE_S = 5.0
_LOG_ENTRIES_MAX = 128

_ASK = f"""
SELECT in_recovery AS is_replica,
    CASE WHEN in_recovery THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END
        - '0/0'::pg_lsn AS lsn,
    CASE WHEN in_recovery THEN (SELECT timeline FROM tenfold_shard) ELSE {TIMELINE} END AS timeline
FROM pg_is_in_recovery() AS in_recovery
"""  # noqa: S608 - an expression of ours
_REPLAYED = "SELECT pg_last_wal_replay_lsn() - '0/0'::pg_lsn AS lsn"
_LOG_END = f"SELECT {TIMELINE} AS timeline, pg_current_wal_lsn() - '0/0'::pg_lsn AS lsn"
_UNKNOWN_TIMELINE = 0xFFFFFFFF
_SLOW = "a replica was too slow"
# Gone, frozen, busy, without the bucket yet, or its answer canceled by what it replays.
_ASK_THE_PRIMARY = (Unavailable, DeadlineExceeded, Overloaded, BucketElsewhere, RaceLost)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class LagGuard:
    """How old a replica's answers may be.

    Attributes:
        ban_s: one that is older does not answer.
        unban_s: until it is newer than this.
        poll_s: between two questions.
    """

    ban_s: float = 2.0
    unban_s: float = 1.0
    poll_s: float = 0.1


class PrimaryLog:
    """How far the primary's log has been lately."""

    def __init__(self) -> None:
        self.timeline = 0
        self._ends: deque[tuple[float, int]] = deque(maxlen=_LOG_ENTRIES_MAX)

    def note(self, timeline: int, lsn: int, at_s: float) -> None:
        """It was so far when it was asked; a primary of the past has nothing to say."""
        if timeline < self.timeline:
            return
        if timeline > self.timeline:
            self.timeline = timeline
            self._ends.clear()
        if self._ends and self._ends[-1][1] == lsn:
            self._ends.pop()
        self._ends.append((at_s, lsn))

    def last_within_s(self, lsn: int) -> float:
        """When it was no further than this for the last time, monotonic; -inf for never."""
        return next((at_s for at_s, end in reversed(self._ends) if end <= lsn), -math.inf)


class Latency:
    """How long a host takes to answer, smoothed; forgotten, so that a slow one is tried again."""

    def __init__(self) -> None:
        self._smoothed_s = 0.0
        self._at_s = 0.0

    def note(self, took_s: float, now_s: float) -> None:
        """It has answered, or was given up, after so long."""
        known_s = self.now(now_s)
        self._smoothed_s = known_s + LATENCY_WEIGHT * (took_s - known_s)
        self._at_s = now_s

    def now(self, now_s: float) -> float:
        """Seconds; 0 where nothing is known."""
        return float(self._smoothed_s * 0.5 ** ((now_s - self._at_s) / LATENCY_HALF_LIFE_S))


class Host:
    """One host of a shard, as it was when last asked; a Target for its pool.

    Attributes:
        is_replica: it answered, and is one.
        known_timeline: which it follows.
        replayed: how far it had replayed the log.
        asked_s: when that was asked, monotonic; -inf for never.
        as_of_s: it has all that the primary had at this moment, monotonic.
        latency: of its answers.
    """

    timeline: int | None = None

    def __init__(self, server: Server, tenants: TenantCheck) -> None:
        self.server = server
        self.pool = Pool(self, tenants, READERS_OF_REPLICA_MAX)
        self.is_replica = False
        self.known_timeline = 0
        self.replayed = 0
        self.asked_s = self.as_of_s = -math.inf
        self.answered_count = 0
        self.latency = Latency()
        self._is_banned = False
        self._in_vain_until_s = -math.inf

    @property
    def cost_s(self) -> float:
        """What one more read would wait for: those before it, each as long as they take."""
        return (self.pool.lent_count + 1) * self.latency.now(time.monotonic())

    def is_fresh(self, guard: LagGuard) -> bool:
        """Whether the lag guard lets it answer now."""
        limit_s = guard.unban_s if self._is_banned else guard.ban_s
        self._is_banned = time.monotonic() - self.as_of_s > limit_s
        return self.is_replica and not self._is_banned

    def may_have(self, needed: Needed) -> bool:
        """Whether it has what is needed, but perhaps for the position, which may yet come."""
        as_of_s = time.time() - (time.monotonic() - self.as_of_s)
        return needed.timeline in (0, self.known_timeline) and as_of_s >= needed.as_of_s

    async def has(self, needed: Needed, connection: Connection) -> bool:
        """Whether what this connection reads now has the position, waiting a little for it.

        What was asked before the connection was opened may be of a server that has restarted
        since, and then replays again what it had replayed.
        """
        if connection.opened_s <= self.asked_s and self.replayed >= needed.lsn:
            return True
        if time.monotonic() < self._in_vain_until_s:
            return False
        wanted = max(needed.lsn, self.replayed)
        for pause_s in (0.0, *WAITS_S):
            await asyncio.sleep(pause_s)
            asked_s = time.monotonic()
            [row] = await connection.fetch(_REPLAYED, (), timeout_s=ASK_S_MAX)
            if row["lsn"] is None:
                return False  # it has been promoted
            if row["lsn"] >= wanted:
                self.replayed, self.asked_s = row["lsn"], asked_s
                return True
        self._in_vain_until_s = time.monotonic() + IN_VAIN_S
        return False


@dataclass
class Replicas:
    """The replicas of one shard.

    Attributes:
        place: the shard in tokens: "media.3".
        hosts: all of the shard's, the primary among them.
        spilled_count: reads that went to the primary because no replica could answer.
    """

    place: str
    hosts: Sequence[Host]
    guard: LagGuard
    spilled_count: int = 0
    _log: PrimaryLog = field(default_factory=PrimaryLog)
    _wanted: asyncio.Event = field(default_factory=asyncio.Event)
    _wanted_until_s: float = -math.inf
    _spilled_now: int = 0

    def __post_init__(self) -> None:
        """The primary's connections that spilled reads may hold."""
        self._turns = asyncio.Semaphore(SPILLED_CONNECTIONS_MAX)

    @property
    def answered_count(self) -> int:
        """Reads that a replica has answered."""
        return sum(host.answered_count for host in self.hosts)

    @property
    def open_count(self) -> int:
        """Connections for reading that are open now."""
        return sum(host.pool.open_count for host in self.hosts)

    async def answer(
        self, seen: Seen, ask: Callable[[Connection], Awaitable[Answer]]
    ) -> Answer | None:
        """What a replica answers that has all that the caller has seen; None if none can."""
        self._wanted_until_s = time.monotonic() + WATCHED_S
        self._wanted.set()
        host, answered = self._choose(seen), None
        if host is not None:
            with suppress(*_ASK_THE_PRIMARY):
                answered = await self._ask(host, seen.needed(self.place), ask)
        if host is None or answered is None:
            seen.pinned[self.place] = None
            self.spilled_count += 1
            return None
        seen.pinned[self.place] = host
        host.answered_count += 1
        return answered

    async def _ask(
        self, host: Host, needed: Needed, ask: Callable[[Connection], Awaitable[Answer]]
    ) -> Answer | None:
        # Half of the time, so that a frozen replica leaves enough for the primary.
        limit_s, asked_s = deadline.timeout_s(STATEMENT_S_MAX) / 2, time.monotonic()
        try:
            async with bounded(limit_s, _SLOW), host.pool.lend() as connection:
                answered = await ask(connection) if await host.has(needed, connection) else None
        except _ASK_THE_PRIMARY:
            host.latency.note(limit_s, time.monotonic())
            raise
        now_s = time.monotonic()
        host.latency.note(now_s - asked_s, now_s)
        return answered

    @asynccontextmanager
    async def spilling(self) -> AsyncIterator[None]:
        """Read at the primary in place of a replica.

        Raises:
            Unavailable: too many do, or have done so for too long.
        """
        if self._spilled_now >= SPILLED_MAX:
            raise _spilled_over()
        self._spilled_now += 1
        try:
            await self._take_turn()
            try:
                yield
            finally:
                self._turns.release()
        finally:
            self._spilled_now -= 1

    async def _take_turn(self) -> None:
        left_s = deadline.timeout_s(SPILLED_WAIT_S_MAX)
        try:
            async with asyncio.timeout(left_s):
                await self._turns.acquire()
        except TimeoutError as error:
            raise _spilled_over() from error

    def _choose(self, seen: Seen) -> Host | None:
        needed = seen.needed(self.place)
        usable = [host for host in self.hosts if self._is_usable(host, needed)]
        if self.place in seen.pinned:
            pinned = seen.pinned[self.place]
            return next((host for host in usable if host is pinned), None)
        if not usable or needed.lsn == NEVER_REPLAYED:
            return None
        ready = [host for host in usable if host.replayed >= needed.lsn]
        if not ready:
            return max(usable, key=lambda host: host.replayed)
        # The cheaper of two: those in a hurry do not all go to the same one.
        two = random.sample(ready, min(2, len(ready)))
        return min(two, key=lambda host: host.cost_s)

    def _is_usable(self, host: Host, needed: Needed) -> bool:
        is_current = host.known_timeline == self._log.timeline
        return is_current and host.is_fresh(self.guard) and host.may_have(needed)

    # The watcher
    async def run(self) -> None:
        """Watch every host until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for host in self.hosts:
                tasks.create_task(self._watch(host))

    async def _watch(self, host: Host) -> None:
        while True:
            await self._wanted.wait()
            with suppress(*ERRORS):
                async with _asking(host.server) as raw:
                    while self._is_wanted():
                        await self._look(host, raw)
                        await asyncio.sleep(self.guard.poll_s)
                continue
            host.is_replica = False
            await asyncio.sleep(PAUSE_S)

    def _is_wanted(self) -> bool:
        if time.monotonic() > self._wanted_until_s:
            self._wanted.clear()
        return self._wanted.is_set()

    async def _look(self, host: Host, raw: Any) -> None:  # noqa: ANN401 - asyncpg is untyped
        asked_s = time.monotonic()
        row = await raw.fetchrow(_ASK, timeout=ASK_S_MAX)
        host.is_replica, timeline = row["is_replica"], row["timeline"] or 0
        if not host.is_replica:
            self._log.note(timeline, row["lsn"], asked_s)
            return
        host.known_timeline, host.replayed, host.asked_s = timeline, row["lsn"] or 0, asked_s
        host.as_of_s = self._log.last_within_s(host.replayed)

    async def close(self) -> None:
        """Close every connection; safe to repeat."""
        for host in self.hosts:
            await host.pool.close()


@asynccontextmanager
async def _asking(server: Server) -> AsyncIterator[Any]:
    # A task of its own: asyncpg leaves things behind when it is cancelled while connecting.
    opening = asyncio.create_task(connect(server))
    try:
        raw = await asyncio.shield(opening)
    except asyncio.CancelledError:
        with suppress(*ERRORS):
            (await opening).terminate()
        raise
    try:
        yield raw
    finally:
        raw.terminate()


class LogEnd:
    """Where the primary's log ends: one question serves all who commit before it is asked."""

    def __init__(self) -> None:
        self._asking = asyncio.Lock()
        self._asked_count = 0
        self._answer = _unknown()

    async def after_commit(self, connection: Connection) -> Position:
        """A position that has what was just committed on this connection."""
        asked_before = self._asked_count
        async with self._asking:
            if self._asked_count == asked_before:
                self._asked_count += 1
                self._answer = _unknown()  # if we are cancelled
                self._answer = await _log_end(connection)
            return self._answer


async def _log_end(connection: Connection) -> Position:
    try:
        [row] = await connection.fetch(_LOG_END, (), timeout_s=ASK_S_MAX)
    except (TenfoldError, *ERRORS):  # the commit has happened, whatever becomes of this
        return _unknown()
    return Position(row["timeline"], row["lsn"], time.time())


def _spilled_over() -> Unavailable:
    return Unavailable(
        "no replica is new enough, and too many wait for the primary", retry_after_s=RETRY_AFTER_S
    )


def _unknown() -> Position:
    return Position(_UNKNOWN_TIMELINE, NEVER_REPLAYED, time.time())
