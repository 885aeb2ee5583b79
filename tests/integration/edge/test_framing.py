"""HTTP/1.1 framing on raw sockets: S1 to S14 of the threat list, by their numbers."""

import asyncio
import gc
import json
import re
import time
from uuid import uuid4

import pytest

from edge.config import EdgeConfig
from tests.integration.edge.behind import KNOWN
from tests.integration.edge.test_unary import TRANSFER

GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /v1/sessions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


END = b"\r\n0\r\n\r\n"
BAD_FRAMING = {
    "S1 length and coding": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n" + END,
    "S1 coding and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n" + END,
    "S2 capital": POST + b"Transfer-Encoding: Chunked\r\n" + END,
    "S2 xchunked": POST + b"Transfer-Encoding: xchunked\r\n" + END,
    "S2 chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n" + END,
    "S2 gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n" + END,
    "S2 identity": POST + b"Transfer-Encoding: identity\r\n\r\n",
    "S2 twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n" + END,
    "S2 HTTP/1.0 chunked": b"POST /v1/sessions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n" + END,
    "S3 two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "S3 same length twice": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "S3 list": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "S4 negative": POST + b"Content-Length: -1\r\n\r\n",
    "S4 plus": POST + b"Content-Length: +5\r\n\r\nhello",
    "S4 hex": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "S4 space": POST + b"Content-Length: 5 5\r\n\r\nhello",
    "S4 20 digits": POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    "S5 chunk size overflow": CHUNKED + b"FFFFFFFFFFFFFFFFF\r\n",
    "S5 chunk size junk": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "S5 chunk bare LF": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "S6 bare LF": b"GET /healthz HTTP/1.1\nHost: a\n\n",
    "S6 CR alone": b"GET /healthz HTTP/1.1\rHost: a\r\r",
    "S6 NUL in name": GET + b"A\x00b: c\r\n\r\n",
    "S6 8-bit name": GET + b"A\xe9: c\r\n\r\n",
    "S6 NUL in value": GET + b"A: b\x00c\r\n\r\n",
    "S6 space before colon": GET + b"A : b\r\n\r\n",
    "S6 folded": GET + b"A: b\r\n c\r\n\r\n",
    "S6 no name": GET + b": b\r\n\r\n",
    "S13 another scheme": b"GET ftp://a/healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    "S13 user in target": b"GET http://b@a/healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    "S13 fragment": b"GET http://a#/healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    "S13 target without host": b"GET http:///healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    "S13 absolute, two hosts": b"GET http://a/healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "S13 absolute, no host": b"GET http://a/healthz HTTP/1.1\r\n\r\n",
    "S13 authority form": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "S13 8-bit target": b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
    "S14 no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "S14 two hosts": GET + b"Host: b\r\n\r\n",
    "S14 HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", BAD_FRAMING.values(), ids=BAD_FRAMING.keys())
async def test_what_two_readers_may_read_differently_is_refused_and_the_connection_closed(
    edge, request_bytes
):
    answer = await edge.raw(request_bytes + SMUGGLED)
    assert statuses(answer) == [400], answer
    assert b"connection: close" in answer.lower()
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == 400


async def test_s14_http_0_9_gets_505_or_nothing(edge):
    assert statuses(await edge.raw(b"GET /healthz\r\n\r\n")) in ([505], [])


async def test_s12_an_unknown_method_is_501_and_trace_405(edge):
    assert statuses(await edge.raw(b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n")) == [501]
    assert statuses(await edge.raw(b"TRACE /healthz HTTP/1.1\r\nHost: a\r\n\r\n")) == [405]


async def test_s5_trailers_never_become_headers(edge):
    token = edge.bearer()["authorization"]
    request = (
        f"POST /v1/{KNOWN}:transferFunds HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
        f"Authorization: {token}\r\nIdempotency-Key: k\r\n\r\n"
    )
    assert statuses(await edge.raw(request.encode())) == [401]


async def test_s5_a_long_chunk_extension_is_refused(edge):
    answer = await edge.raw(CHUNKED + b"5;" + b"x" * 1_000_000 + b"\r\nhello\r\n0\r\n\r\n")
    assert statuses(answer) in ([400], [])


async def test_small_chunks_of_an_honest_client_are_taken(edge):
    head = (
        f"POST /v1/{KNOWN}:transferFunds HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Authorization: {edge.bearer()['authorization']}\r\nIdempotency-Key: {uuid4()}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    body = json.dumps(TRANSFER).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert statuses(await edge.raw(head.encode() + chunks + b"0\r\n\r\n")) == [200]


@pytest.mark.parametrize("body_bytes", [45_000, 100_000, 200_000])
async def test_a_large_body_that_arrives_with_its_head_is_no_large_head(edge, body_bytes):
    head = b"POST /v1/accounts HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % body_bytes
    assert statuses(await edge.raw(head + b" " * body_bytes)) == [401]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (GET + b"A: b\r\n" * 10_000 + b"\r\n", 431),
        (GET + b"A: " + b"x" * 1_048_576 + b"\r\n\r\n", 431),
        (GET + b"A: " + b"x" * 1_048_576, 431),
        (GET + (b"A: " + b"x" * 4000 + b"\r\n") * 20 + b"\r\n", 431),
    ],
    ids=["S7 target", "S7 headers", "S7 header", "S7 endless header", "S7 80 KiB of headers"],
)
async def test_an_oversized_head_is_refused(edge, request_bytes, status):
    assert statuses(await edge.raw(request_bytes)) == [status]


async def test_s11_ten_thousand_pipelined_requests_are_answered_in_part_and_closed(edge):
    answer = await edge.raw(SMUGGLED * 10_000)
    assert set(statuses(answer)) <= {200, 429}
    assert len(statuses(answer)) < 10_000
    assert (await edge.client.get("/healthz")).status_code == 200


async def test_a_few_pipelined_requests_are_answered_in_order(edge):
    answer = await edge.raw(SMUGGLED + b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n" + SMUGGLED)
    assert statuses(answer) == [200, 404, 200]


def slow(edge) -> bytes:
    """A request that is answered after a while, with 504."""
    token = edge.bearer()["authorization"]
    head = f"GET /v1/accounts/slow HTTP/1.1\r\nHost: a\r\nAuthorization: {token}\r\n"
    return f"{head}Grpc-Timeout: 200m\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        (b"\0\r\n\r\n", [504, 501]),
        (CHUNKED + b"zz\r\n", [504, 400]),
        (SMUGGLED + CHUNKED + b"zz\r\n", [504, 200, 400]),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", [504, 505]),
    ],
    ids=["no request", "broken body", "broken third", "version"],
)
async def test_a_bad_request_is_refused_in_its_turn_and_not_in_anothers(edge, then, expected):
    assert statuses(await edge.raw(slow(edge) + then)) == expected
    assert statuses(await edge.raw(slow(edge), then)) == expected


async def test_nothing_after_connection_close_is_answered(edge):
    last = GET + b"Connection: close\r\n\r\n"
    assert statuses(await edge.raw(last + SMUGGLED)) == [200]


async def test_half_a_head_behind_a_slow_request_does_not_cost_its_answer(start_edge):
    async with start_edge(EdgeConfig(head_timeout_s=0.1, drain_s=1.0)) as edge:
        assert statuses(await edge.raw(slow(edge) + GET, silence_s=3)) == [504, 408]


async def test_an_upgrade_behind_another_request_is_answered_as_well(edge):
    upgrade = GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert statuses(await edge.raw(SMUGGLED + upgrade + SMUGGLED)) == [200, 200]


async def test_a_refusal_is_not_followed_by_100_continue(edge):
    head = b"POST /v1/accounts HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n"
    answer = await edge.raw(head + b"Expect: 100-continue\r\n\r\n")
    assert statuses(answer) == [401]


async def test_a_fault_outside_the_apps_boundary_ends_the_connection(start_edge, monkeypatch):
    async with start_edge() as edge:
        with monkeypatch.context() as patch:
            patch.setattr(edge.app._steps, "_serve", None)
            before = time.monotonic()
            assert await edge.raw(SMUGGLED, silence_s=5) == b""
            assert time.monotonic() - before < 4  # closed, not silent
        assert (await edge.client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://a/healthz", 200),
        (b"HTTPS://other.example:8443/healthz?a=/b", 200),
        (b"http://[::1]:80/healthz", 200),
        (b"http://a", 404),
        (b"http://a?/healthz", 404),
        (b"http://a//healthz", 404),
    ],
    ids=["usual", "another host", "IPv6", "no path", "only a query", "two slashes"],
)
async def test_an_absolute_target_means_its_path(edge, target, status):
    assert statuses(await edge.raw(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")) == [status]


MINE = b"Host: a\r\nX-Request-Id: mine\r\n"
REFUSED = {
    "400": (b"GET /\0 HTTP/1.1\r\n\r\n", 400, "BAD_HTTP"),
    "408": (b"GET /healthz HTTP/1.1\r\n" + MINE + b"A", 408, "HEADERS_TOO_SLOW"),
    "414": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414, "TARGET_TOO_LARGE"),
    "431": (b"GET / HTTP/1.1\r\n" + MINE + b"A: b\r\n" * 200, 431, "HEADERS_TOO_LARGE"),
    "body": (CHUNKED.replace(b"Host: a\r\n", MINE) + b"zz\r\n", 400, "BAD_HTTP"),
}


async def refusals_logged(capfd, request_id: str) -> list[dict]:
    """The lines of refusals of this request, once there is one."""
    seen, until = "", time.monotonic() + 10
    while True:
        seen += capfd.readouterr().out
        lines = [json.loads(line) for line in seen.splitlines() if request_id in line]
        if found := [line for line in lines if line["event"] == "refused"]:
            return found
        assert time.monotonic() < until
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(("sent", "status", "reason"), REFUSED.values(), ids=REFUSED.keys())
async def test_what_is_refused_before_it_is_a_request_is_found_in_the_log_by_its_id(
    start_edge, capfd, sent, status, reason
):
    async with start_edge(EdgeConfig(head_timeout_s=0.3, drain_s=1.0)) as edge:
        answer = await edge.raw(sent, silence_s=3)
        head, _, body = answer.partition(b"\r\n\r\n")
        told = json.loads(body)
        assert (told["status"], told["reason"]) == (status, reason)
        assert f"x-request-id: {told['request_id']}".encode() in head
        assert (told["request_id"] == "mine") == (b"mine" in sent)
        [line] = await refusals_logged(capfd, told["request_id"])
    assert (line["status"], line["reason"]) == (status, reason)


async def test_an_upgrade_is_declined_by_answering(edge):
    request = GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    answer = await edge.raw(request + SMUGGLED)
    assert statuses(answer) == [200]
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "target",
    [
        "//healthz",
        "/healthz/",
        "/x/../healthz",
        "/%2e%2e/healthz",
        "/v1/..;/healthz",
        "/healthz%00",
    ],
)
async def test_s13_disguised_paths_are_not_normalised_into_others(edge, target):
    answer = await edge.raw(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert statuses(answer) in ([400], [404])


async def test_an_encoded_slash_stays_inside_its_segment(edge):
    answer = await edge.client.get("/v1/accounts/a%2Fb", headers=edge.bearer())
    assert answer.status_code == 404
    assert answer.json()["reason"] == "NOT_FOUND"  # the service was asked, for that very name


async def test_s8_s9_slow_heads_and_bodies_end_while_others_are_served(start_edge):
    config = EdgeConfig(head_timeout_s=0.5, body_timeout_s=0.5, drain_s=1.0)
    async with start_edge(config) as edge:

        async def slow(request: bytes) -> tuple[bytes, float]:
            before = time.monotonic()
            answer = await edge.raw(request, silence_s=4)
            return answer, time.monotonic() - before

        token = edge.bearer()["authorization"].encode()
        path = f"POST /v1/{KNOWN}:transferFunds HTTP/1.1\r\nHost: a\r\n".encode()
        body = path + b"Authorization: " + token + b"\r\nContent-Length: 50\r\n\r\nabc"
        heads = [slow(b"GET /hea") for _ in range(100)] + [
            slow(GET + b"A: b\r\n") for _ in range(100)
        ]
        waiting = asyncio.gather(*heads, *(slow(body) for _ in range(50)))
        before = time.monotonic()
        assert (await edge.client.get("/healthz")).status_code == 200
        assert time.monotonic() - before < 2
        answers = await waiting
    for answer, seconds in answers:
        assert statuses(answer) == [408]
        assert seconds < 4


async def test_drip_fed_heads_are_not_kept_alive_by_their_drops(start_edge):
    async with start_edge(EdgeConfig(head_timeout_s=0.5, drain_s=1.0)) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        before = time.monotonic()
        try:
            while not reader.at_eof() and time.monotonic() < before + 5:
                writer.write(b"\r\n")
                await asyncio.sleep(0.05)
                if reader._buffer:
                    break
        except ConnectionError:
            pass
        writer.close()
        assert time.monotonic() - before < 3


async def test_s10_one_address_may_hold_only_so_many_connections(start_edge):
    async with start_edge(EdgeConfig(connections_per_address_max=20, drain_s=1.0)) as edge:
        held = [await asyncio.open_connection("127.0.0.1", edge.port) for _ in range(60)]
        await asyncio.sleep(0.2)
        closed = sum(reader.at_eof() for reader, _ in held)
        assert closed >= 40
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.1)
        assert (await edge.client.get("/healthz")).status_code == 200
        gc.collect()


async def test_s18_only_listed_origins_may_call_from_a_page(start_edge):
    config = EdgeConfig(cors_origins="https://app.example.com", drain_s=1.0)
    async with start_edge(config) as edge:

        async def preflight(origin: str, method: str = "POST", path: str = "/v1/accounts"):
            headers = {"origin": origin, "access-control-request-method": method}
            return await edge.client.options(path, headers=headers)

        good = await preflight("https://app.example.com")
        assert good.status_code == 204
        assert good.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "idempotency-key" in good.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in good.headers
        for origin in ("null", "https://evil.example", "https://app.example.com.evil.example"):
            bad = await preflight(origin)
            assert bad.status_code == 403
            assert "access-control-allow-origin" not in bad.headers
        assert (await preflight("https://app.example.com", "DELETE")).status_code == 403
        patch = await preflight("https://app.example.com", "PATCH", "/v1/files/u1")
        assert "upload-offset" in patch.headers["access-control-allow-headers"]
        headers = {**edge.bearer(), "origin": "https://app.example.com"}
        answer = await edge.client.get(f"/v1/{KNOWN}", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
        refused = await edge.client.get("/v1/accounts/other", headers=headers)
        assert refused.headers["access-control-allow-origin"] == "https://app.example.com"


async def test_s19_a_hundred_thousand_query_parameters_do_not_fit(edge):
    answer = await edge.raw(
        b"GET /v1/accounts?" + b"a=1&" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    assert statuses(answer) == [414]


async def test_a_full_edge_refuses_fast_and_says_when_to_come_back(start_edge):
    async with start_edge(EdgeConfig(requests_max=1, drain_s=1.0)) as edge:
        headers = {**edge.bearer(), "grpc-timeout": "1S"}
        slow = asyncio.create_task(edge.client.get("/v1/accounts/slow", headers=headers))
        await asyncio.sleep(0.3)
        refused = await edge.client.get("/healthz")
        assert (refused.status_code, refused.json()["reason"]) == (503, "OVERLOADED")
        assert refused.headers["retry-after"] == "1"
        assert (await slow).status_code == 504
