"""A shard's disk is full: nothing is lost, reads go on, and writes do once there is room."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.local.unprivileged import give_to
from shared.db.ids import new_id
from shared.db.move.place import move_bucket, settle_move
from shared.db.move.port import MoveFailed
from shared.db.move.postgres_place import PostgresPlace as MovePlace
from shared.db.move.protocol import Phase
from shared.db.port import OutboxRow, Shards
from shared.db.postgres_shards import parse_servers
from shared.errors import Unavailable
from tests.databases import Contents, PostgresPlace, PostgresServer, SqlitePlace
from tests.integration.shared.db.conftest import FAR, MIGRATIONS, NEAR, add_thing, labels
from tests.integration.shared.db.move.grounds import tools

PAYLOAD = os.urandom(60_000)
WRITES_MAX = 500
SPARE_BYTES = 1_000_000


class Disk:
    """A file system of its own, with room for little more than what it holds when it is filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mount("size=256m")

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("not run: no file system can be mounted here")

    def shrink(self) -> None:
        stats = os.statvfs(self.folder)
        used_bytes = (stats.f_blocks - stats.f_bfree) * stats.f_frsize
        self._mount(f"remount,size={used_bytes + SPARE_BYTES}")

    def grow(self) -> None:
        self._mount("remount,size=256m")

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)


@pytest.fixture
def disk() -> Iterator[Disk]:
    folder = Path(tempfile.mkdtemp(prefix="tenfold-disk-"))
    folder.chmod(0o711)
    try:
        disk = Disk(folder)
        yield disk
        disk.remove()
    finally:
        shutil.rmtree(folder)


async def fill(shards: Shards) -> int:
    """Write into one bucket until that is refused; how often it was done."""
    for number in range(WRITES_MAX):
        try:
            async with shards.bucket(NEAR).transaction() as tx:
                await add_thing(tx, new_id(NEAR).hex)
                await tx.append_outbox(OutboxRow("t.Made", "things/1", PAYLOAD, "default"))
        except Unavailable as error:
            assert "no room left" in str(error)
            assert error.retry_after_s
            return number
    raise AssertionError("the disk was not full")


async def event_numbers(shards: Shards) -> list[int]:
    sql = "SELECT event_no FROM outbox ORDER BY event_no"
    return [row["event_no"] for row in await shards.bucket(NEAR).fetch_all(sql)]


async def test_a_file_on_a_full_disk_is_named_and_written_again_once_there_is_room(disk, capfd):
    place = SqlitePlace(disk.folder, Contents(MIGRATIONS, "things", 1))
    async with place.open() as shards:
        disk.shrink()
        done = await fill(shards)
        assert done == len(await labels(shards)) > 1
        assert "shard-0.sqlite" in capfd.readouterr().out
        done += await fill(shards)  # small parts, perhaps
        disk.grow()
        async with shards.bucket(NEAR).transaction() as tx:
            await add_thing(tx, "after")
            await tx.append_outbox(OutboxRow("t.Made", "things/1", PAYLOAD, "default"))
    async with place.open() as shards:
        assert len(await labels(shards)) == done + 1
        assert await event_numbers(shards) == list(range(1, done + 2))


@pytest.fixture
async def first_on_it(disk, postgres_server: PostgresServer) -> AsyncIterator[PostgresPlace]:
    """Two shards, the first of them on the disk."""
    give_to(disk.folder, postgres_server.site.user)
    first, second = await postgres_server.make_databases(2)
    name = first.rpartition("/")[2]
    async with postgres_server.admin() as admin:
        await admin.execute(f"CREATE TABLESPACE small LOCATION '{disk.folder}'")
        await admin.execute(f"ALTER DATABASE {name} SET TABLESPACE small")
    yield PostgresPlace(f"{first},{second}", Contents(MIGRATIONS, "things", 2))
    await postgres_server.drop_databases([first, second])
    async with postgres_server.admin() as admin:
        await admin.execute("DROP TABLESPACE small")


async def test_a_move_to_a_full_disk_says_so_and_its_bucket_stays_whole(disk, first_on_it):
    servers = MovePlace(parse_servers(first_on_it.name, service="things"))
    async with first_on_it.open() as shards:
        async with shards.bucket(FAR).transaction() as tx:
            for _ in range(2 * SPARE_BYTES // len(PAYLOAD)):
                await tx.append_outbox(OutboxRow("t.Made", "things/1", PAYLOAD, "default"))
        disk.shrink()
        with pytest.raises(MoveFailed, match=r"shard 0 of things .*No space left on device"):
            await move_bucket(servers, FAR, 0, tools())
        async with shards.bucket(FAR).transaction() as tx:
            await add_thing(tx, "far")
        disk.grow()
        for move in await servers.control.list_moves(is_open=True):
            await settle_move(servers, move, tools(), preference="abort", is_forced=True)
        assert await move_bucket(servers, FAR, 0, tools()) is Phase.DONE
        assert await labels(shards) == ["far"]


async def test_a_database_on_a_full_disk_is_named_and_hurts_only_its_own_buckets(disk, first_on_it):
    async with first_on_it.open() as shards:
        disk.shrink()
        done = await fill(shards)
        assert done == len(await labels(shards)) > 1
        async with shards.bucket(FAR).transaction() as tx:
            await add_thing(tx, "far")
        disk.grow()
        async with shards.bucket(NEAR).transaction() as tx:
            await tx.append_outbox(OutboxRow("t.Made", "things/1", PAYLOAD, "default"))
        assert await event_numbers(shards) == list(range(1, done + 2))
        assert len(await labels(shards)) == done + 1
