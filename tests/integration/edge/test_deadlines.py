"""How much time a request has, and where it is told that it was spent."""

import time

import pytest

from edge.config import EdgeConfig
from tests.integration.edge.behind import KNOWN

SLOW = "/v1/accounts/slow"


@pytest.mark.parametrize(
    "headers",
    [
        {"x-request-timeout": "0.2"},
        {"x-request-timeout": "0.2", "grpc-timeout": "5S"},
        {"x-request-timeout": "5", "grpc-timeout": "200m"},
    ],
    ids=["seconds", "the shorter of two", "the shorter of two, the other way round"],
)
async def test_a_client_may_ask_for_less_time_and_is_told_who_spent_it(edge, headers):
    began_s = time.monotonic()
    answer = await edge.client.get(SLOW, headers={**edge.bearer(), **headers})
    assert 0.19 <= time.monotonic() - began_s < 4
    assert (answer.status_code, answer.json()["details"]) == (504, {"where": "service"})


@pytest.mark.parametrize("asked", ["99999", "5"])
async def test_nobody_gets_more_than_the_contract_allows(edge, asked):
    headers = {**edge.bearer(), "x-request-timeout": asked}
    assert (await edge.client.get(f"/v1/{KNOWN}", headers=headers)).status_code == 200
    left_s = edge.behind.ledger.contexts[-1].remaining_s()
    assert left_s <= min(float(asked), 60)


async def test_a_malformed_timeout_names_the_header(edge):
    headers = {**edge.bearer(), "x-request-timeout": "soon"}
    answer = await edge.client.get(f"/v1/{KNOWN}", headers=headers)
    assert answer.status_code == 400
    assert "X-Request-Timeout" in answer.json()["detail"]


async def test_time_that_the_body_takes_is_taken_off(start_edge):
    async with start_edge(EdgeConfig(body_timeout_s=30, drain_s=1.0)) as edge:
        head = (
            f"POST /v1/{KNOWN}:transferFunds HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n"
            f"Authorization: {edge.bearer()['authorization']}\r\nIdempotency-Key: k\r\n"
            "X-Request-Timeout: 0.3\r\nContent-Type: application/json\r\n\r\n{"
        )
        answer = await edge.raw(head.encode(), silence_s=5)
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert b'"where":"request"' in answer
