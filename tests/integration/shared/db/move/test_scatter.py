"""Reads over every shard while a bucket goes to and fro between two of them."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from shared.db.move.place import move_bucket
from shared.db.move.protocol import Phase
from shared.db.port import Shards
from shared.db.scatter import scatter
from shared.errors import Unavailable
from tests.integration.shared.db.move.grounds import BUCKET, NEIGHBOUR, add_counters, tools

COUNT = "SELECT count(*) AS n FROM counter WHERE tenant = 'default' AND tenfold_owned(bucket)"
MOVES, ROWS = 3, 40

Going = Callable[[], Coroutine[Any, Any, None]]


async def counted_while(shards: Shards, going: Going) -> list[int]:
    """What scatter reads counted until the moves were over, which another process makes."""
    await add_counters(shards, ROWS)
    await add_counters(shards, ROWS, bucket=NEIGHBOUR)
    moving = asyncio.ensure_future(asyncio.to_thread(lambda: asyncio.run(going())))
    counted = []
    while not moving.done():
        with suppress(Unavailable):  # it is told so: nobody owned the bucket for a moment
            gathered = await scatter(shards, COUNT)
            counted.append(sum(row["n"] for row in gathered.rows))
    await moving
    return counted


def to_and_fro(place: Any) -> Going:
    async def going() -> None:
        for number in range(MOVES):
            dst = (number + 1) % 2
            assert await move_bucket(place, BUCKET, dst, tools()) is Phase.DONE

    return going


async def test_every_row_is_counted_once_on_sqlite(place, shards):
    counted = await counted_while(shards, to_and_fro(place.folder))
    assert len(counted) >= MOVES
    assert set(counted) == {2 * ROWS}


async def test_every_row_is_counted_once_on_postgres(databases):
    async with databases.open() as shards:
        counted = await counted_while(shards, to_and_fro(databases.place))
    assert len(counted) >= MOVES
    assert set(counted) == {2 * ROWS}
