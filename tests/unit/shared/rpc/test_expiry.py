"""Calls end at their moments, with one timer for all."""

import asyncio
import time

import pytest

from shared.rpc.context import Context
from shared.rpc.expiry import Expiry


@pytest.fixture
def expiry() -> Expiry:
    return Expiry()


def call(deadline_in_s: float, *, awaits_message: bool = False) -> Context:
    """A call whose handler never ends by itself."""
    made = Context(method="/a/B", request_id="r", metadata={}, rpc=None)
    made.deadline_s = time.monotonic() + deadline_in_s
    made.awaits_message = awaits_message
    made.task = asyncio.create_task(asyncio.Event().wait())
    return made


async def ends(*calls: Context) -> list[Context]:
    """The calls in the order in which they were ended."""
    order: list[Context] = []
    for one in calls:
        assert one.task is not None
        one.task.add_done_callback(lambda _, one=one: order.append(one))  # type: ignore[misc]
    async with asyncio.timeout(10):
        await asyncio.wait([one.task for one in calls if one.task])
    assert all(one.has_expired for one in calls)
    return order


async def test_calls_end_in_the_order_of_their_deadlines(expiry: Expiry) -> None:
    late, early, middle = call(0.09), call(0.03), call(0.06)
    for one in (late, early, middle):
        expiry.watch(one, one.deadline_s)
    assert await ends(late, early, middle) == [early, middle, late]
    assert all(time.monotonic() > one.deadline_s for one in (late, early, middle))


async def test_a_call_that_has_its_message_gets_its_whole_time(expiry: Expiry) -> None:
    one = call(0.1)
    expiry.watch(one, time.monotonic() + 0.01)
    await ends(one)
    assert time.monotonic() >= one.deadline_s


async def test_a_call_that_still_awaits_its_message_ends_sooner(expiry: Expiry) -> None:
    one = call(60, awaits_message=True)
    expiry.watch(one, time.monotonic() + 0.01)
    await ends(one)
    assert time.monotonic() < one.deadline_s


async def test_a_forgotten_call_is_left_alone(expiry: Expiry) -> None:
    kept, forgotten = call(0.05), call(0.01)
    for one in (kept, forgotten):
        expiry.watch(one, one.deadline_s)
    expiry.forget(forgotten)
    await ends(kept)
    assert not forgotten.has_expired
    assert forgotten.task is not None
    forgotten.task.cancel()


async def test_a_thousand_calls_share_one_timer(
    expiry: Expiry, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later
    monkeypatch.setattr(loop, "call_later", lambda *a: timers.append(a) or call_later(*a))
    for number in range(1000):
        one = call(60 + number)
        expiry.watch(one, one.deadline_s)
        expiry.forget(one)
        assert one.task is not None
        one.task.cancel()
    assert len(timers) == 1
