"""Hostile requests by their number in the threat list: S15 to S33, each with its stated answer.

Framing, S1 to S14, is in test_framing.py.
"""

import gzip
import json
import re

import pytest

from tests.integration.edge.behind import KNOWN

PATH = f"/v1/{KNOWN}:transferFunds"
ACCOUNT = f'"toAccount": "{KNOWN}"'
MONEY = '"amount": {"currencyCode": "EUR", "minorUnits": %s}'


def transfer(minor_units: str = "5", more: str = "") -> bytes:
    return f"{{{ACCOUNT}, {MONEY % minor_units}{more}}}".encode()


def nested(opening: bytes, closing: bytes, levels: int = 100_000) -> bytes:
    return b'{"description": ' + opening * levels + b"1" + closing * levels + b"}"


KEYS = b",".join(b'"k%d":1' % number for number in range(70_000))
REFUSED = {
    "S15 text/plain": (transfer(), {"content-type": "text/plain"}, 415),
    "S15 form": (b"a=1", {"content-type": "application/x-www-form-urlencoded"}, 415),
    "S15 no type": (transfer(), {"content-type": ""}, 415),
    "S16 utf-16": (transfer(), {"content-type": "application/json; charset=utf-16"}, 415),
    "S16 utf-7": (transfer(), {"content-type": "application/json; charset=utf-7"}, 415),
    "S16 utf-16 bytes": (transfer().decode().encode("utf-16"), {}, 400),
    "S16 byte-order mark": (b"\xef\xbb\xbf" + transfer(), {}, 400),
    "S17 bomb": (gzip.compress(b" " * 50_000_000), {"content-encoding": "gzip"}, 413),
    "S17 nested": (gzip.compress(gzip.compress(transfer())), {"content-encoding": "gzip"}, 400),
    "S17 gzip twice": (transfer(), {"content-encoding": "gzip, gzip"}, 415),
    "S17 unknown coding": (transfer(), {"content-encoding": "br"}, 415),
    "S20 semicolons": (
        b"a=1;" * 250_000,
        {"content-type": "application/x-www-form-urlencoded"},
        415,
    ),
    "S23 arrays": (nested(b"[", b"]"), {}, 400),
    "S23 objects": (nested(b'{"a":', b"}"), {}, 400),
    "S24 many keys": (b"{%s}" % KEYS, {}, 400),
    "S24 long string": (b'{"description": "%s"}' % (b"x" * 12_000_000), {}, 413),
    "S24 zeros": (b'{"description": [%s0]}' % (b"0," * 500_000), {}, 400),
    "S25 1e400": (transfer("1e400"), {}, 400),
    "S25 0.1": (transfer("0.1"), {}, 400),
    "S25 2^53+1.5": (transfer("9007199254740993.5"), {}, 400),
    "S25 2^63": (transfer("9223372036854775808"), {}, 400),
    "S25 2^64": (transfer('"18446744073709551616"'), {}, 400),
    "S26 NaN": (transfer("NaN"), {}, 400),
    "S26 Infinity": (transfer("Infinity"), {}, 400),
    "S26 comment": (b"/* a */" + transfer(), {}, 400),
    "S26 trailing comma": (transfer(more=","), {}, 400),
    "S26 two documents": (transfer() + transfer(), {}, 400),
    "S26 trailing garbage": (transfer() + b"]", {}, 400),
    "S27 duplicate key": (transfer(more=', "toAccount": "x"'), {}, 400),
    "S27 two spellings": (transfer(more=', "to_account": "accounts/1"'), {}, 400),
    "S28 lone surrogate": (transfer(more=r', "description": "\ud800"'), {}, 400),
    "S28 NUL": (transfer(more=r', "description": "\u0000"'), {}, 400),
    "S28 overlong": (b'{"description": "\xc0\xaf"}', {}, 400),
    "S29 unknown": (transfer(more=', "is_admin": true'), {}, 400),
    "S29 tenant": (transfer(more=', "tenant_id": "other"'), {}, 400),
    "S29 owner": (transfer(more=', "owner": "users/1"'), {}, 400),
    "S30 string for object": (b'{"amount": "5"}', {}, 400),
    "S30 null for required": (transfer().replace(b'"EUR"', b"null"), {}, 400),
    "S30 boolean for number": (transfer("true"), {}, 400),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_hostile_body_is_refused_and_reaches_no_service(edge, case):
    content, headers, status = REFUSED[case]
    headers = {"content-type": "application/json", "idempotency-key": "k", **headers}
    calls_before = len(edge.behind.ledger.contexts)
    answer = await edge.client.post(PATH, content=content, headers={**edge.bearer(), **headers})
    assert answer.status_code == status, answer.text
    assert answer.json()["status"] == status
    assert "Traceback" not in answer.text
    assert len(edge.behind.ledger.contexts) == calls_before
    assert (await edge.client.get("/healthz")).status_code == 200


NUMBERS = {"-0": 400, "5": 200, "5.0": 200, "1E+5": 200, '"5"': 200, "500000": 200}


@pytest.mark.parametrize("text", NUMBERS)
async def test_s25_a_number_is_exact_whatever_its_spelling(edge, text):
    key = text.replace('"', "n")
    headers = {**edge.bearer(), "content-type": "application/json", "idempotency-key": key}
    answer = await edge.client.post(PATH, content=transfer(text), headers=headers)
    assert answer.status_code == NUMBERS[text], answer.text


async def test_s28_an_override_of_direction_is_kept(edge):
    headers = {**edge.bearer(), "content-type": "application/json", "idempotency-key": "rtl"}
    body = transfer(more=r', "description": "a\u202eb"')
    answer = await edge.client.post(PATH, content=body, headers=headers)
    assert answer.json()["description"] == "a\u202eb"


@pytest.mark.parametrize(
    "query",
    [
        "pageSize=1&pageSize=2",
        "pageSize=1&page_size=1",
        "pageSize[]=1",
        "pageSize[0]=1",
        "isAdmin=1",
    ],
)
async def test_s19_a_parameter_has_one_spelling_and_is_given_once(edge, query):
    answer = await edge.client.get(f"/v1/accounts?{query}", headers=edge.bearer())
    assert answer.status_code == 400
    assert answer.json()["violations"]


async def test_s21_ten_thousand_ranges_get_the_whole_answer(edge):
    ranges = "bytes=" + ",".join(f"{n}-{n}" for n in range(1_000))
    answer = await edge.client.get(f"/v1/{KNOWN}", headers={**edge.bearer(), "range": ranges})
    assert (answer.status_code, answer.json()["name"]) == (200, KNOWN)
    too_many = "bytes=" + ",".join("0-0" for _ in range(10_000))
    answer = await edge.client.get(f"/v1/{KNOWN}", headers={**edge.bearer(), "range": too_many})
    assert answer.status_code == 431


@pytest.mark.parametrize(
    "path", [f"/v1/{KNOWN}", "/v1/accounts/other", "/v1/nothing", "/openapi.json"]
)
async def test_s22_every_answer_guards_its_reader_and_hides_the_server(edge, path):
    answer = await edge.client.get(path, headers=edge.bearer())
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert re.fullmatch(r"application/(problem\+)?json", answer.headers["content-type"])
    assert not {"server", "x-powered-by", "via"} & set(answer.headers)
    if path != "/openapi.json":
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/tenfold.ledger.v1.LedgerService/getAccount", 404),
        ("POST", "/tenfold.ledger.v1.ledgerservice/GetAccount", 404),
        ("PUT", "/tenfold.ledger.v1.LedgerService/GetAccount", 405),
    ],
)
async def test_s33_an_rpc_path_has_one_spelling(edge, method, path, status):
    headers = {**edge.bearer(), "content-type": "application/json"}
    answer = await edge.client.request(method, path, content=b"{}", headers=headers)
    assert answer.status_code == status


async def test_s33_a_query_on_an_rpc_path_sets_no_field(edge):
    path = "/tenfold.ledger.v1.LedgerService/GetAccount?name=" + KNOWN
    headers = {**edge.bearer(), "content-type": "application/json"}
    answer = await edge.client.post(path, content=json.dumps({}).encode(), headers=headers)
    assert answer.status_code in {400, 404}
