"""Stocks on every engine: reserved, then committed or released, within the limit."""

import asyncio
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from shared.db.ids import new_id
from shared.db.stock import (
    Level,
    Stock,
    StockExceeded,
    commit_held,
    commit_used,
    day_of,
    level_of,
    release,
    reserve,
)
from tests.integration.shared.db.conftest import NEAR

BYTES = Stock("default", new_id(NEAR), "stored-bytes")
DAY = day_of(datetime(2026, 1, 1, tzinfo=UTC))
MAILS = Stock("default", new_id(NEAR), "emails", DAY)


async def level(shards, stock=BYTES) -> Level:
    return await level_of(shards.bucket(NEAR), NEAR, stock)


async def test_what_is_held_counts_from_its_reservation_to_its_release(shards):
    one = uuid4()
    for step, expected in (
        (lambda tx: reserve(tx, BYTES, one, 70, limit=100), Level(0, 70)),
        (lambda tx: commit_held(tx, "default", BYTES.kind, one), Level(70, 0)),
        (lambda tx: release(tx, "default", BYTES.kind, one), Level(0, 0)),
    ):
        for _ in range(2):  # a repeated step changes nothing
            async with shards.bucket(NEAR).transaction() as tx:
                await step(tx)
            assert await level(shards) == expected


async def test_what_is_used_up_stays_so_and_what_came_to_nothing_does_not(shards):
    sent, refused = uuid4(), uuid4()
    async with shards.bucket(NEAR).transaction() as tx:
        await reserve(tx, MAILS, sent, 1, limit=2)
        await reserve(tx, MAILS, refused, 1, limit=2)
        await commit_used(tx, "default", MAILS.kind, sent)
        await release(tx, "default", MAILS.kind, refused)
        await commit_used(tx, "default", MAILS.kind, sent)
    assert await level(shards, MAILS) == Level(1, 0)


async def test_beyond_the_limit_nothing_is_reserved_and_the_refusal_says_what_is_left(shards):
    async with shards.bucket(NEAR).transaction() as tx:
        await reserve(tx, BYTES, uuid4(), 70, limit=100)
    with pytest.raises(StockExceeded, match="31 of stored-bytes are asked for, and 30 of 100"):
        async with shards.bucket(NEAR).transaction() as tx:
            await reserve(tx, BYTES, uuid4(), 31, limit=100)
    assert await level(shards) == Level(0, 70)
    async with shards.bucket(NEAR).transaction() as tx:
        await reserve(tx, BYTES, uuid4(), 30, limit=100)


async def test_reservations_that_race_never_exceed_the_limit_together(shards):
    async def one() -> bool:
        try:
            async with shards.bucket(NEAR).transaction() as tx:
                await reserve(tx, BYTES, uuid4(), 7, limit=50)
        except StockExceeded:
            return False
        return True

    assert sum(await asyncio.gather(*(one() for _ in range(40)))) == 7
    assert await level(shards) == Level(0, 49)


async def test_an_effect_that_rolls_back_takes_its_reservation_along(shards):
    with pytest.raises(RuntimeError):
        async with shards.bucket(NEAR).transaction() as tx:
            await reserve(tx, BYTES, uuid4(), 7, limit=50)
            raise RuntimeError
    assert await level(shards) == Level(0, 0)


async def test_tenants_owners_and_days_are_counted_apart_and_old_days_forgotten(shards):
    others = [
        Stock("other", MAILS.owner, "emails", DAY),
        Stock("default", new_id(NEAR), "emails", DAY),
        Stock("default", MAILS.owner, "emails", "2026-01-02"),
    ]
    for stock in (MAILS, *others):
        async with shards.bucket(NEAR).transaction() as tx:
            entry = uuid4()
            await reserve(tx, stock, entry, 1, limit=1)
            await commit_used(tx, stock.tenant, stock.kind, entry)
    assert [await level(shards, stock) for stock in others] == [Level(1, 0)] * 3
    assert await level(shards, MAILS) == Level(0, 0)  # a day later


async def test_another_tenants_entry_is_not_there(shards):
    entry = uuid4()
    async with shards.bucket(NEAR).transaction() as tx:
        await reserve(tx, BYTES, entry, 7, limit=50)
        await release(tx, "other", BYTES.kind, entry)
    assert await level(shards) == Level(0, 7)
