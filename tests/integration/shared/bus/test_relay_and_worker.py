import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from shared.bus import jetstream, outbox, rules
from shared.bus.jetstream import open_bus
from shared.bus.outbox import run_relay
from shared.bus.worker import redrive, run_subscription
from shared.clock import SystemClock
from shared.db.port import OutboxRow
from tests.fakes import ManualClock
from tests.integration.shared.bus.ledger import (
    MIGRATIONS,
    applied,
    dead_letters,
    emit,
    order_of,
    posted,
    recording,
    unsent,
)

CLOCK = SystemClock()


@pytest.fixture
async def source(places):
    place = await places.make(MIGRATIONS, service="payment", shard_count=2)
    async with place.open(clock=CLOCK) as shards:
        yield shards


@pytest.fixture
async def sink(places):
    place = await places.make(MIGRATIONS, service="reporting", shard_count=2)
    async with place.open(clock=CLOCK) as shards:
        yield shards


@asynccontextmanager
async def running(*coroutines):
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        ended = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=10)
        assert all(task.done() for task in tasks), "a loop does not end when it is cancelled"
        assert not ended, [task.exception() for task in ended]


def relay(source, bus):
    return run_relay(source, bus, service="payment", clock=CLOCK)


def worker(bus, sink, **changes):
    return run_subscription(bus, sink, recording(**changes), clock=CLOCK)


def references(count, start=0):
    return sorted(f"r{number:04}" for number in range(start, start + count))


async def emit_many(source, count, start=0):
    for reference in references(count, start):
        number = int(reference[1:])
        await emit(source, number * 37 % 4096, posted(f"transactions/{number}", reference))


async def test_every_committed_event_is_applied_once(source, sink, bus, eventually):
    async with running(relay(source, bus), worker(bus, sink)):
        await emit_many(source, 60)

        async def all_applied():
            return await applied(sink) == references(60)

        await eventually(all_applied)

        async def all_marked():
            return await unsent(source) == 0

        await eventually(all_marked)


async def test_an_event_says_what_it_is_about(source, sink, bus, eventually):
    seen = []

    async def look(tx, event):
        seen.append(event)

    from dataclasses import replace

    subscription = replace(recording(), handle=look)
    row = posted("transactions/1", "r")
    await emit(source, 5, OutboxRow(row.type, row.aggregate, row.payload, "acme", 77))
    async with running(relay(source, bus), run_subscription(bus, sink, subscription, clock=CLOCK)):
        await eventually(lambda: seen)
    [event] = seen
    assert (event.type, event.tenant, event.aggregate, event.event_no) == (
        "tenfold.ledger.v1.TransactionPosted",
        "acme",
        "transactions/1",
        1,
    )
    assert event.bucket == 77, "a hop is applied where it was sent"
    assert event.is_hop


async def test_events_of_one_aggregate_are_applied_in_order_while_others_run_beside(
    source, sink, bus, eventually
):
    async with source.bucket(9).transaction() as tx:
        for number in range(40):
            for aggregate in ("transactions/a", "transactions/b", "transactions/c"):
                await tx.append_outbox(posted(aggregate, f"{aggregate}-{number}"))
    async with running(relay(source, bus), worker(bus, sink)):

        async def all_applied():
            return len(await applied(sink)) == 120

        await eventually(all_applied)
    for aggregate in ("transactions/a", "transactions/b", "transactions/c"):
        assert await order_of(sink, 9, aggregate) == [*range(1, 41)]


async def test_rows_that_become_visible_late_and_lower_are_published(source, bus, eventually):
    """The trap of every cursor: sequence numbers are taken before the commit.

    SQLite's writer is alone, so a late row is made by giving back a lower number: the row
    is inserted with a sequence below everything that was relayed since.
    """
    async with source.bucket(1).transaction() as tx:
        await tx.append_outbox(posted("transactions/late", "late"))
        await tx.execute(
            "UPDATE outbox SET sent = 1, seq = -1 WHERE aggregate = $1", "transactions/late"
        )
    shard = source.shard_of(1)
    async with running(relay(source, bus)):
        for number in range(1000 // 50):
            async with source.bucket(1).transaction() as tx:
                for one in range(50):
                    await tx.append_outbox(posted(f"transactions/{number}-{one}", "r"))

        async def all_marked():
            return await unsent(source) == 0

        await eventually(all_marked)
        async with shard.transaction() as tx:
            await tx.execute("UPDATE outbox SET sent = 0, seq = 0 WHERE seq = -1")
        await eventually(all_marked)
    info = await bus.stream_info("EVT_payment")
    assert info.state.messages == 1001


async def test_a_server_killed_in_the_middle_loses_and_doubles_nothing(
    source, sink, nats, bus, eventually
):
    async with running(relay(source, bus), worker(bus, sink)):
        emitting = asyncio.create_task(emit_many(source, 150))
        for _ in range(3):
            await asyncio.sleep(0.15)
            nats.kill()
            await asyncio.sleep(0.1)
            await nats.start()
        await emitting

        async def all_applied():
            return await applied(sink) == references(150)

        await eventually(all_applied, timeout_s=40)


async def test_with_the_server_down_events_wait_in_the_outbox_and_nowhere_else(
    source, sink, nats, bus, eventually
):
    async with running(relay(source, bus), worker(bus, sink)):
        await emit_many(source, 1)

        async def first_applied():
            return await applied(sink) == references(1)

        await eventually(first_applied)
        nats.kill()
        await eventually(lambda: not bus.is_connected)
        await emit_many(source, 20, start=1)
        await asyncio.sleep(0.3)
        assert await unsent(source) == 20
        with pytest.raises(jetstream.BusUnavailable):
            await bus.publish("evt.payment.X.1", b"", {})
        await nats.start()

        async def all_applied():
            return await applied(sink) == references(21)

        await eventually(all_applied)


async def test_a_wiped_server_is_filled_again_from_the_outbox(source, sink, nats, bus, eventually):
    """Published, acknowledged, and lost before anyone consumed it."""
    async with running(relay(source, bus)):
        await emit_many(source, 20)

        async def all_marked():
            return await unsent(source) == 0

        await eventually(all_marked)
        nats.kill()
        nats.wipe()
        await nats.start()
        async with running(worker(bus, sink)):

            async def all_applied():
                return await applied(sink) == references(20)

            await eventually(all_applied, timeout_s=30)


async def test_a_server_that_lost_all_while_the_relay_was_down_for_an_hour_is_filled_again(
    source, sink, nats, bus, eventually
):
    """Rows that are due to be forgotten are still what the broker is repaired from."""
    async with running(relay(source, bus)):
        await emit_many(source, 20)

        async def all_marked():
            return await unsent(source) == 0

        await eventually(all_marked)
    nats.kill()
    nats.wipe()
    await nats.start()
    later = ManualClock(datetime.now(UTC) + timedelta(hours=1))
    repairing = run_relay(source, bus, service="payment", clock=later)
    async with running(repairing, worker(bus, sink)):

        async def all_applied():
            return await applied(sink) == references(20)

        await eventually(all_applied)


async def test_the_same_event_published_twice_is_applied_once(source, sink, bus, eventually):
    await emit_many(source, 5)
    async with running(relay(source, bus)):

        async def all_marked():
            return await unsent(source) == 0

        await eventually(all_marked)
    for shard in source.all():
        async with shard.transaction() as tx:
            await tx.execute("UPDATE outbox SET sent = 0")
    await bus.jetstream.purge_stream("EVT_payment")
    # As after the duplicate window: the stream takes them again.
    await bus.jetstream.delete_stream("EVT_payment")
    async with running(relay(source, bus), worker(bus, sink)):

        async def all_applied():
            return await applied(sink) == references(5) and await unsent(source) == 0

        await eventually(all_applied)
        for shard in source.all():
            async with shard.transaction() as tx:
                await tx.execute("UPDATE outbox SET sent = 0")
        await bus.jetstream.delete_stream("EVT_payment")
        await eventually(all_applied)
        await asyncio.sleep(0.5)
        assert await applied(sink) == references(5)


async def test_within_the_window_the_stream_itself_refuses_the_duplicate(source, bus, eventually):
    await emit_many(source, 5)
    async with running(relay(source, bus)):

        async def all_marked():
            return await unsent(source) == 0

        await eventually(all_marked)
        for shard in source.all():
            async with shard.transaction() as tx:
                await tx.execute("UPDATE outbox SET sent = 0")
        await eventually(all_marked)
    assert (await bus.stream_info("EVT_payment")).state.messages == 5


async def test_poison_is_dead_lettered_once_and_the_others_go_on(
    source, sink, bus, eventually, monkeypatch
):
    monkeypatch.setattr(rules, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(rules, "BACKOFF_MAX_S", 0.05)
    same = "transactions/p"
    await emit(source, 3, posted(same, "r0"), posted(same, "poison"), posted(same, "r1"))
    await emit(source, 3, posted("transactions/q", "r2"))
    async with running(relay(source, bus), worker(bus, sink)):

        async def others_applied():
            return await applied(sink) == ["r0", "r1", "r2"]

        await eventually(others_applied)
    assert await dead_letters(sink) == [("ValueError: cannot be applied", rules.POISON_AT)]


async def test_what_the_server_gave_up_is_dead_lettered_too(
    source, sink, bus, eventually, monkeypatch
):
    """As if a worker were killed at every single delivery: our own count never gets there."""
    monkeypatch.setattr(rules, "MAX_DELIVER", 2)
    monkeypatch.setattr(rules, "BACKOFF_FIRST_S", 0.01)
    await emit(source, 3, posted("transactions/p", "poison"), posted("transactions/q", "r"))
    async with running(relay(source, bus), worker(bus, sink)):

        async def is_dead():
            return await dead_letters(sink) == [("given up by the server", 2)]

        await eventually(is_dead)
        assert await applied(sink) == ["r"]


async def test_what_is_no_event_at_all_is_kept_for_an_operator(source, sink, bus, eventually):
    await bus.ensure_streams("payment")
    await bus.publish("evt.payment.TransactionPosted.7", b"junk", {})
    await bus.publish("evt.payment.TransactionPosted.x", b"junk", {})
    await emit(source, 3, posted("transactions/q", "r"))
    async with running(relay(source, bus), worker(bus, sink)):

        async def are_parked():
            return len(await dead_letters(sink)) == 2 and await applied(sink) == ["r"]

        await eventually(are_parked)


async def test_a_dead_letter_can_be_applied_again_and_is_gone_then(
    source, sink, bus, eventually, monkeypatch
):
    monkeypatch.setattr(rules, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(rules, "BACKOFF_MAX_S", 0.05)
    await emit(source, 3, posted("transactions/p", "poison"))
    async with running(relay(source, bus), worker(bus, sink)):

        async def is_dead():
            return await dead_letters(sink)

        await eventually(is_dead)
    row = await sink.bucket(3).fetch_one("SELECT id FROM dead_letter")
    subscription = recording()
    with pytest.raises(ValueError, match="cannot be applied"):
        await redrive(sink, subscription, bucket=3, letter=row["id"])
    assert await dead_letters(sink)

    async def mended(tx, event):
        pass

    from dataclasses import replace

    subscription = replace(subscription, handle=mended)
    assert await redrive(sink, subscription, bucket=3, letter=row["id"])
    assert not await dead_letters(sink)
    assert not await redrive(sink, subscription, bucket=3, letter=row["id"])


async def test_an_event_ahead_of_its_predecessor_waits_and_is_not_swallowed(
    source, sink, bus, eventually, monkeypatch
):
    monkeypatch.setattr(rules, "BACKOFF_FIRST_S", 0.05)
    same = "transactions/g"
    await emit(source, 3, posted(same, "r1"), posted(same, "r2"), posted(same, "r3"))
    shard = source.shard_of(3)
    async with shard.transaction() as tx:  # the first is held back, as if the stream lost it
        await tx.execute("UPDATE outbox SET sent = 1 WHERE event_no = 1")
    async with running(relay(source, bus), worker(bus, sink)):

        async def others_marked():
            return await unsent(source) == 0

        await eventually(others_marked)
        await asyncio.sleep(0.1)
        assert await applied(sink) == []
        async with shard.transaction() as tx:
            await tx.execute("UPDATE outbox SET sent = 0 WHERE event_no = 1")

        async def all_applied():
            return await applied(sink) == ["r1", "r2", "r3"]

        await eventually(all_applied)
    assert await order_of(sink, 3, same) == [1, 2, 3]


async def test_a_predecessor_that_never_comes_does_not_stop_its_aggregate_for_ever(
    source, sink, bus, eventually, monkeypatch
):
    monkeypatch.setattr(rules, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(rules, "BACKOFF_MAX_S", 0.05)
    same = "transactions/g"
    await emit(source, 3, posted(same, "r1"), posted(same, "r2"), posted(same, "r3"))
    async with source.shard_of(3).transaction() as tx:
        await tx.execute("UPDATE outbox SET sent = 1 WHERE event_no = 1")
    async with running(relay(source, bus), worker(bus, sink)):

        async def others_applied():
            return await applied(sink) == ["r2", "r3"]

        await eventually(others_applied)


async def test_jobs_and_hops_of_an_aggregate_are_no_gaps_to_who_reads_it_in_order(
    source, sink, bus, eventually
):
    name = "transactions/1"
    job = OutboxRow("Settle", name, b"", "default", queue="settle")
    hop = replace(posted(name, "hop"), bucket=3000)
    async with running(relay(source, bus), worker(bus, sink)):
        for reference in ("a", "b", "c"):
            await emit(source, 7, posted(name, reference), job, hop)
        # Well before a gap would be accepted, at the eighth delivery.
        async with asyncio.timeout(5):
            await eventually(lambda: is_applied(sink, ["a", "b", "c", "hop", "hop", "hop"]))
        assert await order_of(sink, 7, name) == [1, 2, 3]


async def is_applied(sink, wanted):
    return await applied(sink) == wanted


async def test_sums_need_no_order_and_read_only_their_own_types(source, sink, bus, eventually):
    row = posted("transactions/o", "r")
    other = OutboxRow("tenfold.ledger.v1.Unheard", row.aggregate, row.payload, row.tenant)
    await emit(source, 3, other, row)
    async with running(relay(source, bus), worker(bus, sink, is_ordered=False)):

        async def is_applied():
            return await applied(sink) == ["r"]

        await eventually(is_applied)
    info = await bus.jetstream.consumer_info("EVT_payment", "reporting-test-TransactionPosted")
    assert info.config.filter_subject == "evt.payment.TransactionPosted.*"


async def test_two_relays_of_one_shard_take_turns_by_lease(source, bus, eventually):
    await emit_many(source, 10)
    async with running(relay(source, bus), relay(source, bus)):

        async def all_marked():
            return await unsent(source) == 0

        await eventually(all_marked)
        await emit_many(source, 10, start=10)
        await eventually(all_marked)
    holders = {
        row["holder"]
        for shard in source.all()
        for row in await shard.fetch_all("SELECT holder FROM tenfold_lease")
    }
    assert len(holders) <= 2
    assert (await bus.stream_info("EVT_payment")).state.messages == 20


async def test_a_failure_holds_back_its_own_aggregate_only(source, bus, eventually):
    too_much = bytes(1_100_000)  # above the server's max_payload
    bad = OutboxRow("tenfold.ledger.v1.TransactionPosted", "transactions/bad", too_much, "default")
    await emit(source, 3, bad, posted("transactions/bad", "after"), posted("transactions/ok", "r"))
    async with running(relay(source, bus)):

        async def rest_marked():
            return await unsent(source) == 2

        await eventually(rest_marked)
    assert (await bus.stream_info("EVT_payment")).state.messages == 1


async def test_whoever_starts_first_makes_the_streams_and_the_owner_corrects_them(
    source, bus, eventually
):
    await bus.ensure_readable("payment")
    config = (await bus.stream_info("EVT_payment")).config
    await bus.jetstream.update_stream(config.evolve(max_age=600.0))
    await bus.ensure_readable("payment")
    assert (await bus.stream_info("EVT_payment")).config.max_age == 600.0
    await bus.ensure_streams("payment")
    assert (await bus.stream_info("EVT_payment")).config.max_age == jetstream.EVENT_AGE_S


async def test_a_process_starts_without_a_server_and_delivers_when_it_comes(
    source, sink, nats_process, eventually, monkeypatch
):
    monkeypatch.setattr(jetstream, "CONNECT_FIRST_S", 0.2)
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(open_bus(nats_process.url, name="early"))
        assert not bus.is_connected
        await stack.enter_async_context(running(relay(source, bus), worker(bus, sink)))
        await emit_many(source, 3)
        await nats_process.start()

        async def all_applied():
            return await applied(sink) == references(3)

        await eventually(all_applied)


async def test_rows_sent_long_ago_are_removed(source, bus, eventually, monkeypatch):
    monkeypatch.setattr(outbox, "SENT_KEPT_S", -60.0)
    monkeypatch.setattr(outbox, "SWEEP_S", 0.05)
    await emit_many(source, 5)
    async with running(relay(source, bus)):

        async def is_empty():
            rows = [await s.fetch_one("SELECT count(*) AS count FROM outbox") for s in source.all()]
            return sum(row["count"] for row in rows) == 0

        await eventually(is_empty)
    assert (await bus.stream_info("EVT_payment")).state.messages == 5
