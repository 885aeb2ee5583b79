"""google.api.HttpBody in server streams: bytes, and nothing else, over real sockets."""

import asyncio

import httpx
import pytest

from tests.integration.edge.stranger import BINARY


async def test_a_stream_of_bodies_is_their_bytes_and_the_first_ones_type(foreign_edge):
    answer = await foreign_edge.client.get("/v1/files/f:download")
    assert answer.headers["content-type"] == "application/x-test"
    assert answer.content == BINARY * 2  # an empty message between them ends nothing
    assert answer.headers["cache-control"] == "no-store"


async def test_response_body_may_name_the_bytes(foreign_edge):
    answer = await foreign_edge.client.get("/v1/files/f:pages")
    assert (answer.headers["content-type"], answer.content) == ("image/test", BINARY * 3)


async def test_no_message_is_an_empty_body(foreign_edge):
    answer = await foreign_edge.client.get("/v1/files/empty:download")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == "application/octet-stream"


async def test_a_refusal_before_the_first_byte_is_a_problem(foreign_edge):
    answer = await foreign_edge.client.get("/v1/files/absent:download")
    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")


async def test_a_failure_after_the_first_byte_breaks_the_connection(foreign_edge, talk):
    duplex = await talk(foreign_edge, "/v1/files:pipe", "Content-Type: application/x-test")
    await duplex.send(b"12")
    assert await duplex.read_head() == 200
    assert await duplex.read_chunk() == b"21"
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
        await foreign_edge.client.get("/v1/files/breaks:download")


async def test_the_connection_is_cut_where_the_bytes_end(foreign_edge):
    reader, writer = await asyncio.open_connection("127.0.0.1", foreign_edge.port)
    writer.write(b"GET /v1/files/breaks:download HTTP/1.1\r\nHost: a\r\n\r\n")
    received = b""
    try:
        async with asyncio.timeout(5):
            while chunk := await reader.read(65536):
                received += chunk
    except ConnectionResetError:
        pass
    writer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding: chunked" in head
    assert not body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("accept", ["text/event-stream", "image/png", "*/*"])
async def test_the_service_alone_knows_the_type_so_accept_is_not_asked(foreign_edge, accept):
    answer = await foreign_edge.client.get("/v1/files/f:download", headers={"accept": accept})
    assert (answer.status_code, answer.content) == (200, BINARY * 2)
