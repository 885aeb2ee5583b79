"""One HTTP/2 connection of a gRPC client (RFC 9113), for calls of one request message.

grpc.aio spends more on a unary call than an edge spends on everything else; this is the part
of HTTP/2 that such a call needs, and nothing more. Three choices make it cheap. The peer is told
to keep no header table, so equal header blocks are equal bytes and are decoded once. Whole
requests leave in one write, with those of the same turn of the loop. And one timer serves the
deadlines of all calls.

What a server may make us hold is bounded: header blocks, partial answers, unread replies.
"""

import asyncio
import math
import struct
import time
from collections.abc import Callable
from typing import Final, cast

from shared.rpc import frames
from shared.rpc.breaker import Breaker
from shared.rpc.call import (
    MESSAGE_BYTES_MAX,
    MESSAGE_HEAD,
    MESSAGE_HEAD_BYTES,
    NOTHING,
    BadAnswer,
    Call,
    ConnectionLost,
    DeadlinePassed,
    NoRoom,
    NotProcessed,
    StreamReset,
)
from shared.rpc.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES_DEFAULT,
    GOAWAY,
    HAS_PRIORITY,
    HEAD,
    HEAD_BYTES,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_DEFAULT,
    WINDOW_MAX,
    WINDOW_UPDATE,
    ProtocolViolation,
)
from shared.rpc.header_block import (
    ANSWER,
    BLOCK_BYTES_MAX,
    FOREIGN,
    INFORMATION,
    NO_TABLE,
    TRAILERS,
    BlockDecoder,
    Headers,
)

# The window of one call holds its whole answer; that of the connection, a few large answers.
CALL_WINDOW = MESSAGE_BYTES_MAX + 1024
CONNECTION_WINDOW = 4 * MESSAGE_BYTES_MAX
# Of answers that have come in part, all calls together. A window that is not given back would
# bound the same, but many large answers at once would then wait for each other for ever.
PARTIAL_BYTES_MAX = CONNECTION_WINDOW
# More of one header block, or in more parts, is an attack (CVE-2024-27316).
CONTINUED_BYTES_MAX, CONTINUATIONS_MAX = 4 * BLOCK_BYTES_MAX, 16
# Pings and settings of a server until the next look at it, after keepalive_s: more are an attack
# (CVE-2019-9512, CVE-2019-9515).
REPLIES_MAX = 10_000
# What headers and resets of our calls may add while the server reads nothing.
UNREAD_BYTES_MAX = 8 * 1024 * 1024
# A large frame keeps all others waiting.
SENT_FRAME_BYTES_MAX = 64 * 1024
# Of what a server says when it goes away, for the log.
GOAWAY_TEXT_BYTES_MAX = 200
# Below what grpcio's server queues without refusing.
CALLS_AT_ONCE_MAX = 1000
# Deadlines are met this late at most; so close to its deadline, a call was cancelled for it.
DEADLINE_GRAIN_S = 0.002
# How long a closing connection may take to send what it has.
FAREWELL_S = 1.0

_DATA_AND_MESSAGE_HEAD: Final = struct.Struct(">HBBBLBL")


class Http2Connection(asyncio.Protocol):
    """A connection to one server.

    Args:
        on_change: called when it can take more calls than before, or none any more.
        is_pinged_when_idle: whether a silent connection without calls is tested, too.
        keepalive_s, ping_timeout_s: after how much silence to ping, and how long to wait.
        breaker: of its address; None has one for itself.

    Attributes:
        breaker: where whoever makes calls notes how they end.
        calls_max: how many calls may be under way.
        is_usable: whether calls may be started at all.
        has_begun: done when the server has sent its SETTINGS: only then does it speak HTTP/2.
        ending: why it ended, or will when its calls have; or "".
        was_pinged_too_often: the server said so (gRFC A8).
    """

    def __init__(
        self,
        on_change: Callable[[], None],
        *,
        is_pinged_when_idle: bool,
        keepalive_s: float,
        ping_timeout_s: float,
        breaker: Breaker | None = None,
    ) -> None:
        self.breaker = breaker or Breaker()
        self._on_change = on_change
        self._is_pinged_when_idle = is_pinged_when_idle
        self._keepalive_s = keepalive_s
        self._ping_timeout_s = ping_timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._has_ended = False
        self._is_gone = asyncio.Event()  # the transport is
        self._is_gone.set()
        self._calls: dict[int, Call] = {}
        self._next_id = 1
        # Sending.
        self._unwritten: list[bytes] = []
        self._unwritten_id = 1  # calls from here on have not reached the transport
        self._is_paused = False  # the transport is full
        self._unread_bytes = 0  # written since
        self._replies = 0
        self._sending: dict[int, Call] = {}  # requests that wait for a window
        self._send_window = WINDOW_DEFAULT
        self._peer_window = WINDOW_DEFAULT  # of each new call
        self._peer_frame_bytes = FRAME_BYTES_DEFAULT
        # Receiving.
        self._must_come: int | None = SETTINGS  # or CONTINUATION: no other frame may
        self._incomplete = b""  # a frame
        self._block: tuple[int, int, list[bytes]] | None = None  # stream, flags, parts
        self._decoder = BlockDecoder()
        self._unacked = 0
        self._partial_bytes = 0
        self._handlers = {
            DATA: self._on_data,
            HEADERS: self._on_headers,
            PRIORITY: _ignore,
            RST_STREAM: self._on_reset,
            SETTINGS: self._on_settings,
            PUSH_PROMISE: _refuse_push,
            PING: self._on_ping,
            GOAWAY: self._on_goaway,
            WINDOW_UPDATE: self._on_window_update,
            CONTINUATION: self._on_continuation,
        }
        # Time.
        self._heard = True
        self._keepalive: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._expires_at_s = math.inf
        self.calls_max = CALLS_AT_ONCE_MAX
        self.is_usable = False
        self.has_begun: asyncio.Future[None] = self._loop.create_future()
        self.ending = ""
        self.was_pinged_too_often = False

    @property
    def is_closed(self) -> bool:
        """Whether the connection is gone, its socket included, or was never there."""
        return self._is_gone.is_set()

    @property
    def has_capacity(self) -> bool:
        """Whether a call can be started now."""
        return self.is_usable and len(self._calls) < self.calls_max

    @property
    def calls_in_flight(self) -> int:
        """Calls that have been started and have not ended."""
        return len(self._calls)

    # Calls
    def start(self, call: Call, block: bytes, message: bytes) -> None:
        """Send a request of one message; only while has_capacity, each call once.

        Args:
            call: hears of the answer.
            block: the encoded request headers.
            message: the serialized request.
        """
        stream_id = call.stream_id = self._next_id
        self._next_id += 2
        self._calls[stream_id] = call
        if stream_id == 1:
            block = NO_TABLE + block
        block_size, size = len(block), len(message) + MESSAGE_HEAD_BYTES
        if (
            block_size <= FRAME_BYTES_DEFAULT
            and size <= FRAME_BYTES_DEFAULT
            and size <= self._send_window
            and size <= self._peer_window
            and not self._is_paused
        ):
            self._send_window -= size
            self._write(
                HEAD.pack(block_size >> 8, block_size & 0xFF, HEADERS, END_HEADERS, stream_id),
                block,
                _DATA_AND_MESSAGE_HEAD.pack(
                    size >> 8, size & 0xFF, DATA, END_STREAM, stream_id,
                    0, size - MESSAGE_HEAD_BYTES,
                ),
                message,
            )  # fmt: skip
        else:
            self._start_large(call, block, message)
        if call.deadline_s < self._expires_at_s:
            self._expire_at(call.deadline_s)
        if self._next_id > frames.STREAM_ID_MAX:
            self.drain()

    def cancel(self, call: Call) -> None:
        """End a call whose answer nobody waits for; it hears nothing more."""
        if self._calls.get(call.stream_id) is call:
            self._remove(call)
            self._write(frames.reset(call.stream_id, frames.CANCEL))
            self._close_if_drained()

    def drain(self) -> None:
        """Take no more calls; close when those in flight have ended."""
        self._retire()
        self._close_if_drained()

    def close(self) -> None:
        """End the connection; calls in flight fail."""
        self._end("it was closed here", frames.NO_ERROR)

    async def wait_closed(self) -> None:
        """Wait until the socket is closed; what the server does not take by then is dropped."""
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._is_gone.wait()
        except TimeoutError:
            assert self._transport is not None  # it is not gone
            self._transport.abort()
            await self._is_gone.wait()

    def _remove(self, call: Call) -> None:
        del self._calls[call.stream_id]
        if call.unsent:
            self._sending.pop(call.stream_id, None)
            call.unsent = NOTHING
        if call.partial:
            self._partial_bytes -= len(call.partial)
            call.partial = None

    def _fail(self, call: Call, error: Exception, code: int, *, is_last: bool = False) -> None:
        """End a call that has gone wrong; after the server's last frame there is no reset."""
        if not is_last or call.unsent:
            self._write(frames.reset(call.stream_id, code))
        self._remove(call)
        call.on_failure(error)
        self._close_if_drained()

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open the conversation."""
        self._transport = cast("asyncio.Transport", transport)
        self._is_gone.clear()
        self._write(
            frames.PREFACE,
            frames.settings(
                (frames.SETTINGS_HEADER_TABLE_SIZE, 0),
                (frames.SETTINGS_ENABLE_PUSH, 0),
                (frames.SETTINGS_INITIAL_WINDOW_SIZE, CALL_WINDOW),
                (frames.SETTINGS_MAX_HEADER_LIST_SIZE, BLOCK_BYTES_MAX),
            ),
            frames.window_update(0, CONNECTION_WINDOW - WINDOW_DEFAULT),
        )
        self._keepalive = self._loop.call_later(self._keepalive_s, self._ping_if_silent)

    def eof_received(self) -> None:
        """Tell every call: a server that says no more has no more answers."""
        self._end("the server closed the connection", frames.NO_ERROR)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every call."""
        self._end(str(exc or "the server closed the connection"), None)
        self._is_gone.set()

    def pause_writing(self) -> None:
        """The server reads more slowly than we write: requests wait."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """The requests that waited go on."""
        self._is_paused = False
        self._unread_bytes = 0
        self._send_waiting()

    def data_received(self, data: bytes) -> None:
        """Take frames apart and hand them out."""
        if self._has_ended:
            return
        self._heard = True
        if self._incomplete:
            data = self._incomplete + data
        at, end = 0, len(data)
        try:
            while end - at >= HEAD_BYTES:
                high, low, kind, flags, stream_id = HEAD.unpack_from(data, at)
                size = high << 8 | low
                if size > FRAME_BYTES_DEFAULT:
                    raise ProtocolViolation("a frame is too long", frames.FRAME_SIZE_ERROR)
                start = at + HEAD_BYTES
                if start + size > end:
                    break
                at = start + size
                if self._must_come is not None and kind != self._must_come:
                    raise ProtocolViolation("another frame had to come first")
                handler = self._handlers.get(kind)
                if handler is not None:
                    handler(flags, stream_id & 0x7FFFFFFF, data[start:at])
        except ProtocolViolation as violation:
            self._end(f"the server broke the protocol: {violation}", violation.code)
        self._incomplete = b"" if self._has_ended else data[at:]

    # Frames of a call
    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & (PADDED | HAS_PRIORITY):
            payload = frames.unpadded(flags, payload)
        if flags & END_HEADERS:
            self._on_block(stream_id, flags, payload)
        else:
            self._block = stream_id, flags, [payload]
            self._must_come = CONTINUATION

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise ProtocolViolation("CONTINUATION without its HEADERS")
        _, first_flags, parts = self._block
        parts.append(payload)
        if len(parts) > CONTINUATIONS_MAX or sum(map(len, parts)) > CONTINUED_BYTES_MAX:
            raise ProtocolViolation("a header block is too long", frames.ENHANCE_YOUR_CALM)
        if flags & END_HEADERS:
            self._block = self._must_come = None
            self._on_block(stream_id, first_flags, b"".join(parts))

    def _on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        try:
            kind, headers = self._decoder.decode(block)
        except ValueError as error:
            raise ProtocolViolation(str(error), frames.COMPRESSION_ERROR) from error
        call = self._calls.get(stream_id)
        if call is None:
            self._check_was_started(stream_id)
        elif flags & END_STREAM:
            self._on_last_block(call, kind, headers)
        elif kind == ANSWER and call.initial is None:
            call.initial = headers
        elif kind == FOREIGN and call.initial is None:
            # Its body would be no message; what the status says is all that it says.
            self._remove(call)
            self._write(frames.reset(stream_id, frames.CANCEL))
            call.on_end(headers, headers)
            self._close_if_drained()
        elif kind != INFORMATION or call.initial is not None:
            self._fail(call, BadAnswer("headers out of turn"), frames.PROTOCOL_ERROR)

    def _on_last_block(self, call: Call, kind: int, headers: Headers) -> None:
        initial = call.initial
        is_in_turn = kind in {ANSWER, FOREIGN} if initial is None else kind == TRAILERS
        if not is_in_turn:
            error = BadAnswer("headers out of turn")
            self._fail(call, error, frames.PROTOCOL_ERROR, is_last=True)
            return
        if call.partial and headers.get(b"grpc-status") == b"0":
            error = BadAnswer("it ends within a message")
            self._fail(call, error, frames.PROTOCOL_ERROR, is_last=True)
            return
        if call.unsent:  # answered before it was asked in full: the rest is not sent
            self._write(frames.reset(call.stream_id, frames.CANCEL))
        self._remove(call)
        call.on_end(initial or headers, headers)
        if not self.is_usable:
            self._close_if_drained()

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._unacked += size
        if self._unacked > CONNECTION_WINDOW // 2:
            self._write(frames.window_update(0, self._unacked))
            self._unacked = 0
        call = self._calls.get(stream_id)
        if call is None:
            self._check_was_started(stream_id)
            return
        if flags & PADDED:
            payload = frames.unpadded(PADDED, payload)
        error = self._take(call, payload)
        if flags & END_STREAM and error is None:  # gRPC ends with trailers
            error = BadAnswer("it has no status")
        if error is not None:
            self._fail(call, error, frames.CANCEL, is_last=bool(flags & END_STREAM))
            return
        call.unacked += size
        if call.unacked > CALL_WINDOW // 2:
            self._write(frames.window_update(stream_id, call.unacked))
            call.unacked = 0

    def _take(self, call: Call, payload: bytes) -> Exception | None:
        """Hand a part of an answer to its call; the error that ends it, if any."""
        if call.initial is None:
            return BadAnswer("a message without headers")
        held = len(call.partial) if call.partial else 0
        error = call.take(payload)
        if call.partial or held:
            self._partial_bytes += len(call.partial or b"") - held
            if self._partial_bytes > PARTIAL_BYTES_MAX:
                return NoRoom("too much of too many answers")
        return error

    def _on_reset(self, _flags: int, stream_id: int, payload: bytes) -> None:
        code = frames.word_of(payload)
        call = self._calls.get(stream_id)
        if call is None:
            self._check_was_started(stream_id)
            return
        self._remove(call)
        if code == frames.REFUSED_STREAM and call.initial is None:
            call.on_failure(NotProcessed("the server refused the stream"))
        elif code == frames.CANCEL and call.deadline_s - time.monotonic() < DEADLINE_GRAIN_S:
            call.on_failure(DeadlinePassed("the server saw it first"))
        else:
            call.on_failure(StreamReset(code))
        self._close_if_drained()

    def _check_was_started(self, stream_id: int) -> None:
        """A frame of a call that is over is only late; of one that never was, it is wrong."""
        if not stream_id & 1 or stream_id >= self._next_id:
            raise ProtocolViolation("a frame of a stream that was never opened")

    # Frames of the connection
    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        _check_is_of_connection(stream_id)
        if flags & ACK:
            if payload or self._must_come is not None:
                raise ProtocolViolation("an acknowledgement of nothing", frames.FRAME_SIZE_ERROR)
            return
        if len(payload) % frames.SETTING.size:
            raise ProtocolViolation("SETTINGS of a wrong size", frames.FRAME_SIZE_ERROR)
        calls_max_before = self.calls_max
        for key, value in frames.SETTING.iter_unpack(payload):
            self._apply(key, value)
        self._reply(frames.frame(SETTINGS, ACK, 0))
        if self._must_come is not None:
            self._must_come = None
            if not self.has_begun.done():  # cancelled, where nobody waits any longer
                self.is_usable = True
                self.has_begun.set_result(None)
        elif self.calls_max > calls_max_before:
            self._on_change()

    def _apply(self, key: int, value: int) -> None:
        if key == frames.SETTINGS_MAX_CONCURRENT_STREAMS:
            self.calls_max = min(value, CALLS_AT_ONCE_MAX)
        elif key == frames.SETTINGS_INITIAL_WINDOW_SIZE:
            self._change_peer_window(value)
        elif key == frames.SETTINGS_MAX_FRAME_SIZE:
            if not FRAME_BYTES_DEFAULT <= value <= frames.FRAME_BYTES_MAX:
                raise ProtocolViolation("a maximum that no frame may have")
            self._peer_frame_bytes = min(value, SENT_FRAME_BYTES_MAX)
        elif key == frames.SETTINGS_ENABLE_PUSH and value:
            raise ProtocolViolation("a server cannot switch pushes on")

    def _change_peer_window(self, value: int) -> None:
        before, self._peer_window = self._peer_window, _grown(0, value)
        for call in self._sending.values():
            call.send_window = _grown(call.send_window, value - before)
        self._send_waiting()

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        _check_is_of_connection(stream_id)
        if len(payload) != 8:
            raise ProtocolViolation("PING of a wrong size", frames.FRAME_SIZE_ERROR)
        if not flags & ACK:
            self._reply(frames.frame(PING, ACK, 0, payload))

    def _on_goaway(self, _flags: int, stream_id: int, payload: bytes) -> None:
        _check_is_of_connection(stream_id)
        if len(payload) < frames.TWO_WORDS.size:
            raise ProtocolViolation("GOAWAY of a wrong size", frames.FRAME_SIZE_ERROR)
        last_id, code = frames.TWO_WORDS.unpack_from(payload)
        debug = payload[frames.TWO_WORDS.size :]
        if code == frames.ENHANCE_YOUR_CALM and debug == b"too_many_pings":
            self.was_pinged_too_often = True
        text = debug[:GOAWAY_TEXT_BYTES_MAX].decode("ascii", "replace")
        self.ending = f"the server asked for it with code {code} {text}".rstrip()
        self._retire()
        last_id &= 0x7FFFFFFF
        for call in [call for call in self._calls.values() if call.stream_id > last_id]:
            self._remove(call)
            call.on_failure(NotProcessed("the server takes no more calls on this connection"))
        self._close_if_drained()

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        increment = frames.word_of(payload) & 0x7FFFFFFF
        if not increment:
            raise ProtocolViolation("a window grows by nothing")
        if stream_id == 0:
            self._send_window = _grown(self._send_window, increment)
            self._send_waiting()
        elif (call := self._sending.get(stream_id)) is not None:
            call.send_window = _grown(call.send_window, increment)
            self._send_more(call)
        elif stream_id not in self._calls:
            self._check_was_started(stream_id)

    # Sending
    def _start_large(self, call: Call, block: bytes, message: bytes) -> None:
        """Send the headers at once, and of the message what the windows allow."""
        self._write(
            frames.header_frames(call.stream_id, block, flags=0, frame_bytes=FRAME_BYTES_DEFAULT)
        )
        call.send_window = self._peer_window
        call.unsent = memoryview(MESSAGE_HEAD.pack(0, len(message)) + message)
        self._sending[call.stream_id] = call
        self._send_more(call)

    def _send_waiting(self) -> None:
        for call in list(self._sending.values()):
            self._send_more(call)

    def _send_more(self, call: Call) -> None:
        self._flush()  # headers go first, and only a real write tells whether there is room
        transport = self._transport
        while not (
            self._is_paused or self._has_ended or transport is None or transport.is_closing()
        ):
            size = min(
                len(call.unsent), self._send_window, call.send_window, self._peer_frame_bytes
            )
            if size <= 0:
                break
            part, call.unsent = call.unsent[:size], call.unsent[size:]
            self._send_window -= size
            call.send_window -= size
            flags = 0 if call.unsent else END_STREAM
            transport.write(frames.frame(DATA, flags, call.stream_id, bytes(part)))
        if not call.unsent:
            self._sending.pop(call.stream_id, None)

    def _write(self, *parts: bytes) -> None:
        """Send with all else that this turn of the loop has to send: one packet for many calls."""
        if not self._unwritten:
            self._loop.call_soon(self._flush)
        self._unwritten += parts

    def _reply(self, frame: bytes) -> None:
        self._replies += 1
        if self._replies > REPLIES_MAX:
            raise ProtocolViolation("too many pings or settings", frames.ENHANCE_YOUR_CALM)
        self._write(frame)

    def _flush(self) -> None:
        data = b"".join(self._unwritten)
        self._unwritten.clear()
        transport = self._transport
        if not data or transport is None or self._has_ended or transport.is_closing():
            return
        if self._is_paused:
            self._unread_bytes += len(data)
            if self._unread_bytes > UNREAD_BYTES_MAX:
                self._end("the server does not read", frames.ENHANCE_YOUR_CALM)
                return
        self._unwritten_id = self._next_id
        transport.write(data)

    # Life
    def _retire(self) -> None:
        was_usable, self.is_usable = self.is_usable, False
        if was_usable:
            self._on_change()

    def _close_if_drained(self) -> None:
        if not self.is_usable and not self._calls and self.has_begun.done():
            self.close()

    def _end(self, ending: str, code: int | None) -> None:
        """End it all, once; with a code, the server is told why."""
        if self._has_ended:
            return
        self._has_ended, self.ending = True, self.ending or ending
        # Not sent after all: these calls may be made again.
        self._unwritten.clear()
        if code is not None and self._transport is not None:
            _say_farewell(self._transport, code)
        for timer in (self._keepalive, self._expiry):
            if timer is not None:
                timer.cancel()
        if not self.has_begun.done():
            self.has_begun.set_exception(ConnectionLost(ending))
            self.has_begun.exception()  # seen, also where nobody waits for it
        self._retire()
        calls, self._calls = list(self._calls.values()), {}
        self._sending.clear()
        for call in calls:
            is_unwritten = call.stream_id >= self._unwritten_id
            call.on_failure(NotProcessed(ending) if is_unwritten else ConnectionLost(ending))

    # Time
    def _expire_at(self, deadline_s: float) -> None:
        """Look after deadlines at the first of them, wherever the timer stood."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._expires_at_s = deadline_s
        delay_s = max(DEADLINE_GRAIN_S, deadline_s - time.monotonic())
        self._expiry = self._loop.call_later(delay_s, self._expire)

    def _expire(self) -> None:
        now_s = time.monotonic()
        for call in [call for call in self._calls.values() if call.deadline_s <= now_s]:
            self._fail(call, DeadlinePassed("no answer came in time"), frames.CANCEL)
        self._expires_at_s = math.inf
        next_s = min((call.deadline_s for call in self._calls.values()), default=math.inf)
        if next_s < math.inf:
            self._expire_at(next_s)

    def _ping_if_silent(self) -> None:
        """Test a connection that said nothing: only an answer shows that somebody is there."""
        self._replies = 0
        is_worth_it = self._calls or self._is_pinged_when_idle
        if self._heard or not is_worth_it:
            self._heard = False
            self._keepalive = self._loop.call_later(self._keepalive_s, self._ping_if_silent)
        else:
            self._write(frames.frame(PING, 0, 0, b"tenfold\0"))
            self._keepalive = self._loop.call_later(self._ping_timeout_s, self._end_if_silent)

    def _end_if_silent(self) -> None:
        if self._heard:
            self._ping_if_silent()
        else:
            self._end("the server does not answer pings", frames.NO_ERROR)


def _say_farewell(transport: asyncio.Transport, code: int) -> None:
    if transport.get_write_buffer_size():  # it does not read: closing would wait for it
        transport.abort()
    else:
        transport.write(frames.goaway(code))
        transport.close()


def _grown(window: int, increment: int) -> int:
    if window + increment > WINDOW_MAX:
        raise ProtocolViolation("a window overflows", frames.FLOW_CONTROL_ERROR)
    return window + increment


def _check_is_of_connection(stream_id: int) -> None:
    if stream_id != 0:
        raise ProtocolViolation("a frame of the connection on a stream")


def _ignore(_flags: int, _stream_id: int, _payload: bytes) -> None:
    """PRIORITY is deprecated (RFC 9113 §5.3.2)."""


def _refuse_push(_flags: int, _stream_id: int, _payload: bytes) -> None:
    raise ProtocolViolation("a push, although pushes are switched off")
