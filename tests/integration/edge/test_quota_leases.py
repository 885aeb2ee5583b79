"""Leases: most decisions without a round trip, and at most 5 % of the burst beyond the limit."""

import asyncio
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from edge.accounts import LEASED_PART_MAX
from edge.quota_valkey import LEASE_US
from shared.quota.gcra import Quota
from tests.fakes import ManualClock
from tests.integration.edge.quotas import Caller, passed, stores_on

EDGES = 4
HOUR = 3600.0


def most_that_may_pass(quota: Quota, window_s: float, *, slack: bool = True) -> float:
    leased = math.floor(quota.burst_points * LEASED_PART_MAX) if slack else 0
    return quota.burst_points + window_s / quota.refill_s + leased


async def test_points_on_lease_over_all_edges_never_exceed_five_percent(valkey_url):
    quota, clock = Quota("api", 400, 1.0), ManualClock()
    caller = Caller.of(quota)
    async with stores_on(valkey_url, EDGES, clock=clock, server_clock=clock) as stores:
        stores[0].edge_count = 1  # it has not heard of the others, and wants it all
        await passed(caller, stores[0], 2)
        await asyncio.gather(*(caller.spend(s) for s in stores[1:] * 20))
        held = [caller.at(store).own.held_points for store in stores]
    assert held[0] > 5
    assert sum(held) <= 20


async def test_the_worst_that_an_adversary_can_time_is_burst_plus_five_percent(valkey_url):
    """Fill every edge's lease, wait until the bucket is full again, then spend all at once."""
    quota, clock = Quota("api", 400, 0.01), ManualClock()
    caller = Caller.of(quota)
    async with stores_on(valkey_url, EDGES, clock=clock, server_clock=clock) as stores:
        for store in stores:
            await passed(caller, store, 3)
        assert sum(caller.at(store).own.held_points for store in stores) >= 12
        clock.advance(9)  # the bucket is full; the leases have not ended
        verdicts = await asyncio.gather(*(caller.spend(store) for store in stores * 400))
    total = sum(verdict.is_allowed for verdict in verdicts)
    assert 400 < total <= 420


@settings(max_examples=60, deadline=None)
@given(
    bursts=st.lists(
        st.tuples(
            st.integers(0, 12_000_000),  # wait, microseconds
            st.lists(st.integers(0, EDGES - 1), min_size=1, max_size=4),  # through which edges
            st.integers(1, 150),  # calls each, all at once
            st.sampled_from([1, 1, 1, 3]),  # points each
            st.sampled_from(["", "", "", "refund", "kill", "beat"]),  # and then
        ),
        min_size=2,
        max_size=12,
    )
)
def test_no_rolling_window_passes_more_than_the_limit_and_five_percent(valkey_url, bursts):
    """Four edges, any order, killed edges and refunds among them; time by hand, Valkey real."""

    async def attack() -> list[tuple[float, int]]:
        quota, clock = Quota("api", 100, 0.05), ManualClock()
        callers, let_in = Caller.of(quota), []
        async with stores_on(valkey_url, EDGES, clock=clock, server_clock=clock) as stores:
            for wait_us, edges, calls, cost, then in bursts:
                clock.advance(wait_us / 1e6)
                asked = [callers.spend(stores[e], cost) for _ in range(calls) for e in edges]
                verdicts = await asyncio.gather(*asked)
                points = cost * sum(verdict.is_allowed for verdict in verdicts)
                let_in.append((clock.monotonic_s(), points))
                if then == "refund" and points:  # all but one point of one call
                    stores[edges[0]].give_back(callers.at(stores[edges[0]]), cost - 1)
                    let_in[-1] = (let_in[-1][0], points - cost + 1)
                if then == "kill":
                    callers.accounts.pop(id(stores[edges[0]]), None)  # all that it knew is gone
                    stores[edges[0]]._edge += "'"
                if then == "beat":
                    await stores[edges[0]].beat()
        return let_in

    let_in, quota = asyncio.run(attack()), Quota("api", 100, 0.05)
    for first, (start_s, _) in enumerate(let_in):
        total = 0
        for end_s, points in let_in[first:]:
            total += points
            assert total <= most_that_may_pass(quota, end_s - start_s)


async def test_a_strict_bucket_never_leases_and_is_exact(valkey_url):
    caller = Caller.of(Quota("login", 100, HOUR))
    async with stores_on(valkey_url, EDGES) as stores:
        verdicts = await asyncio.gather(*(caller.spend(s, strict=True) for s in stores * 100))
        assert sum(verdict.is_allowed for verdict in verdicts) == 100
        assert all(store.counts.leased == 0 for store in stores)
        assert all(caller.at(store).own.granted_points == 0 for store in stores)


async def test_at_half_of_the_limit_nine_of_ten_decisions_need_no_round_trip(valkey_url):
    quota, clock = Quota("api", 1200, 1 / 600), ManualClock()
    caller = Caller.of(quota, Quota("tenant", 40_000, 1 / 20_000))
    async with stores_on(valkey_url, EDGES, clock=clock, server_clock=clock) as stores:
        for number in range(3000):  # 300 a second for ten seconds
            clock.advance(1 / 300)
            assert (await caller.spend(stores[number % EDGES])).is_allowed
        leased = sum(store.counts.leased for store in stores)
    assert leased / 3000 >= 0.9


async def test_what_is_not_used_of_a_lease_comes_back_when_it_ends(valkey_url):
    quota, clock = Quota("api", 400, HOUR), ManualClock()
    caller = Caller.of(quota)
    async with stores_on(valkey_url, 2, clock=clock, server_clock=clock) as [store, other]:
        await passed(caller, store, 3)
        assert caller.at(store).own.held_points > 0
        clock.advance(LEASE_US / 1e6 + 1)
        await store.beat()
        await caller.spend(other, 0, strict=True)
        assert caller.at(other).own.remaining_points(other.now_us()) == 397


async def test_an_edge_that_ends_returns_its_leases_at_once(valkey_url):
    caller = Caller.of(Quota("api", 400, HOUR))
    async with stores_on(valkey_url, 2) as [store, other]:
        await passed(caller, store, 3)
        assert caller.at(store).own.held_points > 0
        await store.close()
        await caller.spend(other, 0, strict=True)
        assert caller.at(other).own.remaining_points(other.now_us()) == 397


async def test_a_killed_edges_lease_is_lent_to_others_once_it_has_ended(valkey_url):
    quota, clock = Quota("api", 400, 0.01), ManualClock()
    caller = Caller.of(quota)
    async with stores_on(valkey_url, 2, clock=clock, server_clock=clock) as [killed, other]:
        killed.edge_count = other.edge_count = 1
        await passed(caller, killed, 2)
        await passed(caller, other, 2)
        assert caller.at(other).own.held_points == 0
        clock.advance(LEASE_US / 1e6 + 1)
        await passed(caller, other, 2)
        assert caller.at(other).own.held_points == 20


async def test_near_its_end_a_bucket_lends_nothing_so_that_no_edge_misses_a_point(valkey_url):
    caller = Caller.of(Quota("api", 400, HOUR))
    async with stores_on(valkey_url, EDGES) as stores:
        total = 0
        for _ in range(60):
            for store in stores:
                total += await passed(caller, store, 10)
    assert total == 400
