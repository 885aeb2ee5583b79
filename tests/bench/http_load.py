"""A small load generator: keep-alive connections that ask as fast as they are answered."""

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

REQUEST_TIMEOUT_S = 30.0
HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Request:
    """One HTTP request; the body is JSON or empty."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def encoded(self, host: str) -> bytes:
        """The bytes on the wire."""
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return "\r\n".join(lines).encode() + HEAD_END + self.body


@dataclass(frozen=True)
class Load:
    """What was measured, latencies in seconds, sorted."""

    latencies_s: tuple[float, ...]
    elapsed_s: float

    @property
    def requests_per_s(self) -> float:
        """Answers per second, over all connections."""
        return len(self.latencies_s) / self.elapsed_s

    def percentile_ms(self, share: float) -> float:
        """The latency that this share (0 to 1) of requests stayed within, in milliseconds."""
        index = min(len(self.latencies_s) - 1, int(len(self.latencies_s) * share))
        return self.latencies_s[index] * 1000


async def run_load(
    host: str, port: int, make: Callable[[int], Request], *, connections: int, duration_s: float
) -> Load:
    """Ask for duration_s on each connection; every answer must be 200.

    Args:
        host: where the edge is.
        port: its port.
        make: the n-th request.
        connections: how many ask at once.
        duration_s: how long.

    Raises:
        AssertionError: an answer was not 200; it is shown.
    """
    numbers, latencies_s = itertools.count(), list[float]()
    started_s = time.perf_counter()

    async def ask() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            while (now_s := time.perf_counter()) < started_s + duration_s:
                writer.write(make(next(numbers)).encoded(f"{host}:{port}"))
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await _read_answer(reader)
                latencies_s.append(time.perf_counter() - now_s)
        finally:
            writer.close()
            await writer.wait_closed()

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(ask())
    return Load(tuple(sorted(latencies_s)), time.perf_counter() - started_s)


async def _read_answer(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(HEAD_END)
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    body = await reader.readexactly(length)
    assert head.startswith(b"HTTP/1.1 200"), head + body
