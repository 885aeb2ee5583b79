"""Replicas answer although they lag, and nobody ever misses a write of its own."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import pytest

from deploy.local.address import free_addresses
from shared import causal
from shared.causal import Position, Seen
from shared.db import postgres, postgres_replicas
from shared.db.ids import new_id
from shared.db.port import Shards
from shared.db.postgres import open_postgres_shards
from shared.db.postgres_replicas import LagGuard, Replicas
from shared.db.postgres_shards import parse_servers
from shared.db.scatter import scatter
from shared.errors import Unavailable
from tests.databases import SECRET
from tests.fakes import ManualClock
from tests.integration.shared.db.conftest import MIGRATIONS, NEAR
from tests.own_writes import INSERT, SELECT, tell
from tests.replicated import Replicated, running_replicated

COUNT = "SELECT count(*) AS n FROM thing WHERE tenant = 't' AND tenfold_owned(bucket)"
# So that the replica that is 2 s behind may answer as well.
PATIENT = LagGuard(ban_s=4.0, unban_s=3.5)


@pytest.fixture(scope="module")
async def replicated() -> AsyncIterator[Replicated]:
    """One replica 50 ms behind, and one 2 s."""
    async with running_replicated(50, 2000) as running:
        yield running


def opened(dsn: str, guard: LagGuard | None = PATIENT) -> AbstractAsyncContextManager[Shards]:
    return open_postgres_shards(
        parse_servers(dsn, service="things"),
        migrations=MIGRATIONS,
        service="things",
        secret=SECRET,
        clock=ManualClock(),
        lag_guard=guard,
    )


@pytest.fixture(scope="module")
async def shards(replicated) -> AsyncIterator[Shards]:
    async with opened(replicated.dsn) as shards:
        yield shards


def replicas_of(shards: Shards) -> Replicas:
    return shards.all()[0].replicas


async def read(shards: Shards, row, *, token: str = "", may_lag: bool = True):
    """One read in a call of a client that sends this token."""
    causal.begin(Seen.of_token(token, may_lag=may_lag))
    return await shards.bucket(NEAR).causal.fetch_one(SELECT, NEAR, row)


async def write(shards: Shards):
    """A new row, and the writer's token."""
    seen, row = Seen(), new_id(NEAR)
    causal.begin(seen)
    async with shards.bucket(NEAR).transaction() as tx:
        await tx.execute(INSERT, NEAR, row, str(row))
    return row, seen.token()


async def until_answering(shards: Shards, count: int) -> None:
    """Return when just so many replicas may answer."""
    replicas = replicas_of(shards)
    async with asyncio.timeout(30):
        while sum(host.is_fresh(replicas.guard) for host in replicas.hosts) != count:
            await read(shards, new_id(NEAR))
            await asyncio.sleep(0.02)


async def test_of_a_hundred_thousand_reads_with_tokens_none_is_stale(shards):
    replicas = replicas_of(shards)
    await until_answering(shards, 2)
    before = replicas.answered_count
    told = await tell(shards, reads=100_000, clients=16, reads_per_write=(200, 3000))
    assert told.stale == 0
    assert replicas.answered_count - before >= 0.8 * told.reads
    assert all(host.answered_count for host in replicas.hosts if host.is_replica)


async def test_the_same_reads_without_tokens_show_that_the_replicas_lag(shards):
    await until_answering(shards, 2)
    told = await tell(shards, reads=2000, clients=16, reads_per_write=(20,), with_tokens=False)
    assert told.stale > 0


async def test_a_call_whose_contract_does_not_say_so_reads_from_the_primary(shards):
    await until_answering(shards, 2)
    before = replicas_of(shards).answered_count
    row, _ = await write(shards)
    assert await read(shards, row, may_lag=False)
    causal.begin(None)  # no call at all: a worker
    assert await shards.bucket(NEAR).causal.fetch_one(SELECT, NEAR, row)
    assert replicas_of(shards).answered_count == before


async def test_a_service_that_asks_for_no_replicas_has_none(replicated):
    async with opened(replicated.dsn, guard=None) as shards:
        row, token = await write(shards)
        assert (token, replicas_of(shards)) == ("", None)
        assert await read(shards, row)


async def test_a_replica_beyond_the_lag_guard_does_not_answer_until_it_has_caught_up(replicated):
    async with opened(replicated.dsn, LagGuard(ban_s=0.5, unban_s=0.3)) as shards:
        await until_answering(shards, 2)
        await replicated.run(1, "SELECT pg_wal_replay_pause()")
        try:
            row, _ = await write(shards)
            await until_answering(shards, 0)
            assert await read(shards, row)
        finally:
            await replicated.run(1, "SELECT pg_wal_replay_resume()")
        await until_answering(shards, 2)


async def test_within_one_call_no_read_goes_back_in_time(shards):
    row, _ = await write(shards)
    await until_answering(shards, 2)
    async with asyncio.timeout(30):
        while await read(shards, row) is None:
            pass
    for _ in range(50):  # the call goes on, where it has been answered
        assert await shards.bucket(NEAR).causal.fetch_one(SELECT, NEAR, row)


async def test_a_position_of_another_timeline_is_looked_for_at_the_primary(shards):
    await until_answering(shards, 2)
    before = replicas_of(shards).answered_count
    row, token = await write(shards)
    [(place, position)] = Seen.of_token(token).positions.items()
    later = Seen()
    later.note(place, Position(position.timeline + 1, 1, position.at_s))
    assert await read(shards, row, token=later.token())
    assert replicas_of(shards).answered_count == before


async def test_a_commit_whose_position_nobody_can_tell_is_read_from_the_primary(
    shards, monkeypatch
):
    await until_answering(shards, 2)
    before = replicas_of(shards).answered_count
    monkeypatch.setattr(postgres_replicas, "_LOG_END", "SELECT 1 / 0")
    row, token = await write(shards)
    assert await read(shards, row, token=token)
    assert replicas_of(shards).answered_count == before


async def test_a_host_that_is_down_costs_nobody_an_answer(replicated):
    first, [nobody] = replicated.addresses[0], free_addresses(1)
    dsn = replicated.site.dsn(first, "things").replace(str(first), f"{first},{nobody}")
    async with opened(dsn) as shards:
        row, token = await write(shards)
        for _ in range(20):
            assert await read(shards, row, token=token)
        assert replicas_of(shards).answered_count == 0


async def test_more_than_the_primary_can_take_in_place_of_replicas_is_refused(shards, monkeypatch):
    monkeypatch.setattr(postgres_replicas, "SPILLED_MAX", 0)
    row, token = await write(shards)
    with pytest.raises(Unavailable, match="no replica is new enough"):
        await read(shards, row, token=token)
    assert await read(shards, row, may_lag=False)


async def test_reads_in_place_of_replicas_leave_connections_for_those_that_need_the_primary(
    shards, monkeypatch
):
    replicas = replicas_of(shards)
    monkeypatch.setattr(postgres_replicas, "_LOG_END", "SELECT 1 / 0")  # no replica has that
    row, token = await write(shards)
    async with AsyncExitStack() as stack:
        for _ in range(postgres_replicas.SPILLED_CONNECTIONS_MAX):
            await stack.enter_async_context(replicas.spilling())
        spilled = asyncio.create_task(read(shards, row, token=token))
        for _ in range(20):
            assert await read(shards, row, may_lag=False)
        assert not spilled.done()
    assert await spilled
    assert postgres_replicas.SPILLED_CONNECTIONS_MAX < postgres.READERS_MAX


async def test_of_two_replicas_the_one_that_answers_faster_is_asked(shards):
    await until_answering(shards, 2)
    slow, fast = (host for host in replicas_of(shards).hosts if host.is_replica)
    for host, took_s in ((slow, 1.0), (fast, 0.0001)):
        for _ in range(50):
            host.latency.note(took_s, time.monotonic())
    before = slow.answered_count, fast.answered_count
    for _ in range(20):
        await read(shards, new_id(NEAR))
    assert slow.answered_count == before[0]
    assert fast.answered_count == before[1] + 20


async def test_replicas_answer_scatter_reads_with_all_that_their_caller_wrote(shards):
    await until_answering(shards, 2)
    before = replicas_of(shards).answered_count
    causal.begin(Seen())
    counted = (await scatter(shards, COUNT)).rows[0]["n"]
    _, token = await write(shards)
    async with asyncio.timeout(30):
        while replicas_of(shards).answered_count == before:
            causal.begin(Seen.of_token(token, may_lag=True))
            gathered = await scatter(shards, COUNT, is_causal=True)
            assert gathered.rows[0]["n"] == counted + 1
