"""What only SQLite does: one writer with turns, commits that are shared, readers of a file."""

import asyncio

import pytest

from shared import deadline
from shared.db.sqlite import open_sqlite_shards
from shared.errors import DeadlineExceeded, Unavailable
from tests.databases import SECRET
from tests.integration.shared.db.conftest import MIGRATIONS, NEAR, add_thing, labels

COUNT_COVERED = "SELECT count(*) AS n FROM thing WHERE tenant = 'default' AND tenfold_owned(bucket)"


@pytest.fixture
def places(sqlite_places):
    return sqlite_places


def commit_count(shards) -> int:
    return sum(shard.writer.commit_count for shard in shards.all())


async def test_writers_that_wait_together_share_a_commit(shards):
    before = commit_count(shards)

    async def add(number: int) -> None:
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, str(number))

    await asyncio.gather(*(add(number) for number in range(100)))
    assert len(await labels(shards)) == 100
    assert commit_count(shards) - before < 60


async def test_the_deadline_holds_while_waiting_for_the_writer(shards):
    async def late() -> None:
        deadline.set_deadline(asyncio.get_running_loop().time() + 0.05)
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "late")

    async with shards.bucket(NEAR).transaction() as tx:
        waiting = asyncio.create_task(late())
        await asyncio.wait([waiting])
        assert isinstance(waiting.exception(), DeadlineExceeded)
        await add_thing(tx, "a")
    assert await labels(shards) == ["a"]


async def test_a_covered_read_cancelled_at_any_moment_leaves_its_reader_usable(shards):
    shard = shards.all()[0]
    await shard.fetch_covered(COUNT_COVERED)
    for turns in range(40):
        reading = asyncio.create_task(shard.fetch_covered(COUNT_COVERED))
        for _ in range(turns):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        # The same reader: it is the one that was given back last.
        async with shard.reading() as reader:
            await reader.run("BEGIN")
            await reader.run("ROLLBACK")
    assert len(shard.readers) == 1


SETTINGS = {
    "journal_mode": "wal",
    "foreign_keys": 1,
    "busy_timeout": 5000,
    "synchronous": 2,  # FULL
}


@pytest.mark.parametrize(("name", "value"), SETTINGS.items(), ids=SETTINGS.keys())
async def test_a_file_is_opened_as_a_server_needs_it(tmp_path, clock, name, value):
    opened = open_sqlite_shards(
        tmp_path,
        migrations=MIGRATIONS,
        shard_count=1,
        synchronous="FULL",
        secret=SECRET,
        clock=clock,
        service="things",
    )
    async with opened as shards:
        [shard] = shards.all()
        async with shard.transaction() as tx:
            row = await tx.fetch_one(f"PRAGMA {name}")
        assert list(row.values()) == [value]
        with pytest.raises(Unavailable, match="cannot be written"):
            await shard.fetch_all("DELETE FROM inbox")
