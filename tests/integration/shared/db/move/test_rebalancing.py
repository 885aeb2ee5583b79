"""A shard is added and filled while several processes write: nothing is lost, and it carries."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shared.clock import SystemClock, to_us
from shared.db import sqlite_files
from shared.db.ids import new_id
from shared.db.load import tell
from shared.db.move.mover import Pace, Tools
from shared.db.move.place import Place as MovePlace
from shared.db.move.place import move_bucket
from shared.db.move.port import Move, MoveRefused
from shared.db.move.protocol import Phase, Token
from shared.db.move.rebalancing import settle_dead, take_picture
from shared.db.postgres_adding import Addition, add_shard
from tests.fakes import ManualClock
from tests.integration.shared.db.move.arena import fought_over
from tests.integration.shared.db.move.grounds import (
    BUCKET,
    MIGRATIONS,
    SERVICE,
    Databases,
    Ground,
    Place,
    add_counters,
    meanwhile,
)
from tests.integration.shared.db.move.test_adding import empty, public, quiet
from tests.integration.shared.db.move.test_moves import Killed, die, during

__all__ = ["empty"]

# Of both shards, six each.
BUCKETS = (5, 6, 7, 8, 9, 10, 4000, 4001, 4002, 4003, 4004, 4005)
NOTHING = "SELECT id FROM counter WHERE false /* any tenant: a test */"
SWIFT = Tools(pace=replace(Pace(), grace_s=0.0, rest_share=0))


def grow(place: Place) -> None:
    """One file more."""
    sqlite_files.add_shard(place.path, SERVICE, MIGRATIONS, 1, quiet)
    place.shard_count += 1


def grow_databases(databases: Databases, dsn: str) -> None:
    """One database more."""
    addition = Addition(SERVICE, MIGRATIONS, public(dsn), 1, quiet)
    meanwhile(add_shard, databases.servers, addition)
    first = databases.operator[0].rpartition("/")[0]
    operator = [*databases.operator, f"{first}/{dsn.rpartition('/')[2]}"]
    databases.operator = operator
    databases.__post_init__()


async def rebalance(place: MovePlace) -> tuple[dict[int, float], dict[int, float]]:
    """As the command does; what each shard carried as it was measured, and should afterwards."""
    picture = await take_picture(place, SWIFT)
    steps = picture.steps(100)
    assert 2 in {step.dst for step in steps}
    for step in steps:
        await move_bucket(place, step.bucket, step.dst, SWIFT)
    after = await take_picture(place, SWIFT)
    assert after.owners == dict(picture.owners) | {step.bucket: step.dst for step in steps}
    return picture.loads(), picture.loads(steps)


def check(ground: Ground, folder: Path, grow: Callable[[], None]) -> None:
    with fought_over(ground, folder, buckets=BUCKETS) as arena:
        grow()
        before, planned = meanwhile(rebalance, ground.moves)
        assert before[2] == 0
        assert max(planned.values()) < max(before.values())
        assert planned[2] > 0.6
        assert arena.violations() == []
    assert arena.left == []


def test_processes_write_on_while_a_file_is_added_and_filled(place, tmp_path):
    check(place, tmp_path, lambda: grow(place))


@pytest.mark.rare
def test_processes_write_on_while_a_database_is_added_and_filled(databases, empty, tmp_path):
    check(databases, tmp_path, lambda: grow_databases(databases, empty))


@pytest.fixture(params=["place", "databases"])
def ground(request) -> Ground:
    return request.getfixturevalue(request.param)


async def test_a_buckets_bytes_and_time_are_measured(ground):
    async with ground.open() as shards:
        await add_counters(shards, 40)
        await add_counters(shards, 10, bucket=4000)
        clock = SystemClock()
        await tell(shards.meter, ground.moves.control, clock)
        await shards.bucket(4000).fetch_all(NOTHING)
        await tell(shards.meter, ground.moves.control, clock)
        picture = await take_picture(ground.moves, SWIFT)
        later_us = to_us(clock.now()) + int(3600e6)
        faded = await ground.moves.control.read_busy(later_us)
    assert 2 < picture.sizes[BUCKET] / picture.sizes[4000] < 5
    assert picture.busy.keys() == {BUCKET, 4000}
    assert faded[BUCKET] == pytest.approx(picture.busy[BUCKET] / 2, rel=0.01)


async def test_a_shards_weight_is_kept_by_control(ground):
    async with ground.open():
        assert await ground.moves.control.weigh(1, 3)
        assert not await ground.moves.control.weigh(7, 3)
        assert (await take_picture(ground.moves, SWIFT)).weights == {0: 1, 1: 3}


async def test_what_a_dead_mover_left_is_ended_first(place, shards):
    await add_counters(shards, 3)
    long_ago = replace(during("copied", die), clock=ManualClock())
    with pytest.raises(Killed):
        await move_bucket(place.folder, BUCKET, 1, long_ago)
    assert await settle_dead(place.folder, SWIFT) == [(BUCKET, "DONE")]
    assert place.states() == ["MOVED", "ACTIVE"]


async def test_a_balancer_does_not_begin_beside_a_mover_that_lives(place, shards):
    control, now_us = place.folder.control, SWIFT.now_us()
    token = Token(1, "somebody")
    move = Move(new_id(BUCKET), BUCKET, 0, 1, Phase.PLAN, token, now_us + int(30e6), "")
    await control.begin(move)

    async def live() -> None:
        while True:
            await control.renew(move, SWIFT.after_us(30.0))
            await asyncio.sleep(0.05)

    living = asyncio.create_task(live())
    with pytest.raises(MoveRefused, match="just being moved from shard 0 to 1"):
        await settle_dead(place.folder, SWIFT)
    living.cancel()
    await asyncio.wait([living])
