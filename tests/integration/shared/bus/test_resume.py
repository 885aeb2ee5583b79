"""Shards that were copied go on from their moment: nothing is lost, nothing happens twice."""

import asyncio
import sqlite3
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta

import pytest

from shared.bus.jetstream import open_bus
from shared.bus.outbox import run_relay
from shared.bus.owed import OwedMessage, read_owed, unfinished_events, unfinished_jobs
from shared.bus.resume import resume
from shared.bus.worker import run_subscription
from shared.clock import SystemClock, to_us
from shared.db.port import OutboxRow
from shared.db.sqlite_cut import open_cut
from tests.fakes import ManualClock
from tests.integration.shared.bus.ledger import (
    applied,
    dead_letters,
    emit,
    open_shards,
    order_of,
    posted,
    recording,
    unsent,
)
from tests.integration.shared.bus.nats_server import NatsServer

CLOCK = SystemClock()
AWAY_S = 8 * 24 * 3600.0
"""Longer than inboxes remember, and than streams and outboxes keep anything."""


@asynccontextmanager
async def running(*coroutines):
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=10)


@asynccontextmanager
async def mesh(folder, bus, clock=CLOCK):
    """A service that emits, with its relay, and one that applies; both hold still without it."""
    async with (
        open_shards(folder, "payment", clock) as source,
        open_shards(folder, "reporting", clock) as sink,
        running(
            run_relay(source, bus, service="payment", clock=clock),
            run_relay(sink, bus, service="reporting", clock=clock),
        ),
    ):
        yield source, sink


def names(first, last):
    return [f"r{number:03}" for number in range(first, last)]


async def emit_all(source, references):
    """To two aggregates in turn, so that their order can be seen."""
    for reference in references:
        number = int(reference[1:]) % 2
        await emit(source, 5 + number * 3000, posted(f"transactions/{number}", reference))


def databases_of(folder):
    return sorted(folder.glob("*/*.sqlite"))


def copy_now(folder, to):
    paths = databases_of(folder)
    with open_cut(paths, inside=lambda: None) as cut:
        for file in cut.files:
            target = to / file.path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.copy_to(target, lambda _: None)
        return cut.at_us


def forget_sent(folder, *, after=0):
    """What a relay's sweep does a quarter of an hour later."""
    for path in folder.glob("payment/shard-*.sqlite"):
        with closing(sqlite3.connect(path, timeout=10)) as shard, shard:
            shard.execute("DELETE FROM outbox WHERE sent = 1 AND event_no > ?", (after,))


def outbox_order(folder):
    """The event numbers of each shard's only aggregate, as the relay will send them."""
    found = []
    for path in sorted(folder.glob("payment/shard-*.sqlite")):
        with closing(sqlite3.connect(path)) as shard:
            found.append(
                [no for (no,) in shard.execute("SELECT event_no FROM outbox ORDER BY seq")]
            )
    return found


def mark_inboxes(folder):
    """With a row that is older than any may be: when it has gone, all old ones have."""
    for path in folder.glob("reporting/shard-*.sqlite"):
        with closing(sqlite3.connect(path)) as shard, shard:
            [bucket] = shard.execute("SELECT min(bucket) FROM tenfold_bucket").fetchone()
            shard.execute("INSERT INTO inbox VALUES (?, 'mark', zeroblob(16), 0)", (bucket,))


async def has_swept(sink):
    counts = [
        await shard.fetch_one("SELECT count(*) AS n FROM inbox WHERE consumer = 'mark'")
        for shard in sink.all()
    ]
    return [row["n"] for row in counts] == [0, 0]


async def read_all(bus, parts):
    return [message for part in parts for message in [m async for m in read_owed(bus, part)]]


def restored(folder, messages, *, at_us, now):
    paths = sorted(folder.glob("payment/shard-*.sqlite"))
    stood_us = to_us(now) - at_us
    resume(sorted(folder.glob("reporting/shard-*.sqlite")), [], stood_us=stood_us)
    return resume(paths, messages, stood_us=stood_us)


@pytest.fixture
async def other_bus(tmp_path):
    """A broker that has never heard of anything."""
    other = NatsServer(tmp_path / "other-jetstream")
    await other.start()
    async with open_bus(other.url, name="test") as opened:
        yield opened
    other.kill()


async def test_a_copy_goes_on_a_week_later_with_each_event_of_before_it_once(
    tmp_path, bus, other_bus, eventually
):
    folder, copy = tmp_path / "live", tmp_path / "copy"
    async with mesh(folder, bus) as (source, sink):

        async def all_sent():
            return await unsent(source) == 0

        subscribed = run_subscription(bus, sink, recording(), clock=CLOCK)
        async with running(subscribed):
            await emit_all(source, names(0, 6))

            async def six_applied():
                return await applied(sink) == names(0, 6)

            await eventually(six_applied)
        # Nobody consumes any more. Of these, the broker alone will know;
        await emit_all(source, names(6, 12))
        await eventually(all_sent)
        forget_sent(folder, after=3)
        # these are in the broker and in the outbox;
        await emit_all(source, names(12, 18))
        await eventually(all_sent)
        parts = await unfinished_events(bus)
        at_us = copy_now(folder, copy)
        # and these never happened, though the broker has them when it is read.
        await emit_all(source, names(18, 24))
        await eventually(all_sent)
        messages = await read_all(bus, parts)
    now = datetime.now(UTC) + timedelta(seconds=AWAY_S)
    resumed = restored(copy, messages, at_us=at_us, now=now)
    assert (resumed.returned, resumed.later, resumed.foreign) == (6, 6, 0)
    assert outbox_order(copy) == [list(range(1, 10))] * 2
    mark_inboxes(copy)
    later = ManualClock(now)
    async with mesh(copy, other_bus, later) as (source, sink):
        await eventually(lambda: has_swept(sink))
        async with running(run_subscription(other_bus, sink, recording(), clock=later)):

            async def all_applied():
                return await applied(sink) == names(0, 18) and await unsent(source) == 0

            await eventually(all_applied)
            # What was applied before the copy is not due to be forgotten, and not repeated.
            await emit_all(source, names(30, 32))

            async def new_ones_too():
                return await applied(sink) == names(0, 18) + names(30, 32)

            await eventually(new_ones_too)
        assert await dead_letters(sink) == []
        for number in (0, 1):
            order = await order_of(sink, 5 + number * 3000, f"transactions/{number}")
            assert order == list(range(1, 11)), "and in the order of their aggregate"


async def test_jobs_that_wait_are_rows_again_and_those_that_are_done_are_not(
    tmp_path, bus, eventually
):
    folder, copy = tmp_path / "live", tmp_path / "copy"
    async with mesh(folder, bus) as (source, _):
        for number in range(3):
            row = OutboxRow("Convert", f"videos/{number}", b"film", "acme", queue="transcode")
            await emit(source, 7, row)

        async def all_sent():
            return await unsent(source) == 0

        await eventually(all_sent)
        forget_sent(folder)
        worker = await bus.jetstream.pull_subscribe("wrk.payment.transcode.*", durable="w")
        [first] = await worker.fetch(1)
        await first.ack_sync()
        messages = await read_all(bus, await unfinished_jobs(bus))
        at_us = copy_now(folder, copy)
    assert restored(copy, messages, at_us=at_us, now=datetime.now(UTC)).returned == 2
    async with open_shards(copy, "payment", CLOCK) as shards:
        rows = await shards.all()[0].fetch_all(
            "SELECT aggregate, subject, payload, tenant, sent FROM outbox ORDER BY seq"
        )
    assert [tuple(row.values()) for row in rows] == [
        (f"videos/{number}#transcode", "wrk.payment.transcode.7", b"film", "acme", 0)
        for number in (1, 2)
    ]


async def test_a_bucket_that_is_on_its_way_keeps_what_it_must_send(tmp_path, bus, eventually):
    """A fenced bucket takes no writes of anybody, but its events are sent again all the same."""
    folder = tmp_path / "live"
    async with mesh(folder, bus) as (source, _):
        await emit_all(source, names(0, 2))

        async def all_sent():
            return await unsent(source) == 0

        await eventually(all_sent)
    at_us = to_us(datetime.now(UTC))
    for path in folder.glob("payment/shard-*.sqlite"):
        with closing(sqlite3.connect(path)) as shard, shard:
            shard.execute("UPDATE tenfold_bucket SET state = 'FENCED' WHERE state = 'ACTIVE'")
    restored(folder, [], at_us=at_us, now=datetime.now(UTC))
    for path in folder.glob("payment/shard-*.sqlite"):
        with closing(sqlite3.connect(path)) as shard:
            assert {sent for (sent,) in shard.execute("SELECT sent FROM outbox")} == {0}
            with pytest.raises(sqlite3.IntegrityError, match="bucket_not_admitted"):
                shard.execute("UPDATE outbox SET sent = 1")


async def test_what_is_not_ours_in_a_stream_is_counted_and_left_out(tmp_path):
    async with open_shards(tmp_path, "payment", CLOCK):
        pass
    strange = OwedMessage("evt.payment.X", {"Nats-Msg-Id": "?"}, b"")
    now = datetime.now(UTC)
    assert restored(tmp_path, [strange], at_us=to_us(now), now=now).foreign == 1
