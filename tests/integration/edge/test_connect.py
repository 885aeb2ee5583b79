"""The Connect protocol on real sockets, in the words that its clients send."""

import asyncio
import base64
import gzip
import json
import struct
import time
from uuid import uuid4

import httpx
import pytest
from google.rpc import error_details_pb2
from tenfold.ledger.v1 import ledger_pb2, ledger_service_pb2
from tenfold.media.v1 import media_service_pb2

from edge.config import EdgeConfig
from shared.rpc.policy import Access, contract_policies
from tests.integration.edge.behind import KNOWN

GET_ACCOUNT = "/tenfold.ledger.v1.LedgerService/GetAccount"
TRANSFER = "/tenfold.ledger.v1.LedgerService/TransferFunds"
WATCH = "/tenfold.media.v1.VideoService/WatchVideo"
TUS = "/tenfold.media.v1.UploadService/PatchTusUpload"
PROTO, STREAM_PROTO = "application/proto", "application/connect+proto"
STREAM_JSON = "application/connect+json"
PAYMENT = {
    "account": KNOWN,
    "toAccount": KNOWN,
    "amount": {"currencyCode": "EUR", "minorUnits": "5"},
}


def envelope(data: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BI", flags, len(data)) + data


def envelopes(body: bytes) -> list[tuple[int, bytes]]:
    """Flags and data of each envelope; the last says how the stream ended."""
    found = []
    while body:
        flags, length = struct.unpack_from(">BI", body)
        found.append((flags, body[5 : 5 + length]))
        body = body[5 + length :]
    assert [flags & 2 for flags, _ in found] == [0] * (len(found) - 1) + [2]
    return found


def end_of(answer: httpx.Response) -> dict:
    assert (answer.status_code, answer.headers["content-type"]) in {
        (200, STREAM_JSON),
        (200, STREAM_PROTO),
    }
    return json.loads(envelopes(answer.content)[-1][1])


def details_of(error: dict) -> dict[str, bytes]:
    """The details of an error by type name; their values are base64 without padding."""
    return {
        detail["type"]: base64.b64decode(detail["value"] + "=" * (-len(detail["value"]) % 4))
        for detail in error["details"]
    }


async def watch(edge, name="videos/v1", content_type=STREAM_JSON, body=None, **headers):
    if body is None:
        request = media_service_pb2.WatchVideoRequest(name=name)
        is_json = content_type == STREAM_JSON
        data = json.dumps({"name": name}).encode() if is_json else request.SerializeToString()
        body = envelope(data)
    sent = {**edge.bearer(), "content-type": content_type, **headers}
    return await edge.client.post(WATCH, content=body, headers=sent)


async def eventually(holds, timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


# Unary
async def test_a_unary_call_in_json(edge):
    subject = uuid4()
    headers = {**edge.bearer(subject=subject), "connect-protocol-version": "1"}
    answer = await edge.client.post(GET_ACCOUNT, json={"name": KNOWN}, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()["owner"] == f"users/{subject}"
    assert "ratelimit" in answer.headers
    assert answer.headers["cache-control"] == "no-store"


async def test_a_unary_call_in_binary(edge):
    request = ledger_service_pb2.GetAccountRequest(name=KNOWN)
    headers = {**edge.bearer(), "content-type": PROTO}
    answer = await edge.client.post(
        GET_ACCOUNT, content=request.SerializeToString(), headers=headers
    )
    assert answer.headers["content-type"] == PROTO
    assert ledger_pb2.Account.FromString(answer.content).name == KNOWN


@pytest.mark.parametrize("padding", ["", "%3D"], ids=["plain", "padded"])
async def test_what_changes_nothing_can_be_asked_by_get(edge, padding):
    query = {"connect": "v1", "encoding": "json", "message": json.dumps({"name": KNOWN})}
    answer = await edge.client.get(GET_ACCOUNT, params=query, headers=edge.bearer())
    assert answer.json()["name"] == KNOWN
    request = ledger_service_pb2.GetAccountRequest(name=KNOWN).SerializeToString()
    message = base64.urlsafe_b64encode(request).decode().rstrip("=")
    pad = padding * (-len(message) % 4)
    answer = await edge.client.get(
        f"{GET_ACCOUNT}?message={message}{pad}&utm=unknown&base64=1&encoding=proto",
        headers=edge.bearer(),
    )
    assert ledger_pb2.Account.FromString(answer.content).name == KNOWN
    head = await edge.client.head(GET_ACCOUNT, params=query, headers=edge.bearer())
    assert (head.status_code, head.content) == (200, b"")


async def test_other_http_methods_are_405(edge):
    answer = await edge.client.get(TRANSFER, headers=edge.bearer())
    assert (answer.status_code, answer.headers["allow"]) == (405, "OPTIONS, POST")
    answer = await edge.client.put(GET_ACCOUNT, headers=edge.bearer())
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")


@pytest.mark.parametrize(
    ("path", "content_type", "accepted"),
    [
        (GET_ACCOUNT, "text/plain", "application/json, application/proto"),
        (GET_ACCOUNT, "", "application/json, application/proto"),
        (GET_ACCOUNT, STREAM_JSON, "application/json, application/proto"),
        (GET_ACCOUNT, "application/json; charset=utf-16", "application/json, application/proto"),
        (WATCH, "application/json", f"{STREAM_JSON}, {STREAM_PROTO}"),
        (WATCH, "application/connect+thrift", f"{STREAM_JSON}, {STREAM_PROTO}"),
        (TUS, "application/json", f"{STREAM_JSON}, {STREAM_PROTO}"),
    ],
)
async def test_a_content_type_of_another_protocol_is_415(edge, path, content_type, accepted):
    headers = {**edge.bearer(), "content-type": content_type}
    answer = await edge.client.post(path, content=b"{}", headers=headers)
    assert (answer.status_code, answer.headers["accept-post"]) == (415, accepted)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["code"] == "invalid_argument"


async def test_a_charset_of_utf_8_is_taken(edge):
    headers = {**edge.bearer(), "content-type": 'Application/JSON; charset="UTF-8"'}
    answer = await edge.client.post(
        GET_ACCOUNT, content=json.dumps({"name": KNOWN}), headers=headers
    )
    assert answer.status_code == 200


# Errors
async def test_an_error_is_connects_json_with_our_reason_as_a_detail(edge):
    amount = {"currencyCode": "EUR", "minorUnits": "9000000"}
    headers = {**edge.bearer(), "idempotency-key": "k"}
    answer = await edge.client.post(TRANSFER, json={**PAYMENT, "amount": amount}, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    error = answer.json()
    assert (error["code"], error["message"]) == ("failed_precondition", "There is not enough.")
    details = details_of(error)
    info = error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"])
    assert (info.reason, info.metadata["available"]) == ("INSUFFICIENT_FUNDS", "7")
    told = error_details_pb2.RequestInfo.FromString(details["google.rpc.RequestInfo"])
    assert told.request_id == answer.headers["x-request-id"]
    assert error["details"][0]["debug"]["reason"] == "INSUFFICIENT_FUNDS"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"toAccount": 5}, "toAccount"),
        ({"unknown": 1}, "unknown"),
        ({"amount": {"minorUnits": "9223372036854775808"}}, "amount.minorUnits"),
        ({**PAYMENT, "toAccount": "nobody"}, "toAccount"),
    ],
    ids=["wrong type", "unknown", "2^63", "refused by the service's own rule"],
)
async def test_bad_input_names_the_field_as_javascript_knows_it(edge, body, field):
    headers = {**edge.bearer(), "idempotency-key": "k"}
    answer = await edge.client.post(TRANSFER, json=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
    bad = details_of(answer.json())["google.rpc.BadRequest"]
    violations = error_details_pb2.BadRequest.FromString(bad).field_violations
    assert field in {violation.field for violation in violations}


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("accounts/other", 404, "not_found"), ("accounts/a-bug", 500, "internal")],
)
async def test_a_refusal_of_the_service_has_its_code_and_status(edge, name, status, code):
    answer = await edge.client.post(GET_ACCOUNT, json={"name": name}, headers=edge.bearer())
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "secret of the house" not in answer.text


async def test_a_credential_is_needed_as_everywhere_else(edge):
    answer = await edge.client.post(GET_ACCOUNT, json={"name": KNOWN})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"
    no_scope = edge.bearer(scope="media.read")
    answer = await edge.client.post(GET_ACCOUNT, json={"name": KNOWN}, headers=no_scope)
    assert (answer.status_code, answer.json()["code"]) == (403, "permission_denied")


@pytest.mark.parametrize(
    "policy",
    [p for p in contract_policies().values() if p.access in {Access.USER, Access.ADMIN}],
    ids=lambda policy: policy.path,
)
async def test_nobody_gets_in_without_a_credential(edge, policy):
    content_type = STREAM_JSON if policy.is_stream else "application/json"
    headers = {"content-type": content_type}
    body = envelope(b"{}") if policy.is_stream else b"{}"
    answer = await edge.client.post(policy.path, content=body, headers=headers)
    error = end_of(answer)["error"] if policy.is_stream else answer.json()
    assert error["code"] == "unauthenticated"


async def test_a_call_leaves_one_line_in_the_log_as_over_rest(edge, capfd):
    headers = {**edge.bearer(), "x-request-id": f"logged-{uuid4()}"}
    await edge.client.post(GET_ACCOUNT, json={"name": KNOWN}, headers=headers)

    def lines():
        seen.append(capfd.readouterr().out)
        return [line for line in "".join(seen).splitlines() if headers["x-request-id"] in line]

    seen: list[str] = []
    await eventually(lines)
    [line] = map(json.loads, lines())
    assert (line["method"], line["route"], line["status"]) == (GET_ACCOUNT, GET_ACCOUNT, 200)


async def test_quotas_count_both_protocols_together(start_edge):
    config = EdgeConfig(api_points_per_s=0.1, api_burst_points=50, drain_s=1)
    async with start_edge(config) as edge:
        headers = edge.bearer(session=str(uuid4()))
        for _ in range(26):
            await edge.client.get(f"/v1/{KNOWN}", headers=headers)
            answer = await edge.client.post(GET_ACCOUNT, json={"name": KNOWN}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (429, "resource_exhausted")
    assert int(answer.headers["retry-after"]) > 0


async def test_what_only_services_may_call_does_not_exist_here(edge):
    hidden = [p.path for p in contract_policies().values() if p.access is Access.SERVICE]
    assert hidden
    for path in hidden:
        answer = await edge.client.post(path, json={}, headers=edge.bearer())
        assert answer.status_code == 404, path


async def test_another_version_of_the_protocol_is_refused(edge):
    headers = {**edge.bearer(), "connect-protocol-version": "2"}
    answer = await edge.client.post(GET_ACCOUNT, json={"name": KNOWN}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("encoding=json", 400, "message"),
        ("message=%7B%7D", 400, "encoding"),
        ("encoding=json&message=%7B%7D&message=%7B%7D", 400, "message"),
        ("encoding=json&message=%ff", 400, "message"),
        ("encoding=json&message=%7", 400, "message"),
        ("encoding=proto&base64=1&message=!!", 400, "message"),
        ("encoding=json&connect=v2&message=%7B%7D", 400, "connect"),
        ("encoding=yaml&message=a", 415, "encoding"),
        ("encoding=json&compression=br&message=%7B%7D", 501, "br"),
    ],
)
async def test_a_get_that_is_no_request_is_refused_by_name(edge, query, status, field):
    answer = await edge.client.get(f"{GET_ACCOUNT}?{query}", headers=edge.bearer())
    assert answer.status_code == status
    assert field in answer.json()["message"]


async def test_if_match_is_refused_and_not_ignored(edge):
    headers = {**edge.bearer(), "if-match": '"1"'}
    answer = await edge.client.post(GET_ACCOUNT, json={"name": KNOWN}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


# Idempotency and time
async def test_the_idempotency_key_header_fills_request_id_here_too(edge):
    headers = {**edge.bearer(), "idempotency-key": str(uuid4())}
    first = await edge.client.post(TRANSFER, json=PAYMENT, headers=headers)
    again = await edge.client.post(TRANSFER, json=PAYMENT, headers=headers)
    assert first.json() == again.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = await edge.client.post(TRANSFER, json={**PAYMENT, "requestId": "x"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (400, "invalid_argument")
    missing = await edge.client.post(TRANSFER, json=PAYMENT, headers=edge.bearer())
    assert "Idempotency-Key" in missing.json()["message"]


async def test_a_client_deadline_in_milliseconds_is_kept(edge):
    headers = {**edge.bearer(), "connect-timeout-ms": "200", "grpc-timeout": "9S"}
    answer = await edge.client.post(GET_ACCOUNT, json={"name": "accounts/slow"}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("timeout", ["soon", "-1", "1.5", "12345678901", "1e3"])
async def test_a_malformed_deadline_is_refused(edge, timeout):
    headers = {**edge.bearer(), "connect-timeout-ms": timeout}
    answer = await edge.client.post(GET_ACCOUNT, json={"name": KNOWN}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


# Hostile bodies
async def test_binary_text_with_nul_is_refused_as_in_json(edge):
    request = ledger_service_pb2.TransferFundsRequest(account=KNOWN, description="a\0b")
    headers = {**edge.bearer(), "content-type": PROTO, "idempotency-key": "k"}
    answer = await edge.client.post(TRANSFER, content=request.SerializeToString(), headers=headers)
    assert answer.status_code == 400
    assert "description: must not hold the character NUL" in answer.json()["message"]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b""),
        ("application/json", b'{"name": "a", "name": "b"}'),
        ("application/json", b"[" * 5000),
        ("application/json", b'{"name": "\xff"}'),
        (PROTO, b"\xff" * 50),
        (PROTO, b"\x0a\x7fshort"),
        (PROTO, b"\x0a\x02\xff\xfe"),
    ],
)
async def test_a_body_that_is_no_message_is_refused(edge, content_type, body):
    headers = {**edge.bearer(), "content-type": content_type}
    answer = await edge.client.post(GET_ACCOUNT, content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


async def test_too_long_a_message_is_resource_exhausted(edge):
    headers = {**edge.bearer(), "content-type": "application/json"}
    answer = await edge.client.post(GET_ACCOUNT, content=b" " * 2_000_000, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (429, "resource_exhausted")
    answer = await watch(edge, body=envelope(b" " * 2_000_000))
    assert end_of(answer)["error"]["code"] == "resource_exhausted"


# Compression
async def test_gzip_is_taken_and_given_where_it_is_asked_for(edge):
    body = gzip.compress(json.dumps({"name": "accounts/large"}).encode())
    headers = {**edge.bearer(), "content-type": "application/json", "content-encoding": "gzip"}
    async with edge.client.stream(
        "POST", GET_ACCOUNT, content=body, headers={**headers, "accept-encoding": "br, gzip"}
    ) as answer:
        packed = b"".join([chunk async for chunk in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == "gzip"
    assert len(packed) < 1000 < len(gzip.decompress(packed))
    assert json.loads(gzip.decompress(packed))["name"] == "accounts/large"
    headers["accept-encoding"] = "identity"
    answer = await edge.client.post(GET_ACCOUNT, content=body, headers=headers)
    assert "content-encoding" not in answer.headers


async def test_another_encoding_is_unimplemented_with_what_is_supported(edge):
    headers = {**edge.bearer(), "content-type": "application/json", "content-encoding": "br"}
    answer = await edge.client.post(GET_ACCOUNT, content=b"x", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (501, "unimplemented")
    assert answer.headers["accept-encoding"] == "gzip"
    assert "gzip" in answer.json()["message"]
    answer = await watch(edge, **{"connect-content-encoding": "br"})
    assert end_of(answer)["error"]["code"] == "unimplemented"
    assert answer.headers["connect-accept-encoding"] == "gzip"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (gzip.compress(b" " * 100_000_000), "resource_exhausted"),
        (gzip.compress(b"{}")[:-3], "invalid_argument"),
        (gzip.compress(b"{}") * 2, "invalid_argument"),
        (b"not gzip", "invalid_argument"),
    ],
    ids=["bomb", "cut", "two", "none"],
)
async def test_bad_gzip_is_refused_without_being_unpacked_whole(edge, body, code):
    headers = {**edge.bearer(), "content-type": "application/json", "content-encoding": "gzip"}
    answer = await edge.client.post(GET_ACCOUNT, content=body, headers=headers)
    assert answer.json()["code"] == code
    answer = await watch(edge, body=envelope(body, 1), **{"connect-content-encoding": "gzip"})
    assert end_of(answer)["error"]["code"] == code


async def test_a_stream_is_packed_message_by_message(edge):
    headers = {"connect-content-encoding": "gzip", "connect-timeout-ms": "300"}
    headers["connect-accept-encoding"] = "gzip"
    body = envelope(gzip.compress(b'{"name": "videos/flood"}'), 1)
    answer = await watch(edge, body=body, **headers)
    assert answer.headers["connect-content-encoding"] == "gzip"
    found = envelopes(answer.content)
    assert found[0][0] == 0  # a short message is not worth it
    flags, data = found[5]
    assert flags == 1
    assert json.loads(gzip.decompress(data))["video"]["progressPercent"] == 50


# Streams
async def test_a_server_stream_in_json_ends_with_what_says_so(edge):
    answer = await watch(edge)
    assert answer.headers["content-type"] == STREAM_JSON
    *messages, end = envelopes(answer.content)
    assert [json.loads(data)["cursor"] for _, data in messages] == ["c0", "c1", "c2"]
    assert end == (2, b"{}")


async def test_a_server_stream_in_binary(edge):
    answer = await watch(edge, content_type=STREAM_PROTO)
    assert answer.headers["content-type"] == STREAM_PROTO
    *messages, end = envelopes(answer.content)
    read = [media_service_pb2.WatchVideoResponse.FromString(data) for _, data in messages]
    assert [message.video.progress_percent for message in read] == [0, 1, 2]
    assert end == (2, b"{}")


@pytest.mark.parametrize("content_type", [STREAM_JSON, STREAM_PROTO])
async def test_a_refusal_of_a_stream_is_its_only_envelope(edge, content_type):
    answer = await watch(edge, "videos/absent", content_type)
    assert [flags for flags, _ in envelopes(answer.content)] == [2]
    assert end_of(answer)["error"]["code"] == "not_found"


async def test_a_stream_without_a_credential_is_refused_in_its_envelope(edge):
    headers = {"content-type": STREAM_JSON}
    answer = await edge.client.post(WATCH, content=envelope(b"{}"), headers=headers)
    assert end_of(answer)["error"]["code"] == "unauthenticated"


async def test_an_error_half_way_is_in_the_last_envelope(edge):
    answer = await watch(edge, "videos/breaks")
    assert len(envelopes(answer.content)) == 4
    error = end_of(answer)["error"]
    assert error["code"] == "failed_precondition"
    info = error_details_pb2.ErrorInfo.FromString(details_of(error)["google.rpc.ErrorInfo"])
    assert info.reason == "INSUFFICIENT_FUNDS"


async def test_a_deadline_ends_a_stream(edge):
    answer = await watch(edge, "videos/endless", **{"connect-timeout-ms": "300"})
    assert end_of(answer)["error"]["code"] == "deadline_exceeded"


async def test_a_client_that_leaves_cancels_the_call(edge):
    headers = {**edge.bearer(), "content-type": STREAM_JSON}
    body = envelope(b'{"name": "videos/endless"}')
    async with edge.client.stream("POST", WATCH, content=body, headers=headers) as answer:
        await anext(answer.aiter_raw())
        await eventually(lambda: edge.behind.videos.open_streams == 1)
    await eventually(lambda: edge.behind.videos.open_streams == 0)


async def test_logging_out_ends_what_the_session_has_open(edge):
    session = "connect-session-to-end"
    headers = {**edge.bearer(session=session), "content-type": STREAM_JSON}
    body = envelope(b'{"name": "videos/endless"}')
    async with edge.client.stream("POST", WATCH, content=body, headers=headers) as answer:
        received = answer.aiter_raw()
        start = await anext(received)
        await edge.behind.sessions.revoke(session)
        rest = b"".join([chunk async for chunk in received])
    error = json.loads(envelopes(start + rest)[-1][1])["error"]
    assert error["code"] == "unauthenticated"


async def test_a_stopping_edge_ends_open_streams_and_waits_for_no_metadata(start_edge):
    async with start_edge(EdgeConfig(response_headers="x-hue", drain_s=1.0)) as edge:
        headers = {**edge.bearer(), "content-type": STREAM_JSON}
        body = envelope(b'{"name": "videos/endless"}')
        async with edge.client.stream("POST", WATCH, content=body, headers=headers) as answer:
            received = answer.aiter_raw()
            start = await anext(received)
            edge.app.drain()
            rest = b"".join([chunk async for chunk in received])
    assert json.loads(envelopes(start + rest)[-1][1])["error"]["code"] == "unavailable"


async def test_a_client_that_leaves_a_read_cancels_it_at_the_service(edge):
    edge.behind.ledger.was_cut.clear()
    body = {"name": "accounts/slow"}
    with pytest.raises(httpx.ReadTimeout):
        await edge.client.post(GET_ACCOUNT, json=body, headers=edge.bearer(), timeout=0.5)
    await asyncio.wait_for(edge.behind.ledger.was_cut.wait(), 5)


async def test_silence_is_never_filled(start_edge):
    async with start_edge(EdgeConfig(heartbeat_s=0.05, drain_s=1.0)) as edge:
        answer = await watch(edge, "videos/endless", **{"connect-timeout-ms": "300"})
        assert len(envelopes(answer.content)) == 4


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "unimplemented"),
        (envelope(b"{}") * 2, "unimplemented"),
        (envelope(b"{}") + b"\0", "unimplemented"),
        (b"\0\0\0", "invalid_argument"),
        (struct.pack(">BI", 0, 50) + b"{}", "invalid_argument"),
        (struct.pack(">BI", 0, 2**32 - 1) + b"{}", "resource_exhausted"),
        (envelope(b"{}", flags=1), "invalid_argument"),
        (envelope(b"{}", flags=2), "invalid_argument"),
        (envelope(b"{}", flags=0x80), "invalid_argument"),
        (envelope(b""), "invalid_argument"),
        (envelope(b"nonsense"), "invalid_argument"),
    ],
    ids=[
        "none", "two", "junk after", "cut head", "cut message", "4 GiB said",
        "packed without saying so", "end", "reserved flag", "empty json", "no json",
    ],
)  # fmt: skip
async def test_a_hostile_envelope_is_refused(edge, body, code):
    answer = await watch(edge, body=body)
    assert end_of(answer)["error"]["code"] == code


async def test_client_streams_are_refused_in_so_many_words(edge):
    headers = {**edge.bearer(), "content-type": STREAM_PROTO}
    answer = await edge.client.post(TUS, content=envelope(b""), headers=headers)
    error = end_of(answer)["error"]
    assert error["code"] == "unimplemented"
    assert "Client streams" in error["message"]


# Metadata
NOTE, WATCH_NOTES = "/foreign.v1.Rooms/GetNote", "/foreign.v1.Rooms/Watch"
LEADING = (("x-colour", "red"), ("content-language", "de"), ("x-secret", "s"))
TRAILING = (("x-colour", "blue"), ("x-secret", "s"))


async def test_of_a_unary_call_listed_metadata_leaves_leading_and_trailing(foreign_edge):
    foreign_edge.stranger.answers, foreign_edge.stranger.trailers = LEADING, TRAILING
    headers = {"x-flavour": "mint", "x-user-id": "1"}
    answer = await foreign_edge.client.post(NOTE, json={"room": "den"}, headers=headers)
    assert (answer.headers["x-colour"], answer.headers["trailer-x-colour"]) == ("red", "blue")
    assert answer.headers["content-language"] == "de"
    assert not [name for name in answer.headers if "secret" in name]
    assert foreign_edge.stranger.metadata["x-flavour"] == "mint"
    assert "x-user-id" not in foreign_edge.stranger.metadata


@pytest.mark.parametrize(
    ("room", "code"), [("den", None), ("breaks", "failed_precondition")], ids=["end", "error"]
)
async def test_of_a_stream_the_trailing_is_in_its_last_envelope(foreign_edge, room, code):
    foreign_edge.stranger.answers, foreign_edge.stranger.trailers = LEADING, TRAILING
    answer = await foreign_edge.client.post(
        WATCH_NOTES,
        content=envelope(json.dumps({"room": room, "count": 2}).encode()),
        headers={"content-type": STREAM_JSON},
    )
    assert answer.headers["x-colour"] == "red"
    end = end_of(answer)
    assert end["metadata"] == {"x-colour": ["blue"]}
    assert end.get("error", {}).get("code") == code
    assert len(envelopes(answer.content)) == 3


async def test_a_stream_that_the_edge_ends_has_no_metadata_to_wait_for(foreign_edge):
    answer = await foreign_edge.client.post(
        WATCH_NOTES,
        content=envelope(b'{"room": "silent"}'),
        headers={"content-type": STREAM_JSON, "connect-timeout-ms": "200"},
    )
    assert end_of(answer)["error"]["code"] == "deadline_exceeded"
    assert "metadata" not in end_of(answer)


async def test_what_holds_secrets_is_never_compressed(foreign_edge):
    takes = {"accept-encoding": "gzip", "connect-accept-encoding": "gzip"}
    note = await foreign_edge.client.post(NOTE, json={"number": 5000}, headers=takes)
    assert note.headers["content-encoding"] == "gzip"
    key = await foreign_edge.client.post("/foreign.v1.Rooms/GetKey", json={}, headers=takes)
    assert len(key.json()["text"]) == 5000
    assert "content-encoding" not in key.headers
    keys = await foreign_edge.client.post(
        "/foreign.v1.Rooms/WatchKeys",
        content=envelope(b"{}"),
        headers={**takes, "content-type": STREAM_JSON},
    )
    assert [flags for flags, _ in envelopes(keys.content)] == [0, 2]


# The switch, web pages
async def test_it_can_be_switched_off(start_edge):
    async with start_edge(EdgeConfig(connect=False, drain_s=1)) as edge:
        answer = await edge.client.post(GET_ACCOUNT, json={}, headers=edge.bearer())
        assert answer.status_code == 404
        assert (await edge.client.get(f"/v1/{KNOWN}", headers=edge.bearer())).status_code == 200


async def test_a_page_of_an_allowed_origin_may_send_connects_headers(start_edge):
    origin = "https://app.example.com"
    async with start_edge(EdgeConfig(cors_origins=origin, drain_s=1)) as edge:
        asked = "connect-protocol-version,connect-timeout-ms,content-type,authorization"
        preflight = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": asked,
        }
        answer = await edge.client.options(WATCH, headers=preflight)
        allowed = answer.headers["access-control-allow-headers"].split(", ")
        assert set(asked.split(",")) <= set(allowed)
        rest = await edge.client.options(
            f"/v1/{KNOWN}", headers={**preflight, "access-control-request-method": "GET"}
        )
        assert "connect-timeout-ms" not in rest.headers["access-control-allow-headers"]
        headers = {**edge.bearer(), "origin": origin}
        answer = await edge.client.post(GET_ACCOUNT, json={"name": "accounts/no"}, headers=headers)
        assert answer.headers["access-control-allow-origin"] == origin
        assert "retry-after" in answer.headers["access-control-expose-headers"]


async def test_a_page_may_read_the_metadata_that_leaves(start_foreign_edge):
    origin = "https://app.example.com"
    async with start_foreign_edge(cors_origins=origin) as edge:
        answer = await edge.client.post(NOTE, json={}, headers={"origin": origin})
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"x-colour", "trailer-x-colour", "content-language"} <= set(exposed)
