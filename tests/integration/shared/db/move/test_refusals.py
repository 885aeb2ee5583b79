"""What keeps a bucket from being fenced, and a source that goes away when it has been decided."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from shared.db import limits
from shared.db.errors import DatabaseRefused
from shared.db.move import sqlite_control, sqlite_side
from shared.db.move.mover import Tools
from shared.db.move.place import move_bucket, settle_move
from shared.db.move.port import MoveFailed
from shared.db.move.protocol import Phase
from shared.db.port import OutboxRow
from tests.databases import PostgresServer
from tests.integration.shared.db.move.grounds import (
    ADD_ONE,
    BUCKET,
    PACE,
    Databases,
    Ground,
    add_counters,
    meanwhile,
    states_of,
)
from tests.integration.shared.db.move.test_moves import Killed, die, during
from tests.integration.shared.db.proxy import proxying
from tests.postgres import running_postgres

FAR = 4000
"""On the second shard."""
EPOCH = "SELECT epoch FROM tenfold_bucket WHERE bucket = {}"
COUNT_MARKS = f"SELECT count(*) FROM tenfold_dirty WHERE bucket = {BUCKET}"


@pytest.fixture(params=["place", "databases"], ids=["sqlite", "postgres"])
def ground(request) -> Ground:
    return request.getfixturevalue(request.param)


def paced(step: str, work: Callable[[], object], **options):
    """Tools that do something at a step, and wait for less."""
    return replace(during(step, work), pace=replace(PACE, **options))


def tools_at(**works: Callable[[], object]) -> Tools:
    """Tools that do something after each of these steps, of a mover whose fence is short."""
    visits = [during(step, work).visit for step, work in works.items()]
    pace = replace(PACE, fence_s=0.3)
    return Tools(pace=pace, visit=lambda name: [visit(name) for visit in visits])


async def states(ground: Ground, bucket: int = BUCKET) -> list[str]:
    return await asyncio.to_thread(states_of, ground, bucket)


@pytest.mark.parametrize(
    "limit", [{"marks_kept_max": 3}, {"marks_kept_s_max": 0.0}], ids=["many", "old"]
)
async def test_marks_that_pile_up_while_a_bucket_is_copied_end_its_move(ground, limit):
    async with ground.open() as shards:
        await add_counters(shards, 20)
        writing = paced("capture2", lambda: [ground.touch(0, BUCKET) for _ in range(5)], **limit)
        with pytest.raises(MoveFailed, match="piles up on shard 0"):
            await move_bucket(ground.moves, BUCKET, 1, writing)
    assert await states(ground) == ["ACTIVE", "ABORTED"]
    assert ground.read(0, COUNT_MARKS) == [(0,)]
    [move] = await ground.moves.control.list_moves(is_open=False)
    assert "piles up" in move.reason


async def test_a_bucket_that_is_written_faster_than_it_is_carried_over_is_not_fenced(ground):
    async with ground.open() as shards:
        await add_counters(shards, 3)
        never_few = paced("fence", die, backlog_max=0, passes_max=2)
        with pytest.raises(MoveFailed, match="is written faster than it can be carried over"):
            await move_bucket(ground.moves, BUCKET, 1, never_few)
    assert await states(ground) == ["ACTIVE", "ABORTED"]


async def test_a_bucket_whose_events_wait_for_their_relay_is_not_fenced(ground):
    async with ground.open() as shards:
        async with shards.bucket(BUCKET).transaction() as tx:
            for _ in range(3):
                await tx.append_outbox(OutboxRow("t.Made", "counters/1", b"", "default"))
        with pytest.raises(MoveFailed, match="3 events of the bucket wait for their relay"):
            await move_bucket(ground.moves, BUCKET, 1, paced("fence", die, unsent_max=2))
    assert await states(ground) == ["ACTIVE", "ABORTED"]


async def test_the_marks_of_a_dead_mover_go_when_the_service_keeps_house(ground):
    async with ground.open() as shards:
        await add_counters(shards, 3)
        with pytest.raises(Killed):
            await move_bucket(ground.moves, BUCKET, 1, paced("copied", die, lease_s=0.0))
        ground.touch(0, BUCKET)
        assert ground.read(0, COUNT_MARKS) != [(0,)]
        await shards.settle_moves()
        assert ground.read(0, COUNT_MARKS) == [(0,)]
        assert await states(ground) == ["ACTIVE", "ABORTED"]
        assert await ground.moves.control.list_moves(is_open=True) == []


async def test_a_bucket_is_not_fenced_while_control_cannot_be_asked(place, shards, monkeypatch):
    monkeypatch.setattr(sqlite_control, "BUSY_S_MAX", 0.05)
    await add_counters(shards, 1)
    path = place.path / "control.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        locking = paced("verify", lambda: other.execute("BEGIN IMMEDIATE"))
        with pytest.raises(MoveFailed, match=r"control.sqlite cannot be used.*given back later"):
            await move_bucket(place.folder, BUCKET, 1, locking)
        assert place.states() == ["MOVING", "IMPORTING"]  # which takes writes
        other.execute("ROLLBACK")
    [left] = await place.folder.control.list_moves(is_open=True)
    await settle_move(place.folder, left, locking, preference="abort", is_forced=True)
    assert place.states() == ["ACTIVE", "ABORTED"]


async def test_a_map_that_points_at_a_shard_that_is_not_there_is_told_so(place, databases):
    async with place.open(), databases.open():
        pass
    with closing(sqlite3.connect(place.path / "control.sqlite")) as control, control:
        control.execute("UPDATE bucket_map SET shard_id = 9 WHERE bucket = ?", (BUCKET,))
    wrong = f"UPDATE tenfold_control.bucket_map SET shard_id = 9 WHERE bucket = {BUCKET}"
    await databases.rows(0, "SELECT 1", prefix=wrong)
    for ground in (place, databases):
        with pytest.raises(DatabaseRefused, match="no shard 9"):
            await move_bucket(ground.moves, BUCKET, 1, paced("plan", die))
        async with ground.open() as shards:  # the shards themselves know better
            await add_counters(shards, 1)


# The source is away -----------------------------------------------------------------------


async def test_a_database_that_is_away_when_its_bucket_leaves_is_waited_for_as_long_as_it_is_read(
    databases,
):
    first, second = databases.operator
    async with proxying(second) as proxy:
        through = Databases(f"{first},{proxy.dsn}", [first, proxy.dsn])
        arrived = asyncio.Event()
        leaving = tools_at(commit=proxy.cut, dst_active=arrived.set)
        async with through.open() as shards:
            [counter_id] = await add_counters(shards, 1, bucket=FAR)
            moving = asyncio.create_task(move_bucket(through.moves, FAR, 0, leaving))
            async with asyncio.timeout(30):
                await arrived.wait()
            async with shards.bucket(FAR).transaction() as tx:
                assert await tx.execute(ADD_ONE, FAR, counter_id) == 1
            assert await states(databases, FAR) == ["ACTIVE", "FENCED"]
            await proxy.mend()
            assert await moving is Phase.DONE
    assert await states(databases, FAR) == ["ACTIVE", "MOVED"]
    epochs = [databases.read(index, EPOCH.format(FAR))[0][0] for index in (0, 1)]
    assert epochs[0] > epochs[1]


async def test_a_file_that_cannot_be_written_when_its_bucket_leaves_is_waited_for_likewise(
    place, shards, monkeypatch
):
    monkeypatch.setattr(sqlite_side, "BUSY_S_MAX", 0.05)
    await add_counters(shards, 1)
    arrived = asyncio.Event()
    path = place.path / "shard-0.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        leaving = tools_at(commit=lambda: other.execute("BEGIN IMMEDIATE"), dst_active=arrived.set)
        moving = asyncio.create_task(move_bucket(place.folder, BUCKET, 1, leaving))
        async with asyncio.timeout(30):
            await arrived.wait()
        assert place.states() == ["FENCED", "ACTIVE"]
        other.execute("ROLLBACK")
        assert await moving is Phase.DONE
    assert place.states() == ["MOVED", "ACTIVE"]


# A standby is missing ---------------------------------------------------------------------


@pytest.fixture
def another_server() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


async def test_a_bucket_is_not_fenced_for_a_shard_whose_synchronous_standby_is_missing(
    postgres_server, another_server, monkeypatch
):
    monkeypatch.setattr(limits, "STATEMENT_S_MAX", 0.3)  # its commits wait for that long
    operator = []
    for server in (postgres_server, another_server):
        [dsn] = await server.make_databases(1)
        operator.append(server.site.admin_dsn(server.address, dsn.rpartition("/")[2]))
    apart = Databases(",".join(operator), operator)

    async def require_standby(name: str) -> None:
        async with another_server.admin() as admin:
            await admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
            await admin.execute("SELECT pg_reload_conf()")
            while await admin.fetchval("SHOW synchronous_standby_names") != name:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async with apart.open() as shards:
        await add_counters(shards, 1)
    requiring = paced("verify", lambda: meanwhile(require_standby, "nobody"))
    with pytest.raises(MoveFailed, match=r"the synchronous standby of shard 1 is missing.*later"):
        await move_bucket(apart.moves, BUCKET, 1, requiring)
    assert (await states(apart))[0] == "MOVING"  # which takes writes
    await require_standby("")
    [left] = await apart.moves.control.list_moves(is_open=True)
    await settle_move(apart.moves, left, requiring, preference="abort", is_forced=True)
    assert await states(apart) == ["ACTIVE", "ABORTED"]
