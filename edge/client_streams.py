"""Client streams: the body of a request becomes messages, no faster than the service takes them.

What the body is, the http rule says. Where it fills a google.api.HttpBody, it is any bytes,
in frames as they arrive, the content type with the first; an empty one is one message without
data, so that path and type arrive. Where it fills anything else it is NDJSON: each line is a
message, read like the body of a unary call; blank lines are the client's heartbeats and say
nothing. A rule without a body makes a stream of one message.

http.proto maps "a part of the request message" to the path and the query, and says nothing of
streams. Here they fill every message of the stream: the URL names what all of them are about,
and a service that validates each message finds it in each; Envoy fills the first alone,
grpc-gateway none. Only a path variable inside a oneof fills just the first message, for that
is how contracts tell the first message of a stream from the others.

A line that does not fit ends the call with a 400 that names it; what the service had made
durable by then is its own to keep. A client that leaves cancels the call: half-closing
instead would look like the end of a shorter stream. An answer or a refusal of the service
ends the reading.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from google.protobuf.message import Message

from edge.compression import require_identity
from edge.exchange import BodyChunks, Exchange
from edge.forwarding import in_bytes
from edge.negotiation import require_media_type
from edge.raw import RETRY_AFTER_S, RawCall, frames_of
from edge.refusals import BodyTooLarge
from edge.shapes import BodyKind, shape_of
from edge.streams import client_side, until
from edge.transcode import request_message
from edge.upstream import Reply
from shared.errors import Internal, InvalidRequest, TenfoldError, Unavailable

LINE_TYPES = ("application/x-ndjson", "application/json")

_BLANK = re.compile(rb"[ \t\r\n]*")


@dataclass(frozen=True)
class StreamLimits:
    """What the body of a client stream may take.

    Attributes:
        line_bytes_max: one line.
        bytes_max: all of it.
        idle_s: how long the client may send nothing; a blank line is something.
    """

    line_bytes_max: int
    bytes_max: int
    idle_s: float


class Requests:
    """The messages of a client stream.

    Args:
        exchange: its body is not read yet.
        limits: what the body may take.

    Raises:
        TenfoldError: what can be known before the first byte: path, query, type, length.
    """

    def __init__(self, exchange: Exchange, limits: StreamLimits) -> None:
        self._exchange, self._route = exchange, exchange.call
        self._shape = shape_of(self._route)
        self._limits = limits
        self._captures = exchange.captures
        _check_headers(exchange, self._shape.body_kind)
        self._message(b"")  # so that a fault of the URL is not told as one of the first line
        self._chunks = BodyChunks(exchange, bytes_max=limits.bytes_max, idle_s=limits.idle_s)

    async def send(self, call: RawCall) -> bool:
        """Send all of them.

        Returns:
            Whether the service took them all; if not, the call is over.

        Raises:
            TenfoldError: a line is broken, the body is too long or too slow.
            ClientLeft: the client closed before the end.
        """
        async for message in self._messages():
            if not await call.write(message):
                return False
            self._captures = self._shape.later_captures(self._captures)
        await call.done_writing()
        return True

    def _messages(self) -> AsyncIterator[Message]:
        kinds = {
            BodyKind.NONE: self._single,
            BodyKind.BYTES: self._frames,
            BodyKind.JSON: self._lines,
        }
        return kinds[self._shape.body_kind]()

    async def _single(self) -> AsyncIterator[Message]:
        if await self._chunks.next():
            raise InvalidRequest("The request must have no body")
        yield self._message(b"")

    async def _frames(self) -> AsyncIterator[Message]:
        content_type = self._exchange.header("content-type")
        chunk = await self._chunks.next()
        if not chunk:
            yield self._message(b"", content_type)
        while chunk:
            for part in frames_of(chunk):
                yield self._message(part, content_type)
                content_type = ""  # said once
            chunk = await self._chunks.next()

    async def _lines(self) -> AsyncIterator[Message]:
        lines = Lines(self._chunks, bytes_max=self._limits.line_bytes_max)
        while line := await lines.next():
            try:
                yield self._message(line)
            except InvalidRequest as error:
                raise _of_line(lines.number, error) from error

    def _message(self, body: bytes, content_type: str = "") -> Message:
        return request_message(
            self._route, self._captures, self._exchange.query, body, content_type=content_type
        )


class Lines:
    """The lines of a body that are not blank.

    Args:
        chunks: the body.
        bytes_max: what a line may hold.

    Attributes:
        number: of the line last returned; the first is 1, and blank ones count.
    """

    def __init__(self, chunks: BodyChunks, *, bytes_max: int) -> None:
        self._chunks = chunks
        self._bytes_max = bytes_max
        self._buffer = bytearray()
        self._at = 0  # where the next line begins
        self._searched = 0  # up to here there is no line end
        self._passed = 0  # line ends before it
        self._is_last = False
        self.number = 0

    async def next(self) -> bytes:
        """The next line without its end; b"" after the last. The last needs no end.

        Raises:
            BodyTooLarge: it is longer than bytes_max.
        """
        while True:
            self._skip_blank()
            end = self._buffer.find(b"\n", max(self._at, self._searched))
            self._searched = len(self._buffer)
            self._bound((end if end >= 0 else len(self._buffer)) - self._at)
            if end >= 0 or self._is_last:
                return self._take(end if end >= 0 else len(self._buffer))
            await self._read()

    def _skip_blank(self) -> None:
        blank = _BLANK.match(self._buffer, self._at)
        assert blank is not None
        self._passed += self._buffer.count(b"\n", self._at, blank.end())
        self._at = blank.end()

    def _bound(self, line_bytes: int) -> None:
        if line_bytes > self._bytes_max:
            number = self._passed + 1
            refusal = BodyTooLarge(f"Line {number} is longer than {self._bytes_max} bytes.")
            refusal.metadata["line"] = str(number)
            raise refusal

    def _take(self, end: int) -> bytes:
        line = bytes(self._buffer[self._at : end])
        self._at, self.number, self._searched = end, self._passed + 1, end
        return line

    async def _read(self) -> None:
        chunk = await self._chunks.next()
        del self._buffer[: self._at]
        self._at, self._searched = 0, len(self._buffer)
        self._buffer += chunk
        self._is_last = not chunk


class SingleAnswerCall(RawCall, Protocol):
    """A running call with a client stream and one answer."""

    async def trailing_metadata(self) -> Mapping[str, str]:
        """What the service sent after its answer; waits for it."""
        ...


async def collect(
    exchange: Exchange,
    requests: Requests,
    call: SingleAnswerCall,
    *,
    ended: Awaitable[TenfoldError],
) -> Reply:
    """Send a client stream up, and wait for its one answer.

    Args:
        exchange: whose request it is.
        requests: its messages.
        call: the running call; cancelled before this returns, however it returns.
        ended: completes with the reason when the edge ends the call.

    Raises:
        TenfoldError: the service refused, the edge ended it, or the request is broken.
        ClientLeft: the client closed the connection.
    """
    try:
        sending = client_side(exchange, partial(requests.send, call))
        return await until(_only_answer(call), sending, ended)
    finally:
        call.cancel()


def _check_headers(exchange: Exchange, body_kind: BodyKind) -> None:
    require_identity(exchange.header("content-encoding"))
    if body_kind is BodyKind.JSON and exchange.has_body:
        require_media_type(exchange.header("content-type"), LINE_TYPES)


def _of_line(number: int, error: InvalidRequest) -> InvalidRequest:
    told = InvalidRequest(f"line {number}: {error.message}", violations=error.violations)
    told.metadata["line"] = str(number)
    return told


async def _only_answer(call: SingleAnswerCall) -> Reply:
    message = await call.read()
    if message is None:
        raise Unavailable("the service's answer did not arrive", retry_after_s=RETRY_AFTER_S)
    if await call.read() is not None:
        raise Internal("a method with one answer gave two")
    initial = in_bytes(await call.initial_metadata())
    return Reply.of(message, initial, in_bytes(await call.trailing_metadata()))
