"""HTTP/1.1 connections: requests take turns, answers go out in order, nothing waits for ever.

`http1_parser` takes requests apart, `http1_request` is one of them and its answer. Here is what a
connection decides: whose turn it is, when to read no further, and how it ends so that the last
answer arrives.
"""

import asyncio
import contextlib
import socket
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from edge.http1_parser import RequestParser
from edge.http1_request import Http1Request
from edge.http1_text import Refusal, answer_of
from edge.refusals import ClientLeft
from edge.request_ids import request_id_of

# Requests of one connection that may wait for their turn; browsers use none, tools a few.
PIPELINED_MAX = 16
# A client that reads nothing for this long has left without saying so.
WRITE_TIMEOUT_S = 30.0
# To close while the client still sends resets the connection, and can take the last answer with
# it (RFC 9112 §9.6): what comes after it is read and dropped for a while.
LINGER_BYTES_MAX = 16 * 1024 * 1024
LINGER_S = 2.0
# A client that sends no more may wait for its answer, or may have left: both look the same. Who
# keeps the connection alive is held to have left after this long, if that ends something.
HALF_CLOSED_S = 0.5

# Linux, include/net/tcp_states.h: the client has reset the connection, or sends no more.
_TCP_CLOSE, _TCP_CLOSE_WAIT = 7, 8
_TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)


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


def _ignore(_refusal: Refusal) -> None:
    """Nobody counts refusals."""


def _no_count(_count: int) -> None:
    """Nobody asks how many connections there are."""


class Server:
    """What the connections of one listening socket share.

    Args:
        serve: starts work on a request.
        limits: what connections may take.
        note_refusal: is told what was refused before it was a request.

    Attributes:
        connections: that are open.
        note_count: is told how many there are when one begins or ends.
        is_stopping: whether no more requests are taken.
    """

    def __init__(
        self,
        serve: Callable[[Http1Request], None],
        limits: ConnectionLimits,
        note_refusal: Callable[[Refusal], None] = _ignore,
    ) -> None:
        self.serve = serve
        self.limits = limits
        self.note_refusal = note_refusal
        self.connections: set[Http1Connection] = set()
        self.is_stopping = False
        self.note_count: Callable[[int], None] = _no_count
        self._all_ended: asyncio.Event | None = None

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

    async def ended(self, timeout_s: float) -> None:
        """Wait until every connection has ended, but no longer than this."""
        self._all_ended = asyncio.Event()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._all_ended.wait()

    def add(self, connection: "Http1Connection") -> None:
        """A connection has begun."""
        self.connections.add(connection)
        self.note_count(len(self.connections))

    def forget(self, connection: "Http1Connection") -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        self.note_count(len(self.connections))
        if not self.connections and self._all_ended is not None:
            self._all_ended.set()


class Http1Connection(asyncio.Protocol):
    """One connection, whose requests are answered one at a time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._parser = RequestParser(self)
        self._transport: asyncio.Transport | None = None
        self.address = ""
        self._current: Http1Request | None = None  # that is being answered
        self._pipeline: deque[Http1Request] = deque()
        self._idle_since_s = 0.0  # 0 while a request is under way
        self._unread_bytes = 0  # that the client had still to read when last looked at
        self._unread_since_s = 0.0  # when that number was another
        self._half_closed_since_s = 0.0  # 0 while the client may send more
        self._has_read_end = False  # of what the client sent
        self._last_word: Refusal | None = None  # to be said when those before are answered
        self._lingers_since_s = 0.0  # 0 until everything is said
        self._lingered_bytes = 0
        self._is_read_paused = False
        self._writable: asyncio.Event | None = None  # while the transport is full

    @property
    def is_stopping(self) -> bool:
        """Whether the server takes no more requests."""
        return self._server.is_stopping

    def now_s(self) -> float:
        """See http1_parser.Sink."""
        return self._loop.time()

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection; the time of its first request's head runs."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._server.add(self)
        counts = self._server.limits.open_by_address
        counts[self.address] += 1
        self._parser.head_since_s = self._loop.time()
        if counts[self.address] > self._server.limits.per_address_max or self.is_stopping:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Uncount it, and tell those who answer."""
        self._server.forget(self)
        counts = self._server.limits.open_by_address
        counts[self.address] -= 1
        if counts[self.address] <= 0:
            del counts[self.address]
        self._transport = None
        for request in (self._current, self._parser.arriving, *self._pipeline):
            if request is not None:
                request.leave()
        self._pipeline.clear()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse; what cannot be parsed gets one problem document and a closed connection."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._lingers_since_s:
            self._drop(len(data))
        elif self._last_word is None:
            try:
                self._parser.feed(data)
            except Refusal as refusal:
                self._refuse(refusal)

    def eof_received(self) -> bool:
        """The client sends no more; whoever asked before may still wait for an answer."""
        self._has_read_end = True
        arriving, current = self._parser.arriving, self._current
        nobody_waits = (current is None or current is arriving) and not self._pipeline
        if self._lingers_since_s or nobody_waits:
            return False  # closes it
        if arriving is not None and self._last_word is None and self._pipeline:
            self._pipeline.pop()  # it will never be whole; it is the newest
        self._note_half_close(self._loop.time())
        return True

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

    # http1_parser.Sink
    def take(self, request: Http1Request) -> None:
        """See Sink: let it begin, or wait for its turn."""
        if len(self._pipeline) >= PIPELINED_MAX:
            raise Refusal(429, f"More than {PIPELINED_MAX} requests wait on this connection.")
        if self._current is None:
            self._begin(request)
        else:
            self._pipeline.append(request)
            self.pause_reading()

    def take_upgrade(self) -> None:
        """See Sink: the newest request is the connection's last."""
        newest = self._pipeline[-1] if self._pipeline else self._current
        if newest is not None:
            newest.keeps_alive = False

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
            self._linger()
        else:
            self._next()

    def _next(self) -> None:
        """The next request's turn; not before the client has read most of the last answer."""
        if self._lingers_since_s:
            return
        if self._writable is not None and not self.is_stopping:
            self.pause_reading()
        elif self._pipeline:
            self._begin(self._pipeline.popleft())
            self.resume_body()
        elif self._last_word is not None or self.is_stopping or self._has_read_end:
            self._end_with(self._last_word)
        else:
            self._idle_since_s = self._loop.time()
            self.resume_body()

    # Ends
    def _refuse(self, refusal: Refusal) -> None:
        """Answer the request at fault, in its turn, and close: those before it are innocent."""
        if self._lingers_since_s:  # it was answered before its body came
            return
        faulty, current = self._parser.arriving, self._current
        headers = self._parser.headers if faulty is None else faulty.headers
        refusal.request_id = request_id_of(dict(headers))
        if faulty is not None and faulty is current:
            faulty.leave()
            self._end_with(None if faulty.is_answered else refusal)
            return
        if faulty is not None:
            self._pipeline.pop()  # its body was arriving, so it is the newest
        self._last_word = refusal
        self.pause_reading()
        if current is None:
            self._next()

    def _end_with(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            self._server.note_refusal(refusal)
            self.write(answer_of(refusal))
        self._linger()

    def _linger(self) -> None:
        """Say that nothing more is said, and close when the client has closed."""
        if self._transport is None or self._transport.is_closing() or self._lingers_since_s:
            return
        if self._has_read_end:
            self._transport.close()
            return
        self._lingers_since_s = self._loop.time()
        self._transport.write_eof()
        if self._is_read_paused:
            self._is_read_paused = False
            self._transport.resume_reading()

    def _drop(self, data_bytes: int) -> None:
        self._lingered_bytes += data_bytes
        if self._lingered_bytes > LINGER_BYTES_MAX:
            self.close()

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
        if self._current is None and not self._lingers_since_s:
            self.close()

    # Time
    def check_time(self, now_s: float) -> None:
        """End a head that takes too long, a connection that is idle, a client that has left."""
        if self._has_left(now_s):
            self.abort()
        elif self._lingers_since_s:
            # Not while the answer is still being read: closed now, its end could be lost.
            if now_s - max(self._lingers_since_s, self._unread_since_s) > LINGER_S:
                self.close()
        elif not self._is_read_paused:
            self._check_silence(now_s)

    def _check_silence(self, now_s: float) -> None:
        limits, head_since_s = self._server.limits, self._parser.head_since_s
        is_idle = self._idle_since_s and now_s - self._idle_since_s > limits.keep_alive_s
        if self._transport is None or self._transport.is_closing() or self._has_read_end:
            return
        if head_since_s and now_s - head_since_s > limits.head_timeout_s:
            self._refuse(Refusal(408, "The headers took too long."))
        elif is_idle and not head_since_s:
            self.close()

    def _has_left(self, now_s: float) -> bool:
        """Whether nobody is there to read the answer."""
        if self._transport is None:
            return False
        unread_bytes = self._transport.get_write_buffer_size()
        if unread_bytes != self._unread_bytes:
            self._unread_bytes, self._unread_since_s = unread_bytes, now_s
        if unread_bytes > 0 and now_s - self._unread_since_s > WRITE_TIMEOUT_S:
            return True
        if self._is_read_paused or self._has_read_end:
            state = _tcp_state(self._transport)  # nothing is read, so nothing else would tell
            if state == _TCP_CLOSE:
                return True
            if state == _TCP_CLOSE_WAIT and self._parser.arriving is None:
                self._note_half_close(now_s)
        since_s, current = self._half_closed_since_s, self._current
        if not since_s or current is None or now_s - since_s < HALF_CLOSED_S:
            return False
        return current.keeps_alive and current.minds_leaving

    def _note_half_close(self, now_s: float) -> None:
        self._half_closed_since_s = self._half_closed_since_s or now_s

    # Flow
    def write(self, data: bytes) -> None:
        """Send bytes; after the end of the connection they are dropped."""
        transport = self._transport
        if transport is not None and not transport.is_closing() and not self._lingers_since_s:
            transport.write(data)

    async def drained(self) -> None:
        """See Http1Request.drained."""
        if self._writable is not None:
            await self._writable.wait()  # `check_time` ends it
        if self._transport is None:
            raise ClientLeft

    def resume_body(self) -> None:
        """Read on, once there is room for more of a body and no request waits."""
        must_wait = self._pipeline or self._last_word is not None or self._has_read_end
        if self._is_read_paused and not must_wait and self._transport is not None:
            self._is_read_paused = False
            if self._parser.head_since_s:
                self._parser.head_since_s = self._loop.time()
            self._transport.resume_reading()

    def pause_reading(self) -> None:
        """See Sink."""
        if not self._is_read_paused and self._transport is not None:
            self._is_read_paused = True
            self._transport.pause_reading()


def _tcp_state(transport: asyncio.Transport) -> int:
    """What the system knows of the connection; 0 where it does not tell."""
    sock = transport.get_extra_info("socket")
    if _TCP_INFO is None or sock is None or sock.family == getattr(socket, "AF_UNIX", None):
        return 0
    try:
        return int(sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1)[0])
    except OSError:
        return 0
