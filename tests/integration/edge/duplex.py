"""An HTTP/1.1 client that reads an answer while it still sends its request, byte for byte."""

import asyncio
import contextlib
import json
from typing import Any

READ_TIMEOUT_S = 10.0


class Duplex:
    """One request on a connection of its own, its body in chunks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def post(cls, port: int, target: str, *headers: str) -> "Duplex":
        """Connect, and send a head; without headers the body will be NDJSON."""
        duplex = cls(*await asyncio.open_connection("127.0.0.1", port))
        lines = [f"POST {target} HTTP/1.1", "Host: edge.test", "Transfer-Encoding: chunked"]
        lines += headers or ["Content-Type: application/x-ndjson"]
        duplex._writer.write("".join(f"{line}\r\n" for line in lines).encode() + b"\r\n")
        return duplex

    async def send(self, data: bytes) -> None:
        """Send one chunk of the body; waits while the edge does not read."""
        self._writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self._writer.drain()

    async def send_json(self, *values: Any) -> None:
        """Send values, one a line."""
        await self.send(b"".join(json.dumps(value).encode() + b"\n" for value in values))

    async def end(self) -> None:
        """The body is whole."""
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def read_head(self) -> int:
        """The status; the headers are kept."""
        async with asyncio.timeout(READ_TIMEOUT_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        status_line, *lines = head.split("\r\n")[:-2]
        pairs = (line.split(": ", 1) for line in lines)
        self.headers = {name.lower(): value for name, value in pairs}
        self.status = int(status_line.split(" ")[1])
        return self.status

    async def read_chunk(self) -> bytes:
        """One chunk of the answer; b"" at its end.

        Raises:
            asyncio.IncompleteReadError, ConnectionError: the answer broke off before its end.
        """
        async with asyncio.timeout(READ_TIMEOUT_S):
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            return (await self._reader.readexactly(size + 2))[:-2]

    async def read_body(self) -> bytes:
        """All that is left of an answer."""
        async with asyncio.timeout(READ_TIMEOUT_S):
            if "content-length" in self.headers:
                return await self._reader.readexactly(int(self.headers["content-length"]))
        body = b""
        while chunk := await self.read_chunk():
            body += chunk
        return body

    async def read_json(self) -> Any:
        """One line of the answer."""
        return json.loads(await self.read_chunk())

    async def leave(self) -> None:
        """Close the connection."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
