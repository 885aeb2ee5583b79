"""Streams and uploads that one caller has open at once, counted over all edges."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from edge.config import EdgeConfig
from edge.quota_valkey import open_valkey
from edge.slots import SlotLimit, Slots
from edge.slots_valkey import ValkeySlots
from shared.clock import SystemClock
from shared.errors import QuotaExceeded
from tests.integration.edge.quotas import AWAY, PATIENT_S, new_key, valkey_of_its_own

STREAMS = SlotLimit("streams", 5)
BRIEF_US = 300_000
WATCH = "/v1/videos/endless:watch"


@asynccontextmanager
async def slots_on(url: str, *names: str, slot_us: int = 15_000_000) -> AsyncIterator[list]:
    async with AsyncExitStack() as stack:
        stores = []
        for name in names:
            client = await stack.enter_async_context(open_valkey(url, timeout_s=PATIENT_S))
            stores.append(ValkeySlots(client, SystemClock(), edge=name, slot_us=slot_us))
        yield stores


async def taken(store: ValkeySlots, key: str, count: int, *, prefix: str = "") -> int:
    asked = (store.take(key, f"{prefix}{number}", STREAMS.count_max) for number in range(count))
    return sum(await asyncio.gather(*asked))


async def test_over_all_edges_a_caller_has_as_many_as_it_may(valkey_url):
    key = new_key()
    async with slots_on(valkey_url, "one", "two") as stores:
        results = await asyncio.gather(*(taken(store, key, 20) for store in stores))
    assert sum(results) == STREAMS.count_max


async def test_a_slot_that_is_released_is_free_at_once(valkey_url):
    key = new_key()
    async with slots_on(valkey_url, "one", "two") as [one, two]:
        assert await taken(one, key, 5) == 5
        one.release(key, "3")
        # Behind the release on its connection: it has been carried out.
        assert await one.take(key, "again", STREAMS.count_max)
        assert not await two.take(key, "0", STREAMS.count_max)


async def test_the_slots_of_a_killed_edge_are_free_when_nobody_renews_them(valkey_url):
    key = new_key()
    async with slots_on(valkey_url, "killed", "alive", slot_us=BRIEF_US) as [killed, alive]:
        assert await taken(killed, key, 5) == 5
        assert not await alive.take(key, "0", STREAMS.count_max)
        await asyncio.sleep(2 * BRIEF_US / 1e6)
        assert await taken(alive, key, 9) == 5


async def test_what_is_renewed_stays_taken_and_comes_back_after_a_loss(tmp_path):
    key = new_key()
    with valkey_of_its_own(tmp_path) as server:
        async with slots_on(server.url, "one", "two") as [one, two]:
            assert await taken(one, key, 5) == 5
            server.flush()
            await one.renew()
            assert not await two.take(key, "0", STREAMS.count_max)


async def test_while_valkey_is_away_each_edge_grants_its_share():
    async with slots_on(AWAY, "one") as [store]:
        store.edge_count = 2
        assert await taken(store, new_key(), 20) == 2
        await store.renew()  # harmless


async def test_a_slot_is_released_however_the_call_ends(valkey_url):
    key = new_key()
    async with slots_on(valkey_url, "one") as [store]:
        slots = Slots(store)
        for _ in range(3 * STREAMS.count_max):
            try:
                async with slots.taken(STREAMS, key):
                    raise RuntimeError
            except RuntimeError:
                pass
        assert not store._own.taken


async def test_slots_made_anew_over_a_store_never_share_a_member(valkey_url):
    key = new_key()
    async with slots_on(valkey_url, "one") as [store], AsyncExitStack() as stack:
        for _ in range(STREAMS.count_max):  # as contracts that are loaded again make them
            await stack.enter_async_context(Slots(store).taken(STREAMS, key))
        with pytest.raises(QuotaExceeded, match="At most 5 streams may be open at once"):
            await stack.enter_async_context(Slots(store).taken(STREAMS, key))


async def test_two_edges_count_a_callers_streams_together_and_say_why_they_refuse(start_edge):
    config = EdgeConfig(streams_per_caller_max=2, drain_s=1.0)
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(start_edge(config))
        two = await stack.enter_async_context(start_edge(config))
        headers = one.bearer()
        async with AsyncExitStack() as streams:
            kept = []
            for edge in (one, two):
                stream = edge.client.stream("GET", WATCH, headers=headers)
                answer = await streams.enter_async_context(stream)
                kept.append(answer.aiter_bytes())  # a dropped generator closes its connection
                await anext(kept[-1])
            refused = await two.client.get("/v1/videos/v1:watch", headers=headers)
            other = await two.client.get("/v1/videos/v1:watch", headers=one.bearer())
        assert (refused.status_code, refused.json()["reason"]) == (429, "STREAMS_EXCEEDED")
        assert refused.json()["violated-policies"] == ["streams"]
        policy = refused.headers["ratelimit-policy"]
        assert policy.endswith(', "streams";q=2;qu="concurrent-requests"')
        assert other.status_code == 200
        async with asyncio.timeout(10):  # the edges have seen that the client has left
            while True:
                again = await two.client.get("/v1/videos/v1:watch", headers=headers)
                if again.status_code == 200:
                    return
                await asyncio.sleep(0.05)
