"""One HTTP/2 connection of a gRPC client (RFC 9113), for calls of one request message.

grpc.aio spends more on a unary call than an edge spends on everything else; this is the part
of HTTP/2 that such a call needs, and nothing more. Two choices make it cheap. The peer is told
to keep no header table, so equal header blocks are equal bytes and are decoded once. And a
whole request leaves in one write.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from hpack import Decoder
from hpack.exceptions import HPACKError

from shared.rpc.header_block import Headers

# RFC 9113 §6: frame types, flags and settings.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
(
    SETTINGS_HEADER_TABLE_SIZE,
    SETTINGS_ENABLE_PUSH,
    SETTINGS_MAX_CONCURRENT_STREAMS,
    SETTINGS_INITIAL_WINDOW_SIZE,
    SETTINGS_MAX_FRAME_SIZE,
    SETTINGS_MAX_HEADER_LIST_SIZE,
) = range(1, 7)
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, REFUSED_STREAM, CANCEL = 0x0, 0x1, 0x3, 0x7, 0x8

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW_DEFAULT = 65_535
WINDOW_MAX = 2**31 - 1
FRAME_BYTES_DEFAULT = 16_384
STREAM_ID_MAX = 2**31 - 1

# One answer message, as the channels of grpc.aio have it.
MESSAGE_BYTES_MAX = 16 * 1024 * 1024
HEADER_BLOCK_BYTES_MAX = 64 * 1024
# The window of one call holds its whole answer; that of the connection, a few large answers.
CALL_WINDOW = MESSAGE_BYTES_MAX + 1024
CONNECTION_WINDOW = 4 * MESSAGE_BYTES_MAX
# Below what grpcio's server queues without refusing.
CALLS_AT_ONCE_MAX = 1000
# Different header blocks that are remembered; nearly all answers share two.
BLOCKS_KEPT_MAX = 256
BLOCK_KEPT_BYTES_MAX = 512

_FRAME = struct.Struct(">HBBBL")  # length (24 bits, in two parts), type, flags, stream
_SETTING = struct.Struct(">HL")
_WORD = struct.Struct(">L")
_TWO_WORDS = struct.Struct(">LL")
_MESSAGE = struct.Struct(">BL")  # gRPC: compressed flag, length


class ConnectionLost(Exception):
    """The connection ended under a call; whether the call had its effect is not known."""


class NotProcessed(Exception):
    """The server has not looked at this call: it may be made again, whatever it does."""


class StreamReset(Exception):
    """The server reset the call's stream.

    Args:
        code: of RFC 9113 §7.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"stream reset with code {code}")
        self.code = code


class _ProtocolViolation(Exception):
    """The peer broke the protocol: the connection ends with this code."""

    def __init__(self, text: str, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(text)
        self.code = code


class Receiver(Protocol):
    """Who hears of one call's answer. Every call ends with exactly one of the last two."""

    def on_message(self, message: bytes) -> None:
        """A whole message of the answer."""
        ...

    def on_end(self, initial: Headers, trailing: Headers) -> None:
        """The call is over; for an answer of one header block both are the same."""
        ...

    def on_failure(self, error: Exception) -> None:
        """The call is over without an answer: ConnectionLost, NotProcessed or StreamReset."""
        ...


class Call:
    """One call under way: what has come of its answer, and what of its request must wait."""

    __slots__ = ("buffer", "initial", "receiver", "send_window", "stream_id", "unacked", "unsent")

    def __init__(self, stream_id: int, receiver: Receiver, send_window: int) -> None:
        self.stream_id = stream_id
        self.receiver = receiver
        self.send_window = send_window
        self.buffer = bytearray()
        self.initial: Headers | None = None
        self.unacked = 0
        self.unsent = memoryview(b"")


class Http2Connection(asyncio.Protocol):
    """A connection to one server.

    Args:
        on_closed: called once, when no further call can be started here.
        is_pinged_when_idle: whether a silent connection without calls is tested, too.
        keepalive_s, ping_timeout_s: after how much silence to ping, and how long to wait.
    """

    def __init__(
        self,
        on_closed: Callable[[], None],
        *,
        is_pinged_when_idle: bool,
        keepalive_s: float,
        ping_timeout_s: float,
    ) -> None:
        self._on_closed = on_closed
        self._is_pinged_when_idle = is_pinged_when_idle
        self._keepalive_s = keepalive_s
        self._ping_timeout_s = ping_timeout_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unwritten: list[bytes] = []
        self._calls: dict[int, Call] = {}
        self._next_id = 1
        self._partial = b""
        self._block: tuple[Call | None, int, bytes] | None = None  # waits for CONTINUATION
        self._decoder = Decoder(max_header_list_size=HEADER_BLOCK_BYTES_MAX)
        self._decoder.max_allowed_table_size = 0
        self._decoder.header_table_size = 0
        self._decoded: dict[bytes, Headers] = {}
        self._send_window = WINDOW_DEFAULT
        self._peer_window = WINDOW_DEFAULT
        self._peer_frame_bytes = FRAME_BYTES_DEFAULT
        self._unacked = 0
        self._heard = True
        self._timer: asyncio.TimerHandle | None = None
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
        self.calls_max = CALLS_AT_ONCE_MAX
        self.is_usable = False
        # Set when the server has sent its SETTINGS: only then does it speak HTTP/2.
        self.has_begun: asyncio.Future[None] = self._loop.create_future()

    @property
    def is_closed(self) -> bool:
        """Whether the connection is gone."""
        return self._transport is None

    @property
    def has_capacity(self) -> bool:
        """Whether a call can be started now."""
        return self.is_usable and len(self._calls) < self.calls_max

    @property
    def calls_in_flight(self) -> int:
        """Calls that have been started and have not ended."""
        return len(self._calls)

    def start(self, block: bytes, message: bytes, receiver: Receiver) -> Call:
        """Send a request of one message; only while has_capacity.

        Args:
            block: the encoded request headers, at most one frame.
            message: the serialized request.
            receiver: hears of the answer.
        """
        stream_id = self._next_id
        self._next_id += 2
        if self._next_id > STREAM_ID_MAX:
            self._retire()
        call = self._calls[stream_id] = Call(stream_id, receiver, self._peer_window)
        size = len(message) + 5
        head = _frame(HEADERS, END_HEADERS, stream_id, len(block))
        prefix = _MESSAGE.pack(0, size - 5)
        if size <= self._send_window and size <= self._peer_window and size <= FRAME_BYTES_DEFAULT:
            self._send_window -= size
            data = _frame(DATA, END_STREAM, stream_id, size)
            self._write(b"".join((head, block, data, prefix, message)))
        else:
            self._write(head + block)
            call.unsent = memoryview(prefix + message)
            self._send_more(call)
        return call

    def cancel(self, call: Call) -> None:
        """End a call whose answer nobody waits for; its receiver hears nothing more."""
        if self._calls.pop(call.stream_id, None) is not None:
            frame = _frame(RST_STREAM, 0, call.stream_id, 4) + _WORD.pack(CANCEL)
            self._write(frame)
            self._close_if_drained()

    def close(self) -> None:
        """End the connection; calls in flight fail."""
        self._end(ConnectionLost("the connection was closed here"), NO_ERROR)

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open the conversation."""
        self._transport = cast("asyncio.Transport", transport)
        settings = (
            (SETTINGS_HEADER_TABLE_SIZE, 0),
            (SETTINGS_ENABLE_PUSH, 0),
            (SETTINGS_INITIAL_WINDOW_SIZE, CALL_WINDOW),
            (SETTINGS_MAX_HEADER_LIST_SIZE, HEADER_BLOCK_BYTES_MAX),
        )
        payload = b"".join(_SETTING.pack(*setting) for setting in settings)
        window = _WORD.pack(CONNECTION_WINDOW - WINDOW_DEFAULT)
        self._write(
            PREFACE
            + _frame(SETTINGS, 0, 0, len(payload))
            + payload
            + _frame(WINDOW_UPDATE, 0, 0, 4)
            + window
        )
        self._arm(self._keepalive_s, self._ping_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every call."""
        self._end(ConnectionLost(str(exc or "the server closed the connection")), None)

    def data_received(self, data: bytes) -> None:
        """Take frames apart and hand them out."""
        self._heard = True
        if self._partial:
            data = self._partial + data
        at, end = 0, len(data)
        try:
            while end - at >= 9:
                high, low, kind, flags, stream_id = _FRAME.unpack_from(data, at)
                size = high << 8 | low
                if size > FRAME_BYTES_DEFAULT:
                    raise _ProtocolViolation("a frame is longer than was allowed", 0x6)
                start = at + 9
                if start + size > end:
                    break
                at = start + size
                if self._block is not None and kind != CONTINUATION:
                    raise _ProtocolViolation("a header block was interrupted")
                handler = self._handlers.get(kind)
                if handler is not None:
                    handler(flags, stream_id & 0x7FFFFFFF, data[start:at])
        except _ProtocolViolation as error:
            self._end(ConnectionLost(str(error)), error.code)
            return
        self._partial = data[at:] if at < end else b""

    # Frames
    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & (PADDED | PRIORITY_FLAG):
            payload = _unpadded(flags, payload)
        call = self._calls.get(stream_id)
        if flags & END_HEADERS:
            self._on_block(call, flags, payload)
        else:
            self._block = call, flags, payload

    def _on_continuation(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if self._block is None:
            raise _ProtocolViolation("CONTINUATION without HEADERS")
        call, first_flags, block = self._block
        block += payload
        if len(block) > HEADER_BLOCK_BYTES_MAX:
            raise _ProtocolViolation("a header block is too long", 0xB)
        self._block = None if flags & END_HEADERS else (call, first_flags, block)
        if self._block is None:
            self._on_block(call, first_flags, block)

    def _on_block(self, call: Call | None, flags: int, block: bytes) -> None:
        headers = self._decoded.get(block)
        if headers is None:
            headers = self._decode(block)
        if call is None:  # cancelled here; its answer was under way
            return
        if not flags & END_STREAM:
            call.initial = headers
            return
        if call.unsent:  # answered before it was asked in full: the rest is not sent
            self.cancel(call)
        else:
            del self._calls[call.stream_id]
        call.receiver.on_end(headers if call.initial is None else call.initial, headers)
        self._close_if_drained()

    def _decode(self, block: bytes) -> Headers:
        try:
            pairs: Any = self._decoder.decode(block, raw=True)
        except HPACKError as error:
            raise _ProtocolViolation(f"a header block does not decode: {error}", 0x9) from error
        headers: Headers = {}
        for name, value in pairs:
            headers[name] = headers[name] + b"," + value if name in headers else value
        if len(block) <= BLOCK_KEPT_BYTES_MAX:
            if len(self._decoded) >= BLOCKS_KEPT_MAX:
                self._decoded.clear()
            self._decoded[block] = headers
        return headers

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._unacked += size
        if self._unacked > CONNECTION_WINDOW // 2:
            self._write(_window_update(0, self._unacked))
            self._unacked = 0
        call = self._calls.get(stream_id)
        if call is None:
            return
        if flags & PADDED:
            payload = _unpadded(flags, payload)
        if not self._take_messages(call, payload):
            self._fail(call, StreamReset(PROTOCOL_ERROR))
            return
        if flags & END_STREAM:  # gRPC ends with trailers: this answer has no status
            self._fail(call, StreamReset(PROTOCOL_ERROR))
            return
        call.unacked += size
        if call.unacked > CALL_WINDOW // 2:
            self._write(_window_update(stream_id, call.unacked))
            call.unacked = 0

    def _take_messages(self, call: Call, payload: bytes) -> bool:
        """Hand out what is whole of a call's answer; False if it is no gRPC message."""
        data = call.buffer
        if not data and len(payload) >= 5 and payload[0] == 0:
            length = _MESSAGE.unpack_from(payload)[1]
            if length == len(payload) - 5:  # the usual answer: one frame, one message
                call.receiver.on_message(payload[5:])
                return True
        data += payload
        while len(data) >= 5:
            is_compressed, length = _MESSAGE.unpack_from(data)
            if is_compressed or length > MESSAGE_BYTES_MAX:
                return False
            if len(data) < length + 5:
                break
            call.receiver.on_message(bytes(data[5 : length + 5]))
            del data[: length + 5]
        return True

    def _fail(self, call: Call, error: Exception) -> None:
        """End a call that the peer has not ended properly."""
        self.cancel(call)
        call.receiver.on_failure(error)

    def _on_reset(self, _flags: int, stream_id: int, payload: bytes) -> None:
        code = _word(payload)
        call = self._calls.pop(stream_id, None)
        if call is None:
            return
        call.receiver.on_failure(
            NotProcessed("the server refused the stream")
            if code == REFUSED_STREAM
            else StreamReset(code)
        )
        self._close_if_drained()

    def _on_settings(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if flags & ACK:
            return
        if len(payload) % 6:
            raise _ProtocolViolation("SETTINGS of a wrong size", 0x6)
        for key, value in _SETTING.iter_unpack(payload):
            if key == SETTINGS_MAX_CONCURRENT_STREAMS:
                self.calls_max = min(value, CALLS_AT_ONCE_MAX)
            elif key == SETTINGS_INITIAL_WINDOW_SIZE:
                self._change_peer_window(value)
            elif key == SETTINGS_MAX_FRAME_SIZE:
                self._peer_frame_bytes = max(FRAME_BYTES_DEFAULT, value)
        self._write(_frame(SETTINGS, ACK, 0, 0))
        if not self.has_begun.done():
            self.is_usable = True
            self.has_begun.set_result(None)

    def _change_peer_window(self, value: int) -> None:
        if value > WINDOW_MAX:
            raise _ProtocolViolation("a window is too large", FLOW_CONTROL_ERROR)
        difference, self._peer_window = value - self._peer_window, value
        for call in list(self._calls.values()):
            call.send_window += difference
            self._send_more(call)

    def _on_ping(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if not flags & ACK:
            self._write(_frame(PING, ACK, 0, 8) + payload[:8].ljust(8, b"\0"))

    def _on_goaway(self, _flags: int, _stream_id: int, payload: bytes) -> None:
        if len(payload) < 8:
            raise _ProtocolViolation("GOAWAY of a wrong size", 0x6)
        last_id = _TWO_WORDS.unpack_from(payload)[0] & 0x7FFFFFFF
        self._retire()
        error = NotProcessed("the server takes no more calls on this connection")
        for call in [call for call in self._calls.values() if call.stream_id > last_id]:
            del self._calls[call.stream_id]
            call.receiver.on_failure(error)
        self._close_if_drained()

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        increment = _word(payload) & 0x7FFFFFFF
        if stream_id == 0:
            self._send_window += increment
            if self._send_window > WINDOW_MAX:
                raise _ProtocolViolation("the window overflows", FLOW_CONTROL_ERROR)
            for waiting in [call for call in self._calls.values() if call.unsent]:
                self._send_more(waiting)
        elif (call := self._calls.get(stream_id)) is not None:
            call.send_window += increment
            self._send_more(call)

    # Sending
    def _send_more(self, call: Call) -> None:
        """Send what the windows allow of a request that did not fit at once."""
        while call.unsent and self._send_window > 0 and call.send_window > 0:
            size = min(
                len(call.unsent), self._send_window, call.send_window, self._peer_frame_bytes
            )
            part, call.unsent = call.unsent[:size], call.unsent[size:]
            self._send_window -= size
            call.send_window -= size
            flags = 0 if call.unsent else END_STREAM
            self._write(_frame(DATA, flags, call.stream_id, size) + bytes(part))

    def _write(self, data: bytes) -> None:
        """Send with all else that this turn of the loop has to send: one packet for many calls."""
        if not self._unwritten:
            self._loop.call_soon(self._flush)
        self._unwritten.append(data)

    def _flush(self) -> None:
        data = b"".join(self._unwritten)
        self._unwritten.clear()
        if self._transport is not None:
            self._transport.write(data)

    # Life
    def _retire(self) -> None:
        """Take no more calls; those in flight go on."""
        was_usable, self.is_usable = self.is_usable, False
        if was_usable:
            self._on_closed()

    def _close_if_drained(self) -> None:
        if not self.is_usable and not self._calls and self.has_begun.done():
            self.close()

    def _end(self, error: ConnectionLost, code: int | None) -> None:
        """End it all, once; with a code, the peer is told why."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        if code is not None:
            farewell = _frame(GOAWAY, 0, 0, 8) + _TWO_WORDS.pack(0, code)
            transport.write(b"".join(self._unwritten) + farewell)
            transport.close()
        if self._timer is not None:
            self._timer.cancel()
        if not self.has_begun.done():
            self.has_begun.set_exception(error)
            self.has_begun.exception()  # seen, also where nobody waits for it
        self._retire()
        calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.receiver.on_failure(error)

    def _arm(self, delay_s: float, then: Callable[[], None]) -> None:
        self._timer = self._loop.call_later(delay_s, then)

    def _ping_if_silent(self) -> None:
        """Test a connection that said nothing: only an answer shows that somebody is there."""
        is_worth_it = self._calls or self._is_pinged_when_idle
        if self._heard or not is_worth_it:
            self._heard = False
            self._arm(self._keepalive_s, self._ping_if_silent)
        else:
            self._write(_frame(PING, 0, 0, 8) + b"tenfold\0")
            self._arm(self._ping_timeout_s, self._end_if_silent)

    def _end_if_silent(self) -> None:
        if self._heard:
            self._ping_if_silent()
        else:
            self._end(ConnectionLost("the server does not answer pings"), NO_ERROR)


def _frame(kind: int, flags: int, stream_id: int, size: int) -> bytes:
    return _FRAME.pack(size >> 8, size & 0xFF, kind, flags, stream_id)


def _window_update(stream_id: int, size: int) -> bytes:
    return _frame(WINDOW_UPDATE, 0, stream_id, 4) + _WORD.pack(size)


def _word(payload: bytes) -> int:
    if len(payload) != 4:
        raise _ProtocolViolation("a frame of a wrong size", 0x6)
    word: int = _WORD.unpack(payload)[0]
    return word


def _unpadded(flags: int, payload: bytes) -> bytes:
    pad = start = 0
    if flags & PADDED:
        if not payload:
            raise _ProtocolViolation("padding without its length")
        pad, start = payload[0], 1
    if flags & PRIORITY_FLAG:
        start += 5
    if start + pad > len(payload):
        raise _ProtocolViolation("more padding than frame")
    return payload[start : len(payload) - pad]


def _ignore(_flags: int, _stream_id: int, _payload: bytes) -> None:
    """PRIORITY is deprecated (RFC 9113 §5.3.2)."""


def _refuse_push(_flags: int, _stream_id: int, _payload: bytes) -> None:
    raise _ProtocolViolation("a push, although pushes are switched off")
