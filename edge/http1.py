"""HTTP/1.1 on one connection (RFC 9112): requests come apart, answers go out, in order.

httptools parses. It is strict about most of what smuggles requests (RFC 9112 §6.3): two lengths,
bare line feeds, folded headers, bad chunk sizes. It does not bound the head of a request, chunk
extensions or the time they take; it reports trailers as if they were headers, and it takes
HTTP/0.9 and transfer codings other than "chunked". That is closed here, and whatever is refused
here closes the connection: after a framing error nothing on it can be trusted.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import NoReturn, cast

import httptools
import orjson

from edge.refusals import ClientLeft

HeaderList = list[tuple[bytes, bytes]]

# What nginx takes in one header line; proxies in front refuse longer targets themselves.
TARGET_BYTES_MAX = 8 * 1024
HEAD_BYTES_MAX = 32 * 1024
HEADERS_MAX = 100
# Requests of one connection that may wait for their turn; browsers use none, tools a few.
PIPELINED_MAX = 16
# Chunk sizes, extensions and trailers beside the body. The smallest honest chunk carries
# one byte in six, so overhead may grow with the body, but not without it.
CHUNK_OVERHEAD_BYTES_MAX = 64 * 1024
CHUNK_OVERHEAD_PER_BYTE = 8
# Of a body that the app has not read yet; beyond it the socket is read no further.
BODY_BUFFER_BYTES_MAX = 64 * 1024
# A client that reads nothing for this long has left without saying so.
WRITE_TIMEOUT_S = 30.0

# Two of these and two readers may disagree about whom or how much the request means.
_ONCE_ONLY = (b"host", b"content-length", b"transfer-encoding", b"content-type")
_CODES = {400: "INVALID_ARGUMENT", 408: "DEADLINE_EXCEEDED", 501: "UNIMPLEMENTED"}
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_BODILESS = frozenset({204, 304})


@dataclass
class ConnectionLimits:
    """What connections may take; one object per server, shared by its connections.

    Attributes:
        head_timeout_s: from the first byte of a request to the end of its headers.
        keep_alive_s: how long a connection may be idle between two requests.
        per_address_max: open connections from one address.
        open_by_address: how many there are.
    """

    head_timeout_s: float
    keep_alive_s: float
    per_address_max: int
    open_by_address: Counter[str] = field(default_factory=Counter)


class _Refused(Exception):
    """This request ends its connection, with this status."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Http1Request:
    """One request, and the way to answer it.

    Attributes:
        method: upper case.
        raw_path, query: of the undecoded target; the query without "?".
        headers: names in lower case, in the order of the request.
        address: the peer's.
        body_is_read: nothing of the body is left to come or to be read.
        has_left: the connection is gone.
    """

    __slots__ = (
        "_buffered_bytes",
        "_chunks",
        "_connection",
        "_expects_continue",
        "_is_bodiless",
        "_is_chunked",
        "_is_complete",
        "_waiter",
        "address",
        "has_left",
        "headers",
        "is_answered",
        "keeps_alive",
        "method",
        "on_left",
        "query",
        "raw_path",
        "version",
    )

    def __init__(
        self, connection: "Http1Connection", method: str, target: bytes, headers: HeaderList
    ) -> None:
        self._connection = connection
        self.address = connection.address
        self.method = method
        self.raw_path, _, self.query = target.partition(b"?")
        self.headers = headers
        self.version = "1.1"
        self.keeps_alive = True
        self.has_left = False
        self.is_answered = False
        self.on_left: Callable[[], object] | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._is_complete = False
        self._expects_continue = False
        self._is_chunked = False
        self._is_bodiless = method == "HEAD"
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the whole body has come; it may still be to be read."""
        return self._is_complete

    @property
    def body_is_read(self) -> bool:
        """Whether nothing of the body is left to come or to be read."""
        return self._is_complete and not self._chunks

    # The body
    async def next_chunk(self) -> bytes:
        """The next part of the body as it arrives; b"" after the last.

        Raises:
            ClientLeft: the client closed before the end.
        """
        while not self._chunks:
            if self._is_complete:
                return b""
            if self.has_left:
                raise ClientLeft
            if self._expects_continue:
                self._expects_continue = False
                self._connection.write(_CONTINUE)
            await self._wait()
        chunk = self._chunks.popleft()
        self._buffered_bytes -= len(chunk)
        if self._buffered_bytes <= BODY_BUFFER_BYTES_MAX:
            self._connection.resume_body()
        return chunk

    def take_rest(self) -> bytes:
        """All that is left of a body that has come whole."""
        rest = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered_bytes = 0
        self._connection.resume_body()
        return rest

    async def until_left(self) -> None:
        """Return when the connection is closed."""
        while not self.has_left:
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # The answer
    def begin(self, status: int, headers: HeaderList, constant: bytes) -> bytes:
        """The head of the answer as bytes, to be written with what follows it.

        Args:
            status: of the answer.
            headers: names in lower case; with a content-length, or the body is sent in chunks.
            constant: more headers, encoded.
        """
        self.is_answered = True
        self._expects_continue = False  # no word of waiting may follow the answer
        parts, has_length = [], False
        if status in _BODILESS:
            has_length = self._is_bodiless = True  # whatever a service sends along
        for name, value in headers:
            parts.append(name + b": " + value)
            has_length = has_length or name == b"content-length"
        if not has_length:
            if self.version == "1.1":
                self._is_chunked = True
                parts.append(b"transfer-encoding: chunked")
            else:
                self.keeps_alive = False
        if not self.keeps_alive or self._connection.is_stopping:
            self.keeps_alive = False
            parts.append(b"connection: close")
        elif self.version == "1.0":
            parts.append(b"connection: keep-alive")
        block = b"\r\n".join(parts)
        if block.count(b"\n") != len(parts) - 1 or block.count(b"\r") != len(parts) - 1:
            block = b"\r\n".join([part.translate(None, b"\r\n\0") for part in parts])
        return b"".join((_status_line(status), _date_line(), constant, block, b"\r\n\r\n"))

    def write(self, head: bytes, chunk: bytes, *, is_last: bool) -> None:
        """Send a part of the answer.

        Args:
            head: from `begin`; b"" after the first part.
            chunk: of the body; may be empty.
            is_last: whether the answer is whole with it.
        """
        if self._is_bodiless or not chunk:
            body = b""
        elif self._is_chunked:
            body = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        else:
            body = chunk
        if is_last and self._is_chunked and not self._is_bodiless:
            body += b"0\r\n\r\n"
        if head or body:
            self._connection.write(head + body)
        if is_last:
            self._connection.finish(self)

    def end(self, head: bytes) -> None:
        """Send the end of the answer, and leave what is left of the request to be read.

        `write` with is_last then ends the request itself.
        """
        body = b"0\r\n\r\n" if self._is_chunked and not self._is_bodiless else b""
        self._is_chunked = False
        self._connection.write(head + body)

    async def drained(self) -> None:
        """Wait while the client reads slower than the answer is written.

        Raises:
            ClientLeft: it is gone; who reads nothing for WRITE_TIMEOUT_S is held to be.
        """
        if self.has_left:
            raise ClientLeft
        await self._connection.drained()

    def abort(self) -> None:
        """Break the answer off, so that the client can see that it is not whole."""
        self._connection.abort()

    # What the connection tells
    def feed(self, chunk: bytes) -> bool:
        """Take a part of the body; False if reading should pause."""
        self._chunks.append(chunk)
        self._buffered_bytes += len(chunk)
        self._wake()
        return self._buffered_bytes <= BODY_BUFFER_BYTES_MAX

    def complete(self) -> None:
        """The body is whole."""
        self._is_complete = True
        self._expects_continue = False
        self._wake()

    def leave(self) -> None:
        """The connection is gone."""
        self.has_left = True
        self._wake()
        if self.on_left is not None:
            self.on_left()

    def expect_continue(self) -> None:
        """The client waits for a word before it sends the body."""
        self._expects_continue = True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Server:
    """What the connections of one listening socket share.

    Args:
        serve: starts work on a request.
        limits: what connections may take.
    """

    def __init__(self, serve: Callable[[Http1Request], None], limits: ConnectionLimits) -> None:
        self.serve = serve
        self.limits = limits
        self.connections: set[Http1Connection] = set()
        self.is_stopping = False

    def connection(self) -> "Http1Connection":
        """The protocol of a new connection."""
        return Http1Connection(self)

    def sweep(self) -> None:
        """End connections whose time is up; call it a few times per time limit."""
        now_s = asyncio.get_running_loop().time()
        for connection in tuple(self.connections):
            connection.check_time(now_s)

    def stop(self) -> None:
        """Close idle connections now, and the others after their answer."""
        self.is_stopping = True
        for connection in tuple(self.connections):
            connection.close_if_idle()


class Http1Connection(asyncio.Protocol):
    """One connection: parses, bounds, and lets one request at a time be answered."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self.address = ""
        self._target = b""
        self._headers: HeaderList = []
        self._request: Http1Request | None = None  # whose body arrives
        self._current: Http1Request | None = None  # that is being answered
        self._pipeline: deque[Http1Request] = deque()
        self._is_in_head = True
        self._is_same_head = True  # since the last bytes came
        self._data_bytes = 0  # that came last
        self._head_bytes = 0  # of an unfinished head, as they came from the wire
        self._wire_bytes = 0  # of an unfinished body, as they came from the wire
        self._body_bytes = 0  # of the same body, without its chunk framing
        self._head_since_s = 0.0  # 0 outside a head
        self._idle_since_s = 0.0  # 0 while a request is under way
        self._unread_bytes = 0  # that the client had still to read when last looked at
        self._unread_since_s = 0.0  # when that number was another
        self._refusal: _Refused | None = None
        self._last_word: _Refused | None = None  # to be said when those before are answered
        self._is_read_paused = False
        self._writable: asyncio.Event | None = None  # while the transport is full

    @property
    def is_stopping(self) -> bool:
        """Whether the server takes no more requests."""
        return self._server.is_stopping

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection; the time of its first request's head runs."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._server.connections.add(self)
        counts = self._server.limits.open_by_address
        counts[self.address] += 1
        self._head_since_s = self._loop.time()
        if counts[self.address] > self._server.limits.per_address_max or self.is_stopping:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Uncount it, and tell those who answer."""
        self._server.connections.discard(self)
        counts = self._server.limits.open_by_address
        counts[self.address] -= 1
        if counts[self.address] <= 0:
            del counts[self.address]
        self._transport = None
        for request in (self._current, self._request, *self._pipeline):
            if request is not None:
                request.leave()
        self._pipeline.clear()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse; what cannot be parsed gets one problem document and a closed connection."""
        if self._transport is None or self._transport.is_closing() or self._last_word is not None:
            return
        self._is_same_head = self._is_in_head
        self._data_bytes = len(data)
        try:
            self._parser.feed_data(data)
            self._bound_what_is_unfinished(len(data))
        except httptools.HttpParserUpgrade:
            # The upgrade is declined by answering in HTTP/1.1 (RFC 9110 §7.8); bytes in
            # the other protocol may follow, so this is the connection's last request.
            newest = self._pipeline[-1] if self._pipeline else self._current
            if newest is not None:
                newest.keeps_alive = False
        except httptools.HttpParserInvalidMethodError:
            self._refuse(_Refused(501, "This server does not know the method."))
        except (httptools.HttpParserError, _Refused):
            self._refuse(self._refusal or _Refused(400, "The request is not valid HTTP/1.1."))

    def pause_writing(self) -> None:
        """The client reads slowly."""
        self._writable = self._writable or asyncio.Event()

    def resume_writing(self) -> None:
        """It has caught up, or it is gone."""
        writable, self._writable = self._writable, None
        if writable is not None:
            writable.set()
        if self._current is None and self._transport is not None:
            self._next()

    # httptools' callbacks
    def on_message_begin(self) -> None:
        """A request has begun; the first one's time runs since the connection was made."""
        self._head_since_s = self._head_since_s or self._loop.time()
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        """Bound the target while it arrives."""
        self._target += url
        if len(self._target) > TARGET_BYTES_MAX:
            self._stop(414, f"The target is longer than {TARGET_BYTES_MAX} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bound headers while they arrive; drop trailers, which would look like headers."""
        if not self._is_in_head:
            return
        self._headers.append((name.lower(), value))
        if len(self._headers) > HEADERS_MAX:
            self._stop(431, f"More than {HEADERS_MAX} headers.")

    def on_headers_complete(self) -> None:
        """Check what frames the body, then let the request begin."""
        method = self._parser.get_method().decode("ascii")
        request = Http1Request(self, method, self._target, self._headers)
        self._check_target()
        self._check_framing(request)
        if len(self._pipeline) >= PIPELINED_MAX:
            self._stop(429, f"More than {PIPELINED_MAX} requests wait on this connection.")
        self._is_in_head = self._is_same_head = False
        self._head_bytes = self._wire_bytes = self._body_bytes = 0
        self._head_since_s = 0.0
        request.keeps_alive = self._parser.should_keep_alive()
        self._request = request
        if self._current is None:
            self._begin(request)
        else:
            self._pipeline.append(request)
            self._pause_reading()

    def on_body(self, body: bytes) -> None:
        """A part of the body of the request that arrives."""
        self._body_bytes += len(body)
        request = self._request
        if request is not None and not request.feed(body):
            self._pause_reading()

    def on_message_complete(self) -> None:
        """The next bytes are a new head."""
        self._is_in_head = True
        if self._request is not None:
            self._request.complete()
            self._request = None

    # Checks
    def _check_target(self) -> None:
        if self._target[:1] != b"/":
            self._stop(400, "The target must be a path.")
        if not self._target.isascii():
            self._stop(400, "The target holds bytes that must be percent-encoded.")

    def _check_framing(self, request: Http1Request) -> None:
        request.version = version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._stop(505, "This server speaks HTTP/1.1.")
        may_be_long = self._head_bytes + self._data_bytes > HEAD_BYTES_MAX
        if may_be_long and _size(self._headers) > HEAD_BYTES_MAX:
            self._stop(431, f"The headers are longer than {HEAD_BYTES_MAX} bytes.")
        named = dict(self._headers)
        if len(named) < len(self._headers):
            names = [name for name, _ in self._headers]
            for name in _ONCE_ONLY:
                if names.count(name) > 1:
                    self._stop(400, f"{name.decode()} came twice.")
        if version == "1.1" and b"host" not in named:
            self._stop(400, "An HTTP/1.1 request names its host.")
        coding = named.get(b"transfer-encoding")
        # Exactly this spelling: proxies differ over the others, httptools takes several.
        if coding is not None and (coding != b"chunked" or version == "1.0"):
            self._stop(400, 'The only transfer coding taken is "chunked".')
        if named.get(b"expect", b"").lower() == b"100-continue" and version == "1.1":
            request.expect_continue()

    def _bound_what_is_unfinished(self, data_bytes: int) -> None:
        """Bound what httptools keeps to itself: half a header, a chunk's extension."""
        if self._is_in_head:
            # Bytes that also held the end of a head, and perhaps a body, are not counted.
            self._head_bytes = self._head_bytes + data_bytes if self._is_same_head else 0
            if self._head_bytes > HEAD_BYTES_MAX + TARGET_BYTES_MAX:
                self._stop(431, f"The headers are longer than {HEAD_BYTES_MAX} bytes.")
            return
        self._wire_bytes += data_bytes
        overhead_max = CHUNK_OVERHEAD_BYTES_MAX + CHUNK_OVERHEAD_PER_BYTE * self._body_bytes
        if self._wire_bytes - self._body_bytes > overhead_max:
            self._stop(400, "The chunks carry more framing than body.")

    def _stop(self, status: int, detail: str) -> NoReturn:
        self._refusal = _Refused(status, detail)
        raise self._refusal

    def _refuse(self, refusal: _Refused) -> None:
        """Answer the request at fault, in its turn, and close: those before it are innocent."""
        faulty, current = self._request, self._current
        if faulty is not None and faulty is current:
            faulty.leave()
            self._close_with(None if faulty.is_answered else refusal)
            return
        if faulty is not None:
            self._pipeline.pop()  # its body was arriving, so it is the newest
        self._last_word = refusal
        self._pause_reading()
        if current is None:
            self._next()

    def _close_with(self, refusal: _Refused | None) -> None:
        if refusal is not None:
            self.write(_problem(refusal))
        self.close()

    # Turns
    def _begin(self, request: Http1Request) -> None:
        self._current = request
        self._idle_since_s = 0.0
        self._server.serve(request)

    def finish(self, request: Http1Request) -> None:
        """The answer to the current request is whole: the next one's turn, or the end."""
        if request is not self._current:
            return
        self._current = None
        if not request.keeps_alive or not request.body_is_read:
            self.close()
        else:
            self._next()

    def _next(self) -> None:
        """The next request's turn; not before the client has read most of the last answer."""
        if self._writable is not None and not self.is_stopping:
            self._pause_reading()
        elif self._pipeline:
            self._begin(self._pipeline.popleft())
            self.resume_body()
        elif self._last_word is not None or self.is_stopping:
            self._close_with(self._last_word)
        else:
            self._idle_since_s = self._loop.time()
            self.resume_body()

    def close(self) -> None:
        """Close when everything is written."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once; what is not written yet is lost."""
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        """Close unless a request is under way."""
        if self._current is None:
            self.close()

    def check_time(self, now_s: float) -> None:
        """End a head that takes too long, a connection that is idle, a client that never reads."""
        if self._has_stalled(now_s):
            self.abort()
        if self._transport is None or self._transport.is_closing() or self._is_read_paused:
            return
        limits = self._server.limits
        is_idle = self._idle_since_s and now_s - self._idle_since_s > limits.keep_alive_s
        if self._head_since_s and now_s - self._head_since_s > limits.head_timeout_s:
            self._refuse(_Refused(408, "The headers took too long."))
        elif is_idle and not self._head_since_s:
            self.close()

    def _has_stalled(self, now_s: float) -> bool:
        """Whether the client has long read nothing of what waits for it."""
        unread_bytes = 0 if self._transport is None else self._transport.get_write_buffer_size()
        if unread_bytes != self._unread_bytes:
            self._unread_bytes, self._unread_since_s = unread_bytes, now_s
        return unread_bytes > 0 and now_s - self._unread_since_s > WRITE_TIMEOUT_S

    # Flow
    def write(self, data: bytes) -> None:
        """Send bytes; after the connection is gone they are dropped."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drained(self) -> None:
        """See Http1Request.drained."""
        if self._writable is not None:
            await self._writable.wait()  # `check_time` ends it
        if self._transport is None:
            raise ClientLeft

    def resume_body(self) -> None:
        """Read on, once there is room for more of a body and no request waits."""
        must_wait = self._pipeline or self._last_word is not None
        if self._is_read_paused and not must_wait and self._transport is not None:
            self._is_read_paused = False
            if self._head_since_s:
                self._head_since_s = self._loop.time()
            self._transport.resume_reading()

    def _pause_reading(self) -> None:
        if not self._is_read_paused and self._transport is not None:
            self._is_read_paused = True
            self._transport.pause_reading()


def _status_line(status: int) -> bytes:
    """Any status has one; those of other protocols, such as 460 of tus, have no phrase."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def _size(headers: HeaderList) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)


_date = (0, b"")


def _date_line() -> bytes:
    """The Date header (RFC 9110 §6.6.1), made once a second."""
    global _date  # noqa: PLW0603 - one clock per process
    now_s = int(time.time())
    if _date[0] != now_s:
        _date = now_s, f"date: {formatdate(now_s, usegmt=True)}\r\n".encode()
    return _date[1]


def _problem(refusal: _Refused) -> bytes:
    document = {
        "type": "about:blank",
        "title": HTTPStatus(refusal.status).phrase,
        "status": refusal.status,
        "detail": refusal.detail,
        "code": _CODES.get(refusal.status, "INVALID_ARGUMENT"),
        "reason": "BAD_HTTP",
    }
    body = orjson.dumps(document)
    head = (
        "content-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\n"
        "x-content-type-options: nosniff\r\n"
        "connection: close\r\n\r\n"
    )
    return _status_line(refusal.status) + _date_line() + head.encode("ascii") + body
