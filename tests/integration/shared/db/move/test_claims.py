"""Who may move a bucket: of many at once it is one, and a dead one keeps nobody out."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from datetime import timedelta

import pytest

from shared.clock import SystemClock
from shared.db.move.place import move_bucket, settle_left, settle_move
from shared.db.move.port import MoveFailed, MoveLost, MoveRefused
from shared.db.move.protocol import Phase
from tests.fakes import ManualClock
from tests.integration.shared.db.move.grounds import (
    ADD_ONE,
    BUCKET,
    Ground,
    add_counters,
    meanwhile,
    states_of,
    tools,
)
from tests.integration.shared.db.move.test_moves import Killed, die, during

MANY = 4


@pytest.fixture(params=["place", "databases"], ids=["sqlite", "postgres"])
def ground(request) -> Ground:
    return request.getfixturevalue(request.param)


async def at_once(works: list[Awaitable[Phase]]) -> list[object]:
    """How each ended: its phase, or the kind of its refusal."""
    ends = await asyncio.gather(*works, return_exceptions=True)
    assert all(isinstance(end, Phase | MoveRefused | MoveLost | MoveFailed) for end in ends), ends
    return ends


async def states(ground: Ground) -> list[str]:
    return await asyncio.to_thread(states_of, ground, BUCKET)


async def test_of_many_that_begin_a_move_at_once_one_makes_it_and_the_others_are_told(ground):
    async with ground.open() as shards:
        [counter_id] = await add_counters(shards, 1)
        ends = await at_once([move_bucket(ground.moves, BUCKET, 1, tools()) for _ in range(MANY)])
        refusals = [str(end) for end in ends if end is not Phase.DONE]
        assert len(refusals) == MANY - 1
        assert all(f"bucket {BUCKET}" in refusal for refusal in refusals)
        assert await states(ground) == ["MOVED", "ACTIVE"]
        async with shards.bucket(BUCKET).transaction() as tx:
            assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1


@pytest.mark.parametrize("step", ["copied", "commit"])
async def test_of_many_that_take_a_move_over_at_once_one_ends_it(ground, step):
    async with ground.open() as shards:
        [counter_id] = await add_counters(shards, 1)
        with pytest.raises(Killed):
            long_ago = replace(during(step, die), clock=ManualClock())
            await move_bucket(ground.moves, BUCKET, 1, long_ago)
        [left] = await ground.moves.control.list_moves(is_open=True)
        ends = await at_once(
            [settle_move(ground.moves, left, tools(), preference="abort") for _ in range(MANY)]
        )
        assert len([end for end in ends if isinstance(end, Phase)]) == 1
        assert await ground.moves.control.list_moves(is_open=True) == []
        assert sorted(await states(ground)) in (["ABORTED", "ACTIVE"], ["ACTIVE", "MOVED"])
        async with shards.bucket(BUCKET).transaction() as tx:
            assert await tx.execute(ADD_ONE, BUCKET, counter_id) == 1


async def test_a_dead_movers_lease_from_before_the_clock_was_set_back_keeps_nobody_out(ground):
    async with ground.open() as shards:
        await add_counters(shards, 1)
    later = ManualClock(SystemClock().now() + timedelta(hours=3))
    with pytest.raises(Killed):
        await move_bucket(ground.moves, BUCKET, 1, replace(during("fence2", die), clock=later))
    async with ground.open() as shards, shards.bucket(BUCKET).transaction():
        pass
    assert await states(ground) == ["ACTIVE", "ABORTED"]


async def test_a_mover_that_lives_is_not_taken_over(ground):
    async with ground.open() as shards:
        await add_counters(shards, 1)

    async def settle() -> None:
        [move] = await ground.moves.control.list_moves(is_open=True)
        await settle_left(ground.moves, BUCKET, tools())
        with pytest.raises(MoveRefused, match="its mover still works"):
            await settle_move(ground.moves, move, tools(), preference="abort")

    working = during("copied", lambda: meanwhile(settle))
    assert await move_bucket(ground.moves, BUCKET, 1, working) is Phase.DONE
