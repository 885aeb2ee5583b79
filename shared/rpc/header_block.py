"""Request headers of gRPC over HTTP/2, encoded without a table (RFC 7541 §6.2).

Every field is a literal: a little longer on the wire, and nothing to remember. What is the same
for all calls of a method is encoded once.
"""

import base64
from typing import TypeAlias

# Of an answer: lower-case name -> value; what came several times is joined by commas.
Headers: TypeAlias = dict[bytes, bytes]

# In the static table of RFC 7541, appendix A.
_METHOD_POST, _SCHEME_HTTP, _SCHEME_HTTPS = b"\x83", b"\x86", b"\x87"
_LITERAL, _NEVER_INDEXED = b"\x00", b"\x10"
_TIMEOUT_DIGITS_MAX = 99_999_999


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


def field(name: bytes, value: bytes, *, is_secret: bool = False) -> bytes:
    """One header; a secret one may not be put into anybody's table on its way."""
    start = _NEVER_INDEXED if is_secret else _LITERAL
    return start + string(name) + string(value)


def metadata_field(name: str, value: str | bytes, *, is_secret: bool = False) -> bytes:
    """One entry of gRPC metadata; the value of a "-bin" name travels in base 64.

    Raises:
        ValueError: a value is not visible ASCII (PROTOCOL-HTTP2 of gRPC, "ASCII-Value").
    """
    if name.endswith("-bin"):
        raw = value.encode() if isinstance(value, str) else value
        return field(name.encode("ascii"), base64.b64encode(raw).rstrip(b"="))
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not (text.isascii() and text.isprintable()):
        raise ValueError(f"the metadata {name} is not visible ASCII")
    return field(name.encode("ascii"), text.encode("ascii"), is_secret=is_secret)


def string(value: bytes) -> bytes:
    """A string literal without Huffman coding (RFC 7541 §5.2)."""
    size = len(value)
    if size < 127:
        return bytes((size,)) + value
    out, rest = bytearray(b"\x7f"), size - 127
    while rest >= 128:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out) + value


def timeout_text(timeout_s: float) -> bytes:
    """The value of grpc-timeout: at most eight digits and a unit, never rounded to nothing."""
    milliseconds = int(timeout_s * 1000)
    if milliseconds <= 0:
        return b"%du" % max(1, int(timeout_s * 1_000_000))
    if milliseconds <= _TIMEOUT_DIGITS_MAX:
        return b"%dm" % milliseconds
    return b"%dS" % min(int(timeout_s), _TIMEOUT_DIGITS_MAX)
