"""One call on an HTTP/2 connection: how its answer is put together, and how it can end."""

import math
import struct
from typing import Final

from shared.rpc.header_block import Headers

# One message, as the channels of grpc.aio have it.
MESSAGE_BYTES_MAX = 16 * 1024 * 1024
# PROTOCOL-HTTP2 of gRPC, "Length-Prefixed-Message": compressed flag, length.
MESSAGE_HEAD: Final = struct.Struct(">BL")
MESSAGE_HEAD_BYTES: Final = 5

NOTHING: Final = memoryview(b"")


class ConnectionLost(Exception):
    """The connection ended under a call; whether the call had its effect is not known."""


class NotProcessed(Exception):
    """The server has not looked at this call: it may be made again, whatever it does."""


class DeadlinePassed(Exception):
    """The call's time is spent."""


class BadAnswer(Exception):
    """The answer is none of gRPC, or too long."""


class NoRoom(Exception):
    """Too much of too many answers has come in part."""


class StreamReset(Exception):
    """The server reset the call's stream.

    Args:
        code: of RFC 9113 §7.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"stream reset with code {code}")
        self.code = code


class Call:
    """One call; a subclass says what becomes of its answer.

    A started call ends with exactly one on_end or on_failure, unless it is cancelled here.

    Args:
        deadline_s: on time.monotonic(); the call fails when it has come.

    Attributes:
        stream_id: 0 before it starts.
        unsent: what of its request waits for a window.
        send_window: what the server takes of that now, in bytes.
        initial: the headers of its answer, once they are there.
        partial: what has come of a message, once one came in parts.
        unacked: bytes received since the last window update.
    """

    __slots__ = (
        "deadline_s",
        "initial",
        "partial",
        "send_window",
        "stream_id",
        "unacked",
        "unsent",
    )

    def __init__(self, deadline_s: float = math.inf) -> None:
        self.deadline_s = deadline_s
        self.stream_id = 0
        self.unsent = NOTHING
        self.send_window = 0
        self.initial: Headers | None = None
        self.partial: bytearray | None = None
        self.unacked = 0

    def on_message(self, message: bytes) -> bool:
        """A whole message of the answer; False refuses it, and fails the call."""
        raise NotImplementedError

    def on_end(self, initial: Headers, trailing: Headers) -> None:
        """The call is over; for an answer of one header block both are the same."""
        raise NotImplementedError

    def on_failure(self, error: Exception) -> None:
        """The call is over without a whole answer.

        Args:
            error: ConnectionLost, NotProcessed, DeadlinePassed, BadAnswer, NoRoom, StreamReset.
        """
        raise NotImplementedError

    def take(self, payload: bytes) -> BadAnswer | None:
        """Hand on the messages that are whole with this payload, and keep the rest.

        Returns:
            What is wrong with the answer, if anything is.
        """
        if not self.partial and len(payload) >= MESSAGE_HEAD_BYTES:
            is_compressed, length = MESSAGE_HEAD.unpack_from(payload)
            if length == len(payload) - MESSAGE_HEAD_BYTES and not is_compressed:
                # The usual answer: one frame, one message.
                return self._hand_on(payload[MESSAGE_HEAD_BYTES:])
        return self._take_part(payload)

    def _take_part(self, payload: bytes) -> BadAnswer | None:
        if self.partial is None:
            self.partial = bytearray()
        data, error = self.partial, None
        data += payload
        while len(data) >= MESSAGE_HEAD_BYTES and error is None:
            is_compressed, length = MESSAGE_HEAD.unpack_from(data)
            if is_compressed:  # nobody told the server that we understand any compression
                return BadAnswer("a compressed message")
            if length > MESSAGE_BYTES_MAX:
                return BadAnswer(f"a message of {length} bytes")
            end = MESSAGE_HEAD_BYTES + length
            if len(data) < end:
                break
            message = bytes(memoryview(data)[MESSAGE_HEAD_BYTES:end])
            del data[:end]
            error = self._hand_on(message)
        return error

    def _hand_on(self, message: bytes) -> BadAnswer | None:
        return None if self.on_message(message) else BadAnswer("more messages than one")
