"""A client that leaves takes no descriptor with it, whenever it leaves."""

import asyncio
import os
from pathlib import Path
from uuid import uuid4

import pytest

from services.media.domain import FileNotServed
from services.media.files import MediaFiles


@pytest.fixture
def files(tmp_path):
    made = MediaFiles(tmp_path)
    made.prepare()
    return made


def open_count(folder: Path) -> int:
    """How many of this process's descriptors are files below the folder."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(link).startswith(str(folder))
        except FileNotFoundError:  # the listing's own
            continue
    return count


async def test_a_file_that_is_opened_and_never_read_is_closed(files, tmp_path):
    (tmp_path / "film.ts").write_bytes(b"film")
    async with files.reading(tmp_path / "film.ts") as (size_bytes, pieces):
        assert size_bytes == 4
        assert open_count(tmp_path) == 1
    assert open_count(tmp_path) == 0
    async with files.reading(tmp_path / "film.ts") as (_, pieces):
        assert [piece async for piece in pieces] == [b"film"]
    assert open_count(tmp_path) == 0


async def test_a_file_that_is_not_there_is_not_served(files, tmp_path):
    with pytest.raises(FileNotServed):
        async with files.reading(tmp_path / "none.ts"):
            pass


@pytest.mark.parametrize("kind", ["reading", "writing"])
async def test_a_caller_cancelled_while_a_file_is_being_opened_leaves_none_open(
    files, tmp_path, kind
):
    (tmp_path / "film.ts").write_bytes(b"film")

    async def open_one():
        opened = files.reading(tmp_path / "film.ts") if kind == "reading" else None
        async with opened or files.writing(uuid4(), 0):
            await asyncio.sleep(10)

    for turns in range(30):
        task = asyncio.create_task(open_one())
        for _ in range(turns // 5):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    async with asyncio.timeout(5):
        while open_count(tmp_path):  # noqa: ASYNC110 -- descriptors do not call back
            await asyncio.sleep(0.01)
