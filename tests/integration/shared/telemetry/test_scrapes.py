"""The server of /metrics on a real socket."""

import asyncio
import time
from contextlib import closing

import pytest

from shared.listening import ListenError, bind
from shared.telemetry.metrics import Metrics
from shared.telemetry.scrapes import SCRAPES_MAX, open_telemetry

GET = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_scrape_tells_the_numbers_of_this_moment():
    metrics = Metrics(is_served=True)
    doors = metrics.counter("doors_total", "Doors.").of()
    async with open_telemetry(metrics, "127.0.0.1:0") as port:
        doors.value += 1
        answer = await ask(port, GET)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4;")
    assert b"\ndoors_total 1.0\n" in answer


async def test_the_lag_of_the_loop_is_measured():
    metrics = Metrics(is_served=True)
    async with open_telemetry(metrics, "127.0.0.1:0"):
        [lag] = [f for f in metrics.families() if f.name == "tenfold_event_loop_lag_seconds"]
        until = time.monotonic() + 5
        while not sum(lag.of().counts):
            assert time.monotonic() < until
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 1\r\n\r\n", b"405"),
        (b"\0\xff\r\n\r\n", b"404"),
        (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", b"200"),
    ],
    ids=["root", "another path", "another method", "no HTTP", "query"],
)
async def test_nothing_else_is_answered_there(request_bytes, status):
    async with open_telemetry(Metrics(), "127.0.0.1:0") as port:
        assert (await ask(port, request_bytes)).split(b" ")[1] == status


async def test_a_head_without_an_end_is_cut_off():
    async with open_telemetry(Metrics(), "127.0.0.1:0") as port:
        assert await ask(port, b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 10_000) == b""


async def test_silent_clients_keep_nobody_but_themselves_waiting():
    async with open_telemetry(Metrics(), "127.0.0.1:0") as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(SCRAPES_MAX)]
        await asyncio.sleep(0.05)
        assert await ask(port, b"") == b""  # refused at once, not queued
        for _, writer in held:
            writer.close()
        until = time.monotonic() + 5
        while not await ask(port, GET):
            assert time.monotonic() < until
            await asyncio.sleep(0.05)


async def test_a_taken_address_is_refused_by_the_name_of_its_setting():
    with closing(bind("127.0.0.1:0", setting="a")) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"TENFOLD_METRICS_LISTEN={address}"):
            async with open_telemetry(Metrics(), address):
                pass


async def test_nothing_listens_unless_it_is_asked_to():
    async with open_telemetry(Metrics(), "") as port:
        assert port == 0
