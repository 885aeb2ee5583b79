import asyncio
from contextlib import aclosing

import pytest

from services.notification.domain import InboxSummary, Notice
from services.notification.store import SqlNotificationStore, insert_notice
from services.notification.wake import InboxSignal
from services.notification.watch import (
    BACKLOG_COUNT_MAX,
    STREAM_COUNT_MAX,
    InboxWatch,
    TooManyStreams,
    cursor_of_position,
)
from shared.clock import SystemClock
from shared.db.ids import new_id
from shared.errors import InvalidRequest

TENANT = "default"
ADA, BOB = new_id(7), new_id(7)


@pytest.fixture
def store(shards) -> SqlNotificationStore:
    return SqlNotificationStore(shards, emails_per_day_max=500)


@pytest.fixture
def signal() -> InboxSignal:
    return InboxSignal()


@pytest.fixture
def watch(store, signal) -> InboxWatch:
    return InboxWatch(store, signal=signal, clock=SystemClock(), poll_s=0.05)


@pytest.fixture
def tell(shards, clock):
    async def insert(title: str, recipient=ADA):
        notice = Notice(recipient, TENANT, title, "c", title, "b", "s", email=False)
        async with shards.holding(recipient).transaction() as tx:
            await insert_notice(tx, notice, now=clock.now())

    return insert


async def take(stream, count):
    async with asyncio.timeout(10):
        return [await anext(stream) for _ in range(count)]


def titles(changes):
    return [change.item.title for change in changes if change.item]


async def test_an_empty_cursor_starts_with_what_happens_from_now_on(watch, tell):
    await tell("before")
    async with aclosing(watch.run(TENANT, ADA, "")) as stream:
        [first] = await take(stream, 1)
        assert (first.position, first.item, first.summary) == (1, None, InboxSummary(1, 1, 1))
        await tell("after")
        [change] = await take(stream, 1)
    assert change.item.title == "after"
    assert (change.position, change.summary) == (2, InboxSummary(2, 2, 2))


async def test_a_cursor_goes_on_exactly_where_the_last_stream_stopped(watch, tell):
    for number in range(5):
        await tell(str(number))
    async with aclosing(watch.run(TENANT, ADA, "0")) as stream:
        seen = await take(stream, 3)
    cursor = cursor_of_position(seen[-1].position)
    async with aclosing(watch.run(TENANT, ADA, cursor)) as stream:
        rest = await take(stream, 4)
    assert titles(seen) + titles(rest) == ["0", "1", "2", "3", "4"]


async def test_many_writers_and_many_cuts_lose_and_double_nothing(watch, tell):
    async def write() -> None:
        await asyncio.gather(*(tell(str(number)) for number in range(120)))

    async def read() -> list[str]:
        seen, cursor = [], "0"
        while len(seen) < 120:
            async with aclosing(watch.run(TENANT, ADA, cursor)) as stream:
                changes = await take(stream, 8 if len(seen) <= 113 else 121 - len(seen))
            seen += titles(changes)
            cursor = cursor_of_position(changes[-1].position)
        return seen

    seen, _ = await asyncio.gather(read(), write())
    assert sorted(seen, key=int) == [str(number) for number in range(120)]


async def test_the_last_message_counts_everything(watch, tell, store, clock):
    await tell("a")
    [item] = await store.list_items(TENANT, ADA, limit=1)
    async with aclosing(watch.run(TENANT, ADA, "")) as stream:
        await take(stream, 1)
        await store.mark_read(TENANT, ADA, item.item_id, now=clock.now())
        [change] = await take(stream, 1)
    assert change.item.read_at == clock.now()
    assert change.summary == InboxSummary(0, 1, 2)


async def test_a_change_by_another_process_is_seen_without_a_ring(watch, tell):
    async with aclosing(watch.run(TENANT, ADA, "")) as stream:
        await take(stream, 1)
        await tell("quiet")
        assert titles(await take(stream, 1)) == ["quiet"]


async def test_a_ring_before_the_commit_is_as_good_as_one_after_it(store, signal, tell):
    slow = InboxWatch(store, signal=signal, clock=SystemClock(), poll_s=3600)
    async with aclosing(slow.run(TENANT, ADA, "")) as stream:
        await take(stream, 1)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        signal.ring(TENANT, ADA)
        await asyncio.sleep(0.05)
        await tell("late")
        async with asyncio.timeout(10):
            assert (await waiting).item.title == "late"


@pytest.mark.parametrize("behind", [BACKLOG_COUNT_MAX + 1, -1], ids=["too old", "from the future"])
async def test_a_cursor_that_cannot_be_resumed_gets_a_resync(watch, shards, tell, behind):
    await tell("a")
    version = BACKLOG_COUNT_MAX + 5
    async with shards.holding(ADA).transaction() as tx:
        for _ in range(version - 1):
            await tx.execute(
                "UPDATE inbox_summary SET version = version + 1 WHERE tenant = $1", TENANT
            )
    async with aclosing(watch.run(TENANT, ADA, str(version - behind))) as stream:
        [first] = await take(stream, 1)
        assert (first.is_resync, first.position, first.item) == (True, version, None)
        await tell("b")
        assert titles(await take(stream, 1)) == ["b"]


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "٣", "9" * 20, " 1", "1;DROP"])
async def test_a_cursor_that_no_stream_sent_is_refused(watch, cursor):
    with pytest.raises(InvalidRequest) as caught:
        await anext(watch.run(TENANT, ADA, cursor))
    assert caught.value.violations[0].field == "cursor"


async def test_anothers_changes_are_not_seen(watch, tell):
    async with aclosing(watch.run(TENANT, BOB, "0")) as stream:
        await take(stream, 1)
        await tell("for ada")
        await tell("for bob", BOB)
        assert titles(await take(stream, 1)) == ["for bob"]


async def test_nobody_watches_from_too_many_places_and_a_closed_stream_makes_room(watch):
    streams = [watch.run(TENANT, ADA, "") for _ in range(STREAM_COUNT_MAX)]
    for stream in streams:
        await take(stream, 1)
    with pytest.raises(TooManyStreams):
        await anext(watch.run(TENANT, ADA, ""))
    async with aclosing(watch.run(TENANT, BOB, "")) as other:
        await take(other, 1)
    await streams.pop().aclose()
    async with aclosing(watch.run(TENANT, ADA, "")) as again:
        await take(again, 1)
    for stream in streams:
        await stream.aclose()


async def test_a_quiet_stream_sends_a_heartbeat(store, signal, clock):
    quiet = InboxWatch(store, signal=signal, clock=clock, poll_s=0.01)
    async with aclosing(quiet.run(TENANT, ADA, "")) as stream:
        await take(stream, 1)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        clock.advance(20)
        async with asyncio.timeout(10):
            beat = await waiting
    assert (beat.position, beat.item, beat.is_resync) == (0, None, False)
