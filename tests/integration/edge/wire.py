"""A plain HTTP/1.1 client on one kept-alive socket: what it sends is what was written."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Answer:
    """A whole answer; a name that came twice has its values joined by ", "."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Connection:
    """Connects when it has to; one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, target: str, headers: Iterable[str], body: bytes) -> Answer:
        """Send a request line and headers byte for byte; wait for the whole answer."""
        lines = [f"{method} {target} HTTP/1.1", "Host: edge.test", *headers]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        head = "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(head + body)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answer = await _read_answer(reader, has_body=method != "HEAD")
        if answer.headers.get("connection") == "close":
            self.close()
        return answer

    def close(self) -> None:
        """Forget the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read_answer(reader: asyncio.StreamReader, *, has_body: bool) -> Answer:
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    status, headers = int(status_line.split(" ")[1]), {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if not has_body or status in {204, 304}:
        return Answer(status, headers)
    return Answer(status, headers, await _read_body(reader, headers))


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return body
