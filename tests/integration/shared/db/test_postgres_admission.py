"""Whose a bucket is, decided in the shard: fences, guards, old maps, whole coverage."""

import asyncio
from contextlib import asynccontextmanager

import asyncpg
import pytest

from shared.db.ids import new_id
from shared.db.scatter import scatter
from tests.integration.shared.db.conftest import (
    INSERT_THING,
    LIST_LABELS,
    MIGRATIONS,
    NEAR,
    NEAR_TOO,
    add_thing,
    labels,
)

GRANULE_CLASS = 0x5445464E  # as postgres_functions.sql has it
FENCE = "UPDATE tenfold_bucket SET state = 'FENCED', fence_until_us = 0 WHERE bucket = $1"
LOCK = "SELECT pg_advisory_xact_lock($1, $2)"
COUNT_WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


@pytest.fixture
async def place(postgres_places):
    """Shards that have their buckets."""
    made = await postgres_places.make(MIGRATIONS, service="things")
    async with made.open():
        return made


@pytest.fixture
async def shards(place):
    async with place.open() as opened:
        yield opened


@asynccontextmanager
async def connected(place, shard_index: int = 0):
    connection = await asyncpg.connect(place.name.split(",")[shard_index])
    try:
        yield connection
    finally:
        await connection.close()


async def waiting_count(connection, count: int) -> None:
    while await connection.fetchval(COUNT_WAITING) < count:  # noqa: ASYNC110 - locks ring no bell
        await asyncio.sleep(0.005)


# The fence ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "admission", [f"SELECT tenfold_enter('{{{NEAR}}}')", f"CALL tenfold_enter_one({NEAR})"]
)
async def test_a_writer_that_waited_for_the_fence_sees_it_and_is_refused(place, admission):
    async with connected(place) as fencer, connected(place) as writer, connected(place) as looker:
        async with fencer.transaction():
            await fencer.execute(LOCK, GRANULE_CLASS, NEAR & 63)
            entering = asyncio.create_task(writer.execute(f"BEGIN; {admission}"))
            await waiting_count(looker, 1)
            await fencer.execute(FENCE, NEAR)
        with pytest.raises(asyncpg.PostgresError, match="bucket_elsewhere") as caught:
            await entering
        assert caught.value.sqlstate == "MB001"
        assert '"state":"FENCED"' in caught.value.detail


async def test_a_fence_waits_for_the_writer_that_was_admitted_before_it(place, shards):
    async with connected(place) as fencer, connected(place) as looker:

        async def fence() -> None:
            async with fencer.transaction():
                await fencer.execute(LOCK, GRANULE_CLASS, NEAR & 63)
                # What is read now is what a mover would copy: nothing may come after it.
                seen.append(await fencer.fetchval("SELECT count(*) FROM thing"))
                await fencer.execute(FENCE, NEAR)

        seen: list[int] = []
        async with shards.bucket(NEAR).transaction() as tx:
            fencing = asyncio.create_task(fence())
            await waiting_count(looker, 1)
            await add_thing(tx, "a")
        await fencing
        assert seen == [1]


async def test_a_fence_stops_its_granule_and_no_other(place, shards):
    async with connected(place) as fencer, fencer.transaction():
        await fencer.execute(LOCK, GRANULE_CLASS, NEAR & 63)
        async with asyncio.timeout(2), shards.bucket(NEAR_TOO).transaction() as tx:
            await add_thing(tx, "of another granule")


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
@pytest.mark.parametrize(
    "admission", [f"SELECT tenfold_enter('{{{NEAR}}}')", f"CALL tenfold_enter_one({NEAR})"]
)
async def test_above_read_committed_a_fence_in_between_fails_the_writer(
    place, admission, isolation
):
    async with connected(place) as fencer, connected(place) as writer:
        transaction = writer.transaction(isolation=isolation)
        await transaction.start()
        await writer.fetchval("SELECT 1 FROM tenfold_bucket LIMIT 1")  # its snapshot
        await fencer.execute(FENCE, NEAR)
        with pytest.raises(asyncpg.SerializationError):
            await writer.execute(admission)
        await transaction.rollback()


async def test_a_batch_over_a_thousand_buckets_takes_at_most_64_locks(place):
    async with connected(place) as connection, connection.transaction():
        await connection.execute("SELECT tenfold_enter($1::int[])", list(range(1000)))
        held = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        )
        assert await connection.fetchval(held) == 64


# The guard ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO thing (bucket, id, tenant, owner, label) VALUES (77, {id}, 't', {id}, 'x')",
        "UPDATE thing SET label = 'x'",
        "DELETE FROM thing",
        "TRUNCATE thing",
        "UPDATE outbox SET sent = 1",
        "DELETE FROM idempotency",
    ],
)
async def test_an_operators_write_that_was_not_admitted_is_refused(place, shards, statement):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
        await tx.execute("INSERT INTO idempotency VALUES (77, 's', 'k', '', 77, 'DONE', '', 0)")
        await tx.execute(
            "INSERT INTO outbox (bucket, event_id, aggregate, event_no, subject, headers, payload,"
            " tenant, created_at_us) VALUES (77, gen_random_uuid(), 'a', 1, 's', '', '', 't', 0)"
        )
    typed = statement.format(id=place.literal(new_id(NEAR)))
    with pytest.raises(asyncpg.PostgresError, match="bucket_not_admitted") as caught:
        await place.run_raw(0, typed, admitted=[] if "TRUNCATE" not in typed else [NEAR])
    assert caught.value.sqlstate == "MB002"
    assert await labels(shards) == ["a"]


async def test_an_admission_ends_with_its_transaction(place):
    async with connected(place) as connection:
        async with connection.transaction():
            await connection.execute("SELECT tenfold_enter('{77}')")
        key = new_id(NEAR)
        with pytest.raises(asyncpg.PostgresError, match="bucket_not_admitted"):
            await connection.execute(INSERT_THING, NEAR, key, "default", key, "x")


async def test_a_row_cannot_change_its_bucket_to_one_that_was_not_admitted(place, shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    moved = f"UPDATE thing SET bucket = {NEAR_TOO}, id = {place.literal(new_id(NEAR_TOO))}"
    with pytest.raises(asyncpg.PostgresError, match="bucket_not_admitted"):
        await place.run_raw(0, moved, admitted=[NEAR])
    await place.run_raw(0, moved, admitted=[NEAR, NEAR_TOO])


# Old maps -------------------------------------------------------------------------------------


async def hand_over(place) -> None:
    """What a move of an empty bucket from the first shard to the last leaves behind."""
    await place.run_raw(3, f"INSERT INTO tenfold_bucket VALUES ({NEAR}, 'ACTIVE', 2)")
    gone = f"UPDATE tenfold_bucket SET state = 'MOVED', peer = '3' WHERE bucket = {NEAR}"
    await place.run_raw(0, gone)


async def test_a_write_with_an_old_map_follows_the_bucket(place, shards):
    await hand_over(place)
    async with shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    assert await shards.all()[3].fetch_all(LIST_LABELS, "default") == [{"label": "a"}]
    assert await shards.all()[0].fetch_all(LIST_LABELS, "default") == []


async def test_a_read_with_an_old_map_is_never_told_that_there_is_nothing(place, shards):
    await hand_over(place)
    key = new_id(NEAR)
    insert = f"INSERT INTO thing VALUES (77, {place.literal(key)}, 'default', "
    await place.run_raw(3, insert + f"{place.literal(key)}, 1, 'a')", admitted=[NEAR])
    assert await shards.bucket(NEAR).fetch_one(LIST_LABELS, "default") == {"label": "a"}


async def test_a_bucket_that_arrives_while_a_writer_waits_is_entered(place, shards):
    gone = f"UPDATE tenfold_bucket SET state = 'FENCED' WHERE bucket = {NEAR}"
    await place.run_raw(0, gone)

    async def write() -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "a")

    writing = asyncio.create_task(write())
    await asyncio.sleep(0.1)
    await hand_over(place)
    await writing
    assert await labels(shards) == ["a"]


async def test_a_scatter_read_with_an_old_map_is_whole_after_a_move(place, shards):
    async with shards.bucket(NEAR_TOO).transaction() as tx:
        await add_thing(tx, "a")
    await hand_over(place)
    sql = "SELECT label FROM thing WHERE tenant = $1 AND tenfold_owned(thing.bucket)"
    assert (await scatter(shards, sql, "default")).rows == [{"label": "a"}]
