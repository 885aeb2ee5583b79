"""HTTP/2 frames: their numbers, how they are put together, and what breaks their rules.

Source: RFC 9113, §4 and §6.
"""

import struct
from typing import Final

# Frame types.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9
# Flags.
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
# Settings.
SETTINGS_HEADER_TABLE_SIZE, SETTINGS_ENABLE_PUSH, SETTINGS_MAX_CONCURRENT_STREAMS = 1, 2, 3
SETTINGS_INITIAL_WINDOW_SIZE, SETTINGS_MAX_FRAME_SIZE, SETTINGS_MAX_HEADER_LIST_SIZE = 4, 5, 6
# Error codes (§7).
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR = 0x0, 0x1, 0x3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM = 0x5, 0x6, 0x7
CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM, INADEQUATE_SECURITY = 0x8, 0x9, 0xB, 0xC

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW_DEFAULT: Final = 65_535
WINDOW_MAX: Final = 2**31 - 1
FRAME_BYTES_DEFAULT: Final = 16_384
FRAME_BYTES_MAX: Final = 2**24 - 1
STREAM_ID_MAX: Final = 2**31 - 1
HEAD_BYTES: Final = 9

# Length (24 bits, in two parts), type, flags, stream.
HEAD: Final = struct.Struct(">HBBBL")
SETTING: Final = struct.Struct(">HL")
WORD: Final = struct.Struct(">L")
TWO_WORDS: Final = struct.Struct(">LL")


class ProtocolViolation(Exception):
    """The peer broke the protocol: the connection ends.

    Args:
        text: what it did.
        code: of §7, for the farewell.
    """

    def __init__(self, text: str, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    size = len(payload)
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join([SETTING.pack(*pair) for pair in pairs]))


def window_update(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, WORD.pack(increment))


def reset(stream_id: int, code: int) -> bytes:
    """A RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, WORD.pack(code))


def goaway(code: int, last_id: int = 0, debug: bytes = b"") -> bytes:
    """A GOAWAY frame."""
    return frame(GOAWAY, 0, 0, TWO_WORDS.pack(last_id, code) + debug)


def header_frames(stream_id: int, block: bytes, *, flags: int, frame_bytes: int) -> bytes:
    """A HEADERS frame, and CONTINUATIONs where the block is longer than a frame may be."""
    parts = [block[at : at + frame_bytes] for at in range(0, len(block), frame_bytes)]
    kinds = [HEADERS, *[CONTINUATION] * (len(parts) - 1)]
    all_flags = [flags, *[0] * (len(parts) - 1)]
    all_flags[-1] |= END_HEADERS
    return b"".join(
        frame(kind, bits, stream_id, part)
        for kind, bits, part in zip(kinds, all_flags, parts, strict=True)
    )


def word_of(payload: bytes) -> int:
    """The payload of a frame that holds 32 bits.

    Raises:
        ProtocolViolation: it holds more or less.
    """
    if len(payload) != WORD.size:
        raise ProtocolViolation("a frame of a wrong size", FRAME_SIZE_ERROR)
    word: int = WORD.unpack(payload)[0]
    return word


def unpadded(flags: int, payload: bytes) -> bytes:
    """The payload less its padding and its priority, as the flags say.

    Raises:
        ProtocolViolation: there is more of them than of the frame.
    """
    padding = start = 0
    if flags & PADDED:
        if not payload:
            raise ProtocolViolation("padding without its length", FRAME_SIZE_ERROR)
        padding, start = payload[0], 1
    if flags & HAS_PRIORITY:
        start += 5
    if start + padding > len(payload):
        raise ProtocolViolation("more padding than frame")
    return payload[start : len(payload) - padding]
