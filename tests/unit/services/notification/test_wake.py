import asyncio
from uuid import UUID

from services.notification.wake import InboxSignal

ADA, BOB = UUID(int=1), UUID(int=2)


async def waits(waiter, timeout_s: float) -> float:
    """How long one wait took, in seconds."""
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    await waiter.wait(timeout_s)
    return loop.time() - begin_s


async def test_a_ring_ends_the_wait_of_its_inbox_and_of_every_sender():
    signal = InboxSignal()
    with signal.watching("t", ADA) as watcher, signal.sending() as sender:
        signal.ring("t", ADA)
        assert await waits(watcher, 60) < 1
        assert await waits(sender, 60) < 1


async def test_a_ring_is_for_one_inbox_of_one_tenant():
    signal = InboxSignal()
    with signal.watching("t", ADA) as watcher:
        signal.ring("t", BOB)
        signal.ring("other", ADA)
        assert await waits(watcher, 0.03) >= 0.02


async def test_after_a_ring_the_looks_come_soon_and_then_later_until_it_is_calm():
    signal = InboxSignal()
    with signal.watching("t", ADA) as watcher:
        signal.ring("t", ADA)
        await watcher.wait(60)
        first, second = await waits(watcher, 60), await waits(watcher, 60)
        assert 0.005 < first < second < 1
        watcher.calm()
        assert await waits(watcher, 0.2) >= 0.15


async def test_a_ring_that_nobody_hears_is_forgotten():
    signal = InboxSignal()
    signal.ring("t", ADA)
    with signal.watching("t", ADA) as watcher:
        assert signal.count("t", ADA) == 1
        assert await waits(watcher, 0.03) >= 0.02
    assert signal.count("t", ADA) == 0
