"""A TCP proxy in front of Postgres that loses what it is told to lose."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CHUNK_BYTES = 64 * 1024
COMMIT = b"COMMIT\0"  # as a simple query ends


@dataclass(eq=False)
class Proxy:
    """Between a client and one server.

    Attributes:
        dsn: how a client reaches the server through it.
        fault: "" forwards all, "frozen" nothing. Others strike once, at the next COMMIT, and end
            the client's connection: "answer" when the server has committed, "question" together
            with the server's, "client" alone: the server waits for what comes next.
    """

    dsn: str = ""
    fault: str = ""
    server: asyncio.Server | None = None
    listen: Callable[[int], Awaitable[asyncio.Server]] | None = None
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """Refuse new connections and end those that are open."""
        assert self.server is not None
        self.server.close()
        self.forget()

    async def mend(self) -> None:
        """Take connections again, where it took them before."""
        assert self.listen is not None
        self.server = await self.listen(urlsplit(self.dsn).port or 0)

    def forget(self) -> None:
        """End what is open; new connections may come."""
        for writer in list(self.writers):
            writer.transport.abort()


@dataclass(eq=False)
class _Link:
    """One client's connection, and ours to the server for it."""

    proxy: Proxy
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    far_reader: asyncio.StreamReader
    far_writer: asyncio.StreamWriter
    keeps_server: bool = False
    is_lost: bool = False

    async def run(self) -> None:
        self.proxy.writers |= {self.writer, self.far_writer}
        ways = [asyncio.create_task(way) for way in (self._up(), self._down())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            self.writer.transport.abort()
            if not self.keeps_server:
                self.far_writer.transport.abort()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

    async def _up(self) -> None:
        with suppress(OSError):
            while data := await self.reader.read(CHUNK_BYTES):
                fault = self.proxy.fault
                if fault == "frozen":
                    continue
                if fault and COMMIT in data:
                    self.proxy.fault = ""
                    await self._strike(fault, data)
                    return
                self.far_writer.write(data)

    async def _strike(self, fault: str, data: bytes) -> None:
        self.keeps_server = fault == "client"
        if fault == "answer":
            self.is_lost = True
            self.far_writer.write(data)
            await self.far_reader_answered.wait()

    async def _down(self) -> None:
        with suppress(OSError):
            while data := await self.far_reader.read(CHUNK_BYTES):
                if self.is_lost:
                    self.far_reader_answered.set()
                elif self.proxy.fault != "frozen":
                    self.writer.write(data)

    def __post_init__(self) -> None:
        self.far_reader_answered = asyncio.Event()


@asynccontextmanager
async def proxying(dsn: str) -> AsyncIterator[Proxy]:
    """A proxy in front of the server of this DSN."""
    parts, proxy = urlsplit(dsn), Proxy()
    tasks: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        far = await asyncio.open_connection(parts.hostname, parts.port)
        await _Link(proxy, reader, writer, *far).run()

    async def listen(port: int) -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", port)

    proxy.listen, proxy.server = listen, await listen(0)
    port = proxy.server.sockets[0].getsockname()[1]
    user = parts.netloc.rpartition("@")[0]
    proxy.dsn = parts._replace(netloc=f"{user}@127.0.0.1:{port}").geturl()
    try:
        yield proxy
    finally:
        proxy.cut()
        running = [task for task in tasks if task is not None and not task.done()]
        if running:
            await asyncio.wait(running)  # each ends with its connection
