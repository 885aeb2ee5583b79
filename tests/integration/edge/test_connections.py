"""How connections end, on raw sockets: nobody waits for ever, and the last answer arrives."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from edge import http1
from edge.http1 import ConnectionLimits, Server
from edge.http1_request import Http1Request
from tests.integration.edge.test_framing import CHUNKED, GET, SMUGGLED, slow, statuses
from tests.integration.edge.test_streams import eventually


@asynccontextmanager
async def answering_at_once(body: bytes) -> AsyncIterator[tuple[Server, list[Http1Request], int]]:
    """A server whose every answer is the body; the requests that it began, and its port."""
    begun: list[Http1Request] = []

    def serve(request: Http1Request) -> None:
        begun.append(request)
        head = request.begin(200, [(b"content-length", b"%d" % len(body))], b"")
        loop.call_soon(partial(request.write, head, body, is_last=True))

    loop = asyncio.get_running_loop()
    server = Server(serve, ConnectionLimits(10.0, 10.0, 100))
    async with await loop.create_server(server.connection, "127.0.0.1", 0) as listening:
        yield server, begun, listening.sockets[0].getsockname()[1]


async def test_the_host_of_an_absolute_target_is_the_only_one_that_counts():
    async with answering_at_once(b"x") as (_, begun, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET http://b:1/p?q HTTP/1.1\r\nA: b\r\nHost: a\r\n\r\n")
        await eventually(lambda: begun)
        writer.close()
    [request] = begun
    assert (request.raw_path, request.query) == (b"/p", b"q")
    assert sorted(request.headers) == [(b"a", b"b"), (b"host", b"b:1")]


async def test_a_client_that_reads_no_answers_is_served_no_further_until_it_does():
    async with answering_at_once(b"x" * 1_000_000) as (_, begun, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        # So long that no one read brings more of them than may wait.
        writer.write((GET + b"A: %b\r\n\r\n" % (b"x" * 20_000)) * 100)
        await asyncio.sleep(0.3)
        assert len(begun) < 30  # what the sockets' buffers hold
        async with asyncio.timeout(10):
            await reader.readexactly(100_000_000)
        assert len(begun) == 100
        writer.close()


async def test_a_client_that_never_reads_its_answers_is_cut_off(monkeypatch):
    monkeypatch.setattr(http1, "WRITE_TIMEOUT_S", 0.1)
    async with answering_at_once(b"x" * 10_000_000) as (server, begun, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(SMUGGLED * 3)
        async with asyncio.timeout(5):
            while not begun or server.connections:
                server.sweep()
                await asyncio.sleep(0.05)
        assert not server.limits.open_by_address
        writer.close()


def send_all_then_read(port: int, data: bytes) -> bytes:
    """What a client sees that reads only when it has sent everything."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(data)
        time.sleep(0.2)  # a reset has come by now, if there is one
        received = b""
        while chunk := client.recv(65536):
            received += chunk
        return received


@pytest.mark.parametrize("begin", [b"GET /\0 HTTP/1.1\r\n", GET + b"Connection: close\r\n\r\n"])
async def test_the_last_answer_arrives_although_the_client_still_sends(edge, begin):
    data = begin + b"x" * 5_000_000
    answer = await asyncio.to_thread(send_all_then_read, edge.port, data)
    assert statuses(answer) in ([200], [400])
    assert answer.count(b"connection: close") == 1


@pytest.mark.parametrize("limit", ["LINGER_S", "LINGER_BYTES_MAX"])
async def test_a_client_that_sends_on_for_ever_is_cut_off(monkeypatch, limit):
    monkeypatch.setattr(http1, limit, 0.1)
    async with answering_at_once(b"x") as (server, begun, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + b"Connection: close\r\n\r\n")
        await eventually(lambda: begun)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
                server.sweep()
        assert not server.connections
        writer.close()


async def half_closed(edge, request: bytes) -> bytes:
    """What a client gets that says at once that it sends no more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request)
    writer.write_eof()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_client_that_closes_its_side_gets_the_answers_that_it_waits_for(edge):
    assert statuses(await half_closed(edge, SMUGGLED)) == [200]
    assert statuses(await half_closed(edge, slow(edge))) == [504]
    pipelined = SMUGGLED + slow(edge) + SMUGGLED
    assert statuses(await half_closed(edge, pipelined)) == [200, 504, 200]


async def test_a_client_that_closes_its_side_and_asked_to_close_is_waited_for_long(edge):
    last = (
        slow(edge).replace(b"200m", b"1900m").replace(b"Host: a", b"Connection: close\r\nHost: a")
    )
    assert statuses(await half_closed(edge, last)) == [504]


@pytest.mark.parametrize("cut", [b"GET /healthz HTTP/1.1\r\nHo", CHUNKED + b"5\r\nab"])
async def test_what_a_client_has_not_finished_is_not_answered_but_what_was_before_is(edge, cut):
    assert await half_closed(edge, cut) == b""
    assert statuses(await half_closed(edge, slow(edge) + cut)) == [504]


def reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side gets a reset, and nothing that was not sent yet."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_a_reset_is_noticed_while_a_body_waits_that_nobody_reads():
    begun: list[Http1Request] = []
    loop = asyncio.get_running_loop()
    server = Server(begun.append, ConnectionLimits(10.0, 10.0, 100))
    async with await loop.create_server(server.connection, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHUNKED + b"ffffff\r\n" + b"x" * 10_000_000)
        await eventually(lambda: begun)
        await asyncio.sleep(0.2)
        assert not begun[0].has_left
        reset(writer)
        until = time.monotonic() + 5
        while not begun[0].has_left:
            assert time.monotonic() < until
            server.sweep()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("resets", [False, True], ids=["closes", "resets"])
async def test_leaving_is_noticed_while_pipelined_requests_wait(edge, resets):
    edge.behind.ledger.was_cut.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    waiting = slow(edge).replace(b"200m", b"9S")
    writer.write(waiting * 3)
    await asyncio.sleep(0.3)
    if resets:
        reset(writer)
    else:
        writer.close()
    await asyncio.wait_for(edge.behind.ledger.was_cut.wait(), 5)
    assert not await reader.read()
