"""Servers that are none, or mean harm: each call ends as it should, and the next one passes."""

import asyncio
import contextlib
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shared.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    TenfoldError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
    Unreachable,
)
from shared.rpc import frames, http2
from shared.rpc.header_block import field
from shared.rpc.unary import UnaryChannel
from tests.unit.shared.rpc.wire import (
    INITIAL,
    SETTINGS,
    answer,
    data,
    headers,
    message,
    trailers,
)

PATH = "/a.B/C"
MEBI = 1024 * 1024

# What a server does with one request: its stream, and where to write.
Script = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


def says(*parts: Callable[[int], bytes]) -> Script:
    """Answers a request with these frames, then is silent."""

    async def script(stream_id: int, writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(part(stream_id) for part in parts))

    return script


def repeats(first: Callable[[int], bytes], again: Callable[[int], bytes]) -> Script:
    """Answers a request without end, as fast as it is read."""

    async def script(stream_id: int, writer: asyncio.StreamWriter) -> None:
        writer.write(first(stream_id))
        chunk = again(stream_id)
        chunk *= max(1, 65_536 // len(chunk))
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(chunk)
                await writer.drain()

    return script


async def hangs_up(_stream_id: int, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def breaks_off(_stream_id: int, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


GOOD = says(answer)


class Hostile:
    """A server of raw bytes, which reads just enough to know of each request."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.greeting = SETTINGS
        self.requests = 0
        self._scripts: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def behave(self) -> None:
        """Answer well from now on, and greet well."""
        self.script, self.greeting = GOOD, SETTINGS
        for script in self._scripts:
            script.cancel()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            writer.write(self.greeting)
            async with asyncio.TaskGroup() as group:
                await self._read(reader, writer, group)
        except* (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _read(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        group: asyncio.TaskGroup,
    ) -> None:
        await reader.readexactly(len(frames.PREFACE))
        unread = b""
        while chunk := await reader.read(65_536):
            unread, at = unread + chunk, 0
            while len(unread) - at >= frames.HEAD_BYTES:
                high, low, kind, _, stream_id = frames.HEAD.unpack_from(unread, at)
                end = at + frames.HEAD_BYTES + (high << 8 | low)
                if end > len(unread):
                    break
                at = end
                if kind == frames.HEADERS:
                    self.requests += 1
                    self._scripts.append(group.create_task(self.script(stream_id, writer)))
            unread = unread[at:]


@asynccontextmanager
async def hostile(
    script: Script, greeting: bytes = SETTINGS
) -> AsyncIterator[tuple[Hostile, UnaryChannel]]:
    server = Hostile(script)
    server.greeting = greeting
    channel = UnaryChannel(await server.start(), {}, checks_health=False)
    try:
        yield server, channel
    finally:
        await channel.close()
        await server.stop()


async def call(channel: UnaryChannel, timeout_s: float = 10, body: bytes = b"x") -> bytes:
    return (await channel.call(PATH, body, timeout_s=timeout_s)).message


async def assert_it_goes_on(server: Hostile, channel: UnaryChannel) -> None:
    """Once the server behaves, the channel works: at once, or after it has connected anew."""
    server.behave()
    async with asyncio.timeout(20):
        while True:
            try:
                assert await call(channel, timeout_s=2) == b"answer"
            except (Unavailable, DeadlineExceeded):
                await asyncio.sleep(0.02)
            else:
                return


async def until_count(tasks: list[asyncio.Task[bytes]], count: int) -> None:
    """Until so many of the tasks have ended."""
    async with asyncio.timeout(20):
        while sum(task.done() for task in tasks) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@contextmanager
def traced_bytes() -> Iterator[Callable[[], int]]:
    """What the client's own lines hold of what they took since: the server is in this process."""
    ours = tracemalloc.Filter(True, f"{Path(http2.__file__).parent}/*")
    tracemalloc.start()
    try:
        yield lambda: sum(
            trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).traces
        )
    finally:
        tracemalloc.stop()


def nothing(_stream_id: int) -> bytes:
    return b""


def status(code: bytes, *, content_type: bytes = b"text/html") -> Callable[[int], bytes]:
    """The headers of a plain HTTP answer."""
    block = b"\x08" + bytes((len(code),)) + code + field(b"content-type", content_type)
    return lambda stream_id: headers(stream_id, block) + data(stream_id, b"<html>")


def framed(kind: int, flags: int, payload: bytes, stream_id: int | None = None):
    return lambda asked: frames.frame(
        kind, flags, asked if stream_id is None else stream_id, payload
    )


def reset(code: int) -> Callable[[int], bytes]:
    return lambda stream_id: frames.reset(stream_id, code)


def grpc_status(code: bytes) -> Callable[[int], bytes]:
    return lambda stream_id: trailers(stream_id, INITIAL + field(b"grpc-status", code))


ANSWERS = {
    # Other servers' HTTP/2.
    "200 of a web page": (says(status(b"200")), Unknown),
    "400": (says(status(b"400")), Internal),
    "401": (says(status(b"401")), Unauthenticated),
    "403": (says(status(b"403")), PermissionDenied),
    "404": (says(status(b"404")), Unimplemented),
    "429": (says(status(b"429")), Unavailable),
    "503 of a proxy": (says(status(b"503")), Unavailable),
    "418": (says(status(b"418")), Unknown),
    "503 that says grpc": (says(status(b"503", content_type=b"application/grpc")), Unavailable),
    # Answers that are none of gRPC.
    "compressed": (says(headers, lambda i: data(i, b"\1\0\0\0\1x"), trailers), Internal),
    "too short": (says(headers, lambda i: data(i, b"\0\0\0\0\5x"), trailers), Internal),
    "too long": (says(headers, lambda i: data(i, b"\0\0\0\0\1xyz"), trailers), Internal),
    "enormous": (says(headers, lambda i: data(i, b"\0\xff\xff\xff\xffx")), Internal),
    "no message": (says(headers, trailers), Internal),
    "two messages": (says(headers, lambda i: data(i, message(b"x") * 2), trailers), Internal),
    "no trailers": (says(headers, lambda i: data(i, message(b"x"), 1)), Internal),
    "no headers": (says(lambda i: data(i, message(b"x")), trailers), Internal),
    "a strange status": (says(grpc_status(b"99")), Unknown),
    "no number": (says(grpc_status(b"zero")), Unknown),
    "details that are none": (
        says(
            lambda i: trailers(
                i,
                INITIAL
                + field(b"grpc-status", b"3")
                + field(b"grpc-status-details-bin", b"*\xff")
                + field(b"grpc-message", b"%zz\xff%e2%82"),
            )
        ),
        InvalidRequest,
    ),
    "headers that are long": (
        says(lambda i: headers(i, INITIAL + field(b"x", b"y" * 4050) * 4)),
        Internal,
    ),
    # Resets.
    "refused": (says(reset(frames.REFUSED_STREAM)), Unavailable),
    "cancelled": (says(reset(frames.CANCEL)), Unavailable),
    "internal": (says(reset(2)), Internal),
    "calm": (says(reset(frames.ENHANCE_YOUR_CALM)), Overloaded),
    "security": (says(reset(frames.INADEQUATE_SECURITY)), PermissionDenied),
    "an unknown code": (says(reset(2**32 - 1)), Internal),
    # Violations: the connection goes.
    "frame too long": (says(lambda _: b"\x01\0\0\0\0\0\0\0\1"), Unavailable),
    "push": (says(framed(frames.PUSH_PROMISE, 4, bytes(8))), Unavailable),
    "bad block": (says(framed(frames.HEADERS, 4, b"\x80")), Unavailable),
    "a stream of its own": (says(framed(frames.HEADERS, 4, INITIAL, 2)), Unavailable),
    "a stream that is not": (says(framed(frames.DATA, 0, b"x", 999)), Unavailable),
    "settings of a wrong size": (says(framed(frames.SETTINGS, 0, b"x", 0)), Unavailable),
    "a window that overflows": (
        says(lambda _: frames.window_update(0, 2**31 - 1)),
        Unavailable,
    ),
    "nonsense": (says(lambda _: b"nonsense " * 100), Unavailable),
    # Without end.
    "endless continuation": (
        repeats(framed(frames.HEADERS, 0, b""), framed(frames.CONTINUATION, 0, b"")),
        Unavailable,
    ),
    "endless padding": (
        repeats(nothing, framed(frames.DATA, frames.PADDED, b"\xff" + bytes(255))),
        Internal,
    ),
    "hpack bomb": (
        says(framed(frames.HEADERS, 4, INITIAL + b"\xbf" * 10_000)),
        Unavailable,
    ),
    "hpack of many fields": (
        says(framed(frames.HEADERS, 4, INITIAL + b"\x8d" * 10_000)),
        Internal,
    ),
    "endless messages": (
        repeats(headers, lambda i: data(i, message(b""))),
        Internal,
    ),
    "silence": (says(), DeadlineExceeded),
    "headers and silence": (says(headers), DeadlineExceeded),
    "endless early hints": (
        repeats(nothing, lambda i: headers(i, b"\x08\x03103")),
        DeadlineExceeded,
    ),
    "endless pings": (
        repeats(nothing, lambda _: frames.frame(frames.PING, 0, 0, bytes(8))),
        (DeadlineExceeded, Unavailable),
    ),
    "endless settings": (
        repeats(nothing, lambda _: frames.settings((frames.SETTINGS_INITIAL_WINDOW_SIZE, 1))),
        (DeadlineExceeded, Unavailable),
    ),
    "endless unknown frames": (
        repeats(nothing, framed(0xFE, 0, bytes(16_384))),
        DeadlineExceeded,
    ),
    # The connection ends without a word.
    "end": (hangs_up, Unavailable),
    "reset": (breaks_off, Unavailable),
}


@pytest.mark.parametrize(("script", "kind"), ANSWERS.values(), ids=ANSWERS)
async def test_each_wrong_answer_is_an_error_of_its_kind_in_its_time(
    script: Script, kind: type[TenfoldError] | tuple[type[TenfoldError], ...]
) -> None:
    async with hostile(GOOD) as (server, channel):
        assert await call(channel) == b"answer"
        server.script = script
        before_bytes, began_s = resident_bytes(), time.monotonic()
        with pytest.raises(kind):
            await call(channel, timeout_s=0.5 if DeadlineExceeded in _kinds(kind) else 30)
        assert time.monotonic() - began_s < 20
        assert resident_bytes() - before_bytes < 64 * MEBI
        await assert_it_goes_on(server, channel)


def _kinds(kind: object) -> tuple[object, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


async def test_a_wrong_answer_fails_no_other_call() -> None:
    async def odd_ones_wrong(stream_id: int, writer: asyncio.StreamWriter) -> None:
        is_wrong = stream_id % 4 == 1
        writer.write(headers(stream_id) * 2 if is_wrong else answer(stream_id))

    async with hostile(odd_ones_wrong) as (_, channel):
        results = await asyncio.gather(*(call(channel) for _ in range(200)), return_exceptions=True)
    assert sum(result == b"answer" for result in results) == 100
    assert sum(isinstance(result, Internal) for result in results) == 100


async def test_a_storm_of_resets_ends_every_call_once_and_not_the_channel() -> None:
    async with hostile(says(reset(frames.REFUSED_STREAM))) as (server, channel):
        results = await asyncio.gather(*(call(channel) for _ in range(500)), return_exceptions=True)
        assert {type(result) for result in results} == {Unreachable}
        assert server.requests <= 500 * 5  # a few attempts each, not for ever
        await assert_it_goes_on(server, channel)


async def test_a_call_refused_once_is_made_again_whatever_it_does() -> None:
    async def refuse_the_first(stream_id: int, writer: asyncio.StreamWriter) -> None:
        is_first = stream_id == 1
        writer.write(reset(frames.REFUSED_STREAM)(1) if is_first else answer(stream_id))

    async with hostile(refuse_the_first) as (server, channel):
        assert await call(channel) == b"answer"
        assert server.requests == 2


async def test_goaway_above_a_call_makes_it_again_on_a_new_connection() -> None:
    async def leave(stream_id: int, writer: asyncio.StreamWriter) -> None:
        writer.write(frames.goaway(frames.NO_ERROR, last_id=stream_id - 2 if stream_id > 1 else 0))

    async with hostile(leave) as (server, channel):
        calling = asyncio.create_task(call(channel))
        while server.requests < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        server.script = GOOD
        assert await calling == b"answer"


async def test_data_after_the_end_is_ignored() -> None:
    script = says(answer, lambda i: data(i, b"more"), trailers)
    async with hostile(script) as (_, channel):
        for _ in range(3):
            assert await call(channel) == b"answer"


async def test_many_large_answers_that_never_end_are_bounded_and_leave_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http2, "PARTIAL_BYTES_MAX", 8 * MEBI)
    part = (16 * MEBI).to_bytes(5, "big") + bytes(MEBI)
    async with hostile(says(headers, lambda i: data(i, part))) as (server, channel):
        with traced_bytes() as held_bytes:
            running = [asyncio.create_task(call(channel, timeout_s=60)) for _ in range(40)]
            await until_count(running, 32)
            assert MEBI < held_bytes() < 16 * MEBI
        refused = [task for task in running if task.done()]
        held = [task for task in running if not task.done()]
        assert {type(task.exception()) for task in refused} == {Overloaded}
        assert len(held) <= 8
        for task in held:
            task.cancel()
        await asyncio.wait(held)
        await assert_it_goes_on(server, channel)


async def test_a_server_that_takes_no_places_gives_none_until_it_does() -> None:
    none = frames.settings((frames.SETTINGS_MAX_CONCURRENT_STREAMS, 0))
    async with hostile(GOOD, greeting=none) as (_, channel):
        with pytest.raises(DeadlineExceeded):
            await call(channel, timeout_s=0.2)
        waiting = asyncio.create_task(call(channel))
        await asyncio.sleep(0.05)
        [endpoint] = channel._endpoints._endpoints
        assert endpoint.connection is not None
        endpoint.connection.data_received(
            frames.settings((frames.SETTINGS_MAX_CONCURRENT_STREAMS, 5))
        )
        assert await waiting == b"answer"


@pytest.mark.parametrize(
    "greeting",
    [b"", b"\0\0\0", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\x04\1\0\0\0\0", b"\xff" * 50],
    ids=["silence", "half a frame", "HTTP/1", "only an acknowledgement", "noise"],
)
async def test_a_server_that_does_not_greet_gets_no_calls_and_gets_them_once_it_does(
    greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.rpc.endpoints.CONNECT_TIMEOUT_S", 0.3)
    async with hostile(GOOD, greeting=greeting) as (server, channel):
        with pytest.raises(Unavailable):
            await call(channel)
        assert server.requests == 0
        await assert_it_goes_on(server, channel)


async def test_a_real_http_1_server_is_told_apart() -> None:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        channel = UnaryChannel(f"127.0.0.1:{server.server_address[1]}", {})
        with pytest.raises(Unavailable):
            await call(channel)
        await channel.close()
        server.shutdown()
        thread.join()


async def test_a_health_watch_of_nonsense_takes_no_calls_and_costs_little() -> None:
    server = Hostile(says(headers, lambda i: data(i, message(b"\xff\xff"))))
    channel = UnaryChannel(await server.start(), {}, checks_health=True)
    with pytest.raises(Unavailable):
        await call(channel)
    assert server.requests == 1  # the watch, which is not repeated at once
    await channel.close()
    await server.stop()


async def test_too_many_pings_make_the_next_connection_ping_less() -> None:
    async def complain(_stream_id: int, writer: asyncio.StreamWriter) -> None:
        writer.write(frames.goaway(frames.ENHANCE_YOUR_CALM, 2**31 - 1, b"too_many_pings"))

    async with hostile(complain) as (server, channel):
        with pytest.raises(DeadlineExceeded):
            await call(channel, timeout_s=0.1)
        await assert_it_goes_on(server, channel)
        [endpoint] = channel._endpoints._endpoints
        assert endpoint._keepalive_s == 2 * 20
