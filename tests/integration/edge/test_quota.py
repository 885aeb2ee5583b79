"""Quotas as a client of the edge meets them, counted in a real Valkey."""

from dataclasses import replace
from uuid import uuid4

import pytest

from edge.config import EdgeConfig
from tests.integration.edge.behind import KNOWN
from tests.integration.edge.quotas import AWAY

PATH = f"/v1/{KNOWN}"
SMALL = EdgeConfig(api_points_per_s=0.1, api_burst_points=50, login_points_per_minute=1, drain_s=1)


@pytest.fixture
def own_db(valkey_url: str) -> str:
    """Valkey with a key space of this file's own: other files log in from this address, too."""
    return valkey_url.removesuffix("/0") + "/7"


async def test_calls_are_charged_by_credential_and_refused_with_retry_after(start_edge):
    async with start_edge(SMALL) as edge:
        mine, other = edge.bearer(), edge.bearer()
        first = await edge.client.get(PATH, headers=mine)
        assert first.headers["ratelimit-policy"] == '"api";q=50;w=500, "api-tenant";q=40000;w=2'
        assert first.headers["ratelimit"] == '"api";r=49;t=490'
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


async def test_a_forged_forwarded_for_does_not_dodge_the_quota(start_edge, own_db):
    async with start_edge(replace(SMALL, login_burst_points=30), valkey=own_db) as edge:
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
