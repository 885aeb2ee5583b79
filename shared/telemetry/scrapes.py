"""A small server that hands out the metrics of this process, or of several.

Never on the address that serves the public (reliability S73): it has a port of its own, answers
`GET /metrics` and nothing else, one request a connection, and few connections at once.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress

from shared.listening import bind
from shared.telemetry.loop import measuring_loop_lag
from shared.telemetry.metrics import Metrics

SETTING = "TENFOLD_METRICS_LISTEN"
PATH = b"/metrics"
SCRAPES_MAX = 8
SCRAPE_TIMEOUT_S = 10.0
HEAD_BYTES_MAX = 8 * 1024
# Until a client that was told something has read it.
CLOSE_TIMEOUT_S = 1.0

# Prometheus, "Text format details".
_TEXT_FORMAT = b"text/plain; version=0.0.4; charset=utf-8"

_BROKEN_SCRAPE = OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError

Render = Callable[[], Awaitable[bytes]]


@asynccontextmanager
async def open_telemetry(metrics: Metrics, listen: str) -> AsyncIterator[int]:
    """Serve a process's metrics while open, and measure its loop; gives the port.

    Args:
        metrics: what the process counts.
        listen: TENFOLD_METRICS_LISTEN; "" serves nothing, and gives 0.

    Raises:
        ListenError: the address is taken, or none.
    """
    if not listen:
        yield 0
        return
    with closing(bind(listen, setting=SETTING)) as listener:
        async with telling(metrics, {}) as render, exposing(render, listener) as port:
            yield port


@asynccontextmanager
async def telling(metrics: Metrics, labels: Mapping[str, str]) -> AsyncIterator[Render]:
    """Measure the loop while open; gives what makes the text of all that the process tells.

    Args:
        metrics: what the process counts.
        labels: that every sample carries.
    """
    # A library that costs a process its start is loaded only where it is used.
    from shared.telemetry.exposition import Exposition

    with measuring_loop_lag(metrics):
        yield Exposition(metrics, labels).render


@asynccontextmanager
async def exposing(render: Render, listener: socket.socket) -> AsyncIterator[int]:
    """Answer scrapes until left; gives the port.

    Args:
        render: makes the text.
        listener: a listening socket, which the caller closes.
    """
    places = asyncio.Semaphore(SCRAPES_MAX)
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with suppress(*_BROKEN_SCRAPE):
            if not places.locked():
                async with places, asyncio.timeout(SCRAPE_TIMEOUT_S):
                    writer.write(await _answer(reader, render))
                    await writer.drain()
        writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await writer.wait_closed()
        writers.discard(writer)

    async with await asyncio.start_server(serve, sock=listener, limit=HEAD_BYTES_MAX) as server:
        yield server.sockets[0].getsockname()[1]
        for writer in tuple(writers):  # whoever is silent must not hold up the end
            writer.transport.abort()


async def _answer(reader: asyncio.StreamReader, render: Render) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    method, _, rest = head.partition(b" ")
    target = rest.partition(b" ")[0]
    if target.partition(b"?")[0] != PATH:
        return _told(b"404 Not Found", b"text/plain", b"The metrics are at /metrics.\n")
    if method != b"GET":
        return _told(b"405 Method Not Allowed", b"text/plain", b"", b"allow: GET\r\n")
    return _told(b"200 OK", _TEXT_FORMAT, await render())


def _told(status: bytes, content_type: bytes, body: bytes, headers: bytes = b"") -> bytes:
    return (
        b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b"
        b"x-content-type-options: nosniff\r\nconnection: close\r\n\r\n%b"
    ) % (status, content_type, len(body), headers, body)
