"""The other end of an Http2Connection, without a socket: what it sends is read and answered."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import hpack

from shared.rpc import frames
from shared.rpc.call import MESSAGE_HEAD, Call
from shared.rpc.header_block import Headers, call_block, field
from shared.rpc.http2 import Http2Connection

PATH = "/a.B/C"
BLOCK = call_block(PATH, "host:1", "test/1")
INITIAL = b"\x88" + field(b"content-type", b"application/grpc")
OK = field(b"grpc-status", b"0")
END = frames.END_HEADERS | frames.END_STREAM
SETTINGS = frames.settings()


class Frame(NamedTuple):
    """One frame, its payload not yet understood."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def split(data: bytes) -> Iterator[Frame]:
    """The frames of some bytes, which end with the last of them."""
    while data:
        high, low, kind, flags, stream_id = frames.HEAD.unpack_from(data)
        end = 9 + (high << 8 | low)
        assert len(data) >= end, "half a frame"
        yield Frame(kind, flags, stream_id, data[9:end])
        data = data[end:]


def message(body: bytes) -> bytes:
    """A message as gRPC puts it into DATA."""
    return MESSAGE_HEAD.pack(0, len(body)) + body


def headers(stream_id: int, block: bytes = INITIAL, flags: int = frames.END_HEADERS) -> bytes:
    return frames.frame(frames.HEADERS, flags, stream_id, block)


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    parts = [payload[at : at + 16_384] for at in range(0, len(payload), 16_384)] or [b""]
    sent = [frames.frame(frames.DATA, 0, stream_id, part) for part in parts[:-1]]
    return b"".join([*sent, frames.frame(frames.DATA, flags, stream_id, parts[-1])])


def trailers(stream_id: int, block: bytes = OK) -> bytes:
    return headers(stream_id, block, END)


def answer(stream_id: int, body: bytes = b"answer") -> bytes:
    """A whole unary answer."""
    return headers(stream_id) + data(stream_id, message(body)) + trailers(stream_id)


class Recorded(Call):
    """A call that remembers what it heard."""

    __slots__ = ("endings", "heard", "messages_max")

    def __init__(self, deadline_s: float = math.inf, messages_max: int = 1) -> None:
        super().__init__(deadline_s)
        self.messages_max = messages_max
        self.heard: list[bytes] = []
        self.endings: list[Exception | tuple[Headers, Headers]] = []

    def on_message(self, message: bytes) -> bool:
        self.heard.append(message)
        return len(self.heard) <= self.messages_max

    def on_end(self, initial: Headers, trailing: Headers) -> None:
        self.endings.append((initial, trailing))

    def on_failure(self, error: Exception) -> None:
        self.endings.append(error)

    @property
    def ending(self) -> Exception | tuple[Headers, Headers]:
        """The only one."""
        [ending] = self.endings
        return ending

    @property
    def failure(self) -> Exception:
        assert isinstance(self.ending, Exception), self.ending
        return self.ending


class Wire(asyncio.Transport):
    """A transport that keeps what is written, and can be full."""

    def __init__(self, connection: Http2Connection) -> None:
        super().__init__()
        self.connection = connection
        self.written = bytearray()
        self.writes = 0
        self.unread_bytes = 0  # in a transport that is full
        self.fate = "open"

    def write(self, data: Any) -> None:
        assert not self.is_closing()
        self.writes += 1
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def is_closing(self) -> bool:
        return self.fate != "open"

    def close(self) -> None:
        if self.fate == "open":
            self.fate = "closed"

    def abort(self) -> None:
        self.fate = "aborted"


class Peer:
    """A server, as far as one connection is concerned."""

    def __init__(self, *, keepalive_s: float = 1000, ping_timeout_s: float = 1000) -> None:
        self.changes = 0
        self.connection = Http2Connection(
            self._changed,
            is_pinged_when_idle=True,
            keepalive_s=keepalive_s,
            ping_timeout_s=ping_timeout_s,
        )
        self.wire = Wire(self.connection)
        self.connection.connection_made(self.wire)
        self._requests = hpack.Decoder()

    def _changed(self) -> None:
        self.changes += 1

    def send(self, *parts: bytes) -> None:
        self.connection.data_received(b"".join(parts))

    def start(self, body: bytes = b"request", block: bytes = BLOCK, **options: Any) -> Recorded:
        assert self.connection.has_capacity
        call = Recorded(**options)
        self.connection.start(call, block, body)
        return call

    async def sent(self) -> list[Frame]:
        """What has come since the last time; the preface is left out."""
        await asyncio.sleep(0)
        taken = bytes(self.wire.written).removeprefix(frames.PREFACE)
        self.wire.written.clear()
        return list(split(taken))

    async def codes(self) -> list[tuple[int, int]]:
        """Kind and error code of the frames that end something."""
        return [
            (frame.kind, int.from_bytes(frame.payload[-4:], "big"))
            for frame in await self.sent()
            if frame.kind in {frames.RST_STREAM, frames.GOAWAY}
        ]

    def read_headers(self, block: bytes) -> dict[str, str]:
        return {str(name): str(value) for name, value in self._requests.decode(block)}


async def connected(settings: bytes = SETTINGS, **options: float) -> Peer:
    """A server that has read our greeting and said its own."""
    peer = Peer(**options)
    peer.send(settings)
    await peer.sent()
    return peer
