"""Idempotency-Key over real HTTP: its shape, and what a repeated request is told."""

import asyncio
from uuid import uuid4

import pytest

from tests.integration.edge.behind import KNOWN
from tests.integration.edge.test_unary import TRANSFER

PATH = f"/v1/{KNOWN}:transferFunds"


async def transfer(edge, key: str, **fields: str):
    headers = [(b"authorization", edge.bearer()["authorization"].encode())]
    headers += [(b"idempotency-key", part.encode()) for part in key.split("|")]
    return await edge.client.post(PATH, json={**TRANSFER, **fields}, headers=headers)


@pytest.mark.parametrize(
    "key",
    ['""', '"a', 'a"', '"a"b', '"a";q=1', "a b", "a,b", '"a", "b"', "a;b", "a\\b", '"a\\n"',
     "k" * 256, '"' + "k" * 256 + '"', "a|a", "a|b", "ключ"],
)  # fmt: skip
async def test_what_is_not_one_key_is_refused_by_name_and_reaches_nobody(edge, key):
    before = len(edge.behind.ledger.asked)
    answer = await transfer(edge, key)
    assert answer.status_code == 400
    assert "Idempotency-Key" in answer.text or "idempotency-key" in answer.text
    assert len(edge.behind.ledger.asked) == before


@pytest.mark.parametrize(
    ("sent", "request_id"),
    [
        ("{}", "{}"),
        ('"{}"', "{}"),
        ('"{} with a, and; b"', "{} with a, and; b"),
        ('"{}\\"\\\\"', '{}"\\'),
        ("{}:@/+=._~!", "{}:@/+=._~!"),
    ],
    ids=["bare", "quoted", "what needs quotes", "escapes", "what needs none"],
)
async def test_a_key_is_taken_with_and_without_quotes_and_passed_on(edge, sent, request_id):
    unique = uuid4().hex
    sent, request_id = (text.replace("{}", unique) for text in (sent, request_id))
    assert (await transfer(edge, sent)).status_code == 200
    assert request_id in edge.behind.ledger.asked


async def test_quotes_make_no_other_key(edge):
    key = uuid4().hex
    first, again = await transfer(edge, key), await transfer(edge, f'"{key}"')
    assert first.json() == again.json()
    assert again.headers["idempotency-replayed"] == "true"


async def test_while_the_first_one_runs_a_second_is_told_to_wait_and_then_gets_its_answer(edge):
    ledger, key = edge.behind.ledger, uuid4().hex
    ledger.gate.clear()
    try:
        first = asyncio.create_task(transfer(edge, key))
        async with asyncio.timeout(10):
            while key not in ledger.running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        second = await transfer(edge, key)
        assert (second.status_code, second.json()["reason"]) == (409, "IDEMPOTENCY_IN_FLIGHT")
        assert second.headers["retry-after"] == "1"
    finally:
        ledger.gate.set()
    assert (await first).status_code == 200
    assert (await transfer(edge, key)).json() == (await first).json()


async def test_a_key_of_another_request_is_unprocessable(edge):
    key = uuid4().hex
    assert (await transfer(edge, key)).status_code == 200
    other = await transfer(edge, key, description="another")
    assert (other.status_code, other.json()["reason"]) == (422, "IDEMPOTENCY_KEY_REUSED")
