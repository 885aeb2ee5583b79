"""Lanes on both engines: what is decided together is written together, once."""

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from services.payment.domain import NewEntry, Owner, OwnerKind, Side
from services.payment.journal import journal_of
from services.payment.lane import (
    BATCH_ORDERS_MAX,
    WAITING_ORDERS_MAX,
    Group,
    Lane,
    Lanes,
    OnSeveralShards,
    open_lanes,
)
from services.payment.posting import Kind, Order, Result
from services.payment.wiring import MIGRATIONS
from shared.db.errors import UniqueViolation
from shared.db.ids import bucket_of, new_id
from shared.errors import Overloaded, RaceLost, Unavailable

OPEN = """
INSERT INTO account (bucket, id, tenant, owner, owner_kind, currency_code, exponent, normal_side,
                     may_overdraw, display_name, state, created_at_us)
VALUES ($1, $2, 'default', $2, 1, 'EUR', 2, 2, $3, '', 1, 0)
"""
SUMS = """
SELECT posted_debit, posted_credit, pending_debit, pending_credit FROM entry
WHERE bucket = $1 AND account_id = $2 AND tenant = 'default'
ORDER BY account_sequence DESC LIMIT 1
"""


async def open_account(shards, *, bucket: int = 77, may_overdraw: bool = False):
    account_id = new_id(bucket)
    async with shards.bucket(bucket).transaction() as tx:
        await tx.execute(OPEN, bucket, account_id, may_overdraw)
    return account_id


async def balance(shards, account_id) -> tuple[int, int]:
    """What is there, and what of it is held."""
    row = await shards.holding(account_id).fetch_one(SUMS, bucket_of(account_id), account_id)
    return row["posted_credit"] - row["posted_debit"], row["pending_debit"]


def order(payer, payee, units: int, **but) -> Order:
    entries = (
        NewEntry(payer, Side.DEBIT, "EUR", units, "account", "amount"),
        NewEntry(payee, Side.CREDIT, "EUR", units, "to_account", "amount"),
    )
    values = {
        "order_id": new_id(bucket_of(payer)),
        "tenant": "default",
        "owner": Owner(OwnerKind.USER, payer),
        "entries": entries,
        "fingerprint": b"asked",
        **but,
    }
    return Order(**values)


async def results(lanes: Lanes, *orders: Order) -> list[Result]:
    return [answer.result for answer in await lanes.submit(orders)]


@pytest.fixture
async def shards(places, clock):
    place = await places.make(MIGRATIONS, shard_count=1)
    async with place.open(clock=clock) as opened:
        yield opened


@pytest.fixture
async def lanes(shards, clock):
    async with open_lanes(shards, clock) as opened:
        yield opened


@pytest.fixture
async def accounts(shards, lanes):
    """A source of money, and two accounts in other buckets with 100 each."""
    source = await open_account(shards, may_overdraw=True)
    first, second = [await open_account(shards, bucket=number) for number in (5, 3000)]
    assert await results(lanes, order(source, first, 100), order(source, second, 100)) == [
        Result.OK,
        Result.OK,
    ]
    return source, first, second


async def test_what_arrives_while_a_batch_is_on_its_way_forms_the_next(shards, lanes, accounts):
    source, first, _ = accounts
    before = lanes.lanes[0].batch_count
    told = await asyncio.gather(*(results(lanes, order(source, first, 1)) for _ in range(300)))
    assert told == [[Result.OK]] * 300
    assert lanes.lanes[0].batch_count - before <= 3
    assert await balance(shards, first) == (400, 0)


async def test_every_answer_is_the_same_from_the_database_as_it_was_in_the_batch(
    shards, lanes, accounts
):
    source, first, second = accounts
    poor = order(first, second, 500)
    hold = order(first, second, 60, kind=Kind.HOLD)
    part = order(
        first, second, 0, entries=(), kind=Kind.POST_HOLD, pending_id=hold.order_id, minor_units=40
    )
    batch = [order(source, first, 1), poor, hold, part]
    assert await results(lanes, *batch) == [Result.OK, Result.EXCEEDS_CREDITS, Result.OK, Result.OK]
    assert await balance(shards, first) == (61, 0)
    again = [Result.EXISTS, Result.ID_ALREADY_FAILED, Result.EXISTS, Result.EXISTS]
    assert await results(lanes, order(source, first, 1_000), *batch) == [Result.OK, *again]
    assert await results(lanes, replace(batch[0], fingerprint=b"other")) == [
        Result.EXISTS_WITH_DIFFERENT_FIELDS
    ]


async def test_a_hold_keeps_its_money_from_others_until_it_ends(shards, lanes, accounts):
    _, first, second = accounts
    hold = order(first, second, 80, kind=Kind.HOLD)
    await results(lanes, hold)
    assert await balance(shards, first) == (100, 80)
    void = order(first, second, 0, entries=(), kind=Kind.VOID_HOLD, pending_id=hold.order_id)
    told = await results(lanes, order(first, second, 30), void, order(first, second, 30))
    assert told == [Result.EXCEEDS_CREDITS, Result.OK, Result.OK]
    assert await balance(shards, first) == (70, 0)
    late = replace(void, order_id=new_id(5), kind=Kind.POST_HOLD)
    assert await results(lanes, late) == [Result.PENDING_TRANSFER_ALREADY_VOIDED]


async def test_a_chain_is_refused_as_a_whole_and_its_neighbours_pass(shards, lanes, accounts):
    source, first, second = accounts
    chain = [order(source, first, 50, is_linked=True), order(second, first, 101)]
    told = await asyncio.gather(
        results(lanes, *chain), *(results(lanes, order(source, second, 1)) for _ in range(5))
    )
    assert told[0] == [Result.LINKED_EVENT_FAILED, Result.EXCEEDS_CREDITS]
    assert told[1:] == [[Result.OK]] * 5
    assert (await balance(shards, first), await balance(shards, second)) == ((100, 0), (105, 0))


async def test_a_caller_that_gives_up_does_not_stop_the_batch(shards, lanes, accounts):
    source, first, _ = accounts
    asked = [order(source, first, 1) for _ in range(40)]
    callers = [asyncio.create_task(results(lanes, one)) for one in asked]
    await asyncio.sleep(0)
    for caller in callers[::2]:
        caller.cancel()
    told = await asyncio.gather(*callers, return_exceptions=True)
    assert told[1::2] == [[Result.OK]] * 20
    assert await results(lanes, *asked) == [Result.EXISTS] * 40
    assert await balance(shards, first) == (140, 0)


async def test_a_full_lane_says_so_and_takes_nothing_more(shards, clock):
    lane = Lane(shards, 0, journal_of(shards.engine), clock)
    one = order(new_id(1), new_id(1), 1)
    waiting = [
        asyncio.create_task(lane.submit(Group([one] * BATCH_ORDERS_MAX, frozenset({1}))))
        for _ in range(WAITING_ORDERS_MAX // BATCH_ORDERS_MAX)
    ]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await lane.submit(Group([one], frozenset({1})))
    for task in waiting:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class FailingJournal:
    """The real journal, whose writes fail as they are told to."""

    def __init__(self, real, *errors: Exception) -> None:
        self._real = real
        self.errors = list(errors)
        self.written: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    async def write(self, tx, outcome) -> None:
        self.written.append(len(outcome.records))
        if self.errors:
            raise self.errors.pop(0)
        await self._real.write(tx, outcome)


@pytest.mark.parametrize(
    ("errors", "written"),
    [
        ([RaceLost("faster"), Unavailable("gone")], [3, 3, 3]),
        ([UniqueViolation("entry_pkey")] * 4, [3, 3, 3, 3, 1, 2]),
    ],
    ids=["the batch is decided again", "a batch that fails for one of them is split"],
)
async def test_a_database_error_fails_no_caller(shards, lanes, accounts, clock, errors, written):
    source, first, _ = accounts
    journal = FailingJournal(journal_of(shards.engine), *errors)
    lane = Lane(shards, 0, journal, clock)
    groups = [Group([order(source, first, 1)], frozenset({5, 77})) for _ in range(3)]
    waiting = [asyncio.create_task(lane.submit(group)) for group in groups]
    await asyncio.sleep(0)
    running = asyncio.create_task(lane.run())
    told = await asyncio.gather(*waiting)
    running.cancel()
    assert [answer.result for [answer] in told] == [Result.OK] * 3
    assert journal.written == written
    assert await balance(shards, first) == (103, 0)


async def test_two_processes_on_one_shard_never_spend_the_same_money(
    shards, lanes, accounts, clock
):
    _, first, second = accounts
    async with open_lanes(shards, clock) as others:
        told = await asyncio.gather(
            *(results((lanes, others)[at % 2], order(first, second, 7)) for at in range(60))
        )
    assert told.count([Result.OK]) == 14
    assert await balance(shards, first) == (2, 0)


async def test_each_event_is_written_with_its_transaction(shards, lanes, accounts):
    source, first, second = accounts
    await results(lanes, order(source, first, 1), order(second, first, 1_000))
    rows = await shards.bucket(77).fetch_all("SELECT event_id, event_no FROM outbox ORDER BY seq")
    posted = await shards.bucket(77).fetch_all(
        "SELECT id FROM ledger_transaction WHERE result = 0 /* any tenant: all of them */"
    )
    assert {row["event_id"] for row in rows} == {row["id"] for row in posted}
    assert [row["event_no"] for row in rows] == [1, 1, 1]


async def test_orders_over_several_shards_are_told_apart(places, clock):
    place = await places.make(MIGRATIONS, shard_count=2)
    async with place.open(clock=clock) as shards, open_lanes(shards, clock) as lanes:
        near = next(b for b in range(4096) if shards.shard_index(b) == 0)
        far = next(b for b in range(4096) if shards.shard_index(b) == 1)
        with pytest.raises(OnSeveralShards):
            await results(lanes, order(new_id(near), new_id(far), 1))
