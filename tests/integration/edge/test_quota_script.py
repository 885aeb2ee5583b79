"""One atomic script over several levels, in a real Valkey."""

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.quota_valkey import open_valkey
from shared.clock import to_us
from shared.quota.gcra import Quota, give_back, spend
from tests.fakes import ManualClock
from tests.integration.edge.quotas import PATIENT_S, Caller, new_key, passed, stores_on

HOUR = 3600.0


async def test_parallel_calls_over_several_edges_pass_exactly_the_burst(valkey_url):
    caller = Caller.of(Quota("api", 50, HOUR))
    async with stores_on(valkey_url, 4) as stores:
        verdicts = await asyncio.gather(*(caller.spend(s, strict=True) for s in stores * 250))
    assert sum(verdict.is_allowed for verdict in verdicts) == 50


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3_000_000), st.integers(-4, 10)), min_size=1, max_size=25
    )
)
def test_the_script_decides_as_the_arithmetic_does(valkey_url, steps):
    async def compare() -> None:
        quota, clock, full_at_us = Quota("api", 10, 0.5), ManualClock(), 0
        caller = Caller.of(quota)
        async with stores_on(valkey_url, clock=clock, server_clock=clock) as [store]:
            account = caller.at(store)
            for wait_us, cost in steps:
                clock.advance(wait_us / 1e6)
                now_us = to_us(clock.now())
                if cost < 0:
                    store.give_back(account, -cost)
                    full_at_us = give_back(quota, max(full_at_us, now_us), points=-cost)
                    continue
                account.refused_until_us = 0
                verdict = await store.decide(account, cost, is_strict=True)
                expected = spend(quota, full_at_us, now_us=now_us, cost_points=cost)
                full_at_us = expected.full_at_us
                assert verdict.is_allowed == expected.is_allowed
                remaining = account.own.remaining_points(store.now_us())
                assert remaining == expected.remaining_points
                assert verdict.retry_after_s == pytest.approx(expected.retry_after_s)

    asyncio.run(compare())


async def test_all_levels_are_charged_or_none(valkey_url):
    own, tenant, everyone = Quota("api", 100, HOUR), Quota("t", 10, HOUR), Quota("g", 50, HOUR)
    caller = Caller.of(own, tenant, everyone)
    async with stores_on(valkey_url) as [store]:
        account = caller.at(store)
        assert (await caller.spend(store, 8, strict=True)).is_allowed
        refused = await caller.spend(store, 8, strict=True)
        left = [bucket.remaining_points(store.now_us()) for bucket in account.buckets]
    assert [bucket.level for bucket in refused.refused_by] == ["tenant"]
    # A refused call costs its caller one point, and nobody else any.
    assert left == [91, 2, 42]


async def test_a_caller_that_is_out_of_points_costs_those_it_shares_with_nothing(valkey_url):
    caller = Caller.of(Quota("api", 10, HOUR), Quota("t", 1000, HOUR))
    async with stores_on(valkey_url) as [store]:
        account = caller.at(store)
        assert await passed(caller, store, 300, strict=True) == 10
        account.refused_until_us = 0
        await store.decide(account, 1, is_strict=True)
        assert account.buckets[1].remaining_points(store.now_us()) == 990


async def test_a_refusal_is_repeated_for_a_moment_without_a_question(valkey_url):
    caller = Caller.of(Quota("api", 1, HOUR))
    async with stores_on(valkey_url) as [store]:
        assert await passed(caller, store, 1000, strict=True) == 1
        assert store.counts.known > 900
        assert store.counts.asked < 10


async def test_a_key_is_forgotten_once_its_bucket_is_full(valkey_url):
    caller = Caller.of(Quota("api", 10, 1.0))
    async with (
        stores_on(valkey_url) as [store],
        open_valkey(valkey_url, timeout_s=PATIENT_S) as client,
    ):
        await caller.spend(store, 5, strict=True)
        assert 4_000 < await client.execute("PTTL", caller.keys[0]) <= 6_100
        store.give_back(caller.at(store), 5)
        await caller.spend(store, 0, strict=True)
        assert await client.execute("EXISTS", caller.keys[0]) == 0


async def test_the_script_survives_a_flushed_script_cache(valkey_url):
    caller = Caller.of(Quota("api", 10, HOUR))
    async with (
        stores_on(valkey_url) as [store],
        open_valkey(valkey_url, timeout_s=PATIENT_S) as client,
    ):
        await caller.spend(store)
        await client.execute("SCRIPT", "FLUSH")
        await caller.spend(store)
        assert caller.at(store).own.remaining_points(store.now_us()) == 8


async def test_an_answer_that_nobody_asked_for_is_no_commands_answer():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while await reader.read(1000):
                writer.write(b"+asked\r\n+unasked\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_valkey(f"redis://127.0.0.1:{port}", timeout_s=PATIENT_S) as client:
            answers = [await client.execute("PING") for _ in range(3)]
    assert answers == [b"asked"] * 3


async def test_a_cancelled_command_leaves_its_answer_to_nobody(valkey_url):
    async with open_valkey(valkey_url, timeout_s=PATIENT_S) as client:
        await client.execute("PING")
        commands = [asyncio.create_task(client.execute("ECHO", str(n))) for n in range(50)]
        await asyncio.sleep(0)
        for command in commands[::2]:
            command.cancel()
        answers = await asyncio.gather(*commands, return_exceptions=True)
    assert answers[1::2] == [str(n).encode() for n in range(1, 50, 2)]


async def test_a_charge_whose_answer_is_lost_is_never_charged_again(valkey_url):
    """The trap of a client that repeats commands: one INCR was applied six times."""
    host, _, port = valkey_url.rpartition("@")[2].removesuffix("/0").partition(":")
    passing = asyncio.Event()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        with suppress(ConnectionError):
            while chunk := await reader.read(65536):
                up_writer.write(chunk)
                reply = await up_reader.read(65536)
                if passing.is_set():
                    break  # carried out, and the connection ends before the answer
                writer.write(reply)
        up_writer.close()
        writer.close()

    caller = Caller.of(Quota("api", 100, HOUR), keys=[new_key()])
    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        proxy = valkey_url.replace(f":{port}", f":{server.sockets[0].getsockname()[1]}")
        async with stores_on(proxy) as [store], stores_on(valkey_url) as [other]:
            await caller.spend(store, 1, strict=True)
            passing.set()
            assert (await caller.spend(store, 10, strict=True)).is_local
            await caller.spend(other, 0, strict=True)
            assert caller.at(other).own.remaining_points(other.now_us()) == 89
