"""The headers of gRPC over HTTP/2, without a table on either side (RFC 7541 §6.2).

Every field is a literal: a little longer on the wire, and nothing to remember. What is the same
for all calls of a method is encoded once; and equal blocks of answers are decoded once.
"""

import base64
import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from hpack import Decoder
from hpack.exceptions import HPACKError, OversizedHeaderListError

# Of an answer: lower-case name -> value; what came several times is joined by commas.
Headers: TypeAlias = Mapping[bytes, bytes]

# A table of no bytes (RFC 7541 §6.3). Said once per connection: some decoders ask for it when
# they allow less than the table that every connection begins with (§4.2).
NO_TABLE: Final = b"\x20"

BINARY_SUFFIX: Final = "-bin"

# What a block of an answer can be: the begin of one of gRPC; the begin of another, from a proxy
# or a server without gRPC; a 1xx, before the answer; the end; more than is read.
ANSWER, FOREIGN, INFORMATION, TRAILERS, TOO_LONG = range(5)

# Of an answer, as the channels of grpc.aio have it: encoded, and decoded as RFC 9113 §6.5.2
# counts.
BLOCK_BYTES_MAX = 16 * 1024
# Different blocks that are remembered; nearly all answers share two.
BLOCKS_KEPT_MAX = 256
BLOCK_KEPT_BYTES_MAX = 512

# In the static table of RFC 7541, appendix A.
_METHOD_POST, _SCHEME_HTTP, _SCHEME_HTTPS = b"\x83", b"\x86", b"\x87"
_LITERAL, _NEVER_INDEXED = b"\x00", b"\x10"
# Nobody on the way may put these into a table (RFC 7541 §7.1.3).
_SECRET_NAMES = frozenset({"tenfold-identity", "authorization", "cookie"})
# PROTOCOL-HTTP2 of gRPC: "Header-Name", and what only a client itself may say.
_NAME = re.compile(r"[0-9a-z_.-]+")
_OWN_NAME = re.compile(r"grpc-.*|te|content-type|user-agent|host|connection")
_VISIBLE = bytes(range(0x20, 0x7F))
_DIGITS_MAX = 99_999_999
# Encoded names that are remembered; the names come from code, so there are few.
_NAMES_MAX = 256
_names: dict[str, bytes] = {}


def call_block(path: str, authority: str, user_agent: str, *, is_encrypted: bool = False) -> bytes:
    """The headers that all calls of a method share."""
    return b"".join(
        (
            _METHOD_POST,
            _SCHEME_HTTPS if is_encrypted else _SCHEME_HTTP,
            field(b":path", path.encode("ascii")),
            field(b":authority", authority.encode("ascii")),
            field(b"te", b"trailers"),
            field(b"content-type", b"application/grpc"),
            field(b"user-agent", user_agent.encode("ascii")),
        )
    )


def field(name: bytes, value: bytes) -> bytes:
    """One header."""
    return _LITERAL + string(name) + string(value)


def metadata_field(name: str, value: str | bytes) -> bytes:
    """One entry of gRPC metadata; the value of a "-bin" name travels in base 64.

    Raises:
        ValueError: it cannot be said in metadata; names are lower case, values visible ASCII
            (PROTOCOL-HTTP2 of gRPC, "Header-Name" and "ASCII-Value").
    """
    start = _names.get(name) or _encoded_name(name)
    try:
        raw = value if isinstance(value, bytes) else value.encode("ascii")
    except UnicodeEncodeError:
        raise ValueError(f"the metadata {name} is not visible ASCII") from None
    if name.endswith(BINARY_SUFFIX):
        raw = base64.b64encode(raw).rstrip(b"=")
    elif raw.translate(None, _VISIBLE):  # what is left when all that is visible is deleted
        raise ValueError(f"the metadata {name} is not visible ASCII")
    return start + string(raw)


def _encoded_name(name: str) -> bytes:
    if not _NAME.fullmatch(name) or _OWN_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name metadata")
    start = _NEVER_INDEXED if name in _SECRET_NAMES else _LITERAL
    encoded = start + string(name.encode("ascii"))
    if len(_names) < _NAMES_MAX:
        _names[name] = encoded
    return encoded


def binary_value(text: bytes) -> bytes | None:
    """The first value of a "-bin" entry, padded or not; None where it is no base 64."""
    first = text.partition(b",")[0]
    try:
        return base64.b64decode(first + b"=" * (-len(first) % 4), validate=True)
    except ValueError:
        return None


def string(value: bytes) -> bytes:
    """A string literal without Huffman coding (RFC 7541 §5.2)."""
    size = len(value)
    if size < 127:
        return _SHORT[size] + value
    out, rest = bytearray(b"\x7f"), size - 127
    while rest >= 128:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out) + value


_SHORT = [bytes((size,)) for size in range(127)]
_TIMEOUT = _LITERAL + string(b"grpc-timeout")


def timeout_field(timeout_s: float) -> bytes:
    """The header grpc-timeout.

    Args:
        timeout_s: more than 0.
    """
    text = timeout_text(timeout_s)
    return _TIMEOUT + _SHORT[len(text)] + text


def timeout_text(timeout_s: float) -> bytes:
    """The value of grpc-timeout: at most eight digits and a unit, never rounded to nothing."""
    milliseconds = int(timeout_s * 1000)
    if milliseconds <= 0:
        return b"%du" % max(1, int(timeout_s * 1_000_000))
    if milliseconds <= _DIGITS_MAX:
        return b"%dm" % milliseconds
    return b"%dS" % min(int(timeout_s), _DIGITS_MAX)


class BlockDecoder:
    """Decodes the header blocks of one connection, whose peer may keep no table."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=BLOCK_BYTES_MAX)
        self._decoder.max_allowed_table_size = 0
        self._decoder.header_table_size = 0
        self._known: dict[bytes, tuple[int, Headers]] = {}

    def decode(self, block: bytes) -> tuple[int, Headers]:
        """What a block is, and its headers; equal blocks share them.

        Raises:
            ValueError: it does not decode.
        """
        return self._known.get(block) or self._decode(block)

    def _decode(self, block: bytes) -> tuple[int, Headers]:
        if len(block) > BLOCK_BYTES_MAX:
            return TOO_LONG, {}
        try:
            pairs: Any = self._decoder.decode(block, raw=True)
        except OversizedHeaderListError:
            return TOO_LONG, {}
        except HPACKError as error:
            raise ValueError(f"a header block does not decode: {error}") from error
        headers: dict[bytes, bytes] = {}
        for name, value in pairs:
            headers[name] = headers[name] + b"," + value if name in headers else value
        decoded = _kind_of(headers), headers
        if len(block) <= BLOCK_KEPT_BYTES_MAX:
            if len(self._known) >= BLOCKS_KEPT_MAX:
                self._known.clear()
            self._known[block] = decoded
        return decoded


def _kind_of(headers: Headers) -> int:
    status = headers.get(b":status")
    if status is None:
        return TRAILERS
    if status == b"200" and headers.get(b"content-type", b"").startswith(b"application/grpc"):
        return ANSWER
    return INFORMATION if status.startswith(b"1") else FOREIGN
