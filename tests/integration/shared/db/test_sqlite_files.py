"""What a folder of SQLite files is made of, and when it is refused."""

import asyncio
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from shared.clock import SystemClock
from shared.db.errors import DatabaseDamaged, DatabaseRefused, MigrationRefused
from shared.db.sqlite import open_sqlite_shards
from shared.errors import Unavailable
from tests.databases import SECRET
from tests.integration.shared.db.conftest import (
    FAR,
    MIGRATIONS,
    NEAR,
    add_thing,
    labels,
)

SECOND = "ALTER TABLE thing ADD COLUMN colour text NOT NULL DEFAULT 'red';\n"


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))


@pytest.fixture
def open_folder(tmp_path: Path, migrations: Path):
    def open_it(**options):
        settings = {"shard_count": 2, "secret": SECRET, "clock": SystemClock(), **options}
        return open_sqlite_shards(
            tmp_path / "data", migrations=migrations, **{"service": "things", **settings}
        )

    return open_it


async def test_a_new_migration_is_applied_once_and_keeps_the_rows(open_folder, migrations):
    async with open_folder() as shards, shards.bucket(NEAR).transaction() as tx:
        await add_thing(tx, "a")
    (migrations / "0002_colour.sql").write_text(SECOND)
    for _ in range(2):
        async with open_folder() as shards:
            row = await shards.bucket(NEAR).fetch_one(
                "SELECT label, colour FROM thing WHERE tenant = $1", "default"
            )
            assert row == {"label": "a", "colour": "red"}


async def test_a_migration_changed_after_it_was_applied_is_refused(open_folder, migrations):
    async with open_folder():
        pass
    file = migrations / "0001_things.sql"
    file.write_text(file.read_text() + "-- a late thought\n")
    with pytest.raises(MigrationRefused, match="0001_things of things was changed"):
        async with open_folder():
            pass


async def test_a_folder_written_by_a_newer_version_is_refused(open_folder, migrations):
    (migrations / "0002_colour.sql").write_text(SECOND)
    async with open_folder():
        pass
    (migrations / "0002_colour.sql").unlink()
    with pytest.raises(MigrationRefused, match=r"newer version .*0002_colour"):
        async with open_folder():
            pass


async def test_a_sqlite_that_is_too_old_is_refused(open_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(DatabaseRefused, match=r"RETURNING needs 3\.35"):
        async with open_folder():
            pass
    assert not (tmp_path / "data").exists()


async def test_numbers_with_a_gap_are_refused(open_folder, migrations):
    (migrations / "0003_colour.sql").write_text(SECOND)
    with pytest.raises(MigrationRefused, match="where number 0002 belongs"):
        async with open_folder():
            pass


async def test_a_migration_that_fails_leaves_nothing_of_itself(open_folder, migrations, tmp_path):
    (migrations / "0002_colour.sql").write_text(SECOND + "CREATE TABLE thing (id uuid);\n")
    with pytest.raises(MigrationRefused, match=r"shard-1.sqlite was not migrated .*already exists"):
        async with open_folder():
            pass
    (migrations / "0002_colour.sql").write_text(SECOND)
    async with open_folder() as shards:
        assert await labels(shards) == []


async def test_a_migration_that_fails_on_one_shard_names_it_and_the_others_are_at_the_newest(
    open_folder, migrations, tmp_path
):
    async with open_folder():
        pass
    files = [sqlite3.connect(tmp_path / f"data/shard-{index}.sqlite") for index in (0, 1)]
    with closing(files[0]), closing(files[1]):
        files[0].execute("CREATE TABLE colour (name text)")  # in the way
        (migrations / "0002_colour.sql").write_text(SECOND + "CREATE TABLE colour (name text);\n")
        with pytest.raises(MigrationRefused, match=r"shard-0.sqlite .*already exists") as caught:
            async with open_folder():
                pass
        assert "shard-1" not in str(caught.value)
        files[1].execute("SELECT colour FROM thing")
        with pytest.raises(sqlite3.OperationalError, match="no such column"):
            files[0].execute("SELECT colour FROM thing")
        files[0].execute("DROP TABLE colour")
        async with open_folder():
            files[0].execute("SELECT colour FROM thing")


async def test_more_shards_start_empty_and_fewer_change_nothing(open_folder):
    async with open_folder() as shards, shards.bucket(FAR).transaction() as tx:
        await add_thing(tx, "a")
    async with open_folder(shard_count=3) as shards:
        assert await labels(shards) == ["a"]
        owned = "SELECT count(*) AS n FROM tenfold_bucket"
        assert await shards.all()[2].fetch_one(owned) == {"n": 0}
    async with open_folder(shard_count=2) as shards:
        assert len(shards.all()) == 3


async def test_swapped_files_are_refused(open_folder, tmp_path):
    async with open_folder():
        pass
    folder = tmp_path / "data"
    (folder / "shard-0.sqlite").rename(folder / "x")
    (folder / "shard-1.sqlite").rename(folder / "shard-0.sqlite")
    (folder / "x").rename(folder / "shard-1.sqlite")
    with pytest.raises(DatabaseRefused, match="swapped"):
        async with open_folder():
            pass


@pytest.mark.parametrize("left", [None, b""], ids=["missing", "empty"])
async def test_a_file_that_was_in_use_is_not_made_anew(open_folder, tmp_path, left):
    async with open_folder() as shards, shards.bucket(FAR).transaction() as tx:
        await add_thing(tx, "a")
    path = tmp_path / "data/shard-1.sqlite"
    kept = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(DatabaseRefused, match=r"shard-1.sqlite is missing .*from a backup"):
        async with open_folder():
            pass
    assert not path.exists() or path.read_bytes() == left
    path.write_bytes(kept)
    async with open_folder() as shards:
        assert await labels(shards) == ["a"]


async def test_another_services_files_are_refused(open_folder):
    async with open_folder():
        pass
    with pytest.raises(MigrationRefused, match="holds the data of things: it is another service's"):
        async with open_folder(service="others"):
            pass


async def test_a_lost_file_is_noticed_by_its_buckets(open_folder, tmp_path):
    async with open_folder(shard_count=2):
        pass
    connection = sqlite3.connect(tmp_path / "data/shard-1.sqlite")
    connection.execute("DELETE FROM tenfold_bucket WHERE bucket = 4000")
    connection.commit()
    connection.close()
    with pytest.raises(DatabaseRefused, match="bucket 4000 is owned by no shard"):
        async with open_folder():
            pass


@pytest.mark.parametrize("offset", [0, 30, 4096 * 3 + 5, 4096 * 8 + 3])
@pytest.mark.parametrize("name", ["shard-0.sqlite", "control.sqlite"])
async def test_a_damaged_file_is_refused_and_left_as_it_is(open_folder, tmp_path, name, offset):
    async with open_folder() as shards, shards.bucket(NEAR).transaction() as tx:
        for number in range(200):
            await add_thing(tx, f"{number} is a label of some length")
    path = tmp_path / "data" / name
    content = bytearray(path.read_bytes())
    if offset >= len(content):
        return
    content[offset : offset + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(DatabaseDamaged, match=f"{name} is damaged .*backup"):
        async with open_folder():
            pass
    assert path.read_bytes() == content


async def test_a_torn_log_keeps_every_whole_commit_before_the_tear(open_folder, tmp_path):
    folder, copy = tmp_path / "data", tmp_path / "copy"
    async with open_folder() as shards:
        for label in ("a", "b", "c"):
            async with shards.bucket(NEAR).transaction() as tx:
                await add_thing(tx, label)
        shutil.copytree(folder, copy)  # as a power cut leaves it: the log is not folded in
    log = copy / "shard-0.sqlite-wal"
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 100)
    shutil.rmtree(folder)
    copy.rename(folder)
    async with open_folder() as shards:
        assert await labels(shards) == ["a", "b"]


async def test_a_reader_that_cannot_be_opened_is_an_outage_that_ends(open_folder, tmp_path):
    path = tmp_path / "data/shard-0.sqlite"
    async with open_folder() as shards:
        away = path.rename(tmp_path / "away")
        with pytest.raises(Unavailable):
            await labels(shards)
        away.rename(path)
        assert await labels(shards) == []


def threads() -> int:
    """But for those of the loop's own pool."""
    return len([one for one in threading.enumerate() if not one.name.startswith("asyncio_")])


async def until_ended(count: int) -> None:
    """A thread ends just after its connection was closed."""
    async with asyncio.timeout(10):
        while threads() != count:  # noqa: ASYNC110 - threads ring no bell
            await asyncio.sleep(0.001)


async def test_a_read_cancelled_while_its_reader_is_opened_leaves_no_thread(open_folder):
    before = threads()
    for turns in range(12):
        async with open_folder(shard_count=1) as shards:
            reading = asyncio.create_task(labels(shards))
            for _ in range(turns):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait([reading])
            assert await labels(shards) == []
        await until_ended(before)


async def test_no_thread_is_left_when_the_shards_are_closed(open_folder):
    before = threads()
    async with open_folder(shard_count=4) as shards:
        await labels(shards)
        assert threads() > before
    await until_ended(before)
