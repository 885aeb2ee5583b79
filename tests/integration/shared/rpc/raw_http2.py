"""HTTP/2 written by hand, frame by frame: it can say what no honest client would.

Only what gRPC needs, and nothing is checked on the way out (RFC 9113, RFC 7541).
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hpack import Decoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0, 1, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
END_STREAM, ACK, END_HEADERS = 1, 1, 4
NO_ERROR, CANCEL = 0, 8
FRAME_BYTES = 16_384
INITIAL_WINDOW_SIZE = 4

Headers = Sequence[tuple[str, str]]


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(headers: Iterable[tuple[str, str]]) -> bytes:
    """The headers as literals that enter no table."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)


def _text(text: str) -> bytes:
    data = text.encode("latin-1")
    return _length(len(data)) + data


def _length(value: int) -> bytes:
    if value < 0x7F:
        return bytes([value])
    value, out = value - 0x7F, b"\x7f"
    while value >= 0x80:
        value, out = value >> 7, out + bytes([value & 0x7F | 0x80])
    return out + bytes([value])


def message(data: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """One gRPC message, whose prefix may lie."""
    return struct.pack(">BI", compressed, len(data) if length is None else length) + data


@dataclass
class Answer:
    """What came on one stream.

    Attributes:
        headers: of all blocks, the trailers included.
        reset: the code of RST_STREAM, if it came.
        has_ended: nothing more comes.
    """

    headers: dict[str, str] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    reset: int | None = None
    has_ended: bool = False

    @property
    def status(self) -> int | None:
        """grpc-status, if it came."""
        text = self.headers.get("grpc-status")
        return None if text is None else int(text)


class Peer:
    """One connection; `run` must be read all the time, as `connected` does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = Decoder()
        self._changed = asyncio.Event()
        self._next_stream = 1
        self._window_at_first = 65_535
        self._windows = {0: 65_535}
        self.answers: dict[int, Answer] = {}
        self.goaway: int | None = None
        self.is_closed = False
        self.frames_seen: dict[int, int] = {}

    async def send(self, *frames: bytes) -> None:
        """Write frames; a connection that has been closed meanwhile is no error."""
        try:
            self._writer.write(b"".join(frames))
            await self._writer.drain()
        except ConnectionError:
            self._close()

    def stream(self) -> int:
        """A new stream's number."""
        number, self._next_stream = self._next_stream, self._next_stream + 2
        self.answers[number] = Answer()
        self._windows[number] = self._window_at_first
        return number

    def request(self, path: str, headers: Headers = ()) -> bytes:
        """The HEADERS of a new call, and CONTINUATIONs as needed; its stream is `last`."""
        block = header_block(call_headers(path, headers))
        parts = [block[at : at + FRAME_BYTES] for at in range(0, len(block), FRAME_BYTES)]
        kinds = [HEADERS, *(len(parts) - 1) * [CONTINUATION]]
        flags = [*(len(parts) - 1) * [0], END_HEADERS]
        number = self.stream()
        return b"".join(frame(k, f, number, p) for k, f, p in zip(kinds, flags, parts, strict=True))

    @property
    def last(self) -> int:
        """The number of the newest stream."""
        return self._next_stream - 2

    async def call(self, path: str, body: bytes, headers: Headers = ()) -> Answer:
        """One whole call."""
        await self.send(self.request(path, headers))
        await self.send_body(body)
        return await self.ended(self.last)

    async def send_body(self, body: bytes) -> None:
        """Send DATA frames, as far as the windows allow; the last ends the newest stream.

        It stops when the server has answered.
        """
        stream, answer = self.last, self.answers[self.last]
        for at in range(0, max(len(body), 1), FRAME_BYTES):
            piece = body[at : at + FRAME_BYTES]
            while min(self._windows[0], self._windows[stream]) < len(piece):
                self._changed.clear()
                await self._changed.wait()
                if answer.has_ended or self.is_closed:
                    return
            for window in (0, stream):
                self._windows[window] -= len(piece)
            is_last = at + FRAME_BYTES >= len(body)
            await self.send(frame(DATA, END_STREAM * is_last, stream, piece))

    async def ended(self, stream: int, timeout_s: float = 10) -> Answer:
        """What came, once the stream or the connection has ended.

        Raises:
            TimeoutError: it goes on.
        """
        answer = self.answers[stream]
        async with asyncio.timeout(timeout_s):
            while not (answer.has_ended or self.is_closed):
                self._changed.clear()
                await self._changed.wait()
        return answer

    async def closed(self, timeout_s: float = 10) -> None:
        """Wait until the server has closed the connection.

        Raises:
            TimeoutError: it stays open.
        """
        async with asyncio.timeout(timeout_s):
            while not self.is_closed:
                self._changed.clear()
                await self._changed.wait()

    async def run(self) -> None:
        """Read until the connection ends."""
        try:
            while True:
                head = await self._reader.readexactly(9)
                length, kind, flags, stream = (
                    int.from_bytes(head[:3], "big"), head[3], head[4],
                    int.from_bytes(head[5:], "big"),
                )  # fmt: skip
                await self._take(kind, flags, stream, await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._close()

    async def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.frames_seen[kind] = self.frames_seen.get(kind, 0) + 1
        answer = self.answers.get(stream, Answer())
        if kind in {HEADERS, CONTINUATION}:
            answer.headers |= {str(k): str(v) for k, v in self._decoder.decode(payload)}
        elif kind == DATA:
            answer.data += payload
            if payload:
                grown = struct.pack(">I", len(payload))
                await self.send(frame(WINDOW_UPDATE, 0, 0, grown))
        elif kind == RST_STREAM:
            answer.reset, answer.has_ended = int.from_bytes(payload, "big"), True
        elif kind == GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == PING and not flags & ACK:
            await self.send(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            self._windows[stream] = self._windows.get(stream, 0) + int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
            await self.send(frame(SETTINGS, ACK))
        if kind in {DATA, HEADERS} and flags & END_STREAM:
            answer.has_ended = True
        self._changed.set()

    def _take_settings(self, payload: bytes) -> None:
        for number, value in struct.iter_unpack(">HI", payload):
            if number == INITIAL_WINDOW_SIZE:
                for stream in self.answers:
                    self._windows[stream] += value - self._window_at_first
                self._window_at_first = value

    def _close(self) -> None:
        self.is_closed = True
        self._changed.set()


def call_headers(path: str, headers: Headers = ()) -> Headers:
    """What begins a gRPC call."""
    return [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"),
        ("te", "trailers"), ("content-type", "application/grpc"), *headers,
    ]  # fmt: skip


@asynccontextmanager
async def connected(port: int, settings: dict[int, int] | None = None) -> AsyncIterator[Peer]:
    """A connection on which the preface has been sent and answers are read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    peer = Peer(reader, writer)
    pairs = b"".join(struct.pack(">HI", *pair) for pair in (settings or {}).items())
    await peer.send(PREFACE, frame(SETTINGS, payload=pairs))
    reading = asyncio.create_task(peer.run())
    try:
        yield peer
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.close()
