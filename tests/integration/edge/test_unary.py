"""A REST call through the edge to a real gRPC server and back."""

import asyncio
import json
import re
from uuid import uuid4

import httpx
import pytest

from tests.integration.edge.behind import KNOWN

TRANSFER = {"toAccount": KNOWN, "amount": {"currencyCode": "EUR", "minorUnits": "5"}}


async def test_a_get_becomes_a_call_and_its_answer_json(edge):
    subject = uuid4()
    answer = await edge.client.get(f"/v1/{KNOWN}", headers=edge.bearer(subject=subject))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["name"] == KNOWN
    assert answer.json()["owner"] == f"users/{subject}"


async def test_every_answer_names_its_request_and_hides_the_server(edge):
    answer = await edge.client.get(f"/v1/{KNOWN}", headers=edge.bearer())
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers


async def test_a_request_id_from_outside_is_kept_if_well_formed_and_reaches_the_service(edge):
    headers = {**edge.bearer(), "x-request-id": "my-id.1"}
    answer = await edge.client.get(f"/v1/{KNOWN}", headers=headers)
    assert answer.headers["x-request-id"] == "my-id.1"
    assert edge.behind.ledger.contexts[-1].request_id == "my-id.1"
    headers["x-request-id"] = 'forged"} line'
    answer = await edge.client.get(f"/v1/{KNOWN}", headers=headers)
    assert "forged" not in answer.headers["x-request-id"]


async def test_a_refusal_of_the_service_is_a_problem_document(edge):
    answer = await edge.client.get("/v1/accounts/other", headers=edge.bearer())
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert (document["status"], document["code"], document["reason"]) == (
        404,
        "NOT_FOUND",
        "NOT_FOUND",
    )
    assert document["request_id"] == answer.headers["x-request-id"]


async def test_a_bug_behind_the_edge_tells_nothing_but_the_request_id(edge):
    answer = await edge.client.get("/v1/accounts/a-bug", headers=edge.bearer())
    assert answer.status_code == 500
    assert "secret of the house" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


async def test_a_business_refusal_keeps_its_reason_and_details(edge):
    amount = {"currencyCode": "EUR", "minorUnits": "9000000"}
    answer = await edge.client.post(
        f"/v1/{KNOWN}:transferFunds",
        json={**TRANSFER, "amount": amount},
        headers={**edge.bearer(), "idempotency-key": "k"},
    )
    assert answer.status_code == 400
    assert answer.json()["reason"] == "INSUFFICIENT_FUNDS"
    assert answer.json()["details"] == {"available": "7"}


async def test_the_idempotency_key_header_fills_request_id_and_a_replay_is_marked(edge):
    headers = {**edge.bearer(), "idempotency-key": str(uuid4())}
    path = f"/v1/{KNOWN}:transferFunds"
    first = await edge.client.post(path, json=TRANSFER, headers=headers)
    again = await edge.client.post(path, json=TRANSFER, headers=headers)
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"


async def test_a_keyed_call_without_a_key_names_the_header(edge):
    path = f"/v1/{KNOWN}:transferFunds"
    answer = await edge.client.post(path, json=TRANSFER, headers=edge.bearer())
    assert answer.status_code == 400
    assert "Idempotency-Key" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"toAccount": 5}', "toAccount"),
        ('{"unknown": 1}', "unknown"),
        ('{"amount": {"minorUnits": "9223372036854775808"}}', "amount.minorUnits"),
        ('{"amount": {"minorUnits": -5}, "toAccount": "accounts/1"}', "amount"),
    ],
    ids=["wrong type", "unknown field", "2^63", "negative amount"],
)
async def test_bad_input_names_the_field(edge, body, field):
    headers = {**edge.bearer(), "idempotency-key": "k", "content-type": "application/json"}
    answer = await edge.client.post(f"/v1/{KNOWN}:transferFunds", content=body, headers=headers)
    assert answer.status_code == 400
    assert field in {violation["field"] for violation in answer.json()["violations"]}


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        (None, 415),
        ("application/json; charset=utf-16", 415),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
    ],
)
async def test_only_json_in_utf_8_is_taken(edge, content_type, status):
    headers = {**edge.bearer(), "idempotency-key": str(uuid4())}
    if content_type:
        headers["content-type"] = content_type
    answer = await edge.client.post(
        f"/v1/{KNOWN}:transferFunds", content=json.dumps(TRANSFER).encode(), headers=headers
    )
    assert answer.status_code == status, answer.text


async def test_badly_encoded_bodies_are_refused(edge):
    headers = {**edge.bearer(), "idempotency-key": "k", "content-type": "application/json"}
    path = f"/v1/{KNOWN}:transferFunds"
    zipped = await edge.client.post(
        path, content=b"x", headers={**headers, "content-encoding": "gzip"}
    )
    assert zipped.status_code == 400
    broken = await edge.client.post(path, content=b'{"description":"\xff"}', headers=headers)
    assert broken.status_code == 400


async def test_a_body_over_a_mebibyte_is_413_and_never_read_whole(edge):
    headers = {**edge.bearer(), "idempotency-key": "k", "content-type": "application/json"}
    path = f"/v1/{KNOWN}:transferFunds"
    answer = await edge.client.post(path, content=b"x" * 10_000_000, headers=headers)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"

    async def chunks():
        for _ in range(100):
            yield b" " * 100_000

    answer = await edge.client.post(path, content=chunks(), headers=headers)
    assert answer.status_code == 413


async def test_a_client_deadline_is_kept_and_answered_504(edge):
    headers = {**edge.bearer(), "grpc-timeout": "200m"}
    answer = await edge.client.get("/v1/accounts/slow", headers=headers)
    assert answer.status_code == 504
    assert answer.json()["code"] == "DEADLINE_EXCEEDED"
    malformed = await edge.client.get(
        f"/v1/{KNOWN}", headers={**edge.bearer(), "grpc-timeout": "soon"}
    )
    assert malformed.status_code == 400


async def test_wrong_methods_and_paths_are_405_with_allow_and_404(edge):
    answer = await edge.client.delete("/v1/accounts", headers=edge.bearer())
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert (await edge.client.get("/v1/nothing")).status_code == 404
    assert (await edge.client.request("TRACE", "/v1/accounts")).status_code == 405


async def test_head_and_options_follow_from_the_routes(edge):
    head = await edge.client.head(f"/v1/{KNOWN}", headers=edge.bearer())
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 0
    options = await edge.client.options("/v1/accounts")
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")


async def test_service_methods_are_not_reachable(edge):
    for path in ("/tenfold.auth.v1.ApiKeyService/ResolveApiKey", "/v1/keys:resolve"):
        assert (await edge.client.post(path, json={})).status_code == 404


async def test_the_reference_and_the_openapi_document_are_served(edge):
    document = await edge.client.get("/openapi.json")
    assert document.json()["openapi"] == "3.1.0"
    page = await edge.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert (await edge.client.post("/docs")).status_code == 405


async def test_accept_that_excludes_json_is_406(edge):
    answer = await edge.client.get(f"/v1/{KNOWN}", headers={**edge.bearer(), "accept": "image/png"})
    assert answer.status_code == 406


async def test_a_client_that_leaves_a_read_cancels_it_at_the_service(edge):
    edge.behind.ledger.was_cut.clear()
    with pytest.raises(httpx.ReadTimeout):
        await edge.client.get("/v1/accounts/slow", headers=edge.bearer(), timeout=0.5)
    await asyncio.wait_for(edge.behind.ledger.was_cut.wait(), 5)
