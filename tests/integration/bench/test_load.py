"""The figures of the benches can be believed: wrong answers end a run, CPU is the system's."""

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.bench.sides.children import cpu_s
from tests.bench.sides.load import Job, Wrong, run

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
JOB = Job(
    port=0,
    request=base64.b64encode(REQUEST).decode(),
    duration_s=0.2,
    connections=4,
    body_bytes=2,
)
RIGHT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def server(*answers: bytes) -> AsyncIterator[Job]:
    """Gives these answers one after the other on each connection, then the last for ever."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = list(answers)
        while await reader.read(len(REQUEST)):
            writer.write(left.pop(0) if len(left) > 1 else left[0])
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield replace(JOB, port=listening.sockets[0].getsockname()[1])


@pytest.mark.parametrize("rate_per_s", [0.0, 300.0], ids=["at once", "on schedule"])
async def test_right_answers_are_counted_and_timed(rate_per_s: float) -> None:
    async with server(RIGHT) as job:
        result = await asyncio.to_thread(run, replace(job, rate_per_s=rate_per_s))
    assert result.requests >= 4 if rate_per_s == 0 else result.requests == 60
    assert 0 < result.p50_ms <= result.p99_ms
    assert base64.b64decode(result.body) == b"ok"


@pytest.mark.parametrize("rate_per_s", [0.0, 300.0], ids=["at once", "on schedule"])
@pytest.mark.parametrize(
    "wrong",
    [
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\noki",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\n\r\nok",
    ],
    ids=["status", "length", "more than announced", "no length"],
)
async def test_one_wrong_answer_ends_the_run(wrong: bytes, rate_per_s: float) -> None:
    async with server(RIGHT, RIGHT, wrong, RIGHT) as job:
        with pytest.raises(Wrong):
            await asyncio.to_thread(run, replace(job, rate_per_s=rate_per_s))


async def test_an_answer_in_pieces_is_put_together() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(len(REQUEST)):
            for piece in (RIGHT[:20], RIGHT[20:-1], RIGHT[-1:]):
                writer.write(piece)
                await asyncio.sleep(0.002)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        result = await asyncio.to_thread(run, replace(JOB, port=port))
    assert result.requests >= 4


def test_the_cpu_of_a_process_is_what_the_process_itself_sees() -> None:
    before_s = time.process_time()
    told_s = cpu_s(os.getpid())
    assert before_s <= told_s <= time.process_time()
