"""The clock is set back by hours: nothing waits until it is as late again."""

from datetime import timedelta

import pytest

from shared.clock import CLOCKS_APART_US, to_us
from shared.db import leases, todo, uniq
from shared.db.ids import new_id
from tests.integration.shared.db.conftest import FAR, NEAR, add_thing, labels, once, user

HOURS = timedelta(hours=3)
TTL_US = 5_000_000
EMAIL = uniq.UniqueValue("default", "email", "ada@example.org")


@pytest.fixture
async def shards(engine, clock):
    async with engine.open(clock=clock) as opened:
        yield opened


async def test_writes_go_on_and_a_repeated_request_is_answered(shards, clock):
    asker = user(NEAR)
    for is_repeated in (False, True):
        async with shards.bucket(NEAR).transaction(once(asker)) as tx:
            assert tx.answered is is_repeated
            if not is_repeated:
                await add_thing(tx, "a")
                await tx.answer_with(b"answer")
        clock.step_wall(-HOURS.total_seconds())
    assert await labels(shards) == ["a"]


async def test_a_dead_holders_lease_is_taken_and_not_one_of_a_clock_that_is_ahead(shards, clock):
    before_us = to_us(clock.now())
    back_us = before_us - HOURS // timedelta(microseconds=1)

    async def take(holder: str, now_us: int):
        async with shards.all()[0].transaction() as tx:
            return await leases.take_lease(tx, "relay", holder=holder, now_us=now_us, ttl_us=TTL_US)

    held = await take("dead", before_us)
    assert await take("with its clock behind", before_us - CLOCKS_APART_US) is None
    taken = await take("later", back_us)
    assert taken.token > held.token


async def test_a_dead_creators_value_may_be_claimed(shards, clock):
    before_us = to_us(clock.now())
    dead, heir = new_id(NEAR), new_id(FAR)
    await uniq.reserve_unique(shards, EMAIL, dead, now_us=before_us)
    with pytest.raises(uniq.UniqueTaken):
        await uniq.reserve_unique(shards, EMAIL, heir, now_us=before_us - CLOCKS_APART_US)
    await uniq.reserve_unique(shards, EMAIL, heir, now_us=before_us - 3 * CLOCKS_APART_US)
    async with shards.bucket(EMAIL.bucket).transaction() as tx:
        assert not await uniq.confirm_unique(tx, EMAIL, dead)
        assert await uniq.confirm_unique(tx, EMAIL, heir)


async def test_a_step_that_was_put_off_is_taken(shards, clock):
    before_us = to_us(clock.now())
    step = todo.Todo(NEAR, new_id(NEAR), "confirm", b"")
    async with shards.bucket(NEAR).transaction() as tx:
        await todo.add_todo(tx, step, next_at_us=before_us + 1)
    shard = shards.all()[0]
    assert await todo.list_due_todos(shard, "confirm", now_us=before_us) == []
    assert await todo.list_due_todos(shard, "confirm", now_us=before_us - 10**10) == [step]
