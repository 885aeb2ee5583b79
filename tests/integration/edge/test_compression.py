"""gzip both ways, over real sockets: who gets it, when, and what it may unpack to."""

import asyncio
import gzip
import json
import zlib

import pytest

from tests.integration.edge.wire import Answer, Connection

LONG, SHORT = "/v1/rooms/den/note?number=5000", "/v1/rooms/den/note?number=10"
WATCH = "/v1/rooms/den:watch"


async def ask(edge, target, *lines, method="GET", body=b"") -> Answer:
    """An answer as it is on the wire."""
    connection = Connection(edge.port)
    answer = await connection.ask(method, target, lines, body)
    connection.close()
    return answer


def unzipped(body: bytes) -> bytes:
    return gzip.decompress(body)


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip", "gzip"),
        ("x-gzip", "gzip"),
        ("GZIP;Q=0.5", "gzip"),
        ("br, gzip;q=0.1", "gzip"),
        ("*", "gzip"),
        ("gzip;q=1, identity;q=0.5", "gzip"),
        ("identity;q=0, gzip", "gzip"),
        ("*;q=0, gzip", "gzip"),
        ("", None),
        ("identity", None),
        ("br, deflate", None),
        ("gzip;q=0", None),
        ("gzip;q=0, *", None),
        ("gzip;q=0.2, identity;q=0.8", None),
        ("gzip;q=nonsense", None),
        ("gzipped", None),
    ],
)
async def test_accept_encoding_decides(foreign_edge, accept, coding):
    answer = await ask(foreign_edge, LONG, f"Accept-Encoding: {accept}")
    assert answer.headers.get("content-encoding") == coding
    assert "accept-encoding" in answer.headers["vary"]
    body = unzipped(answer.body) if coding else answer.body
    assert json.loads(body)["text"] == "x" * 5000
    assert int(answer.headers["content-length"]) == len(answer.body)


async def test_who_says_nothing_gets_it_as_it_is_and_caches_know_that_it_varies(foreign_edge):
    answer = await ask(foreign_edge, LONG)
    assert "content-encoding" not in answer.headers
    assert answer.headers["vary"] == "accept-encoding"


async def test_a_short_answer_is_sent_as_it_is_unless_that_is_refused(foreign_edge):
    answer = await ask(foreign_edge, SHORT, "Accept-Encoding: gzip")
    assert not {"content-encoding", "vary"} & answer.headers.keys()
    answer = await ask(foreign_edge, SHORT, "Accept-Encoding: gzip, identity;q=0")
    assert json.loads(unzipped(answer.body))["text"] == "x" * 10


async def test_who_takes_nothing_that_there_is_gets_406_and_nothing_happens(foreign_edge):
    for accept in ("identity;q=0", "*;q=0", "br, *;q=0", "identity;q=0, gzip;q=0"):
        answer = await ask(foreign_edge, LONG, f"Accept-Encoding: {accept}")
        assert (answer.status, json.loads(answer.body)["reason"]) == (406, "NOT_ACCEPTABLE")
    assert foreign_edge.stranger.metadata == {}


@pytest.mark.parametrize(
    ("content_type", "coding"),
    [
        ("text~csv", "gzip"),
        ("application~vnd.x+json", "gzip"),
        ("image~svg+xml", "gzip"),
        ("image~png", None),
        ("application~zip", None),
        ("application~gzip", None),
        ("nonsense", None),
    ],
)
async def test_only_text_is_compressed(foreign_edge, content_type, coding):
    answer = await ask(foreign_edge, f"/v1/files/{content_type}", "Accept-Encoding: gzip")
    assert answer.headers.get("content-encoding") == coding
    assert (unzipped(answer.body) if coding else answer.body) == b"x" * 5000


async def test_an_answer_that_may_carry_a_secret_is_never_compressed(foreign_edge):
    answer = await ask(foreign_edge, "/v1/keys/k", "Accept-Encoding: gzip")
    assert json.loads(answer.body)["secret"] == "s" * 30
    assert "content-encoding" not in answer.headers
    refused = await ask(foreign_edge, "/v1/keys/k", "Accept-Encoding: gzip, identity;q=0")
    assert refused.status == 406
    stream = await ask(foreign_edge, "/v1/rooms/den/keys:watch", "Accept-Encoding: gzip")
    assert json.loads(stream.body)["secret"] == "s" * 30


async def test_each_form_has_its_own_etag_and_both_come_back_as_the_same(foreign_edge):
    plain = await ask(foreign_edge, LONG + "&etag=7")
    packed = await ask(foreign_edge, LONG + "&etag=7", "Accept-Encoding: gzip")
    assert (plain.headers["etag"], packed.headers["etag"]) == ('"7"', '"7%gzip"')
    for tag in ('"7"', '"7%gzip"', 'W/"7%gzip"'):
        fresh = await ask(foreign_edge, LONG + "&etag=7", f"If-None-Match: {tag}")
        assert (fresh.status, fresh.headers["etag"]) == (304, tag.removeprefix("W/"))
        assert fresh.headers["vary"] == "accept-encoding"
        body = b'{"number":1}'
        lines = (f"If-Match: {tag}", "Content-Type: application/json")
        written = await ask(foreign_edge, "/v1/rooms/den/note", *lines, method="POST", body=body)
        if tag.startswith("W/"):
            assert written.status == 412
        else:
            assert json.loads(written.body)["etag"] == "7"
    stale = await ask(foreign_edge, LONG + "&etag=7", 'If-None-Match: "6%gzip"')
    assert stale.status == 200


async def test_a_long_answer_is_compressed_beside_others(foreign_edge):
    target = "/v1/rooms/den/note?number=3000000"
    answer = await ask(foreign_edge, target, "Accept-Encoding: gzip")
    assert len(answer.body) < 30_000
    assert len(json.loads(unzipped(answer.body))["text"]) == 3_000_000


# Streams
async def test_each_line_of_a_compressed_stream_can_be_read_at_once(foreign_edge):
    foreign_edge.stranger.gate.clear()
    headers = {"accept-encoding": "gzip"}
    stream = foreign_edge.client.stream("GET", WATCH + "?count=3", headers=headers)
    unpacker, seen, raw_bytes = zlib.decompressobj(31), b"", 0
    async with stream as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["vary"] == "accept-encoding"
        async for chunk in answer.aiter_raw():
            seen += unpacker.decompress(chunk)
            raw_bytes += len(chunk)
            if not foreign_edge.stranger.gate.is_set() and seen.endswith(b"\n"):
                assert seen.count(b"\n") == 1  # the second has not been sent yet
                foreign_edge.stranger.gate.set()
    assert unpacker.eof
    assert [json.loads(line)["cursor"] for line in seen.splitlines()] == ["1", "2", "3"]
    assert raw_bytes < len(seen) / 2


async def test_an_error_is_the_last_line_of_a_compressed_stream_too(foreign_edge):
    target = "/v1/rooms/breaks:watch?count=1"
    answer = await ask(foreign_edge, target, "Accept-Encoding: gzip")
    *_, last = unzipped(answer.body).splitlines()
    assert json.loads(last)["error"]["detail"] == "The room is closed."


async def test_events_and_bytes_are_sent_as_they_are(foreign_edge):
    lines = ("Accept-Encoding: gzip", "Accept: text/event-stream")
    answer = await ask(foreign_edge, WATCH + "?count=1", *lines)
    assert (answer.body.startswith(b"retry: "), answer.headers.get("vary")) == (True, None)
    answer = await ask(foreign_edge, "/v1/files/f:download", "Accept-Encoding: gzip")
    assert "content-encoding" not in answer.headers
    refuses = "Accept-Encoding: gzip, identity;q=0"
    for target, *others in ((WATCH, "Accept: text/event-stream"), ("/v1/files/f:download",)):
        assert (await ask(foreign_edge, target, refuses, *others)).status == 406


async def test_heartbeats_of_a_compressed_stream_arrive(start_foreign_edge):
    async with start_foreign_edge(heartbeat_s=0.1) as edge:
        edge.stranger.reset()
        edge.stranger.gate.clear()
        stream = edge.client.stream("GET", WATCH + "?count=2", headers={"accept-encoding": "gzip"})
        unpacker, seen = zlib.decompressobj(31), b""
        async with stream as answer, asyncio.timeout(5):
            async for chunk in answer.aiter_raw():
                seen += unpacker.decompress(chunk)
                if seen.endswith(b"}\n\n\n"):
                    break


# Bodies
async def put(edge, body: bytes, coding: str = "gzip", target: str = "/v1/rooms/den/note"):
    headers = {"content-encoding": coding, "content-type": "application/json"}
    return await edge.client.put(target, content=body, headers=headers)


async def test_a_body_may_come_compressed(foreign_edge):
    answer = await put(foreign_edge, gzip.compress(b'{"number":3}'))
    assert answer.json()["text"] == "xxx"
    assert (await put(foreign_edge, b'{"number":3}', "identity")).status_code == 200


@pytest.mark.parametrize(
    ("body", "coding", "status"),
    [
        (zlib.compress(b"{}"), "deflate", 415),
        (b"{}", "br", 415),
        (gzip.compress(gzip.compress(b"{}")), "gzip, gzip", 415),
        (gzip.compress(gzip.compress(b"{}")), "gzip", 400),
        (b"{}", "gzip", 400),
        (gzip.compress(b"{}")[:-4], "gzip", 400),
        (gzip.compress(b"{}") + gzip.compress(b"{}"), "gzip", 400),
        (gzip.compress(b"{}") + b"smuggled", "gzip", 400),
        (gzip.compress(b" " * (2 * 1024 * 1024) + b"{}"), "gzip", 413),
        (gzip.compress(b"0" * (100 * 1024 * 1024)), "gzip", 413),
    ],
    ids=[
        *("deflate", "brotli", "nested and told", "nested", "not gzip", "cut", "two members"),
        *("something after it", "too long", "a bomb"),
    ],
)
async def test_other_codings_and_bombs_are_refused(foreign_edge, body, coding, status):
    answer = await put(foreign_edge, body, coding)
    assert answer.status_code == status, answer.text
    assert answer.headers.get("accept-encoding") == ("gzip" if status == 415 else None)
    assert foreign_edge.stranger.metadata == {}
