"""Quotas: one atomic script in a real Valkey, a local share while it is away."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.config import EdgeConfig
from edge.quota import Quota, give_back, spend
from edge.quota_store import LocalQuotaStore
from edge.quota_valkey import FallbackQuotaStore, ValkeyQuotaStore, open_valkey
from shared.clock import SystemClock, to_us
from tests.fakes import ManualClock
from tests.integration.edge.behind import KNOWN

PATH = f"/v1/{KNOWN}"
SMALL = EdgeConfig(api_points_per_s=0.1, api_burst_points=50, login_points_per_minute=1, drain_s=1)
AWAY = "redis://127.0.0.1:1"
PATIENT_S = 5.0  # other tests' load must not look like an outage


def new_key() -> str:
    return f"test-quota:{uuid4()}"


async def test_parallel_calls_over_several_edges_pass_exactly_the_burst(valkey_url):
    quota, key = Quota("api", 50, 3600), new_key()
    async with (
        open_valkey(valkey_url, timeout_s=PATIENT_S) as one,
        open_valkey(valkey_url, timeout_s=PATIENT_S) as two,
    ):
        stores = [
            ValkeyQuotaStore(one),
            ValkeyQuotaStore(two),
        ] * 100
        verdicts = [
            await asyncio.gather(*(store.spend(key, quota, 1, is_strict=False) for store in stores))
            for _ in range(10)
        ]
    assert sum(verdict.is_allowed for batch in verdicts for verdict in batch) == 50


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3_000_000), st.integers(-4, 10)), min_size=1, max_size=25
    )
)
def test_the_script_decides_as_the_arithmetic_does(valkey_url, steps):
    async def compare() -> None:
        quota, key, clock = Quota("api", 10, 0.5), new_key(), ManualClock()
        full_at_us = 0
        async with open_valkey(valkey_url, timeout_s=PATIENT_S) as client:
            store = ValkeyQuotaStore(client, clock=clock)
            for wait_us, cost in steps:
                clock.advance(wait_us / 1e6)
                if cost < 0:
                    await store.give_back(key, quota, -cost)
                    now_us = to_us(clock.now())
                    full_at_us = give_back(quota, max(full_at_us, now_us), points=-cost)
                    continue
                verdict = await store.spend(key, quota, cost, is_strict=False)
                now_us = to_us(clock.now())
                expected = spend(quota, full_at_us, now_us=now_us, cost_points=cost)
                full_at_us = expected.full_at_us
                assert verdict.is_allowed == expected.is_allowed
                assert verdict.remaining_points == expected.remaining_points
                assert verdict.retry_after_s == pytest.approx(expected.retry_after_s)

    asyncio.run(compare())


async def test_a_key_is_forgotten_once_its_bucket_is_full(valkey_url):
    async with open_valkey(valkey_url, timeout_s=PATIENT_S) as client:
        store, key = ValkeyQuotaStore(client), new_key()
        await store.spend(key, Quota("api", 10, 1.0), 5, is_strict=False)
        assert 5_000 < await client.execute("PTTL", key) <= 6_100
        await store.give_back(key, Quota("api", 10, 1.0), 5)
        assert await client.execute("EXISTS", key) == 0


async def test_the_script_survives_a_flushed_script_cache(valkey_url):
    async with open_valkey(valkey_url, timeout_s=PATIENT_S) as client:
        store, key = ValkeyQuotaStore(client), new_key()
        await store.spend(key, Quota("api", 10, 1.0), 1, is_strict=False)
        await client.execute("SCRIPT", "FLUSH")
        verdict = await store.spend(key, Quota("api", 10, 1.0), 1, is_strict=False)
        assert verdict.remaining_points == 8


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


async def test_while_valkey_is_away_the_local_share_decides_and_strict_buckets_get_less():
    clock = ManualClock()
    quota = Quota("api", 80, 1.0)
    async with open_valkey(AWAY) as client:
        store = FallbackQuotaStore(
            ValkeyQuotaStore(client),
            LocalQuotaStore(clock),
            edge_count=2,
            clock=clock,
        )

        async def passed(key: str, *, is_strict: bool) -> int:
            verdicts = [await store.spend(key, quota, 1, is_strict=is_strict) for _ in range(80)]
            assert all(verdict.is_local for verdict in verdicts)
            return sum(verdict.is_allowed for verdict in verdicts)

        assert await passed("a", is_strict=False) == 40
        assert await passed("b", is_strict=True) == 10


async def test_valkey_is_asked_again_after_a_pause_and_takes_over(valkey_url):
    clock = ManualClock()
    async with open_valkey(valkey_url, timeout_s=PATIENT_S) as good, open_valkey(AWAY) as bad:
        valkey = ValkeyQuotaStore(bad)
        store = FallbackQuotaStore(valkey, LocalQuotaStore(clock), edge_count=1, clock=clock)
        quota, key = Quota("api", 10, 1.0), new_key()
        assert (await store.spend(key, quota, 1, is_strict=False)).is_local
        valkey._client = good
        assert (await store.spend(key, quota, 1, is_strict=False)).is_local
        clock.advance(1.1)
        assert not (await store.spend(key, quota, 1, is_strict=False)).is_local
        assert not store.is_local


async def test_a_frozen_valkey_costs_a_tenth_of_a_second_once():
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with open_valkey(f"redis://127.0.0.1:{port}") as client:
        clock = SystemClock()
        store = FallbackQuotaStore(
            ValkeyQuotaStore(client), LocalQuotaStore(clock), edge_count=1, clock=clock
        )
        before = clock.monotonic_s()
        for _ in range(50):
            verdict = await store.spend("a", Quota("api", 100, 1.0), 1, is_strict=False)
            assert verdict.is_local
        assert clock.monotonic_s() - before < 0.5
    silent.close()


async def test_calls_are_charged_by_credential_and_refused_with_retry_after(start_edge):
    async with start_edge(SMALL) as edge:
        mine, other = edge.bearer(), edge.bearer()
        first = await edge.client.get(PATH, headers=mine)
        assert first.headers["ratelimit-policy"] == '"api";q=50;w=500'
        assert first.headers["ratelimit"].startswith('"api";r=49;t=10')
        answers = [await edge.client.get(PATH, headers=mine) for _ in range(50)]
        assert [answer.status_code for answer in answers] == [200] * 49 + [429]
        refused = answers[-1]
        assert refused.json()["reason"] == "QUOTA_EXCEEDED"
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert (await edge.client.get(PATH, headers=other)).status_code == 200


async def test_a_refused_call_keeps_one_point_and_a_replay_too(start_edge):
    body = {"toAccount": KNOWN, "amount": {"currencyCode": "EUR", "minorUnits": "5"}}
    async with start_edge(replace(SMALL, api_burst_points=100)) as edge:
        headers = {**edge.bearer(), "idempotency-key": str(uuid4())}
        path = f"{PATH}:transferFunds"  # costs 10

        async def left() -> int:
            answer = await edge.client.get(PATH, headers=headers)  # costs 1
            return int(answer.headers["ratelimit"].split("r=")[1].split(";")[0])

        assert (await edge.client.post(path, json={"no": 1}, headers=headers)).status_code == 400
        assert await left() == 98
        await edge.client.post(path, json=body, headers=headers)
        assert await left() == 87
        replayed = await edge.client.post(path, json=body, headers=headers)
        assert replayed.headers["ratelimit"].startswith('"api";r=86;')
        assert await left() == 85


async def test_logging_in_is_counted_by_address_and_a_wrong_password_costs_in_full(start_edge):
    config = replace(SMALL, login_burst_points=30, trusted_hops=1)
    async with start_edge(config) as edge:

        async def log_in(address: str, **more: str) -> int:
            headers = {"x-forwarded-for": f"10.0.0.1, {address}", **more}
            body = {"email": "a@b.example", "password": "wrong"}
            return (await edge.client.post("/v1/sessions", json=body, headers=headers)).status_code

        block = f"198.51.{uuid4().int % 256}"
        codes = [await log_in(f"{block}.{number}", **edge.bearer()) for number in range(4)]
        assert codes == [401, 401, 401, 429]
        assert await log_in(f"203.0.{uuid4().int % 256}.1") == 401
        six = f"2001:db8:{uuid4().int % 65536:x}:1"
        assert [await log_in(f"{six}::{number}") for number in range(4)] == [401, 401, 401, 429]


async def test_a_forged_forwarded_for_does_not_dodge_the_quota(start_edge):
    async with start_edge(replace(SMALL, login_burst_points=30)) as edge:
        body = {"email": "a@b.example", "password": "wrong"}
        codes = []
        for number in range(8):
            headers = {"x-forwarded-for": f"203.0.113.{number}", "x-real-ip": f"1.2.3.{number}"}
            answer = await edge.client.post("/v1/sessions", json=body, headers=headers)
            codes.append(answer.status_code)
        assert 429 in codes


async def test_with_valkey_away_the_edge_serves_and_says_so(start_edge):
    async with start_edge(SMALL, valkey=AWAY) as edge:
        answer = await edge.client.get(PATH, headers=edge.bearer())
        assert answer.status_code == 200
        assert answer.headers["tenfold-quota-mode"] == "local"
        headers = edge.bearer()
        codes = [(await edge.client.get(PATH, headers=headers)).status_code for _ in range(55)]
        assert codes.count(200) == 50


async def test_one_address_cannot_take_the_whole_edge(start_edge):
    config = EdgeConfig(address_points_per_s=5, drain_s=1)
    async with start_edge(config, is_ready=False) as edge:
        codes = [(await edge.client.get("/healthz")).status_code for _ in range(20)]
        assert 429 in codes
