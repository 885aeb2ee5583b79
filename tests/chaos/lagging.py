"""Clients that read their own writes from a replica that lags, is paused and restarts meanwhile."""

import asyncio
import random
import signal

from shared.clock import SystemClock
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_replicas import LagGuard, Replicas
from shared.db.postgres_shards import parse_servers
from tests.databases import SECRET
from tests.integration.shared.db.conftest import MIGRATIONS
from tests.own_writes import Told, tell
from tests.replicated import Replicated, running_replicated

SHARE_MIN = 0.8
PAUSE_S = 0.5
BETWEEN_S = (5.0, 10.0)
# So that a replica that is 2 s behind may answer; its clients write seldom, or most of their reads
# would be of what it cannot have yet.
STORIES = ((50, LagGuard(), (300, 3000)), (2000, LagGuard(4.0, 3.5), (10_000,)))


def run(*, reads: int) -> list[dict[str, object]]:
    """Make so many reads, half of them at each lag; a row for each."""
    return [
        asyncio.run(_story(lag_ms, guard, reads_per_write, reads // len(STORIES)))
        for lag_ms, guard, reads_per_write in STORIES
    ]


async def _story(
    lag_ms: int, guard: LagGuard, reads_per_write: tuple[int, ...], reads: int
) -> dict[str, object]:
    async with running_replicated(lag_ms) as running:
        opened = open_postgres_shards(
            parse_servers(running.dsn, service="things"),
            migrations=MIGRATIONS,
            service="things",
            secret=SECRET,
            clock=SystemClock(),
            lag_guard=guard,
        )
        async with opened as shards:
            disturbing = asyncio.create_task(_disturb(running))
            told = await tell(shards, reads=reads, clients=16, reads_per_write=reads_per_write)
            disturbing.cancel()
            [faults] = await asyncio.gather(disturbing)
            return _row(lag_ms, told, shards.all()[0].replicas, faults)


def _row(lag_ms: int, told: Told, replicas: Replicas, faults: int) -> dict[str, object]:
    share = replicas.answered_count / told.reads
    what = f"reads of own writes from a replica {lag_ms} ms behind, {share:.0%} answered by it"
    print(f"{what}: {told}")
    violations = told.stale + (share < SHARE_MIN)
    return {"what": what, "faults": faults, "operations": told.reads, "violations": violations}


async def _disturb(running: Replicated) -> int:
    """Pause the replica, or restart it, until cancelled; how often."""
    faults = 0
    try:
        while True:
            await asyncio.sleep(random.uniform(*BETWEEN_S))
            if faults % 2:
                running.send(1, signal.SIGINT)
            else:
                await running.run(1, "SELECT pg_wal_replay_pause()")
                await asyncio.sleep(PAUSE_S)
                await running.run(1, "SELECT pg_wal_replay_resume()")
            faults += 1
    except asyncio.CancelledError:
        return faults
